"""Counts of scalar operations: by hand, and against da4ml's netlist."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.lower import Graph, Node, remove_dead
from pquant_jax.lower.ir import validate
from pquant_jax.lower.ranges import layer_names
from pquant_jax.lower.size import Size, size

from .random_graphs import KINDS, const, node, random_graph


def counted(op: str, shape, *operands, out=None, **attrs) -> Size:
    """The size of one op on a port of `shape` and constants."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), shape, k=1, i=2, f=1)
    inputs = [x if isinstance(v, str) else const(nodes, v) for v in operands]
    y = node(nodes, op, inputs, out or shape, **attrs)
    sizes = size(validate(Graph(tuple(nodes), (x,), (y,))))
    assert sizes["total"] == sizes.get("", Size(0, 0, 0, 0, 0))
    return sizes["total"]


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (lambda: counted("add", (4,), "x", [1.0, 0.0, 2.0, 3.0]), (3, 0, 0, 0, 0)),
        (lambda: counted("neg", (4,), "x"), (0, 0, 0, 0, 0)),
        (lambda: counted("mul", (4,), "x", [0.0, 1.0, 2.0, 3.0]), (3, 3, 0, 0, 0)),
        (lambda: counted("mul", (4,), "x", "x"), (4, 0, 4, 0, 0)),
        (lambda: counted("sum", (2, 3), "x", out=(2,)), (4, 0, 0, 0, 0)),
        (lambda: counted("dot", (1, 2, 2), "x", "x", out=(1, 2, 2)), (12, 0, 8, 0, 0)),
        (lambda: counted("dot", (1, 3, 2), np.array([[[1.0, 0.0, 2.0]]]), "x", out=(1, 1, 2)), (6, 4, 0, 0, 0)),
        (lambda: counted("dot", (1, 2, 2), "x", np.zeros((1, 2, 5)), out=(1, 2, 5)), (0, 0, 0, 0, 0)),
    ],
)
def test_by_hand(got, want):
    assert tuple(got()) == want


def test_tables_and_quantizers_by_hand():
    at = {"k": np.array([1, 1, 0]), "i": np.array([2, 1, 0]), "f": np.array([1, 0, 0])}
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=2, f=1)
    q = node(nodes, "quantize", (x,), name="gelu/input", rounding="TRN", overflow="SAT", **at)
    codes = np.arange(16)[None]
    y = node(nodes, "table", (q,), name="gelu/table", codes=codes, which=np.zeros(3, int), f_out=np.array([0]), **at)
    sizes = size(validate(Graph(tuple(nodes), (x,), (y,))))
    assert sizes == {"gelu": Size(4, 0, 0, 2, 16 + 4), "total": Size(4, 0, 0, 2, 16 + 4)}  # the third has no bit


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_layers_add_up_and_dead_code_counts(seed, kind):
    graph = random_graph(np.random.default_rng(seed), kind)
    sizes = size(graph)
    total = sizes.pop("total")
    assert total == Size(*(sum(column) for column in zip(*sizes.values(), strict=True))) if sizes else total == (0,) * 5
    assert total.operations >= total.weights + total.multiplications + total.lookups
    assert size(remove_dead(graph))["total"].weights <= total.weights


def test_layers_have_the_names_of_their_neighbours():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=1)
    a = node(nodes, "neg", (x,))
    b = node(nodes, "abs", (a,))
    nodes.append(Node("neg", (b,), (2,), {}, "Dense_0/input"))
    c = node(nodes, "abs", (len(nodes) - 1,))
    graph = validate(Graph(tuple(nodes), (x,), (c,)))
    assert layer_names(graph) == layer_names(graph, readers_first=False) == ["Dense_0"] * 5
    nodes[1] = Node("neg", (x,), (2,), {}, "first")
    graph = graph._replace(nodes=tuple(nodes))
    assert layer_names(graph) == ["first", "first", "Dense_0", "Dense_0", "Dense_0"]
    assert layer_names(graph, readers_first=False) == ["first", "first", "first", "Dense_0", "Dense_0"]
    assert layer_names(graph._replace(nodes=tuple(Node(n.op, n.inputs, n.shape, n.attrs) for n in nodes))) == [""] * 5
