"""Minifloats: HGQ2's recorded values and gradients, and a decoder of bit patterns by enumeration."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.numerics import minifloat, minifloat_kif, oracle, total_bits

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hgq2_minifloat.json").read_text())
X = np.float32(GOLDEN["x"])


def run(case, compat=None):
    """Value and elementwise gradients, with a format of each element's own."""
    parts = [jnp.full(X.shape, case[n], jnp.float32) for n in ("m", "e", "e0")]
    q, pull = jax.vjp(lambda *a: minifloat(*a, compat=compat), jnp.asarray(X), *parts)
    return dict(zip(("q", "dx", "dm", "de", "de0"), map(np.asarray, (q, *pull(jnp.ones_like(q)))), strict=True))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"m{c['m']}e{c['e']}o{c['e0']}")
def test_hgq2(case):
    found = run(case, "hgq2")
    np.testing.assert_array_equal(found["q"], np.float32(case["q"]))
    for name in ("dx", "dm", "de", "de0"):
        np.testing.assert_allclose(found[name], case[name], rtol=2e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"m{c['m']}e{c['e']}o{c['e0']}")
def test_where_we_differ(case):
    """No gradient to what saturates, and without a mantissa there is no value; the gradients to the widths are theirs."""
    found, theirs = run(case), run(case, "hgq2")
    largest = np.abs(values(case["m"], case["e"], case["e0"])).max() if case["m"] >= 0 else 0
    if case["m"] >= 0:
        np.testing.assert_array_equal(found["q"], theirs["q"])
        np.testing.assert_array_equal(found["dx"] == 0, np.abs(X) > largest * (1 + 2.0 ** -(case["m"] + 2)))
        for name in ("dm", "de", "de0"):
            np.testing.assert_array_equal(found[name][X != 0], theirs[name][X != 0])
    else:
        np.testing.assert_array_equal(found["q"], np.zeros_like(X))
        assert np.any(found["dm"] != 0), "a width below 0 can come back"


def values(m: int, e: int, e0: int) -> np.ndarray:
    """Every value of a format: significands of m + 1 bits at every exponent, the lowest without the leading one as well."""
    reach = max(2 ** (e - 1), 1)
    exponents = range(int(e0 - reach + 1), int(e0 + reach))
    positive = {s * 2.0 ** (x - m) for x in exponents for s in range(2**m, 2 ** (m + 1))}
    positive |= {s * 2.0 ** (exponents[0] - m) for s in range(2**m)}
    return np.array(sorted({-v for v in positive} | positive))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(-3, 3), st.lists(st.floats(-300, 300, width=32), min_size=8, max_size=8))
def test_the_nearest_of_all_values(m, e, e0, xs):
    grid, x = values(m, e, e0), np.float32(xs)
    q = np.asarray(minifloat(x, *map(jnp.float32, (m, e, e0))), np.float64)
    np.testing.assert_array_equal(np.abs(q - x), np.abs(grid[:, None] - x).min(0))
    np.testing.assert_array_equal(minifloat(jnp.float32(grid), *map(jnp.float32, (m, e, e0))), grid)
    fmt = minifloat_kif(jnp.float32(q), *map(jnp.float32, (m, e, e0)))
    np.testing.assert_array_equal(oracle.quantize(q, fmt.k, fmt.i, fmt.f), q)
    np.testing.assert_array_equal(total_bits(fmt), np.where(q == 0, 0, m + 1 + (q < 0)))


def test_a_shared_width_gets_the_sum_of_the_gradients():
    x = jnp.float32([[0.3, 5.0], [0.7, -9.0]])
    each = jax.grad(lambda m: jnp.sum(minifloat(x, m, jnp.float32(3), jnp.float32(0))))(jnp.full((2, 2), 1.0))
    shared = jax.grad(lambda m: jnp.sum(minifloat(x, m, jnp.float32(3), jnp.float32(0))))(jnp.full((1, 2), 1.0))
    np.testing.assert_allclose(shared, np.sum(each, 0, keepdims=True), rtol=1e-6)


def test_what_can_not_be():
    with pytest.raises(TypeError, match=r"\(3,\) does not broadcast"):
        minifloat(jnp.ones(2), jnp.ones(3), jnp.float32(3), jnp.float32(0))
    with pytest.raises(ValueError, match="expected 'hgq2'"):
        minifloat(jnp.ones(2), *map(jnp.float32, (1, 3, 0)), compat="pquantml")
