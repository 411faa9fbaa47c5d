"""The op `table` through the whole numpy side: validation, emulator, intervals, dead channels, files, netlist and RTL."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._errors import LoweringError
from pquant_jax.lower import Graph, Node, remove_dead, sim
from pquant_jax.lower.backends.da4ml import predict, to_comb, write_rtl
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid, to_codes, trace_values
from pquant_jax.lower.ir import load, save, validate
from pquant_jax.lower.ranges import intervals

from .random_graphs import const, node, quantized, random_format, table

needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


def one_table(k=1, i=1, f=1, codes=None, which=0, f_out=2, source=(1, 1, 1), **changes) -> Graph:
    """A port and one table of one element behind it; by default the table squares its codes."""
    codes = np.arange(-4, 4)[None] ** 2 if codes is None else codes
    attrs = {key: np.atleast_1d(v) for key, v in zip("kif", (k, i, f), strict=True)}
    attrs |= {"codes": codes, "which": np.array([which]), "f_out": np.array([f_out])}
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), **dict(zip("kif", source, strict=True)))
    y = node(nodes, "table", (x,), name="Dense_0/table", **{**attrs, **changes})
    return validate(Graph(tuple(nodes), (x,), (y,)))


def test_entry_zero_is_the_lowest_code():
    graph = one_table()
    x = np.arange(-4, 4)[:, None] / 2
    np.testing.assert_array_equal(emulate(graph, [x])[0], x**2)
    low, high, f = (v.item() for v in intervals(graph)[-1])
    assert (low, high, f) == (0.0, 4.0, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": np.zeros((1, 7), int)}, "input has 3 bits, so its tables need 8 entries, got 7"),
        ({"which": 1}, "which holds 1 to 1, there are 1 tables"),
        ({"which": -1}, "which holds -1"),
        ({"i": [1, 1]}, r"must have the node's shape \(1,\)"),
        ({"k": 2}, "k must be 0 or 1"),
        ({"codes": np.zeros(8, int)}, r"codes must be \(T, n\)"),
        ({"f_out": np.zeros(2, int)}, r"f_out \(T,\)"),
        ({"codes": np.full((1, 8), 2**31)}, "codes must fit 32 bits"),
        ({"codes": np.zeros((1, 8))}, "arrays of integers"),
    ],
)
def test_faulty_tables_are_refused(changes, words):
    with pytest.raises(LoweringError, match="%1 table 'Dense_0/table': .*" + words):
        one_table(**changes)


@pytest.mark.parametrize("source", [(1, 1, 2), (1, 2, 1)])
def test_an_input_off_the_format_is_refused(source):
    """Off the grid, or out of the range: by the proof for any vector, by the emulator for the vectors that do it."""
    graph = one_table(source=source)
    with pytest.raises(LoweringError, match=r"%1 table 'Dense_0/table': its input, element \(0,\).*quantizer"):
        intervals(graph)
    assert emulate(graph, [np.array([[1.5], [-2.0]])])[0].tolist() == [[2.25], [4.0]]
    with pytest.raises(LoweringError, match=r"'Dense_0/table': sample 1, element \(0,\) is .*k=1, i=1, f=1"):
        emulate(graph, [np.array([[1.5], [2.0 if source[1] == 2 else 0.25]])])


def test_only_entries_on_the_grid_of_the_input_count():
    codes = np.array([[7, 100, 3, 100, 5, 100, -1, 100]])
    graph = one_table(codes=codes, source=(1, 1, 0), f_out=0)  # every second entry is never read
    assert [v.item() for v in intervals(graph)[-1]] == [-1.0, 7.0, 0]
    graph = one_table(codes=codes * 4, source=(0, 1, 0), f_out=0)
    assert [v.item() for v in intervals(graph)[-1]] == [-4.0, 20.0, -2]


def test_a_table_of_a_constant_is_one():
    graph = one_table(codes=np.array([[5]]), k=0, i=-1, f=1, source=(0, 0, 0))
    low, high, f = (v.item() for v in intervals(graph)[-1])
    assert low == high == 1.25 and f == 2 and emulate(graph, [np.ones((2, 1))])[0].tolist() == [[1.25], [1.25]]
    assert [n.op for n in remove_dead(graph).nodes] == ["input", "const"]


def random_tables(rng: np.random.Generator, n: int = 4) -> Graph:
    """Quantizer, table, arithmetic, quantizer, table; formats, rows and modes per element."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (n,), k=int(rng.integers(0, 2)), i=3, f=3)
    modes = str(rng.choice(["TRN", "RND"])), str(rng.choice(["SAT", "WRAP", "SAT_SYM"]))
    first = table(nodes, quantized(nodes, x, rng, modes), rng)
    mixed = node(nodes, "sub", (node(nodes, "max", (first, const(nodes, np.zeros(n)))), x))
    second = table(nodes, quantized(nodes, node(nodes, "neg", (mixed,)), rng, modes), rng)
    both = node(nodes, "mul", (first, second))
    unread = table(nodes, quantized(nodes, both, rng, modes), rng)
    some = node(nodes, "take", (unread,), (2,), index=rng.integers(-1, n, 2))
    return validate(Graph(tuple(nodes), (x,), (first, some, both)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_intervals_are_exactly_what_is_read(seed):
    """All codes of a port through one quantizer and table: the bounds are reached, the grid is the coarsest."""
    rng = np.random.default_rng(seed)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=int(rng.integers(0, 2)), i=int(rng.integers(0, 3)), f=int(rng.integers(0, 3)))
    q = node(nodes, "quantize", (x,), rounding="TRN", overflow="SAT", **random_format(rng, (3,)))
    y = table(nodes, q, rng)
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    at = nodes[x].attrs
    codes = np.arange(-at["k"] * 2 ** (at["i"] + at["f"]), 2 ** (at["i"] + at["f"]))
    value = trace_values(graph, [np.repeat(np.ldexp(codes.astype(float), -at["f"])[:, None], 3, 1)])[y]
    low, high, f = intervals(graph)[y]
    read = intervals(graph)[q]
    dense = np.array([len(np.unique(v)) for v in trace_values(graph, [np.repeat(codes[:, None] / 2 ** at["f"], 3, 1)])[q].T])
    whole = (read.high - read.low) * np.ldexp(1.0, read.f) + 1 == dense  # no gap between the values that the quantizer gives
    assert (value.min(0) >= low).all() and (value.max(0) <= high).all()
    np.testing.assert_array_equal(value.min(0)[whole], low[whole])
    np.testing.assert_array_equal(value.max(0)[whole], high[whole])
    to_codes(value, f)
    finer = np.ldexp(value[:, whole], f[whole] - 1)
    coarse = (finer == np.rint(finer)).all(0)
    assert not (coarse & (value[:, whole] != 0).any(0)).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_dead_tables_go_and_the_rest_is_the_same(seed):
    rng = np.random.default_rng(seed)
    graph = random_tables(rng)
    small, x = remove_dead(graph), port_grid(graph, 200, rng)
    np.testing.assert_array_equal(flatten_batch(emulate(small, x)), flatten_batch(emulate(graph, x)))
    for n in small.nodes:
        if n.op == "table":
            assert sorted(set(np.ravel(n.attrs["which"]))) == list(range(len(n.attrs["codes"])))


def test_unread_elements_and_rows_are_dropped():
    rng, nodes = np.random.default_rng(0), []
    x = node(nodes, "input", (), (4,), k=1, i=1, f=1)
    codes = np.stack([np.arange(8), np.arange(8) ** 2, np.full(8, 3)])
    at = {key: np.ones(4, int) for key in "kif"}
    y = node(nodes, "table", (x,), codes=codes, which=np.array([0, 0, 1, 2]), f_out=np.array([0, 1, 2]), **at)
    some = node(nodes, "take", (y,), (2,), index=np.array([2, 3]))
    graph = validate(Graph(tuple(nodes), (x,), (some,)))
    small = remove_dead(graph)
    [left] = [n for n in small.nodes if n.op == "table"]
    assert left.shape == (1,) and left.attrs["codes"].tolist() == [codes[1].tolist()]  # element 3 is a constant
    values = port_grid(graph, 50, rng)
    np.testing.assert_array_equal(emulate(small, values)[0], emulate(graph, values)[0])


def test_tables_survive_save_and_load(tmp_path):
    rng = np.random.default_rng(1)
    graph = random_tables(rng)
    save(graph, tmp_path / "graph.npz")
    again, x = load(tmp_path / "graph.npz"), port_grid(graph, 100, rng)
    np.testing.assert_array_equal(flatten_batch(emulate(again, x)), flatten_batch(emulate(graph, x)))
    for ours, theirs in zip(again.nodes, graph.nodes, strict=True):
        if ours.op == "table":
            for key, value in theirs.attrs.items():
                np.testing.assert_array_equal(ours.attrs[key], value)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), keep_dead=st.booleans())
