"""One table: every pruning method on the embedded jets at 70, 80, 90 and 94 % sparsity, N:M at its own ratios, three seeds.

    python benchmarks/bench_pruning.py [--out benchmarks/results]

All members of a method, every seed at every sparsity, are one `vmap` of one executable.  Two processes of one thread each
share the methods.  Writes pruning.json, pruning.md and pruning.png: test accuracy, the sparsity reached, EBOPs, da4ml's
cost, seconds.  About six minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import methods
import numpy as np
import population

import pquant_jax as pq
from pquant_jax.lower import trace
from pquant_jax.lower.backends import da4ml

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).resolve().parent / "results"


def cost(inst: pq.Instrumented, view: pq.View) -> float:
    """da4ml's estimate of LUTs of the combinational netlist."""
    return float(da4ml.to_comb(trace(inst, view, inst.model.state)).cost)


def measure(name: str) -> list[dict[str, Any]]:
    """One row per level of a method."""
    method, inst = methods.METHODS[name], population.task().inst
    members = [(seed, level) for level in method.levels for seed in SEEDS]
    start, plan, prepare = time.perf_counter(), methods.PLAN, None
    if method.search is not None:
        plan, prepare = plan._replace(pretrain=0), method.search(members)
    searching = time.perf_counter() - start
    trained = population.fit(methods.maker(name, plan=plan), members, plan, batch_size=methods.BATCH, prepare=prepare)
    start = time.perf_counter()
    costs = [cost(inst, population.member(trained.view, n)) for n in range(len(members))]
    lowering = time.perf_counter() - start
    figures = {
        "accuracy": trained.accuracy,
        "sparsity": population.sparsities(trained),
        "zeros": population.zeros(trained.view.model),
        "ebops": trained.ebops,
        "cost": np.asarray(costs),
    }
    rows = []
    for level in method.levels:
        own = np.flatnonzero(trained.levels == np.float32(level))
        row: dict[str, Any] = {"method": name, "family": method.family, "target": level, "seeds": len(own)}
        row |= {key: [float(v) for v in values[own]] for key, values in figures.items()}
        row |= {
            "train_s": (searching + trained.seconds) / len(members),
            "compile_s": trained.compile_s,
            "lower_s": lowering / len(members),
        }
        rows.append(row)
    return rows


def rows_of(names: Iterable[str]) -> list[dict[str, Any]]:
    """All rows, two methods at a time."""
    os.environ["NPROC"] = "1"  # XLA reads it once, in the workers
    rows = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for found in pool.map(measure, names):
            rows += found
            for row in found:
                print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    accuracy, reached, zeros = (100 * np.asarray(row[key]) for key in ("accuracy", "sparsity", "zeros"))
    costs = " | ".join(f"{np.mean(row[key]):,.0f} ± {np.std(row[key], ddof=1):,.0f}" for key in ("ebops", "cost"))
    return (
        f"| {row['method']} | {100 * row['target']:.4g} | {reached.mean():.2f} | {zeros.mean():.1f} "
        f"| {accuracy.mean():.2f} ± {accuracy.std(ddof=1):.2f} | {costs} | {row['train_s']:.2f} | {row['compile_s']:.1f} |"
    )


def markdown(report: dict[str, Any]) -> str:
    """The table and how it was made."""
    head = (
        "| method | target % | reached % | zeros % | test accuracy % | EBOPs | da4ml cost | train s/model | compile s |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    return (
        "# Pruning methods on the embedded jets\n\n"
        f"`python benchmarks/bench_pruning.py`, {report['seconds']:.0f} s on {report['device']}, jax {report['jax']}.  "
        f"Classifier 16-64-32-32-5, {report['plan']}, batch {methods.BATCH}, Adam {methods.RATE:g} with a cosine; "
        f"{methods.QUANTIZER}.  Mean ± standard deviation of {len(SEEDS)} seeds.\n\n"
        "*reached*: zeros / total of the masks of what the method prunes (channel methods leave the last layer alone); "
        "*zeros*: of all kernels as the hardware has them, values rounded to 0 included.  "
        "*train*: seconds of a model in its population; *compile*: once for all of a method's models.\n\n"
        + "\n".join([head, *map(line, report["rows"])])
        + "\n"
    )


def run(out: Path | None = RESULTS, names: Iterable[str] = tuple(methods.METHODS)) -> dict[str, Any]:
    """The whole table; writes it to `out`."""
    start = time.perf_counter()
    rows = rows_of(names)
    report = {
        "device": f"{os.cpu_count()} CPU cores",
        "jax": jax.__version__,
        "plan": f"{methods.PLAN.pretrain} + {methods.PLAN.train} + {methods.PLAN.finetune} epochs",
        "quantizer": methods.QUANTIZER,
        "seconds": time.perf_counter() - start,
        "rows": rows,
    }
    if out is not None:
        from plot_pruning import picture

        out.mkdir(parents=True, exist_ok=True)
        (out / "pruning.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "pruning.md").write_text(markdown(report))
        picture(report, out / "pruning.png")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", choices=list(methods.METHODS), default=list(methods.METHODS))
    args = parser.parse_args()
    report = run(args.out, args.only)
    print(f"{len(report['rows'])} rows in {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
