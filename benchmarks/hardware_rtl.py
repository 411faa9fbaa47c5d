"""The zoo through alkaid: its interpreter and its Verilog against the emulator, its cost and latency beside da4ml's.

    python benchmarks/hardware_rtl.py FOLDER [NAME ...] [--no-rtl]

FOLDER holds a graph NAME.npz (`lower.ir.save`) per model.  Vectors are codes of the whole input port.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax.lower import ir, sim
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph

VECTORS: Final = 4000
CUTOFF: Final = 5.0  # nanoseconds for alkaid, adders for da4ml
MULTIPLIER: Final = 10.0  # da4ml's cutoff where a product of two variables is one operation
COLUMNS: Final = (
    "model", "alkaid cost", "da4ml cost", "alkaid ns", "da4ml adders", "alkaid regs", "da4ml regs", "stages", "wrong", "s",
)  # fmt: skip


def zoo_lines(graphs: Mapping[str, Graph], *, vectors: int = VECTORS, rtl: bool = True, cutoff: float = CUTOFF) -> Iterator[dict]:
    """Per model {"name", "holds", "mismatches": {"alkaid", "verilog"}, "alkaid", "da4ml": {...}, "vectors", "seconds"}.

    mismatches: scalars of the emulator's outputs that differ; None where the Verilog wasn't simulated.  Both backends'
    rows have cost (LUTs by their own estimates), latency (units of their own), stages, reg_bits and seconds; alkaid's cost
    is that behind the fusion of adders, of what is written.
    """
    with tempfile.TemporaryDirectory(prefix="hardware-rtl-") as folder:
        for name, graph in graphs.items():
            yield _line(name, graph, Path(folder), vectors, rtl and not sim.missing_tools(), cutoff)


def _line(name: str, graph: Graph, work: Path, vectors: int, rtl: bool, cutoff: float) -> dict[str, Any]:
    start = time.perf_counter()
    inputs = port_grid(graph, vectors, np.random.default_rng(0))
    expected, flat = flatten_batch(emulate(graph, inputs)), flatten_batch(inputs)
    made, rows = {}, {}
    for backend, key in ((alkaid, "alkaid"), (da4ml, "da4ml")):
        begin = time.perf_counter()
        made[key] = backend.to_comb(graph)
        slow = key == "da4ml" and any(abs(op.opcode) == 7 for op in made[key].ops)
        stages, reg_bits, cost = backend.staged(made[key], max(cutoff, MULTIPLIER) if slow else cutoff)
        rows[key] = {
            "cost": cost,
            "latency": float(max(made[key].latency)),
            "stages": stages,
            "reg_bits": reg_bits,
            "seconds": round(time.perf_counter() - begin, 1),
        }
    wrong: dict[str, int | None] = {"alkaid": int((alkaid.predict(made["alkaid"], flat) != expected).sum()), "verilog": None}
    if rtl:
        written = alkaid.write_rtl(made["alkaid"], work / name, name="net", latency_cutoff=cutoff)
        wrong["verilog"] = int((sim.simulate(written, flat, work=work / "sim") != expected).sum())
    return {
        "name": name,
        "holds": not any(wrong.values()) and (wrong["verilog"] is not None or not rtl),
        "mismatches": wrong,
        **rows,
        "vectors": vectors,
        "seconds": round(time.perf_counter() - start, 1),
    }


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """One table: cost and latency of both packages side by side."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        a, d = row["alkaid"], row["da4ml"]
        wrong = "/".join("-" if n is None else str(n) for n in row["mismatches"].values())
        figures = (f"{a['cost']:,.0f}", f"{d['cost']:,.0f}", f"{a['latency']:.1f}", f"{d['latency']:.0f}")
        figures += (f"{a['reg_bits']:,}", f"{d['reg_bits']:,}", f"{a['stages']}/{d['stages']}", wrong, f"{row['seconds']:.0f}")
        lines.append((row["name"], *figures))
    widths = [max(len(line[j]) for line in lines) for j in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all graphs by default")
    parser.add_argument("--no-rtl", action="store_true", help="leave out the simulation of the Verilog")
    args = parser.parse_args()
    names = args.names or sorted(p.stem for p in args.folder.glob("*.npz") if not p.stem.endswith("_x"))
    rows = []
    for row in zoo_lines({name: ir.load(args.folder / f"{name}.npz") for name in names}, rtl=not args.no_rtl):
        rows.append(row)
        print(f"{'ok  ' if row['holds'] else 'FAIL'} {row['name']}: mismatches {row['mismatches']}", flush=True)
    print(text(rows))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
