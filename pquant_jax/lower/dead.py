"""Dead channels and constants out of a `Graph`, with the same outputs on every vector: a smaller netlist.  numpy only.

An element is *constant* where `ranges.intervals` proves it (a neuron without incoming weights, a relu that never opens),
and *dead* where no output depends on it (a neuron whose outgoing weights are all zero).  Every operation keeps the box
of indices per axis that holds its other elements, so that a dense layer stays one, only smaller.  A constant c that
enters a product adds c * w to what comes out: that goes into the bias behind it, as one sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower.ir import Graph, Node, reached, validate
from pquant_jax.lower.ranges import Interval, intervals

_ROWS: Final = ("sum", "amax", "amin")


class _Part(NamedTuple):
    """An old value in the new graph: element e is new[node].ravel()[index[e]] + plus[e], of index -1 just plus[e]."""

    node: int
    index: np.ndarray
    plus: np.ndarray


@dataclass
class _Build:
    """The new graph while it grows; `made` finds nodes that rearrange or shift the same values again."""

    nodes: list[Node] = field(default_factory=list)
    made: dict[tuple, int] = field(default_factory=dict)


def remove_dead(graph: Graph) -> Graph:
    """`graph` without dead channels, constants and dead code; ports and outputs keep their shapes.

    Outputs are the same bit for bit while `ranges.check_exact` passes: constants are exact sums of exact products.

    >>> from pquant_jax.lower.emulate import emulate
    >>> x = Node("input", (), (1, 1, 2), dict(k=1, i=2, f=0))
    >>> w = Node("const", (), (1, 2, 3), dict(value=np.array([[[1.0, 0.0, 2.0], [3.0, 0.0, 1.0]]])))
    >>> v = Node("const", (), (1, 3, 1), dict(value=np.array([[[1.0], [1.0], [0.0]]])))
    >>> graph = Graph((x, w, Node("dot", (0, 1), (1, 1, 3)), v, Node("dot", (2, 3), (1, 1, 1))), (0,), (4,))
    >>> small = remove_dead(graph)
    >>> channels(graph), channels(small), emulate(small, [np.array([[[[1.0, 2.0]]]])])[0].item()
    (4, 2, 7.0)
    """
    known = intervals(graph)
    active = _active(graph, known)
    build = _Build()
    parts: list[_Part] = []
    for node, own, act in zip(graph.nodes, known, active, strict=True):
        if node.op == "input":
            parts.append(_whole(_add(build, node.op, (), node.shape, node.name, **node.attrs), node.shape))
        elif not act.any():
            parts.append(_Part(0, np.full(node.shape, -1), own.low))
        else:
            part = _rebuilt(build, node, [parts[j] for j in node.inputs], [known[j] for j in node.inputs], act)
            parts.append(part._replace(index=np.where(act, part.index, -1), plus=np.where(act, part.plus, own.low)))
    ports = [parts[j].node for j in graph.inputs]
    outputs = [_emit(build, parts[j], np.ones(graph.nodes[j].shape, bool), graph.nodes[j].name) for j in graph.outputs]
    return validate(reached(Graph(tuple(build.nodes), tuple(ports), tuple(outputs))))


def channels(graph: Graph) -> int:
    """Output channels of all layers: for every product with a constant, the size of the constant's free axis."""
    total = 0
    for node in graph.nodes:
        if node.op == "dot":
            lhs, rhs = (graph.nodes[j].op == "const" for j in node.inputs)
            total += node.shape[2] if rhs else node.shape[1] if lhs else 0
    return total


def _active(graph: Graph, known: Sequence[Interval]) -> list[np.ndarray]:
    """Which elements of every node have to be computed: an output depends on them, and they are no constants."""
    varies = [own.low != own.high for own in known]
    read = [np.zeros(node.shape, bool) for node in graph.nodes]
    for j in graph.outputs:
        read[j][...] = True
    for j in reversed(range(len(graph.nodes))):
        read[j] &= varies[j]
        if read[j].any():
            _spread(graph.nodes[j], read[j], read, known)
    return read


def _spread(node: Node, act: np.ndarray, read: list[np.ndarray], known: Sequence[Interval]) -> None:
    """Mark what the elements `act` of `node` depend on."""
    if node.op == "take":
        index = np.asarray(node.attrs["index"])[act]
        read[node.inputs[0]].reshape(-1)[index[index >= 0]] = True
    elif node.op == "concat":
        ends = np.cumsum([read[j].size for j in node.inputs])[:-1]
        for j, part in zip(node.inputs, np.split(act, ends), strict=True):
            read[j] |= part.reshape(read[j].shape)
    elif node.op == "dot":
        a, c = node.inputs
        for j, met in zip((a, c), _factors(act, known[a], known[c]), strict=True):
            read[j] |= met
    else:
        for j in node.inputs:
            read[j] |= act[:, None] if node.op in _ROWS else act


