"""Every op of the IR as ONNX nodes, except quantizers (`_onnx_quant`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends._onnx_quant import Spec, number, plan, quant, quantizer
from pquant_jax.lower.backends._onnx_writer import (
    Operand,
    Writer,
    add,
    batched,
    collapsed,
    constant,
    gathered,
    grid,
    operand,
    physical,
    reshaped,
)
from pquant_jax.lower.emulate import apply_op
from pquant_jax.lower.ir import Graph, Node, label
from pquant_jax.lower.ranges import Interval

_ELEMENTWISE: Final = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "max": "Max", "min": "Min", "neg": "Neg", "abs": "Abs",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less", "eq": "Equal", "ne": "Equal",
}  # fmt: skip
_REDUCE: Final = {"sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}
_PARAMETERS: Final = ("add", "sub", "mul")  # whose constants are written as quantized parameters


def operation(w: Writer, graph: Graph, index: int, ins: Sequence[Operand], known: Sequence[Interval]) -> Operand:
    """The value of the node `index`, no input, from those of its inputs: a constant if they all are."""
    node = graph.nodes[index]
    if all(isinstance(v, np.ndarray) for v in ins):
        return apply_op(node, [np.asarray(v)[None] for v in ins])[0]
    shape = physical(node.shape)
    x = ins[0]
    if node.op == "quantize":
        assert isinstance(x, str)
        own = plan(node, known[node.inputs[0]], shape)
        return quantizer(w, x, own, shape, node.name, label(graph, index))
    if node.op == "take":
        assert isinstance(x, str)
        return gathered(w, x, graph.nodes[node.inputs[0]].shape, np.asarray(node.attrs["index"]), node.name)
    if node.op == "table":
        assert isinstance(x, str)
        return _table(w, node, x, shape)
    if node.op == "concat":
        return _concat(w, graph, node, ins)
    if node.op == "dot":
        return _dot(w, graph, index, ins)
    if node.op in _REDUCE:
        assert isinstance(x, str)
        return _reduced(w, graph, node, x)
    return _elementwise(w, graph, index, ins, shape)


def _elementwise(w: Writer, graph: Graph, index: int, ins: Sequence[Operand], shape: tuple[int, ...]) -> str:
    node, op = graph.nodes[index], graph.nodes[index].op
    if op == "max" and (other := _zeros(ins)) is not None:
        return add(w, "Relu", [other], shape, node.name)
    if op == "select":
        return _select(w, ins, shape, node.name)
    if op not in _ELEMENTWISE:
        raise LoweringError(f"{label(graph, index)}: has no ONNX form; known: quantize, take, table, concat, dot, select, "
                            f"{', '.join(sorted((*_ELEMENTWISE, *_REDUCE)))}")  # fmt: skip
    names = []
    for v in ins:
        if op in _PARAMETERS and isinstance(v, np.ndarray):
            names.append(parameter(w, collapsed(v.reshape(shape)), node.name, -1))
        else:
            names.append(operand(w, v))
    if op in ("ge", "gt", "le", "lt", "eq", "ne"):
        out = add(w, _ELEMENTWISE[op], names, shape, node.name, bool)
        out = add(w, "Not", [out], shape, node.name, bool) if op == "ne" else out
        return add(w, "Cast", [out], shape, node.name, to=_real(w))
    return add(w, _ELEMENTWISE[op], names, shape, node.name)


def _real(w: Writer) -> int:
    return 1 if w.real == np.float32 else 11


def _zeros(ins: Sequence[Operand]) -> str | None:
    """The tensor that a constant 0 stands beside."""
    for a, b in (ins, tuple(ins)[::-1]):
        if isinstance(a, str) and isinstance(b, np.ndarray) and not b.any():
            return a
    return None


def _select(w: Writer, ins: Sequence[Operand], shape: tuple[int, ...], name: str) -> str:
    """Where takes a condition of booleans, and gives what is true first."""
    cond, no, yes = ins
    if isinstance(cond, str):
        chosen = add(w, "Cast", [cond], shape, name, bool, to=9)
    else:
        chosen = constant(w, collapsed(np.reshape(cond != 0, shape)), bool)
    return add(w, "Where", [chosen, operand(w, yes), operand(w, no)], shape, name)


def _table(w: Writer, node: Node, x: str, shape: tuple[int, ...]) -> str:
    """Gather on the integer codes of all tables, one behind the other; the entry is x * 2^f + k * 2^(i+f) + which * n."""
    k, i, f, which, codes, f_out = (np.asarray(node.attrs[key], np.int64) for key in ("k", "i", "f", "which", "codes", "f_out"))
    k, i, f, which = (np.broadcast_to(v, node.shape).reshape(shape) for v in (k, i, f, which))
    alive = k + i + f > 0
    first = np.where(alive, k * np.ldexp(1.0, i + f), 0) + which * codes.shape[1]
    if not alive.all():  # a format without bits holds 0 alone
        f = np.where(alive, f, 0)
    y = add(w, "Mul", [x, number(w, np.ldexp(1.0, f))], shape, node.name)
    entry = add(w, "Cast", [y], shape, node.name, np.int64, to=7)
    if first.any():  # integers: an entry may be beyond the 24 bits of a float32
        entry = add(w, "Add", [entry, constant(w, collapsed(first), np.int64)], shape, node.name, np.int64)
    found = add(w, "Gather", [constant(w, codes.ravel(), np.int64, "codes"), entry], shape, node.name, np.int64, axis=0)
    real = add(w, "Cast", [found], shape, node.name, to=_real(w))
    return add(w, "Mul", [real, number(w, np.ldexp(1.0, -f_out[which]))], shape, node.name)


def _concat(w: Writer, graph: Graph, node: Node, ins: Sequence[Operand]) -> str:
    like = next(v for v in ins if isinstance(v, str))
    parts = []
    for v, j in zip(ins, node.inputs, strict=True):
        size = int(np.prod(graph.nodes[j].shape))
        if size:
            parts.append(reshaped(w, batched(w, v, graph.nodes[j].shape, like), (size,), node.name))
    total = int(np.prod(node.shape))
    return parts[0] if len(parts) == 1 else add(w, "Concat", parts, (total,), node.name, axis=1)


def _dot(w: Writer, graph: Graph, index: int, ins: Sequence[Operand]) -> str:
    """A batched MatMul; b = 1 needs no axis, and a row needs none beside a matrix that is constant."""
    node = graph.nodes[index]
    (b, m, k), (_, _, n) = (graph.nodes[j].shape for j in node.inputs)
    wide = (b,) if b > 1 else ()
    shapes: list[tuple[int, ...]] = [(*wide, m, k), (*wide, k, n)]
    out: tuple[int, ...] = (*wide, m, n)
    if m == 1 and not wide and isinstance(ins[1], np.ndarray):
        shapes[0], out = (k,), (n,)
    names = []
    for side, (v, shape) in enumerate(zip(ins, shapes, strict=True)):
        if isinstance(v, str):
            names.append(reshaped(w, v, shape, node.name))
        else:
            names.append(parameter(w, v.reshape(shape), node.name, -1 if side else -2))
    return reshaped(w, add(w, "MatMul", names, out, node.name), physical(node.shape), node.name)


def _reduced(w: Writer, graph: Graph, node: Node, x: str) -> str:
    m, n = graph.nodes[node.inputs[0]].shape
    x = reshaped(w, x, (m, n), node.name)
    if node.op == "sum":
        return add(w, "ReduceSum", [x, constant(w, [2], np.int64, "axes")], (m,), node.name, keepdims=0)
    return add(w, _REDUCE[node.op], [x], (m,), node.name, axes=[2], keepdims=0)


def parameter(w: Writer, value: np.ndarray, name: str, channel_axis: int) -> str:
    """A constant as a quantized parameter: the values and a Quant that changes none of them, where one format holds them."""
    value = np.asarray(value, np.float64)
    found = grid(value, channel_axis) if w.dialect != "onnx" and value.ndim else None
    if found is None or (w.dialect == "qdq" and found[1] > 8):
        return constant(w, value, name=f"{name}/param" if name else "const")
    scale, bits, signed = found
    spec = Spec(collapsed(scale), bits, signed, False, "ROUND", False, False)
    plain = constant(w, value, name=f"{name}/param" if name else "const")
    key = ("quant", plain)
    if key not in w.known:
        w.known[key] = quant(w, plain, spec, value.shape, name, name, weight=True)
        for made in {w.known[key], *_between(w, plain, w.known[key])}:
            w.tensors[made] = (w.tensors[made][0], (-1, *value.shape))
    return w.known[key]


def _between(w: Writer, start: str, end: str) -> list[str]:
    """Tensors of the chain of nodes from `start` to `end`."""
    chain, at = [], start
    while at != end:
        at = next(n.output[0] for n in reversed(w.nodes) if n.input[0] == at)
        chain.append(at)
    return chain
