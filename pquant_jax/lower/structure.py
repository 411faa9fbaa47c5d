"""The layers of a `Graph`: dense, convolution, pool, transpose and so on instead of takes of element numbers.  numpy only.

`structure(graph)` reads the graph from its outputs backwards.  A `Layer` computes the value of ONE graph node (`output`)
from the values of other nodes (`inputs`), and stands for `nodes`.  All values are per sample and in C order, and a mere
reshape is no layer: input j of a layer is read as `value.reshape(attrs["in_shapes"][j])`, the result has the elements of
`attrs["out_shape"]` and, reshaped to `shape`, equals the graph node.  Layers come in topological order.

=================================== ==========================================================================================
op                                  attrs, besides `in_shapes` and `out_shape`
=================================== ==========================================================================================
`input` `const` `quantize` `table`  as in the graph (`ir`)
`dense`                             x (m, in) or (in,) @ `kernel` (in, out) + `bias` (out,) or None
`conv`                              `kernel` (*size, in / groups, out), `bias` (out,) or None, `groups`, `geometry`
                                    (`_indices.Geometry`); out_shape (*positions, out), whatever the layout of the input
`einsum`                            `equation` of the inputs and, if not None, of `kernel` as the last operand
`pool`                              `kind` max, min, sum or average, `geometry`; keeps the layout of the input
`reduce`                            `kind` max, min or sum, `axes`
`scale`                             x * `scale` + `offset`, each None, (channels,) of the last axis, or of out_shape
`relu` `leaky_relu`                 max(x, 0); x where x >= 0 or x > 0, else x * `slope`
`reshape`                           only where an output of the graph is nothing else
`transpose` `broadcast`             `perm`; in_shapes has ones where it is repeated
`slice` `flip`                      `slices`: (start, step, count) per axis; a flip has all elements, some steps are -1
`concat`                            `axis`
`gather`                            `index`: any other take, -1 gives 0
everything else                     elementwise, as in the graph
=================================== ==========================================================================================

Nothing is guessed: a description is taken only if the index array that it implies equals the one in the graph
(`_indices`), and what matches none stays a gather, a reduction or an einsum.  `passes.simplify` before is fine;
`dead.remove_dead` puts -1 where an element is a constant, and takes some geometries away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower import _indices
from pquant_jax.lower.ir import Graph, consumers

_KINDS: Final = {"sum": "sum", "amax": "max", "amin": "min"}


class Layer(NamedTuple):
    """One layer: the value of node `output` from those of `inputs`; see the module for `attrs`."""

    op: str
    name: str
    inputs: tuple[int, ...]
    output: int
    nodes: tuple[int, ...]
    shape: tuple[int, ...]
    attrs: Mapping[str, Any]


class _Seen(NamedTuple):
    """The graph, how often every value is read (an output counts), and the shapes in which a value may be seen."""

    graph: Graph
    reads: list[int]
    shapes: list[list[tuple[int, ...]]]


def structure(graph: Graph) -> tuple[Layer, ...]:
    """The layers that compute the outputs of `graph` (all inputs of the graph among them).

    >>> from pquant_jax.lower.ir import Node
    >>> x = Node("input", (), (2,), dict(k=1, i=2, f=0))
    >>> row = Node("take", (0,), (1, 1, 2), dict(index=np.arange(2).reshape(1, 1, 2)))
    >>> w = Node("const", (), (1, 2, 3), dict(value=np.ones((1, 2, 3))))
    >>> zero = Node("const", (), (1, 1, 3), dict(value=np.zeros((1, 1, 3))))
    >>> graph = Graph((x, row, w, Node("dot", (1, 2), (1, 1, 3)), zero, Node("max", (3, 4), (1, 1, 3))), (0,), (5,))
    >>> [(a.op, a.inputs, a.output) for a in structure(graph)]
    [('input', (), 0), ('dense', (0,), 3), ('relu', (3,), 5)]
    """
    seen = _look(graph)
    needed = {*graph.inputs, *graph.outputs}
    layers: list[Layer] = []
    for index in reversed(range(len(graph.nodes))):
        if index in needed:
            layers.append(_layer(seen, index))
            needed.update(layers[-1].inputs)
    return tuple(reversed(layers))


def _look(graph: Graph) -> _Seen:
    reads = [len(readers) for readers in consumers(graph)]
    for j in graph.outputs:
        reads[j] += 1
    shapes: list[list[tuple[int, ...]]] = [[n.shape] for n in graph.nodes]
    for index, node in enumerate(graph.nodes):
        root = _root(graph, index)
        if root != index:
            reads[root] += reads[index] - 1
            shapes[root].append(node.shape)
    return _Seen(graph, reads, shapes)


def _root(graph: Graph, index: int) -> int:
    """The node of which this one is a mere reshape."""
    node = graph.nodes[index]
    while node.op == "take" and _indices.is_reshape(np.asarray(node.attrs["index"]), _size(graph, node.inputs[0])):
        index = node.inputs[0]
        node = graph.nodes[index]
    return index


def _source(graph: Graph, index: int) -> tuple[int, np.ndarray]:
    """(node that is no take, element numbers of this one in it): takes of takes are one."""
    numbers = np.arange(_size(graph, index)).reshape(graph.nodes[index].shape)
    while graph.nodes[index].op == "take":
        numbers = np.append(np.asarray(graph.nodes[index].attrs["index"]).ravel(), -1)[numbers]
        index = graph.nodes[index].inputs[0]
    return index, numbers


def _size(graph: Graph, index: int) -> int:
    return int(np.prod(graph.nodes[index].shape, dtype=np.int64))


def _constant(graph: Graph, index: int) -> np.ndarray | None:
    """The value of a constant or of elements of one."""
    source, numbers = _source(graph, index)
    if graph.nodes[source].op != "const":
        return None
    return np.append(np.asarray(graph.nodes[source].attrs["value"], np.float64).ravel(), 0.0)[numbers]


def _made(seen: _Seen, op: str, index: int, reads: Sequence[tuple[int, tuple[int, ...]]], /, **attrs: Any) -> Layer:
    """A layer that gives node `index` and reads (node, shape in which it is seen)."""
    graph = seen.graph
    inputs = tuple(_root(graph, j) for j, _ in reads)
    nodes = _between(graph, index, set(inputs))
    node = graph.nodes[index]
    name = node.name or next((graph.nodes[j].name for j in nodes if graph.nodes[j].name), "")
    attrs = {"in_shapes": tuple(tuple(s) for _, s in reads), "out_shape": node.shape, **attrs}
    return Layer(op, name, inputs, index, nodes, node.shape, attrs)


def _between(graph: Graph, index: int, inputs: set[int]) -> tuple[int, ...]:
    """The nodes from `inputs` (without them) to `index`."""
    found, pending = set(), [index]
    while pending:
        j = pending.pop()
        if j not in found and (j not in inputs or j == index):
            found.add(j)
            pending += graph.nodes[j].inputs
    return tuple(sorted(found))


def _layer(seen: _Seen, index: int) -> Layer:
    graph = seen.graph
    node = graph.nodes[index]
    value = _constant(graph, index) if node.op == "take" else None
    if value is not None:
        return _made(seen, "const", index, [], value=value)
    if node.op in ("input", "const"):
        return _made(seen, node.op, index, [], **node.attrs)
    rule = _RULES.get(node.op)
    found = rule(seen, index) if rule else None
    if found is not None:
        return found
    if node.op == "concat":
        parts = [(j, (_size(graph, j),)) for j in node.inputs]
        return _made(seen, "concat", index, parts, axis=0)
    return _made(seen, node.op, index, [(j, graph.nodes[j].shape) for j in node.inputs], **node.attrs)


def _take(seen: _Seen, index: int) -> Layer:
    graph = seen.graph
    linear = _linear(seen, index)
    if linear is not None:
        return linear
    source, numbers = _source(graph, index)
    size, shape = _size(graph, source), graph.nodes[source].shape
    if _indices.is_reshape(numbers, size):
        return _made(seen, "reshape", index, [(source, shape)])
    if graph.nodes[source].op == "concat" and seen.reads[source] == 1:
        parts = graph.nodes[source].inputs
        found = _indices.concatenation(numbers, [_size(graph, j) for j in parts])
        if found is not None:
            return _made(seen, "concat", index, list(zip(parts, found[1], strict=True)), axis=found[0])
    turned = _indices.transposition(numbers, size)
    if turned is not None:
        out = tuple(turned[0][d] for d in turned[1])
        return _made(seen, "transpose", index, [(source, turned[0])], perm=turned[1], out_shape=out)
    spread = _indices.broadcasting(numbers, size)
    if spread is not None:
        return _made(seen, "broadcast", index, [(source, spread[0])], out_shape=spread[1])
    for seen_as in seen.shapes[source]:
        slices = _indices.slicing(numbers, seen_as)
        if slices is not None:
            op = "flip" if all(s[2] == n for s, n in zip(slices, seen_as, strict=True)) else "slice"
            return _made(seen, op, index, [(source, seen_as)], slices=slices, out_shape=tuple(s[2] for s in slices))
    return _made(seen, "gather", index, [(source, (size,))], index=numbers)


def _linear(seen: _Seen, index: int) -> Layer | None:
    """A dense layer or a convolution without bias whose value is that of node `index`, a dot or a rearrangement of one."""
    graph = seen.graph
    dot, order = _source(graph, index)
    node = graph.nodes[dot]
    if node.op != "dot" or (index != dot and seen.reads[dot] != 1):
        return None
    kernel = _constant(graph, node.inputs[1])
    if kernel is None or _constant(graph, node.inputs[0]) is not None:
        return None
    groups, count, out = node.shape
    if groups == 1 and not _indices.is_reshape(order, count * out):
        return None
    by_place = np.arange(groups * count * out).reshape(node.shape).transpose(1, 0, 2)
    if groups > 1 and not np.array_equal(order.ravel(), by_place.ravel()):
        return None
    source, rows = _source(graph, node.inputs[0])
    if groups == 1 and _indices.is_reshape(rows, _size(graph, source)):
        return _dense(seen, index, source, count, kernel[0])
    found = _indices.convolution(rows, seen.shapes[source])
    if found is None:
        return _dense(seen, index, node.inputs[0], count, kernel[0]) if groups == 1 else None
    geometry, channels_first = found
    inner = geometry.channels // groups
    if channels_first:
        kernel = np.moveaxis(kernel.reshape(groups, inner, *geometry.size, out), 1, -2)
    kernel = kernel.reshape(groups, *geometry.size, inner, out)
    kernel = np.moveaxis(kernel, 0, -2).reshape(*geometry.size, inner, groups * out)
    shape = (*geometry.positions, groups * out)
    at = dict(kernel=kernel, bias=None, groups=groups, geometry=geometry, out_shape=shape)
    return _made(seen, "conv", index, [(source, geometry.in_shape)], **at)


def _dense(seen: _Seen, index: int, source: int, count: int, kernel: np.ndarray) -> Layer:
    lead = () if count == 1 else (count,)
    shapes = (*lead, kernel.shape[0]), (*lead, kernel.shape[1])
    return _made(seen, "dense", index, [(source, shapes[0])], kernel=kernel, bias=None, out_shape=shapes[1])


def _dot(seen: _Seen, index: int) -> Layer:
    found = _linear(seen, index)
    if found is not None:
        return found
    graph = seen.graph
    a, c = graph.nodes[index].inputs
    shapes = graph.nodes[a].shape, graph.nodes[c].shape
    batch = "" if shapes[0][0] == 1 else "b"
    terms, out = (f"{batch}mk", f"{batch}kn"), f"{batch}mn"
    cut = [s if batch else s[1:] for s in (*shapes, graph.nodes[index].shape)]
    left, right = _constant(graph, a), _constant(graph, c)
    equation, kernel, reads = ",".join(terms) + "->" + out, None, [(a, cut[0]), (c, cut[1])]
    if right is not None:
        kernel, reads = right.reshape(cut[1]), reads[:1]
    elif left is not None:
        equation, kernel, reads = f"{terms[1]},{terms[0]}->{out}", left.reshape(cut[0]), reads[1:]
    return _made(seen, "einsum", index, reads, equation=equation, kernel=kernel, bias=None, out_shape=cut[2])


def _operands(seen: _Seen, index: int) -> tuple[int, np.ndarray] | None:
    """(x, c) of a node of two operands of which one is a constant."""
    graph = seen.graph
    a, b = graph.nodes[index].inputs
    for x, other in ((a, b), (b, a)):
        c = _constant(graph, other)
        if c is not None and _constant(graph, x) is None:
            return x, c
    return None


def _add(seen: _Seen, index: int) -> Layer | None:
    graph = seen.graph
    found = _operands(seen, index)
    if found is None:
        return None
    x, c = found
    if graph.nodes[index].op == "sub":
        if x != graph.nodes[index].inputs[0]:
            return _scale(seen, index, x, np.full(c.shape, -1.0), c)
        c = -c
    root = _root(graph, x)
    if seen.reads[root] == 1:
        linear = _linear(seen, root)
        if linear is not None and (bias := _per_channel(c, linear.attrs["out_shape"])).ndim == 1:
            reads = list(zip(linear.inputs, linear.attrs["in_shapes"], strict=True))
            return _made(seen, linear.op, index, reads, **{**linear.attrs, "bias": bias})
        inner = _operands(seen, root) if graph.nodes[root].op == "mul" else None
        if inner is not None and inner[1].size == c.size:
            return _scale(seen, index, inner[0], inner[1].reshape(c.shape), c)
    return _scale(seen, index, x, None, c)


def _scale(seen: _Seen, index: int, x: int, scale: np.ndarray | None, offset: np.ndarray | None) -> Layer:
    shape = seen.graph.nodes[index].shape
    scale, offset = (None if v is None else _per_channel(v, shape) for v in (scale, offset))
    return _made(seen, "scale", index, [(x, shape)], scale=scale, offset=offset)


def _per_channel(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(channels,) of the last axis if all positions have the same, else of that shape."""
    value = value.reshape(shape)
    if not shape or not value.size:
        return value
    rows = value.reshape(-1, shape[-1])
    return rows[0] if (rows == rows[0]).all() else value


