"""alkaid netlists and RTL against the emulator, and what is refused; what both backends must do is in test_rtl.py."""

from __future__ import annotations

import shutil
import subprocess
from functools import partial

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower import sim
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.backends.alkaid import check_supported, predict, to_comb, write_rtl
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from . import netlists
from .netlists import model
from .random_graphs import KINDS, const, node, random_graph

PAIRS = [(r, o) for r in ROUNDINGS for o in OVERFLOWS]
compare = partial(netlists.compare, alkaid, n=200)
needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


@pytest.mark.parametrize("modes", PAIRS, ids="-".join)
def test_netlist_equals_emulator_in_every_mode(modes):
    rng = np.random.default_rng([1, PAIRS.index(modes)])
    for kind in KINDS:
        compare(random_graph(rng, kind, modes), rng)


def a_bit_of_a_shifted_value() -> Graph:
    """RND_CONV reads the bit of weight 8 of 4x, where 8 is the weight of the top bit of x: `fuzz_graphs.py`, seed 0, graph 7."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    y = node(nodes, "mul", (x, const(nodes, [4.0])))
    at = {key: np.array([v]) for key, v in (("k", 1), ("i", 6), ("f", -3))}
    q = node(nodes, "quantize", (y,), rounding="RND_CONV", overflow="SAT_SYM", **at)
    return validate(Graph(tuple(nodes), (x,), (q,)))


def a_negated_bit_that_is_constant() -> Graph:
    """x * x >= x * x, the products computed apart: graph 961."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=0, i=3, f=3)
    row, column = (node(nodes, "take", (x,), shape, index=np.zeros(shape, np.int64)) for shape in ((1, 1, 1), (1, 1, 2)))
    products = node(nodes, "dot", (row, column), (1, 1, 2))
    first, second = (node(nodes, "take", (products,), (1,), index=np.array([j])) for j in (0, 1))
    same = node(nodes, "ge", (first, second))
    return validate(Graph(tuple(nodes), (x,), (same,)))


@pytest.mark.parametrize("graph", [a_bit_of_a_shifted_value(), a_negated_bit_that_is_constant()], ids=["bit", "constant"])
def test_passes_of_alkaid_that_are_left_out_are_wrong(graph):
    """If this fails alkaid has been repaired, and `alkaid.optimized` can be its own."""
    from alkaid.trace.passes import optimize

    rng = np.random.default_rng(3)
    compare(graph, rng)
    x = port_grid(graph, 200, rng)
    known = check_supported(graph)
    raw = alkaid.trace_exactly(*alkaid.netlist.ports_and_outputs(graph, known, alkaid.circuit((1, 1, -1), None)))
    np.testing.assert_array_equal(predict(raw, flatten_batch(x)), flatten_batch(emulate(graph, x)))
    theirs = predict(optimize(raw), flatten_batch(x))
    assert (theirs != flatten_batch(emulate(graph, x))).any()


def wide_sum(bias: float, rounding: str, overflow: str = "WRAP", f: int = -5) -> Graph:
    """x * y + bias, x of 16 and y of 12 fractional bits, rounded to 2^5: constants of more than 24 bits in all."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=5, f=14)
    a, b = (node(nodes, "take", (x,), (1,), index=np.array([j])) for j in (0, 1))
    y = node(nodes, "add", (node(nodes, "mul", (a, b)), const(nodes, [bias])))
    at = {key: np.array([v]) for key, v in (("k", 1), ("i", 8), ("f", f))}
    q = node(nodes, "quantize", (y,), rounding=rounding, overflow=overflow, **at)
    return validate(Graph(tuple(nodes), (x,), (q,)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_constants_of_more_than_24_bits_are_added_in_parts_or_refused(rounding, overflow):
    graph = wide_sum(100.25, rounding, overflow)
    if rounding in ("RND_CONV", "RND_MIN_INF", "RND_ZERO"):  # half a step less one step of the sum: 32 bits in one constant
        with pytest.raises(LoweringError, match="alkaid would round a constant near .*stores 24 significant bits"):
            to_comb(graph)
    graph = wide_sum(100.25, rounding, overflow, f=3)  # 24 bits, and more with the bias
    compare(graph, np.random.default_rng(4))


def test_tables_and_kernels_over_24_bits_are_refused():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=0, i=2, f=0)
    at = {"k": np.zeros(1, int), "i": np.full(1, 2), "f": np.zeros(1, int)}
    codes = np.array([[0, 1, 2**25 + 1, 3]])
    y = node(nodes, "table", (x,), codes=codes, which=np.zeros(1, int), f_out=np.zeros(1, int), **at)
    with pytest.raises(LoweringError, match="%1 table: its entries have up to 26 significant bits, alkaid takes 24"):
        to_comb(Graph(tuple(nodes), (x,), (y,)))
    nodes = []
    x = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    y = node(nodes, "mul", (x, const(nodes, [(2.0**24 + 1) / 2**20])))
    with pytest.raises(LoweringError, match="has 25 significant and 20 fractional bits, alkaid takes 24 and 31"):
        to_comb(validate(Graph(tuple(nodes), (x,), (y,))))


def test_factors_of_more_than_24_bits_are_refused():
    """x * 4097 * 4097 is one factor for alkaid, of 25 bits, whose step it would misread."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    y = node(nodes, "mul", (node(nodes, "mul", (x, const(nodes, [4097.0]))), const(nodes, [4097.0])))
    with pytest.raises(LoweringError, match="would misread the step of . sums.*put a quantizer between the products"):
        to_comb(validate(Graph(tuple(nodes), (x,), (y,))))


