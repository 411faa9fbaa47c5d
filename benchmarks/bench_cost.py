"""da4ml's cost and the calibrated estimate against Yosys' LUTs, over the models of the zoo.

    python benchmarks/bench_cost.py FOLDER [NAME ...] [--cache FILE] [--ship]

FOLDER holds a graph NAME.npz (`lower.ir.save`) per model.  Each becomes a da4ml netlist, pipelined, that Yosys
synthesizes for UltraScale+ (half a minute to several minutes each; --cache keeps the counts).  `cost.calibrate` fits the
cells per bit of hardware and states the error on each model left out; --ship writes the fit into the package.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax.lower import cost, ir, synth
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.ir import Graph

CUTOFF: Final = 5.0  # adders per stage; twice that where two variables are multiplied, which is one operation for da4ml
BAR: Final = 0.15  # of the LUTs of each model left out
# Vivado results published for jet tagging on 16 features (xcvu9p, 200 MHz): other models than ours, for orientation.
# arXiv:2405.00645v2 (HGQ), Table I, from two transcriptions of it that agree.
PUBLISHED: Final[tuple[dict[str, Any], ...]] = (
    {"model": "HGQ-1", "accuracy": 0.764, "lut": 6200, "dsp": 34, "latency_ns": 30},
    {"model": "HGQ-2", "accuracy": 0.759, "lut": 3200, "dsp": 6, "latency_ns": 20},
    {"model": "HGQ-4", "accuracy": 0.739, "lut": 565, "dsp": 0, "latency_ns": 15},
    {"model": "HGQ-6", "accuracy": 0.710, "lut": 256, "dsp": 0, "latency_ns": 10},
    {"model": "QKeras Q6", "accuracy": 0.748, "lut": 39800, "dsp": 124, "latency_ns": 55},
    {"model": "da4ml's test design, Vivado 2025.1, pipelined", "lut": 5804},
)


def rows(graphs: Mapping[str, Graph], *, cache: Path | None = None, timeout: float = 1800) -> list[dict[str, Any]]:
    """Per model {"name", "cost" (da4ml's), "cutoff", "features", "lut", "ff", "carry", "dsp", "seconds"} (Yosys').

    cache: a JSON file of the cells by model; it is extended after every model.  Counts of a netlist of another cost are
    not used again.  Raises: ToolError without Yosys.
    """
    known = json.loads(cache.read_text()) if cache is not None and cache.exists() else {}
    found = []
    for name, graph in graphs.items():
        comb = da4ml.to_comb(graph)
        slow = any(node.op == "mul" for node in graph.nodes) or any(abs(op.opcode) == 7 for op in comb.ops)
        cutoff = 2 * CUTOFF if slow else CUTOFF
        row = {"name": name, "cost": float(comb.cost), "cutoff": cutoff}
        if [known.get(name, {}).get(key) for key in ("cost", "cutoff")] != [row["cost"], cutoff]:
            with tempfile.TemporaryDirectory() as work:
                written = da4ml.write_rtl(comb, Path(work) / "rtl", name="net", latency_cutoff=cutoff)
                known[name] = {**row, **synth.synth(written, timeout=timeout), "reg_bits": written.reg_bits}
            if cache is not None:
                cache.write_text(json.dumps(known, indent=1) + "\n")
        features = cost.total(cost.layers(graph, da4ml, cutoff=cutoff)).features
        found.append({**known[name], **row, "features": features})
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst error of da4ml's cost against Yosys' LUTs, those of the calibrated estimate on models left out, and
    whether each of these is within `BAR`."""
    calibration = cost.calibrate(found)
    raw = {row["name"]: row["cost"] / row["lut"] - 1 for row in found}
    left = {name: errors["lut"] for name, errors in calibration.left_out.items()}
    return {
        "models": len(found),
        "da4ml_median_error": float(np.median(np.abs(list(raw.values())))),
        "da4ml_errors": raw,
        "left_out_median_error": float(np.median(np.abs(list(left.values())))),
        "left_out_errors": left,
        "left_out_other": {
            cell: float(np.median([abs(e[cell]) for e in calibration.left_out.values() if cell in e])) for cell in ("ff", "carry")
        },
        "holds": max(map(abs, left.values())) <= BAR,
        "calibration": calibration,
    }


def text(found: Sequence[Mapping[str, Any]], summed: Mapping[str, Any]) -> str:
    """A row per model, and the published ones below."""
    lines = [f"{'model':<22}{'LUT':>8}{'FF':>8}{'CARRY':>8}{'DSP':>6}{'da4ml':>9}{'error':>8}{'left out':>10}"]
    for row in found:
        errors = f"{100 * summed['da4ml_errors'][row['name']]:>+7.1f}%{100 * summed['left_out_errors'][row['name']]:>+9.1f}%"
        lines.append(
            f"{row['name']:<22}{row['lut']:>8,}{row['ff']:>8,}{row['carry']:>8,}{row['dsp']:>6}{row['cost']:>9,.0f}{errors}"
        )
    lines += ["", "published, other models (Vivado):", *_published(PUBLISHED)]
    return "\n".join(lines)


def _published(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return ["  " + ", ".join(f"{key} {value}" for key, value in row.items()) for row in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all graphs by default")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--ship", action="store_true", help="write the calibration into the package")
    args = parser.parse_args()
    names = args.names or sorted(p.stem for p in args.folder.glob("*.npz") if not p.stem.endswith("_x"))
    found = rows({name: ir.load(args.folder / f"{name}.npz") for name in names}, cache=args.cache)
    summed = summary(found)
    print(text(found, summed))
    print(f"\nmedian error of da4ml's cost against Yosys' LUTs: {100 * summed['da4ml_median_error']:.1f} %")
    worst = max(map(abs, summed["left_out_errors"].values()))
    print(f"calibrated, each model left out: median {100 * summed['left_out_median_error']:.1f} %, worst {100 * worst:.1f} %")
    print(f"registers and carry chains: {summed['left_out_other']}")
    print(json.dumps(summed["calibration"].cells, indent=1))
    if args.ship:
        cost.ship(summed["calibration"])
    return 0 if summed["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
