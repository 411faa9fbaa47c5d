"""The C header compiled and compared with the simulator's packing; the Tcl scripts run with Vivado's commands written down."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pquant_jax.lower import ir
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.project import ProjectInfo, write_project
from pquant_jax.lower.project._header import header
from pquant_jax.lower.project._ports import Element, Ports, kifs_of
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.lower.sim import pack_bits, unpack_bits

from .random_graphs import const, node

WIDTHS = np.array([[1, 0, 1, 0, 1, 1, 0, 1], [3, 4, -2, -1, 30, 0, 52, 20], [4, 3, 6, 1, 22, 0, 1, -5]])  # k, i, f

PROGRAM = """
#include <stdio.h>
#include "net_io.h"
/* lines of numbers of the input port -> words, and the numbers and codes that come back; then the codes packed again */
int main(void) {
    double x[NET_INPUTS], y[NET_INPUTS];
    int64_t codes[NET_INPUTS];
    uint32_t words[NET_INPUT_WORDS], again[NET_INPUT_WORDS], other[NET_OUTPUT_WORDS];
    int64_t out[NET_OUTPUTS];
    double value[NET_OUTPUTS];
    while (fread(x, sizeof x, 1, stdin) == 1) {
        net_pack_input(x, words);
        net_unpack_input(words, y);
        net_unpack_input_codes(words, codes);
        net_pack_input_codes(codes, again);
        if (memcmp(words, again, sizeof words) != 0) return 2;
        memcpy(other, words, sizeof other); /* both ports have the same elements here */
        net_unpack_output(other, value);
        net_unpack_output_codes(other, out);
        net_pack_output_codes(out, other);
        if (memcmp(words, other, sizeof words) != 0 || memcmp(value, y, sizeof y) != 0) return 3;
        net_pack_output(value, other);
        if (memcmp(words, other, sizeof words) != 0) return 4;
        fwrite(words, sizeof words, 1, stdout);
        fwrite(y, sizeof y, 1, stdout);
        fwrite(codes, sizeof codes, 1, stdout);
    }
    return 0;
}
"""


def elements(kifs: np.ndarray) -> tuple[Element, ...]:
    made, offset = [], 0
    for j, (k, i, f) in enumerate(kifs.T.tolist()):
        made.append(Element("x", (j,), k, i, f, offset, max(k + i + f, 0)))
        offset += max(k + i + f, 0)
    return tuple(made)


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("gcc", ["-std=c99", "-x", "c", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wno-sign-conversion"]),
        ("g++", ["-std=c++17", "-x", "c++", "-Wall", "-Wextra", "-Wpedantic"]),
    ],
)
def test_header_packs_as_the_simulator_does(compiler, flags, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    row = elements(WIDTHS)
    assert [e.width for e in row] == [8, 7, 5, 0, 53, 1, 53, 16]
    ports = Ports(row, row, {"x": (8,)}, {"y": (8,)})
    rtl = RTLInfo("net", tmp_path, tmp_path, "verilog", 3, 4, 1, 0, 0.0, 0.0, WIDTHS, WIDTHS)
    (tmp_path / "net_io.h").write_text(header("net", ports, rtl))
    (tmp_path / "main.c").write_text(PROGRAM)
    subprocess.run([compiler, *flags, "-Werror", "-O1", "main.c", "-o", "main", "-lm"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(0)
    inside = np.ldexp(rng.integers(-(2**53), 2**53, (300, 8)).astype(float), -WIDTHS[2] - 3)  # off the grid, beyond the range
    x = np.concatenate([inside, np.ldexp(inside, -40), np.zeros((1, 8)), rng.normal(0, 10, (300, 8))])
    done = subprocess.run([tmp_path / "main"], input=x.tobytes(), capture_output=True)
    assert done.returncode == 0
    words = -(-int(sum(e.width for e in row)) // 32)
    record = np.frombuffer(done.stdout, [("words", "<u4", words), ("y", "<f8", 8), ("codes", "<i8", 8)])
    # the simulator's packing, in Python integers: its own float64 modulo is exact only below 2^53
    values = np.zeros(x.shape, np.int64)
    for j, e in enumerate(row):
        codes = [int(v) % (1 << e.width) for v in np.floor(np.ldexp(x[:, j], e.f))] if e.width else [0] * len(x)
        values[:, j] = [c - (e.k * (c >> (e.width - 1)) << e.width) if e.width else 0 for c in codes]
    np.testing.assert_array_equal(record["codes"], values)
    np.testing.assert_array_equal(record["y"], np.ldexp(values.astype(float), -np.where(WIDTHS.sum(0) > 0, WIDTHS[2], 0)))
    packed = pack_bits(record["y"], kifs_of(row))
    np.testing.assert_array_equal(np.ascontiguousarray(record["words"]).view(np.uint8), packed[:, : 4 * words])
    np.testing.assert_array_equal(unpack_bits(packed, WIDTHS), record["y"])


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> dict[str, ProjectInfo]:
    nodes: list[ir.Node] = []
    x = node(nodes, "input", (), (1, 1, 3), k=1, i=2, f=2)
    y = node(nodes, "dot", (x, const(nodes, [[[0.75, 1.0], [-1.5, 3.0], [0.5, -0.25]]])), (1, 1, 2))
    z = node(nodes, "quantize", (y,), k=np.ones((1, 1, 2), int), i=np.full((1, 1, 2), 2), f=np.full((1, 1, 2), 1),
             rounding="TRN", overflow="WRAP")  # fmt: skip
    codes = np.arange(16)[None, ::-1] * 3
    t = node(nodes, "table", (z,), codes=codes, which=np.zeros((1, 1, 2), int), f_out=np.array([2]),
             **{key: nodes[z].attrs[key] for key in "kif"})  # fmt: skip
    graph = ir.validate(ir.Graph(tuple(nodes), (x,), (y, t)))
    comb, root = da4ml.to_comb(graph), tmp_path_factory.mktemp("scripts")
    cuts = {"comb": -1.0, "pipelined": 1.0}
    return {key: write_project(graph, comb, root / key, name="net", latency_cutoff=cut, vectors=9) for key, cut in cuts.items()}


needs_tcl = pytest.mark.skipif(shutil.which("tclsh") is None, reason="no tclsh")

# Vivado's commands write down how they were called; the files that they read must exist
VIVADO = """
foreach command {create_project synth_design write_checkpoint report_utilization report_timing_summary opt_design place_design
                 phys_opt_design route_design report_power report_drc read_vhdl read_verilog read_mem} {
  proc $command {args} [string map [list NAME $command] {
    puts "CALL NAME $args"
    if {[string match read_* NAME] && ![file isfile [lindex $args end]]} { error "[lindex $args end] does not exist" }
  }]
}
proc read_xdc {args} { puts "CALL read_xdc $args"; uplevel #0 [list source [lindex $args end]] }
foreach command {create_clock set_clock_uncertainty set_input_delay set_output_delay} {
  proc $command {args} "puts \\"CALL $command \\$args\\""
}
proc get_ports {names} { return "ports:$names" }
proc get_clocks {names} { return "clocks:$names" }
set argv [lassign $argv script]
source $script
"""


def tcl(folder: Path, tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    (tmp_path / "vivado.tcl").write_text(VIVADO)
    command = ["tclsh", str(tmp_path / "vivado.tcl"), str(folder / "vivado" / "synth.tcl"), *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@needs_tcl
@pytest.mark.parametrize("design", ["comb", "pipelined"])
@pytest.mark.parametrize("flavor", ["verilog", "vhdl"])
def test_synthesis_script_reads_what_there_is(projects, design, flavor, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(projects[design].directory, moved)
    done = tcl(moved, tmp_path, flavor)
    assert done.returncode == 0, done.stderr
    calls = [line.removeprefix("CALL ") for line in done.stdout.splitlines() if line.startswith("CALL")]
    read = [c.split()[-1] for c in calls if c.startswith(f"read_{flavor}")]
    suffix = {"verilog": ".v", "vhdl": ".vhd"}[flavor]
    sources = {str(p) for p in (moved / "rtl" / flavor).rglob(f"*{suffix}") if "wrapper" not in p.name}
    assert set(read) == sources and len(read) == len(sources) > 5
    if flavor == "vhdl":  # entities before those that use them
        assert read[-1].endswith("/net.vhd") and all("static" in p for p in read[:6])
    assert sum(c.startswith("read_mem") for c in calls) == len(list((moved / "rtl" / flavor / "memfiles").iterdir())) > 0
    assert "synth_design -top net -part xcvu13p-flga2577-2-e -mode out_of_context -flatten_hierarchy full" in calls
    steps = [c.split()[0] for c in calls if c.endswith("_design") or "_design " in c]
    assert steps == ["synth_design", "opt_design", "place_design", "phys_opt_design", "route_design"]
    clock = "create_clock -name clk -period 5" + (" ports:clk" if design == "pipelined" else "")
    assert clock in calls and "set_clock_uncertainty -setup 0.5 clocks:clk" in calls
    assert "set_input_delay -clock clk -max 2 {ports:model_inp[*]}" in calls
    reports = {Path(c.split()[-1]).name for c in calls if c.startswith("report_")}
    assert {"post_synth_utilization.rpt", "post_route_utilization.rpt", "post_route_timing.rpt"} <= reports
    assert all(str(moved / "reports" / flavor) in c for c in calls if c.startswith("report_"))
    assert (moved / "reports" / flavor).is_dir()


@needs_tcl
def test_synthesis_script_stops_where_asked_and_refuses_what_is_not_there(projects, tmp_path):
    shutil.copytree(projects["comb"].directory, tmp_path / "p")
    done = tcl(tmp_path / "p", tmp_path, "verilog", "xc7z020clg400-1", "synth")
    assert done.returncode == 0 and "xc7z020clg400-1" in done.stdout and "place_design" not in done.stdout
    assert "FLAVOR is one of: verilog vhdl" in tcl(tmp_path / "p", tmp_path, "chisel").stderr
    assert "STOP is bits, expected synth or route" in tcl(tmp_path / "p", tmp_path, "vhdl", "xc7z020clg400-1", "bits").stderr


XSIM = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
for word in "$@"; do case "$word" in *.v|*.sv|*.vhd) [ -f "$word" ] || exit 1;; esac; done
case "$(basename "$0")" in xsim) ls >> "$LOG"; echo "$SAYS";; esac
"""


@needs_tcl
@pytest.mark.parametrize(("flavor", "says", "code"), [("verilog", "PASS 9 vectors", 0), ("vhdl", "PASS 9 vectors", 0),
                                                      ("verilog", "FAIL 1 of 9 vectors differ", 1)])  # fmt: skip
def test_xsim_script_compiles_everything_and_reads_the_verdict(projects, flavor, says, code, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("xvlog", "xvhdl", "xelab", "xsim"):
        (programs / name).write_text(XSIM)
        (programs / name).chmod(0o755)
    moved = tmp_path / "moved"
    shutil.copytree(projects["pipelined"].directory, moved)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "SAYS": says}
    command = ["tclsh", "vivado/simulate.tcl", flavor]
    done = subprocess.run(command, cwd=moved, env=env, capture_output=True, text=True, timeout=60)
    log = (tmp_path / "log").read_text()
    assert done.returncode == code and ("FAIL the testbench of net" in done.stdout) == bool(code), done.stderr
    compiled = re.search(r"^xv(log -sv|hdl -2008) (.*)$", log, re.MULTILINE)
    assert compiled and compiled[2].split()[-1].endswith("tb_net.sv" if flavor == "verilog" else "tb_net.vhd")
    assert "xelab tb_net" in log and "inputs.hex" in log.splitlines() and any(line.endswith(".mem") for line in log.splitlines())
