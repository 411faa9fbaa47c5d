"""Rewriting of a `Graph` into smaller ones with the same outputs, and what a constant costs.  numpy only.

Every pass is a pure function Graph -> Graph whose outputs are the same on every vector.  There is no op for a shift:
`mul` by a power of two is free in da4ml (a variable carries its power of two) and exact everywhere else, so a second
spelling of it would only add a case to every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower.ir import Graph, Node, consumers, label, reached, validate
from pquant_jax.lower.ranges import Interval, intervals, narrowest, quantize_acts
from pquant_jax.numerics.oracle import significant_bits

COMMUTATIVE: Final = frozenset({"add", "mul", "max", "min", "eq", "ne"})
_CONSTANT_BITS: Final = 24  # what a fused bias may have: backends hold constants as float32


class Lint(NamedTuple):
    """A constant that costs a multiplier: node and `label` of the product, the element of its constant operand, bits."""

    node: int
    label: str
    element: tuple[int, ...]
    value: float
    bits: int


def simplify(graph: Graph) -> Graph:
    """`graph` through all passes until none finds anything: never more nodes, the same outputs.

    >>> x = Node("input", (), (1,), dict(k=1, i=2, f=0))
    >>> c = Node("const", (), (1,), dict(value=np.array([1.0])))
    >>> graph = Graph((x, c, Node("add", (0, 1), (1,)), Node("add", (2, 1), (1,))), (0,), (3,))
    >>> [(n.op, n.inputs) for n in simplify(graph).nodes], simplify(graph).nodes[1].attrs["value"].item()
    ([('input', ()), ('const', ()), ('add', (0, 1))], 2.0)
    """
    while True:
        smaller = merge_common(fuse_biases(merge_quantizers(graph)))
        if len(smaller.nodes) == len(graph.nodes):
            return validate(smaller)
        graph = smaller


def subgraph(graph: Graph, known: Sequence[Interval], inputs: Sequence[int], outputs: Sequence[int]) -> Graph:
    """The nodes that `outputs` need of `graph`, down to `inputs`, as a graph of its own.

    Every node of `inputs` becomes a port in the narrowest format per element of its interval (`known`, by `intervals`), so the
    part computes what it does in `graph`; its name is the node's `label`.  Ports of `graph` that are needed besides follow.

    >>> x, y = (Node("input", (), (1,), dict(k=1, i=2, f=0), name) for name in "xy")
    >>> graph = Graph((x, Node("abs", (0,), (1,)), y, Node("add", (1, 2), (1,))), (0, 2), (3,))
    >>> cut = subgraph(graph, intervals(graph), [1], [3])
    >>> [(n.op, n.name, n.inputs) for n in cut.nodes], cut.nodes[0].attrs["k"].item()
    ([('input', '%1 abs', ()), ('input', 'y', ()), ('add', '', (0, 1))], 0)
    """
    cuts, needed = frozenset(inputs), {*inputs, *outputs}
    for j in reversed(range(len(graph.nodes))):
        if j in needed and j not in cuts:
            needed.update(graph.nodes[j].inputs)
    order = sorted(needed)
    place = {j: n for n, j in enumerate(order)}

    def cut(j: int) -> Node:
        node = graph.nodes[j]
        if j not in cuts:
            return replace(node, inputs=tuple(place[m] for m in node.inputs))
        return Node("input", (), node.shape, dict(zip("kif", narrowest(known[j]), strict=True)), label(graph, j))

    ports = [*inputs, *(j for j in order if graph.nodes[j].op == "input" and j not in cuts)]
    return validate(Graph(tuple(cut(j) for j in order), tuple(place[j] for j in ports), tuple(place[j] for j in outputs)))


Rule = Callable[[int, Node, list[Node]], int | Node]


def _rewritten(graph: Graph, rule: Rule) -> Graph:
    """Every node through `rule(index, node, new nodes)`: the index of a new node, or the node to append."""
    nodes: list[Node] = []
    place: list[int] = []
    for index, node in enumerate(graph.nodes):
        found = rule(index, replace(node, inputs=tuple(place[j] for j in node.inputs)), nodes)
        if isinstance(found, Node):
            nodes.append(found)
            found = len(nodes) - 1
        place.append(found)
    return reached(Graph(tuple(nodes), tuple(place[j] for j in graph.inputs), tuple(place[j] for j in graph.outputs)))


def _read_once(graph: Graph) -> list[bool]:
    return [len(readers) == 1 and j not in graph.outputs for j, readers in enumerate(consumers(graph))]


def merge_quantizers(graph: Graph) -> Graph:
    """Without quantizers that do nothing to any value that can arrive, and with one for two in a row where that is exact.

    Of two in a row, r1 o1 (k1, i1, f1) and then r2 o2 (k2, i2, f2), the second one alone does it with r1 where f2 = f1 and
    the first can't overflow or its range holds the second's; and where both truncate and f2 < f1, if the first can't
    overflow or both wrap.  A first one that others read stays: two quantizers would round the same value twice.
    """
    known, once = intervals(graph), _read_once(graph)

    def rule(index: int, node: Node, nodes: list[Node]) -> int | Node:
        if node.op != "quantize":
            return node
        source = graph.nodes[index].inputs[0]
        rounds, overflows = quantize_acts(node, known[source])
        if not (rounds | overflows).any():
            return node.inputs[0]
        first, new = graph.nodes[source], nodes[node.inputs[0]]
        if first.op != "quantize" or not once[source] or new.attrs is not first.attrs:  # itself merged: the next round
            return node
        merged = _merged(first, node, quantize_acts(first, known[first.inputs[0]])[1])
        return node if merged is None else replace(node, inputs=new.inputs, attrs=merged)

    return _rewritten(graph, rule)


def _merged(first: Node, second: Node, overflows: np.ndarray) -> dict[str, Any] | None:
    """Attributes of one quantizer that does what both do, None if there is none.  overflows: where the first one does."""
    (k1, i1, f1), (k2, i2, f2) = (
        [np.broadcast_to(np.asarray(n.attrs[key]), second.shape).astype(np.int64) for key in "kif"] for n in (first, second)
    )
    rounding, overflow = (str(first.attrs[key]) for key in ("rounding", "overflow"))
    dead1, dead2 = k1 + i1 + f1 <= 0, k2 + i2 + f2 <= 0
    nested = np.zeros(second.shape, bool)
    if overflow == str(second.attrs["overflow"]):
        if overflow == "WRAP":
            nested = i2 + k2 <= i1 + k1
        elif overflow in ("SAT", "SAT_SYM"):
            nested = (i2 <= i1) & (k2 <= k1)
    fits = (f2 == f1) & (~overflows | nested)
    if rounding == str(second.attrs["rounding"]) == "TRN":
        fits |= (f2 < f1) & (~overflows | (nested & (overflow == "WRAP")))
    if not (fits | dead1 | dead2).all():
        return None
    zero = dead1 | dead2
    form = {key: np.where(zero, 0, v) for key, v in zip("kif", (k2, i2, f2), strict=True)}
    return {**form, "rounding": rounding, "overflow": str(second.attrs["overflow"])}


def fuse_biases(graph: Graph) -> Graph:
    """With one constant added where two were, one after the other, if their sum is exact and has at most 24 bits."""
    once = _read_once(graph)

    def rule(index: int, node: Node, nodes: list[Node]) -> int | Node:
        outer = _bias(node, nodes)
        if outer is None:
            return node
        x, c = outer
        inner = _bias(nodes[x], nodes) if once[_source(graph, index, x, node)] else None
        if inner is None:
            return node
        total = inner[1] + c
        back = total - inner[1]  # the error of the sum (Knuth's TwoSum) must be zero
        error = (inner[1] - (total - back)) + (c - back)
        bits = significant_bits(total)
        if error.any() or bits.max(initial=0) > _CONSTANT_BITS:
            return node
        nodes.append(Node("const", (), node.shape, {"value": total}, node.name))
        return replace(node, op="add", inputs=(inner[0], len(nodes) - 1))

    return _rewritten(graph, rule)


def _source(graph: Graph, index: int, x: int, node: Node) -> int:
    """The node of the old graph that became operand `x` of the new `node`."""
    return graph.nodes[index].inputs[node.inputs.index(x)]


def _bias(node: Node, nodes: Sequence[Node]) -> tuple[int, np.ndarray] | None:
    """(x, c) of a node that gives x + c with a constant c."""
    if node.op not in ("add", "sub"):
        return None
    a, b = node.inputs
    if nodes[b].op == "const":
        value = np.asarray(nodes[b].attrs["value"], np.float64)
        return a, value if node.op == "add" else -value
    if nodes[a].op == "const" and node.op == "add":
        return b, np.asarray(nodes[a].attrs["value"], np.float64)
    return None


def merge_common(graph: Graph) -> Graph:
    """With every node once: those of the same op, attributes and operands (of a commutative op in any order) are one."""
    made: dict[tuple, int] = {}

    def rule(index: int, node: Node, nodes: list[Node]) -> int | Node:
        del index
        if node.op == "input":
            return node
        operands = tuple(sorted(node.inputs)) if node.op in COMMUTATIVE else node.inputs
        key = (node.op, operands, node.shape, *attribute_bytes(node))
        if key in made:
            return made[key]
        made[key] = len(nodes)
        return node

    return _rewritten(graph, rule)


def attribute_bytes(node: Node) -> list[tuple[str, bytes]]:
    """Values without their storage: every number as float64 but integers, which are int64."""
    out = []
    for key, value in sorted(node.attrs.items()):
        if isinstance(value, str):
            out.append((key, value.encode()))
        else:
            array = np.asarray(value)
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
            array = array + 0.0 if array.dtype.kind == "f" else array  # one zero
            out.append((key, str(array.shape).encode() + array.tobytes()))
    return out


def lint(graph: Graph, bits: int = 8) -> list[Lint]:
    """The constants of more than `bits` significant bits that `mul` and `dot` multiply with something that varies.

    Each is about one adder per two bits and element: quantize that parameter, or that scalar (1/sqrt(d), say).
    """
    known, found = intervals(graph), []
    varies = [own.low != own.high for own in known]
    for index, node in enumerate(graph.nodes):
        if node.op not in ("mul", "dot"):
            continue
        for side, at in enumerate(node.inputs):
            met = varies[node.inputs[1 - side]]
            if node.op == "dot":  # an element of (b, m, k) meets a row of (b, k, n), one of (b, k, n) a column of (b, m, k)
                met = met.any(1)[:, :, None] if side else met.any(2)[:, None, :]
            value = np.where(varies[at], 0.0, known[at].low)
            width = significant_bits(value)
            for e in np.argwhere((width > bits) & met):
                element = tuple(int(j) for j in e)
                found.append(Lint(index, label(graph, index), element, float(value[element]), int(width[element])))
    return found
