"""The fixed-point grid in jax.numpy: rounding, overflow, and the closed-form surrogate gradients.

Formulas: HGQ (Sun et al., arXiv:2405.00645) as implemented by the package `quantizers`; `oracle.py` is the numpy twin.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

LN2: Final = 0.6931471805599453
_EXPONENT_BIAS: Final = 127
_MANTISSA_BITS: Final = 23


def check_modes(rounding: str, overflow: str) -> None:
    """Raise ValueError unless both modes are known."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow is {overflow!r}, expected one of {', '.join(OVERFLOWS)}")


def kif(k, i, f, *, rounding: str = "RND", overflow: str = "SAT") -> KIF:
    """A `KIF` of float32 arrays with both modes checked.

    >>> kif(1, 2, 2).f.dtype
    dtype('float32')
    """
    check_modes(rounding, overflow)
    return KIF(*(jnp.asarray(v, jnp.float32) for v in (k, i, f)), rounding=rounding, overflow=overflow)


def power_of_two(n: jax.Array, dtype) -> jax.Array:
    """2^n for integer-valued n, exact for -126 <= n <= 127, clipped beyond.

    Never `exp2`: XLA's is inexact for 28 of 61 integer exponents on CPU.  In float32 the exponent field is written
    directly, which equals `jnp.ldexp(1, n)` bit for bit there and costs a fifth of it.

    >>> power_of_two(jnp.int32([-3, 0, 4]), jnp.float32).tolist()
    [0.125, 1.0, 16.0]
    """
    if dtype != jnp.float32:
        return jnp.ldexp(jnp.ones((), dtype), n.astype(jnp.int32))
    exponent = jnp.clip(n.astype(jnp.int32), 1 - _EXPONENT_BIAS, _EXPONENT_BIAS)
    return jax.lax.bitcast_convert_type((exponent + _EXPONENT_BIAS) << _MANTISSA_BITS, jnp.float32)


def round_codes(y: jax.Array, rounding: str) -> jax.Array:
    """Round y = x * 2^f to an integer.

    Half-way cases are decided on the exact fraction y - floor(y), because floor(y + 0.5) rounds 0.49999997 up.
    """
    if rounding == "TRN":
        return jnp.floor(y)
    if rounding == "RND":
        return _half_up(y)
    if rounding == "RND_CONV":
        return jnp.round(y)
    if rounding == "TRN_ZERO":
        return jnp.trunc(y)
    if rounding == "RND_MIN_INF":
        return -_half_up(-y)
    a = jnp.abs(y)
    r = jnp.floor(a)
    up = a - r > 0.5 if rounding == "RND_ZERO" else a - r >= 0.5
    return jnp.sign(y) * jnp.where(up, r + 1, r)


def _half_up(y: jax.Array) -> jax.Array:
    r = jnp.floor(y)
    return jnp.where(y - r >= 0.5, r + 1, r)


class Grid(NamedTuple):
    """What a format means in numbers: scale 2^f, step 2^-f, span 2^i_c with i_c = max(i, -f), low and high bounds."""

    scale: jax.Array
    step: jax.Array
    span: jax.Array
    low: jax.Array
    high: jax.Array


def grid(k: jax.Array, i: jax.Array, f: jax.Array, overflow: str, *, shared: bool) -> Grid:
    """The grid of a format; shared: one format serves many values.

    Every part of a shared grid is the result of a division, and that is on purpose.  XLA fuses cheap arithmetic into
    the loop over the values and computes it again for each of them (131 us instead of 33 us for 1024 x 64 on CPU; an
    optimization barrier does not survive to that pass), but it never fuses an expensive operation into a broadcast.
    Dividing by a power of two is exact.
    """
    fr = jnp.round(f)
    scale, step = power_of_two(fr, f.dtype), power_of_two(-fr, f.dtype)
    codes = power_of_two(jnp.maximum(jnp.round(i), -fr) + fr, f.dtype)
    lowest = -k * (codes - 1 if overflow == "SAT_SYM" else codes)
    if shared:
        return Grid(1 / step, 1 / scale, codes / scale, lowest / scale, (codes - 1) / scale)
    return Grid(scale, step, codes * step, lowest * step, (codes - 1) * step)


def quantize_forward(x, k, i, f, *, rounding: str, overflow: str, wrap: bool) -> jax.Array:
    """The value of `quantize`; see `pquant_jax.numerics.quantize`."""
    shared = f.size < x.size
    g = grid(k, i, f, overflow, shared=shared)
    if overflow in ("SAT", "SAT_SYM"):
        x = jnp.clip(x, g.low, g.high)
    codes = round_codes(x * g.scale, rounding)
    if overflow == "WRAP_SM" or (overflow == "WRAP" and wrap):
        codes = _wrap(codes, k, g.span * g.scale, reflect=overflow == "WRAP_SM")
    dead, scale = k + jnp.round(i) + jnp.round(f) <= 0, power_of_two(jnp.round(f), x.dtype)
    zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
    # a bias is broadcast to the batch next, so it too ends in a division; x / (1 / y) would be simplified to x * y
    return codes * (jnp.where(dead, zero, one) / scale) if shared else jnp.where(dead, zero, codes) / scale


