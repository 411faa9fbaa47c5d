"""Weight decay by the p-norm, a link after the optimizer (Outmezguine and Levi, arXiv:2404.10824)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from pquant_jax._errors import TransformError


class PNormState(NamedTuple):
    """count: steps taken, for a learning rate that is a schedule.  p, strength: scalars."""

    count: jax.Array
    p: jax.Array
    strength: jax.Array


def pnorm_decay(learning_rate: optax.ScalarOrSchedule, *, p: float = 1.0, strength: float = 1e-2) -> optax.GradientTransformation:
    """Decoupled decay towards small |w|^p: w <- w' |w|^(2-p) / (|w|^(2-p) + p learning_rate strength), w' = w + update.

    p = 2 is ordinary decay; p < 2 makes small weights vanish, and a weight of 0 stays 0.  The last link of the weights'
    optimizer: `optax.chain(optax.adam(lr), pnorm_decay(lr))`; select leaves with `optax.masked`.

    Args:
      learning_rate: the optimizer's, a number or a schedule.
      p: of the norm, 0 < p <= 2.
      strength: lambda_p of the paper (eq. 8).
    Raises: TransformError for p outside (0, 2].

    >>> tx = pnorm_decay(0.1, p=1.0, strength=1.0)
    >>> w = jnp.float32([0.1, 0.0])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    >>> [round(float(v), 3) for v in w + updates]
    [0.05, 0.0]
    """
    if not 0 < p <= 2:
        raise TransformError(f"p is {p}, expected a norm between 0 (excluded) and 2")

    def init(params: Any) -> PNormState:
        del params
        return PNormState(jnp.zeros((), jnp.int32), jnp.float32(p), jnp.float32(strength))

    def update(updates: Any, state: PNormState, params: Any = None) -> tuple[Any, PNormState]:
        if params is None:
            raise TransformError("pnorm_decay needs the parameters: call tx.update(grads, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        shrink = state.p * jnp.asarray(rate, jnp.float32) * state.strength

        def one(u: jax.Array, w: jax.Array) -> jax.Array:
            # |w|^(2-p) of a weight of 0 is 0 for p < 2, and 0^0 = 1 for p = 2
            x = jnp.abs(w) ** (2 - state.p)
            # a rate that has come down to 0 decays nothing, not even a weight of 0, of which 0 / 0 would be left
            return ((w + u) * jnp.where(shrink > 0, x / jnp.where(shrink > 0, x + shrink, 1), 1) - w).astype(u.dtype)

        return jax.tree.map(one, updates, params), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
