"""Activations that a plain model can't say, or that hardware wants in another form than jax.nn has."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pquant_jax.numerics import LN2, power_of_two


@jax.custom_vjp
def _shift(x: jax.Array, m: jax.Array) -> jax.Array:
    return x * power_of_two(jnp.round(m), x.dtype)


def _shift_forward(x: jax.Array, m: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = _shift(x, m)
    return y, (y, m)


def _shift_backward(residuals: tuple[jax.Array, jax.Array], u: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, m = residuals
    return u * power_of_two(jnp.round(m), u.dtype), jnp.sum(u * y) * LN2


_shift.defvjp(_shift_forward, _shift_backward)


def relu_po2(x: jax.Array, m: jax.Array) -> jax.Array:
    """relu(x) * 2^round(m) with a trained scalar m: a shift, so it has no site, costs no EBOPs and is exact in hardware.

    Gradient to m through the rounding: d/dm = ln 2 * y.  The call with a gradient rule of its own is what keeps
    `instrument` from taking 2^round(m) for a scale that needs a multiplier.

    >>> relu_po2(jnp.float32([-1, 3]), jnp.float32(-1.2)).tolist()
    [0.0, 1.5]
    """
    return jax.nn.relu(_shift(x, m))


def hard_tanh(x: jax.Array) -> jax.Array:
    """min(max(x, -1), 1).

    A format of i = 0 behind it saturates at 1 - 2^-f, one bit narrower than what holds 1 (HGQ's hard tanh).

    >>> hard_tanh(jnp.float32([-3, 0.25, 3])).tolist()
    [-1.0, 0.25, 1.0]
    """
    return jnp.clip(x, -1.0, 1.0)


def hard_sigmoid(x: jax.Array, slope: float = 0.25) -> jax.Array:
    """min(max(slope * x + 1/2, 0), 1).  slope 1/4 (HGQ) and 1/2 (PQuantML) are shifts; 1/6 is `jax.nn.hard_sigmoid`'s.

    >>> hard_sigmoid(jnp.float32([-3, 0.5, 3])).tolist()
    [0.0, 0.625, 1.0]
    """
    return jnp.clip(x * slope + 0.5, 0.0, 1.0)
