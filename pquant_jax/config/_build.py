"""What the sections of an `Experiment` stand for, one function each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import numpy as np
import optax

import pquant_jax.data as datasets
from pquant_jax import _tree, train, transforms, zoo
from pquant_jax._base import InputSpec, Transform
from pquant_jax._errors import ConfigError, DataError, did_you_mean
from pquant_jax.config._names import named
from pquant_jax.config._schema import Experiment, Rate
from pquant_jax.graph import Instrumented, Model, as_model, from_linen, instrument

LOSSES: Final[Mapping[str, Callable]] = {
    "cross_entropy": train.cross_entropy,
    "squared_error": train.squared_error,
    "absolute_error": train.absolute_error,
}
METRICS: Final[Mapping[str, train.Metric]] = {"accuracy": train.accuracy, "mse": train.mse, "mae": train.mae}


def dataset(experiment: Experiment) -> datasets.Dataset:
    """The checked data set of `data`, cut to `data.n` samples.

    Raises: ConfigError or DataError, one line, for data that are missing or can't be trained on.
    """
    section = experiment.data
    made = datasets.load(section.source, task=experiment.task, standardise=section.standardise)
    if section.n is None:
        return made
    sizes = [len(jax.tree.leaves(s.y)[0]) for s in (made.train, made.val, made.test)]
    if section.n > sum(sizes):
        raise DataError(
            f"data.n is {section.n}, but {made.name or section.source} has {sum(sizes)} samples; leave data.n out for all"
        )
    kept = [round(section.n * size / sum(sizes)) for size in sizes]
    if min(kept) < 1:
        raise DataError(f"data.n is {section.n}, which leaves a split of {made.name or section.source} empty; take more")
    splits = [datasets.take(s, slice(n)) for s, n in zip((made.train, made.val, made.test), kept, strict=True)]
    return made._replace(train=splits[0], val=splits[1], test=splits[2], digest=datasets.digest(splits))


def loss(experiment: Experiment) -> Callable:
    """The loss function(prediction, target) of one value per sample."""
    default = "cross_entropy" if experiment.task == "classification" else "squared_error"
    return _function(experiment.loss or default, LOSSES, "loss")


def metric(experiment: Experiment) -> train.Metric:
    """The figure of merit.  Raises: ConfigError if an own one is no `pq.Metric`."""
    name = experiment.metric or ("accuracy" if experiment.task == "classification" else "mse")
    found = _function(name, METRICS, "metric")
    if not isinstance(found, train.Metric):
        raise ConfigError(f"metric {name!r} is a {type(found).__name__}, expected pq.Metric(name, function, higher_is_better)")
    return found


def _function(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name in known:
        return known[name]
    if ":" not in name:
        raise ConfigError(f"{what} is {name!r}, expected a name or 'package.module:function'; {did_you_mean(name, known)}")
    return named(name, what)


def input_spec(experiment: Experiment) -> InputSpec:
    """The declared input port."""
    return InputSpec(**experiment.input.model_dump())


def plan(experiment: Experiment) -> train.Plan:
    """The plan of `training`.  Raises: ConfigError for a plan without epochs or with a rewind that can't be done."""
    t = experiment.training
    made = train.Plan(**t.epochs.model_dump(), rounds=t.rounds, rewind=t.rewind, save_epoch=t.save_epoch)
    train.schedule(made)
    return made


def rate(section: Rate, steps: int, first: int = 0) -> optax.Schedule:
    """The learning rate as a function of the optimizer step, over `steps` steps of all stages together.

    first: steps that another optimizer has done before.
    """
    end = section.end or 0.0
    made = optax.constant_schedule(section.start)
    if section.schedule == "cosine":
        made = optax.cosine_decay_schedule(section.start, max(steps, 1), alpha=end / section.start)
    if section.schedule == "linear":
        made = optax.linear_schedule(section.start, end, max(steps, 1))
    return made if not first else lambda count: made(count + first)


def weights_optimizer(experiment: Experiment, steps: int, first: int = 0) -> optax.GradientTransformation:
    """The optimizer of the model's parameters: also the float baseline's."""
    t = experiment.training
    if t.optimizer == "adamw":
        return optax.adamw(rate(t.learning_rate, steps, first), weight_decay=t.weight_decay)
    return _plain(t.optimizer, rate(t.learning_rate, steps, first))


def optimizer(experiment: Experiment, made: Transform | None, steps: int, first: int = 0) -> optax.GradientTransformation:
    """`pq.optimizer` with a rate of its own for bit-widths, thresholds and multipliers where the configuration gives one."""
    t, weights = experiment.training, _sparsifying(experiment, steps, first)
    if made is None:
        return weights
    rates = {"bits": t.bits_learning_rate, "thresholds": t.threshold_learning_rate}
    # no weight decay on bits and thresholds: 0 bits or a threshold of 0 is not a neutral value
    others = {k: _plain(t.optimizer, rate(v or t.learning_rate, steps, first)) for k, v in rates.items()}
    duals = optax.sgd(rate(t.multiplier_learning_rate, steps, first))
    return transforms.optimizer(made, weights=weights, duals=duals, **others)


