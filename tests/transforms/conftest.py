"""A toy method with every part of the protocol, whose numbers can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from pquant_jax._base import Params, Transform, View
from pquant_jax.transforms import entering, hyper, labelled


class ToyState(NamedTuple):
    """hyper: gain, weight.  seen: sum of the model in the view that entered `step`.  event: of the last boundary."""

    hyper: dict[str, jax.Array]
    seen: jax.Array
    event: jax.Array


def toy(
    name: str = "toy", *, gain: float = 1.0, weight: float = 0.0, label: str = "duals", needs: tuple[str, ...] = ()
) -> Transform:
    """View = gain * model; one trainable `price`, raised by 1 in `step`; penalty weight * price."""

    def attach(model: Any) -> Params:
        return Params(model, {name: {"price": jnp.zeros((), jnp.float32)}})

    def init(params: Params) -> ToyState:
        del params
        return ToyState(hyper(gain=gain, weight=weight), jnp.zeros((), jnp.float32), jnp.asarray(-1, jnp.int32))

    def apply(params: Params, state: ToyState) -> tuple[View, ToyState]:
        return View(jax.tree.map(lambda w: w * state.hyper["gain"], params.model), {}, {}), state

    def step(params: Params, state: ToyState, *, view: View | None = None, **extra: Any) -> tuple[Params, ToyState]:
        del extra
        seen = sum(jnp.sum(w) for w in jax.tree.leaves(entering(params, view).model))
        raised = {"price": params.extra[name]["price"] + 1}
        return Params(params.model, {**params.extra, name: raised}), state._replace(seen=seen)

    def boundary(params: Params, state: ToyState, *, event: Any, **extra: Any) -> tuple[Params, ToyState]:
        del extra
        return params, state._replace(event=jnp.asarray(event, jnp.int32))

    def penalty(params: Params, state: ToyState, view: View) -> jax.Array:
        del view
        return state.hyper["weight"] * params.extra[name]["price"]

    return Transform(name, attach, init, apply, step, boundary, penalty, labelled(name, label), frozenset(needs))


@pytest.fixture(name="toy")
def toy_fixture() -> Callable[..., Transform]:
    return toy


@pytest.fixture
def model() -> dict[str, Any]:
    """Two layers with distinct magnitudes."""
    a, b = jnp.arange(1, 13, dtype=jnp.float32).reshape(4, 3), jnp.arange(1, 7, dtype=jnp.float32).reshape(3, 2)
    return {
        "a": {"kernel": a / 10, "bias": jnp.full(3, 0.3, jnp.float32)},
        "b": {"kernel": -b / 10, "bias": jnp.full(2, -0.7, jnp.float32)},
    }
