"""Measure every promise of a milestone afresh; print each with its figure; exit 1 where one falls short.

    python benchmarks/acceptance.py demo [--skip-clone]
    python benchmarks/acceptance.py pruning
    python benchmarks/acceptance.py models [--only zoo fuzz ...]
    python benchmarks/acceptance.py hardware [--only hls rtl ...]

Each takes about half an hour on 2 cores.  Nothing else should run: some of the lines are times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from lines import ROOT, Line, listed, module, pytest_line

SEEDS = (0, 1, 2)


def clone_lines() -> Iterator[Line]:
    """`make demo` and `make test` from an empty clone, and the demo's seconds after installation."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run(["make", "env"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
        start = time.perf_counter()
        demo = subprocess.run(["make", "demo"], cwd=clone, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        test = subprocess.run(["make", "test"], cwd=clone, stdout=subprocess.DEVNULL)
        yield Line(
            "make demo, make test from an empty clone",
            f"exit {demo.returncode}, {test.returncode}",
            demo.returncode + test.returncode == 0,
        )
        yield Line("demo seconds after installation <= 240", f"{seconds:.0f} s", seconds <= 240)


def demo_lines() -> Iterator[Line]:
    """Accuracy, EBOPs, cost and mismatches of the demo for three seeds, against float and an 8-bit netlist of this run."""
    from pquant_jax import config
    from pquant_jax.run import run

    with tempfile.TemporaryDirectory() as root:
        runs = []
        for seed in SEEDS:
            experiment = config.load(ROOT / "configs/jets_hgq.yaml", [f"seed={seed}", f"name=seed{seed}"])
            runs.append(run(experiment, root=root, quiet=True))
        plain = config.load(ROOT / "configs/jets_fixed8.yaml", ["hardware.simulate=false", "hardware.synthesize=false"])
        eight = run(plain, root=root, quiet=True)
    exact = [r["accuracy"]["float"] for r in runs]
    compressed = [r["accuracy"]["compressed"] for r in runs]
    gap = 100 * (np.mean(exact) - np.mean(compressed))
    yield Line("float test accuracy >= 0.67, each seed", listed(exact, ".4f"), min(exact) >= 0.67)
    yield Line(
        "compressed within 1.0 point of float, mean of 3 seeds", f"{listed(compressed, '.4f')}: {gap:.2f} points", gap <= 1.0
    )
    ebops = [r["ebops"]["reference8"] / r["ebops"]["final"] for r in runs]
    yield Line("reference8 / EBOPs >= 25", listed(ebops, ".1f"), min(ebops) >= 25)
    costs = [eight["cost"]["da4ml"] / r["cost"]["da4ml"] for r in runs]
    yield Line(
        "cost of the 8-bit netlist / cost >= 8", f"{listed(costs, '.1f')} (8-bit: {eight['cost']['da4ml']:.0f})", min(costs) >= 8
    )
    wrong = [n for r in runs for n in r["mismatches"].values()]
    vectors = min(r["vectors"] for r in runs)
    zero = all(n == 0 for n in wrong) and vectors >= 10_000
    yield Line("mismatches of JAX, da4ml, RTL comb and pipelined", f"{wrong} on {vectors} vectors x 5 outputs", zero)


def speed_lines() -> Iterator[Line]:
    """Compressed epoch over float epoch."""
    for row in module("bench_step").run(str(ROOT / "configs/jets_hgq.yaml"), 15):
        low, q1, q3, high = row["ratio_spread"]
        spread = f"quartiles {q1:.3f}..{q3:.3f}, range {low:.3f}..{high:.3f}"
        figure = f"{row['ratio']:.3f} ({spread}, {row['pairs']} pairs, threads: {row['threads']})"
        if row["counts"]:  # the thread count at which the float epoch is faster
            yield Line(f"compressed / float epoch, batch {row['batch']:,} <= 1.30", figure, row["ratio"] <= 1.30)


def fuzz_lines() -> Iterator[Line]:
    """200 random models: JAX, emulator and da4ml."""
    counts = module("fuzz").run(200, 0)
    yield Line("fuzz: 200 random models, 0 mismatches", json.dumps(counts, default=str), bool(counts["holds"]))


def test_lines() -> Iterator[Line]:
    """Promises whose measurement is a test."""
    yield pytest_line("traces of the training step over all three stages: 1", "tests/train", "-k", "trace")
    yield pytest_line("own jax.jit loop equals pq.fit, 100 steps, bitwise", "tests/train", "-k", "own_loop")
    yield pytest_line("linen, nnx, equinox, plain: same EBOPs, same integers", "tests", "-k", "frameworks")
    yield pytest_line("notebooks/quickstart.ipynb runs, outputs stripped", "tests/test_notebooks.py")
    yield pytest_line("every rounding x overflow x sign over all codes of <= 8 bits", "tests/numerics", "-k", "exhaustive")


def demo(skip_clone: bool) -> Iterator[Line]:
    """All lines of the first milestone."""
    parts: list[Callable[[], Iterator[Line]]] = [demo_lines, speed_lines, fuzz_lines, test_lines]
    for part in parts if skip_clone else [*parts, clone_lines]:
        yield from part()


def pruning(skip_clone: bool) -> Iterator[Line]:
    """All lines of the second milestone."""
    del skip_clone  # none of them installs anything
    yield from module("acceptance_pruning").lines()


WHOLE: Final = {"demo": demo, "pruning": pruning}
DIVIDED: Final = ("models", "hardware")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("milestone", choices=[*WHOLE, *DIVIDED])
    parser.add_argument("--skip-clone", action="store_true", help="leave out the lines that install from an empty clone")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"parts of the milestones {', '.join(DIVIDED)}")
    args = parser.parse_args()
    width = shutil.get_terminal_size((120, 20)).columns
    divided = module(f"acceptance_{args.milestone}") if args.milestone in DIVIDED else None
    parts = divided.PARTS if divided else {}
    if not set(args.only) <= set(parts):
        parser.error(f"--only is {' '.join(args.only)}, expected parts of {args.milestone}: {', '.join(parts) or 'it has none'}")
    found = divided.lines(args.only) if divided else WHOLE[args.milestone](args.skip_clone)
    failed = 0
    for line in found:
        failed += not line.holds
        word = "skip" if line.skipped else "ok  " if line.holds else "FAIL"
        print(f"{word} {line.name:<66} {line.figure}"[: max(width, 600)], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