def _rebuilt(build: _Build, node: Node, ins: list[_Part], ranges: list[Interval], act: np.ndarray) -> _Part:
    """`node` on the box of its active elements; a rearrangement is no node, it moves the indices."""
    if node.op == "take":
        at = np.asarray(node.attrs["index"])
        index, plus = np.append(ins[0].index.ravel(), -1)[at], np.append(ins[0].plus.ravel(), 0.0)[at]
        return _Part(ins[0].node, index, plus)
    box = _box(act)
    if node.op == "dot":
        return _dot(build, node, ins, ranges, act)
    if node.op == "concat":
        ends = np.cumsum([v.index.size for v in ins])[:-1]
        pieces = [(v, p.reshape(v.index.shape)) for v, p in zip(ins, np.split(act, ends), strict=True) if p.any()]
        made = [_emit(build, v._replace(index=v.index[p], plus=v.plus[p]), p[p], node.name) for v, p in pieces]
        return _placed(_add(build, "concat", made, (int(act.sum()),), node.name), act)
    if node.op in ("add", "sub"):
        constant = [not np.any((v.index >= 0) & act) for v in ins]
        if constant[1] or (constant[0] and node.op == "add"):
            x, c = (ins[0], ins[1]) if constant[1] else (ins[1], ins[0])
            shifted = x._replace(plus=x.plus + c.plus if node.op == "add" else x.plus - c.plus)
            return _boxed(_emit(build, _cut(shifted, box), act[box], node.name), act)
    wide = act[:, None] & np.ones(ins[0].index.shape, bool) if node.op in _ROWS else act
    made = [_emit(build, _cut(v, box), wide[box], node.name) for v in ins]
    attrs = dict(node.attrs)
    if node.op in ("quantize", "table"):
        attrs |= {key: np.broadcast_to(attrs[key], node.shape)[box] for key in "kif"}
    if node.op == "table":
        rows, which = np.unique(np.asarray(attrs["which"])[box], return_inverse=True)
        attrs |= {"codes": attrs["codes"][rows], "f_out": attrs["f_out"][rows], "which": which.reshape(act[box].shape)}
    return _boxed(_add(build, node.op, made, act[box].shape, node.name, **attrs), act)


def _dot(build: _Build, node: Node, ins: list[_Part], ranges: list[Interval], act: np.ndarray) -> _Part:
    """The products that vary stay; the others are added up.  A term a * c is 0 wherever one of them is."""
    b, m, n = _axes(act)
    met = _factors(act, *ranges)
    varies = [need & (own.low != own.high) for need, own in zip(met, ranges, strict=True)]
    kept = varies[0].any((0, 1)) | varies[1].any((0, 2))
    rest = ranges[0].low[:, :, ~kept] @ ranges[1].low[:, ~kept]
    if not kept.any():
        return _Part(0, np.full(act.shape, -1), rest)
    k = np.flatnonzero(kept)
    left, right = np.ix_(b, m, k), np.ix_(b, k, n)
    made = [_emit(build, _cut(v, at), need[at], node.name) for v, at, need in zip(ins, (left, right), met, strict=True)]
    return _boxed(_add(build, "dot", made, (len(b), len(m), len(n)), node.name), act)._replace(plus=rest)


def _factors(act: np.ndarray, a: Interval, c: Interval) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of both operands meet something that is not always 0 in an active element of the product."""
    a_there, c_there = (((own.low != 0) | (own.high != 0)).astype(np.float64) for own in (a, c))
    return act @ c_there.swapaxes(1, 2) > 0, a_there.swapaxes(1, 2) @ act > 0


def _axes(act: np.ndarray) -> list[np.ndarray]:
    """Per axis, the indices at which something is active."""
    return [np.flatnonzero(act.any(tuple(d for d in range(act.ndim) if d != axis))) for axis in range(act.ndim)]


def _box(act: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.ix_(*_axes(act))


def _whole(node: int, shape: tuple[int, ...]) -> _Part:
    return _Part(node, np.arange(int(np.prod(shape))).reshape(shape), np.zeros(shape))


def _boxed(node: int, act: np.ndarray) -> _Part:
    """A new node that holds the box of `act`."""
    index = np.full(act.shape, -1)
    shape = act[_box(act)].shape
    index[_box(act)] = np.arange(int(np.prod(shape))).reshape(shape)
    return _Part(node, index, np.zeros(act.shape))


def _placed(node: int, act: np.ndarray) -> _Part:
    """A new node that holds the elements of `act` one after the other."""
    index = np.full(act.shape, -1)
    index[act] = np.arange(int(act.sum()))
    return _Part(node, index, np.zeros(act.shape))


def _cut(part: _Part, at: tuple[np.ndarray, ...]) -> _Part:
    return part._replace(index=part.index[at], plus=part.plus[at])


def _emit(build: _Build, part: _Part, act: np.ndarray, name: str) -> int:
    """A node with the values of `part`, 0 where they are not active."""
    index, plus = np.where(act, part.index, -1), np.where(act, part.plus, 0.0)
    if (index < 0).all():
        return _once(build, "const", (), act.shape, name, value=plus)
    x = part.node
    if build.nodes[x].shape != act.shape or not np.array_equal(index.ravel(), np.arange(index.size)):
        x = _once(build, "take", (x,), act.shape, build.nodes[x].name, index=index)
    if not plus.any():
        return x
    return _once(build, "add", (x, _once(build, "const", (), act.shape, name, value=plus)), act.shape, name)


def _once(build: _Build, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], name: str, **attrs: Any) -> int:
    key = (op, inputs, shape, *(v.tobytes() for v in attrs.values()))
    if key not in build.made:
        build.made[key] = _add(build, op, inputs, shape, name, **attrs)
    return build.made[key]


def _add(build: _Build, op: str, inputs: Sequence[int], shape: tuple[int, ...], name: str, **attrs: Any) -> int:
    build.nodes.append(Node(op, tuple(inputs), shape, attrs, name))
    return len(build.nodes) - 1
