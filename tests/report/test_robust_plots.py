"""Pictures of flipped bits say what they were given."""

from __future__ import annotations

import numpy as np

from pquant_jax.report import plots


def test_flip_rates_has_a_line_per_curve_and_the_figure_without_flips():
    rng = np.random.default_rng(0)
    rates = np.array([1e-3, 1e-2, 1e-1])
    curves = [plots.FlipCurve(name, rates, rng.uniform(0.2, 0.6, (3, 8))) for name in ("no protection", "10 % <protected>")]
    svg = plots.flip_rates(curves, clean=0.65)
    for text in ("no protection", "10 % &lt;protected&gt;", "no flips", "accuracy", "flip rate per bit"):
        assert text in svg
    assert svg == plots.flip_rates(curves, clean=0.65) != plots.flip_rates(curves[:1], clean=0.65)
    assert "no bit was flipped" in plots.flip_rates([], clean=1.0)


def test_bit_map_writes_the_decade_of_every_bit_that_is_there():
    svg = plots.bit_map({"Dense_0/kernel": np.array([1e-4, 1e-2, np.nan]), "Dense_0/bias": np.array([1e-3, 0.0, 10.0])})
    for text in ("Dense_0/kernel", "Dense_0/bias", ">−4.0<", ">−2.0<", ">−3.0<", ">1.0<"):
        assert text.replace("−", "-") in svg or text in svg, text
    assert "no bit has a score" in plots.bit_map({"a": np.array([0.0, np.nan])})
    assert "no bit has a score" in plots.bit_map({})
