"""A small classifier of jets, trained once, and what else the searches are tried on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.zoo import mlp

from ..train.conftest import compile_once  # noqa: F401


class Trained(NamedTuple):
    """inst and the parameters of a float model of 16-16-8-5, on 2,000 jets."""

    inst: pq.Instrumented
    params: Any
    data: pq.data.Dataset


@pytest.fixture(scope="session")
def jets() -> Trained:
    data = pq.data.jets(2000)
    inst = pq.instrument(mlp([16, 8]), data.train.x[:2])
    plan = pq.Plan(pretrain=20, train=0, finetune=0)
    fitted = pq.fit(inst, data, plan=plan, optimizer=optax.adam(5e-3), batch_size=64, seed=1)
    return Trained(inst, fitted.state.params.model, data)


def split(x: Any, y: Any) -> Any:
    return SimpleNamespace(x=np.float32(x), y=np.int32(y), weight=None)


@pytest.fixture(scope="session")
def signal() -> Trained:
    """An untrained 1-D convolution with BatchNorm, then a dense layer, as a plain function would have them."""
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.Conv(4, (3,), padding="VALID")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.relu(nn.Conv(4, (3,), feature_group_count=4, padding="VALID")(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 8, 2)), rng.integers(0, 3, 64)
    model = pq.from_linen(Net(), jnp.float32(x[:2]))
    return Trained(pq.instrument(model, jnp.float32(x[:2])), model.params, SimpleNamespace(train=split(x, y)))  # pyright: ignore


@pytest.fixture(scope="session")
def view_of():
    """(inst, params, found) -> the view that a result makes."""

    def made(inst: pq.Instrumented, params: Any, found: Any) -> pq.View:
        transform = pq.search.compression(inst, found)
        attached = transform.attach(params)
        return transform.apply(attached, transform.init(attached))[0]

    return made