def _mul(seen: _Seen, index: int) -> Layer | None:
    found = _operands(seen, index)
    if found is None:
        return None
    x, c = found
    root = _root(seen.graph, x)
    if seen.graph.nodes[root].op == "sum" and seen.reads[root] == 1 and c.size and (c == c.ravel()[0]).all():
        pool = _reduced(seen, root)
        if pool is not None and pool.op == "pool" and c.ravel()[0] == 1 / np.prod(pool.attrs["geometry"].size):
            reads = list(zip(pool.inputs, pool.attrs["in_shapes"], strict=True))
            return _made(seen, "pool", index, reads, **{**pool.attrs, "kind": "average"})
    return _scale(seen, index, x, c, None)


def _max(seen: _Seen, index: int) -> Layer | None:
    found = _operands(seen, index)
    if found is None or found[1].any():
        return None
    return _made(seen, "relu", index, [(found[0], seen.graph.nodes[index].shape)])


def _select(seen: _Seen, index: int) -> Layer | None:
    """x where x >= 0 (or > 0), else x * slope."""
    graph = seen.graph
    cond, below, above = graph.nodes[index].inputs
    test, product = graph.nodes[cond], graph.nodes[_root(graph, below)]
    if test.op not in ("ge", "gt") or product.op != "mul" or seen.reads[cond] != 1 or seen.reads[_root(graph, below)] != 1:
        return None
    bound, found = _constant(graph, test.inputs[1]), _operands(seen, _root(graph, below))
    if bound is None or bound.any() or found is None or not found[1].size or (found[1] != found[1].ravel()[0]).any():
        return None
    roots = {_root(graph, j) for j in (test.inputs[0], found[0], above)}
    if len(roots) > 1:
        return None
    return _made(seen, "leaky_relu", index, [(above, graph.nodes[index].shape)], slope=float(found[1].ravel()[0]))


