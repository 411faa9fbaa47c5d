"""ONNX ops on arrays with the batch in front: what `_onnx_in` interprets a file with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pquant_jax._base import KIF, Table
from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends._onnx_read import Step

PRODUCTS: Final = ("Conv", "Gemm", "MatMul")
MOVES: Final = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # what is on a grid stays on it
_LETTERS: Final = "DHW"
_TABLE_BITS: Final = 16


def refused(step: Step, why: str) -> LoweringError:
    """The error of a node that has no form here."""
    return LoweringError(f"{step.op} {step.name!r}: {why}")


def convolution(step: Step, x: Any, kernel: Any) -> Any:
    """Channels first, any number of positions, groups."""
    space = np.ndim(kernel) - 2
    letters = "NC" + _LETTERS[3 - space :], "OI" + _LETTERS[3 - space :], "NC" + _LETTERS[3 - space :]
    strides = tuple(step.attrs.get("strides", (1,) * space))
    dilation = tuple(step.attrs.get("dilations", (1,) * space))
    pads = _pads(step, x.shape[2:], np.shape(kernel)[2:], strides, dilation)
    return lax.conv_general_dilated(
        x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=letters, feature_group_count=step.attrs.get("group", 1)
    )


def _pads(step: Step, shape: Sequence[int], size: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> Any:
    auto = step.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        span = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
        return lax.padtype_to_pads(shape, span, strides, "SAME" if auto == "SAME_UPPER" else "SAME_LOWER")
    flat = step.attrs.get("pads", (0,) * (2 * len(size))) if auto == "NOTSET" else (0,) * (2 * len(size))
    return list(zip(flat[: len(size)], flat[len(size) :], strict=True))


def _pool(step: Step, x: Any, reduce: Callable[..., Any], start: float) -> Any:
    if step.attrs.get("ceil_mode", 0):
        raise refused(step, "ceil_mode has no form here; pad the input, or export without it")
    size = tuple(step.attrs["kernel_shape"])
    strides = tuple(step.attrs.get("strides", (1,) * len(size)))
    dilation = tuple(step.attrs.get("dilations", (1,) * len(size)))
    pads = [(0, 0), (0, 0), *_pads(step, x.shape[2:], size, strides, dilation)]
    return lax.reduce_window(x, start, reduce, (1, 1, *size), (1, 1, *strides), pads, window_dilation=(1, 1, *dilation))


def _maximum(step: Step, x: Any) -> Any:
    return _pool(step, x, lax.max, -np.inf)


def _average(step: Step, x: Any) -> Any:
    with jax.ensure_compile_time_eval():
        counts = np.asarray(_pool(step, np.ones((1, *x.shape[1:]), np.float32), lax.add, 0.0))
    if step.attrs.get("count_include_pad", 0):
        counts = np.full_like(counts, np.prod(step.attrs["kernel_shape"]))
    return _divided(step, _pool(step, x, lax.add, 0.0), counts)


def _divided(step: Step, x: Any, counts: np.ndarray) -> Any:
    """Sums over numbers of elements that are powers of two, of which no exact mean needs a rounded factor."""
    if not np.all(np.frexp(counts)[0] == 0.5):
        raise refused(
            step, f"a mean of {int(np.max(counts))} elements is no fixed-point number; use windows of 2, 4, 8 ... elements"
        )  # fmt: skip
    first = np.ravel(counts)[0]
    return x * np.float32(1 / first) if np.all(counts == first) else x * np.asarray(1 / counts, np.float32)


def _mean(step: Step, x: Any, axes: Any = None) -> Any:
    over = tuple(range(2, x.ndim)) if step.op == "GlobalAveragePool" else _axes(step, x, axes)
    keep = step.op == "GlobalAveragePool" or bool(step.attrs.get("keepdims", 1))
    return _divided(step, jnp.sum(x, over, keepdims=keep), np.asarray(np.prod([x.shape[a] for a in over]), np.float32))


def _axes(step: Step, x: Any, axes: Any = None) -> tuple[int, ...]:
    found = step.attrs.get("axes", axes)
    if found is None:
        raise refused(step, "without axes it would reduce the batch; name the axes")
    found = tuple(int(a) % x.ndim for a in np.ravel(found))
    if 0 in found:
        raise refused(step, "axis 0 is the batch, which no node may touch")
    return found


def _reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda step, x, axes=None: function(x, _axes(step, x, axes), keepdims=bool(step.attrs.get("keepdims", 1)))


def _reshape(step: Step, x: Any, shape: Any) -> Any:
    """The batch stays whatever the file's own first number is."""
    wanted = [int(n) for n in np.ravel(shape)]
    if not wanted or wanted[0] not in (-1, 0, x.shape[0]) and int(np.prod(wanted)) != int(np.prod(x.shape)):
        raise refused(step, f"to {wanted}: axis 0 is the batch, which no node may touch")
    rest = [x.shape[a + 1] if n == 0 else n for a, n in enumerate(wanted[1:])]
    sample = int(np.prod(x.shape[1:]))
    if -1 not in rest and int(np.prod(rest)) != sample:
        raise refused(step, f"to {wanted} of a value of shape (N, {', '.join(map(str, x.shape[1:]))}): axis 0 is the batch")
    return x.reshape(x.shape[0], *rest)


