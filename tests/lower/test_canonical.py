"""The canonical form: equal integers, one spelling for the same program, another one for any other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.lower import Graph, Node
from pquant_jax.lower.canonical import canonical, difference, same
from pquant_jax.lower.emulate import emulate, port_grid
from pquant_jax.lower.ir import consumers, validate

from .random_graphs import KINDS, const, kernel, node, random_graph


def shuffled(graph: Graph, rng: np.random.Generator) -> Graph:
    """The same program: other names, another topological order, operands of commutative ops swapped."""
    waiting = [len(set(n.inputs)) for n in graph.nodes]
    ready, place = [j for j, w in enumerate(waiting) if w == 0], {}
    readers = consumers(graph)
    nodes = []
    while ready:
        j = ready.pop(int(rng.integers(len(ready))))
        n = graph.nodes[j]
        inputs = tuple(place[m] for m in n.inputs)
        if n.op in ("add", "mul", "max", "min", "eq", "ne") and rng.random() < 0.5:
            inputs = inputs[::-1]
        place[j] = len(nodes)
        nodes.append(Node(n.op, inputs, n.shape, n.attrs, f"name {rng.integers(100)}"))
        for r in set(readers[j]):
            waiting[r] -= 1
            if waiting[r] == 0:
                ready.append(r)
    return validate(Graph(tuple(nodes), tuple(place[j] for j in graph.inputs), tuple(place[j] for j in graph.outputs)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_the_form_is_the_same_program_and_the_same_for_every_order(seed, kind):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, kind)
    form, x = canonical(graph), port_grid(graph, 60, rng)
    for ours, theirs in zip(emulate(form, x), emulate(graph, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert difference(form, graph) == "" and not any(n.name for n in form.nodes)
    assert difference(shuffled(graph, rng), graph) == ""


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_any_other_program_differs(seed, kind):
    """One attribute of one node that is read is changed; the graph is compared with itself, changed."""
    rng = np.random.default_rng(seed)
    form = canonical(random_graph(rng, kind))
    at = [j for j, n in enumerate(form.nodes) if n.op in ("quantize", "const", "input", "table") and np.prod(n.shape)]
    j = int(rng.choice(at))
    n = form.nodes[j]
    key = "value" if n.op == "const" else "codes" if n.op == "table" else "f"
    value = np.array(n.attrs[key])
    if n.op == "table":
        row = int(n.attrs["which"].ravel()[0])
        value[row, 0] += 1
    elif value.ndim:
        value.reshape(-1)[int(rng.integers(value.size))] += 1
    else:
        value += 1
    nodes = [*form.nodes]
    nodes[j] = Node(n.op, n.inputs, n.shape, {**n.attrs, key: value})
    other = form._replace(nodes=tuple(nodes))
    assert not same(form, other) and difference(form, other)


def product(side: str, rng: np.random.Generator, w: np.ndarray) -> Graph:
    """x (p, m) @ w (m, n) -> (p, n), with the kernel on one `side`, or batched the other way round."""
    p, (m, n) = 3, w.shape
    nodes = []
    x = node(nodes, "input", (), (p, m), k=1, i=2, f=2)
    at = np.arange(p * m).reshape(p, m)
    if side == "right":
        y = node(nodes, "dot", (node(nodes, "take", (x,), (1, p, m), index=at[None]), const(nodes, w[None])), (1, p, n))
        y = node(nodes, "take", (y,), (p, n), index=np.arange(p * n).reshape(p, n))
    else:
        y = node(nodes, "dot", (const(nodes, w.T[None]), node(nodes, "take", (x,), (1, m, p), index=at.T[None])), (1, n, p))
        y = node(nodes, "take", (y,), (p, n), index=np.arange(p * n).reshape(n, p).T)
    y = node(nodes, "max", (const(nodes, np.zeros((p, n))), y))
    return validate(Graph(tuple(nodes), (x,), (y,)))


def test_a_product_may_have_its_kernel_on_either_side():
    rng = np.random.default_rng(0)
    w = kernel(rng, (4, 5), density=1.0)
    right, left = (product(side, rng, w) for side in ("right", "left"))
    assert same(right, left)
    [dot] = [n for n in canonical(left).nodes if n.op == "dot"]
    assert canonical(left).nodes[dot.inputs[1]].op == "const"
    changed = w.copy()
    changed[1, 2] *= -1
    assert "value differ" in difference(right, product("left", rng, changed))


@pytest.mark.parametrize("turned", [False, True])
def test_a_product_of_activations_may_be_transposed(turned):
    nodes = []
    q, k = (node(nodes, "input", (), (3, 2), k=1, i=2, f=f) for f in (1, 2))
    rows, columns = np.arange(6).reshape(1, 3, 2), np.arange(6).reshape(1, 3, 2).swapaxes(1, 2)
    first, second = (q, k) if not turned else (k, q)
    a = node(nodes, "take", (first,), (1, 3, 2), index=rows)
    c = node(nodes, "take", (second,), (1, 2, 3), index=columns)
    y = node(nodes, "dot", (a, c), (1, 3, 3))
    square = np.arange(9).reshape(3, 3)
    y = node(nodes, "take", (y,), (3, 3), index=square.T if turned else square)
    graph = validate(Graph(tuple(nodes), (q, k), (y,)))
    nodes = [*graph.nodes[:2], Node("take", (0,), (1, 3, 2), {"index": rows}), Node("take", (1,), (1, 2, 3), {"index": columns})]
    nodes += [Node("dot", (2, 3), (1, 3, 3)), Node("take", (4,), (3, 3), {"index": square})]
    plain = validate(Graph(tuple(nodes), (0, 1), (5,)))
    assert difference(graph, plain) == ""
    assert not same(plain, plain._replace(inputs=(1, 0)))  # the ports have different formats


def test_reshapes_and_comparisons_have_one_spelling():
    def written(op: str, shape: tuple[int, ...], swap: bool) -> Graph:
        nodes = []
        x = node(nodes, "input", (), (4,), k=1, i=2, f=2)
        y = node(nodes, "take", (x,), shape, index=np.arange(4).reshape(shape))
        y = node(nodes, "neg", (node(nodes, "take", (y,), shape, index=np.arange(4).reshape(shape)),))
        zero = const(nodes, np.zeros(shape))
        y = node(nodes, op, (zero, y) if swap else (y, zero))
        y = node(nodes, "take", (y,), (4,), index=np.arange(4))
        return validate(Graph(tuple(nodes), (x,), (y,)))

    assert same(written("gt", (2, 2), False), written("lt", (1, 4), True))
    assert same(written("le", (4,), False), written("ge", (4, 1), True))
    assert not same(written("gt", (4,), False), written("ge", (4,), False))


def test_rows_of_tables_may_come_in_any_order():
    def read(order: list[int], extra: int = 0) -> Graph:
        nodes = []
        x = node(nodes, "input", (), (3,), k=1, i=1, f=0)
        codes = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 0, 0]])[order]
        at = {key: np.full(3, v) for key, v in (("k", 1), ("i", 1), ("f", 0))}
        which = np.argsort(order)[[0, 1, 0]]
        codes = np.pad(codes, ((0, 0), (0, extra)))
        y = node(nodes, "table", (x,), codes=codes, which=which, f_out=np.array([0, 1, 2])[order], **at)
        return validate(Graph(tuple(nodes), (x,), (y,)))

    assert same(read([0, 1, 2]), read([2, 0, 1])) and same(read([0, 1, 2]), read([0, 1, 2], extra=4))
