"""One self-contained page about a run: no scripts, nothing loaded from outside, readable on a screen and on paper."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.report._cost import SHOWN
from pquant_jax.report._text import ABSENT, CSS, is_number, number, pairs, percent, score, seconds, table
from pquant_jax.report._types import Profile, bits

CAPTIONS: Final = {
    "history": "Each epoch from left to right; the shade tells the stage. EBOPs are on a logarithmic axis: a straight fall "
    "is a constant factor per epoch.",
    "ranges": "Boxes are what was observed (quartiles, median, extremes), grey bars are what the format can hold: a box "
    "beyond the right end saturates or wraps, one beyond the left end rounds to 0; a box at the left edge includes zeros.",
    "bit_widths": "Left: mean bits of each tensor, pruned weights counted as 0. Right: how the widths of each kernel are "
    "spread, scaled to the tallest bar; the first bar has the share of pruned weights written on it.",
    "confusion": "A row is a true class and adds up to 100 %; the diagonal is what was classified correctly.",
    "roc": "Signal efficiency against the background that is let through, each class against all others; further to the "
    "upper left is better.",
    "regression": "Left: the dashed line is a perfect prediction. Right: the spread of the errors, centred on 0 if there "
    "is no bias.",
    "layer_cost": "Estimate: from da4ml's netlist, with cells per bit fitted to Yosys over a zoo of models. Yosys: every layer "
    "synthesized alone. Above a panel is what the whole netlist has, in the same order; usually less than the sum over layers.",
    "cutoff_sweep": "The longest path between two registers, in the netlist generator's units, against latency and flip-flops at "
    "one nanosecond a unit; stages beside the points.",
    "kernel_bits": "One cell is one weight: the darker, the wider its multiplier; pruned weights are pale orange and cost "
    "nothing.",
}
SMALL: Final = ("confusion", "roc", "kernel_bits")  # pictures that stand side by side
ENGINES: Final = {
    "emulator": "emulator",
    "da4ml": "da4ml",
    "alkaid": "alkaid",
    "hls4ml": "hls4ml's C simulation",
    "qonnx": "QONNX",
    "onnx": "ONNX",
    "qdq": "ONNX with QuantizeLinear",
    "registers": "register file",
    "rtl_comb": "combinational RTL",
    "rtl_pipelined": "pipelined RTL",
}


def write(
    path: str | os.PathLike[str],
    *,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    profiles: Sequence[Profile],
    figures: Mapping[str, str],
    config_text: str,
) -> None:
    """Write the report of a run to `path`, under a temporary name first.

    summary: headline numbers, any of them missing or None: name; metric, the name of the metric (default "accuracy"),
        under which stand its float, compressed and emulated values; ebops.{reference8, final}; sparsity (fraction);
        params.{total, nonzero}; bops; mismatches.{name of a key of `ENGINES`} out of `vectors`;
        cost.{da4ml or alkaid, latency_cycles, clock_ns, ii, lut, ff, dsp, carry}; kernels: {path: a `KernelSummary`'s fields};
        channels.{total, dead}; layer_cost, layer_cells: [{"layer", lut, ff, carry, dsp}], estimated and by Yosys, the whole
        netlist last; layers: {profile name: EBOPs or {"ebops": EBOPs}};
        seeds; versions; seconds: {phase: s}; skipped: {step: reason}.
    metrics: as for `plots.history`; here for the length of the run and the time of its stages.
    figures: {name: SVG text}; a name is a key of `CAPTIONS`, or one with ":" and a subtitle, or any other title.  The
        SVG is put in as it is: it must come from `plots`.
    config_text: the resolved configuration, shown folded.

    Raises `DataError` for a figure that is no SVG.
    """
    for name, svg in figures.items():
        if not svg.lstrip().startswith("<svg"):
            raise DataError(f"figure {name!r} is no SVG: it starts with {svg[:30]!r}, expected '<svg'")
    title = html.escape(str(summary.get("name") or "run"))
    sections = (
        f'<h1>{title}</h1><p class="sub">{_subtitle(summary, metrics)}</p>',
        badge(summary),
        f'<div class="cards">{"".join(_card(*card) for card in cards(summary))}</div>',
        _figures(figures),
        _layers(profiles, summary.get("layers") or {}),
        _kernels(summary.get("kernels") or {}, summary.get("channels") or {}),
        _cells(summary.get("layer_cost") or [], summary.get("layer_cells") or []),
        _facts(summary, metrics),
        f"<details><summary>Resolved configuration</summary><pre>{html.escape(config_text)}</pre></details>",
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def badge(summary: Mapping[str, Any]) -> str:
    """One coloured line: bit-identical, not bit-identical, or why no comparison was made."""
    found = {k: v for k, v in (summary.get("mismatches") or {}).items() if is_number(v)}
    skipped = summary.get("skipped") or {}
    if not found:
        reason = skipped.get("lower") or "; ".join(f"{step}: {why}" for step, why in skipped.items()) or "no comparison was made"
        return f'<p class="badge none">not lowered: {html.escape(str(reason))}</p>'
    vectors = number(summary.get("vectors"))
    names = ", ".join(html.escape(ENGINES.get(k, str(k))) for k in found)
    if not any(found.values()):
        return f'<p class="badge good">bit-identical: 0 of {vectors} differ ({names})</p>'
    worst = "; ".join(f"{html.escape(ENGINES.get(k, str(k)))} {number(v)} of {vectors} differ" for k, v in found.items() if v)
    return f'<p class="badge bad">not bit-identical: {worst}</p>'


def cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, escaped value, escaped note) of each headline number; what is unknown shows a dash, what was never
    measured (float accuracy, RTL resources) no card."""
    metric = str(summary.get("metric") or "accuracy")
    found: Mapping[str, Any] = summary[metric] if isinstance(summary.get(metric), Mapping) else {}
    cost, ebops, params = (summary.get(key) or {} for key in ("cost", "ebops", "params"))
    names = {"float": "float", "compressed": "compressed", "emulated": "bit-exact emulation"}
    out = [(metric, score(found.get(key), metric), note) for key, note in names.items() if key in found]
    out.append(("EBOPs", number(ebops.get("final")), _ratio(ebops)))
    out.append(("sparsity", percent(summary.get("sparsity")), _kept(params)))
    if summary.get("bops") is not None:
        out.append(("BOPs", number(summary["bops"]), "bit operations"))
    if any(cost.get(key) is not None for key in ("lut", "ff", "dsp")):
        carry = f", carry {number(cost['carry'])}" if cost.get("carry") is not None else ""
        out.append(("LUT", number(cost.get("lut")), f"FF {number(cost.get('ff'))}, DSP {number(cost.get('dsp'))}{carry}"))
    if cost.get("latency_cycles") is not None or cost.get("ii") is not None:
        clock = f" of {number(cost['clock_ns'], 3)} ns" if is_number(cost.get("clock_ns")) else ""
        cycles = f"{number(cost.get('latency_cycles'))} cycles"
        out.append(("latency", cycles, f"{clock.strip()}{', ' * bool(clock)}a new input every {_cycles(cost.get('ii'))}"))
    for backend in ("da4ml", "alkaid"):
        if cost.get(backend) is not None:
            out.append(("adder cost", number(cost[backend]), f"{backend}'s estimate, before synthesis"))
    return out


def _card(label: str, value: str, note: str) -> str:
    return f'<div class="card"><span class="label">{html.escape(label)}</span><b>{value}</b><span>{note}</span></div>'


def _cycles(ii: Any) -> str:
    return "cycle" if ii == 1 else f"{number(ii)} cycles"


def _ratio(ebops: Mapping[str, Any]) -> str:
    final, reference = ebops.get("final"), ebops.get("reference8")
    if not (is_number(final) and is_number(reference)):
        return "effective bit operations"
    return (
        f"{number(reference / final, 3)} times fewer than 8 bit ({number(reference)})" if final else f"8 bit: {number(reference)}"
    )


def _kept(params: Mapping[str, Any]) -> str:
    if params.get("total") is None:
        return "of the weights are zero"
    return f"{number(params.get('nonzero'))} of {number(params['total'])} parameters left"


def _subtitle(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    stages = dict.fromkeys(str(m.get("stage", "train")) for m in metrics)
    counts = [f"{sum(str(m.get('stage', 'train')) == stage for m in metrics)} {stage}" for stage in stages]
    parts = [f"{len(metrics)} epoch{'s' * (len(metrics) != 1)} ({html.escape(', '.join(counts))})"] if metrics else []
    total = [v for v in (summary.get("seconds") or {}).values() if is_number(v)]
    return " · ".join(parts + ([f"{seconds(sum(total))} in all"] if total else []))


def _figures(figures: Mapping[str, str]) -> str:
    if not figures:
        return ""
    blocks: dict[bool, list[str]] = {False: [], True: []}
    explained = set()
    for index, (name, svg) in enumerate(sorted(figures.items(), key=_rank)):
        kind, _, detail = name.partition(":")
        caption = html.escape(CAPTIONS.get(kind, name)) if kind not in explained else ""
        explained.add(kind if kind in CAPTIONS else None)
        head = f"<b>{html.escape(detail)}</b>{'. ' * bool(caption)}" if detail and kind in CAPTIONS else ""
        block = f"<figure>{unique_ids(svg, f'f{index}-')}<figcaption>{head}{caption}</figcaption></figure>"
        blocks[kind in SMALL].append(block)
    pair = f'<div class="pair">{"".join(blocks[True])}</div>' if blocks[True] else ""
    return f"<h2>Pictures</h2>{''.join(blocks[False])}{pair}"


def _rank(figure: tuple[str, str]) -> int:
    """Known pictures in the order of `CAPTIONS`, then the others as they come."""
    kind = figure[0].partition(":")[0]
    return list(CAPTIONS).index(kind) if kind in CAPTIONS else len(CAPTIONS)


def unique_ids(svg: str, prefix: str) -> str:
    """`svg` with `prefix` before every id and reference to one: several pictures in a page must not share ids.

    >>> unique_ids('<g id="a" clip-path="url(#b)">id="x"</g>', "f0-")
    '<g id="f0-a" clip-path="url(#f0-b)">id="x"</g>'
    """

    def inside(tag: re.Match[str]) -> str:
        return re.sub(r'((?<=\s)id="|url\(#|href="#)', lambda start: start.group() + prefix, tag.group())

    return re.sub(r"<[a-zA-Z][^>]*>", inside, svg)


def _layers(profiles: Sequence[Profile], costs: Mapping[str, Any]) -> str:
    if not profiles:
        return ""
    rows = [_row(p, costs.get(p.name)) for p in profiles]
    head = ("site", "shape", "kind", "density", "mean bits", "bits", "EBOPs")
    return f"<h2>Layers</h2>{table(head, rows)}"


def _kernels(kernels: Mapping[str, Mapping[str, Any]], channels: Mapping[str, Any]) -> str:
    """What pruning left, and how many channels the netlist does without."""
    if not kernels:
        return ""
    head = ("kernel", "weights", "zeros", "sparsity", "nonzero digits", "dead inputs", "dead outputs")
    rows = [
        (html.escape(path), number(k["total"]), number(k["zeros"]), percent(k["zeros"] / max(k["total"], 1)), number(k["bits"]),
         f"{number(k['dead_rows'])} of {number(k['rows'])}", f"{number(k['dead_columns'])} of {number(k['columns'])}")
        for path, k in kernels.items()
    ]  # fmt: skip
    left_out = f"{number(channels['dead'])} of {number(channels['total'])} channels are not in the netlist" if channels else ""
    note = "Digits are those of the weights in canonical signed-digit form; a dead input or output has no weight other than 0."
    return f'<h2>Pruning</h2>{table(head, rows)}<p class="sub">{left_out}{". " * bool(left_out)}{note}</p>'


def _cells(estimated: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]]) -> str:
    """Cells of every layer, before and after synthesis, and of the whole netlist."""
    if not counted:
        return ""
    given = {kind: rows for kind, rows in (("estimate", estimated), ("Yosys", counted)) if rows}
    layers = [{str(row["layer"]): row for row in rows[:-1]} for rows in given.values()]
    head = ("layer", *(f"{label}, {kind}" for _, label in SHOWN for kind in given))

    def line(name: str, found: Sequence[Mapping[str, Any] | None]) -> list[str]:
        return [name, *(ABSENT if row is None else number(round(row[cell])) for cell, _ in SHOWN for row in found)]

    names = dict.fromkeys(name for own in layers for name in own)
    lines = [line(html.escape(name), [own.get(name) for own in layers]) for name in names]
    lines.append(line("<b>whole netlist</b>", [rows[-1] for rows in given.values()]))
    note = (
        "Each layer is synthesized alone, with registers at its own ports: flip-flops between two layers are counted twice, and "
        "what synthesis shares across layers is saved in the whole netlist only."
    )
    return f'<h2>Cells by layer</h2>{table(head, lines)}<p class="sub">{note}</p>'


