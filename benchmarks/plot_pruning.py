"""The picture of `bench_pruning.py`: accuracy against sparsity, and against da4ml's cost, one line per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's palette and a mark each: told apart with every kind of colour blindness, and in grey
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#222222", "#7A5C00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
INK, MUTED = "#222B36", "#5B6673"
FLOORS = {"weight": 62.0, "channel": 20.0, "N:M": 62.0}  # %: what lies lower is drawn on the edge, with its number
TITLES = {"weight": "single weights", "channel": "output channels of the hidden layers", "N:M": "N of every M"}
TICKS = (500, 1000, 2000, 5000, 10_000, 20_000, 40_000)


def picture(report: dict[str, Any], path: Path) -> None:
    """Draw it.  Raises: ToolError without matplotlib."""
    import matplotlib

    from pquant_jax.report._style import STYLE

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in report["rows"] if row["method"] != "none"]
    dense = next((row for row in report["rows"] if row["method"] == "none"), None)
    with plt.rc_context({**STYLE, "font.size": 8.5}):
        figure, axes = plt.subplots(2, 3, figsize=(15, 10), constrained_layout=True)
        for column, family in enumerate(TITLES):
            for line, key in enumerate(("zeros", "cost")):
                own = [row for row in rows if row["family"] == family]
                panel(axes[line][column], own, dense, key, FLOORS[family])
                axes[line][column].set_title(TITLES[family])
        figure.suptitle(f"Embedded jets, 8 bits, {report['plan']}: mean and standard deviation of 3 seeds", color=INK)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def panel(axis: Any, rows: list[dict[str, Any]], dense: dict[str, Any] | None, key: str, floor: float) -> None:
    """One family of methods against `key`, every line labelled where it ends."""
    factor = 100 if key == "zeros" else 1
    names = list(dict.fromkeys(_series(row) for row in rows))
    ends = []
    for n, name in enumerate(names):
        own = sorted((r for r in rows if _series(r) == name), key=lambda r: np.mean(r[key]))
        x = np.array([factor * np.mean(r[key]) for r in own])
        y = np.array([100 * np.mean(r["accuracy"]) for r in own])
        spread = np.array([100 * np.std(r["accuracy"], ddof=1) for r in own])
        colour, mark = (MUTED, "x") if name == "random" else (PALETTE[n % len(PALETTE)], MARKS[n % len(MARKS)])
        dash = "-" if n < len(PALETTE) else "--"  # colours come again, dashed and with another mark
        shown = np.maximum(y, floor)
        spread = np.where(y < floor, 0, np.minimum(spread, shown - floor))
        axis.errorbar(x, shown, spread, color=colour, marker=mark, ls=dash, ms=5, capsize=2, lw=1.3, elinewidth=0.8, label=name)
        for a, b in zip(x, y, strict=True):
            if b < floor:
                axis.annotate(f"{b:.0f}", (a, floor), (0, -11), textcoords="offset points", color=colour, ha="center", fontsize=7)
        at = -1 if key == "zeros" else 0  # the sparsest, which is the cheapest
        ends.append((x[at], shown[at], name, colour))
    if dense is not None:
        level = 100 * float(np.mean(dense["accuracy"]))
        axis.axhline(level, color=MUTED, lw=1, ls="--")
        note = f"unpruned {level:.1f} %" + (f", cost {np.mean(dense['cost']):,.0f}" if key == "cost" else "")
        axis.annotate(
            note, (0.98, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", color=MUTED, ha="right"
        )
    axis.set_ylim(floor - 0.08 * (68.2 - floor), 68.8 if floor > 50 else 72)
    axis.set_ylabel("test accuracy, %")
    if key == "zeros":
        axis.set_xlabel("zeros of all kernels, %")
    else:
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
        axis.set_xticks([], minor=True)
        reach = [float(np.mean(row[key])) for row in rows]
        axis.set_xlim(1.2 * max(reach), min(reach) / 1.2)  # so that in both rows sparser is further right
        axis.set_xlabel("da4ml cost (LUTs), log scale, cheaper to the right")
    _labels(axis, ends)


def _series(row: dict[str, Any]) -> str:
    """The line that a row belongs to: an N:M method's ratios are one line."""
    return row["method"].rsplit(" ", 1)[0] if row["family"] == "N:M" else row["method"].removesuffix(", channels")


def _labels(axis: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of the lines, pushed apart so that none covers another."""
    low, high = axis.get_ylim()
    gap = (high - low) * 0.036
    places = []
    for _, y, *_ in sorted(ends, key=lambda e: e[1]):
        places.append(max(y, places[-1] + gap) if places else max(y, low + gap))
    excess = max(0.0, places[-1] - high + gap) if places else 0.0
    for n in range(len(places) - 1, -1, -1):
        top = places[n + 1] - gap if n + 1 < len(places) else high - gap
        places[n] = min(places[n], top) if excess else places[n]
    for place, (x, y, name, colour) in zip(places, sorted(ends, key=lambda e: e[1]), strict=True):
        axis.annotate(
            name,
            (x, y),
            (1.03, place),
            textcoords=("axes fraction", "data"),
            color=colour,
            va="center",
            ha="left",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
            annotation_clip=False,
        )
