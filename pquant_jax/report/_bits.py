"""Pictures of formats: which ranges and widths the sites have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from pquant_jax.report import _style as style
from pquant_jax.report._types import Profile, bits, check_kinds, layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLUMNS: Final = ("input", "kernel", "bias", "scale", "offset")
LABEL: Final = 36  # characters of a name beside a plot


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
    Weights on the left, activations with the input on the right; sites that leave their range are in another colour
    and say how many of their elements do.
    """
    check_kinds(profiles)
    groups = {"Weights": [p for p in profiles if p.kind != "input"], "Activations": [p for p in profiles if p.kind == "input"]}
    groups = {title: group for title, group in groups.items() if group}
    if not groups:
        return style.message("no site was profiled")
    height = 0.34 * max(map(len, groups.values())) + 1.3

    def draw(figure: Figure) -> None:
        for axes, (title, group) in zip(np.ravel(figure.subplots(1, len(groups))), groups.items(), strict=True):
            _draw_ranges(axes, group)
            axes.set_title(title)
        _range_legend(figure)

    return style.render(draw, (10, height), "observed values and representable ranges")


def bit_widths(profiles: Sequence[Profile]) -> str:
    """SVG: mean bits of each layer's activations and weights, and the histogram of the widths of its kernel.

    0 bits in the histogram are pruned weights; means count them as 0.
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
    scale = min(7.2 / max(columns, 8), 4.6 / max(rows, 4), 0.3)
    size = (max(columns * scale, 2.6) + 1.9, max(rows * scale, 0.9) + 1.1)

    def draw(figure: Figure) -> None:
        from matplotlib.colors import BoundaryNorm

        axes = figure.subplots()
        image = axes.imshow(
            widths, cmap=_with_pruned(top), norm=BoundaryNorm(np.arange(top + 2) - 0.5, top + 1), interpolation="none", aspect="auto"
        )
        style.bare(axes)
        zeros = np.mean(widths == 0)
        axes.set(xlabel="output", ylabel="input", title=f"{style.printable(profile.name, 30)}: {zeros:.0%} pruned")
        ticks = np.unique(np.linspace(0, top, min(top, 8) + 1).round().astype(int))
        bar = figure.colorbar(image, ax=axes, ticks=ticks)
        bar.ax.set_yticklabels(["0 (pruned)" if t == 0 else str(t) for t in ticks])
        bar.set_label("bits")
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)

    return style.render(draw, size, f"bits of each weight of {profile.name}")


def _draw_ranges(axes: Axes, group: Sequence[Profile]) -> None:
    spans = [_span(p) for p in group]
    positive = [q for p in group for q in np.asarray(p.quantiles, np.float64) if q > 0]
    exponents = [e for span in spans if span for e in span] + [float(np.log2(q)) for q in positive] or [0.0]
    left, right = np.floor(min(exponents)) - 1, np.ceil(max(exponents)) + 1
    for row, (profile, span) in enumerate(zip(group, spans, strict=True)):
        if span:
            axes.barh(row, span[1] - span[0], 0.74, left=span[0], color=style.RANGE, zorder=2)
        outside = out_of_range(profile)
        colour = style.VERMILION if outside else style.BLUE
        with np.errstate(divide="ignore"):
            low, q25, q50, q75, high = np.maximum(np.log2(np.asarray(profile.quantiles, np.float64)), left)
        axes.plot([low, high], [row, row], color=colour, linewidth=1.1, zorder=3, solid_capstyle="butt")
        axes.barh(row, q75 - q25, 0.4, left=q25, color=colour, zorder=4)
        axes.plot([q50, q50], [row - 0.2, row + 0.2], color="white", linewidth=1.6, zorder=5, solid_capstyle="butt")
        note = "0 bits" if span is None else f"{_percent(outside)} out of range" if outside else ""
        axes.text(1.01, row, note, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=colour)
    step = max(1, round((right - left) / 8))
    ticks = np.arange(np.ceil(left / step) * step, right + 1, step)
    axes.set_xticks(ticks, [style.power_of_two(t) for t in ticks])
    axes.set_yticks(range(len(group)), [style.printable(p.name, LABEL) for p in group])
    axes.set_xlim(left, right)
    axes.set_ylim(len(group) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("|value|")


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
        Patch(color=style.VERMILION, label="observed beyond the representable range"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)


def _kernel_widths(profiles: Sequence[Profile], name: str) -> np.ndarray:
    widths = [bits(p).ravel() for p in profiles if layer(p) == name and p.kind == "kernel"]
    return np.concatenate(widths) if widths else np.zeros(0, int)


def _draw_table(axes: Axes, table: np.ndarray, layers: Sequence[str], columns: Sequence[str]) -> None:
    top = max(float(np.nanmax(table)), 1.0)
    axes.imshow(table, cmap=style.shades(256), vmin=0, vmax=top, interpolation="none", aspect="auto")
    style.bare(axes)
    axes.set_xticks(range(len(columns)), ["activation" if c == "input" else c for c in columns])
    axes.set_yticks(range(len(layers)), [style.printable(name, LABEL) for name in layers])
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
        colours = [style.PRUNED] + [style.BLUE] * top
        axes.bar(range(top + 1), -0.78 * share / share.max(), 0.82, bottom=row + 0.42, color=colours, zorder=2)
        if share[0] > 0:
            axes.text(0, row + 0.36, _percent(share[0]), ha="center", va="bottom", fontsize=7.5, color=style.INK, zorder=3)
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.set_xticks(range(0, top + 1, 1 if top < 17 else 2))
    axes.set_xlim(-0.7, top + 0.7)
    axes.set(xlabel="bits of one weight (0 = pruned)", title="Kernel widths, share of the weights")


def _with_pruned(top: int) -> Colormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap([style.PRUNED, *style.shades(top).colors][: top + 1])
