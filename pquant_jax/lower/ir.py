"""The fixed-point graph between a traced model and every hardware backend.  numpy only: this module imports no JAX.

A `Graph` is a list of `Node`s in topological order over per-sample tensors (no batch axis).  Every value is a real
number on a fixed-point grid; shapes are exact (no broadcasting between operands), so a backend needs one case per op:

=========== ============================== ==================================================================
op          inputs                         attrs and meaning
=========== ============================== ==================================================================
`input`     -                              `k, i, f` (int, or int64 arrays of the node's shape): the port format; the port
                                           wraps what does not fit.  `weight`: there and true where a weight set is
                                           loaded; such ports stand behind those of the data
`const`     -                              `value` float64 array, every element on a finite binary grid
`quantize`  x                              `k, i, f` int64 arrays of the node's shape, `rounding`, `overflow`
`take`      x                              `index` int64 array of the node's shape into `x.ravel()`; -1 gives 0
`table`     x                              `k, i, f` int64 arrays of the node's shape, the format on whose grid x lies;
                                           `codes` int64 (T, n), `which` int64 of the node's shape, `f_out` int64 (T,):
                                           codes[which, x * 2^f + k * 2^(i+f)] * 2^-f_out[which]
`concat`    a, b, ...                      flattened inputs one after the other, shape (total,)
`dot`       a (b,m,k), c (b,k,n)           batched matrix product, shape (b,m,n)
`add` `sub` `mul` `max` `min`  a, b        elementwise, equal shapes
`neg` `abs` x                              elementwise
`ge` `gt` `le` `lt` `eq` `ne`  a, b        comparison, 0 or 1
`select`    cond, on_false, on_true        elementwise
`sum` `amax` `amin`            x (m, n)    reduction of the last axis, shape (m,)
=========== ============================== ==================================================================
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, did_you_mean

ARITY: Final[dict[str, int | None]] = {
    "input": 0, "const": 0, "quantize": 1, "table": 1, "take": 1, "concat": None, "dot": 2,
    "add": 2, "sub": 2, "mul": 2, "max": 2, "min": 2, "neg": 1, "abs": 1,
    "ge": 2, "gt": 2, "le": 2, "lt": 2, "eq": 2, "ne": 2, "select": 3, "sum": 1, "amax": 1, "amin": 1,
}  # fmt: skip
CODE_LIMIT: Final = 2**31  # of a table's codes
_ATTRS: Final[dict[str, tuple[str, ...]]] = {
    "input": ("k", "i", "f"), "const": ("value",), "take": ("index",),
    "quantize": ("k", "i", "f", "rounding", "overflow"),
    "table": ("k", "i", "f", "codes", "which", "f_out"),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operation.  `inputs` are indices of earlier nodes; `name` says where in the model it comes from."""

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


class Graph(NamedTuple):
    """Nodes in topological order, the indices of the input nodes and of the output values."""

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def label(graph: Graph, index: int) -> str:
    """`%12 quantize 'Dense_0/input'`: how every error and report names a node."""
    node = graph.nodes[index]
    return f"%{index} {node.op}" + (f" {node.name!r}" if node.name else "")


def weight_ports(graph: Graph) -> tuple[int, ...]:
    """The input nodes through which a weight set is loaded, in the order of `graph.inputs`; () for an ordinary graph."""
    return tuple(j for j in graph.inputs if np.any(graph.nodes[j].attrs.get("weight", False)))


def validate(graph: Graph) -> Graph:
    """Return `graph` if every invariant of the module's table holds, else raise `LoweringError`."""

    def fail(index: int, why: str) -> None:
        raise LoweringError(f"{label(graph, index)}: {why}")

    shapes = [n.shape for n in graph.nodes]
    for index, node in enumerate(graph.nodes):
        if node.op not in ARITY:
            fail(index, f"unknown op; {did_you_mean(node.op, ARITY)}")
        arity = ARITY[node.op]
        if arity is not None and len(node.inputs) != arity:
            fail(index, f"takes {arity} inputs, got {len(node.inputs)}")
        if any(not 0 <= j < index for j in node.inputs):
            fail(index, f"inputs {node.inputs} must be indices of earlier nodes")
        for key in _ATTRS.get(node.op, ()):
            if key not in node.attrs:
                fail(index, f"lacks the attribute {key!r}")
        want = _expected_shape(node, [shapes[j] for j in node.inputs])
        if want is not None and want != node.shape:
            fail(index, f"has shape {node.shape}, its inputs give {want}")
        if node.op == "table" and (why := _table_fault(node)):
            fail(index, why)
    for index in (*graph.inputs, *graph.outputs):
        if not 0 <= index < len(graph.nodes):
            raise LoweringError(f"graph refers to node {index} of {len(graph.nodes)}")
    return graph


