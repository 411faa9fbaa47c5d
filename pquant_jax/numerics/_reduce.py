"""What keeps XLA's CPU backend from computing slowly, or twice: reductions over the batch, and gradients."""

from __future__ import annotations

import functools
from typing import Final

import jax
import jax.numpy as jnp

_OPS: Final = {"sum": (jnp.add, jnp.sum), "min": (jnp.minimum, jnp.min), "max": (jnp.maximum, jnp.max)}
_WIDEST: Final = 16  # more slices than this in one fusion spill registers: 32 are three times slower than 16
_WORTH_IT: Final = 64


def reduce_axis(x: jax.Array, op: str, axis: int) -> jax.Array:
    """Sum, minimum or maximum of `x` over one axis; op is "sum", "min" or "max".

    A reduction over the leading axis of a (batch, features) array runs element by element on CPU, 70 us for
    1024 x 64 where folding the batch onto itself 16 rows at a time takes 22 us, the arithmetic before it included.

    >>> reduce_axis(jnp.arange(256, dtype=jnp.float32).reshape(128, 2), "max", 0).tolist()
    [254.0, 255.0]
    """
    combine, reduce = _OPS[op]
    axis %= x.ndim
    while x.shape[axis] >= _WORTH_IT:
        size = x.shape[axis]
        parts = next((n for n in range(_WIDEST, 1, -1) if size % n == 0), 1)
        if parts == 1:
            break
        # slices, not a reshape: XLA would compute and store x twice, in either shape
        rows = size // parts
        slices = [jax.lax.slice_in_dim(x, n * rows, (n + 1) * rows, axis=axis) for n in range(parts)]
        x = functools.reduce(combine, slices)
    return reduce(x, axis)


def settle(g: jax.Array) -> jax.Array:
    """g itself, computed once and kept in memory however many kernels read it.

    XLA fuses cheap arithmetic into every kernel that uses it; the gradient of a weight's format, some sixty operations,
    would be computed three times by Adam alone (a tenth of a training step).  A division is never duplicated, so this
    divides by a one that can't be foreseen.  Infinities and NaN stay what they are.

    >>> settle(jnp.float32([0.5, -jnp.inf, jnp.nan])).tolist()
    [0.5, -inf, nan]
    """
    return g / (g <= jnp.inf).astype(g.dtype)
