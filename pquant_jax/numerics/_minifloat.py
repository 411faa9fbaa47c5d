"""Small floating-point numbers with trained mantissa and exponent widths (HGQ2's q_type "float")."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF
from pquant_jax.numerics._fixed import LN2, floor_log2, power_of_two, round_ste
from pquant_jax.numerics._primitive import unbroadcast

_THEIR_EPSILON = 1e-7


def minifloat(x: jax.Array, m: jax.Array, e: jax.Array, e0: jax.Array, *, compat: str | None = None) -> jax.Array:
    """x as a float of m mantissa bits (without the leading one), e exponent bits and exponent offset e0.

    With E = max(2^(e-1), 1) the exponents are -E + e0 + 1 .. E + e0 - 1; x is rounded to nearest, ties to even, in steps of
    2^(exponent - m), the lowest exponent's steps reach down to 0 (no implicit one there), and beyond
    2^(E + e0 - 1) (2 - 2^-m) it saturates.  m, e and e0 count as their round half to even; 0 where m < 0.

    Gradient: dx = u, 0 where it saturates; dm = u ln2 (x - r) with r the rounded value before it saturates, 0 above the
    range; outside of the exponents de = u ln2^2 E (x - q) and de0 = +-u ln2 (x - q), + above (`quantizers` 1.2.2).
    compat="hgq2": dx = u everywhere, and m = -1 still gives powers of two.

    Args:
      x: values, any shape.  m, e, e0: broadcast to x; any real numbers, e in 0..7.
    Raises: TypeError if they do not broadcast, ValueError for an unknown compat.

    >>> one = jnp.float32(1)
    >>> minifloat(jnp.float32([0.9, 1.1, 2.6, 100, 0.01]), 2 * one, 3 * one, 0 * one).tolist()
    [0.875, 1.0, 2.5, 14.0, 0.0]
    """
    if compat not in (None, "hgq2"):
        raise ValueError(f"compat is {compat!r}, expected 'hgq2' or None")
    x = jnp.asarray(x, jnp.float32)
    m, e, e0 = (jnp.asarray(v, jnp.float32) for v in (m, e, e0))
    for v in (m, e, e0):
        behind = x.shape[x.ndim - v.ndim :]
        if v.ndim > x.ndim or any(n not in (1, full) for n, full in zip(v.shape, behind, strict=True)):
            raise TypeError(f"a minifloat format of shape {v.shape} does not broadcast to the values' {x.shape}")
    m, e, e0 = (v.reshape((1,) * (x.ndim - v.ndim) + v.shape) for v in (m, e, e0))
    return _with_gradient(compat == "hgq2")(x, m, e, e0)


def minifloat_kif(q: jax.Array, m: jax.Array, e: jax.Array, e0: jax.Array) -> KIF:
    """The narrowest fixed-point format of every value q that `minifloat` gave: the sign of q and m + 1 bits at its exponent.

    Differentiable in m; 0 has no bits.

    >>> fmt = minifloat_kif(jnp.float32([3.5, -0.25, 0.0]), *map(jnp.float32, (2, 3, 0)))
    >>> fmt.k.tolist(), fmt.i.tolist(), fmt.f.tolist()
    ([0.0, 1.0, 0.0], [2.0, -1.0, -5.0], [1.0, 4.0, 5.0])
    """
    q = jax.lax.stop_gradient(q)
    lowest, _ = _exponents(e, e0)
    at = jnp.maximum(jnp.where(q == 0, lowest, floor_log2(jnp.abs(q))), lowest)
    at = jax.lax.stop_gradient(at)
    f = round_ste(m) - at
    return KIF((q < 0).astype(q.dtype), jnp.where(q == 0, -f, at + 1), f)


def _exponents(e: jax.Array, e0: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest exponent."""
    reach = _reach(e)
    return jnp.round(e0) + 1 - reach, jnp.round(e0) - 1 + reach


def _reach(e: jax.Array) -> jax.Array:
    return jnp.maximum(power_of_two(jnp.round(e) - 1, jnp.float32), 1)


def _parts(x: jax.Array, m: jax.Array, e: jax.Array, e0: jax.Array, theirs: bool) -> tuple[jax.Array, ...]:
    """(value, value before saturation, exponent that x asks for, the one it gets, is it beyond the range)."""
    low, high = _exponents(e, e0)
    size = jnp.abs(x) + (_THEIR_EPSILON if theirs else 0)
    asked = jnp.where(size > 0, floor_log2(size), low)
    at, mr = jnp.clip(asked, low, high), jnp.round(m)
    step, scale = power_of_two(at - mr, jnp.float32), power_of_two(mr - at, jnp.float32)
    codes = jnp.round(x * scale)
    most = power_of_two(mr + 1, jnp.float32) - (at == high)
    q = jnp.clip(codes, -most, most) * step
    q = q if theirs else jnp.where(mr < 0, 0, q)
    return q, codes * step, asked, at, jnp.abs(codes) > most


@functools.cache
def _with_gradient(theirs: bool):
    @jax.custom_vjp
    def run(x, m, e, e0):
        return _parts(x, m, e, e0, theirs)[0]

    def forward(x, m, e, e0):
        return run(x, m, e, e0), (x, m, e, e0)

    def backward(residuals, u):
        x, m, e, e0 = residuals
        q, unbounded, asked, at, beyond = _parts(x, m, e, e0, theirs)
        _, high = _exponents(e, e0)
        dx = u if theirs else jnp.where(beyond, 0, u)
        dm = jnp.where(asked <= high, u * LN2 * (x - unbounded), 0)
        outside = jnp.where(asked != at, u * LN2 * (x - q), 0)
        de0 = jnp.where(asked > high, outside, -outside)
        return dx, *(unbroadcast(g, v.shape) for g, v in ((dm, m), (outside * LN2 * _reach(e), e), (de0, e0)))

    run.defvjp(forward, backward)
    return run
