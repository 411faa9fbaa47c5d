"""alkaid netlists against the emulator on random graphs, what is refused, and the files that are written."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower import sim
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.backends.alkaid import check_supported, predict, to_comb, write_rtl
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from .random_graphs import KINDS, const, dense, node, port, quantized, random_graph

PAIRS = [(r, o) for r in ROUNDINGS for o in OVERFLOWS]
needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


def compare(graph: Graph, rng: np.random.Generator, n: int = 200) -> None:
    """Emulator and alkaid's interpreter on all codes of the ports, and on reals that are off the grid and outside."""
    comb = to_comb(graph)
    for x in (port_grid(graph, n, rng), [3.3 * v + 0.01 for v in port_grid(graph, n, rng)]):
        np.testing.assert_array_equal(predict(comb, flatten_batch(x)), flatten_batch(emulate(graph, x)))


@pytest.mark.parametrize("modes", PAIRS, ids="-".join)
def test_netlist_equals_emulator_in_every_mode(modes):
    rng = np.random.default_rng([1, PAIRS.index(modes)])
    for kind in KINDS:
        compare(random_graph(rng, kind, modes), rng)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_one_quantizer_on_every_code(rounding, overflow):
    """Signed and unsigned, negated or not, every small format, zero width and negative i and f included."""
    forms = [(k, i, f) for k in (0, 1) for i in range(-2, 4) for f in range(-2, 4)]
    k, i, f = (np.array(v, np.int64) for v in zip(*forms, strict=True))
    for source in ((0, 1, 2), (1, -1, 3)):
        nodes: list[Node] = []
        x = node(nodes, "input", (), (1,), k=source[0], i=source[1], f=source[2])
        wide = node(nodes, "take", (x,), (len(forms),), index=np.zeros(len(forms), np.int64))
        signs = (wide, node(nodes, "neg", (wide,)))
        at = {"k": k, "i": i, "f": f, "rounding": rounding, "overflow": overflow}
        outputs = tuple(node(nodes, "quantize", (s,), **at) for s in signs)
        graph = validate(Graph(tuple(nodes), (x,), outputs))
        codes = np.arange(-source[0] * 2 ** (source[1] + source[2]), 2 ** (source[1] + source[2]))
        values = np.ldexp(codes.astype(float), -source[2])[:, None]
        np.testing.assert_array_equal(predict(to_comb(graph), values), flatten_batch(emulate(graph, [values])))


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


def test_constants_unused_inputs_and_missing_bits(tmp_path):
    rng = np.random.default_rng(8)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=2, f=2)
    nothing = node(nodes, "input", (), (2,), k=1, i=-2, f=1)  # a port without bits
    first = node(nodes, "take", (x,), (2,), index=np.array([0, -1]))  # elements 1 and 2 of x are never used
    absent = node(nodes, "add", (nothing, const(nodes, [-1.5, 2.0])))
    size = node(nodes, "abs", (absent,))
    constant = const(nodes, [[-0.75, 0.0]])
    graph = validate(Graph(tuple(nodes), (x, nothing), (first, absent, size, constant)))
    compare(graph, rng)
    compare(graph._replace(outputs=(constant,)), rng)
    compare(graph._replace(outputs=(nothing, size)), rng)
    info = write_rtl(to_comb(graph), tmp_path / "net", name="net")
    assert info.inp_kifs.sum(0).tolist() == [5, 0, 0, 0, 0]


def model(rng: np.random.Generator) -> Graph:
    """A dense layer with a residual connection and a table."""
    nodes: list[Node] = []
    x = port(nodes, (6,), rng)
    a = quantized(nodes, x, rng, ("RND", "SAT"))
    b = dense(nodes, a, 6, rng, ("RND", "SAT"))
    at = {"k": np.ones(6, int), "i": np.full(6, 2), "f": np.full(6, 3)}
    q = node(nodes, "quantize", (node(nodes, "add", (a, b)),), rounding="TRN", overflow="WRAP", **at)
    codes = rng.integers(-40, 40, (1, 64))
    y = node(nodes, "table", (q,), codes=codes, which=np.zeros(6, int), f_out=np.full(1, 3), **at)
    return validate(Graph(tuple(nodes), (x,), (y, b)))


