"""Powers of two, logarithms, widths and reductions, against brute force."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax.numerics import ceil_log2, integer_bits, kif, power_of_two, quantize, reduce_axis, round_ste, total_bits

EXPONENTS = np.arange(-126, 128)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_power_of_two_is_exact(transform):
    want = np.array([math.ldexp(1.0, int(n)) for n in EXPONENTS])
    for n in (jnp.int32(EXPONENTS), jnp.float32(EXPONENTS)):
        ours = transform(lambda n: power_of_two(n, jnp.float32))(n)
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(ours, np.float64), want)


def test_power_of_two_is_clipped_beyond():
    ends = [2.0**-126, 2.0**127]
    np.testing.assert_array_equal(power_of_two(jnp.int32([-127, 128]), jnp.float32), ends)
    np.testing.assert_array_equal(power_of_two(jnp.float32([-1000, 1000]), jnp.float32), ends)


@pytest.mark.parametrize(("dtype", "low", "high"), [(jnp.float16, -14, 15), (jnp.bfloat16, -126, 127)])
def test_power_of_two_of_other_types(dtype, low, high):
    n = np.arange(low, high + 1)
    ours = power_of_two(jnp.int32(n), dtype)
    assert ours.dtype == dtype
    np.testing.assert_array_equal(np.asarray(ours, np.float64), np.ldexp(1.0, n))


def ceil_log2_of(v: float) -> int:
    mantissa, exponent = math.frexp(v)
    return exponent - (mantissa == 0.5)


def test_ceil_log2(key):
    powers = np.ldexp(np.float32(1), EXPONENTS[1:-1])
    drawn = np.exp2(np.asarray(jax.random.uniform(key, (500,), minval=-120, maxval=120))).astype(np.float32)
    v = np.concatenate([powers, np.nextafter(powers, np.float32(np.inf)), np.nextafter(powers, np.float32(0)), drawn])
    want = [ceil_log2_of(float(x)) for x in v]
    np.testing.assert_array_equal(ceil_log2(jnp.asarray(v)), want)
    np.testing.assert_array_equal(jax.jit(ceil_log2)(v), want)


def fewest(low: float, high: float, f: int) -> int:
    """The smallest i >= -f whose two's complement range holds every multiple of 2^-f in [low, high]."""
    first, last = math.ceil(low * 2.0**f), math.floor(high * 2.0**f)
    i = -f
    while first <= last and not (-(2 ** (i + f)) <= first and last <= 2 ** (i + f) - 1):
        i += 1
    return i


def intervals(reach: int, per_step: int) -> tuple[np.ndarray, np.ndarray]:
    ends = np.arange(-reach, reach + 1) / per_step
    low, high = np.meshgrid(ends, ends, indexing="ij")
    return low[low <= high], high[low <= high]


@pytest.mark.parametrize("f", [-3, -1, 0, 1, 3, 8])
def test_integer_bits_is_sound_and_tight_on_the_grid(f):
    low, high = (np.ldexp(v, -f) for v in intervals(34, 1))
    want = [fewest(*ends, f) for ends in zip(low, high, strict=True)]
    np.testing.assert_array_equal(integer_bits(jnp.float32(low), jnp.float32(high), jnp.float32(f)), want)


@pytest.mark.parametrize("f", [-1, 0, 3])
def test_integer_bits_is_sound_and_tight_between_the_grid_points(f):
    low, high = (np.ldexp(v, -f) for v in intervals(20, 4))
    low, high = (v[(low <= 0) & (high >= 0)] for v in (low, high))
    want = np.array([fewest(*ends, f) for ends in zip(low, high, strict=True)])
    ours = np.asarray(integer_bits(jnp.float32(low), jnp.float32(high), jnp.float32(f)))
    assert np.all(ours >= want), "a value of the interval does not fit"
    np.testing.assert_array_equal(ours, want)


def test_integer_bits_tracks_both_ends():
    low, high, f = (jnp.float32(v) for v in ([-1, -1, 0, 0, 0.5], [0.5, 1, 0.875, 1, 0.5], [3, 3, 3, 3, 3]))
    np.testing.assert_array_equal(integer_bits(low, high, f), [0, 1, 0, 1, 0])
    assert float(integer_bits(jnp.float32(0), jnp.float32(0), jnp.float32(3))) == -3  # only zero: no width
    assert float(integer_bits(jnp.float32(-1), jnp.float32(0.5), jnp.float32(2.6))) == 0  # f counts as its round


