"""Pictures of PACA: how often which pattern of zeros occurs, and what the projection does to the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.report import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS: Final = 60  # of a histogram; what comes behind is in one bar
MOST_ICONS: Final = 16
REST: Final = "#9AA5B1"


def pattern_histogram(report: Mapping[str, Any], *, shape: tuple[int, int] | None = None, name: str = "") -> str:
    """SVG: kernels per pattern, most frequent first, the dominant set in blue with its patterns drawn below.

    report: of one layer, from `pq.constrain.patterns(...).report`; "counts", "patterns", "covered" and the bits are read.
    shape: (rows, columns) of a pattern, such as (3, 3); default one row.  name: of the layer, for the title.
    Raises: DataError for a shape that the patterns don't have.
    """
    counts, table = [int(v) for v in report["counts"]], np.asarray(report["patterns"], int)
    rows, columns = _shape_of(table, shape)
    dominant, shown = len(table), counts[:MOST_BARS]
    left = sum(counts[MOST_BARS:])
    icons = table[:MOST_ICONS].reshape(-1, rows, columns)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, height_ratios=(3, 1))
        colours = [style.BLUE] * min(dominant, len(shown)) + [REST] * max(len(shown) - dominant, 0)
        above.bar(range(1, len(shown) + 1), shown, color=colours, width=0.8)
        if left:
            above.bar([len(shown) + 2], [left], color=REST, width=0.8, hatch="///", edgecolor="white")
            above.annotate("all others", (len(shown) + 2, left), ha="center", va="bottom", fontsize=8)
        above.set(xlabel="pattern, by frequency", ylabel="kernels", title=_title(name, "how often each pattern of zeros occurs"))
        style.integer_axes(above.xaxis, above.yaxis)
        above.grid(visible=False, axis="x")
        words = f"{dominant} of {len(counts)} patterns cover {report['covered']:.0%} of the kernels"
        stored, mask = report["table_bits"] + report["index_bits"], report["mask_bits"]
        words += f"\n{stored:,} bits for patterns and numbers, {mask:,} for a mask"
        above.text(0.98, 0.95, words, transform=above.transAxes, ha="right", va="top", color=style.MUTED)
        _draw_icons(below, icons, [f"{k}" for k in report["kernels"][:MOST_ICONS]])
        more = f", the first {MOST_ICONS} of {dominant}" if dominant > MOST_ICONS else ""
        below.set_title(f"Dominant patterns{more}, with the kernels next to each", fontsize=9)

    return style.render(draw, (8, 4.6), f"{_title(name, 'kernels per pattern of zeros')}")


def pattern_kernels(before: np.ndarray, after: np.ndarray, *, name: str = "", kernels: int = 24) -> str:
    """SVG: the first kernels before and, below, after the projection on the dominant patterns.

    Crosses are zeros, bold ones those that the projection made.

    before, after: (n, rows, columns), the weights of every kernel.  kernels: how many are drawn, at most.
    Raises: DataError for arrays of another or of different shapes.
    """
    before, after = (np.asarray(v, np.float64) for v in (before, after))
    if before.ndim != 3 or before.shape != after.shape or not before.size:
        raise DataError(f"pattern_kernels: got shapes {before.shape} and {after.shape}, expected (n, rows, columns) twice")
    pairs = [v[:kernels] for v in (before, after)]
    largest = max(float(np.abs(pairs[0]).max()), float(np.abs(pairs[1]).max())) or 1.0
    across = min(len(pairs[0]), 12)
    lines = -(-len(pairs[0]) // across)
    kept = np.mean([np.array_equal(a != 0, b != 0) for a, b in zip(before, after, strict=True)])

    def draw(figure: Figure) -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        grid = figure.subplots(2, 1)
        image = ScalarMappable(Normalize(-largest, largest), style.diverging())
        for axes, stack, title in zip(grid, pairs, ("before", f"after; {kept:.0%} of all kernels keep their zeros"), strict=True):
            _draw_stack(axes, stack, pairs[0], across, image)
            axes.set_title(_title(name, title))
        bar = figure.colorbar(image, ax=grid, shrink=0.7, label="weight")
        bar.outline.set_visible(False)

    height = 2 * lines * before.shape[1] / max(before.shape[2], 1) * 0.62 + 1.4
    return style.render(draw, (9, max(height, 2.6)), f"{_title(name, 'kernels before and after the projection')}")


def _shape_of(table: np.ndarray, shape: tuple[int, int] | None) -> tuple[int, int]:
    size = table.shape[1] if table.ndim == 2 else 0
    found = (1, size) if shape is None else shape
    if found[0] * found[1] != size or not size:
        raise DataError(f"pattern_histogram: shape is {found}, expected one of {size} places, as the patterns have")
    return found


def _title(name: str, words: str) -> str:
    return f"{style.short_name(name)}: {words}" if name else words[:1].upper() + words[1:]


def _draw_icons(axes: Axes, icons: np.ndarray, labels: list[str]) -> None:
    """Patterns side by side, filled where weights are, with what is written below."""
    from matplotlib.patches import Rectangle

    n, rows, columns = icons.shape
    step = columns + 1.0
    for index, icon in enumerate(icons):
        for (r, c), there in np.ndenumerate(icon):
            face = style.BLUE if there else "white"
            axes.add_patch(Rectangle((index * step + c, -r), 1, 1, facecolor=face, edgecolor=REST, linewidth=0.6))
        axes.text(index * step + columns / 2, -rows + 0.6, labels[index], ha="center", va="top", fontsize=8)
    axes.set(xlim=(-0.5, max(n, 8) * step), ylim=(-rows - 0.9, 1.3), aspect="equal", xticks=[], yticks=[], anchor="W")
    style.bare(axes)


def _draw_stack(axes: Axes, stack: np.ndarray, before: np.ndarray, across: int, image: Any) -> None:
    """Kernels in lines of `across`; a zero is white with a cross, bold where there was a weight before."""
    from matplotlib.patches import Rectangle

    _, rows, columns = stack.shape
    for index, kernel in enumerate(stack):
        left, top = (index % across) * (columns + 0.7), -(index // across) * (rows + 0.7)
        for (r, c), value in np.ndenumerate(kernel):
            face = image.to_rgba(value) if value else "white"
            axes.add_patch(Rectangle((left + c, top - r - 1), 1, 1, facecolor=face, edgecolor=REST, linewidth=0.5))
            if not value:
                colour, weight = (style.INK, 1.5) if before[index, r, c] else (REST, 0.7)
                axes.plot(left + c + 0.5, top - r - 0.5, marker="x", color=colour, markersize=4, markeredgewidth=weight)
    lines = -(-len(stack) // across)
    axes.set(xlim=(-0.2, across * (columns + 0.7)), ylim=(-lines * (rows + 0.7), 0.3), aspect="equal", xticks=[], yticks=[])
    style.bare(axes)
