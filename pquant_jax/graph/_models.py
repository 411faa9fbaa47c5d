"""Any JAX model as a `Model`: a pure forward, its parameters and its state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import Tree
from pquant_jax._errors import TraceError


class Model(NamedTuple):
    """forward(params, state, x, *, train, rng) -> (y, state); batch statistics and dropout are explicit.

    x and y have the batch as axis 0 of every array; `train` is static; `rng` is a key or None.
    """

    forward: Callable[..., tuple[Any, Tree]]
    params: Tree
    state: Tree


_INVERTED = ("deterministic", "use_running_average", "inference")


def _train_argument(function: Callable, train: bool) -> dict[str, bool]:
    """The keyword by which a model is told that it trains: `train`, `training`, or the negations that flax uses."""
    names = inspect.signature(function).parameters
    found = {n: train for n in ("train", "training", "is_training") if n in names}
    return found or {n: not train for n in _INVERTED if n in names}


def from_function(forward: Callable, params: Tree) -> Model:
    """A model from a plain function of (params, x): no state, no dropout.

    >>> m = from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3), jnp.float32)})
    >>> m.forward(m.params, m.state, jnp.ones((1, 2)), train=False, rng=None)[0].shape
    (1, 3)
    """

    def run(params: Tree, state: Tree, x: Any, *, train: bool, rng: Any) -> tuple[Any, Tree]:
        del rng
        return forward(params, x, **_train_argument(forward, train)), state

    return Model(run, params, {})


def from_linen(module: Any, x: Any, *, rng: jax.Array | None = None, variables: Tree | None = None) -> Model:
    """A model from a flax.linen module.

    Args:
      module: its `__call__` takes x and, if it matters, `train`, `training`, `deterministic` or `use_running_average`.
      x: a sample batch, for the shapes.
      rng: key of the initial parameters; default `jax.random.key(0)`.
      variables: already initialised (or trained) variables, instead of `rng`.
    """
    call = type(module).__call__
    if variables is None:
        key = jax.random.key(0) if rng is None else rng
        variables = module.init({"params": key, "dropout": key}, x, **_train_argument(call, False))
    assert variables is not None  # for the type checker
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def run(params: Tree, state: Tree, x: Any, *, train: bool, rng: Any) -> tuple[Any, Tree]:
        rngs = None if rng is None else {"dropout": rng}
        mutable = list(state) if train else []
        out = module.apply({"params": params, **state}, x, rngs=rngs, mutable=mutable, **_train_argument(call, train))
        y, updated = out
        return y, {**state, **updated}

    return Model(run, variables["params"], state)


def from_nnx(module: Any) -> Model:
    """A model from a flax.nnx module; `module.train()` and `module.eval()` are called as the stage asks."""
    from flax import nnx

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    call = type(module).__call__

    def run(params: Tree, state: Tree, x: Any, *, train: bool, rng: Any) -> tuple[Any, Tree]:
        merged = nnx.merge(graph, _nnx_state(params, param_shape), _nnx_state(state, rest_shape))
        if train:
            merged.train()
        else:
            merged.eval()
        if rng is not None:
            nnx.reseed(merged, dropout=rng, default=rng)
        y = merged(x, **_train_argument(call, train))
        updated: Any = nnx.split(merged, nnx.Param, ...)[2]
        return y, nnx.to_pure_dict(updated) if train else state

    param_shape, rest_shape = params, rest
    return Model(run, nnx.to_pure_dict(params), nnx.to_pure_dict(rest))


def _nnx_state(values: Tree, like: Any) -> Any:
    """An nnx.State of the structure of `like` that holds `values` (which may be tracers)."""
    from flax import nnx

    state = jax.tree.map(lambda v: v, like)
    nnx.replace_by_pure_dict(state, values)
    return state


def from_equinox(module: Any, state: Any = None) -> Model:
    """A model from an equinox module that maps ONE sample; it is vmapped over the batch under axis name "batch".

    Args:
      module: float arrays are the parameters, everything else is static.
      state: the `eqx.nn.State` of stateful layers such as BatchNorm, from `eqx.nn.make_with_state`.
    """
    import equinox as eqx

    params, static = eqx.partition(module, eqx.is_inexact_array)
    wants_key = "key" in inspect.signature(type(module).__call__).parameters

    def run(params: Tree, model_state: Tree, x: Any, *, train: bool, rng: Any) -> tuple[Any, Tree]:
        merged = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
        size = jax.tree.leaves(x)[0].shape[0]
        keys = None if rng is None or not wants_key else jax.random.split(rng, size)
        if state is None:
            if keys is None:
                return jax.vmap(merged, axis_name="batch")(x), model_state
            return jax.vmap(lambda v, key: merged(v, key=key), axis_name="batch")(x, keys), model_state
        if keys is None:
            return jax.vmap(merged, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, model_state)
        stepped = jax.vmap(lambda v, s, key: merged(v, s, key=key), in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
        return stepped(x, model_state, keys)

    return Model(run, params, {} if state is None else state)


def as_model(model: Any, x: Any) -> Model:
    """`model` itself if it is a `Model`, else the converter its framework needs.

    Raises: TraceError for anything that is not a Model, a linen, nnx or equinox module.
    """
    if isinstance(model, Model):
        return model
    bases = {f"{b.__module__}.{b.__qualname__}" for b in type(model).__mro__}
    if "flax.linen.module.Module" in bases:
        return from_linen(model, x)
    if any(b.startswith("flax.nnx") for b in bases):
        return from_nnx(model)
    if any(b.startswith("equinox") for b in bases):
        return from_equinox(model)
    raise TraceError(
        f"a model of type {type(model).__name__} is not a linen, nnx or equinox module; "
        "wrap a plain function with pq.from_function(forward, params)"
    )


def check_forward(model: Model, x: Any) -> Any:
    """Shapes of the model's output on `x`; the model's own error is passed on with the input's shapes in front."""
    try:
        return jax.eval_shape(lambda p, s, v: model.forward(p, s, v, train=False, rng=None)[0], model.params, model.state, x)
    except Exception as error:  # every framework raises its own classes; the cause stays attached
        shapes = jax.tree.map(jnp.shape, x)
        raise TraceError(f"the model does not accept an input of shape {shapes}: {str(error).splitlines()[0]}") from error
