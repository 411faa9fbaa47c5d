"""The quantize sites of a configured model, as text: before anything is trained."""

from __future__ import annotations

import jax
import numpy as np

import pquant_jax as pq
from pquant_jax import config
from pquant_jax.run._prepare import batch_of, prepare_data, targets


def explain(experiment: config.Experiment) -> str:
    """Every site of the model, what the configuration gives it and why.  Raises: ConfigError without a quantizer."""
    with config.importing(experiment.folders):
        inst = _instrumented(experiment)
        made = config.compression(experiment, inst)
    if made is None or not made.formats:
        raise pq.ConfigError("the configuration has no quantization section; `pquant-jax template` writes one")
    return pq.explain(inst, made)


def template(experiment: config.Experiment, quantizer: str) -> str:
    """The `quantization` section with one rule per site of the model, indented for a configuration file."""
    with config.importing(experiment.folders):
        text = pq.template(_instrumented(experiment), quantizer)
    return "quantization:\n" + "".join(f"  {line}\n" for line in text.splitlines())


def _instrumented(experiment: config.Experiment) -> pq.Instrumented:
    dataset = prepare_data(experiment)
    x = batch_of(dataset.train.x, 2)
    return config.instrumented(experiment, config.model(experiment, jax.tree.map(np.zeros_like, x), targets(dataset)), x)
