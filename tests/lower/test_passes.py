"""Every pass keeps every integer; what each one finds, and what it must leave alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.lower import Graph
from pquant_jax.lower.backends.da4ml import predict, to_comb
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import validate
from pquant_jax.lower.passes import fuse_biases, lint, merge_common, merge_quantizers, simplify
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from .random_graphs import KINDS, MODES, const, node, quantized, random_graph

PASSES = (merge_quantizers, fuse_biases, merge_common, simplify)
ALL_MODES = list(itertools.product(ROUNDINGS, OVERFLOWS))


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def check(graph: Graph, rng: np.random.Generator, n: int = 150) -> None:
    x = port_grid(graph, n, rng)
    want = flatten_batch(emulate(graph, x))
    for rewrite in PASSES:
        smaller = validate(rewrite(graph))
        np.testing.assert_array_equal(flatten_batch(emulate(smaller, x)), want, err_msg=rewrite.__name__)
        assert len(smaller.nodes) <= len(graph.nodes) + (rewrite is fuse_biases)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), modes=st.sampled_from(ALL_MODES))
def test_random_graphs_keep_every_integer(seed, kind, modes):
    rng = np.random.default_rng(seed)
    check(random_graph(rng, kind, modes), rng)


def quantizers(*forms: tuple, port: tuple[int, int, int] = (1, 3, 3)) -> Graph:
    """A port of one element and quantizers (k, i, f, rounding, overflow) one after the other."""
    nodes = []
    x = last = node(nodes, "input", (), (1,), **dict(zip("kif", port, strict=True)))
    for k, i, f, rounding, overflow in forms:
        at = {key: np.array([v]) for key, v in zip("kif", (k, i, f), strict=True)}
        last = node(nodes, "quantize", (last,), rounding=rounding, overflow=overflow, **at)
    return validate(Graph(tuple(nodes), (x,), (last,)))


def every_code(graph: Graph) -> list[np.ndarray]:
    at = graph.nodes[0].attrs
    return [np.ldexp(np.arange(-at["k"] * 2.0 ** (at["i"] + at["f"]), 2.0 ** (at["i"] + at["f"])), -at["f"])[:, None]]


@settings(max_examples=400, deadline=None)
@given(
    forms=st.lists(
        st.tuples(
            st.integers(0, 1),
            st.integers(-1, 4),
            st.integers(-1, 4),
            st.sampled_from(["TRN", "TRN", "RND", "RND_CONV", "TRN_ZERO"]),
            st.sampled_from(["WRAP", "WRAP", "SAT", "SAT_SYM", "WRAP_SM"]),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_quantizers_in_a_row_on_every_code(forms):
    graph = quantizers(*forms)
    x = every_code(graph)
    np.testing.assert_array_equal(emulate(merge_quantizers(graph), x)[0], emulate(graph, x)[0])
    np.testing.assert_array_equal(emulate(simplify(graph), x)[0], emulate(graph, x)[0])


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ((1, 3, 3, "RND", "SAT"), (1, 1, 2, "RND", "SAT"), 1),  # the first one does nothing
        ((1, 1, 2, "RND", "SAT"), (1, 2, 2, "TRN", "WRAP"), 1),  # the second one does nothing
        ((1, 4, 1, "RND_CONV", "SAT"), (1, 1, 1, "RND", "WRAP"), 1),  # only rounds, then only overflows
        ((1, 2, 1, "RND", "SAT"), (0, 1, 1, "RND", "SAT"), 1),  # one clip inside of another
        ((1, 2, 1, "RND", "WRAP"), (1, 0, 1, "RND", "WRAP"), 1),
        ((1, 2, 2, "TRN", "WRAP"), (1, 0, 1, "TRN", "WRAP"), 1),  # a slice of bits of a slice of bits
        ((1, 4, 1, "TRN", "SAT"), (1, 1, 0, "TRN", "SAT_SYM"), 1),  # floor of floor
        ((1, 4, 1, "RND", "SAT"), (1, 4, 0, "RND", "SAT"), 2),  # rounded twice: 0.375 -> 0.5 -> 1
        ((1, 0, 2, "TRN", "WRAP"), (1, -1, 2, "TRN", "SAT"), 2),  # wraps, then saturates
        ((1, 1, 2, "TRN", "SAT"), (1, 1, 1, "TRN", "WRAP"), 2),  # saturates off the second grid
        ((0, 1, 2, "TRN", "WRAP"), (1, 2, 2, "TRN", "WRAP"), 1),  # the second one holds all of the first
        ((1, 0, 0, "RND", "SAT"), (0, -1, 1, "RND", "SAT"), 1),  # without bits: a constant
    ],
)
def test_which_quantizers_are_merged(first, second, left):
    graph = quantizers(first, second)
    smaller, x = simplify(graph), every_code(graph)
    assert ops(smaller).count("quantize") == left
    np.testing.assert_array_equal(emulate(smaller, x)[0], emulate(graph, x)[0])


def test_a_first_quantizer_that_others_read_stays():
    graph = quantizers((1, 2, 1, "RND", "SAT"), (0, 1, 1, "RND", "SAT"))
    assert ops(simplify(graph)).count("quantize") == 1
    assert ops(simplify(graph._replace(outputs=(1, 2)))).count("quantize") == 2


def test_formats_are_judged_per_element():
    nodes = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    modes = {"rounding": "RND", "overflow": "SAT"}
    first = node(nodes, "quantize", (x,), k=np.array([1, 1]), i=np.array([2, 2]), f=np.array([2, 1]), **modes)
    for f, left in ((np.array([2, 1]), 1), (np.array([2, 0]), 2)):
        both = [*nodes]
        second = node(both, "quantize", (first,), k=np.array([1, 1]), i=np.array([1, 1]), f=f, **modes)
        assert ops(simplify(validate(Graph(tuple(both), (x,), (second,))))).count("quantize") == left


@pytest.mark.parametrize(
    ("second", "left", "want"),
    [([0.5, -1.0], 1, [2.0, -3.0]), ([2.0**-22, 0.0], 1, [1.5 + 2.0**-22, -2.0]), ([2.0**-24, 0.0], 2, None)],
)
def test_biases_are_added_once(second, left, want):
    """1.5 + 2^-24 has 25 bits, which no float32 holds."""
    nodes = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    y = node(nodes, "sub", (x, const(nodes, [-1.5, 2.0])))
    y = node(nodes, "add", (const(nodes, second), y))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    smaller, values = simplify(graph), port_grid(graph, 20, np.random.default_rng(0))
    assert ops(smaller).count("add") + ops(smaller).count("sub") == left
    if want:
        assert next(n for n in smaller.nodes if n.op == "const").attrs["value"].tolist() == want
    np.testing.assert_array_equal(emulate(smaller, values)[0], emulate(graph, values)[0])


def test_a_constant_minus_a_value_is_no_bias():
    nodes = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    y = node(nodes, "add", (node(nodes, "sub", (const(nodes, [1.0, 2.0]), x)), const(nodes, [0.5, 0.5])))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    check(graph, np.random.default_rng(0))
    assert ops(simplify(graph)).count("add") == 1


def test_what_is_there_twice_is_there_once():
    nodes = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    u = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    a, b = node(nodes, "add", (x, u), name="a"), node(nodes, "add", (u, x), name="b")
    c, d = node(nodes, "sub", (x, u)), node(nodes, "sub", (u, x))
    graph = validate(Graph(tuple(nodes), (x, u), (a, b, c, d)))
    smaller = simplify(graph)
    assert smaller.outputs[0] == smaller.outputs[1] and smaller.outputs[2] != smaller.outputs[3]
    check(graph, np.random.default_rng(0))
    values = flatten_batch(port_grid(graph, 100, np.random.default_rng(1)))
    whole, less = to_comb(graph, keep_dead=True), to_comb(graph)
    np.testing.assert_array_equal(predict(whole, values), predict(less, values))
    assert less.cost < whole.cost


def test_netlists_are_never_larger():
    rng = np.random.default_rng(3)
    for kind in KINDS:
        graph = random_graph(rng, kind, MODES[1])
        assert to_comb(simplify(graph), keep_dead=True).cost <= to_comb(graph, keep_dead=True).cost


def test_lint_finds_wide_constants_that_meet_data():
    nodes, rng = [], np.random.default_rng(0)
    x = node(nodes, "input", (), (1, 1, 2), k=1, i=2, f=2)
    w = const(nodes, [[[0.5, 257 / 256], [1.0, 3.0]]])
    y = node(nodes, "dot", (x, w), (1, 1, 2))
    scale = const(nodes, [[[0.125, 0.1015625]]])
    z = node(nodes, "mul", (scale, quantized(nodes, y, rng, ("RND", "SAT"), name="Dense_0/output")), name="scaled")
    absent = node(nodes, "mul", (const(nodes, [[[0.1, 0.1]]]), const(nodes, [[[3.0, 5.0]]])))
    graph = validate(Graph(tuple(nodes), (x,), (z, absent)))
    assert [(v.node, v.element, v.value, v.bits) for v in lint(graph)] == [(y, (0, 0, 1), 257 / 256, 9)]
    assert lint(graph)[0].label == "%2 dot"
    assert [(v.node, v.bits) for v in lint(graph, bits=3)] == [(y, 9), (z, 4)]


def test_lint_of_a_kernel_on_the_left_and_without_data():
    nodes = []
    x = node(nodes, "input", (), (1, 2, 1), k=1, i=2, f=2)
    some = node(nodes, "take", (x,), (1, 2, 1), index=np.array([[[0], [-1]]]))
    y = node(nodes, "dot", (const(nodes, [[[257.0, 259.0], [1.0, 2.0]]]), some), (1, 2, 1))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    assert [v.element for v in lint(graph)] == [(0, 0, 0)]  # 259 meets only the padding zero