def _transpose(step: Step, x: Any) -> Any:
    order = tuple(step.attrs.get("perm", reversed(range(x.ndim))))
    if order[0] != 0:
        raise refused(step, f"perm {order} moves the batch, which is axis 0")
    return jnp.transpose(x, order)


def _flatten(step: Step, x: Any) -> Any:
    if step.attrs.get("axis", 1) != 1:
        raise refused(step, "axis must be 1: axis 0 is the batch")
    return x.reshape(x.shape[0], -1)


def _squeeze(step: Step, x: Any, axes: Any = None) -> Any:
    return jnp.squeeze(x, _axes(step, x, axes))


def _unsqueeze(step: Step, x: Any, axes: Any = None) -> Any:
    found = step.attrs.get("axes", axes)
    return jnp.expand_dims(x, tuple(int(a) for a in np.ravel(found)))


def _gather(step: Step, x: Any, index: Any) -> Any:
    axis = step.attrs.get("axis", 0) % x.ndim
    if axis == 0 or isinstance(index, jax.Array):
        raise refused(step, "of the batch, or by a computed index: that is a table only behind a Quant, as to_qonnx writes it")
    return jnp.take(x, np.asarray(index, np.int32) % x.shape[axis], axis)


def _pad(step: Step, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    flat = [int(n) for n in np.ravel(step.attrs.get("pads", pads))]
    if step.attrs.get("mode", "constant") != "constant" or axes is not None or (value is not None and np.any(value)):
        raise refused(step, "only zeros are padded, on all axes in order")
    return jnp.pad(x, list(zip(flat[: x.ndim], flat[x.ndim :], strict=True)))


def _clip(step: Step, x: Any, low: Any = None, high: Any = None) -> Any:
    low, high = step.attrs.get("min", low), step.attrs.get("max", high)
    x = x if low is None else jnp.maximum(x, np.float32(low))
    return x if high is None else jnp.minimum(x, np.float32(high))


def _depth_to_space(step: Step, x: Any) -> Any:
    n, c, h, w = x.shape
    b = step.attrs["blocksize"]
    if step.attrs.get("mode", "DCR") == "CRD":
        parts = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        parts = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // b**2, h * b, w * b)


def _resize(step: Step, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    """Every position repeated a whole number of times."""
    del roi
    wanted = np.divide(sizes, x.shape) if sizes is not None and np.size(sizes) else np.ravel(scales)
    nearest = step.attrs.get("mode", "nearest") == "nearest" and step.attrs.get("nearest_mode", "") == "floor"
    asymmetric = step.attrs.get("coordinate_transformation_mode", "") == "asymmetric"
    if not (nearest and asymmetric) or np.any(wanted != np.rint(wanted)) or np.any(wanted < 1) or wanted[0] != 1:
        raise refused(step, "only nearest, asymmetric, floor with whole scales moves elements and computes none")
    for axis, n in enumerate(wanted):
        x = jnp.repeat(x, int(n), axis)
    return x


def _divide(step: Step, x: Any, y: Any) -> Any:
    if isinstance(y, jax.Array) or not np.all(np.abs(np.frexp(np.asarray(y))[0]) == 0.5):
        raise refused(step, "only powers of two divide exactly; multiply by a quantized constant")
    return x * np.asarray(1 / np.asarray(y, np.float64), np.float32)


def table_of(step: Step, shape: tuple[int, ...]) -> tuple[KIF, Table]:
    """(format of the input, table) of a `table` step on samples of `shape`."""
    k, i, f, first, scale = (np.broadcast_to(np.asarray(step.attrs[n]), shape) for n in ("k", "i", "f", "first", "scale"))
    alive = k + i + f > 0
    k, i, f = (np.where(alive, v, 0).astype(np.int64) for v in (k, i, f))
    width = np.where(alive, k + i + f, 0)
    start = np.asarray(first, np.int64) - np.where(alive, k * np.ldexp(1.0, i + f), 0).astype(np.int64)
    codes = step.attrs["codes"]
    if width.max(initial=0) > _TABLE_BITS or not np.all(np.frexp(scale)[0] == 0.5):
        raise refused(step, f"its input has {int(width.max())} bits (at most {_TABLE_BITS}), its scale must be a power of two")
    number = np.minimum(np.arange(1 << int(width.max(initial=0))), (1 << width)[..., None] - 1)
    entry = np.clip(start[..., None] + number, 0, codes.size - 1)  # a quantizer may be wider than what reaches it: never read
    f_out = 1 - np.frexp(scale)[1]
    rows = np.concatenate([codes[entry].reshape(-1, entry.shape[-1]), f_out.reshape(-1, 1)], axis=1)
    unique, which = np.unique(rows, axis=0, return_inverse=True)
    rows, which = unique.astype(np.int32), which.reshape(shape).astype(np.int32)
    return KIF(k, i, f), Table(rows[:, :-1], rows[:, -1], which)


def interpolated(step: Step, x: Any) -> Any:
    """The table's entries on its codes, straight lines between them, so that there is a gradient."""
    form, table = table_of(step, x.shape[1:])
    values = np.ldexp(table.codes.astype(np.float64), -table.f[:, None]).astype(np.float32)
    steps = np.diff(values, axis=1, append=values[:, -1:])
    low = np.where(form.k + form.i + form.f > 0, -form.k * np.ldexp(1.0, form.i), 0).astype(np.float32)
    place = jnp.clip((x - low) * np.ldexp(1.0, form.f).astype(np.float32), 0, values.shape[1] - 1)
    entry = lax.stop_gradient(jnp.floor(place)).astype(jnp.int32)
    which = np.broadcast_to(table.which, x.shape[1:])
    return jnp.asarray(values)[which, entry] + (place - entry) * jnp.asarray(steps)[which, entry]


def _bipolar(step: Step, x: Any, scale: Any, *_: Any) -> Any:
    """-scale below 0, scale from 0 on; without a gradient, so a bipolar activation is imported but not trained further."""
    scale = np.asarray(scale, np.float32)
    return jnp.where(x >= 0, scale, -scale)


OPS: Final[dict[str, Callable[..., Any]]] = {
    "Relu": lambda step, x: jax.nn.relu(x),
    "Add": lambda step, x, y: x + y,
    "Sub": lambda step, x, y: x - y,
    "Mul": lambda step, x, y: x * y,
    "Div": _divide,
    "Neg": lambda step, x: -x,
    "Abs": lambda step, x: jnp.abs(x),
    "Max": lambda step, x, y: jnp.maximum(x, y),
    "Min": lambda step, x, y: jnp.minimum(x, y),
    "Clip": _clip,
    "MatMul": lambda step, x, y: jnp.matmul(x, y),
    "Conv": convolution,
    "MaxPool": _maximum,
    "AveragePool": _average,
    "GlobalAveragePool": _mean,
    "GlobalMaxPool": lambda step, x: jnp.max(x, tuple(range(2, x.ndim)), keepdims=True),
    "ReduceSum": _reduced(jnp.sum),
    "ReduceMax": _reduced(jnp.max),
    "ReduceMin": _reduced(jnp.min),
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda step, *parts: jnp.concatenate(parts, step.attrs["axis"]),
    "Gather": _gather,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "Resize": _resize,
    "BipolarQuant": _bipolar,
    "Quant": _bipolar,  # what is left of Quant after reading: one signed bit
    "IntQuant": _bipolar,
}
