"""What ONNX nodes are made with: a `Writer` that nodes, constants and the types of tensors are appended to.

A tensor of the IR has no batch axis and many axes of length 1; its ONNX tensor has the batch in front and no axis of
length 1 (`physical`), so that most reshapes of the IR are nothing here.  A constant is an array until a node reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower._indices import is_reshape, transposition
from pquant_jax.numerics.oracle import least_f

DIALECTS: Final = ("qonnx", "onnx", "qdq")
QONNX_DOMAIN: Final = "qonnx.custom_op.general"
OPSET: Final = 17
IR_VERSION: Final = 8  # what opset 17 came with
BATCH: Final = "N"
Operand = str | np.ndarray  # a tensor with a batch axis, or a constant without one
Shape = tuple[int, ...]


class Writer(NamedTuple):
    """A graph that is being written.

    dialect: how a quantizer is said, one of `DIALECTS`.  real: float32 or float64, the type of every value.
    nodes: NodeProtos.  constants: {name: array}.  known: {bytes of a constant: its name}.
    tensors: {name: (dtype, physical shape without the batch)}.
    """

    dialect: str
    real: np.dtype
    nodes: list[Any]
    constants: dict[str, np.ndarray]
    known: dict[Any, str]
    tensors: dict[str, tuple[np.dtype, Shape]]


def physical(shape: Sequence[int]) -> Shape:
    """Without axes of length 1, but never without axes.

    >>> physical((1, 8, 1, 3)), physical((1, 1)), physical(())
    ((8, 3), (1,), (1,))
    """
    return tuple(int(s) for s in shape if s != 1) or (1,)


def constant(w: Writer, value: Any, dtype: Any = None, name: str = "const") -> str:
    """The name of an initializer that holds `value`; equal ones are one."""
    array = np.ascontiguousarray(value, w.real if dtype is None else dtype).reshape(np.shape(value))
    key = (array.dtype.str, array.shape, array.tobytes())
    if key not in w.known:
        w.known[key] = unique(w, name)
        w.constants[w.known[key]] = array
    return w.known[key]


def unique(w: Writer, name: str) -> str:
    """`name` in letters, digits, `_`, `.` and `/`, with a number behind it if it is taken."""
    base = re.sub(r"[^\w./]+", "_", name) or "value"
    taken, n = base, 1
    while taken in w.tensors or taken in w.constants:
        taken, n = f"{base}_{n}", n + 1
    return taken


def add(w: Writer, op: str, inputs: Sequence[str], shape: Shape, name: str = "", dtype: Any = None, **attrs: Any) -> str:
    """Append a node with one output of the physical `shape`; returns the name of the output."""
    from onnx import helper

    out = unique(w, f"{name}/{op}" if name else op)
    w.tensors[out] = (np.dtype(w.real if dtype is None else dtype), shape)
    domain = attrs.pop("domain", None)
    w.nodes.append(helper.make_node(op, list(inputs), [out], name=out, domain=domain, **attrs))
    return out


def collapsed(value: np.ndarray, rank: int | None = None) -> np.ndarray:
    """The smallest array that broadcasts to `value`: axes along which it is constant have length 1, leading ones are dropped.

    rank: keep that many axes unless one number is enough.

    >>> collapsed(np.array([[1.0, 2.0], [1.0, 2.0]])).tolist(), collapsed(np.ones((3, 2))).shape
    ([1.0, 2.0], ())
    """
    value = np.asarray(value)
    for axis in range(value.ndim):
        if value.shape[axis] > 1 and (value == value.take([0], axis)).all():
            value = value.take([0], axis)
    if value.size == 1:
        return value.reshape(())
    if rank is None:
        while value.shape[0] == 1:
            value = value[0]
    return value


def operand(w: Writer, value: Operand, name: str = "const") -> str:
    """The tensor's name; a constant becomes an initializer that broadcasts against physical tensors of its shape."""
    if isinstance(value, str):
        return value
    return constant(w, collapsed(np.reshape(value, physical(np.shape(value)))), name=name)


def batched(w: Writer, value: Operand, shape: Shape, like: str) -> str:
    """The tensor's name; a constant is repeated for every sample of the tensor `like`."""
    if isinstance(value, str):
        return value
    own = physical(shape)
    size = add(w, "Shape", [like], (), dtype=np.int64)
    n = add(w, "Gather", [size, constant(w, [0], np.int64)], (), dtype=np.int64, axis=0)
    wanted = add(w, "Concat", [n, constant(w, own, np.int64)], (), dtype=np.int64, axis=0)
    for plain in (size, n, wanted):  # tensors without a batch
        w.tensors.pop(plain)
        w.tensors[plain] = (np.dtype(np.int64), (-1,))
    return add(w, "Expand", [constant(w, np.reshape(value, (1, *own))), wanted], own, "constant")


def reshaped(w: Writer, x: str, shape: Shape, name: str = "") -> str:
    """`x` with the physical `shape`; nothing is written if it has that already."""
    if w.tensors[x][1] == tuple(shape):
        return x
    return add(w, "Reshape", [x, constant(w, (-1, *shape), np.int64, "shape")], tuple(shape), name, w.tensors[x][0])


def gathered(w: Writer, x: str, source: Shape, index: np.ndarray, name: str = "") -> str:
    """`take` of the IR: x.ravel()[index] per sample, 0 where index is -1; a transposition where it is one."""
    shape = physical(index.shape)
    size = math.prod(source)
    if is_reshape(index, size):
        return reshaped(w, x, shape, name)
    if (turned := transposition(index, size, shape)) is not None:
        dims, perm = turned
        return add(w, "Transpose", [reshaped(w, x, dims, name)], shape, name, perm=[0, *(axis + 1 for axis in perm)])
    flat = reshaped(w, x, (size,), name)
    if (index < 0).any():  # the zero behind the last element
        pads = constant(w, [0, 0, 0, 1], np.int64, "pads")
        flat = add(w, "Pad", [flat, pads], (size + 1,), name)
        index = np.where(index < 0, size, index)
    return add(w, "Gather", [flat, constant(w, index.reshape(shape), np.int64, "index")], shape, name, axis=1)


def grid(value: np.ndarray, channel_axis: int) -> tuple[np.ndarray, int, bool] | None:
    """(scale, bits, signed) of the narrowest power-of-two `Quant` that holds `value` exactly; None beyond 24 bits or for zeros.

    One scale for the tensor or, where that takes fewer bits, one per element of `channel_axis`.

    >>> [v if isinstance(v, (int, bool)) else v.tolist() for v in grid(np.array([0.5, -0.75]), 0)]
    [0.25, 3, True]
    """
    value = np.asarray(value, np.float64)
    if not value.any():
        return None
    signed = bool((value < 0).any())
    f = least_f(value)
    f = np.where(value == 0, f[value != 0].min(), f)
    others = tuple(a for a in range(value.ndim) if a != channel_axis % value.ndim)
    best = None
    for fine in (f.max(), f.max(others, keepdims=True)):
        codes = np.ldexp(value, fine)
        bits = int(np.frexp(np.maximum(codes.max(), -1 - codes.min()))[1]) + signed
        bits = max(bits, 1 + signed)  # a signed format of one bit is bipolar in QONNX
        if best is None or bits < best[1]:
            best = (np.ldexp(1.0, -fine), bits, signed)
    assert best is not None
    return best if best[1] <= 24 else None
