"""An experiment as a YAML file: strict models, the only parser, and the values that the sections stand for."""

from pquant_jax.config._build import (
    dataset,
    input_spec,
    instrumented,
    loss,
    metric,
    model,
    optimizer,
    plan,
    rate,
    weights_optimizer,
)
from pquant_jax.config._compress import compresses, compression, format_of, quantizer, quantizes, search
from pquant_jax.config._hardware import Hls
from pquant_jax.config._load import dump, load, parse, read_yaml
from pquant_jax.config._names import find_file, importing, named
from pquant_jax.config._schema import Experiment, json_schema

__all__ = [
    "Experiment",
    "Hls",
    "compresses",
    "compression",
    "dataset",
    "dump",
    "find_file",
    "format_of",
    "importing",
    "input_spec",
    "instrumented",
    "json_schema",
    "load",
    "loss",
    "metric",
    "model",
    "named",
    "optimizer",
    "parse",
    "plan",
    "quantizer",
    "quantizes",
    "rate",
    "read_yaml",
    "search",
    "weights_optimizer",
]
