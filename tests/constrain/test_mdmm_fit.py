"""MDMM in a training: a small model settles at its target, and a loop of one's own gives the bits of `pq.fit`."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.constrain import Metric, mdmm, metrics

PLAN = pq.Plan(1, 16, 2)
BATCH, SEED = 40, 3
DECAY = optax.cosine_decay_schedule(5e-3, 19 * 50, alpha=0.05)


@pytest.fixture(scope="module")
def problem(three_classes, two_layers):
    data = pq.data.Dataset(three_classes(2000, 0), three_classes(400, 1), three_classes(400, 2), classes=("0", "1", "2"))
    return pq.instrument(two_layers(64, 0.3), data.train.x[:2]), data


def metric_of(mode: str) -> Metric:
    """alpha 100 would not reach beyond |w| = 0.3, where a third of the weights stays."""
    return metrics.sparsity(epsilon=0.03, mode=mode, alpha=100.0 if mode == "coarse" else 20.0)


def compression_of(mode: str) -> pq.Transform:
    return mdmm(metric_of(mode), kind="==", target=0.6, scale=1.0, damping=10.0, prunes=0.03)


def optimizer_of(compression: pq.Transform):
    return pq.optimizer(compression, weights=optax.adam(DECAY), duals=optax.sgd(0.2))


@pytest.mark.parametrize("mode", ["coarse", "smooth"])
def test_a_trained_model_settles_at_its_sparsity(problem, mode):
    """Within 1 % of the target at the end of the training stage; frozen masks keep the zeros in fine-tuning."""
    inst, data = problem
    compression, seen = compression_of(mode), []
    soft = jax.jit(metric_of(mode).soft)

    def record(_, state):
        view = compression.apply(state.params, pq.state_of(state.opt_state))[0]
        seen.append((float(soft(state.params, view)), float(state.params.extra["mdmm"]["multiplier"])))

    result = pq.fit(
        inst,
        data,
        plan=PLAN,
        compression=compression,
        optimizer=optimizer_of(compression),
        batch_size=BATCH,
        seed=SEED,
        callbacks=[record],
    )
    values, multipliers = map(np.asarray, zip(*seen, strict=True))
    assert multipliers[0] == 0 and values[0] < 0.5
    np.testing.assert_allclose(values[14:17], 0.6, rtol=1e-2)
    assert multipliers[16] == multipliers[17] == multipliers[18] != 0
    assert result.traces == 1
    final = result.history[-1]["sparsity"]
    if mode == "coarse":
        np.testing.assert_allclose(final, values[16], rtol=0, atol=1e-6)
    else:
        assert final > 0.3


def test_own_loop_is_bitwise_equal_to_fit(problem, own_loop):
    """200 steps through all three stages, parameters and multiplier compared after each epoch."""
    inst, data = problem
    compression, seen = pq.chain(compression_of("coarse")), []
    pq.fit(
        inst,
        data,
        plan=pq.Plan(1, 2, 1),
        compression=compression,
        optimizer=optimizer_of(compression),
        batch_size=BATCH,
        seed=SEED,
        callbacks=[lambda _, state: seen.append(state.params)],
    )
    links = {"weights": optax.adam(DECAY), "duals": optax.chain(optax.sgd(0.2), optax.scale(-1.0))}
    theirs_by_epoch = own_loop(inst, data, compression, links, (1, 2, 1), BATCH, SEED)
    for ours, theirs in zip(seen, theirs_by_epoch, strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    multipliers = [float(p.extra["mdmm"]["multiplier"]) for p in seen]
    assert multipliers[0] == 0 and len(set(multipliers[:3])) == 3 and multipliers[2] == multipliers[3]
