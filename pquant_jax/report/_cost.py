"""Pictures of what a netlist costs: registers and latency against the latency cutoff, and cells layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from pquant_jax._errors import DataError
from pquant_jax.report import _style as style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS: Final = "oDs^vP"
MOST_LABELS: Final = 8
SHOWN: Final = (("lut", "LUT"), ("ff", "FF"), ("carry", "CARRY"), ("dsp", "DSP"))


class Cut(Protocol):
    """What the pictures read of a row of `lower.pipeline.sweep`."""

    @property
    def cutoff(self) -> float:
        """Units of the backend per stage."""
        ...

    @property
    def stages(self) -> int:
        """Blocks of logic."""
        ...

    @property
    def reg_bits(self) -> int:
        """Flip-flops."""
        ...

    @property
    def cost(self) -> float:
        """Estimated LUTs."""
        ...

    @property
    def latency_ns(self) -> float:
        """At the assumed clock."""
        ...


def cutoff_sweep(sweeps: Mapping[str, Sequence[Cut]], *, unit: str = "units of delay") -> str:
    """SVG: latency and flip-flops against the latency cutoff, a line per backend; the stages beside the points.

    sweeps: {name: rows of `lower.pipeline.sweep`}.  unit: of the cutoff, for the label.  Raises: DataError without a row.
    """
    if not sweeps or not all(sweeps.values()):
        empty = ", ".join(name for name, rows in sweeps.items() if not rows) or "anything"
        raise DataError(f"cutoff_sweep got no row for {empty}; give it rows of pipeline.sweep")

    slowest = max(sweeps, key=lambda name: max(row.latency_ns for row in sweeps[name]))  # its labels stand above its line

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for index, (name, rows) in enumerate(sweeps.items()):
            ordered = sorted(rows, key=lambda row: row.cutoff)
            look = {"color": style.CYCLE[index % len(style.CYCLE)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
            cutoffs = [row.cutoff for row in ordered]
            label = f"{style.printable(name, 30)}, {ordered[0].cost:,.0f} LUTs"
            left.plot(cutoffs, [row.latency_ns for row in ordered], label=label, **look)
            right.plot(cutoffs, [row.reg_bits for row in ordered], label=label, **look)
            step = -(-len(ordered) // MOST_LABELS)
            for row in ordered[::step]:
                place = {"xytext": (0, 7 if name == slowest else -13), "textcoords": "offset points", "ha": "center"}
                left.annotate(str(row.stages), (row.cutoff, row.latency_ns), color=look["color"], fontsize=7.5, **place)
        for axes, title, ylabel in ((left, "Latency, and stages", "latency [ns]"), (right, "Registers", "flip-flops")):
            axes.set(xlabel=f"longest path between registers [{unit}]", ylabel=ylabel, title=title)
            axes.margins(y=0.14)
            axes.set_ylim(bottom=0)
        if right.get_ylim()[1] >= 1000:
            right.yaxis.set_major_formatter(lambda value, _: style.short_number(value))
        left.legend(loc="lower right", fontsize=8)

    return style.render(draw, (9.2, 3.7), "Latency and registers against the latency cutoff")


def layer_cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """SVG: estimated LUTs, flip-flops, carry chains and DSPs of every layer, in the order of the model.

    rows: of `lower.cost.table`, the total last.  Raises: DataError without a layer.
    """
    if len(rows) < 2:
        raise DataError(f"layer_cost got {len(rows)} rows, expected a layer at least and the total, as cost.table gives them")
    parts, total = list(rows[:-1])[::-1], rows[-1]
    shown = [(cell, label) for cell, label in SHOWN if total.get(cell, 0) >= 0.5]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for index, (axes, (cell, label)) in enumerate(zip(panels, shown, strict=True)):
            values = [part[cell] for part in parts]
            axes.barh(range(len(parts)), values, color=style.CYCLE[index], height=0.7)
            for place, value in enumerate(values):
                if value >= 0.5:
                    axes.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=7.5, color=style.MUTED)
            axes.set_title(f"{label}: {total[cell]:,.0f}")
            axes.margins(x=0.22, y=0.01)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(_few_ticks())
            axes.xaxis.set_major_formatter(lambda value, _: style.short_number(value))
        panels[0].set_yticks(range(len(parts)), [style.short_name(str(part["layer"]), 30) for part in parts])

    return style.render(draw, (max(2.4 + 2.0 * len(shown), 5), 1.2 + 0.26 * len(parts)), "Estimated cells of every layer")


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)
