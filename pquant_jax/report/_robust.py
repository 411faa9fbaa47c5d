"""Pictures of flipped bits: accuracy against the rate of flips, and which bits of which layer matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pquant_jax.report import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class FlipCurve(NamedTuple):
    """One line of `flip_rates`.  rates: (R,), above 0.  figure: (R, trials)."""

    name: str
    rates: np.ndarray
    figure: np.ndarray


def flip_rates(curves: Sequence[FlipCurve], *, clean: float, metric: str = "accuracy", xlabel: str = "flip rate per bit") -> str:
    """SVG: the mean over the trials against the rate, on a log axis, with a band from the 10 % to the 90 % quantile.

    clean: the figure without flips, a dashed line.
    """
    curves = [c for c in curves if len(c.rates)]
    if not curves:
        return style.message("no bit was flipped")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(clean, color=style.MUTED, lw=1, ls=(0, (4, 3)))
        place: Any = dict(xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")
        axes.annotate("no flips", (1, clean), (-4, 3), color=style.MUTED, **place)
        for n, curve in enumerate(curves):
            _draw_curve(axes, curve, style.CYCLE[n % len(style.CYCLE)])
        axes.set_xscale("log")
        rates = np.concatenate([c.rates for c in curves])
        style.log_axis(axes.xaxis, float(rates.min()), float(rates.max()))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(metric)
        axes.set_title(f"{metric[:1].upper()}{metric[1:]} under bit flips")
        axes.legend(loc="lower left")

    return style.render(draw, (6.4, 4.0), f"{metric} against the rate of bit flips")


def _draw_curve(axes: Axes, curve: FlipCurve, color: str) -> None:
    low, high = np.quantile(curve.figure, (0.1, 0.9), axis=1)
    axes.fill_between(curve.rates, low, high, color=color, alpha=0.13, lw=0)
    axes.plot(curve.rates, curve.figure.mean(1), color=color, marker="o", ms=3.5, label=style.printable(curve.name, 40))


def bit_map(scores: Mapping[str, Any], *, unit: str = "change of the loss") -> str:
    """SVG: a heat map of the mean score of every bit position (columns, the highest bit on the left) per site (rows).

    scores: {site: (bits,)}, from the lowest bit; nan or 0 where no element has such a bit.  Decades of shade; grey
    cells have no bits.  The number in a cell is log10 of the score.
    """
    rows = {name: np.asarray(v, np.float64) for name, v in scores.items()}
    if not rows or not any((v > 0).any() for v in rows.values()):
        return style.message("no bit has a score")
    width = max(len(v) for v in rows.values())
    table = np.full((len(rows), width), np.nan)
    for n, v in enumerate(rows.values()):
        with np.errstate(divide="ignore"):
            table[n, : len(v)] = np.where(v > 0, np.log10(np.where(v > 0, v, 1.0)), np.nan)
    table = table[:, ::-1]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        low, high = float(np.floor(np.nanmin(table))), float(np.ceil(np.nanmax(table)))
        colors = style.shades(64, 0.04).with_extremes(bad=style.GRID)
        shown = axes.imshow(np.ma.masked_invalid(table), cmap=colors, vmin=low, vmax=max(high, low + 1), aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                dark = value > low + 0.6 * (max(high, low + 1) - low)
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else style.INK)
        axes.set_xticks(range(width), [str(width - 1 - n) for n in range(width)])
        axes.set_yticks(range(len(rows)), [style.short_name(name, 28) for name in rows])
        axes.set_xlabel("bit of the stored code (0 is the lowest)")
        axes.set_title("Sensitivity per layer and bit")
        style.bare(axes)
        bar = figure.colorbar(shown, ax=axes, pad=0.015, fraction=0.035)
        bar.set_label(f"log₁₀ of the {unit}", color=style.MUTED)
        bar.outline.set_visible(False)

    return style.render(draw, (max(5.0, 0.55 * width + 3.2), 0.36 * len(rows) + 1.4), "sensitivity per layer and bit")
