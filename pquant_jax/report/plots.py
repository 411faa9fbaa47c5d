"""Every picture of a report, each a function from plain data to an SVG text; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pquant_jax.report._bits import bit_widths, kernel_bits, out_of_range, ranges
from pquant_jax.report._cost import cutoff_sweep, layer_cost
from pquant_jax.report._curves import confusion, history, regression, roc, roc_curve
from pquant_jax.report._patterns import pattern_histogram, pattern_kernels
from pquant_jax.report._robust import FlipCurve, bit_map, flip_rates
from pquant_jax.report._scan import scan_differences, scan_layers, scan_lines, scan_map, scan_response
from pquant_jax.report._types import Profile

__all__ = [
    "FlipCurve",
    "bit_map",
    "bit_widths",
    "confusion",
    "cutoff_sweep",
    "flip_rates",
    "history",
    "kernel_bits",
    "layer_cost",
    "out_of_range",
    "pattern_histogram",
    "pattern_kernels",
    "ranges",
    "regression",
    "roc",
    "roc_curve",
    "scan_differences",
    "scan_layers",
    "scan_lines",
    "scan_map",
    "scan_response",
    "standard",
]


def standard(
    metrics: Sequence[Mapping[str, Any]], profiles: Sequence[Profile], *, metric: str = "accuracy", kernels: int = 8
) -> dict[str, str]:
    """The pictures that need nothing but `metrics` and `profiles`, by the names that `html.write` has captions for.

    kernels: at most so many kernels get a picture of their own, the first ones in order.
    """
    figures = {"history": history(metrics, metric=metric)}
    if profiles:
        figures |= {"ranges": ranges(profiles), "bit_widths": bit_widths(profiles)}
    shown = [p for p in profiles if p.kind == "kernel"][:kernels]
    return figures | {f"kernel_bits:{p.name}": kernel_bits(p) for p in shown}
