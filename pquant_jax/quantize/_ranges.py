"""Integer bits from data: what a range needs, shared by the quantizers that follow it."""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF, Stats
from pquant_jax._errors import TransformError
from pquant_jax.numerics import integer_bits, quantize, round_ste

F_LIMITS: Final = (-24.0, 24.0)  # bits; beyond them 2^f leaves what float32 products can hold
I_LIMITS: Final = (-23.0, 23.0)


def shared_range(low: jax.Array, high: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The range of everything that shares one format, of the format's shape."""
    shared = tuple(a for a, (n, m) in enumerate(zip(low.shape, shape, strict=True)) if m == 1 and n != 1)
    return (jnp.min(low, shared, keepdims=True), jnp.max(high, shared, keepdims=True)) if shared else (low, high)


def site_range(stats: Stats, name: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The range of a site in the statistics, of its format's shape.  Raises: TransformError if it was not captured."""
    ranges = stats.get("range", {})
    if name not in ranges:
        raise TransformError(f"no range of site {name!r} in the statistics; pass stats= from inst.capture of the same model")
    low, high = ranges[name]
    return shared_range(low, high, shape)


def rounded(v: jax.Array, f: jax.Array, rounding: str) -> jax.Array:
    """v on the grid 2^-f, however large it is."""
    # i = 64: wide enough for any value, so that the zero-width rule does not act on a range
    return quantize(v, KIF(jnp.ones_like(f), jnp.full_like(f, 64.0), f, rounding, "WRAP"), wrap=False)


def needed_bits(
    low: jax.Array, high: jax.Array, k: jax.Array, f: jax.Array, rounding: str, max_bits: float | jax.Array | None = None
) -> jax.Array:
    """Fewest integer bits that hold the rounded range, where f gives way so that k + i + f <= max_bits.

    A coarser grid may round the end of the range up to the next power of two, hence the second look; a third would find
    what the second did.
    """
    i = integer_bits(rounded(low, f, rounding), rounded(high, f, rounding), f)
    if max_bits is None:
        return i
    coarser = jnp.minimum(f, max_bits - k - i)
    return jnp.maximum(i, integer_bits(rounded(low, coarser, rounding), rounded(high, coarser, rounding), coarser))


def limited(f: jax.Array, k: jax.Array, i: jax.Array, max_bits: int) -> jax.Array:
    """min(f, max_bits - k - i), the f at use where the hardware takes max_bits (0: any); gradient through the smaller."""
    return jnp.minimum(f, max_bits - k - round_ste(i)) if max_bits else f
