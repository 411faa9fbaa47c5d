"""Which quantizers can overflow: none that does is missed, and a graph that passes the proof never overflows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._errors import LoweringError
from pquant_jax.lower import Graph, Node
from pquant_jax.lower.emulate import port_grid, port_value, trace_values
from pquant_jax.lower.ir import validate
from pquant_jax.lower.overflow import overflows, prove_no_overflow
from pquant_jax.lower.ranges import intervals
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS, quantize

from .random_graphs import KINDS, const, node, random_graph

ALL_MODES = list(itertools.product(ROUNDINGS, OVERFLOWS))


def happened(graph: Graph, inputs: list[np.ndarray]) -> dict[int, np.ndarray]:
    """Per quantizer and port the elements at which some vector gets another value than with 40 integer bits."""
    values, out = trace_values(graph, inputs), {}
    ports = dict(zip(graph.inputs, inputs, strict=True))
    for index, n in enumerate(graph.nodes):
        if n.op in ("quantize", "input"):
            k, i, f = (np.broadcast_to(n.attrs[key], n.shape) for key in "kif")
            x = ports[index] if n.op == "input" else values[n.inputs[0]]
            wide = quantize(x, 1, 40, f, rounding=str(n.attrs.get("rounding", "TRN")), overflow="WRAP")
            out[index] = ((wide != values[index]) & (k + i + f > 0)).any(0)
    return out


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), modes=st.sampled_from(ALL_MODES))
def test_what_overflows_was_named(seed, kind, modes):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, kind, modes)
    named, seen = overflows(graph), happened(graph, port_grid(graph, 200, rng))
    assert set(named) == set(seen)
    for index, elements in seen.items():
        assert not (elements & ~named[index]).any()
    if any(v.any() for v in seen.values()):
        with pytest.raises(LoweringError, match="would change it"):
            prove_no_overflow(graph)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), modes=st.sampled_from(ALL_MODES), size=st.floats(0.01, 2.0))
def test_what_overflows_within_the_observed_ranges_was_named(seed, kind, modes, size):
    """Ranges that are narrower than the port, off its grid, and wider; the data reaches their ends."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, kind, modes)
    ranges, inputs = [], []
    for j in graph.inputs:
        n = graph.nodes[j]
        ends = np.sort(rng.uniform(-1.0, 1.0, (2, *n.shape)) * size * 2.0 ** n.attrs["i"], axis=0)
        ranges.append((ends[0], ends[1]))
        inputs.append(np.concatenate([ends, rng.uniform(ends[0], ends[1], (150, *n.shape))]))
    named, seen = overflows(graph, ranges), happened(graph, inputs)
    for index, elements in seen.items():
        assert not (elements & ~named[index]).any()
    for value, (low, high, _) in zip(trace_values(graph, inputs), intervals(graph, ranges), strict=True):
        assert (value >= low).all() and (value <= high).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS))
def test_a_graph_that_passes_never_overflows(seed, kind):
    """Quantizers are widened where they can overflow, as a user would who follows the message, until the proof holds."""
    rng = np.random.default_rng(seed)
    graph = random_graph(rng, kind, ("RND", "WRAP"))
    widened = 0
    while any(v.any() for v in overflows(graph).values()):
        index, elements = next((j, v) for j, v in overflows(graph).items() if v.any())
        n = graph.nodes[index]
        attrs = {**n.attrs, "i": n.attrs["i"] + elements, "k": np.maximum(n.attrs["k"], elements)}
        nodes = [*graph.nodes]
        nodes[index] = Node(n.op, n.inputs, n.shape, attrs, n.name)
        for j, m in enumerate(nodes):  # a table behind it is made for the wider format
            if m.op == "table" and m.inputs == (index,):
                codes = rng.integers(-8, 8, (len(m.attrs["codes"]), 2 ** int(np.max(attrs["k"] + attrs["i"] + attrs["f"]))))
                nodes[j] = Node(m.op, m.inputs, m.shape, {**m.attrs, **{key: attrs[key] for key in "kif"}, "codes": codes})
        graph, widened = validate(graph._replace(nodes=tuple(nodes))), widened + 1
        if max(int(np.max(m.attrs["i"])) for m in graph.nodes if m.op == "quantize") > 14:
            return
    prove_no_overflow(graph)
    assert not any(v.any() for v in happened(graph, port_grid(graph, 300, rng)).values())


