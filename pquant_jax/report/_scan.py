"""Pictures of precision scans: the metric over ap_fixed<W, I>, against the width, the response, and layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.report import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARED: Final = "QAT"
MARKERS: Final = "oDsv^P"
MOST_BARS: Final = 24

Compared = Mapping[str, Iterable[Any]] | Iterable[Any]


class Scan(Protocol):
    """What the pictures read of `pq.search.Scanned`."""

    @property
    def widths(self) -> Sequence[int]:
        """W of ap_fixed<W, I>, bits."""
        ...

    @property
    def integers(self) -> Sequence[int]:
        """I, bits."""
        ...

    @property
    def metric(self) -> np.ndarray:
        """(widths, integers)."""
        ...

    @property
    def values(self) -> Mapping[str, np.ndarray]:
        """The same of every metric."""
        ...

    @property
    def baseline(self) -> Mapping[str, float]:
        """Every metric of the float model."""
        ...

    @property
    def name(self) -> str:
        """Of the first metric."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Of the first metric."""
        ...


class _Table(NamedTuple):
    """A scan with its axes in rising order.  score: larger is better, -inf where the metric is none."""

    widths: np.ndarray
    integers: np.ndarray
    values: np.ndarray
    score: np.ndarray
    order: tuple[np.ndarray, np.ndarray]


def _table(scanned: Scan) -> _Table:
    values = np.asarray(scanned.metric, np.float64)
    shape = (len(scanned.widths), len(scanned.integers))
    if values.shape != shape:
        raise DataError(
            f"the scan's metric has shape {values.shape}, expected {shape}: choose one index of the groups with axes of their "
            "own, scanned._replace(metric=scanned.metric[:, :, j, l])"
        )
    rows, columns = np.argsort(scanned.widths), np.argsort(scanned.integers)
    values = values[np.ix_(rows, columns)]
    score = np.where(np.isnan(values), -np.inf, values if scanned.higher_is_better else -values)
    return _Table(np.asarray(scanned.widths)[rows], np.asarray(scanned.integers)[columns], values, score, (rows, columns))


def _best(scanned: Scan, t: _Table) -> int:
    """Column of the integer bits with the best mean over all widths; what is off the range of colours counts the same."""
    low, high = _limits(t.values, scanned.baseline[scanned.name], scanned.higher_is_better)
    worst = low if scanned.higher_is_better else high
    mean = np.clip(np.where(np.isnan(t.values), worst, t.values), low, high).mean(axis=0)
    return int(np.argmax(mean if scanned.higher_is_better else -mean))


