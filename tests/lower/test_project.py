"""The written project: its files, its vectors and its testbenches under GHDL and Verilator."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pquant_jax._errors import DataError, LoweringError, ToolError, VerifyError
from pquant_jax.lower import ir, sim, synth
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.project import ProjectInfo, missing_tools, quoted, run_testbench, write_project

from .random_graphs import KINDS, MODES, const, dense, node, random_graph, table

VECTORS = 60
needs_verilog = pytest.mark.skipif(bool(missing_tools("verilog")), reason="; ".join(missing_tools("verilog")))
needs_vhdl = pytest.mark.skipif(bool(missing_tools("vhdl")), reason="; ".join(missing_tools("vhdl")))
needs_make = pytest.mark.skipif(not (shutil.which("make") and shutil.which("sha256sum")), reason="no make or sha256sum")


def network() -> ir.Graph:
    """Two inputs, one with a name for no identifier, dense layers, tables, and an output that is constant."""
    rng = np.random.default_rng(5)
    nodes: list[ir.Node] = []
    x = node(nodes, "input", (), (4,), k=1, i=3, f=3, name="x")
    u = node(nodes, "input", (), (1, 2), k=0, i=2, f=4, name="the u*/")
    hidden = dense(nodes, node(nodes, "concat", (x, u), (6,)), 5, rng, ("RND", "SAT"))
    y = dense(nodes, hidden, 3, rng, ("RND", "WRAP"), relu=False)
    form = {"k": np.ones(4, np.int64), "i": np.full(4, 2), "f": np.full(4, 1)}
    z = table(nodes, node(nodes, "quantize", (x,), rounding="TRN", overflow="SAT", **form), rng)
    out = node(nodes, "concat", (y, z, const(nodes, [0.0])), (8,))
    return ir.validate(ir.Graph(tuple(nodes), (x, u), (out, hidden)))


@pytest.fixture(scope="module")
def graph() -> ir.Graph:
    return network()


@pytest.fixture(scope="module")
def vectors(graph) -> list[np.ndarray]:
    """Off the grid and outside of the ports too."""
    return [1.7 * v + 0.01 for v in port_grid(graph, VECTORS, np.random.default_rng(1))]


@pytest.fixture(scope="module")
def project(graph, vectors, tmp_path_factory) -> ProjectInfo:
    origin = {"run": "a name", "mismatches": {"emulator": 0, "da4ml": 0, "rtl_comb": None}, "vectors": 12_000}
    folder = tmp_path_factory.mktemp("written") / "project"
    comb = da4ml.to_comb(graph)
    return write_project(graph, comb, folder, name="net", latency_cutoff=2, vectors=vectors, origin=origin)


@pytest.fixture(scope="module")
def comb_project(graph, vectors, tmp_path_factory) -> ProjectInfo:
    folder = tmp_path_factory.mktemp("written") / "project"
    return write_project(graph, da4ml.to_comb(graph), folder, name="net", vectors=vectors, clock_period=8)


@pytest.fixture(scope="module")
def simulated(project, tmp_path_factory):
    """The result of the SystemVerilog testbench, and the folder in which its program lies."""
    work = tmp_path_factory.mktemp("simulated")
    return run_testbench(project, "verilog", work=work), work / "net-verilog" / "build" / "verilog"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "hardware_project.py"
    spec = importlib.util.spec_from_file_location("hardware_project", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vectors_are_the_integers_of_the_emulator(project, graph, vectors):
    """Decoded here from `metadata.json` alone."""
    about = json.loads((project.directory / "metadata.json").read_text())
    expected = {"model_out": emulate(graph, vectors), "model_inp": [np.floor(np.ldexp(v, 6)) / 64 for v in vectors]}
    for port, file in (("model_inp", "inputs"), ("model_out", "outputs")):
        want = flatten_batch(expected[port])
        rows = [int(line, 16) for line in (project.directory / "vectors" / f"{file}.hex").read_text().split()]
        elements = about[port]["elements"]
        assert len(rows) == VECTORS and len(elements) == want.shape[1]
        assert sum(e["width"] for e in elements) == about[port]["bits"]
        alive = 0
        for j, e in enumerate(elements):
            codes = [(row >> e["offset"]) & ((1 << e["width"]) - 1) for row in rows]
            if e["signed"] and e["width"]:
                codes = [c - (c >> (e["width"] - 1) << e["width"]) for c in codes]
            exact = np.floor(np.ldexp(want[:, j], e["f"])).astype(np.int64) if e["width"] else np.zeros(VECTORS, np.int64)
            if port == "model_inp" and e["width"]:  # what does not fit the port wraps
                exact = (exact + (e["signed"] << (e["width"] - 1))) % (1 << e["width"]) - (e["signed"] << (e["width"] - 1))
            np.testing.assert_array_equal(codes, exact, err_msg=e["name"])
            alive += len(set(codes)) > 1
        assert alive > len(elements) / 2
    assert [e["name"] for e in about["model_inp"]["elements"]][3:] == ["x[3]", "the_u_/[0,0]", "the_u_/[0,1]"]
    assert min(e["width"] for e in about["model_out"]["elements"]) == 0
    assert about["origin"]["run"] == "a name" and about["latency_cycles"] == project.rtl["vhdl"].latency_cycles > 2


@needs_vhdl
@pytest.mark.parametrize("which", ["project", "comb_project"])
def test_vhdl_testbench_passes_without_a_remark(which, request):
    result = run_testbench(request.getfixturevalue(which), "vhdl")
    assert result.passed and result.vectors == VECTORS and result.mismatches == () == result.warnings


@needs_verilog
def test_verilog_testbench_passes_without_a_remark(simulated):
    result, folder = simulated
    assert result.passed and result.vectors == VECTORS and result.mismatches == () == result.warnings
    assert "PASS 60 vectors" in (folder / "simulation.log").read_text().splitlines()


@needs_verilog
@pytest.mark.slow
def test_verilog_testbench_without_a_clock(comb_project):
    result = run_testbench(comb_project.directory, "verilog")
    assert result.passed and result.mismatches == () == result.warnings


@needs_vhdl
@pytest.mark.parametrize("kind", KINDS)
def test_vhdl_of_random_graphs(kind, tmp_path):
    """Every operator of the VHDL, as `test_random_rtl_equals_emulator` does for Verilog."""
    number = KINDS.index(kind)
    graph = random_graph(np.random.default_rng(100 + number), kind, MODES[number % len(MODES)])
    comb = da4ml.to_comb(graph)
    for cutoff in (-1, 2):
        made = write_project(
            graph, comb, tmp_path / "p", name="net", flavors=("vhdl",), latency_cutoff=cutoff, vectors=100, overwrite=True
        )
        result = run_testbench(made, "vhdl")
        assert result.passed and not result.mismatches


def wrong_line(project: ProjectInfo, row: int) -> tuple[str, str, str]:
    """A line of outputs.hex, the same with the lowest bit of its third element inverted, and what must be printed."""
    line = (project.directory / "vectors" / "outputs.hex").read_text().splitlines()[row]
    e = project.metadata["model_out"]["elements"][2]
    other = f"{int(line, 16) ^ (1 << e['offset']):0{len(line)}x}"
    codes = [(int(v, 16) >> e["offset"]) & ((1 << e["width"]) - 1) for v in (line, other)]
    got, want = (c - (e["k"] * (c >> (e["width"] - 1)) << e["width"]) for c in codes)
    return line, other, f"mismatch: vector {row}, {e['name']}: expected {want}, got {got}"


@needs_vhdl
@pytest.mark.parametrize("row", [0, 7, VECTORS - 1])
def test_vhdl_names_the_first_wrong_element(project, tmp_path, row):
    line, other, message = wrong_line(project, row)
    text = (project.directory / "vectors" / "outputs.hex").read_text().splitlines()
    text[row] = other
    shutil.copytree(project.directory, tmp_path / "copy")
    (tmp_path / "copy" / "vectors" / "outputs.hex").write_text("\n".join(text) + "\n")
    result = run_testbench(tmp_path / "copy", "vhdl")
    assert not result.passed and result.mismatches == (message,)


@needs_vhdl
@pytest.mark.parametrize("change", [-1, 1])
def test_vhdl_at_a_wrong_latency_fails(project, tmp_path, change):
    delay = project.rtl["vhdl"].latency_cycles - 1
    folder = tmp_path / "copy"
    shutil.copytree(project.directory, folder)
    path = folder / "sim" / "tb_net.vhd"
    text = path.read_text()
    assert (line := f"DELAY : natural := {delay};") in text
    path.write_text(text.replace(line, f"DELAY : natural := {delay + change};"))
    result = run_testbench(folder, "vhdl")
    assert not result.passed and len(result.mismatches) == 10


@needs_vhdl
def test_vhdl_without_a_table_or_vectors_is_an_error(project, tmp_path):
    tables = sorted((project.directory / "rtl" / "vhdl" / "memfiles").iterdir())
    assert tables
    for number, (file, kept, message) in enumerate([
        (f"rtl/vhdl/memfiles/{tables[0].name}", None, "(No such file|cannot open|can't open)"),
        (f"rtl/vhdl/memfiles/{tables[0].name}", -1, "FAIL the table .* lines, expected"),
        ("vectors/inputs.hex", -1, "FAIL inputs.hex ends before vector 59"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(project.directory, folder)
        path = folder / file
        lines = path.read_text().splitlines(keepends=True)
        path.unlink() if kept is None else path.write_text("".join(lines[:kept]))
        with pytest.raises(ToolError, match=rf"(?s)make ended with code 2.*{message}"):
            run_testbench(folder, "vhdl")


def run_program(folder: Path, cwd: Path) -> tuple[int, str]:
    done = subprocess.run([folder / "obj" / "tb_net"], cwd=cwd, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


@needs_verilog
def test_verilog_finds_everything_that_is_wrong_with_its_files(project, simulated, tmp_path):
    """One program, run in folders with other vectors and tables."""
    _, program = simulated

    def folder(name: str) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in [*program.glob("*.hex"), *program.glob("*.mem")]:
            shutil.copy(file, made)
        return made

    assert run_program(program, folder("right"))[0] == 0
    for row in (0, 7, VECTORS - 1):
        line, other, message = wrong_line(project, row)
        path = folder(f"wrong{row}") / "outputs.hex"
        text = path.read_text().splitlines()
        text[row] = other
        path.write_text("\n".join(text) + "\n")
        code, printed = run_program(program, path.parent)
        assert code != 0 and message in printed.splitlines() and "FAIL 1 of 60 vectors differ" in printed
        assert printed.count("mismatch") == 1 and "PASS" not in printed
    for name, file, lines, message in [
        ("no-table", "*.mem", None, "FAIL the table"),
        ("cut-table", "*.mem", -1, "FAIL the table"),
        ("no-vectors", "inputs.hex", None, "can't be read"),
        ("cut-vectors", "outputs.hex", -1, "FAIL outputs.hex ends before vector 59 of 60"),
    ]:
        path = sorted(folder(name).glob(file))[0]
        text = path.read_text().splitlines(keepends=True)
        path.unlink() if lines is None else path.write_text("".join(text[:lines]))
        code, printed = run_program(program, path.parent)
        assert code != 0 and message in printed and "PASS" not in printed, printed


@pytest.mark.parametrize(
    "flavor",
    [pytest.param("vhdl", marks=needs_vhdl), pytest.param("verilog", marks=[needs_verilog, pytest.mark.slow])],
)
@pytest.mark.parametrize("cutoff", [-1, 2])
def test_one_flipped_weight_bit_fails(graph, vectors, benchmark, flavor, cutoff, tmp_path):
    other, flip = benchmark.visible_flip(graph, da4ml.to_comb(graph), vectors)
    assert flip["from"] != flip["to"] and flip["vectors_changed"] > 0
    made = write_project(graph, other, tmp_path / "p", name="net", flavors=(flavor,), latency_cutoff=cutoff, vectors=vectors)
    result = run_testbench(made, flavor)
    assert not result.passed and 0 < len(result.mismatches) <= 10
    first = min(int(m) for m in re.findall(r"vector (\d+)", " ".join(result.mismatches)))
    flipped = da4ml.predict(other, flatten_batch(vectors))
    assert first == np.argwhere((flipped != flatten_batch(emulate(graph, vectors))).any(1))[0]


def test_a_flipped_bit_is_one_bit(benchmark):
    nodes: list[ir.Node] = []
    x = node(nodes, "input", (), (1, 1, 2), k=1, i=2, f=2)
    y = node(nodes, "dot", (x, const(nodes, [[[0.75], [-1.5]]])), (1, 1, 1))
    graph = ir.validate(ir.Graph(tuple(nodes), (x,), (y,)))
    assert benchmark.kernels(graph) == [1]
    flips = {(e, b): benchmark.flip_bit(graph, 1, e, b).nodes[1].attrs["value"].ravel()[e] for e in (0, 1) for b in (0, 1, 2)}
    # 0.75 = 0b011 * 2^-2; -1.5 = 0b...101 * 2^-1
    assert flips == {(0, 0): 0.5, (0, 1): 0.25, (0, 2): 1.75, (1, 0): -2.0, (1, 1): -0.5, (1, 2): -3.5}
    assert graph.nodes[1].attrs["value"].ravel().tolist() == [0.75, -1.5]


@needs_make
def test_a_project_refers_to_nothing_outside_and_knows_its_files(project, tmp_path):
    moved = tmp_path / "a folder with spaces"
    shutil.copytree(project.directory, moved)
    for path in moved.rglob("*"):
        if path.is_file() and path.suffix != ".npz":
            assert str(project.directory.parent) not in path.read_text(), path
    check = ["make", "check"]
    assert subprocess.run(check, cwd=moved, capture_output=True).returncode == 0
    listed = {line.split("  ", 1)[1].strip() for line in (moved / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.relative_to(moved).as_posix() for p in moved.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    (moved / "rtl" / "verilog" / "net.v").write_text("")
    assert subprocess.run(check, cwd=moved, capture_output=True).returncode != 0


def test_rtl_info_points_into_the_project(project, graph):
    assert sorted(project.rtl) == ["verilog", "vhdl"]
    assert (project.rtl["verilog"].src / "net.v").is_file() and (project.rtl["vhdl"].src / "net.vhd").is_file()
    assert ir.load(project.directory / "model" / "graph.npz").inputs == graph.inputs
    digest = hashlib.sha256((project.directory / "vectors" / "outputs.hex").read_bytes()).hexdigest()
    assert project.metadata["vectors"]["outputs"] == digest


def test_readme_says_what_there_is(project, comb_project):
    text = (project.directory / "README.md").read_text()
    latency = project.rtl["verilog"].latency_cycles
    assert f"{latency} clock edges ({5 * latency} ns)" in text and "xcvu13p-flga2577-2-e" in text
    assert "on 12,000 vectors: emulator: 0, da4ml: 0, rtl_comb: not compared" in text
    for path in re.findall(r"^\* `([^`]+)`:", text, re.MULTILINE):
        assert any(project.directory.glob(path)), path
    for element in ("x[0] ... x[3], 7 bits each | 27:0 | 1 | 3 | 3 | -8 | 7.875 | 0.125", "output_1[0]", "@"):
        assert (element in text) == (element != "@")
    text = (comb_project.directory / "README.md").read_text()
    assert "combinational, no clock" in text and "`clk`" not in text and "8 ns (125 MHz)" in text


def test_what_was_found_later_is_quoted_as_if_it_had_been_known(project, graph, vectors, tmp_path):
    """All files equal those of a project that was written with it, and nothing but the texts is written."""
    origin = json.loads((project.directory / "metadata.json").read_text())["origin"]
    first = {key: origin[key] for key in origin if key not in ("mismatches", "vectors")}
    comb = da4ml.to_comb(graph)
    made = write_project(graph, comb, tmp_path / "p", name="net", latency_cutoff=2, vectors=vectors, origin=first)
    before = {p: p.stat().st_mtime_ns for p in made.directory.rglob("*") if p.is_file()}
    assert "Mismatches" not in (made.directory / "README.md").read_text()
    about = quoted(made.directory, {key: origin[key] for key in ("mismatches", "vectors")})
    assert about == json.loads((made.directory / "metadata.json").read_text()) and about["origin"] == origin
    after = {p: p.stat().st_mtime_ns for p in made.directory.rglob("*") if p.is_file()}
    assert {p.name for p in after if before.get(p) != after[p]} == {"README.md", "metadata.json", "SHA256SUMS"}
    for file in ("README.md", "metadata.json"):
        assert (made.directory / file).read_text() == (project.directory / file).read_text()
    sums = {line for line in (made.directory / "SHA256SUMS").read_text().splitlines() if not line.endswith(".npz")}
    assert sums == {line for line in (project.directory / "SHA256SUMS").read_text().splitlines() if not line.endswith(".npz")}
    with pytest.raises(LoweringError, match="no written project"):
        quoted(tmp_path, {})


def test_same_digest_for_the_same_graph(graph):
    from pquant_jax.lower.project._write import graph_digest

    other = network()
    assert graph_digest(other) == graph_digest(graph)
    place = next(j for j, n in enumerate(other.nodes) if n.op == "const")
    value = np.array(other.nodes[place].attrs["value"])
    value.flat[0] += 1
    changed = ir.Node("const", (), value.shape, {"value": value})
    assert graph_digest(other._replace(nodes=(*other.nodes[:place], changed, *other.nodes[place + 1 :]))) != graph_digest(graph)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "module"}, LoweringError, "reserved word of verilog; use another, such as 'module_net'"),
        ({"name": "Signal"}, LoweringError, "reserved word of vhdl"),
        ({"name": "a__b"}, LoweringError, "VHDL takes no '__'"),
        ({"name": "mux"}, LoweringError, "name is 'mux'"),
        ({"flavors": ("verilog", "chisel")}, LoweringError, r"expected some of \('verilog', 'vhdl'\)"),
        ({"flavors": ()}, LoweringError, "each once"),
        ({"part": "xc vu"}, LoweringError, "part is 'xc vu'"),
        ({"clock_period": 0.0}, LoweringError, "clock_period is 0.0, expected nanoseconds"),
        ({"io_delay": (0.5, 0.2)}, LoweringError, r"io_delay as \(least, most\)"),
        ({"clock_uncertainty": 1.5}, LoweringError, "clock_uncertainty is 1.5"),
        ({"vectors": 0}, DataError, "at least 1"),
        ({"vectors": [np.zeros((3, 4))]}, DataError, "2 inputs, got 1 arrays"),
        ({"vectors": [np.full((3, 4), np.nan), np.zeros((3, 1, 2))]}, DataError, "NaN or infinity"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(graph, tmp_path, change, error, message):
    comb = da4ml.to_comb(graph)
    with pytest.raises(error, match=message):
        write_project(graph, comb, tmp_path / "p", **{"name": "net", "vectors": 5} | change)
    assert not any(tmp_path.iterdir())


def test_a_netlist_of_another_graph_is_refused(graph, tmp_path):
    nodes: list[ir.Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    one = ir.validate(ir.Graph(tuple(nodes), (x,), (x,)))
    wide: list[ir.Node] = []
    x = node(wide, "input", (), (2,), k=1, i=5, f=2)
    other = ir.validate(ir.Graph(tuple(wide), (x,), (x,)))
    with pytest.raises(VerifyError, match=r"vector \d+: output\[\d\] is .* which is no value of the netlist's output \(k=1, i=2"):
        write_project(other, da4ml.to_comb(one), tmp_path / "p", name="net", vectors=50)
    with pytest.raises(LoweringError, match="have 6 elements, the netlist 2; is it of this graph"):
        write_project(graph, da4ml.to_comb(one), tmp_path / "p", name="net", vectors=5)
    (tmp_path / "p").mkdir()
    with pytest.raises(LoweringError, match="exists; pass overwrite=True"):
        write_project(one, da4ml.to_comb(one), tmp_path / "p", name="net", vectors=5)
    write_project(one, da4ml.to_comb(one), tmp_path / "p", name="net", vectors=5, overwrite=True, flavors=("vhdl",))
    assert not (tmp_path / "p" / "rtl" / "verilog").exists() and "sim-verilog" not in (tmp_path / "p" / "Makefile").read_text()
    with pytest.raises(LoweringError, match="has no verilog RTL"):
        run_testbench(tmp_path / "p", "verilog")


def test_constant_outputs_are_refused(tmp_path):
    nodes: list[ir.Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=2, f=2)
    zero = node(nodes, "take", (x,), (2,), index=np.array([-1, -1]))
    graph = ir.validate(ir.Graph(tuple(nodes), (x,), (zero,)))
    with pytest.raises(LoweringError, match="port of net has no bits"):
        write_project(graph, da4ml.to_comb(graph), tmp_path / "p", name="net", vectors=5)


def test_missing_tools_are_named(project, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ToolError, match=r"(?s)no make.*no GHDL: install it, e.g. `apt install ghdl`"):
        run_testbench(project, "vhdl")
    assert any("C++ compiler" in line for line in missing_tools("verilog"))


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path):
    """`make` alone would be killed and its compiler keep the pipe open."""
    with pytest.raises(ToolError, match=r"sh did not finish in 0.2 s"):
        sim.run_tool(["sh", "-c", "sleep 30; true"], cwd=tmp_path, timeout=0.2)


@pytest.mark.slow
@pytest.mark.skipif(bool(synth.missing_tools()) or not shutil.which("make"), reason="no Yosys or make")
def test_make_synth_counts_as_synth_does(project, tmp_path):
    shutil.copytree(project.directory, tmp_path / "p")
    sim.run_tool(["make", "synth", f"YOSYS={synth.find_yosys()}"], cwd=tmp_path / "p", timeout=600)
    counted = synth.read_cells(tmp_path / "p" / "reports" / "yosys.json")
    want = synth.synth(project.rtl["verilog"])
    assert counted == {key: want[key] for key in counted} and counted["lut"] > 50 and counted["ff"] > 50