def _expected_shape(node: Node, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    if node.op == "const":
        return np.shape(node.attrs["value"])
    if node.op == "take":
        return np.shape(node.attrs["index"])
    if node.op == "concat":
        return (sum(int(np.prod(s)) for s in shapes),)
    if node.op == "dot":
        (b, m, k), (b2, k2, n) = shapes
        return (b, m, n) if (b, k) == (b2, k2) else (-1,)
    if node.op in ("sum", "amax", "amin"):
        return shapes[0][:1] if len(shapes[0]) == 2 else (-1,)
    if node.op == "input":
        return None
    return shapes[0] if all(s == shapes[0] for s in shapes) else (-1,)


def _table_fault(node: Node) -> str:
    """What is wrong with the attributes of a `table`, "" if nothing is."""
    k, i, f, codes, which, f_out = (np.asarray(node.attrs[key]) for key in _ATTRS["table"])
    if any(v.dtype.kind not in "iu" for v in (k, i, f, codes, which, f_out)):
        return "its attributes must be arrays of integers"
    if any(v.shape != node.shape for v in (k, i, f, which)):
        return f"k, i, f and which must have the node's shape {node.shape}, got {k.shape}, {i.shape}, {f.shape}, {which.shape}"
    if codes.ndim != 2 or f_out.shape != codes.shape[:1]:
        return f"codes must be (T, n) and f_out (T,), got {codes.shape} and {f_out.shape}"
    if which.size and not 0 <= which.min() <= which.max() < len(codes):
        return f"which holds {which.min()} to {which.max()}, there are {len(codes)} tables"
    if not np.isin(k, (0, 1)).all():
        return "k must be 0 or 1"
    bits = int((k + i + f).max(initial=0))
    if codes.shape[1] < 2**bits:
        return f"its input has {bits} bits, so its tables need {2**bits} entries, got {codes.shape[1]}"
    if codes.size and not -CODE_LIMIT <= codes.min() <= codes.max() < CODE_LIMIT:
        return f"codes must fit 32 bits, got {codes.min()} to {codes.max()}"
    return ""


def entries(node: Node, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the `table` node reads for the input `x` (..., *shape): (entry int64, bool: no entry, x is off the format).

    The entry is x * 2^f + k * 2^(i+f); a format without bits holds 0 alone, which is entry 0.

    >>> at = dict(k=1, i=1, f=0, codes=[[4, 1, 0, 1]], which=0, f_out=[0])
    >>> [v.tolist() for v in entries(Node("table", (0,), (), at), np.array([-2.0, 1.0, 0.5, 2.0]))]
    [[0, 3, 0, 0], [False, False, True, True]]
    """
    k, i, f = (np.asarray(node.attrs[key], np.int64) for key in "kif")
    alive = k + i + f > 0
    span = np.ldexp(1.0, i + f)
    code = np.ldexp(np.asarray(x, np.float64), f)
    low, high = np.where(alive, -k * span, 0.0), np.where(alive, span - 1, 0.0)
    bad = ~((code >= low) & (code <= high) & (code == np.rint(code)))
    return np.where(bad, 0.0, code - low).astype(np.int64), bad


def consumers(graph: Graph) -> list[list[int]]:
    """For every node, the indices of the nodes that read it."""
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for index, node in enumerate(graph.nodes):
        for j in node.inputs:
            readers[j].append(index)
    return readers


def reached(graph: Graph) -> Graph:
    """`graph` without the nodes that no output reads; ports stay."""
    needed = {*graph.inputs, *graph.outputs}
    for index in reversed(range(len(graph.nodes))):
        if index in needed:
            needed.update(graph.nodes[index].inputs)
    order = sorted(needed)
    place = {old: new for new, old in enumerate(order)}
    nodes = tuple(
        Node(n.op, tuple(place[j] for j in n.inputs), n.shape, n.attrs, n.name) for n in (graph.nodes[j] for j in order)
    )
    return Graph(nodes, tuple(place[j] for j in graph.inputs), tuple(place[j] for j in graph.outputs))


def save(graph: Graph, path: str | os.PathLike) -> None:
    """Write `graph` to an `.npz` (a JSON header and one array per attribute), through a temporary name."""
    arrays: dict[str, np.ndarray] = {}
    header = []
    for index, node in enumerate(graph.nodes):
        plain = {}
        for key, value in node.attrs.items():
            if isinstance(value, str):
                plain[key] = value
            else:
                arrays[f"{index}.{key}"] = np.asarray(value)
        header.append([node.op, list(node.inputs), list(node.shape), plain, node.name])
    text = json.dumps({"format": 1, "nodes": header, "inputs": graph.inputs, "outputs": graph.outputs})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.frombuffer(text.encode(), np.uint8), **arrays)  # pyright: ignore[reportArgumentType]
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(target)


def load(path: str | os.PathLike) -> Graph:
    """Read a graph written by `save`."""
    with np.load(path) as data:
        header = json.loads(data["header"].tobytes())
        if header.get("format") != 1:
            raise LoweringError(f"{path}: graph format {header.get('format')!r}, expected 1; write it again")
        attrs: list[dict[str, Any]] = [dict(n[3]) for n in header["nodes"]]
        for key in data.files:
            if key != "header":
                index, name = key.split(".", 1)
                attrs[int(index)][name] = data[key]
    rows = zip(header["nodes"], attrs, strict=True)
    nodes = tuple(Node(op, tuple(ins), tuple(shape), a, name) for (op, ins, shape, _, name), a in rows)
    return validate(Graph(nodes, tuple(header["inputs"]), tuple(header["outputs"])))
