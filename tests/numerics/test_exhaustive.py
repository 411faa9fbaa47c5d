"""Every format of up to 8 bits in every mode, on a grid four times finer than its step and four times wider than its range.

The reference below is integer arithmetic on quarters of a step, and shares nothing with the package.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax.numerics import kif, oracle, quantize

WIDEST = 8
FORMATS = np.array([(k, i, f) for k in (0, 1) for i in range(-2, 11) for f in range(-2, 11) if k + i + f <= WIDEST])
REACH = 4 * 4 * 2**WIDEST  # quarters of a step: four times the range of the widest format
QUARTERS = np.arange(-REACH, REACH + 1)
MODES = list(itertools.product(oracle.ROUNDINGS, oracle.OVERFLOWS))


def nearest_code(m: np.ndarray, rounding: str) -> np.ndarray:
    """m / 4 rounded to an integer, for integer m."""
    magnitude, sign = np.abs(m), np.sign(m)
    if rounding == "TRN":
        return m // 4
    if rounding == "TRN_ZERO":
        return sign * (magnitude // 4)
    if rounding == "RND":
        return (m + 2) // 4
    if rounding == "RND_MIN_INF":
        return (m + 1) // 4
    if rounding == "RND_INF":
        return sign * ((magnitude + 2) // 4)
    if rounding == "RND_ZERO":
        return sign * ((magnitude + 1) // 4)
    whole, rest = np.divmod(m, 4)
    return whole + ((rest == 3) | ((rest == 2) & (whole % 2 == 1)))


def folded(n: np.ndarray, k: int, width: int, overflow: str) -> np.ndarray:
    """Integer codes brought into the range of k sign bits and `width` others."""
    if k + width <= 0:
        return np.zeros_like(n)
    low, high = -k * 2**width, 2**width - 1
    if overflow == "SAT":
        return np.minimum(np.maximum(n, low), high)
    if overflow == "SAT_SYM":
        return np.minimum(np.maximum(n, -k * high), high)
    once_around = np.arange(low, high + 1)
    if overflow == "WRAP_SM":
        once_around = np.concatenate([once_around, once_around[::-1]])
    return once_around[(n - low) % len(once_around)]


def expected(rounding: str, overflow: str) -> np.ndarray:
    codes = nearest_code(QUARTERS, rounding)
    return np.stack([np.ldexp(folded(codes, k, i + f, overflow).astype(float), -f) for k, i, f in FORMATS])


def inputs() -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    k, i, f = FORMATS.T[:, :, None]
    return np.ldexp(QUARTERS / 4, -f), (k, i, f)


def test_the_table_of_formats_is_what_it_says():
    assert len(FORMATS) == 91 + 78  # 1 + 2 + ... + 13 unsigned, 1 + 2 + ... + 12 signed
    x, (_, i, f) = inputs()
    np.testing.assert_array_equal(x.astype(np.float32), x)
    widest = np.abs(x).max(axis=1)
    assert np.all(widest >= 4 * np.ldexp(1.0, np.maximum(i, -f)[:, 0]))


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_the_oracle_and_quantize(rounding, overflow):
    x, (k, i, f) = inputs()
    want, modes = expected(rounding, overflow), dict(rounding=rounding, overflow=overflow)
    codes = oracle.quantize_codes(x, k, i, f, **modes)
    np.testing.assert_array_equal(np.ldexp(codes, -f), want)
    np.testing.assert_array_equal(oracle.quantize(x, k, i, f, **modes), want)
    shared = kif(k, i, f, **modes)  # one format per row
    np.testing.assert_array_equal(quantize(jnp.float32(x), shared), want)
    own = kif(*np.broadcast_arrays(k, i, f, x)[:3], **modes)  # one format per element
    np.testing.assert_array_equal(quantize(jnp.float32(x), own), want)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
def test_wrap_only_rounds_in_the_training_trace(rounding):
    x, (k, i, f) = inputs()
    codes = np.where(k + i + f <= 0, 0, nearest_code(QUARTERS, rounding))
    fmt = kif(k, i, f, rounding=rounding, overflow="WRAP")
    np.testing.assert_array_equal(quantize(jnp.float32(x), fmt, wrap=False), np.ldexp(codes.astype(float), -f))
