"""The numpy oracle of the fixed-point quantizer: float64, exact while |x * 2^f| < 2^53.  Imports no JAX."""

from __future__ import annotations

from typing import Final

import numpy as np

ROUNDINGS: Final = ("TRN", "RND", "RND_CONV", "TRN_ZERO", "RND_ZERO", "RND_MIN_INF", "RND_INF")
OVERFLOWS: Final = ("SAT", "SAT_SYM", "WRAP", "WRAP_SM")


def round_codes(y: np.ndarray, rounding: str) -> np.ndarray:
    """Round the scaled value `y = x * 2^f` to an integer code.

    The comparison is made on the exact fraction, never as `floor(y + 0.5)`, which rounds 0.49999997 up in float32.

    >>> round_codes(np.array([-1.5, -0.5, 0.5, 1.5, 2.5]), "RND_CONV").tolist()
    [-2.0, -0.0, 0.0, 2.0, 2.0]
    """
    y = np.asarray(y, np.float64)
    if rounding == "TRN":
        return np.floor(y)
    if rounding == "RND":
        return np.floor(y) + (y - np.floor(y) >= 0.5)
    if rounding == "RND_CONV":
        return np.rint(y)
    if rounding == "TRN_ZERO":
        return np.trunc(y)
    a, sign = np.abs(y), np.sign(y)
    if rounding == "RND_ZERO":
        return sign * (np.floor(a) + (a - np.floor(a) > 0.5))
    if rounding == "RND_INF":
        return sign * (np.floor(a) + (a - np.floor(a) >= 0.5))
    if rounding == "RND_MIN_INF":
        return -(np.floor(-y) + (-y - np.floor(-y) >= 0.5))
    raise ValueError(f"rounding is {rounding!r}, expected one of {ROUNDINGS}")


def quantize_codes(x, k, i, f, *, rounding: str = "RND", overflow: str = "SAT") -> np.ndarray:
    """Integer codes n with `quantize(x) = n * 2^-f`; float64 that holds integers.

    k in {0, 1} sign bit, i integer bits without the sign, f fractional bits; i and f may be negative, and count as
    their round half to even.  Range of the codes: [-k * 2^(i+f), 2^(i+f) - 1], and 0 alone wherever k + i + f <= 0.
    """
    x, k, i, f = np.broadcast_arrays(np.asarray(x, np.float64), k, _whole(i), _whole(f))
    k = np.asarray(k).astype(np.int64)
    n = round_codes(np.ldexp(x, f), rounding)
    span = np.ldexp(1.0, np.maximum(i + f, 0))
    high, low = span - 1, -span * k
    if overflow == "SAT":
        n = np.clip(n, low, high)
    elif overflow == "SAT_SYM":
        n = np.clip(n, -high * k, high)
    elif overflow == "WRAP":
        n = np.mod(n - low, span * (1 + k)) + low
    elif overflow == "WRAP_SM":  # a triangle wave: what leaves the range at one end comes back from that same end
        period = span * (1 + k)
        u = np.mod(n - low, 2 * period)
        n = np.where(u < period, u, 2 * period - 1 - u) + low
    else:
        raise ValueError(f"overflow is {overflow!r}, expected one of {OVERFLOWS}")
    return np.where(k + i + f <= 0, 0.0, n) + 0.0  # + 0.0 turns -0.0 into 0.0


def quantize(x, k, i, f, *, rounding: str = "RND", overflow: str = "SAT") -> np.ndarray:
    """The fixed-point value of `x`, float64: what `pquant_jax.numerics.quantize` must equal.

    >>> float(quantize(0.49999997, 1, 3, 0)), float(quantize(5.3, 1, 2, 2, overflow="WRAP"))
    (0.0, -2.75)
    """
    return np.ldexp(quantize_codes(x, k, i, f, rounding=rounding, overflow=overflow), -_whole(f))


def _whole(v) -> np.ndarray:
    return np.rint(np.asarray(v)).astype(np.int64)


def significant_bits(values: np.ndarray) -> np.ndarray:
    """Bits of the integer |values| * 2^least_f(values), int64: what a constant multiplier has to multiply by; 0 for 0.

    >>> significant_bits(np.array([0.75, 6.0, 0.0, 1.0, 0.1])).tolist()
    [2, 2, 0, 1, 52]
    """
    return np.frexp(np.abs(np.ldexp(values, least_f(values))))[1].astype(np.int64)


def least_f(values: np.ndarray) -> np.ndarray:
    """The smallest f, int64, with `values * 2^f` an integer; 0 for the value 0.

    >>> least_f(np.array([0.75, 6.0, 0.0, 1.0])).tolist()
    [2, -1, 0, 0]
    """
    mantissa, exponent = np.frexp(np.asarray(values, np.float64))
    codes = np.ldexp(mantissa, 53).astype(np.int64)
    trailing = np.frexp((codes & -codes).astype(np.float64))[1] - 1  # a power of two: exact
    return np.where(codes == 0, 0, 53 - exponent - trailing).astype(np.int64)
