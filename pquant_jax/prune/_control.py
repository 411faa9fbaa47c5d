"""What DST, AutoSparse and CS share: a target for methods that have a strength, and the mask that fine-tuning freezes.

Between epochs of the training stage the strength moves by gain * (wanted - sparsity), in the exponent or as a shift;
when fine-tuning begins, `survivors` of the method's own score settle the rest exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import AxisRole, Event, Tree
from pquant_jax._errors import TransformError
from pquant_jax.transforms import layout, survivors

GRANULARITIES: Final = ("weight", "channel", "layer")
LIMIT: Final = 30.0  # e^30 times the strength is as good as infinity, and far from float32's


class Control(NamedTuple):
    """part: of the target that is wanted by now, a fraction that never falls.  push: sum of the moves.

    settled: no step was taken since the mask was stored, so that a rewind of the kernels leaves it alone.
    """

    part: jax.Array
    push: jax.Array
    settled: jax.Array


def control() -> Control:
    """The controller before the first epoch."""
    return Control(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.bool_))


def target_or_nan(target: float | None) -> float:
    """The hyperparameter of a target; nan is none.  Raises: TransformError unless it is a fraction below 1."""
    if target is None:
        return float("nan")
    if isinstance(target, (int, float)) and not (math.isnan(target) or 0 <= target < 1):
        raise TransformError(f"target is {target}, expected zeros / total, 0 <= target < 1, or None")
    return target


def advance(
    state: Control, *, event: jax.Array, epoch: jax.Array, epochs: jax.Array, training: jax.Array
) -> tuple[Control, jax.Array]:
    """(controller, ends): part = (epoch + 1) / epochs when an epoch of the training stage ends, and whether one does.

    In a second round the part stays at 1.  training: the epoch was one of the training stage.
    """
    ends = (event == Event.POST_EPOCH) & training
    ramp = (jnp.asarray(epoch, jnp.float32) + 1) / jnp.maximum(jnp.asarray(epochs, jnp.float32), 1)
    return state._replace(part=jnp.where(ends, jnp.maximum(state.part, jnp.minimum(ramp, 1)), state.part)), ends


def steer(
    state: Control,
    hypers: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    *,
    event: jax.Array,
    epoch: jax.Array,
    epochs: jax.Array,
    training: jax.Array,
) -> tuple[Control, jax.Array]:
    """(controller, move): move = gain * (part * target - sparsity) when an epoch of the training stage ends, else 0.

    Up to the target the strength never falls below what the user gave: a method that is ahead of the ramp in its first
    epochs would otherwise be behind it in the last.

    Args:
      hypers: target (nan: no move) and gain.
      masks: {path: 0/1}, of which the sparsity is measured, over all kernels together.
    """
    state, ends = advance(state, event=event, epoch=epoch, epochs=epochs, training=training)
    sparsity = _tree.sparsity(masks)
    wish = hypers["gain"] * (state.part * hypers["target"] - sparsity)
    floor = jnp.where(sparsity <= hypers["target"], jnp.minimum(state.push, 0), -LIMIT)
    push = jnp.where(ends & ~jnp.isnan(hypers["target"]), jnp.clip(state.push + wish, floor, LIMIT), state.push)
    return state._replace(push=push), push - state.push


def strength(base: jax.Array, state: Control) -> jax.Array:
    """base * exp(push)."""
    return base * jnp.exp(state.push)


def exact(scores: Mapping[str, jax.Array], target: jax.Array) -> dict[str, jax.Array]:
    """{path: 0/1} of the highest scores of all kernels together, exact to one weight; ties go by place.

    Every kernel keeps its best weight, whatever the target: the signal would stop there.  Scores may be negative.

    >>> masks = exact({"a": jnp.float32([3, 2, 1]), "b": jnp.float32([-1, -2, -3])}, jnp.float32(0.5))
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    """
    best = {p: jnp.where(jnp.arange(s.size).reshape(s.shape) == jnp.argmax(s), jnp.inf, s) for p, s in scores.items()}
    flat = jnp.concatenate([s.ravel() for s in best.values()])
    kept = survivors(layout("scores", flat.shape), flat, jnp.minimum(target, 1 - len(scores) / flat.size))
    out, start = {}, 0
    for p, s in scores.items():
        out[p] = kept[start : start + s.size].reshape(s.shape)
        start += s.size
    return out


def store(
    state: Control,
    stored: dict[str, jax.Array],
    own: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
    target: jax.Array,
    *,
    event: jax.Array,
    training: jax.Array,
) -> tuple[Control, dict[str, jax.Array]]:
    """(controller, masks): what fine-tuning will freeze, made when an epoch of the training stage ends.

    With a target the exact mask of the method's scores, else its own.  Made when fine-tuning begins only if a step was
    taken since the last epoch's end: a rewind of the kernels in between must not change which of them were chosen.
    """
    ends = training & ((event == Event.POST_EPOCH) | ((event == Event.PRE_FINETUNE) & ~state.settled))
    wanted = exact(scores, jnp.where(jnp.isnan(target), 0, target))
    fresh = {p: jnp.where(jnp.isnan(target), m, wanted[p]) for p, m in own.items()}
    masks = {p: jnp.where(ends, fresh[p], m) for p, m in stored.items()}
    return state._replace(settled=ends | state.settled), masks


def moved(state: Control) -> Control:
    """The controller after a step: the stored mask is no longer that of the kernels."""
    return state._replace(settled=jnp.zeros_like(state.settled))


def kernels_like(model: Tree, thresholds: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The kernels that have thresholds."""
    leaves = _tree.flatten(model)
    return {p: leaves[p] for p in thresholds}


def check_granularity(granularity: str) -> None:
    """Raises: TransformError for a name that `threshold_shape` does not know."""
    if granularity not in GRANULARITIES:
        raise TransformError(f"granularity is {granularity!r}, expected 'weight', 'channel' or 'layer'")


def threshold_shape(path: str, leaf: jax.Array, granularity: str, roles: Mapping[str, AxisRole]) -> tuple[int, ...]:
    """Shape of T: the kernel's ("weight"), its output axes ("channel", the last axis if the role is unknown), or 1 ("layer")."""
    if granularity == "weight":
        return leaf.shape
    out = roles[path].out_axes if path in roles else (leaf.ndim - 1,)
    return tuple(n if granularity == "channel" and a in out else 1 for a, n in enumerate(leaf.shape))
