"""The lines of the milestone `hardware`: every door of a finished model, proved.  See `acceptance.py`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from lines import Line, module

from pquant_jax.lower.ir import Graph

TRAINED: Final = 0.4  # of the zoo's epochs: what is compared here is integers


@functools.cache
def graphs() -> dict[str, Graph]:
    """Every model of the zoo that has its data, trained and traced, once for all lines."""
    return module("zoo").graphs(scale=TRAINED)


def hls_lines() -> Iterator[Line]:
    """hls4ml's C simulation of every model; streams where the formats allow it, and else with one format per tensor."""
    bench = module("hardware_hls")
    for row in itertools.chain(bench.zoo_lines(graphs()), bench.resnet_lines()):
        name = f"hls4ml, {row['model']}, {row['backend']} {row['io_type']}, formats {row['formats']}: 0 mismatches"
        if row["skipped"]:
            yield Line(name, row["skipped"], True, skipped=True)
            continue
        parts = f"{row['layers']} layers, {row['netlists']} netlists; {row['seconds']:.0f} s"
        figure = f"{row['mismatches']} of {row['values']:,}; {parts}"
        yield Line(name, figure, row["mismatches"] == 0)


def reuse_lines() -> Iterator[Line]:
    """Reuse factors of three layers, all of them."""
    for row in module("hardware_hls").reuse_lines():
        yield Line(f"reuse factors, {row['layer']}: valid ones identical, invalid ones refused", _figures(row), _every(row))


def _every(row: dict[str, Any]) -> bool:
    """Valid reuse factors there, none differs; all invalid ones refused and nothing written."""
    return bool(row["valid"]) and row["mismatches"] == row["written"] == 0 and row["refused"] == row["invalid"] > 0


def qonnx_lines() -> Iterator[Line]:
    """Every model in qonnx's executor, in onnxruntime, and read back."""
    for row in module("hardware_qonnx").zoo_lines(graphs()):
        figure = f"{row['qonnx']} and {row['onnxruntime']} of {row['vectors']:,} x {row['outputs']}; read back: {row['returns']}"
        yield Line(f"QONNX, {row['model']}: 0 mismatches in qonnx and onnxruntime", figure, row["holds"])


def rtl_lines() -> Iterator[Line]:
    """Every model through alkaid, beside da4ml."""
    for row in module("hardware_rtl").zoo_lines(graphs()):
        a, d = row["alkaid"], row["da4ml"]
        figure = (
            f"{row['mismatches']} on {row['vectors']:,} vectors; cost {a['cost']:,.0f} (da4ml {d['cost']:,.0f}), "
            f"{a['latency']:.1f} ns in {a['stages']} stages ({d['latency']:.0f} adders in {d['stages']}); {row['seconds']:.0f} s"
        )
        yield Line(f"alkaid, {row['name']}: 0 mismatches of interpreter and Verilog", figure, row["holds"])


def project_lines() -> Iterator[Line]:
    """The testbenches of the demo's network, right and with one bit of one weight flipped."""
    for row in module("hardware_project").lines(graphs()["mlp"]):
        times = f"build {row['build_seconds']} s, run {row['run_seconds']} s"
        figure = f"{row['vectors']} vectors, {times}; flipped: {row['first_mismatch']}"
        holds = row["passes"] and row["fails_when_flipped"]
        yield Line(f"testbench, {row['design']} {row['flavor']}: passes, and fails with one weight bit flipped", figure, holds)


def _own(name: str) -> Callable[[], Iterator[Line]]:
    def lines() -> Iterator[Line]:
        for row in module(name).lines():
            yield Line(row["name"], row["figure"], bool(row["holds"]), bool(row.get("skipped")))

    return lines


def cost_lines() -> Iterator[Line]:
    """da4ml's cost and the calibrated estimate against Yosys, over the zoo."""
    bench = module("bench_cost")
    summed = bench.summary(bench.rows(graphs()))
    worst = max(summed["left_out_errors"].items(), key=lambda pair: abs(pair[1]))
    figure = (
        f"{summed['models']} models: da4ml's cost is off by {summed['da4ml_median_error']:.1%} (median), the calibrated estimate "
        f"by {summed['left_out_median_error']:.1%}, worst {worst[1]:+.1%} ({worst[0]})"
    )
    yield Line("da4ml's cost against Yosys' LUTs: calibrated within 15 % on each model left out", figure, bool(summed["holds"]))


def _figures(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if key != "layer")


PARTS: Final[dict[str, Callable[[], Iterator[Line]]]] = {
    "hls": hls_lines,
    "reuse": reuse_lines,
    "qonnx": qonnx_lines,
    "rtl": rtl_lines,
    "project": project_lines,
    "trees": _own("hardware_trees"),
    "robust": _own("hardware_robust"),
    "sparsity": _own("hardware_sparsity"),
    "cost": cost_lines,
}


def lines(only: Sequence[str] = ()) -> Iterator[Line]:
    """All lines, or those of the parts in `only`."""
    for name in only or PARTS:
        yield from PARTS[name]()
