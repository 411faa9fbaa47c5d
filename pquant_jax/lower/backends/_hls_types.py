"""Fixed-point types of an HLS project: what every tensor, weight and sum of a graph needs, from its intervals.  numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pquant_jax.lower.ranges import Interval, common_format
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


def tensor_type(interval: Interval) -> Fixed:
    """The narrowest type of the whole array; one unused bit where it is always 0."""
    k, i, f = common_format(interval)
    return Fixed(k, i, f) if k + i + f else Fixed(0, 1, 0)


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