@pytest.mark.parametrize("f", [0, 10, 24, -20])
def test_integer_bits_at_the_last_exact_code(f):
    """Codes of up to 24 bits are the ones that float32 holds."""
    top = np.ldexp(np.float64([2**23 - 1, 2**23, 2**24 - 1, 2**24]), -f)
    low, high = jnp.zeros(4, jnp.float32), jnp.float32(top)
    np.testing.assert_array_equal(integer_bits(low, high, jnp.float32(f)), np.array([23, 24, 24, 25]) - f)


def test_integer_bits_has_no_gradient():
    def total(low, high, f):
        return jnp.sum(integer_bits(low, high, f))

    for g in jax.grad(total, (0, 1, 2))(jnp.float32([-1.0]), jnp.float32([0.7]), jnp.float32([3.0])):
        np.testing.assert_array_equal(g, [0])


def test_total_bits():
    i, f = jnp.float32([2, -1, -3, 2.5, 3.5]), jnp.float32([2, 1, 2, 0.5, -1.5])
    np.testing.assert_array_equal(total_bits(kif(1, i, f)), [5, 1, 0, 3, 3])  # 2.5 -> 2, 0.5 -> 0, 3.5 -> 4, -1.5 -> -2
    np.testing.assert_array_equal(total_bits(kif(0, i, f)), [4, 0, 0, 2, 2])
    np.testing.assert_array_equal(total_bits(kif(1, i, f), compat="hgq2"), [5, 1, 1, 3, 3])
    np.testing.assert_array_equal(total_bits(kif(1, i, f, overflow="WRAP"), compat="hgq2"), [4, 0, 0, 2, 2])


def test_total_bits_is_zero_exactly_where_the_value_is():
    for overflow in ("SAT", "WRAP"):
        k, i, f = np.array([(k, i, f) for k in (0, 1) for i in range(-3, 4) for f in range(-3, 4)]).T
        x = np.repeat(np.linspace(-16, 16, 513, dtype=np.float32)[:, None], k.size, axis=1)
        silent = np.all(np.asarray(quantize(x, kif(k, i, f, overflow=overflow))) == 0, axis=0)
        np.testing.assert_array_equal(np.asarray(total_bits(kif(k, i, f, overflow=overflow))) == 0, silent)


def test_total_bits_gradient_stops_at_no_bits():
    gi, gf = jax.grad(lambda i, f: total_bits(kif(1, i, f)).sum(), (0, 1))(jnp.float32([2, -2]), jnp.float32([1.4, -1]))
    np.testing.assert_array_equal(gi, [1, 0])
    np.testing.assert_array_equal(gf, [1, 0])


def test_round_ste():
    v = jnp.float32([-1.5, -0.5, 0.5, 1.5, 2.3])
    np.testing.assert_array_equal(round_ste(v), np.rint(v))
    np.testing.assert_array_equal(jax.grad(lambda v: jnp.sum(round_ste(v) * 3))(v), np.full(5, 3))


NUMPY = {"sum": np.sum, "min": np.min, "max": np.max}


@pytest.mark.parametrize("size", [1, 2, 63, 64, 67, 97, 192, 250, 1024, 1031])
def test_reduce_axis(size):
    rng = np.random.default_rng(size)
    shapes = ((size, 3, 2), (3, size, 2), (2, 3, size))
    # sums of integers are exact in any order
    arrays = [rng.integers(-1000, 1000, shape).astype(np.float32) for shape in shapes]

    @jax.jit
    def reduced(arrays):
        return {op: [reduce_axis(x, op, axis) for axis, x in enumerate(arrays)] for op in NUMPY}

    for op, results in reduced(arrays).items():
        for axis, (ours, x) in enumerate(zip(results, arrays, strict=True)):
            np.testing.assert_array_equal(ours, NUMPY[op](x, axis), f"{op} over axis {axis} of {x.shape}")


@pytest.mark.parametrize("axis", [-1, -2])
def test_reduce_axis_counts_from_the_end(axis):
    x = jnp.arange(256.0).reshape((2, 128) if axis == -1 else (128, 2))
    np.testing.assert_array_equal(reduce_axis(x, "sum", axis), np.sum(np.asarray(x), axis))