@pytest.mark.parametrize("flavor", ["verilog", "vhdl"])
def test_written_project(flavor, tmp_path):
    comb = to_comb(model(np.random.default_rng(11)))
    suffix = {"verilog": ".v", "vhdl": ".vhd"}[flavor]
    flat = write_rtl(comb, tmp_path / "a" / "flat", name="net", flavor=flavor)
    assert (flat.stages, flat.latency_cycles, flat.reg_bits) == (0, 0, 0)
    assert not any("clk" in line for line in (flat.src / f"net{suffix}").read_text().splitlines())
    piped = write_rtl(comb, tmp_path / "a" / "piped", name="net", flavor=flavor, latency_cutoff=2)
    assert piped.stages == len(list(piped.src.glob(f"logic*{suffix}"))) > 1
    assert piped.latency_cycles == piped.stages + 1 and piped.ii == 1 and piped.reg_bits > 0
    assert (piped.src / f"net_tables{suffix}").exists()
    one = write_rtl(comb, tmp_path / "a" / "one", name="net", flavor=flavor, latency_cutoff=1000)
    assert (one.stages, one.latency_cycles) == (1, 2)
    for info in (flat, piped, one):
        assert info.directory.is_absolute() and info.src.is_dir() and info.flavor == flavor
        assert info.inp_kifs.shape == (3, 6) and info.out_kifs.shape == (3, 12)
        assert info.cost > 0 and info.latency_units == max(comb.latency)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["flat", "one", "piped"]


@needs_simulator
def test_verilog_equals_the_emulator_combinational_and_pipelined(tmp_path):
    rng = np.random.default_rng(12)
    graph = model(rng)
    comb, x = to_comb(graph), port_grid(graph, 400, rng)
    for name, cutoff in (("comb", -1), ("piped", 2), ("whole", 1000)):
        rtl = write_rtl(comb, tmp_path / name, name="net", latency_cutoff=cutoff)
        found = sim.simulate(rtl, flatten_batch(x), work=tmp_path / "sim")
        np.testing.assert_array_equal(found, flatten_batch(emulate(graph, x)))


def test_existing_project_is_kept_unless_told(tmp_path):
    comb = to_comb(model(np.random.default_rng(12)))
    target = tmp_path / "net"
    write_rtl(comb, target, name="net")
    (target / "mine.txt").write_text("precious")
    with pytest.raises(LoweringError, match="exists; pass overwrite=True"):
        write_rtl(comb, target, name="net")
    assert (target / "mine.txt").exists()
    write_rtl(comb, target, name="other", overwrite=True)
    assert (target / "src" / "other.v").exists() and [p.name for p in tmp_path.iterdir()] == ["net"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "9net"}, "name is '9net'"),
        ({"name": "ternary_adder"}, "none of binop"),
        ({"name": "logic12"}, "alkaid names modules beside it so"),
        ({"name": "net", "flavor": "verilo"}, "did you mean 'verilog'"),
    ],
)
def test_bad_names_and_flavors(options, words, tmp_path):
    with pytest.raises(LoweringError, match=words):
        write_rtl(to_comb(model(np.random.default_rng(13))), tmp_path / "net", **options)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    import alkaid.codegen

    def fail(self, *args, **kwargs):
        raise AssertionError("unexpected shift")

    monkeypatch.setattr(alkaid.codegen.RTLModel, "write", fail)
    with pytest.raises(LoweringError, match=r"alkaid failed while writing RTL \(AssertionError: unexpected shift\)"):
        write_rtl(to_comb(model(np.random.default_rng(13))), tmp_path / "net", name="net")
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_of_values_is_an_error():
    with pytest.raises(LoweringError, match="has 6 input values per sample, got 5"):
        predict(to_comb(model(np.random.default_rng(14))), np.zeros((3, 5)))


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
