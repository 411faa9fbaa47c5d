"""Pictures of formats: which ranges and widths the sites have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pquant_jax.report import _style as style
from pquant_jax.report._types import ACTIVATIONS, Profile, bits, check_kinds, layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLUMNS: Final = ("input", "kernel", "bias", "scale", "offset", "table", "output")
NARROW: Final = 22  # characters of a name beside one of two plots in a row


def out_of_range(profile: Profile) -> float:
    """The fraction of a site's elements that saw a value which their format can't hold, after rounding.

    Range of the format: -k * 2^i .. 2^i - 2^-f.  Elements of no bits are left out: they are meant to be 0.

    >>> p = Profile("a/input", "input", np.array(0), np.array([1, 3]), np.array(4), 0.0, 2.5, np.zeros(5))
    >>> out_of_range(p)
    0.5
    """
    arrays = (profile.k, profile.i, profile.f, profile.low, profile.high)
    k, i, f, low, high = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in arrays))
    half = np.exp2(-f - 1)
    out = (high >= np.exp2(i) - half) | (low < -k * np.exp2(i) - half)
    alive = k + i + f > 0
    return float(out[alive].mean()) if alive.any() else 0.0


def ranges(profiles: Sequence[Profile]) -> str:
    """SVG: per site a box of |value| (quartiles, median; whiskers to the extremes) over its representable range.

    Log2 axis; the grey bar goes from the finest step 2^-f to the largest magnitude 2^i over the elements with bits.
    Boxes of weights are of the non-zero ones; a box of activations that reaches the left edge goes on to exact zeros.
    Weights on the left, activations with the input on the right; sites that leave their range are in another colour
    and say how many of their elements do.
    """
    check_kinds(profiles)
    groups = {
        "Weights": [p for p in profiles if p.kind not in ACTIVATIONS],
        "Activations": [p for p in profiles if p.kind in ACTIVATIONS],
    }
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return style.message("no site was profiled")
    sizes = [len(group) for group in groups.values()]
    stacked = max(len(style.short_name(p.name)) for p in profiles) > NARROW
    heights = sizes if stacked else [max(sizes)]

    def draw(figure: Figure) -> None:
        shape = (len(groups), 1) if stacked else (1, len(groups))
        grid = np.ravel(figure.subplots(*shape, height_ratios=heights, squeeze=False))
        for axes, (title, group) in zip(grid, groups.items(), strict=True):
            _draw_ranges(axes, group, len(group) if stacked else max(sizes))
            axes.set_title(title)
        _range_legend(figure)

    return style.render(draw, (10, 0.34 * sum(heights) + 0.8 * len(heights) + 0.5), "observed values and representable ranges")


def bit_widths(profiles: Sequence[Profile]) -> str:
    """SVG: mean bits of each layer's activations and weights, and the histogram of the widths of its kernel.

    0 bits in the histogram are pruned weights, whose share is written on their bar; the other bars of a layer are
    scaled to the tallest of them.  Means count pruned weights as 0 bits.
    """
    check_kinds(profiles)
    layers = list(dict.fromkeys(layer(p) for p in profiles))
    columns = [kind for kind in COLUMNS if any(p.kind == kind for p in profiles)]
    if not layers:
        return style.message("no site was profiled")
    table = np.full((len(layers), len(columns)), np.nan)
    for row, column in np.ndindex(table.shape):
        widths = [bits(p).ravel() for p in profiles if layer(p) == layers[row] and p.kind == columns[column]]
        table[row, column] = np.concatenate(widths).mean() if widths else np.nan
    kernels = [_kernel_widths(profiles, name) for name in layers]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[0.55 * len(columns) + 0.4, 3.2])
        _draw_table(left, table, layers, columns)
        _draw_histograms(right, kernels)

    return style.render(draw, (10, 0.46 * len(layers) + 1.3), "bits per layer")


def kernel_bits(profile: Profile) -> str:
    """SVG: the bits of every weight of a kernel, its inputs down and its outputs along; pruned weights (0 bits) in
    a colour of their own.  More than two axes: all but the last count as inputs."""
    widths = np.atleast_1d(bits(profile))
    widths = widths.reshape(-1, widths.shape[-1])
    top = int(widths.max(initial=0))
    rows, columns = widths.shape
    size = (4.9, float(np.clip(3.6 * rows / columns, 1.1, 3.6)) + 0.9)  # one width, so that kernels align on the page

    def draw(figure: Figure) -> None:
        from matplotlib.colors import BoundaryNorm

        axes = figure.subplots()
        image = axes.imshow(
            widths,
            cmap=_with_pruned(top),
            norm=BoundaryNorm(np.arange(top + 2) - 0.5, top + 1),
            interpolation="none",
            aspect="auto",
        )
        style.bare(axes)
        style.integer_axes(axes.xaxis, axes.yaxis)
        zeros = np.mean(widths == 0)
        axes.set(xlabel="output", ylabel="input", title=f"{style.short_name(profile.name)}\n{zeros:.0%} pruned")
        ticks = np.unique(np.linspace(0, top, min(top, 8) + 1).round().astype(int))
        bar = figure.colorbar(image, ax=axes, ticks=ticks)
        bar.minorticks_off()
        bar.ax.set_yticklabels(["0, pruned" if t == 0 else str(t) for t in ticks])
        bar.ax.set_title("bits", fontsize=9, fontweight="normal", color=style.MUTED)
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)

    return style.render(draw, size, f"bits of each weight of {profile.name}")


def _draw_ranges(axes: Axes, group: Sequence[Profile], rows: int) -> None:
    spans, quantiles = [_span(p) for p in group], [_quantiles(p) for p in group]
    left, right = _limits(spans, quantiles)
    for row, (profile, span, points) in enumerate(zip(group, spans, quantiles, strict=True)):
        if span:
            axes.barh(row, span[1] - span[0], 0.74, left=span[0], color=style.RANGE, zorder=2)
        outside = out_of_range(profile)
        colour = style.VERMILION if outside else style.BLUE
        low, q25, q50, q75, high = np.maximum(points, left)
        axes.plot([low, high], [row, row], color=colour, linewidth=1.1, zorder=3, solid_capstyle="butt")
        axes.barh(row, q75 - q25, 0.4, left=q25, color=colour, zorder=4)
        if q50 > left:
            axes.plot([q50, q50], [row - 0.2, row + 0.2], color="white", linewidth=1.6, zorder=5, solid_capstyle="butt")
        note = "0 bits" if span is None else f"{_percent(outside)} out" if outside else ""
        axes.text(
            1.01, row, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=colour if span else style.MUTED
        )
    step = max(1, round((right - left) / 8))
    ticks = np.arange(np.ceil(left / step) * step, right + 1, step)
    axes.set_xticks(ticks, [style.power_of_two(t) for t in ticks])
    axes.set_yticks(range(len(group)), [style.short_name(p.name) for p in group])
    axes.set_xlim(left, right)
    axes.set_ylim(rows - 0.4, -0.6)  # equal in both panels, so that their bars are of one height
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("|value|")


def _quantiles(profile: Profile) -> np.ndarray:
    """log2 of the five points of |value|: of the non-zero weights where they are known, as zeros have no logarithm."""
    points = np.asarray(profile.quantiles, np.float64)
    if profile.values is not None and np.any(profile.values):
        magnitudes = np.abs(np.asarray(profile.values, np.float64))
        points = np.quantile(magnitudes[magnitudes > 0], [0, 0.25, 0.5, 0.75, 1])
    with np.errstate(divide="ignore"):
        return np.log2(points)


def _limits(spans: Sequence[tuple[float, float] | None], quantiles: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of the log2 axis: every box, and no more than a little below the finest step, where all rounds to 0."""
    finite = [float(e) for points in quantiles for e in points if np.isfinite(e)] + [e for s in spans if s for e in s]
    low = min((s[0] for s in spans if s), default=min(finite, default=0.0))
    return np.floor(max(min(finite, default=0.0), low - 3)) - 1, np.ceil(max(finite, default=0.0)) + 1