def scan_map(scanned: Scan, *, drop: float | None = None, unit: str = "") -> str:
    """SVG: the metric over total width W (across) and integer bits I (up), every cell with its value; dark is good.

    scanned: from `pq.scan`.  drop: outlines the cells that are at most so much worse than the float model, in units of the
    metric.  unit: of the metric, for the labels.  Raises: DataError for a scan with more than the two axes.
    """
    t = _table(scanned)
    baseline, name = scanned.baseline[scanned.name], style.printable(scanned.name, 30)
    low, high = _limits(t.values, baseline, scanned.higher_is_better)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        colours = style.shades(256, 0.03)
        colours = colours if scanned.higher_is_better else colours.reversed()
        image = axes.imshow(t.values.T, origin="lower", cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
        style.bare(axes)
        axes.set_facecolor(style.GRID)  # of cells without a value
        axes.set_xticks(range(len(t.widths)), [str(w) for w in t.widths])
        axes.set_yticks(range(len(t.integers)), [str(n) for n in t.integers])
        axes.set(xlabel="total width W [bits]", ylabel="integer bits I, sign included")
        axes.set_title(f"{_titled(name, unit, capital=True)} of ap_fixed<W,I>; float {_number(baseline, unit)}")
        extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
        beyond = extend.get((bool(np.any(t.values < low)), bool(np.any(t.values > high))), "neither")
        bar = figure.colorbar(image, ax=axes, shrink=0.9, extend=beyond, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(_titled(name, unit))
        if t.values.size <= 150:
            _write_cells(axes, t.values, low, high, dark_is_high=scanned.higher_is_better)
        if drop is not None:
            good = t.score >= (baseline if scanned.higher_is_better else -baseline) - drop
            _outline(axes, good.T)
            text = f"outlined: at most {_number(drop, unit)} worse than float"
            axes.text(1, 1.0, text, transform=axes.transAxes, ha="right", va="bottom", color=style.VERMILION, fontsize=8)
            axes.set_title(axes.get_title(loc="left"), pad=16)

    size = (min(2.6 + 0.62 * len(t.widths), 11), min(1.7 + 0.36 * len(t.integers), 9))
    return style.render(draw, (max(size[0], 6.4), max(size[1], 3.2)), f"{name} over width and integer bits")


def _limits(values: np.ndarray, baseline: float, higher_is_better: bool) -> tuple[float, float]:
    """The range of colours: for a metric without an upper end what is six times the float model's is one shade."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return baseline, baseline + 1
    low, high = float(min(finite.min(), baseline)), float(max(finite.max(), baseline))
    if not higher_is_better and baseline > 0:
        high = min(high, max(6 * baseline, float(np.quantile(finite, 0.4))))
    return low, high if high > low else low + 1


def _titled(name: str, unit: str, *, capital: bool = False) -> str:
    name = name[:1].upper() + name[1:] if capital else name
    return f"{name} [{style.printable(unit, 12)}]" if unit else name


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}{' ' + style.printable(unit, 12) if unit else ''}"


def _write_cells(axes: Axes, values: np.ndarray, low: float, high: float, *, dark_is_high: bool) -> None:
    digits = 3 if max(abs(low), abs(high)) < 9.995 else 1
    for (row, column), value in np.ndenumerate(values):
        known = bool(np.isfinite(value))
        depth = float(np.clip((value - low) / (high - low), 0, 1)) if known else float(not dark_is_high)
        plain = f"{value:.{digits}f}"
        shown = (plain if len(plain) <= 6 else f"{value:.0e}".replace("e+0", "e")) if known else "–"
        dark = (depth if dark_is_high else 1 - depth) > 0.55
        axes.text(row, column, shown, ha="center", va="center", fontsize=8, color="white" if dark else style.INK)


def _outline(axes: Axes, good: np.ndarray) -> None:
    """A line around every region of True cells of an image."""
    padded = np.pad(good, 1)
    lines = []
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append([(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)])
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)])
    from matplotlib.collections import LineCollection

    axes.add_collection(LineCollection(lines, colors=style.VERMILION, linewidths=1.8, capstyle="round"))
    axes.margins(0.01)


def scan_lines(scanned: Scan, *, unit: str = "", compared: Compared = (), log: bool = False) -> str:
    """SVG: the metric against the width with one line per I; the best I is emphasised, the float model dashed.

    compared: points (W, I, value) of other models, such as those that `pq.search.trained` gives, or {label: points};
      without a label they are called "QAT".
    unit: of the metric.  log: a logarithmic vertical axis.
    """
    t = _table(scanned)
    name, baseline = style.printable(scanned.name, 30), scanned.baseline[scanned.name]
    best, others = _best(scanned, t), _compared(compared)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shades = style.shades(len(t.integers) + 1, 0.28)
        for column, n in enumerate(t.integers):
            strong = column == best
            axes.plot(
                t.widths, t.values[:, column], label=f"I = {n}" + ("  (best)" if strong else ""), zorder=4 if strong else 2,
                color=style.VERMILION if strong else shades(column + 1), linewidth=2.4 if strong else 1.1,
                marker="o", markersize=4.5 if strong else 2.8,
            )  # fmt: skip
        axes.axhline(
            baseline, color=style.INK, linestyle="--", linewidth=1.1, label=f"float, {_number(baseline, unit)}", zorder=3
        )
        for index, (label, points) in enumerate(others.items()):
            axes.plot(
                points[:, 0], points[:, 2], linestyle="-", linewidth=1.2, marker=MARKERS[1 + index % 5], markersize=6,
                color=(style.GREEN, style.PURPLE, style.ORANGE)[index % 3], markeredgecolor="white", zorder=5, label=label,
            )  # fmt: skip
        axes.set(xlabel="total width W [bits]", ylabel=_titled(name, unit))
        axes.set_title(f"{_titled(name, '', capital=True)} after quantization to ap_fixed<W,I>")
        _width_axis(axes, t.widths)
        if log:
            axes.set_yscale("log")
            finite = np.append(t.values[np.isfinite(t.values) & (t.values > 0)], abs(baseline))
            style.log_axis(axes.yaxis, float(finite.min()), float(finite.max()))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)

    return style.render(draw, (7.2, 3.9), f"{name} against the width")


def _compared(compared: Any) -> dict[str, np.ndarray]:
    """{label: (points, 3)} in rising order of the width."""
    named = compared if isinstance(compared, Mapping) else {COMPARED: compared}
    made = {}
    for label, points in named.items():
        rows = np.array([tuple(p) for p in points], np.float64)
        if rows.size and (rows.ndim != 2 or rows.shape[1] != 3):
            raise DataError(f"points of {label!r} have shape {rows.shape}, expected (width, integer bits, value) each")
        if rows.size:
            made[style.printable(label, 24)] = rows[np.argsort(rows[:, 0], kind="stable")]
    return made


def _width_axis(axes: Axes, widths: np.ndarray) -> None:
    if len(widths) <= 20:
        axes.set_xticks(widths, [str(w) for w in widths])
    else:
        style.integer_axes(axes.xaxis)


RESPONSES: Final = ("response 25 %", "response median", "response 75 %")


def scan_response(scanned: Scan, *, integer: int | None = None, quantity: str = "prediction / truth") -> str:
    """SVG: median and quartiles of the response against the width, beside IQR / (2 median), for one I; float dashed.

    scanned: with the metrics of `pq.search.RESPONSE`.  integer: default the best I.  quantity: what the response is of.
    """
    missing = [m for m in RESPONSES if m not in scanned.values]
    if missing:
        raise DataError(f"the scan has no metric {missing[0]!r}; scan with metric=pq.search.RESPONSE")
    t = _table(scanned)
    if integer is not None and integer not in t.integers:
        raise DataError(f"I = {integer} was not scanned, expected one of {t.integers.tolist()}")
    column = _best(scanned, t) if integer is None else int(np.flatnonzero(t.integers == integer)[0])
    low, middle, high = (np.asarray(scanned.values[m], np.float64)[np.ix_(*t.order)][:, column] for m in RESPONSES)
    before = [scanned.baseline[m] for m in RESPONSES]
    if not np.isfinite([*before, *low, *middle, *high]).all():
        return style.message("no response: every truth is 0, or a prediction is not finite")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        left.axhspan(before[0], before[2], color=style.RANGE, alpha=0.6, linewidth=0, label="float, 25–75 %")
        left.axhline(before[1], color=style.INK, linestyle="--", linewidth=1.1, label="float, median")
        left.fill_between(t.widths, low, high, color=style.BLUE, alpha=0.25, linewidth=0, label="fixed, 25–75 %")
        for edge in (low, high):
            left.plot(t.widths, edge, color=style.BLUE, linewidth=0.8)
        left.plot(t.widths, middle, color=style.BLUE, marker="o", markersize=4.5, linewidth=2, label="fixed, median")
        span = max(before[2] - before[0], 1e-3)
        left.set_ylim(max(np.nanmin(low), before[1] - 4 * span), min(np.nanmax(high) + 0.1 * span, before[1] + 4 * span))
        left.set(ylabel=f"response, {style.printable(quantity, 40)}", title=f"Response of ap_fixed<W,{t.integers[column]}>")
        left.legend(loc="best", fontsize=8)
        spread, spread_before = _spread(low, middle, high), float(_spread(*map(np.array, before)))
        text = f"float, {100 * spread_before:.3g} %"
        right.axhline(100 * spread_before, color=style.INK, linestyle="--", linewidth=1.1, label=text)
        right.plot(t.widths, 100 * spread, color=style.VERMILION, marker="o", markersize=4.5, linewidth=2, label="fixed")
        right.set_ylim(0, min(100 * np.nanmax(np.append(spread[np.isfinite(spread)], spread_before)), 600 * spread_before) * 1.08)
        right.set(ylabel="IQR / (2 median) [%]", title="Resolution")
        right.legend(loc="best", fontsize=8)
        for axes in (left, right):
            axes.set_xlabel("total width W [bits]")
            _width_axis(axes, t.widths)

    return style.render(draw, (9.4, 3.8), "response and resolution against the width")


def _spread(low: np.ndarray, middle: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.where(middle > 0, (high - low) / (2 * np.where(middle > 0, middle, 1)), np.nan)


class Sensitive(Protocol):
    """What `scan_layers` reads of `pq.search.Sensitivity`."""

    @property
    def names(self) -> Sequence[str]:
        """Layers or sites, the most sensitive first."""
        ...

    @property
    def drop(self) -> np.ndarray:
        """How much worse the metric is."""
        ...

    @property
    def name(self) -> str:
        """Of the metric."""
        ...

    @property
    def low(self) -> tuple[int, int | None]:
        """(W, I) of the layer that is narrow."""
        ...


def scan_layers(found: Sensitive, *, unit: str = "") -> str:
    """SVG: a bar per layer (or site), how much worse the metric is with that one alone at the low width."""
    names, drop = list(found.names)[:MOST_BARS], np.asarray(found.drop, np.float64)[:MOST_BARS]
    width, integer = found.low
    fmt = f"ap_fixed<{width},{integer}>" if integer is not None else f"{width} bits, I from its range"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = np.arange(len(names))[::-1]
        axes.barh(places, drop, color=[style.VERMILION if d > 0.5 * drop.max() else style.BLUE for d in drop], height=0.68)
        axes.set_yticks(places, [style.short_name(n) for n in names])
        axes.axvline(0, color=style.INK, linewidth=0.8)
        axes.grid(False, axis="y")
        reach = max(float(np.abs(drop).max()), 1e-12)
        for place, d in zip(places, drop, strict=True):
            axes.text(max(d, 0) + 0.012 * reach, place, f"{d:.3g}", va="center", fontsize=8, color=style.MUTED)
        axes.set_xlim(min(1.1 * drop.min(), 0), 1.14 * max(drop.max(), 1e-12))
        axes.set_xlabel(f"how much worse {_titled(style.printable(found.name, 30), unit)} is than with all parts wide")
        axes.set_title(f"Sensitivity: one at a time with {fmt}")

    return style.render(draw, (7.2, 1.3 + 0.28 * len(names)), "sensitivity by layer")


def scan_differences(found: Sequence[Any], *, title: str = "Difference between fixed and float") -> str:
    """SVG: rms and largest |fixed - float| of every site on a logarithmic axis, the size of its float values in grey.

    found: from `pq.search.differences`, or anything with name, kind, largest, rms and size.
    """
    shown = [d for d in found if d.largest > 0][: 2 * MOST_BARS]
    if not shown:
        return style.message("fixed and float agree at every site")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        places = np.arange(len(shown))[::-1]
        least = 0.3 * min(d.rms for d in shown if d.rms > 0)
        rms, largest, size = (np.array([max(getattr(d, part), least) for d in shown]) for part in ("rms", "largest", "size"))
        axes.hlines(places, rms, largest, color=style.RANGE, linewidth=4, zorder=1)
        axes.plot(size, places, "|", color=style.MUTED, markersize=10, markeredgewidth=1.6, label="float values, rms")
        axes.plot(rms, places, "o", color=style.BLUE, markersize=5.5, label="difference, rms")
        axes.plot(largest, places, "D", color=style.VERMILION, markersize=4.5, label="difference, largest")
        axes.set_xscale("log")
        every = np.concatenate([rms, largest, size])
        axes.set_xlim(every.min() / 1.6, every.max() * 1.6)
        _decades(axes.xaxis)
        axes.set_yticks(places, [style.short_name(d.name) for d in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set(xlabel="|fixed − float|, in units of the site's values", title=style.printable(title, 70))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)

    return style.render(draw, (7.2, 1.7 + 0.27 * len(shown)), "difference between fixed and float by site")


def _decades(axis: Any) -> None:
    """Ticks at powers of ten, without mathtext."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda v, _: "10" + str(round(np.log10(v))).translate(style.SUPERSCRIPTS)))
    axis.set_minor_formatter(NullFormatter())