def one(k: int, i: int, f: int, rounding: str, overflow: str, port: tuple[int, int, int] = (1, 3, 3)) -> Graph:
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), name="x", **dict(zip("kif", port, strict=True)))
    at = {key: np.array([v]) for key, v in zip("kif", (k, i, f), strict=True)}
    y = node(nodes, "quantize", (x,), name="Dense_0/input", rounding=rounding, overflow=overflow, **at)
    return validate(Graph(tuple(nodes), (x,), (y,)))


@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(0, 1), i=st.integers(-1, 5), f=st.integers(-1, 4), modes=st.sampled_from(ALL_MODES), signed=st.integers(0, 1)
)
def test_one_quantizer_overflows_exactly_where_it_is_said_to(k, i, f, modes, signed):
    """On every code of the port the answer is exact, not only safe."""
    graph = one(k, i, f, *modes, port=(signed, 3, 3))
    x = np.arange(-64 * signed, 64)[:, None] / 8
    assert overflows(graph)[1].item() == happened(graph, [x])[1].item()


@pytest.mark.parametrize(
    ("graph", "ranges", "words"),
    [
        (one(1, 2, 3, "TRN", "WRAP"), None, r"%1 quantize 'Dense_0/input': element \(0,\) can be in \[-8, 7.875\]"),
        (one(0, 3, 3, "TRN", "SAT"), None, "more integer bits and a sign"),
        (one(1, 2, 3, "RND", "SAT"), [(-4.0, 4.0)], "SAT would change it"),
        (one(1, 3, 3, "RND", "SAT"), [(-1.0, 8.0)], r"%0 input 'x': element \(0,\) can be in \[-1, 8\].*WRAP"),
        (one(1, 3, 2, "RND", "SAT"), None, "1 of 1 elements"),  # 7.875 is rounded up to 8
    ],
)  # fmt: skip
def test_the_error_names_node_element_and_ranges(graph, ranges, words):
    with pytest.raises(LoweringError, match=words):
        prove_no_overflow(graph, ranges)


def test_what_passes():
    prove_no_overflow(one(1, 2, 3, "RND", "SAT"), [(-4.0, 3.99)])  # the port truncates 3.99 to 3.875
    prove_no_overflow(one(1, 3, 2, "TRN", "WRAP"))
    prove_no_overflow(one(1, -3, 2, "RND", "SAT"))  # no bits: the site is off
    prove_no_overflow(one(1, 2, 3, "TRN", "SAT"), modes=("WRAP", "WRAP_SM"))
    with pytest.raises(LoweringError):
        prove_no_overflow(one(1, 2, 3, "TRN", "WRAP_SM"), modes=("WRAP", "WRAP_SM"))


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ([], "1 inputs, got 0 ranges"),
        ([(1.0, -1.0)], "low <= high"),
        ([(np.nan, 1.0)], "must be finite"),
        ([(np.zeros(3), 1.0)], r"must broadcast to \(1,\)"),
    ],
)
def test_ranges_that_are_none(ranges, words):
    with pytest.raises(LoweringError, match=words):
        overflows(one(1, 2, 3, "TRN", "WRAP"), ranges)


def test_a_range_that_wraps_at_the_port_has_every_code():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=0)
    y = node(nodes, "add", (x, const(nodes, [0.0, 0.0])))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    low, high, _ = intervals(graph, [(np.array([1.0, 1.0]), np.array([3.0, 5.0]))])[y]
    assert low.tolist() == [1.0, -4.0] and high.tolist() == [3.0, 3.0]
    assert port_value(nodes[x], np.array([[3.0, 5.0]])).tolist() == [[3.0, -3.0]]
