"""One spelling for every `Graph`: whether two traces are the same program, whatever their names and orders.  numpy only.

Names are gone, every node is there once and in the order in which the outputs need it.  Operands of commutative ops are
sorted by what they compute; a constant stands on the right of a product, and of two products (a, c) and (c^T, a^T)^T of
varying operands one is chosen; `lt` and `le` are `gt` and `ge`.  Rearrangements (reshape, transpose, gather) move indices
until something reads them, elementwise ops act on flat vectors in the order of an operand, and the rows of tables are sorted.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower.ir import Graph, Node, label, validate
from pquant_jax.lower.passes import COMMUTATIVE, attribute_bytes

_SWAPPED: Final = {"lt": "gt", "le": "ge"}


class _View(NamedTuple):
    """Elements of a new node: flat indices in the shape of the old value, -1 for 0."""

    node: int
    index: np.ndarray


@dataclass
class _Build:
    """The new nodes, what each computes (a digest of its whole expression), and where that is."""

    nodes: list[Node] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    made: dict[bytes, int] = field(default_factory=dict)


def canonical(graph: Graph) -> Graph:
    """`graph` in the canonical spelling: the same ports and outputs, shapes included, the same integers.

    >>> x, y = (Node("input", (), (2,), dict(k=1, i=2, f=0), name) for name in "xy")
    >>> a = Graph((x, y, Node("add", (0, 1), (2,), name="first")), (0, 1), (2,))
    >>> b = Graph((x, y, Node("add", (1, 0), (2,))), (0, 1), (2,))
    >>> same(a, b), same(a, b._replace(inputs=(1, 0)))
    (True, True)
    >>> same(a, Graph((x, y, Node("sub", (1, 0), (2,))), (0, 1), (2,)))
    False
    """
    build = _Build()
    views: list[_View] = []
    for index, node in enumerate(graph.nodes):
        if node.op == "input":
            port = _add(build, "input", (), node.shape, dict(node.attrs), salt=str(graph.inputs.index(index)))
            views.append(_whole(port, node.shape))
        else:
            views.append(_canonical(build, node, [views[j] for j in node.inputs]))
    ports = tuple(views[j].node for j in graph.inputs)
    outputs = tuple(_emit(build, views[j].node, views[j].index) for j in graph.outputs)
    return validate(_ordered(Graph(tuple(build.nodes), ports, outputs)))


def same(a: Graph, b: Graph) -> bool:
    """Whether `a` and `b` are the same program; ports correspond by their position."""
    return difference(a, b) == ""


def difference(a: Graph, b: Graph) -> str:
    """The first difference of the canonical forms of `a` and `b`, "" if there is none."""
    first, second = canonical(a), canonical(b)
    for index, (ours, theirs) in enumerate(zip(first.nodes, second.nodes, strict=False)):
        names = label(first, index), label(second, index)
        if (ours.op, ours.shape, ours.inputs) != (theirs.op, theirs.shape, theirs.inputs):
            return f"{names[0]} {ours.shape} of {ours.inputs}, against {names[1]} {theirs.shape} of {theirs.inputs}"
        parts = zip(attribute_bytes(ours), attribute_bytes(theirs), strict=False)
        differ = [mine[0] for mine, other in parts if mine != other]
        if differ or set(ours.attrs) != set(theirs.attrs):
            return f"{names[0]} {ours.shape}: {', '.join(differ) or 'attributes'} differ"
    if len(first.nodes) != len(second.nodes):
        return f"{len(first.nodes)} nodes against {len(second.nodes)}"
    if (first.inputs, first.outputs) != (second.inputs, second.outputs):
        return f"outputs {first.outputs} against {second.outputs}"
    return ""


def _canonical(build: _Build, node: Node, ins: list[_View]) -> _View:
    if node.op == "take":
        index = np.asarray(node.attrs["index"])
        return _View(ins[0].node, np.append(ins[0].index.ravel(), -1)[index])
    if node.op == "const":
        value = np.asarray(node.attrs["value"], np.float64)
        return _whole(_add(build, "const", (), (value.size,), {"value": value.ravel()}), node.shape)
    if node.op == "dot":
        return _dot(build, node.shape, *ins)
    if node.op in ("sum", "amax", "amin"):
        return _whole(_add(build, node.op, (_emit(build, *ins[0]),), node.shape, {}), node.shape)
    size = int(np.prod(node.shape))
    if node.op == "concat":
        parts = tuple(_emit(build, v.node, v.index.ravel()) for v in ins)
        return _whole(_add(build, "concat", parts, (size,), {}), node.shape)
    place, order = _own_order(build, ins, size)
    made = tuple(_emit(build, v.node, v.index.ravel()[order]) for v in ins)
    op = _SWAPPED.get(node.op, node.op)
    attrs = dict(node.attrs)
    for key in ("k", "i", "f", "which"):
        if key in attrs:
            attrs[key] = np.broadcast_to(attrs[key], node.shape).ravel()[order]
    if op == "table":
        attrs |= _rows(attrs)
    return _View(_add(build, op, made if op == node.op else made[::-1], (size,), attrs), place.reshape(node.shape))


def _own_order(build: _Build, ins: list[_View], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(where every element stands in the vector on which an elementwise op acts, the elements in that order).

    That of an operand which varies, where it is a mere permutation: channels first or last are then the same program.
    """
    found = []
    for v in ins:
        flat, source = v.index.ravel(), build.nodes[v.node]
        if source.op != "const" and int(np.prod(source.shape)) == size and np.array_equal(np.sort(flat), np.arange(size)):
            found.append((build.digests[v.node], flat.tobytes(), flat))
    place = min(found, key=lambda item: item[:2])[2] if found else np.arange(size)
    return place, np.argsort(place)