def _wrap(codes: jax.Array, k: jax.Array, span: jax.Array, *, reflect: bool) -> jax.Array:
    """Fold integer codes into [-k*span, span).  Each step is exact in float32: span is a power of two."""
    period = span * (1 + k)
    full = 2 * period if reflect else period
    u = codes - full * jnp.floor(codes / full)  # in [0, full)
    if not reflect:
        # codes beyond 24 bits would lose their last ones in u; what is in range is not touched
        return jnp.where((codes >= -k * span) & (codes < span), codes, jnp.where(u >= span, u - k * period, u))
    # the triangle wave -k*span .. span-1, span-1 .. -k*span, read from code 0 on
    falling = (u >= span) & (u < span + period)
    return jnp.where(falling, 2 * span - 1 - u, jnp.where(u >= span, u - full, u))


def quantize_gradients(x, k, i, f, u, *, rounding: str, overflow: str, wrap: bool) -> tuple[jax.Array, ...]:
    """(dx, di, df), elementwise before the sum over shared formats.  Zero width keeps the formula: a dead weight can revive.

    In range dx = u, df = u ln2 (x - q); above: di = u ln2 2^i, df = u ln2 2^-f; below: di = -k u ln2 2^i, and
    df = -k u ln2 2^-f for SAT_SYM.  WRAP in training has dx = u everywhere and no gradient to i.
    """
    scale, step, span, low, high = grid(k, i, f, overflow, shared=f.size < x.size)
    codes = round_codes(x * scale, rounding)
    residual = LN2 * (x - codes * step)
    zero = jnp.zeros((), x.dtype)
    if overflow == "WRAP":
        if not wrap:
            return u, jnp.zeros_like(u), u * residual
        turns = jnp.floor((codes * step + k * span) / (span * (1 + k)))
        return u, u * (-LN2) * span * (1 + k) * turns, u * residual
    if overflow == "WRAP_SM":
        period = span * (1 + k)
        from_low = codes * step + k * span
        turns = jnp.floor(from_low / (2 * period))
        falling = from_low - 2 * period * turns >= period
        di = jnp.where(falling, 2 * period * (1 + turns) - 2 * k * span, -2 * period * turns)
        return jnp.where(falling, -u, u), u * LN2 * di, jnp.where(falling, u * (LN2 * step - residual), u * residual)
    over, under = x > high, x < low
    below_f = -k * step if overflow == "SAT_SYM" else zero
    dx = jnp.where(over | under, zero, u)
    di = u * LN2 * jnp.where(over, span, jnp.where(under, -k * span, zero))
    df = u * jnp.where(over, LN2 * step, jnp.where(under, LN2 * below_f, residual))
    return dx, di, df


def round_ste(v: jax.Array) -> jax.Array:
    """Round half to even with identity gradient."""
    return v + jax.lax.stop_gradient(jnp.round(v) - v)


def total_bits(fmt: KIF, *, compat: str | None = None) -> jax.Array:
    """Width relu(k + i + f) in bits, differentiable in i and f through the rounding.

    Our convention counts the sign bit in every mode and is 0 exactly where the value is always 0.  `compat="hgq2"`:
    relu(i + f), plus k for SAT only (`quantizers` 1.2.2).
    """
    magnitude = round_ste(fmt.i) + round_ste(fmt.f)
    if compat == "hgq2":
        return jax.nn.relu(magnitude) + (fmt.k if fmt.overflow == "SAT" else 0)
    return jax.nn.relu(fmt.k + magnitude)


def ceil_log2(v: jax.Array) -> jax.Array:
    """Smallest integer n with 2^n >= v, exact for normal positive float32 (read off the exponent field); float32."""
    bits = jax.lax.bitcast_convert_type(v.astype(jnp.float32), jnp.int32)
    fraction = bits & ((1 << _MANTISSA_BITS) - 1)
    return floor_log2(v) + (fraction != 0)


def floor_log2(v: jax.Array) -> jax.Array:
    """Largest integer n with 2^n <= v, as exact as `ceil_log2`; float32."""
    bits = jax.lax.bitcast_convert_type(v.astype(jnp.float32), jnp.int32)
    return ((bits >> _MANTISSA_BITS) - _EXPONENT_BIAS).astype(jnp.float32)


def integer_bits(low: jax.Array, high: jax.Array, f: jax.Array) -> jax.Array:
    """Fewest integer bits i so that every value of the grid 2^-f in [low, high] fits: -2^i <= low, high <= 2^i - 2^-f.

    low and high are tracked separately: [-1, 0.5] at f = 3 needs i = 0, where a bound on max |x| alone would say 1.
    An interval that holds only 0 needs i = -f, width zero.  Values between the grid's points do not count: round the
    range first where they will be rounded.  No gradient.
    """
    low, high, fr = (jax.lax.stop_gradient(v) for v in (low, high, jnp.round(f)))
    scale, one = power_of_two(fr, jnp.float32), jnp.float32(1)
    # code <= 2^n - 1 is code < 2^n; both ends as codes, where code + 1 would be rounded from 2^24 on
    first, last = jnp.floor(-low * scale), jnp.floor(high * scale)
    need_low = jnp.where(first >= 1, ceil_log2(jnp.maximum(first, one)), 0)
    need_high = jnp.where(last >= 1, floor_log2(jnp.maximum(last, one)) + 1, 0)
    return jnp.maximum(need_low, need_high) - fr
