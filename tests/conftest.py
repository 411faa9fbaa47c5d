"""What every test shares: the CPU unless told otherwise, hypothesis without randomness, and the golden values."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before the first import of jax, and a GPU run can still override it

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings

import pquant_jax as pq
from pquant_jax.train import cross_entropy, permutation

_ALWAYS: dict[str, Any] = dict(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", max_examples=30, **_ALWAYS)
settings.register_profile("thorough", max_examples=500, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def benchmark_module() -> Callable[[str], ModuleType]:
    """The scripts of benchmarks/ by name, as they import each other."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def key() -> jax.Array:
    """A random key; the same one in every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def hgq2() -> dict[str, Any]:
    """What HGQ2 and `quantizers` answered; see golden/README.md."""
    return json.loads((Path(__file__).parent / "golden" / "hgq2.json").read_text())


@pytest.fixture(scope="session")
def three_classes() -> Callable[[int, int], pq.data.Split]:
    """(samples, seed) -> four features, and which of three functions of them is the largest."""

    def split(samples: int, seed: int) -> pq.data.Split:
        x = np.random.default_rng(seed).normal(size=(samples, 4)).astype(np.float32)
        y = np.argmax(np.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3] ** 2 - 1], 1), 1)
        return pq.data.Split(x, y.astype(np.int32))

    return split


@pytest.fixture(scope="session")
def two_layers() -> Callable[..., pq.Model]:
    """(width, spread of the kernels) -> a plain model of four features and three classes, with layers a and b."""

    def model(width: int, spread: float) -> pq.Model:
        rng = np.random.default_rng(0)
        params = {
            n: {"kernel": jnp.asarray(rng.normal(0, spread, s), jnp.float32), "bias": jnp.zeros(s[1], jnp.float32)}
            for n, s in {"a": (4, width), "b": (width, 3)}.items()
        }

        def forward(p, x):
            h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
            return h @ p["b"]["kernel"] + p["b"]["bias"]

        return pq.from_function(forward, params)

    return model


@pytest.fixture(scope="session")
def own_loop() -> Callable[..., Iterator[pq.Params]]:
    """A user's own training, to compare with `pq.fit`: plain optax, `jax.jit` on one step, no trainer.

    (inst, data, compression, links by label, epochs of the three stages, batch size, seed) -> the parameters after every epoch.
    """

    def loop(inst, data, compression, links, plan: tuple[int, int, int], batch_size: int, seed: int) -> Iterator[pq.Params]:
        tx = optax.chain(optax.partition(links, compression.labels), pq.as_optax(compression))
        params = compression.attach(inst.model.params)
        opt_state = tx.init(params)
        x, y = jnp.asarray(inst.encode(data.train.x)), jnp.asarray(data.train.y)

        @jax.jit
        def step(params, opt_state, xb, yb, stage):
            state = pq.state_of(opt_state)

            def loss(params):
                view, _ = compression.apply(params, state)
                logits, _, stats = inst.capture(view, inst.model.state, xb, train=True)
                return jnp.mean(cross_entropy(logits, yb)) + compression.penalty(params, state, view), stats

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = tx.update(grads, opt_state, params, stage=stage, stats=stats)
            return optax.apply_updates(params, updates), opt_state

        ends = {
            pq.Stage.PRETRAIN: (pq.Event.POST_PRETRAIN, pq.Stage.TRAIN),
            pq.Stage.TRAIN: (pq.Event.PRE_FINETUNE, pq.Stage.FINETUNE),
        }
        number = 0
        for stage, epochs in zip(pq.Stage, plan, strict=True):
            for epoch in range(epochs):
                place = dict(stage=stage, epoch=epoch, epochs=epochs)
                params, opt_state = pq.boundary(compression, params, opt_state, event=pq.Event.PRE_EPOCH, **place)
                for rows in permutation(seed, number, len(y), batch_size):
                    params, opt_state = step(params, opt_state, x[rows], y[rows], np.int32(stage))
                params, opt_state = pq.boundary(compression, params, opt_state, event=pq.Event.POST_EPOCH, **place)
                number += 1
                if epoch + 1 == epochs and stage in ends:
                    event, following = ends[stage]
                    params, opt_state = pq.boundary(compression, params, opt_state, event=event, **{**place, "stage": following})
                yield params

    return loop
