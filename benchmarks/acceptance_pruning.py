"""The lines of the milestone `pruning`: every method and constraint, measured afresh.  See `acceptance.py`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from lines import ROOT, Line, listed, module, pytest_line

MINUTES: Final = 15


def table_lines() -> Iterator[Line]:
    """The whole table of methods by its own command, into an empty folder."""
    methods = module("methods").METHODS
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_pruning.py"), "--out", folder]
        done = subprocess.run(command, stdout=subprocess.DEVNULL)
        written = sorted(p.name for p in Path(folder).iterdir() if p.stat().st_size)
        report: dict[str, Any] = json.loads((Path(folder) / "pruning.json").read_text()) if done.returncode == 0 else {"rows": []}
    whole = {(row["method"], row["target"]) for row in report["rows"]} == {(n, t) for n, m in methods.items() for t in m.levels}
    finite = all(np.isfinite(row[key]).all() for row in report["rows"] for key in ("accuracy", "ebops", "cost"))
    seconds = report.get("seconds", float("inf"))
    yield Line(
        f"every method in one table, 3 seeds, < {MINUTES} min",
        f"{len(report['rows'])} rows of {len(methods)} methods in {seconds:.0f} s: {', '.join(written)}",
        whole and finite and seconds < 60 * MINUTES and written == ["pruning.json", "pruning.md", "pruning.png"],
    )


def epoch_lines() -> Iterator[Line]:
    """Epochs of every method over float epochs."""
    for row in module("bench_methods").run(15):
        low, high = row["quartiles"]
        figure = f"{row['ratio']:.3f} (quartiles {low:.3f}..{high:.3f}, {row['pairs']} pairs, threads: {row['threads']})"
        name = f"epoch of {row['method']} / float, batch {row['batch']:,} <= {row['bar']}"
        yield Line(name, figure, row["ratio"] <= row["bar"])


def test_lines() -> Iterator[Line]:
    """Promises whose measurement is a test."""
    yield pytest_line("one YAML per method, each run for two epochs", "tests/test_configs.py")
    yield pytest_line("goldens of PQuantML, forward and gradients to 1e-5", "tests/prune", "tests/search", "-k", "golden")
    yield pytest_line("a loop of one's own with MDMM equals pq.fit, bitwise", "tests/constrain", "-k", "own_loop")


def sparsity_lines() -> Iterator[Line]:
    """What is reached of three targets, three seeds."""
    claims = module("claims")
    for name in claims.BY_TARGET:
        off = 100 * claims.reached(name).max()
        yield Line(f"{name}: sparsity within 0.5 point", f"{off:.3f} points at most", off <= 0.5)
    for name in claims.STRUCTURED:
        off = claims.groups_off(name)
        yield Line(f"{name}: within one group", f"{off:.2f} groups at most", off <= 1)


def random_lines() -> Iterator[Line]:
    """Every learned method against random masks."""
    for name, pair in module("claims").against_random().items():
        figure = (
            f"{100 * pair.difference:.2f} points, standard error {100 * pair.error:.2f}, accuracies {listed(pair.method, '.4f')}"
        )
        figure += f" against {listed(pair.random, '.4f')}"
        yield Line(
            f"{name} better than random (mean of 4 masks) at 90 %, five pairs, > 2 errors",
            figure,
            pair.difference > 2 * pair.error,
        )


def nm_lines() -> Iterator[Line]:
    """N:M in every group."""
    claims, methods = module("claims"), module("methods")
    for method in ("magnitude", "wanda", "pdp"):
        wrong = {ratio: claims.nm_violations(method, ratio) for ratio in methods.RATIOS}
        yield Line(
            f"{method}: N:M exact in every group after fine-tuning", f"groups that break it: {wrong}", not any(wrong.values())
        )


def constraint_lines() -> Iterator[Line]:
    """MDMM and PACA."""
    claims = module("claims")
    for name in claims.CONSTRAINTS:
        found = claims.settled(name)
        figure = f"{100 * found.off:.2f} % off, multiplier moves by {100 * found.drift:.1f} % in the last tenth of the training"
        yield Line(f"MDMM on {name}: within 1 %, multiplier settled", figure, found.off <= 0.01 and found.drift <= claims.STILL)
    outside = claims.patterns_outside()
    yield Line("PACA: every kernel on a dominant pattern", f"kernels that are not: {outside}", not any(outside.values()))


def _mean(rows: list[dict[str, Any]], method: str, key: str) -> float:
    return float(np.mean([row[key] for row in rows if row["method"] == method]))


def search_lines() -> Iterator[Line]:
    """FITCompress and HAWQ against uniform bits of as many operations, and at the goal of the paper's table."""
    rows = module("bench_search").run()
    searched = [r for r in rows if r["method"].startswith(("HAWQ", "FITCompress, EBOPs"))]
    yield Line(
        "FITCompress and HAWQ within their budget",
        f"{sum(r['within'] for r in searched)} of {len(searched)}",
        all(r["within"] for r in searched),
    )
    for method in dict.fromkeys(r["method"] for r in searched):
        uniform = f"uniform {method.split(' of ')[1]}"
        mine, theirs = (_mean(rows, m, "tuned_loss") for m in (method, uniform))
        yield Line(f"{method}: better than uniform", f"validation loss {mine:.4f} against {theirs:.4f}", mine < theirs)
    names = list(dict.fromkeys(r["method"] for r in rows if "cost" in r))
    figures = {n: tuple(np.array([_mean(rows, n, key)]) for key in ("test_accuracy", "cost")) for n in names}
    dense = figures[next(n for n in names if n.startswith("unpruned"))]
    once, twice = (_table_line(n, *figures[n], *dense) for n in names if n.startswith("FITCompress"))
    yield twice._replace(figure=f"{twice.figure} (in one search: {once.figure})")


def _table_line(name: str, accuracy: np.ndarray, cost: np.ndarray, dense_accuracy: np.ndarray, dense_cost: np.ndarray) -> Line:
    gap, share = 100 * (dense_accuracy.mean() - accuracy.mean()), dense_cost.mean() / cost.mean()
    costs = f"cost {cost.mean():,.0f}, 1/{share:.1f} of {dense_cost.mean():,.0f}"
    figure = f"{100 * accuracy.mean():.2f} %, {gap:.2f} points lower; {costs}"
    return Line(f"{name}: within 1 point at <= 1/8 of the cost", figure, bool(gap <= 1 and share >= 8))


def paper_lines() -> Iterator[Line]:
    """The paper's table in kind: DST and PDP at three granularities."""
    claims = module("claims")
    dense = claims.unpruned()
    for method in ("dst", "pdp"):
        for granularity in claims.GRANULARITIES:
            yield _table_line(f"{method} per {granularity}", *claims.compressed(method, granularity), *dense)


def shrink_lines() -> Iterator[Line]:
    """Models without their dead channels."""
    shrink = module("bench_shrink")
    yield Line(*shrink.shrink_line(shrink.run()))


def lines() -> Iterator[Line]:
    """All lines, the times first."""
    parts: list[Callable[[], Iterator[Line]]] = [
        table_lines, epoch_lines, sparsity_lines, random_lines, nm_lines, constraint_lines, paper_lines, search_lines,
        shrink_lines, test_lines,
    ]  # fmt: skip
    yield from (line for part in parts for line in part())
