"""Fixed-point types of an HLS project: what every tensor, weight and sum of a graph needs, from its intervals.  numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pquant_jax.lower.ranges import Interval
from pquant_jax.numerics.oracle import least_f


class Fixed(NamedTuple):
    """One type for all elements of an array: sign bit k, i integer bits without it, f fractional bits, modes as in ap_fixed.

    >>> str(Fixed(1, 3, 2)), str(Fixed(0, -1, 4, "RND", "SAT"))
    ('fixed<6,4>', 'ufixed<3,-1,RND,SAT>')
    """

    k: int
    i: int
    f: int
    rounding: str = "TRN"
    overflow: str = "WRAP"

    @property
    def width(self) -> int:
        """Bits, the sign among them."""
        return self.k + self.i + self.f

    def __str__(self) -> str:
        modes = "" if (self.rounding, self.overflow) == ("TRN", "WRAP") else f",{self.rounding},{self.overflow}"
        return f"{'' if self.k else 'u'}fixed<{self.width},{self.k + self.i}{modes}>"


def formats(interval: Interval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, i, f of every element, the narrowest that hold its interval; all 0 where it is always 0."""
    low, high, f = interval
    zero = (low == 0) & (high == 0)
    f = np.where(zero, 0, f).astype(np.int64)
    k = (low < 0).astype(np.int64)
    span = np.maximum(-low, np.where(high > 0, high + np.ldexp(1.0, -f), 0.0))
    _, exponent = np.frexp(np.where(zero, 1.0, span))
    i = exponent - (np.ldexp(0.5, exponent) == span)  # least i with span <= 2^i
    i = np.where(zero, 0, np.maximum(i, 1 - k - f))
    return k, i, f


def tensor_type(interval: Interval) -> Fixed:
    """The narrowest type of the whole array; one unused bit where it is always 0."""
    k, i, f = (np.atleast_1d(v).ravel() for v in formats(interval))
    used = k + i + f > 0
    if not used.any():
        return Fixed(0, 1, 0)
    return Fixed(int(k.max()), int(i[used].max()), int(f[used].max()))


def array_type(values: np.ndarray) -> Fixed:
    """Of constants."""
    values = np.asarray(values, np.float64)
    return tensor_type(Interval(values, values, least_f(values)))


def union(types: Sequence[Fixed]) -> Fixed:
    """A type that holds what each of them does."""
    return Fixed(max(t.k for t in types), max(t.i for t in types), max(t.f for t in types))


def accumulator(out: Fixed, terms: Sequence[tuple[Fixed, Fixed]], bias: Fixed | None) -> Fixed:
    """Of a sum of products whose value fits `out`: it wraps on the way and comes back, but needs every fractional bit."""
    f: int = max(out.f, max(a.f + c.f for a, c in terms), out.f if bias is None else bias.f)
    return Fixed(out.k, max(out.i, 1 - out.k - f), f)