def test_netlists_of_tables_equal_the_emulator(seed, keep_dead):
    rng = np.random.default_rng(seed)
    graph = random_tables(rng)
    x = [np.concatenate([v, 3.3 * v + 0.01]) for v in port_grid(graph, 200, rng)]
    got = predict(to_comb(graph, keep_dead=keep_dead), flatten_batch(x))
    np.testing.assert_array_equal(got, flatten_batch(emulate(graph, x)))


def test_a_wrong_entry_is_seen():
    """The comparison can fail: one code of one table changed by one."""
    graph = one_table()
    codes = np.arange(-4, 4)[None] ** 2
    codes[0, 5] += 1
    x = np.arange(-4, 4)[:, None] / 2
    wrong = predict(to_comb(one_table(codes=codes)), x) != emulate(graph, [x])[0]
    assert wrong.ravel().tolist() == [False] * 5 + [True] + [False] * 2


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize("latency_cutoff", [-1, 3])
def test_rtl_of_tables_equals_the_emulator(latency_cutoff, tmp_path):
    rng = np.random.default_rng(2)
    graph = random_tables(rng, 6)
    rtl = write_rtl(to_comb(graph), tmp_path / "net", name="net", latency_cutoff=latency_cutoff)
    assert (rtl.stages > 1) == (latency_cutoff > 0) and list((rtl.src / "memfiles").glob("*.mem"))
    x = [np.concatenate([v, 5.1 * v + 0.003]) for v in port_grid(graph, 500, rng)]
    want = flatten_batch(emulate(graph, x))
    np.testing.assert_array_equal(sim.simulate(rtl, flatten_batch(x)), want)
    assert (want != want[0]).any(0).mean() > 0.5
