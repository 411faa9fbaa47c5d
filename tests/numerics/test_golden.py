"""Values and gradients of other implementations: HGQ2 and `quantizers` (golden/hgq2.json), and PQuantML."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax.numerics import kif, oracle, quantize, round_ste, total_bits

QUANTITIES = ("q", "dq_dx", "dq_di", "dq_df")


def value_and_gradients(x, k, i, f, rounding, overflow, wrap):
    """The value, and the gradient of its sum to x, i and f, every operand with one value per element."""
    x = jnp.float32(x)
    k, i, f = (jnp.full_like(x, v) for v in (k, i, f))
    q, pull = jax.vjp(lambda x, i, f: quantize(x, kif(k, i, f, rounding=rounding, overflow=overflow), wrap=wrap), x, i, f)
    return dict(zip(QUANTITIES, (q, *pull(jnp.ones_like(q))), strict=True))


@pytest.mark.parametrize("section", ["stateless", "zero_bits"])
def test_hgq2_stateless(hgq2, section):
    x, cases = hgq2[section]["x"], hgq2[section]["cases"]
    assert len(cases) == {"stateless": 42, "zero_bits": 24}[section]
    for case in cases:
        k, i, f = (case[name] for name in "kif")
        ours = value_and_gradients(x, k, i, f, case["round"], case["overflow"], wrap=not case["training"])
        # ours is 0 where the format has no bits, in training too; theirs only outside the training trace
        expected = np.zeros(len(x)) if k + i + f <= 0 else case["q"]
        said = f"{section} {case['round']} {case['overflow']} k={k} i={i} f={f} training={case['training']}"
        np.testing.assert_array_equal(ours["q"], expected, said)
        for name in QUANTITIES[1:]:
            np.testing.assert_allclose(ours[name], case[name], rtol=0, atol=1e-6, err_msg=f"{said}: {name}")


def test_hgq2_stateless_equals_the_oracle(hgq2):
    for section in ("stateless", "zero_bits"):
        for case in hgq2[section]["cases"]:
            if case["training"] and case["overflow"] == "WRAP":
                continue  # the oracle always wraps
            modes = dict(rounding=case["round"], overflow=case["overflow"])
            ours = oracle.quantize(hgq2[section]["x"], case["k"], case["i"], case["f"], **modes)
            expected = np.zeros_like(ours) if case["k"] + case["i"] + case["f"] <= 0 else case["q"]
            np.testing.assert_array_equal(ours, expected, str(modes))


def test_a_format_without_bits_gives_zero_where_hgq2_trains_on():
    x = [-2.0, -0.3, 0.0, 0.3, 2.0]
    for i, f in ((2, -3), (-3, 1), (-4, 0)):
        for overflow in ("SAT", "SAT_SYM", "WRAP", "WRAP_SM"):
            ours = value_and_gradients(x, 1, i, f, "RND", overflow, wrap=False)
            np.testing.assert_array_equal(ours["q"], np.zeros(5), f"{overflow} i={i} f={f}")
            if overflow in ("SAT_SYM", "WRAP"):  # the gradient stays, so that a dead weight can come back
                assert np.any(np.asarray(ours["dq_df"]) != 0)


def test_hgq2_weights_with_fractional_widths(hgq2):
    """HGQ2's kbi quantizer trains b and i and derives f = b - i: dq/db = dq/df, dq/di = dq/di|f - dq/df."""
    x, cases = jnp.float32(hgq2["weights"]["x"]), hgq2["weights"]["cases"]
    assert len(cases) == 4
    for case in cases:
        kbi = case["type"] == "KBI"
        raw = {name: jnp.float32(case[name]) for name in (("b", "i") if kbi else ("f", "i"))}

        def value(x, raw, kbi=kbi, overflow=case["overflow"]):
            f = round_ste(raw["b"]) - round_ste(raw["i"]) if kbi else raw["f"]
            return quantize(x, kif(1, raw["i"], f, overflow=overflow))

        q, pull = jax.vjp(value, x, raw)
        dx, grads = pull(jnp.ones_like(q))
        np.testing.assert_array_equal(q, case["q"])
        np.testing.assert_array_equal(dx, case["dx"])
        for name in raw:
            np.testing.assert_allclose(grads[name], case["grads"][name], rtol=0, atol=1e-6, err_msg=f"{case['type']} {name}")


def test_hgq2_counts_the_sign_bit_only_where_it_saturates(hgq2):
    for case in hgq2["weights"]["cases"]:
        i = np.round(case["i"])
        f = np.round(case["b"]) - i if case["type"] == "KBI" else np.round(case["f"])
        fmt = kif(1, i, f, overflow=case["overflow"])
        np.testing.assert_array_equal(total_bits(fmt, compat="hgq2"), case["bits"])
        np.testing.assert_array_equal(total_bits(fmt), np.maximum(1 + i + f, 0))


# PQuantML, torch backend: RND, k = 1, i = 0, f = 3
PQUANTML_X = [-3, -0.3, 0.3, 0.97, 5]
PQUANTML = [  # overflow, wrap, values, dq/dx, sum of dq/di, sum of dq/df; None where the reference gives none
    ("SAT", True, [-1, -0.25, 0.25, 0.875, 0.875], [0, 1, 1, 0, 0], 0.693147, 0.173287),
    ("SAT_SYM", True, [-0.875, -0.25, 0.25, 0.875, 0.875], [0, 1, 1, 0, 0], 0.693147, 0.086643),
    ("WRAP", False, [-3, -0.25, 0.25, 1, 5], [1, 1, 1, 1, 1], None, None),
    ("WRAP", True, [-1, -0.25, 0.25, -1, -1], None, None, None),
    ("WRAP_SM", True, [0.875, -0.25, 0.25, 0.875, 0.875], [-1, 1, 1, -1, -1], 4.158883, 0.280725),
    ("WRAP_SM", False, [0.875, -0.25, 0.25, 0.875, 0.875], [-1, 1, 1, -1, -1], 4.158883, 0.280725),
]


@pytest.mark.parametrize(("overflow", "wrap", "q", "dx", "di", "df"), PQUANTML)
def test_pquantml_overflow(overflow, wrap, q, dx, di, df):
    ours = value_and_gradients(PQUANTML_X, 1, 0, 3, "RND", overflow, wrap)
    np.testing.assert_array_equal(ours["q"], q)
    if dx is not None:
        np.testing.assert_array_equal(ours["dq_dx"], dx)
    if di is not None:
        np.testing.assert_allclose(np.sum(ours["dq_di"]), di, rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.sum(ours["dq_df"]), df, rtol=0, atol=1e-6)


TIES = {
    "TRN": [-2, -1, 0, 1, 2],
    "RND": [-1, 0, 1, 2, 3],
    "RND_CONV": [-2, 0, 0, 2, 2],
    "TRN_ZERO": [-1, 0, 0, 1, 2],
    "RND_ZERO": [-1, 0, 0, 1, 2],
    "RND_MIN_INF": [-2, -1, 0, 1, 2],
    "RND_INF": [-2, -1, 1, 2, 3],
}


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_pquantml_ties(rounding):
    x = np.float32([-1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(quantize(x, kif(1, 4, 0, rounding=rounding)), TIES[rounding])
    np.testing.assert_array_equal(oracle.quantize(x, 1, 4, 0, rounding=rounding), TIES[rounding])
