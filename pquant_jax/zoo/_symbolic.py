"""An expression in closed form, as symbolic regression finds them: a plain function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import jax
import jax.numpy as jnp

from pquant_jax.graph import Model, from_function

START: Final[Mapping[str, float]] = {
    "g_slope": 1.0, "g_scale": 0.5, "q_slope": -1.0, "q_scale": 0.75, "t_slope": 0.75, "t_cross": 0.25,
    "w_centre": 0.5, "w_width": 1.0, "z_centre": 0.25, "z_width": 1.0,
}  # fmt: skip


def scores(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """One expression per class (n, 5) of the features x (n, 16) of `pquant_jax.data.jets`; see `symbolic`."""
    zlogz, c1, c2, mass, count = x[:, 0], x[:, 2], x[:, 4], x[:, 14], x[:, 15]
    p = params
    gluon = p["g_scale"] * count + jnp.tanh(p["g_slope"] * c1 - mass)
    quark = jnp.tanh(p["q_slope"] * count) * p["q_scale"] + zlogz
    top = p["t_slope"] * mass + p["t_cross"] * (mass * c2)
    w_boson = p["w_width"] * jnp.exp(-jnp.square(mass + p["w_centre"])) - zlogz * c1
    z_boson = p["z_width"] * jnp.exp(-jnp.square(mass + p["z_centre"])) - count
    return jnp.concatenate([score[:, None] for score in (gluon, quark, top, w_boson, z_boson)], axis=-1)


def symbolic() -> Model:
    """Five expressions with tanh, exp and products of features, whose ten constants are trained; no layers at all.

    The kind of expression that PySR finds for these jets: Tsoi et al., "Symbolic regression on FPGAs for fast machine
    learning inference", arXiv:2305.04099, sec. 3, table 1.  In hardware tanh and exp(-u^2) are one table each.
    Takes x (n, 16), the features of `pquant_jax.data.jets`; gives (n, 5).

    >>> model = symbolic()
    >>> model.forward(model.params, model.state, jnp.zeros((2, 16)), train=False, rng=None)[0].shape
    (2, 5)
    """
    return from_function(scores, {name: jnp.asarray(value, jnp.float32) for name, value in START.items()})
