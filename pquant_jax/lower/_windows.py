"""Windows, gathers and scatters: everything whose index is known when the model is traced is a `take`.

A window is an array of element numbers with -1 for padding, so that strides, padding, dilation and groups need no case
of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pquant_jax.graph import bind
from pquant_jax.lower._build import Op, Operand, add, gathered, joined, node, numbers, refusal, shape_of, take

_WINDOWS: Final = {"reduce_window_sum": "sum", "reduce_window_max": "amax", "reduce_window_min": "amin"}
_PAIRED: Final = {"sum": "add", "amax": "max", "amin": "min"}
_CUMULATIVE: Final = {"cumsum": "sum", "cummax": "amax", "cummin": "amin"}
_SCATTERS: Final = {"scatter-add": "sum", "scatter-max": "amax", "scatter-min": "amin"}


def windows(
    shape: Sequence[int],
    size: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int] | None = None,
    base_dilation: Sequence[int] | None = None,
) -> np.ndarray:
    """Numbers of the elements in every window, int64 (*positions, *size); -1 is padding or a hole of `base_dilation`.

    dilation spreads the window, base_dilation the array (as in a transposed convolution); negative padding crops.

    >>> windows((3,), (2,), (1,), [(1, 0)]).tolist()
    [[-1, 0], [0, 1], [1, 2]]
    """
    dilation = dilation or (1,) * len(shape)
    base_dilation = base_dilation or (1,) * len(shape)
    index = np.full([(n - 1) * d + 1 if n else 0 for n, d in zip(shape, base_dilation, strict=True)], -1)
    index[tuple(slice(None, None, d) for d in base_dilation)] = numbers(shape)
    index = padded(index, [(low, high, 0) for low, high in padding])
    span = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
    if any(n < s for n, s in zip(index.shape, span, strict=True)):
        counts = [max((n - s) // t + 1, 0) for n, s, t in zip(index.shape, span, strides, strict=True)]
        return np.empty((*counts, *size), np.int64)
    view = np.lib.stride_tricks.sliding_window_view(index, span)
    return view[(*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilation))]


def padded(index: np.ndarray, config: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """`lax.pad` of element numbers with -1: (low, high, interior) per axis, negative ones crop."""
    out = np.full([(n - 1) * (inside + 1) + 1 if n else 0 for n, (_, _, inside) in zip(index.shape, config, strict=True)], -1)
    out[tuple(slice(None, None, inside + 1) for _, _, inside in config)] = index
    out = np.pad(out, [(max(low, 0), max(high, 0)) for low, high, _ in config], constant_values=-1)
    crop = zip(out.shape, config, strict=True)
    return out[tuple(slice(max(-low, 0), max(n - max(-high, 0), 0)) for n, (low, high, _) in crop)]


def convolution(op: Op) -> int:
    """conv_general_dilated as windows and a batched product: (groups, samples * positions, k) @ (groups, k, outputs)."""
    at = op.eqn.params
    if at["batch_group_count"] != 1:
        raise refusal(op, "a convolution with batch_group_count", "it mixes samples; use feature_group_count")
    spec, groups = at["dimension_numbers"], at["feature_group_count"]
    x, kernel = (numbers(shape_of(op.build, v)) for v in op.ins)
    x, kernel = x.transpose(spec.lhs_spec), kernel.transpose(spec.rhs_spec)  # (n, channels, *space), (outputs, inputs, *size)
    outputs, inputs, *size = kernel.shape
    index = windows(x.shape[2:], size, at["window_strides"], at["padding"], at["rhs_dilation"], at["lhs_dilation"])
    positions, index = index.shape[: len(size)], index.reshape(-1, int(np.prod(size, dtype=np.int64)))
    flat = x.reshape(len(x), groups, inputs, -1)
    flat = np.concatenate([flat, np.full((*flat.shape[:3], 1), -1)], axis=3)  # what index -1 reads
    rows = flat[..., index].transpose(1, 0, 3, 2, 4).reshape(groups, len(x) * len(index), -1)
    columns = kernel.reshape(groups, outputs // groups, -1).transpose(0, 2, 1)
    dot = (gathered(op.build, v, numbers) for v, numbers in zip(op.ins, (rows, columns), strict=True))
    out = add(op.build, "dot", tuple(dot), (groups, rows.shape[1], columns.shape[2]), op.scope)
    order = numbers((groups, len(x), *positions, outputs // groups))
    order = np.moveaxis(order, -1, 1)  # (groups, outputs of one, n, *positions) -> (n, outputs, *positions)
    order = np.moveaxis(order, 2, 0).reshape(len(x), outputs, *positions)
    return take(op.build, out, order.transpose(np.argsort(spec.out_spec)))


def reduce_window(op: Op) -> int:
    """A pool; a maximum sees only what is there, because nothing in hardware is below every number."""
    return _reduced(op, op.ins, _window_rows(op), _WINDOWS[op.name])


def _window_rows(op: Op) -> np.ndarray:
    """Element numbers of every window of a pool, one row per element of the result."""
    at = op.eqn.params
    keys = ("window_dimensions", "window_strides", "padding", "window_dilation", "base_dilation")
    index = windows(shape_of(op.build, op.ins[0]), *(at[key] for key in keys))
    return index.reshape(int(np.prod(op.shape, dtype=np.int64)), -1)


def window_of_any_start(op: Op) -> int:
    """`lax.reduce_window` that starts at a number which is not neutral: the pool, and once more with that number."""
    body = op.eqn.params["jaxpr"]
    names = [e.primitive.name for e in getattr(body, "jaxpr", body).eqns]
    reduce = {"add": "sum", "max": "amax", "min": "amin"}.get(names[0] if len(names) == 1 else "")
    if len(op.ins) != 2 or reduce is None or not isinstance(op.ins[1], np.ndarray):
        raise refusal(op, f"a window reduced by {names}", "sums, maxima and minima are lowered; write it as one of them")
    x, start = op.ins
    index = _window_rows(op)
    count = int(np.prod(shape_of(op.build, x), dtype=np.int64))
    index = np.concatenate([index, np.full((len(index), 1), count)], axis=1)
    return _reduced(op, [x, start], index, reduce)


def _reduced(op: Op, values: Sequence[Operand], index: np.ndarray, reduce: str) -> int:
    """Rows of element numbers to one element each."""
    if reduce != "sum":
        valid = index >= 0
        if not valid.any(axis=1).all():
            raise refusal(op, f"{op.name!r}", "a window holds nothing but padding; use less padding")
        first = np.take_along_axis(index, valid.argmax(1)[:, None], axis=1)
        index = np.where(valid, index, first)
    rows = joined(op.build, values, index)
    out = add(op.build, reduce, (rows,), (len(index),), op.scope)
    return take(op.build, out, numbers(op.shape))


def cumulative(op: Op) -> int:
    """Running sum or extreme in log2(n) steps: what stands 1, 2, 4 ... places before is added."""
    axis, reverse, reduce = op.eqn.params["axis"], op.eqn.params["reverse"], _CUMULATIVE[op.name]
    out = node(op.build, op.ins[0])
    own = numbers(op.shape)
    distance = 1
    while distance < op.shape[axis]:
        ahead = [(0, 0, 0)] * len(op.shape)
        ahead[axis] = (-distance, distance, 0) if reverse else (distance, -distance, 0)
        index = padded(own, ahead)
        if reduce != "sum":
            index = np.where(index < 0, own, index)
        out = add(op.build, _PAIRED[reduce], (out, take(op.build, out, index)), op.shape, op.scope)
        distance *= 2
    return out


def rearranged(op: Op) -> list[int]:
    """What only moves elements: bound on their numbers, it says where each comes from.  Indices must be constants."""
    x, *rest = op.ins
    if any(not isinstance(v, np.ndarray) for v in rest):
        raise refusal(op, f"{op.name!r} with an index that depends on the data", _INDEX)
    own = numbers(shape_of(op.build, x)).astype(np.int32) + 1  # 0 and below: filled in
    operands = [jnp.asarray(v, var.aval.dtype) for v, var in zip(rest, op.eqn.invars[1:], strict=True)]
    if op.name == "gather":
        at = {k: op.eqn.params[k] for k in ("dimension_numbers", "slice_sizes", "mode")}
        moved = [lax.gather(jnp.asarray(own), operands[0], **at, fill_value=0)]
    else:
        moved = bind(op.eqn, [jnp.asarray(own), *operands])
    return [_filled(op, [x], np.asarray(m) - 1, op.eqn.params.get("fill_value")) for m in moved]


_INDEX: Final = "hardware is wired once; use constant indices, or select with jnp.where and a one-hot comparison"


def _filled(op: Op, values: Sequence[Operand], index: np.ndarray, fill: Any) -> int:
    """Elements by number, `fill` where the number is -1."""
    if np.all(index >= 0) or (fill is not None and not np.isnan(fill) and fill == 0):
        return joined(op.build, values, index)
    if fill is None or not np.isfinite(fill):
        raise refusal(op, f"{op.name!r} out of bounds", f"it gives {fill}, which is no number; keep indices within the array")
    count = sum(int(np.prod(shape_of(op.build, v), dtype=np.int64)) for v in values)
    return joined(op.build, [*values, np.asarray([fill], np.float64)], np.where(index < 0, count, index))


def pad(op: Op) -> int:
    """Padding by one constant, between elements too, or negative."""
    x, fill = op.ins
    index = padded(numbers(shape_of(op.build, x)), op.eqn.params["padding_config"])
    if isinstance(fill, np.ndarray):
        return _filled(op, [x], index, float(fill))
    count = int(np.prod(shape_of(op.build, x), dtype=np.int64))
    return joined(op.build, [x, fill], np.where(index < 0, count, index))


def update_slice(op: Op) -> int:
    """dynamic_update_slice with a constant start."""
    x, update, *start = op.ins
    if any(not isinstance(v, np.ndarray) for v in start):
        raise refusal(op, f"{op.name!r} with an index that depends on the data", _INDEX)
    own, new = (numbers(shape_of(op.build, v)).astype(np.int32) for v in (x, update))
    moved = lax.dynamic_update_slice(jnp.asarray(own), jnp.asarray(new + own.size), [int(v) for v in start])
    return joined(op.build, [x, update], np.asarray(moved))


def scatter(op: Op) -> int:
    """`x.at[constant indices].set`, and `add`, `max`, `min` as a reduction over all that land on an element."""
    x, indices, updates = op.ins
    if not isinstance(indices, np.ndarray):
        raise refusal(op, f"{op.name!r} with an index that depends on the data", _INDEX)
    at = {k: op.eqn.params[k] for k in ("dimension_numbers", "mode", "unique_indices", "indices_are_sorted")}
    index = jnp.asarray(indices, op.eqn.invars[1].aval.dtype)
    own, new = (numbers(shape_of(op.build, v)) for v in (x, updates))
    if op.name == "scatter":
        moved = lax.scatter(jnp.asarray(own, jnp.int32), index, jnp.asarray(new + own.size, jnp.int32), **at)
        return joined(op.build, [x, updates], np.asarray(moved))

    def spread(values: jax.Array) -> jax.Array:
        return lax.scatter_add(jnp.zeros(own.shape, jnp.float32), index, values, **at)

    # the transpose of a scatter reads, for every update, the element that it lands on; 0: dropped
    (target,) = jax.vjp(spread, jnp.zeros(new.shape, jnp.float32))[1](jnp.asarray(own + 1, jnp.float32))
    target = np.asarray(target).ravel().astype(np.int64) - 1
    landed = np.flatnonzero(target >= 0)
    landed = landed[np.argsort(target[landed], kind="stable")]
    counts = np.bincount(target[landed], minlength=own.size)
    rows = np.full((own.size, 1 + int(counts.max(initial=0))), -1)
    rows[:, 0] = own.ravel()
    rank = np.arange(len(landed)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows[target[landed], 1 + rank] = own.size + landed
    return _reduced(op, [x, updates], rows, _SCATTERS[op.name])


def concatenate(op: Op) -> int:
    """Several arrays along one axis."""
    starts = np.cumsum([0, *(int(np.prod(shape_of(op.build, v), dtype=np.int64)) for v in op.ins)])
    parts = [numbers(shape_of(op.build, v)) + a for v, a in zip(op.ins, starts[:-1], strict=True)]
    return joined(op.build, op.ins, np.concatenate(parts, axis=op.eqn.params["dimension"]))


WINDOW_RULES: Final[dict[str, Callable[[Op], int | list[int]]]] = {
    "conv_general_dilated": convolution,
    **dict.fromkeys(_WINDOWS, reduce_window),
    "reduce_window": window_of_any_start,
    **dict.fromkeys(_CUMULATIVE, cumulative),
    **dict.fromkeys(
        "reshape transpose squeeze expand_dims broadcast_in_dim slice rev split gather dynamic_slice".split(), rearranged
    ),
    "pad": pad,
    "dynamic_update_slice": update_slice,
    **dict.fromkeys(("scatter", *_SCATTERS), scatter),
    "concatenate": concatenate,
}
