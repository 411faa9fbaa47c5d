"""Pictures of a run as a whole: its history and how well the model predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.report import _style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES: Final = {"pretrain": "#E4ECF5", "train": "#FBEBD0", "finetune": "#DCEFE6"}
UNKNOWN: Final = "#EEEEEE"
MAX_POINTS: Final = 400  # of one curve: more can't be seen, and the page grows


class Panel(NamedTuple):
    """One plot of `history`: its title, {legend: key of the metrics}, and the kind of the vertical axis."""

    title: str
    lines: Mapping[str, str]
    scale: str = "linear"


def history(metrics: Sequence[Mapping[str, Any]], *, metric: str = "accuracy") -> str:
    """SVG: loss, validation metric, sparsity and EBOPs (log) per epoch, over the shaded stages.

    metrics: one mapping per epoch with the keys epoch, stage ("pretrain", "train" or "finetune"), loss, val_loss,
        val_metric, sparsity (fraction), ebops; a value may be missing, None or NaN, and a panel without any is left out.
    metric: the name of val_metric.
    """
    panels = [
        Panel("Loss", {"training": "loss", "validation": "val_loss"}),
        Panel(f"Validation {style.printable(metric, 30)}", {"": "val_metric"}),
        Panel("Sparsity", {"": "sparsity"}, "percent"),
        Panel("EBOPs", {"": "ebops"}, "log"),
    ]
    panels = [p for p in panels if any(_finite(metrics, key, p.scale)[1].size for key in p.lines.values())]
    if not panels:
        return style.message("no epoch was recorded")
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))

    def draw(figure: Figure) -> None:
        grid = np.ravel(figure.subplots(rows, columns, sharex=True, squeeze=False))
        for axes, panel in zip(grid, panels, strict=True):
            _draw_panel(axes, metrics, panel)
        for axes in grid[-columns:]:
            axes.set_xlabel("epoch")
        _stage_legend(figure, metrics)

    return style.render(draw, (10, 2.6 * rows + 0.4), "loss, metric, sparsity and EBOPs per epoch")


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """SVG: `matrix` (C, C), counts of [true class, predicted class], coloured and labelled by its percentages per row."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (len(classes),) * 2:
        raise DataError(f"confusion: matrix has shape {matrix.shape}, expected {(len(classes),) * 2} for {len(classes)} classes")
    total = matrix.sum(axis=1, keepdims=True)
    share = 100 * matrix / np.where(total > 0, total, 1)
    names = [style.printable(c, 16) for c in classes]
    n = len(classes)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(share, cmap=style.shades(256, 0.03), vmin=0, vmax=100, interpolation="none")
        style.bare(axes)
        axes.set(xlabel="predicted", ylabel="true", title="Confusion, % of each true class")
        axes.set_xticks(range(n), names, rotation=90 if max(map(len, names), default=0) * n > 40 else 0)
        axes.set_yticks(range(n), names)
        axes.tick_params(labelsize=9 if n <= 12 else 7)
        figure.colorbar(image, ax=axes, shrink=0.8, ticks=range(0, 101, 25)).outline.set_visible(False)
        for (row, column), value in np.ndenumerate(share) if n <= 12 else ():
            colour = "white" if value > 55 else style.INK
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)

    return style.render(draw, style.PAIR, "confusion matrix")


