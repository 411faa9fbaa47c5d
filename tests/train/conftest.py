"""A small problem that is trained in every test, and a cache of compiled code: `fit` compiles anew at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import pquant_jax as pq

WRAP = pq.quantize.Format(i=0, f=6, k=1, overflow="WRAP")
ACTIVATION = pq.quantize.Format(i=2, f=5, overflow="WRAP")


@pytest.fixture(scope="package", autouse=True)
def compile_once(tmp_path_factory) -> Iterator[None]:
    """The same program in two tests, or twice in one, is compiled once."""
    wanted = {"jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in (*wanted, "jax_compilation_cache_dir")}
    wanted["jax_compilation_cache_dir"] = str(tmp_path_factory.mktemp("xla"))
    for settings in (wanted, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is wanted:
            yield


class Problem(NamedTuple):
    """data: a `Dataset`.  inst: instrumented model.  compression: makes a new transform.  optimizer: makes its optimizer."""

    data: pq.data.Dataset
    inst: pq.Instrumented
    compression: Callable[[], pq.Transform]
    optimizer: Callable[[pq.Transform], Any]

    def fit(self, plan: pq.Plan, *, data: pq.data.Dataset | None = None, **options: Any) -> pq.Result:
        """`pq.fit` of the whole chain, batch 16."""
        compression = options.pop("compression", None) or self.compression()
        optimizer = options.pop("optimizer", None) or self.optimizer(compression)
        options = {"batch_size": 16, "seed": 3, **options}
        return pq.fit(self.inst, data or self.data, plan=plan, compression=compression, optimizer=optimizer, **options)

    def fit_float(self, plan: pq.Plan, *, data: pq.data.Dataset | None = None, **options: Any) -> pq.Result:
        """`pq.fit` without compression, which compiles in a third of the time."""
        options = {"batch_size": 16, "seed": 3, "optimizer": optax.adam(1e-2), **options}
        return pq.fit(self.inst, data or self.data, plan=plan, **options)


class Stateful(nn.Module):
    """Batch statistics and dropout: all that a training state can hold."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(nn.Dense(8)(x)))
        h = nn.Dropout(0.2, deterministic=not train)(h)
        return nn.Dense(3)(h)


def problem_of(model: pq.Model, split: Callable[[int, int], pq.data.Split]) -> Problem:
    data = pq.data.Dataset(split(400, 0), split(96, 1), split(96, 2), classes=("0", "1", "2"))
    inst = pq.instrument(model, data.train.x[:2])

    def compression() -> pq.Transform:
        hgq = pq.quantize.hgq(inst.sites, beta=1e-6, beta_end=1e-5, cost=inst.ebops, weights=WRAP, activations=ACTIVATION)
        return pq.chain(pq.prune.dst(alpha=1e-4), hgq)

    def optimizer(compression: pq.Transform) -> Any:
        return pq.optimizer(compression, weights=optax.adam(1e-2), bits=optax.adam(5e-3), thresholds=optax.adam(1e-3))

    return Problem(data, inst, compression, optimizer)


@pytest.fixture(scope="package")
def plain(two_layers, three_classes) -> Problem:
    return problem_of(two_layers(8, 0.5), three_classes)


@pytest.fixture(scope="package")
def stateful(three_classes) -> Problem:
    return problem_of(pq.from_linen(Stateful(), np.zeros((2, 4), np.float32)), three_classes)


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """Two trees of equal structure and bitwise equal leaves."""

    def check(a: Any, b: Any) -> None:
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)

    return check
