"""Dead channels, constants and dead code out of a graph: the same integers on every vector, fewer adders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.lower import Graph, remove_dead
from pquant_jax.lower.backends.da4ml import predict, to_comb
from pquant_jax.lower.dead import channels
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import validate
from pquant_jax.lower.ranges import check_exact

from .random_graphs import KINDS, MODES, const, kernel, node, port, quantized, random_graph


def same_outputs(graph: Graph, rng: np.random.Generator, n: int = 300) -> Graph:
    """The graph without dead parts, after its outputs were found equal on codes of the whole ports."""
    check_exact(graph)
    small = remove_dead(graph)
    assert [small.nodes[j].shape for j in small.outputs] == [graph.nodes[j].shape for j in graph.outputs]
    assert [small.nodes[j] for j in small.inputs] == [graph.nodes[j] for j in graph.inputs]
    x = port_grid(graph, n, rng)
    for ours, theirs in zip(emulate(small, x), emulate(graph, x), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return small


def finished(nodes, x, *outputs):
    return validate(Graph(tuple(nodes), (x,), outputs))


def layer(nodes, x, w, bias, relu=True, name="Dense"):
    """x (p, m) @ w (m, n) + bias -> (p, n)."""
    p, m, n = *nodes[x].shape, w.shape[1]
    row = node(nodes, "take", (x,), (1, p, m), index=np.arange(p * m).reshape(1, p, m))
    y = node(nodes, "dot", (row, const(nodes, w[None])), (1, p, n))
    y = node(nodes, "take", (y,), (p, n), index=np.arange(p * n).reshape(p, n))
    y = node(nodes, "add", (y, const(nodes, np.broadcast_to(bias, (p, n)))))
    if not relu:
        return y
    y = node(nodes, "max", (y, const(nodes, np.zeros((p, n)))))
    at = {"k": np.zeros((p, n), np.int64), "i": np.full((p, n), 3), "f": np.full((p, n), 3)}
    return node(nodes, "quantize", (y,), name=f"{name}/input", rounding="RND", overflow="SAT", **at)


def network(rng, dead_out=(), dead_in=(), p=1):
    """Two hidden layers of 8; columns `dead_out` of the first kernel and rows `dead_in` of the second one are 0."""
    nodes = []
    x = node(nodes, "input", (), (p, 6), k=1, i=2, f=3)
    w = [kernel(rng, s, density=1.0) for s in ((6, 8), (8, 8), (8, 3))]
    bias = [kernel(rng, (n,), density=1.0) for n in (8, 8, 3)]
    bias[0][list(dead_out)] = np.resize([1.5, -2.0, 0.375], len(dead_out))
    w[0][:, list(dead_out)] = 0
    w[1][list(dead_in)] = 0
    h = layer(nodes, x, w[0], bias[0])
    h = layer(nodes, h, w[1], bias[1])
    return finished(nodes, x, layer(nodes, h, w[2], bias[2], relu=False))


@pytest.mark.parametrize("p", [1, 3])
def test_dead_neurons_leave_and_their_constants_go_into_the_next_bias(p):
    rng = np.random.default_rng(1)
    graph = network(rng, dead_out=(0, 3, 4), dead_in=(5,), p=p)
    small = same_outputs(graph, rng)
    dots = [n.shape for n in small.nodes if n.op == "dot"]
    assert dots == [(1, p, 4), (1, p, 8), (1, p, 3)] and channels(graph) - channels(small) == 4
    kernels = [small.nodes[n.inputs[1]].shape for n in small.nodes if n.op == "dot"]
    assert kernels == [(1, 6, 4), (1, 4, 8), (1, 8, 3)]
    assert sum(n.op == "add" for n in small.nodes) == 3  # no adder beside the biases


def test_the_netlist_is_smaller_and_equal():
    rng = np.random.default_rng(1)
    graph = network(rng, dead_out=(0, 3, 4), dead_in=(5, 6))
    kept, small = to_comb(graph, keep_dead=True), to_comb(graph)
    x = flatten_batch(port_grid(graph, 500, rng))
    np.testing.assert_array_equal(predict(small, x), predict(kept, x))
    assert small.cost < kept.cost


def test_nothing_dead_changes_nothing():
    graph = network(np.random.default_rng(2))
    small = remove_dead(graph)
    assert channels(small) == channels(graph)
    assert [n.op for n in small.nodes if n.op not in ("take", "const")] == [
        n.op for n in graph.nodes if n.op not in ("take", "const")
    ]


def test_a_constant_that_a_residual_reads_stays_there():
    """x + h with h constant in one channel: the channel lives on, h is gone."""
    rng, nodes = np.random.default_rng(3), []
    x = node(nodes, "input", (), (1, 4), k=1, i=2, f=2)
    w = kernel(rng, (4, 4), density=1.0)
    w[:, 1] = 0
    h = layer(nodes, x, w, np.array([0.5, 1.25, -0.5, 0.25]))
    y = node(nodes, "add", (x, h))
    graph = finished(nodes, x, layer(nodes, y, kernel(rng, (4, 2)), np.zeros(2), relu=False), y)
    small = same_outputs(graph, rng)
    assert [n.shape for n in small.nodes if n.op == "dot"] == [(1, 1, 3), (1, 1, 2)]


def test_outputs_may_be_constant_and_shared():
    nodes = []
    x = node(nodes, "input", (), (3,), k=0, i=0, f=0)  # a port without bits
    y = node(nodes, "add", (x, const(nodes, [1.0, -0.5, 0.0])))
    graph = finished(nodes, x, y, y, x)
    small = same_outputs(graph, np.random.default_rng(0))
    assert small.outputs == (1, 1, 0) and [n.op for n in small.nodes] == ["input", "const"]


def test_a_product_of_two_activations_drops_terms_that_are_always_zero():
    rng, nodes = np.random.default_rng(4), []
    x = node(nodes, "input", (), (6,), k=1, i=2, f=1)
    a = node(nodes, "take", (x,), (1, 2, 4), index=np.array([[[0, 1, -1, 2], [3, 4, -1, 5]]]))
    c = node(nodes, "take", (x,), (1, 4, 2), index=np.array([[[5, 0], [1, 2], [3, 4], [-1, -1]]]))
    graph = finished(nodes, x, node(nodes, "dot", (a, c), (1, 2, 2)))
    small = same_outputs(graph, rng)
    assert [small.nodes[j].shape for n in small.nodes if n.op == "dot" for j in n.inputs] == [(1, 2, 2), (1, 2, 2)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), modes=st.sampled_from(MODES))
def test_random_graphs_keep_every_integer(kind, seed, modes):
    rng = np.random.default_rng(seed)
    small = same_outputs(random_graph(rng, kind, modes), rng, 100)
    same_outputs(small, rng, 20)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.0, 0.3, 0.7, 1.0]), p=st.integers(1, 3))
def test_random_dead_neurons_keep_every_integer(seed, fraction, p):
    rng = np.random.default_rng(seed)
    out, into = (np.flatnonzero(rng.random(8) < fraction) for _ in range(2))
    graph = network(rng, out, into, p)
    small = same_outputs(graph, rng, 100)
    assert channels(graph) - channels(small) >= len({*out, *into})


def test_random_netlists_keep_every_integer():
    rng = np.random.default_rng(5)
    for kind in KINDS:
        nodes = []
        x = port(nodes, (5,), rng)
        y = quantized(nodes, node(nodes, "add", (x, const(nodes, kernel(rng, (5,))))), rng, MODES[0])
        graph = finished(nodes, x, y)
        for g in (graph, random_graph(rng, kind)):
            x_all = flatten_batch(port_grid(g, 200, rng))
            np.testing.assert_array_equal(predict(to_comb(g), x_all), predict(to_comb(g, keep_dead=True), x_all))