def roc_curve(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """False and true positive rate at every distinct score (ties are one step), and the area under the curve.

    score: (n,) larger means more likely positive.  positive: (n,) bool.  NaN area if a class is absent.

    >>> roc_curve(np.array([3.0, 2.0, 2.0, 1.0]), np.array([True, True, False, False]))[2]
    0.875
    """
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    ranked, hit = np.asarray(score)[order], np.asarray(positive, bool)[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # quantized scores tie often
    true = np.append(0, np.cumsum(hit)[last]).astype(np.float64)
    false = np.append(0, np.cumsum(~hit)[last]).astype(np.float64)
    if not (true[-1] and false[-1]):
        return false, true, float("nan")
    false, true = false / false[-1], true / true[-1]
    return false, true, float(np.trapezoid(true, false))


def roc(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, log_x: bool = False) -> str:
    """SVG: one-versus-rest ROC curve of each class with the area under it.

    scores: (n, C), probabilities (raw logits of different samples don't compare).  labels: (n,) integers.
    log_x: false positive rate on a logarithmic axis, which shows the working points of a trigger.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != (len(labels), len(classes)):
        raise DataError(f"roc: scores have shape {scores.shape}, expected {(len(labels), len(classes))}")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        smallest = 1.0
        for index, name in enumerate(classes):
            false, true, area = roc_curve(scores[:, index], labels == index)
            if not np.isfinite(area):
                continue
            smallest = min(smallest, 1.0 / np.count_nonzero(labels != index))
            keep = _thinned(false, true, log_x)
            colour, dash = style.CYCLE[index % 8], "-" if index < 8 else "--"
            text = f"{style.printable(name, 16)}  AUC {area:.4f}"
            axes.plot(false[keep], true[keep], color=colour, linestyle=dash, label=text)
        chance = np.geomspace(smallest, 1, 100) if log_x else np.linspace(0, 1, 2)
        axes.plot(chance, chance, color=style.MUTED, linewidth=0.8, linestyle=":", label="chance")
        axes.set(
            xlabel="false positive rate", ylabel="true positive rate", title="ROC, one class versus the rest", ylim=(0, 1.02)
        )
        if log_x:
            axes.set_xscale("log")
            axes.set_xlim(max(smallest, 1e-5), 1)
            style.log_axis(axes.xaxis, 1e-3, 1)
        else:
            axes.set_xlim(-0.01, 1)
        axes.legend(loc="upper left" if log_x else "lower right")

    return style.render(draw, style.PAIR, "ROC curves")


def regression(predicted: np.ndarray, target: np.ndarray) -> str:
    """SVG: density of predicted over target, and the histogram of predicted - target with its mean and deviation."""
    predicted, target = np.ravel(predicted).astype(np.float64), np.ravel(target).astype(np.float64)
    if predicted.shape != target.shape:
        raise DataError(f"regression: {predicted.size} predictions for {target.size} targets")
    finite = np.isfinite(predicted) & np.isfinite(target)
    predicted, target = predicted[finite], target[finite]
    if not predicted.size:
        return style.message("no finite prediction")

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        left, right = figure.subplots(1, 2)
        low, high = min(predicted.min(), target.min()), max(predicted.max(), target.max())
        high = high if high > low else low + 1.0
        counts, _, _ = np.histogram2d(target, predicted, bins=60, range=[[low, high]] * 2)
        shown = np.ma.masked_equal(counts.T, 0)
        norm = LogNorm(1, max(counts.max(), 2))
        left.imshow(shown, origin="lower", extent=(low, high, low, high), cmap=style.shades(256), norm=norm, interpolation="none")
        left.plot([low, high], [low, high], color=style.VERMILION, linewidth=1, linestyle="--")
        left.set(xlabel="target", ylabel="predicted", title="Predicted over target")
        residual = predicted - target
        edge = max(float(np.quantile(np.abs(residual), 0.995)), 1e-12)
        right.hist(np.clip(residual, -edge, edge), bins=60, color=style.BLUE)
        right.axvline(0, color=style.INK, linewidth=0.8)
        right.set(xlabel="predicted − target (the outer bins hold the rest)", ylabel="samples", title="Residuals")
        text = f"mean {residual.mean():.4g}\nstd {residual.std():.4g}\n|r| median {np.median(np.abs(residual)):.4g}"
        right.text(0.98, 0.97, text, transform=right.transAxes, ha="right", va="top", color=style.MUTED)

    return style.render(draw, (9, 3.9), "regression residuals")


def _finite(metrics: Sequence[Mapping[str, Any]], key: str, scale: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of `key` where it can be drawn: present, finite, and positive on a log axis."""
    values = np.array([np.nan if m.get(key) is None else float(m[key]) for m in metrics], np.float64)
    epochs = np.array([m.get("epoch", index) for index, m in enumerate(metrics)], np.float64)
    good = np.isfinite(values) & ((values > 0) if scale == "log" else True)
    return epochs[good], values[good]


def _draw_panel(axes: Axes, metrics: Sequence[Mapping[str, Any]], panel: Panel) -> None:
    from matplotlib.ticker import PercentFormatter

    for run, (stage, first, last) in enumerate(_stages(metrics)):
        gid = f"stage-{stage if stage in STAGES else 'other'}-{panel.title.split()[0]}-{run}"
        axes.axvspan(first - 0.5, last + 0.5, color=STAGES.get(stage, UNKNOWN), linewidth=0, zorder=0, gid=gid)
    for (label, key), colour in zip(panel.lines.items(), (style.BLUE, style.VERMILION), strict=False):
        epochs, values = _finite(metrics, key, panel.scale)
        marker = "o" if len(epochs) < 15 else None  # a lone point would be no line at all
        axes.plot(epochs, values, color=colour, label=label or None, marker=marker, markersize=3.5)
        if panel.scale == "log" and values.size:
            axes.set_yscale("log")
            axes.set_ylim(values.min() / 1.15, values.max() * 1.15)
            style.log_axis(axes.yaxis, values.min(), values.max())
    if panel.scale == "percent":
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(panel.lines) > 1:
        axes.legend(loc="upper right")
    axes.set_title(panel.title)
    style.integer_axes(axes.xaxis)
    axes.margins(x=0)


def _stages(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(stage, first epoch, last epoch) of each run of equal stages."""
    numbered = [(str(m.get("stage", "train")), m.get("epoch", index)) for index, m in enumerate(metrics)]
    runs = [(stage, [epoch for _, epoch in run]) for stage, run in groupby(numbered, key=lambda pair: pair[0])]
    return [(stage, epochs[0], epochs[-1]) for stage, epochs in runs]


def _stage_legend(figure: Figure, metrics: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patches import Patch

    seen = dict.fromkeys(stage for stage, _, _ in _stages(metrics))
    patches = [Patch(color=STAGES.get(stage, UNKNOWN), label=style.printable(stage, 20)) for stage in seen]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches), handlelength=1.6, borderaxespad=0)


def _thinned(false: np.ndarray, true: np.ndarray, log_x: bool) -> np.ndarray:
    """Indices of at most `MAX_POINTS` points of a curve, evenly spread along the drawn line."""
    x = np.log10(np.maximum(false, 1e-5)) / 5 if log_x else false
    length = np.append(0, np.cumsum(np.hypot(np.diff(x), np.diff(true))))
    return np.unique(np.searchsorted(length, np.linspace(0, length[-1], MAX_POINTS)).clip(0, len(length) - 1))