def _row(profile: Profile, cost: Any) -> tuple[str, ...]:
    widths = bits(profile)
    shape = np.shape(profile.values) if profile.values is not None else np.broadcast_shapes(widths.shape, np.shape(profile.low))
    density = percent(np.mean(widths > 0)) if widths.size else ABSENT
    span = f"{widths.min()}..{widths.max()}" if widths.size else ABSENT
    ebops = cost.get("ebops") if isinstance(cost, Mapping) else cost
    name, kind = html.escape(profile.name), html.escape(profile.kind)
    mean = f"{widths.mean():.2f}" if widths.size else ABSENT
    return name, " × ".join(map(str, shape)) or "scalar", kind, density, mean, span, number(ebops)


def _facts(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    mismatches = {ENGINES.get(k, k): v for k, v in (summary.get("mismatches") or {}).items()}
    stages: dict[str, float] = {}
    for m in metrics:
        if is_number(m.get("seconds")):
            stages[str(m.get("stage", "train"))] = stages.get(str(m.get("stage", "train")), 0.0) + m["seconds"]
    tables = (
        pairs(f"Outputs that differ, of {number(summary.get('vectors'))} vectors", mismatches),
        pairs("Time per phase", summary.get("seconds"), seconds),
        pairs("Time of the epochs", stages, seconds),
        pairs("Skipped steps", summary.get("skipped")),
        pairs("Seeds", summary.get("seeds")),
        pairs("Versions", summary.get("versions"), lambda value: html.escape(str(value))),
    )
    found = "".join(tables)
    return f'<h2>Run</h2><div class="tables">{found}</div>' if found else ""
