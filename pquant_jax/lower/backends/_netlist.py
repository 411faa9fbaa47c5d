"""Scalars of a `Graph` as da4ml variables, op by op; `da4ml.to_comb` makes a netlist of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import _scalars as ops
from pquant_jax.lower.ir import Graph, Node, label
from pquant_jax.lower.ranges import Interval, quantize_acts
from pquant_jax.numerics.oracle import quantize


class Circuit(NamedTuple):
    """What the scalar helpers need to build da4ml variables."""

    hwconf: Any
    solver_options: Any


def variables(
    graph: Graph, known: Sequence[Interval], circuit: Circuit, ports: Mapping[int, np.ndarray] | None = None
) -> list[np.ndarray]:
    """Per node an object array of its shape that holds da4ml variables and, for constants, floats.

    `ports` holds the values of input nodes that are there already.
    """
    values: list[np.ndarray] = []
    for index, (node, own) in enumerate(zip(graph.nodes, known, strict=True)):
        if ports and index in ports:
            values.append(ports[index])
            continue
        constant = own.low == own.high
        if constant.all() and node.op != "input":
            values.append(own.low.astype(object))
            continue
        ins = [values[j] for j in node.inputs]
        value = _operation(node, ins, [known[j] for j in node.inputs], circuit)
        if value.shape != node.shape:
            raise LoweringError(f"{label(graph, index)}: netlist of shape {value.shape}, expected {node.shape}")
        values.append(np.where(constant, own.low.astype(object), value) if node.op != "input" else value)
    return values


def _operation(node: Node, ins: list[np.ndarray], ranges: list[Interval], circuit: Circuit) -> np.ndarray:
    op = node.op
    if op == "input":
        return _port(node, circuit)
    if op == "quantize":
        return quantize_array(node, ins[0], ranges[0])
    if op == "table":
        return _table_array(node, ins[0], ranges[0])
    if op == "take":
        index = np.asarray(node.attrs["index"])
        return np.append(ins[0].ravel(), 0.0)[index.ravel()].reshape(index.shape)
    if op == "concat":
        return np.concatenate([v.ravel() for v in ins])
    if op == "dot":
        return _dot(ins[0], ins[1], circuit)
    if op in ("sum", "amax", "amin"):
        scalar = {"sum": ops.add, "amax": ops.maximum, "amin": ops.minimum}[op]
        return objects([ops.reduce_tree(scalar, row) for row in ins[0]], node.shape)
    scalar = ops.SCALAR[op]
    return objects([scalar(*operands) for operands in zip(*(v.ravel() for v in ins), strict=True)], node.shape)


def objects(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Variables, those that can hold one value only as floats, in an object array."""
    out = np.empty(len(items), object)
    out[:] = [ops.fold(v) for v in items]
    return out.reshape(shape)


def _port(node: Node, circuit: Circuit) -> np.ndarray:
    from da4ml.trace import FixedVariableArray

    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    return FixedVariableArray.from_kif(k, i, f, hwconf=circuit.hwconf)._vars.reshape(node.shape)


def variable(value: Any, circuit: Circuit) -> Any:
    """`value` as a da4ml variable, which a constant is not yet."""
    from da4ml.trace.fixed_variable import FixedVariable

    return value if not isinstance(value, float) else FixedVariable.from_const(value, hwconf=circuit.hwconf)


def _dot(a: np.ndarray, c: np.ndarray, circuit: Circuit) -> np.ndarray:
    """Batched product (b,m,k) x (b,k,n): constant operands go through da4ml's matrix solver, row by row."""
    from da4ml.trace import FixedVariableArray

    def plain(m: np.ndarray) -> bool:
        return all(isinstance(v, float) for v in m.ravel())

    def rows(left: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        array = FixedVariableArray(np.ascontiguousarray(left), circuit.solver_options, hwconf=circuit.hwconf)
        return (array @ matrix.astype(np.float64))._vars

    out = np.empty((a.shape[0], a.shape[1], c.shape[2]), object)
    for b in range(a.shape[0]):
        if plain(a[b]) and plain(c[b]):
            out[b] = a[b].astype(np.float64) @ c[b].astype(np.float64)
        elif plain(c[b]):
            out[b] = rows(a[b], c[b])
        elif plain(a[b]):
            out[b] = rows(c[b].T, a[b].T).T
        else:
            for m, n in np.ndindex(out.shape[1:]):
                out[b, m, n] = ops.reduce_tree(ops.add, [ops.mul(x, y) for x, y in zip(a[b, m], c[b, :, n], strict=True)])
    return out


def quantize_array(node: Node, x: np.ndarray, known: Interval) -> np.ndarray:
    """Per element; a mode that can't act on the element's interval is replaced by the cheapest (TRN, WRAP)."""
    rounds, overflows = quantize_acts(node, known)
    k, i, f = (np.asarray(node.attrs[a]).astype(np.int64).ravel().tolist() for a in "kif")
    rounding, overflow = str(node.attrs["rounding"]), str(node.attrs["overflow"])
    out: list[Any] = []
    for j, v in enumerate(x.ravel()):
        if isinstance(v, float) or k[j] + i[j] + f[j] <= 0:
            out.append(
                float(quantize(v, k[j], i[j], f[j], rounding=rounding, overflow=overflow)) if isinstance(v, float) else 0.0
            )
            continue
        if rounds.ravel()[j]:
            v = ops.round_to(v, f[j], int(known.f.ravel()[j]), rounding)
        out.append(ops.clip(v, k[j], i[j], f[j], overflow if overflows.ravel()[j] else "WRAP"))
    return objects(out, node.shape)


def _table_array(node: Node, x: np.ndarray, known: Interval) -> np.ndarray:
    """Per element, a table of the entries that its input can reach."""
    k, i, f = (np.asarray(node.attrs[key]).astype(np.int64).ravel().tolist() for key in "kif")
    codes, which, f_out = np.asarray(node.attrs["codes"]), np.ravel(node.attrs["which"]), np.asarray(node.attrs["f_out"])
    low, high, fx = (v.ravel().tolist() for v in known)
    out: list[Any] = []
    for j, v in enumerate(x.ravel()):
        row, zero = codes[which[j]], k[j] << max(i[j] + f[j], 0) if k[j] + i[j] + f[j] > 0 else 0
        grid, scale = f[j], -int(f_out[which[j]])

        def read(points: np.ndarray, row=row, zero=zero, grid=grid, scale=scale) -> np.ndarray:
            return np.ldexp(row[np.ldexp(points, grid).astype(np.int64) + zero].astype(np.float64), scale)

        out.append(ops.lookup(v, read, low[j], high[j], fx[j]))
    return objects(out, node.shape)