def _rows(attrs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tables that are read, sorted; entries beyond the widest format are cut."""
    width = int(np.max(attrs["k"] + attrs["i"] + attrs["f"], initial=0))
    full = np.concatenate([np.asarray(attrs["f_out"])[:, None], np.asarray(attrs["codes"])[:, : 2**width]], axis=1)
    rows, which = np.unique(full[attrs["which"]], axis=0, return_inverse=True)
    return {"codes": rows[:, 1:], "f_out": rows[:, 0], "which": which.reshape(-1)}


def _dot(build: _Build, shape: tuple[int, ...], a: _View, c: _View) -> _View:
    """(a, c) or (c^T, a^T)^T."""
    turned = _View(c.node, c.index.swapaxes(1, 2)), _View(a.node, a.index.swapaxes(1, 2))
    pairs = [tuple(_emit(build, *v) for v in pair) for pair in ((a, c), turned)]
    left = [(build.nodes[pair[0]].op == "const", build.digests[pair[0]]) for pair in pairs]
    if left[0] <= left[1]:
        return _whole(_add(build, "dot", pairs[0], shape, {}), shape)
    b, m, n = shape
    view = _whole(_add(build, "dot", pairs[1], (b, n, m), {}), (b, n, m))
    return _View(view.node, view.index.swapaxes(1, 2))


def _whole(node: int, shape: tuple[int, ...]) -> _View:
    return _View(node, np.arange(int(np.prod(shape))).reshape(shape))


def _emit(build: _Build, node: int, index: np.ndarray) -> int:
    """A node of the shape of `index` that holds these elements."""
    source = build.nodes[node]
    if source.op == "const":
        return _add(build, "const", (), index.shape, {"value": np.append(source.attrs["value"].ravel(), 0.0)[index]})
    if source.shape == index.shape and np.array_equal(index.ravel(), np.arange(index.size)):
        return node
    return _add(build, "take", (node,), index.shape, {"index": index})


def _add(build: _Build, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], attrs: dict[str, Any], salt: str = "") -> int:
    if op in COMMUTATIVE:
        inputs = tuple(sorted(inputs, key=lambda j: build.digests[j]))
    node = Node(op, inputs, shape, attrs)
    digest = hashlib.sha256(repr((op, shape, salt, *(build.digests[j] for j in inputs))).encode())
    for key, raw in attribute_bytes(node):
        digest.update(key.encode() + raw)
    if digest.digest() not in build.made:
        build.made[digest.digest()] = len(build.nodes)
        build.nodes.append(node)
        build.digests.append(digest.digest())
    return build.made[digest.digest()]


def _ordered(graph: Graph) -> Graph:
    """Ports first, then every node right after its operands, in the order in which the outputs need them."""
    place: dict[int, int] = {}
    stack = [*reversed(graph.outputs), *reversed(graph.inputs)]
    while stack:
        later = [m for m in graph.nodes[stack[-1]].inputs if m not in place]
        if later:
            stack += reversed(later)
        else:
            place.setdefault(stack.pop(), len(place))
    nodes = tuple(Node(n.op, tuple(place[m] for m in n.inputs), n.shape, n.attrs) for n in (graph.nodes[j] for j in place))
    return Graph(nodes, tuple(place[j] for j in graph.inputs), tuple(place[j] for j in graph.outputs))
