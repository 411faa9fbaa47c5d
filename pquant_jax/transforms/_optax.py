"""A compression transform as the last link of an ordinary optax chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pquant_jax._base import Event, Params, Stage, State, Stats, Transform, Tree
from pquant_jax._errors import TransformError


class CompressionState(NamedTuple):
    """The compression's state inside an optax state; found by this type, never by a field name."""

    inner: State


def as_optax(compression: Transform) -> optax.GradientTransformationExtraArgs:
    """`compression.step` as the last link of an optax chain.

    The step runs on `params + updates`, because optax hands `update` the parameters before the update; the link
    returns the difference.  A leaf that the step leaves alone keeps its update untouched, so nothing is rounded.

    Extra arguments of `update`: `stage` (a `Stage`, traced), and `stats` if `compression.needs` any.
    Raises: TransformError if one of them is missing.
    """

    def init(params: Any) -> CompressionState:
        return CompressionState(compression.init(params))

    def update(updates: Params, state: CompressionState, params: Params | None = None, *, stage=None, stats=None, **extra):
        if params is None:
            raise TransformError("as_optax needs the parameters: call tx.update(grads, state, params, stage=..., stats=...)")
        if stage is None:
            raise TransformError("as_optax got no stage: call tx.update(..., stage=pq.Stage.TRAIN), a traced int32 in a scan")
        missing = ", ".join(sorted(compression.needs - set(stats or {})))
        if missing:
            how = "stats= from inst.capture(...), with 'gradient' the gradients of the model's parameters by path"
            raise TransformError(f"{compression.name} needs the statistics {missing}: pass {how}")
        moved = optax.apply_updates(params, updates)
        stepped, inner = compression.step(
            moved, state.inner, stage=jnp.asarray(stage, jnp.int32), stats=stats or {}, previous=params, **extra
        )
        updates = jax.tree.map(lambda u, p, m, s: u if s is m else s - p, updates, params, moved, stepped)
        return updates, CompressionState(inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def optimizer(
    compression: Transform,
    *,
    weights: optax.GradientTransformation,
    bits: optax.GradientTransformation | None = None,
    thresholds: optax.GradientTransformation | None = None,
    duals: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(optax.partition({...}, labels), as_optax(compression))`, and nothing else.

    Each label has its own optimizer (default Adam(1e-3) for bits and thresholds), so that the weights' decay never
    reaches bits, thresholds or duals; duals ascend: their link is followed by `scale(-1)`.  A plain
    `chain(adam, as_optax(c))` would make Adam *descend* the multipliers.
    """
    ascent = optax.chain(duals if duals is not None else optax.sgd(1e-2), optax.scale(-1.0))
    links: dict[Any, optax.GradientTransformation] = {
        "weights": weights,
        "bits": optax.adam(1e-3) if bits is None else bits,
        "thresholds": optax.adam(1e-3) if thresholds is None else thresholds,
        "duals": ascent,
    }
    return optax.chain(optax.partition(links, compression.labels), as_optax(compression))


def _is_ours(node: Any) -> bool:
    return isinstance(node, CompressionState)


def state_of(opt_state: Any) -> State:
    """The compression's state inside an optax state.  Raises: TransformError unless there is exactly one."""
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=_is_ours) if _is_ours(n)]
    if len(found) != 1:
        raise TransformError(
            f"the optimizer state holds {len(found)} compression states, expected 1: is pq.as_optax in the chain?"
        )
    return found[0].inner


def update_state(opt_state: Any, function: Callable[[State], State]) -> Any:
    """`opt_state` with the compression's state replaced by `function(state)`, e.g. `with_hyper(s, beta=...)`."""
    state_of(opt_state)
    return jax.tree.map(lambda n: CompressionState(function(n.inner)) if _is_ours(n) else n, opt_state, is_leaf=_is_ours)


def boundary(
    compression: Transform,
    params: Params,
    opt_state: Any,
    *,
    event: Event,
    stage: Stage,
    epoch: int = 0,
    epochs: int = 1,
    stats: Stats | None = None,
) -> tuple[Params, Any]:
    """Tell the compression of an event between epochs; jit-able, every argument after `opt_state` may be traced.

    epoch counts from 0 within the stage or round, epochs is its length.
    """
    numbers = dict(event=event, stage=stage, epoch=epoch, epochs=epochs)
    arrays: dict[str, Any] = {name: jnp.asarray(v, jnp.int32) for name, v in numbers.items()}
    params, state = compression.boundary(params, state_of(opt_state), stats=stats or {}, **arrays)
    return params, update_state(opt_state, lambda _: state)


def strong(tree: Tree) -> Tree:
    """Every leaf with its dtype made explicit: a weakly typed leaf in a scan's carry recompiles."""
    return jax.tree.map(lambda v: jax.lax.convert_element_type(jnp.asarray(v), jnp.asarray(v).dtype), tree)