def _sparsifying(experiment: Experiment, steps: int, first: int) -> optax.GradientTransformation:
    """The weights' optimizer with what `training.pnorm_decay` adds, on kernels: a bias of 0 would stay 0."""
    made, decay = weights_optimizer(experiment, steps, first), experiment.training.pnorm_decay
    if decay is None:
        return made
    link = transforms.pnorm_decay(rate(experiment.training.learning_rate, steps, first), **decay.model_dump())
    return optax.chain(made, optax.masked(link, lambda params: jax.tree.map(lambda w: _tree.is_kernel("", w), params)))


def _plain(name: str, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(learning_rate, momentum=0.9) if name == "sgd" else optax.adam(learning_rate)


def model(experiment: Experiment, x: Any, outputs: int | None, *, trained: bool = True) -> Model:
    """The model of `model.build` with its initial parameters.

    x: a sample batch, or a tree of them.  outputs: classes or targets, for a function that takes `outputs`.
    trained: start from `training.init` if there is one.
    Raises: ConfigError for a function or an argument that doesn't exist, or a model that does not take x.
    """
    build = _builder(experiment.model.build)
    offered = {"outputs": outputs, "seed": experiment.seed, "x": x}
    module = build(**_arguments(build, experiment.model.build, experiment.model.args, offered))
    try:
        linen = any(b.__module__.startswith("flax.linen") for b in type(module).__mro__)
        made = from_linen(module, x, rng=jax.random.key(experiment.seed)) if linen else as_model(module, x)
    except (TypeError, ValueError, IndexError) as error:  # flax's own errors are ValueErrors
        shapes = ", ".join(str(np.shape(v)) for v in jax.tree.leaves(x))
        line = str(error).strip().splitlines()[0]
        raise ConfigError(f"model {experiment.model.build!r} does not take an input of shape {shapes}: {line}") from error
    path = experiment.training.init
    return made if path is None or not trained else _initialised(made, path)


def instrumented(experiment: Experiment, made: Model, x: Any) -> Instrumented:
    """`pq.instrument` of the model, with the configured input port and `model.split`.  x: a sample batch."""
    return instrument(made, x, inputs=input_spec(experiment), split=experiment.model.split)


def _builder(name: str) -> Callable:
    if ":" in name:
        found = named(name, "model")
    elif name in zoo.__all__ and name.islower():
        found = getattr(zoo, name)
    else:
        known = [n for n in zoo.__all__ if n.islower()]
        raise ConfigError(
            f"model is {name!r}, expected a model of the zoo or 'package.module:function'; {did_you_mean(name, known)}"
        )
    if not callable(found):
        raise ConfigError(f"model {name!r} is a {type(found).__name__}, expected a function that returns a model")
    return found


def _arguments(build: Callable, name: str, given: Mapping[str, Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """The given arguments, checked against the signature, and those of `offered` that it takes."""
    parameters = inspect.signature(build).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in given:
        if key not in parameters and not anything:
            raise ConfigError(f"model.args: {name!r} takes no {key!r}; {did_you_mean(key, parameters)}")
    filled = {k: v for k, v in offered.items() if k in parameters and v is not None}
    arguments = {**filled, **given}
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [n for n in needed if n not in arguments]
    if missing:
        raise ConfigError(f"model.args: {name!r} needs {', '.join(map(repr, missing))}; give it under model.args")
    return arguments


def _initialised(made: Model, path: str) -> Model:
    """`made` with parameters and state from an .npz: arrays by path, or what `finalize` writes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"training.init is {path!r}, which can't be read as an .npz: {error}") from error
    leaves = {name: _leaf(arrays, name, leaf, path) for name, leaf in _tree.flatten(made.params).items()}
    states = {name: leaf for name, leaf in _tree.flatten(made.state).items() if f"state/{name}" in arrays}
    states = {name: _shaped(arrays[f"state/{name}"], leaf, f"state/{name}", path) for name, leaf in states.items()}
    return made._replace(params=_tree.replace(made.params, leaves), state=_tree.replace(made.state, states))


def _leaf(arrays: Mapping[str, np.ndarray], name: str, leaf: Any, path: str) -> Any:
    if f"codes/{name}" in arrays:
        found = np.ldexp(arrays[f"codes/{name}"].astype(np.float64), -arrays[f"f/{name}"])
    else:
        found = next((arrays[key] for key in (name, f"value/{name}") if key in arrays), None)
    if found is None:
        known = [key.partition("/")[2] if key.startswith(("value/", "codes/")) else key for key in arrays]
        raise ConfigError(f"training.init is {path!r}, which lacks the parameter {name!r}; {did_you_mean(name, known)}")
    return _shaped(found, leaf, name, path)


def _shaped(found: np.ndarray, leaf: Any, name: str, path: str) -> Any:
    if np.shape(found) != np.shape(leaf):
        raise ConfigError(f"training.init is {path!r}: {name!r} has shape {np.shape(found)}, the model's {np.shape(leaf)}")
    return jax.numpy.asarray(found, jax.numpy.result_type(leaf))
