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


def layer_cost(rows: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]] = ()) -> str:
    """SVG: LUTs, flip-flops, carry chains and DSPs of every layer in the order of the model, estimated and counted.

    rows: of `lower.cost.table`.  counted: of a synthesis of every layer alone, as `lower.cost.synthesize_layers` gives them.
    Either may be empty; the total of the whole netlist is the last row.  Raises: DataError without a layer.
    """
    given = {label: table for label, table in (("estimate", rows), ("Yosys", counted)) if table}
    if not given or min(map(len, given.values())) < 2:
        most = max(map(len, given.values()), default=0)
        raise DataError(f"layer_cost got {most} rows, expected a layer at least and the total, as cost.table gives them")
    cells = {label: {str(row["layer"]): row for row in table[:-1]} for label, table in given.items()}
    names = list(dict.fromkeys(name for table in cells.values() for name in table))[::-1]
    totals = {label: table[-1] for label, table in given.items()}
    shown = [(cell, label) for cell, label in SHOWN if any(total.get(cell, 0) >= 0.5 for total in totals.values())]
    height = 0.8 / len(given)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (cell, label) in zip(panels, shown, strict=True):
            for index, (kind, table) in enumerate(cells.items()):
                values = [table.get(name, {}).get(cell, 0) for name in names]
                places = [place + height * ((len(given) - 1) / 2 - index) for place in range(len(names))]
                axes.barh(places, values, color=style.CYCLE[index], height=height, label=kind)
                for place, value in zip(places, values, strict=True):
                    if value >= 0.5:
                        axes.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=7.5, color=style.MUTED)
            axes.set_title(f"{label}: " + " / ".join(f"{total[cell]:,.0f}" for total in totals.values()))
            axes.margins(x=0.22, y=0.01)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(_few_ticks())
            axes.xaxis.set_major_formatter(lambda value, _: style.short_number(value))
        panels[0].set_yticks(range(len(names)), [style.short_name(name, 30) for name in names])
        if len(given) > 1:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=len(given), fontsize=8)

    size = (max(2.4 + 2.0 * len(shown), 5), 1.2 + (0.26 if len(given) == 1 else 0.42) * len(names) + 0.3 * (len(given) > 1))
    return style.render(draw, size, "Cells of every layer")


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)
