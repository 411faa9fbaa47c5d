"""Where the batch is behind an equation, given where it is in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from pquant_jax._errors import TraceError
from pquant_jax.graph._calls import at_line, refuse_loop

ELEMENTWISE: Final = frozenset(
    "add sub mul div max min neg abs sign square integer_pow pow exp exp2 log log1p expm1 tanh logistic rsqrt sqrt cbrt "
    "erf sin cos floor ceil round select_n clamp ge gt le lt eq ne and or not xor is_finite nextafter rem lookup "
    "quantize mask site copy stop_gradient convert_element_type reduce_precision optimization_barrier custom_jvp_call "
    "custom_vjp_call".split()
)
TRANSCENDENTAL: Final = frozenset(
    "tanh logistic exp exp2 log log1p expm1 sqrt rsqrt cbrt erf erfc erf_inv sin cos tan asin acos atan sinh cosh asinh acosh "
    "atanh pow digamma lgamma".split()
)
_REDUCE: Final = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin psum".split()
)
_POOLS: Final = frozenset("reduce_window reduce_window_sum reduce_window_max reduce_window_min".split())
_LOOPS: Final = frozenset({"scan", "while", "cond"})
_SCATTERS: Final = frozenset("scatter scatter-add scatter-mul scatter-min scatter-max".split())


def batch_of(eqn: Any, batch: Sequence[int | None], result: int) -> int | None:
    """The batch axis of a result; None if it is the same for all samples.

    batch: of the operands.  Raises: TraceError where samples are mixed or the equation is unknown.
    """
    found = next(((n, b) for n, b in enumerate(batch) if b is not None), None)
    if found is None:
        return None
    where, b = found
    name, params = eqn.primitive.name, eqn.params
    shape, out = tuple(eqn.invars[where].aval.shape), tuple(eqn.outvars[result].aval.shape)
    if name == "dot_general":
        return _dot(eqn, batch)
    if name in _REDUCE:
        axes = tuple(params.get("axes", ()))
        return None if b in axes else b if name == "psum" else b - sum(a < b for a in axes)
    if name == "transpose":
        return tuple(params["permutation"]).index(b)
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][b])
    if name == "squeeze":
        if b in params["dimensions"]:
            raise TraceError(
                f"squeeze {shape} -> {out} drops the batch of one sample (axis {b}){at_line(eqn)}; name the axes to squeeze"
            )
        return b - sum(a < b for a in params["dimensions"])
    if name == "reshape":
        before = int(np.prod(shape[:b]))
        # several places fit a batch of one alone: it stays where it is, if it can
        for a in sorted(range(len(out)), key=lambda a: a != b):
            if int(np.prod(out[:a])) == before and out[a] == shape[b]:
                return a
        raise TraceError(f"reshape {shape} -> {out} mixes the batch (axis {b}) with other axes{at_line(eqn)}; keep samples apart")
    if name in _LOOPS:
        raise refuse_loop(eqn)
    rule = {"gather": _gather, "conv_general_dilated": _convolution, **dict.fromkeys(_SCATTERS, _scatter)}.get(name)
    axis = rule(eqn, where, b) if rule is not None else None if b in _along(name, params, shape) else b
    if axis is None:
        raise TraceError(f"{name!r} runs along the batch (axis {b}), which mixes samples{at_line(eqn)}; keep samples apart")
    if rule is None and name not in ELEMENTWISE and (len(out) <= axis or out[axis] != shape[axis]):
        raise TraceError(
            f"can't follow the batch through {name!r} ({shape} -> {out}){at_line(eqn)}; move it out of the compressed model"
        )
    return axis


def _along(name: str, params: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes along which an operation combines or moves elements."""
    every = range(len(shape))
    if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "split"):
        return (params["axis"],)
    if name in ("sort", "concatenate"):
        return (params["dimension"],)
    if name == "slice":
        strides = params["strides"] or (1,) * len(shape)
        parts = zip(params["start_indices"], params["limit_indices"], strides, shape, strict=True)
        return tuple(d for d, part in enumerate(parts) if part[:3] != (0, part[3], 1))
    if name == "dynamic_slice":
        return tuple(d for d in every if params["slice_sizes"][d] != shape[d])
    if name == "pad":
        return tuple(d for d in every if tuple(params["padding_config"][d]) != (0, 0, 0))
    if name in _POOLS:
        keys = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
        return tuple(d for d in every if any(params[k][d] != 1 for k in keys) or tuple(params["padding"][d]) != (0, 0))
    if name == "top_k":
        return (params.get("axis", len(shape) - 1) % len(shape),)
    if name == "fft":
        return tuple(every)[-len(params["fft_lengths"]) :]
    return tuple(params["dimensions"]) if name == "rev" else ()


def _convolution(eqn: Any, where: int, b: int) -> int | None:
    """Only the sample axis of the data keeps samples apart: kernels made of data are one per sample."""
    spec = eqn.params["dimension_numbers"]
    kept = where == 0 and b == spec.lhs_spec[0] and eqn.params["batch_group_count"] == 1
    return spec.out_spec[0] if kept else None


def _gather(eqn: Any, where: int, b: int) -> int | None:
    """Whole samples are gathered (an offset axis), or each sample from its own (a batching axis)."""
    at, rank = eqn.params["dimension_numbers"], len(eqn.outvars[0].aval.shape)
    rows = [d for d in range(rank) if d not in at.offset_dims]
    if where == 1:
        return rows[b]
    if b in at.operand_batching_dims:
        return rows[at.start_indices_batching_dims[at.operand_batching_dims.index(b)]]
    shape = eqn.invars[0].aval.shape
    gone = (*at.collapsed_slice_dims, *at.operand_batching_dims)
    if b in gone or eqn.params["slice_sizes"][b] != shape[b]:
        return None
    return at.offset_dims[[d for d in range(len(shape)) if d not in gone].index(b)]


def _scatter(eqn: Any, where: int, b: int) -> int | None:
    """As `_gather`, from the side of the operand (0), the indices (1) or the updates (2)."""
    at = eqn.params["dimension_numbers"]
    operand, _, updates = (v.aval.shape for v in eqn.invars)
    whole = [d for d in range(len(operand)) if d not in (*at.inserted_window_dims, *at.operand_batching_dims)]
    if where == 0:
        if b in at.operand_batching_dims:
            return b
        return b if b in whole and updates[at.update_window_dims[whole.index(b)]] == operand[b] else None
    if where == 2 and b in at.update_window_dims:
        axis = whole[at.update_window_dims.index(b)]
        return axis if operand[axis] == updates[b] else None
    rows = [d for d in range(len(updates)) if d not in at.update_window_dims]
    index = b if where == 1 else rows.index(b)
    if index not in at.scatter_indices_batching_dims:
        return None
    return at.operand_batching_dims[at.scatter_indices_batching_dims.index(index)]


def _dot(eqn: Any, batch: Sequence[int | None]) -> int | None:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    side, b = next((n, b) for n, b in enumerate(batch) if b is not None)
    contract, batched = ((lhs_contract, lhs_batch), (rhs_contract, rhs_batch))[side]
    if b in contract:
        return None
    if b in batched:
        return tuple(batched).index(b)
    ranks = [len(v.aval.shape) for v in eqn.invars]
    taken = ((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch))
    free = [[d for d in range(rank) if d not in used] for rank, used in zip(ranks, taken, strict=True)]
    before = len(lhs_batch) + (len(free[0]) if side else 0)
    return before + free[side].index(b)
