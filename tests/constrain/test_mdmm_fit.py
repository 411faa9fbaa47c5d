"""MDMM in a training: a small model settles at its target, and a loop of one's own gives the bits of `pq.fit`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.constrain import Metric, mdmm, metrics
from pquant_jax.train import cross_entropy, permutation

PLAN = pq.Plan(1, 16, 2)
BATCH, SEED = 40, 3
DECAY = optax.cosine_decay_schedule(5e-3, 19 * 50, alpha=0.05)


def split(samples: int, seed: int) -> pq.data.Split:
    x = np.random.default_rng(seed).normal(size=(samples, 4)).astype(np.float32)
    y = np.argmax(np.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3] ** 2 - 1], 1), 1)
    return pq.data.Split(x, y.astype(np.int32))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 64), "b": (64, 3)}
    params = {
        n: {"kernel": jnp.asarray(rng.normal(0, 0.3, s), jnp.float32), "bias": jnp.zeros(s[1], jnp.float32)}
        for n, s in shapes.items()
    }

    def forward(p, x):
        h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
        return h @ p["b"]["kernel"] + p["b"]["bias"]

    data = pq.data.Dataset(split(2000, 0), split(400, 1), split(400, 2), classes=("0", "1", "2"))
    return pq.instrument(pq.from_function(forward, params), data.train.x[:2]), data


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


def own_loop(inst, data, compression):
    """Plain optax, `jax.jit` on one step, no trainer.  Yields the parameters after every epoch."""
    links = {"weights": optax.adam(DECAY), "duals": optax.chain(optax.sgd(0.2), optax.scale(-1.0))}
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
    for stage, epochs in zip(pq.Stage, (1, 2, 1), strict=True):
        for epoch in range(epochs):
            place = dict(stage=stage, epoch=epoch, epochs=epochs)
            params, opt_state = pq.boundary(compression, params, opt_state, event=pq.Event.PRE_EPOCH, **place)
            for rows in permutation(SEED, number, len(y), BATCH):
                params, opt_state = step(params, opt_state, x[rows], y[rows], np.int32(stage))
            params, opt_state = pq.boundary(compression, params, opt_state, event=pq.Event.POST_EPOCH, **place)
            number += 1
            if epoch + 1 == epochs and stage in ends:
                event, following = ends[stage]
                params, opt_state = pq.boundary(compression, params, opt_state, event=event, **{**place, "stage": following})
            yield params


def test_own_loop_is_bitwise_equal_to_fit(problem):
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
    for ours, theirs in zip(seen, own_loop(inst, data, compression), strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    multipliers = [float(p.extra["mdmm"]["multiplier"]) for p in seen]
    assert multipliers[0] == 0 and len(set(multipliers[:3])) == 3 and multipliers[2] == multipliers[3]
