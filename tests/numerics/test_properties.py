"""What holds for every input: drawn by hypothesis, in every mode."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax.numerics import kif, oracle, quantize

SHAPE = (3, 8)
MODES = list(itertools.product(oracle.ROUNDINGS, oracle.OVERFLOWS))
every_mode = pytest.mark.parametrize(("rounding", "overflow"), MODES)
width = st.integers(-6, 10)
formats = st.tuples(st.integers(0, 1), width, width)
# drawn as integers, because hypothesis draws those fast: n / 2^20 of eight times the range, or n quarters of a step
fine = st.lists(st.integers(-(2**20), 2**20), min_size=12, max_size=12)
coarse = st.lists(st.integers(-256, 256), min_size=12, max_size=12)


@st.composite
def values(draw, i: int, f: int) -> np.ndarray:
    """float32 values within eight times the range: anything, multiples of a quarter step, and their float neighbours."""
    x = np.concatenate([np.ldexp(draw(fine), i - 17), np.ldexp(draw(coarse), -f - 2)]).astype(np.float32)
    beside = np.nextafter(x, np.float32(draw(st.sampled_from([-np.inf, np.inf]))))
    x = np.where(np.arange(x.size) % 3 == 0, beside, x)
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x).reshape(SHAPE)  # XLA flushes subnormals


@st.composite
def samples(draw) -> tuple[np.ndarray, int, int, int]:
    k, i, f = draw(formats)
    return draw(values(i, f)), k, i, f


def bounds(k: int, i: int, f: int, overflow: str) -> tuple[float, float]:
    if k + i + f <= 0:
        return 0.0, 0.0
    high = 2.0**i - 2.0**-f
    return (-k * high if overflow == "SAT_SYM" else -k * 2.0**i), high


def quantized(x, k, i, f, rounding, overflow, **static) -> np.ndarray:
    return np.asarray(quantize(jnp.asarray(x), kif(k, i, f, rounding=rounding, overflow=overflow), **static), np.float64)


@every_mode
@given(samples())
def test_on_the_grid_in_range_and_idempotent(rounding, overflow, sample):
    x, k, i, f = sample
    q, (low, high) = quantized(x, k, i, f, rounding, overflow), bounds(k, i, f, overflow)
    codes = np.ldexp(q, f)
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert q.min() >= low and q.max() <= high
    np.testing.assert_array_equal(quantized(np.float32(q), k, i, f, rounding, overflow), q)


@every_mode
@given(samples())
def test_error_in_range(rounding, overflow, sample):
    x, k, i, f = sample
    low, high = bounds(k, i, f, overflow)
    inside = (x >= low) & (x <= high) & (k + i + f > 0)
    error = np.ldexp(np.abs(quantized(x, k, i, f, rounding, overflow) - x.astype(np.float64)), f)[inside]
    assert np.all(error <= 0.5 if rounding.startswith("RND") else error < 1)


@pytest.mark.parametrize(("rounding", "overflow"), [m for m in MODES if m[1] in ("SAT", "SAT_SYM")])
@given(samples())
def test_monotone(rounding, overflow, sample):
    x, k, i, f = sample
    q = quantized(np.sort(x, axis=None), k, i, f, rounding, overflow)
    assert np.all(np.diff(q) >= 0)


@pytest.mark.parametrize("rounding", oracle.ROUNDINGS)
@given(samples())
def test_wrap_is_congruent(rounding, sample):
    x, k, i, f = sample
    turns = (quantized(x, k, i, f, rounding, "WRAP") - quantized(x, k, i, f, rounding, "WRAP", wrap=False)) / 2.0 ** (k + i)
    if k + i + f > 0:
        np.testing.assert_array_equal(turns, np.rint(turns))


@every_mode
@settings(max_examples=10)
@given(samples())
def test_no_bits_no_value(rounding, overflow, sample):
    x, k, i, f = sample
    i = min(i, -k - f)
    np.testing.assert_array_equal(quantized(x, k, i, f, rounding, overflow), np.zeros(SHAPE))
    np.testing.assert_array_equal(oracle.quantize(x, k, i, f, rounding=rounding, overflow=overflow), np.zeros(SHAPE))


SHARINGS = ((), (SHAPE[1],), (SHAPE[0], 1), SHAPE)  # one format per tensor, channel, row, element
quantize_all = jax.jit(lambda x, fmts: [quantize(x, fmt) for fmt in fmts])


@every_mode
@settings(max_examples=10)
@given(data=st.data())
def test_jit_and_eager_equal_the_oracle_for_every_sharing(rounding, overflow, data):
    modes = dict(rounding=rounding, overflow=overflow)
    draws = np.array(data.draw(st.lists(formats, min_size=5, max_size=5)))
    x = data.draw(values(int(draws[0, 1]), int(draws[0, 2])))
    picked = draws[np.arange(x.size) % 5]
    shared = [picked[: int(np.prod(shape))].T.reshape(3, *shape) for shape in SHARINGS]
    wants = [oracle.quantize(x, *fmt, **modes) for fmt in shared]
    fmts = [kif(*fmt, **modes) for fmt in shared]
    for ours, want in zip(quantize_all(x, fmts), wants, strict=True):
        np.testing.assert_array_equal(ours, want)
    for n in (0, 3):  # without jit: one of the two ways in which the value is computed each
        np.testing.assert_array_equal(quantize(x, fmts[n]), wants[n])


@jax.jit
def mapped(x, scalars, channels, one):
    """A format per row; the same values under every format; formats per channel for each; the columns under one format."""
    together = jax.vmap(quantize, (None, 0))
    return jax.vmap(quantize)(x, scalars), together(x, scalars), together(x, channels), jax.vmap(quantize, (1, None), 1)(x, one)


@every_mode
@settings(max_examples=10)
@given(data=st.data())
def test_vmap_equals_the_oracle(rounding, overflow, data):
    modes = dict(rounding=rounding, overflow=overflow)
    draws = np.array(data.draw(st.lists(formats, min_size=SHAPE[0], max_size=SHAPE[0])))
    x = data.draw(values(int(draws[0, 1]), int(draws[0, 2])))
    channels = draws.T[:, (np.arange(SHAPE[0])[:, None] + np.arange(SHAPE[1])) % SHAPE[0]]
    results = mapped(x, kif(*draws.T, **modes), kif(*channels, **modes), kif(*draws[0], **modes))
    wide = (draws.T[:, :, None], draws.T[:, :, None, None], channels[:, :, None, :], draws[0])
    for ours, fmt in zip(results, wide, strict=True):
        np.testing.assert_array_equal(ours, oracle.quantize(x, *fmt, **modes))


@functools.partial(jax.jit, static_argnums=4)
def gradients(x, k, i, f, overflow):
    def total(i, f):
        return quantize(x, kif(k, i, f, overflow=overflow), wrap=overflow != "WRAP").sum()

    return [jax.grad(total, (0, 1))(*(jnp.full(shape, v, jnp.float32) for v in (i, f))) for shape in SHARINGS]


@pytest.mark.parametrize("overflow", oracle.OVERFLOWS)
@settings(max_examples=15)
@given(sample=samples())
def test_a_shared_format_gets_the_sum_of_the_gradients(overflow, sample):
    x, *fmt = sample
    *shared, each = gradients(x, *(jnp.float32(v) for v in fmt), overflow)
    for shape, axes, ours in zip(SHARINGS[:3], ((0, 1), 0, 1), shared, strict=True):
        for total, elementwise in zip(ours, each, strict=True):
            want = np.sum(np.asarray(elementwise, np.float64), axes).reshape(shape)
            np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-5 * np.abs(elementwise).max())


@pytest.mark.parametrize("rounding", ["RND", "RND_CONV", "RND_ZERO", "RND_MIN_INF", "RND_INF"])
def test_just_below_a_half_rounds_down(rounding):
    """floor(x + 0.5) would give 1: the sum rounds up in float32."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    x = np.float32([below, -below])
    assert below == np.float32(0.49999997)
    np.testing.assert_array_equal(quantize(x, kif(1, 3, 0, rounding=rounding)), [0, 0])
    np.testing.assert_array_equal(jax.jit(quantize)(x, kif(1, 3, 0, rounding=rounding)), [0, 0])
    np.testing.assert_array_equal(oracle.quantize(x, 1, 3, 0, rounding=rounding), [0, 0])


@given(st.integers(0, 1), st.floats(-3, 6, width=32), st.floats(-3, 6, width=32))
def test_a_fractional_format_is_its_round_half_even(k, i, f):
    x = np.linspace(-9, 9, 41, dtype=np.float32)
    np.testing.assert_array_equal(quantize(x, kif(k, i, f)), quantize(x, kif(k, np.rint(i), np.rint(f))))


@given(st.integers(0, 1), st.floats(-3, 6, width=32), st.floats(-3, 6, width=32))
def test_a_fractional_format_is_its_round_half_even_for_the_oracle(k, i, f):
    x = np.linspace(-9, 9, 41, dtype=np.float32)
    np.testing.assert_array_equal(oracle.quantize(x, k, i, f), oracle.quantize(x, k, np.rint(i), np.rint(f)))