def _percent(fraction: float) -> str:
    return "<1%" if fraction < 0.01 else f"{fraction:.0%}"


def _span(profile: Profile) -> tuple[float, float] | None:
    """log2 of the finest step and of the largest magnitude over the elements that have bits."""
    k, i, f = np.broadcast_arrays(*(np.asarray(a, np.float64) for a in (profile.k, profile.i, profile.f)))
    alive = k + i + f > 0
    return (-float(f[alive].max()), float(i[alive].max())) if alive.any() else None


def _range_legend(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=style.RANGE, label="representable: step to largest value"),
        Patch(color=style.BLUE, label="observed: quartiles, median, extremes"),
        Patch(color=style.VERMILION, label="observed, some elements out of range"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)


def _kernel_widths(profiles: Sequence[Profile], name: str) -> np.ndarray:
    widths = [bits(p).ravel() for p in profiles if layer(p) == name and p.kind == "kernel"]
    return np.concatenate(widths) if widths else np.zeros(0, int)


def _draw_table(axes: Axes, table: np.ndarray, layers: Sequence[str], columns: Sequence[str]) -> None:
    top = max(float(np.nanmax(table)), 1.0)
    axes.imshow(table, cmap=style.shades(256, 0.06), vmin=0, vmax=top, interpolation="none", aspect="auto")
    style.bare(axes)
    axes.set_xticks(range(len(columns)), ["activation" if c == "input" else c for c in columns])
    axes.set_yticks(range(len(layers)), [style.short_name(name) for name in layers])
    axes.tick_params(labeltop=len(layers) > 12)
    axes.set_title("Mean bits")
    for (row, column), value in np.ndenumerate(table):
        text = "–" if np.isnan(value) else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if value > 0.6 * top else style.INK)


def _draw_histograms(axes: Axes, kernels: Sequence[np.ndarray]) -> None:
    top = max([int(widths.max(initial=0)) for widths in kernels] + [4])
    for row, widths in enumerate(kernels):
        axes.axhline(row + 0.42, color=style.GRID, linewidth=0.8, zorder=1)
        if not widths.size:
            continue
        share = np.bincount(widths.astype(int), minlength=top + 1) / widths.size
        height = np.minimum(share / max(share[1:].max(initial=0), 1e-9), 1)  # many pruned weights must not flatten the rest
        colours = [style.PRUNED] + [style.BLUE] * top
        axes.bar(range(top + 1), -0.72 * height, 0.82, bottom=row + 0.42, color=colours, zorder=2)
        if share[0] > 0:
            axes.text(0, row + 0.36, _percent(share[0]), ha="center", va="bottom", fontsize=8, color=style.INK, zorder=3)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.set_xticks(range(0, top + 1, 1 if top < 17 else 2))
    axes.set_xlim(-0.7, top + 0.7)
    axes.set(xlabel="bits of a weight (0: pruned, with its share)", title="Kernel widths")


def _with_pruned(top: int) -> Colormap:
    from matplotlib.colors import ListedColormap

    shades: Any = style.shades(top)
    return ListedColormap([style.PRUNED, *shades.colors][: top + 1])
