"""The golden model: exact evaluation of a fixed-point `Graph` in numpy float64.  This module needs no JAX.

Every other implementation (JAX forward, da4ml, Verilog) is compared with this one, so it is written for being read: one
line per op, no approximation.  It is exact while `pquant_jax.lower.ranges.check_exact` passes (53 bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower.ir import Graph, Node, consumers, entries, label
from pquant_jax.numerics.oracle import quantize

_AT_ONCE: Final = 1 << 24  # elements of a node, 128 MB: the windows of a convolution are hundreds of kilobytes per sample
_ELEMENTWISE: Final[dict[str, Callable[..., np.ndarray]]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
    "neg": np.negative, "abs": np.abs, "dot": np.matmul,
    "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less, "eq": np.equal, "ne": np.not_equal,
    "select": lambda cond, on_false, on_true: np.where(cond != 0, on_true, on_false),
    "sum": lambda x: x.sum(-1), "amax": lambda x: x.max(-1), "amin": lambda x: x.min(-1),
}  # fmt: skip


def apply_op(node: Node, values: Sequence[np.ndarray]) -> np.ndarray:
    """The value of `node` (not an input) from the values of its inputs, each of shape (N or 1, *shape); float64.

    The leading axis is the batch; a constant has length 1 there and broadcasts.

    >>> apply_op(Node("sum", (0,), (1,)), [np.array([[[1.0, 2.5]]])]).tolist()
    [[3.5]]
    """
    if node.op == "const":
        return np.asarray(node.attrs["value"], np.float64)[None]
    if node.op == "quantize":
        at = node.attrs
        modes = {"rounding": str(at["rounding"]), "overflow": str(at["overflow"])}
        return quantize(values[0], at["k"], at["i"], at["f"], **modes)
    if node.op == "table":
        return _table(node, values[0])
    if node.op == "take":
        flat = values[0].reshape(len(values[0]), -1)
        index = np.asarray(node.attrs["index"])
        padded = np.pad(flat, ((0, 0), (0, 1)))  # index -1 reads the zero behind the last element
        return padded[:, index]
    if node.op == "concat":
        n = max(len(v) for v in values)
        return np.concatenate([np.broadcast_to(v.reshape(len(v), -1), (n, v[0].size)) for v in values], axis=1)
    if node.op not in _ELEMENTWISE:
        raise LoweringError(
            f"op {node.op!r} has no emulation; known: input, const, quantize, table, take, concat, {sorted(_ELEMENTWISE)}"
        )
    return np.asarray(_ELEMENTWISE[node.op](*values), np.float64) + 0.0  # + 0.0 turns -0.0 into 0.0


def _table(node: Node, x: np.ndarray) -> np.ndarray:
    index, bad = entries(node, x)
    if bad.any():
        at = tuple(int(j) for j in np.argwhere(bad)[0])
        k, i, f = (int(np.asarray(node.attrs[key])[at[1:]]) for key in "kif")
        raise LoweringError(
            f"table {node.name!r}: sample {at[0]}, element {at[1:]} is {float(x[at])!r}, which is no value of its input format "
            f"(k={k}, i={i}, f={f}); put a quantizer of that format in front of it"
        )
    which = np.asarray(node.attrs["which"], np.int64)
    codes = np.asarray(node.attrs["codes"], np.float64)[which, index]
    return np.ldexp(codes, -np.asarray(node.attrs["f_out"], np.int64)[which])


def port_value(node: Node, x: np.ndarray) -> np.ndarray:
    """What the port `node` (an `input`) makes of the real numbers `x` (N, *shape): TRN to its grid, then WRAP."""
    at = node.attrs
    return quantize(x, at["k"], at["i"], at["f"], rounding="TRN", overflow="WRAP")


def emulate(graph: Graph, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Outputs of `graph`, float64 (N, *shape) each, for one array (N, *shape) per input port.

    Inputs pass the port first (`port_value`), as in hardware.  Memory: samples are taken in parts in which no node has more
    than `_AT_ONCE` elements, and intermediate values are dropped after their last reader; `trace_values` keeps them.
    Raises `DataError` for a wrong number or shape of inputs, NaN or infinity.
    """
    last = [max(readers, default=-1) for readers in consumers(graph)]
    for index in graph.outputs:
        last[index] = len(graph.nodes)
    checked = check_inputs(graph, inputs)
    step = max(_AT_ONCE // max(int(np.prod(node.shape, dtype=np.int64)) for node in graph.nodes), 1)
    parts: list[list[np.ndarray]] = []
    for start in range(0, max(len(checked[0]), 1) if checked else 1, step):
        values, n = _evaluate(graph, [v[start : start + step] for v in checked], last)
        parts.append([np.broadcast_to(values[j], (n, *graph.nodes[j].shape)) for j in graph.outputs])
    return parts[0] if len(parts) == 1 else [np.concatenate(output) for output in zip(*parts, strict=True)]


def trace_values(graph: Graph, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The value of every node, float64 (N, *shape), in the order of `graph.nodes`; arguments and errors of `emulate`."""
    values, n = _evaluate(graph, inputs, [len(graph.nodes)] * len(graph.nodes))
    return [np.broadcast_to(v, (n, *node.shape)) for v, node in zip(values, graph.nodes, strict=True)]


def _evaluate(graph: Graph, inputs: Sequence[np.ndarray], last: Sequence[int]) -> tuple[list[np.ndarray], int]:
    """All values (those with `last` reader passed become empty) and the batch size N."""
    checked = check_inputs(graph, inputs)
    ports = dict(zip(graph.inputs, checked, strict=True))
    n = len(checked[0]) if checked else 1
    empty = np.empty((0,))
    values: list[np.ndarray] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            if index not in ports:
                raise LoweringError(f"{label(graph, index)} is not listed in graph.inputs, so it has no value")
            values.append(port_value(node, ports[index]))
        else:
            values.append(apply_op(node, [values[j] for j in node.inputs]))
        for j in node.inputs:
            if last[j] <= index:
                values[j] = empty
    return values, n


def check_inputs(graph: Graph, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """One float64 (N, *shape) per port.  Raises `DataError` for a wrong number or shape of arrays, NaN or infinity."""
    if len(inputs) != len(graph.inputs):
        raise DataError(
            f"the graph has {len(graph.inputs)} inputs, got {len(inputs)} arrays; pass one (N, *shape) array per input"
        )
    arrays = [np.asarray(x, np.float64) for x in inputs]
    for index, x in zip(graph.inputs, arrays, strict=True):
        shape = graph.nodes[index].shape
        if x.shape[1:] != shape or x.ndim == 0 or len(x) != len(arrays[0]):
            raise DataError(f"{label(graph, index)} takes ({len(arrays[0]) if arrays[0].ndim else 'N'}, *{shape}), got {x.shape}")
        if not np.isfinite(x).all():
            raise DataError(f"{label(graph, index)}: the input holds NaN or infinity, which no fixed-point port can take")
    return arrays


def port_grid(graph: Graph, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`n` random vectors per input, float64 (n, *shape), uniform over ALL codes of the port, so that they overflow inside.

    Value = code * 2^-f with code in [-k 2^(i+f), 2^(i+f) - 1]; a port without bits gives 0.
    """
    out = []
    for index in graph.inputs:
        node = graph.nodes[index]
        k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
        span = np.left_shift(1, np.clip(i + f, 0, 61))
        codes = rng.integers(-k * span, span, size=(n, *node.shape))
        out.append(np.ldexp(np.where(k + i + f <= 0, 0, codes).astype(np.float64), -f))
    return out


def flatten_batch(values: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays (N, *shape) side by side as (N, total): the order of the bits in the ports of every backend.

    >>> flatten_batch([np.zeros((2, 3)), np.ones((2, 1, 2))]).shape
    (2, 5)
    """
    return np.concatenate([np.reshape(v, (len(v), -1)) for v in values], axis=1)


def to_codes(values: np.ndarray, f: np.ndarray | int) -> np.ndarray:
    """The integers `values * 2^f`, int64; raises `LoweringError` when a value is off that grid or needs 64 bits.

    >>> to_codes(np.array([0.75, -2.0]), 2).tolist()
    [3, -8]
    """
    values = np.asarray(values, np.float64)
    scaled = np.ldexp(values, np.asarray(f).astype(np.int64))
    bad = (scaled != np.rint(scaled)) | ~(np.abs(scaled) < 2.0**63)
    if bad.any():
        at = tuple(int(j) for j in np.argwhere(np.atleast_1d(bad))[0])
        grid = int(np.broadcast_to(f, values.shape)[at] if values.ndim else f)
        raise LoweringError(
            f"element {at} is {np.atleast_1d(values)[at]!r}, which is no 64-bit multiple of 2^{-grid}; "
            f"{int(bad.sum())} of {values.size} values are off the grid"
        )
    return scaled.astype(np.int64)
