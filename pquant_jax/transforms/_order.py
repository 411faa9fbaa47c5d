"""Order statistics with a traced rank, without a sort, and values that borrow a gradient."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_TOP_BIT = 30  # the sign bit of a non-negative float32 is 0


def bisect_bits(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest bit pattern, int32 and not negative, for which `holds` is true; it must be true up to there and at 0.

    Non-negative floats order like their bits as integers, so 31 questions find a float32 exactly.

    >>> found = bisect_bits(lambda bits: bits <= jax.lax.bitcast_convert_type(jnp.float32(2.5), jnp.int32))
    >>> float(jax.lax.bitcast_convert_type(found, jnp.float32))
    2.5
    """

    def refine(step: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.int32(1) << (_TOP_BIT - step))
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, _TOP_BIT + 1, refine, jnp.zeros((), jnp.int32))


def kth_largest(magnitudes: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest of non-negative float32 values, k from 1 to size, traced; any shape in, a scalar out.

    31 counts by `bisect_bits` find the value exactly; `lax.top_k` needs a static k and a sort is slower.  The gradient goes
    to the elements equal to the result, shared equally between ties.

    >>> float(kth_largest(jnp.float32([3, 1, 2]), jnp.int32(2)))
    2.0
    """
    flat = jnp.ravel(magnitudes)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(flat), jnp.int32)
    value = bisect_bits(lambda candidate: jnp.sum((bits >= candidate).astype(jnp.int32)) >= k)
    chosen = bits == value
    exact = jax.lax.bitcast_convert_type(value, jnp.float32)
    mean = jnp.sum(jnp.where(chosen, flat, 0)) / jnp.sum(chosen).astype(flat.dtype)  # one ulp off among ties, or inf
    return through(exact, jnp.where(jnp.isfinite(mean), mean, 0))


def places(values: jax.Array) -> jax.Array:
    """The place of every value along the last axis, 0 for the largest, of equals the first; int32.

    By comparing each with each, which for the few of a block costs less than a sort.

    >>> places(jnp.float32([2, 5, 2])).tolist()
    [1, 0, 2]
    """
    a, b, n = values[..., :, None], values[..., None, :], np.arange(values.shape[-1])
    return jnp.sum((b > a) | ((b == a) & (n[None, :] < n[:, None])), -1, dtype=jnp.int32)


def through(exact: jax.Array, smooth: jax.Array) -> jax.Array:
    """The value of `exact` with the gradient of `smooth` (straight-through, Bengio et al., arXiv:1308.3432).

    >>> float(through(jnp.float32(1), jnp.float32(0.25))), float(jax.grad(lambda v: through(jnp.float32(1), v * v))(0.5))
    (1.0, 1.0)
    """
    return jax.lax.stop_gradient(exact) + (smooth - jax.lax.stop_gradient(smooth))
