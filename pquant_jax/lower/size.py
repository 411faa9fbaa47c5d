"""How large a `Graph` is as hardware, before anything expensive is done with it.  numpy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pquant_jax.lower.ir import Graph, Node
from pquant_jax.lower.ranges import Interval, intervals, layer_names

_FREE = frozenset({"input", "const", "take", "concat", "neg"})  # wires: a netlist carries the sign along


class Size(NamedTuple):
    """Scalars of one layer that are computed anew for every sample.

    operations: everything below, and additions, comparisons, selections and quantizers; weights: multiplications by a
    constant that is not 0; multiplications: of two values that vary; lookups, and entries: of all their tables together.
    """

    operations: int
    weights: int
    multiplications: int
    lookups: int
    entries: int


def size(graph: Graph) -> dict[str, Size]:
    """Per model layer, in the order of the graph, and under "total": what a netlist without any sharing would hold.

    Constants and what is multiplied by 0 don't count; what no output reads does (see `remove_dead`).  A netlist in da4ml
    takes about 0.3 ms per operation to build.

    >>> x = Node("input", (), (1, 1, 2), dict(k=1, i=2, f=0))
    >>> w = Node("const", (), (1, 2, 2), dict(value=np.array([[[1.0, 0.0], [3.0, 2.0]]])))
    >>> graph = Graph((x, w, Node("dot", (0, 1), (1, 1, 2), name="Dense_0/kernel")), (0,), (2,))
    >>> size(graph)["Dense_0"]
    Size(operations=4, weights=3, multiplications=0, lookups=0, entries=0)
    """
    known = intervals(graph)
    out: dict[str, Size] = {}
    for node, layer, own in zip(graph.nodes, layer_names(graph, readers_first=False), known, strict=True):
        count = _count(node, own, [known[j] for j in node.inputs])
        if any(count):
            out[layer] = _plus(out.get(layer, Size(0, 0, 0, 0, 0)), count)
    total = Size(0, 0, 0, 0, 0)
    for count in out.values():
        total = _plus(total, count)
    return {**out, "total": total}


def _plus(a: Size, b: Size) -> Size:
    return Size(*(x + y for x, y in zip(a, b, strict=True)))


def _count(node: Node, own: Interval, ins: list[Interval]) -> Size:
    varies = own.low != own.high
    if node.op in _FREE or not varies.any():
        return Size(0, 0, 0, 0, 0)
    if node.op in ("mul", "dot"):
        return _products(node, varies, *ins)
    if node.op in ("sum", "amax", "amin"):  # constants of a row are one operand
        terms = (ins[0].low != ins[0].high).sum(-1) + ((ins[0].low == ins[0].high) & (ins[0].low != 0)).any(-1)
        return Size(int(np.where(varies, np.maximum(terms - 1, 0), 0).sum()), 0, 0, 0, 0)
    if node.op in ("add", "sub"):
        varies = varies & ~np.logical_or.reduce([(v.low == 0) & (v.high == 0) for v in ins])
    n = int(varies.sum())
    if node.op == "table":
        bits = np.maximum(sum(np.asarray(node.attrs[key], np.int64) for key in "kif"), 0)
        return Size(n, 0, 0, n, int(np.where(varies, np.left_shift(1, bits), 0).sum()))
    return Size(n, 0, 0, 0, 0)


def _products(node: Node, varies: np.ndarray, a: Interval, c: Interval) -> Size:
    """Per element of a product the terms that vary; a constant part of the sum is one more addition."""

    def pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        x, y = left.astype(np.int64), right.astype(np.int64)
        return np.where(varies, x @ y if node.op == "dot" else x * y, 0)

    moving = [v.low != v.high for v in (a, c)]
    fixed = [(v.low == v.high) & (v.low != 0) for v in (a, c)]
    weights = pairs(moving[0], fixed[1]) + pairs(fixed[0], moving[1])
    both = pairs(*moving)
    terms = weights + both + (pairs(*fixed) > 0)
    additions = np.maximum(terms - 1, 0)
    return Size(int((weights + both + additions).sum()), int(weights.sum()), int(both.sum()), 0, 0)