def _reduced(seen: _Seen, index: int) -> Layer | None:
    graph = seen.graph
    node = graph.nodes[index]
    kind = _KINDS[node.op]
    source, rows = _source(graph, node.inputs[0])
    if graph.nodes[source].op == "const":
        return None
    for shape in seen.shapes[source]:
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        axes = _indices.reduction(rows, shape)
        if axes is not None:
            return _made(seen, "reduce", index, [(source, shape)], kind=kind, axes=axes, out_shape=_without(shape, axes))
    geometry = _indices.pooling(rows, seen.shapes[source], node.op != "sum")
    if geometry is not None:
        positions, c = geometry.positions, (geometry.channels,)
        out = (*positions, *c) if geometry.channels_last else (*c, *positions)
        return _made(seen, "pool", index, [(source, geometry.in_shape)], kind=kind, geometry=geometry, out_shape=out)
    shape = rows.shape
    return _made(seen, "reduce", index, [(node.inputs[0], shape)], kind=kind, axes=(1,), out_shape=shape[:1])


def _without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for d, n in enumerate(shape) if d not in axes)


def _unary(seen: _Seen, index: int) -> Layer:
    node = seen.graph.nodes[index]
    return _made(seen, node.op, index, [(node.inputs[0], node.shape)], **node.attrs)


_RULES: Final = {
    "take": _take, "dot": _dot, "add": _add, "sub": _add, "mul": _mul, "max": _max, "select": _select,
    "quantize": _unary, "table": _unary, "sum": _reduced, "amax": _reduced, "amin": _reduced,
}  # fmt: skip