def test_more_than_32_bits_are_exact():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=12, f=13)
    a, b = (node(nodes, "take", (x,), (1,), index=np.array([j])) for j in (0, 1))
    products = node(nodes, "mul", (a, b))
    size = node(nodes, "abs", (products,))
    compare(validate(Graph(tuple(nodes), (x,), (products, size, x))), np.random.default_rng(5))


@needs_simulator
def test_verilog_equals_the_emulator_combinational_and_pipelined(tmp_path):
    rng = np.random.default_rng(12)
    graph = model(rng)
    comb, x = to_comb(graph), port_grid(graph, 400, rng)
    for name, cutoff in (("comb", -1), ("piped", 2), ("whole", 1000)):
        rtl = write_rtl(comb, tmp_path / name, name="net", latency_cutoff=cutoff)
        found = sim.simulate(rtl, flatten_batch(x), work=tmp_path / "sim")
        np.testing.assert_array_equal(found, flatten_batch(emulate(graph, x)))


def test_both_packages_give_the_same_integers():
    rng = np.random.default_rng(15)
    graph = random_graph(rng, "mixed", ("RND_CONV", "SAT"))
    x = flatten_batch(port_grid(graph, 300, rng))
    np.testing.assert_array_equal(predict(to_comb(graph), x), da4ml.predict(da4ml.to_comb(graph), x))


BENCH = """library ieee; use ieee.std_logic_1164.all;
entity bench is end entity;
architecture test of bench is
    type vectors is array (0 to {last}) of std_logic_vector({inputs} downto 0);
    type answers is array (0 to {last}) of std_logic_vector({outputs} downto 0);
    constant x: vectors := ({x}); constant y: answers := ({y});
    signal clk: std_logic := '0';
    signal inp: std_logic_vector({inputs} downto 0); signal outp: std_logic_vector({outputs} downto 0);
begin
    dut: entity work.net port map ({clock}model_inp => inp, model_out => outp);
    process begin
        for j in 0 to {last} + {latency} loop
            if j <= {last} then inp <= x(j); end if;
            clk <= '0'; wait for 1 ns;
            if j >= {latency} then assert outp = y(j - {latency}) report "vector " & integer'image(j) severity failure; end if;
            clk <= '1'; wait for 1 ns;
        end loop;
        report "passed"; wait;
    end process;
end architecture;
"""


@pytest.mark.skipif(shutil.which("ghdl") is None, reason="no GHDL: apt install ghdl")
@pytest.mark.parametrize("cutoff", [-1, 2])
@pytest.mark.parametrize("flipped", [False, True])
def test_vhdl_equals_the_emulator_in_ghdl(cutoff, flipped, tmp_path):
    rng = np.random.default_rng(16)
    graph = model(rng)
    rtl = write_rtl(to_comb(graph), tmp_path / "rtl", name="net", flavor="vhdl", latency_cutoff=cutoff)
    x = port_grid(graph, 60, rng)
    expected = [v.copy() for v in emulate(graph, x)]
    if flipped:
        expected[0][30, 2] += np.ldexp(1.0, -int(rtl.out_kifs[2, 2]))

    def bits(values: np.ndarray, kifs: np.ndarray) -> tuple[int, str]:
        rows = np.unpackbits(sim.pack_bits(values, kifs), axis=1, bitorder="little")[:, : int(kifs.sum())]
        return rows.shape[1] - 1, ", ".join('"' + "".join(map(str, row[::-1])) + '"' for row in rows)

    (inputs, a), (outputs, b) = bits(flatten_batch(x), rtl.inp_kifs), bits(flatten_batch(expected), rtl.out_kifs)
    clock = "clk => clk, " if rtl.stages else ""
    text = BENCH.format(last=59, inputs=inputs, outputs=outputs, x=a, y=b, clock=clock, latency=rtl.latency_cycles)
    (tmp_path / "bench.vhd").write_text(text)
    sources = [*(rtl.src / "static").glob("*.vhd"), *(p for p in rtl.src.glob("*.vhd") if "wrapper" not in p.name)]
    for command in (["-i", *map(str, sources), "bench.vhd"], ["-m", "bench"]):
        subprocess.run(["ghdl", command[0], "--std=08", *command[1:]], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    done = subprocess.run(["ghdl", "-r", "--std=08", "bench"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert (done.returncode == 0 and "passed" in said) if not flipped else (done.returncode != 0 and "vector" in said)
