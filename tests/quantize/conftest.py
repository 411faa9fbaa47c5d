"""Sites of a small layer, and a way to announce events."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pquant_jax._base import SiteSpec, Stage


@pytest.fixture
def sites():
    return {
        "a/input": SiteSpec((4,), "input", signed=True, channel_axes=(0,)),
        "a/kernel": SiteSpec((4, 3), "kernel", channel_axes=(1,)),
        "a/bias": SiteSpec((3,), "bias"),
        "b/input": SiteSpec((3,), "input", signed=False, channel_axes=(0,)),
    }


@pytest.fixture
def model():
    kernel = jnp.float32([[0.3, -0.9, 2.6], [0.05, 0.0, -1.7], [0.5, -0.25, 0.33], [-0.1, 0.7, 3.0]])
    return {"a": {"kernel": kernel, "bias": jnp.float32([0.3, -1.2, 0.0])}}


@pytest.fixture
def tell():
    def boundary(t, params, state, event, stage=Stage.TRAIN, epoch=0, epochs=10, stats=None):
        numbers = dict(event=event, stage=stage, epoch=epoch, epochs=epochs)
        return t.boundary(params, state, stats=stats or {}, **{k: jnp.int32(v) for k, v in numbers.items()})[1]

    return boundary
