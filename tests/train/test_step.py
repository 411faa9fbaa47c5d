"""The step is a pure function: one trace for all stages, the same bits in a loop of one's own, a population by vmap."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.train import Batch, average, cross_entropy, init_state, kernel_sparsity, make_epoch, make_step, permutation

STAGES = (pq.Stage.PRETRAIN, pq.Stage.TRAIN, pq.Stage.FINETUNE)


def batch_of(problem, n: int = 16) -> Batch:
    train = problem.data.train
    return Batch(jnp.asarray(problem.inst.encode(train.x[:n])), jnp.asarray(train.y[:n]))


def test_fit_traces_its_step_once(plain):
    result = plain.fit(pq.Plan(1, 1, 1, rounds=2))
    assert [record["stage"] for record in result.history] == ["pretrain", "train", "train", "finetune"]
    assert result.traces == 1


def test_one_trace_serves_all_stages_and_hyperparameters(stateful):
    compression = stateful.compression()
    tx = stateful.optimizer(compression)
    step = jax.jit(chex.assert_max_traces(make_step(stateful.inst, compression, tx, cross_entropy), n=1))
    state, batch = init_state(stateful.inst, compression, tx, seed=0), batch_of(stateful)
    seen = []
    for stage in STAGES:
        for beta in (0.0, 1e-3):
            state = state._replace(opt_state=pq.update_state(state.opt_state, lambda s, b=beta: pq.with_hyper(s, beta=b)))
            state, loss = step(state, batch, np.int32(stage))
            seen.append(float(loss))
    assert np.all(np.isfinite(seen)) and int(state.count) == 6


def test_own_loop_is_bitwise_equal_to_fit(plain, own_loop, assert_same):
    """100 steps through all three stages, parameters compared after each epoch."""
    seen = []
    plain.fit(pq.Plan(1, 2, 1), callbacks=[lambda record, state: seen.append(state.params)])
    assert len(seen) * (400 // 16) == 100
    links = {"weights": optax.adam(1e-2), "bits": optax.adam(5e-3), "thresholds": optax.adam(1e-3)}
    theirs_by_epoch = own_loop(plain.inst, plain.data, plain.compression(), links, (1, 2, 1), 16, 3)
    for ours, theirs in zip(seen, theirs_by_epoch, strict=True):
        assert_same(ours, theirs)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), seen[0], seen[-1])
    assert all(jax.tree.leaves(moved.model))


def test_gradient_is_that_of_the_penalized_loss(plain, assert_same):
    """One SGD step by hand: w - 0.5 * d(mean cross-entropy + penalty)/dw."""
    compression = plain.compression()
    tx = pq.optimizer(compression, weights=optax.sgd(0.5))
    state, batch = init_state(plain.inst, compression, tx, seed=0), batch_of(plain)
    inner = pq.state_of(state.opt_state)

    def objective(params):
        view, _ = compression.apply(params, inner)
        logits, _ = plain.inst.forward(view, {}, batch.x, train=True)
        return jnp.mean(cross_entropy(logits, batch.y)) + compression.penalty(params, inner, view)

    stepped, loss = jax.jit(make_step(plain.inst, compression, tx, cross_entropy))(state, batch, np.int32(0))
    want = jax.tree.map(lambda p, g: p - 0.5 * g, state.params.model, jax.jit(jax.grad(objective))(state.params).model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stepped.params.model, want)
    assert np.isclose(float(loss), float(objective(state.params)), rtol=1e-5)


def test_an_epoch_is_a_loop_of_steps(stateful, assert_same):
    """Scan and loop run the same program, dropout's keys and batch statistics included."""
    compression = stateful.compression()
    tx = stateful.optimizer(compression)
    step = make_step(stateful.inst, compression, tx, cross_entropy)
    start, data = init_state(stateful.inst, compression, tx, seed=5), batch_of(stateful, 64)
    order = permutation(0, 0, 64, 16)
    whole, loss = jax.jit(make_epoch(step))(start, data, jnp.asarray(order), np.int32(1))
    state, losses, jitted = start, [], jax.jit(step)
    for rows in order:
        state, one = jitted(state, jax.tree.map(lambda v, rows=rows: v[rows], data), np.int32(1))
        losses.append(one)
    assert_same(whole, state)
    assert np.isclose(float(loss), np.mean(losses), rtol=1e-6)
    assert int(whole.count) == 4


def test_dropout_follows_seed_and_count(stateful):
    """Two steps from one state give the same; another seed, or another count, gives another loss."""
    tx = stateful.optimizer(stateful.compression())
    compression = stateful.compression()
    step = jax.jit(make_step(stateful.inst, compression, tx, cross_entropy))
    batch, stage = batch_of(stateful), np.int32(0)
    states = [init_state(stateful.inst, compression, tx, seed=s) for s in (0, 0, 1)]
    states.append(states[0]._replace(count=jnp.int32(7)))
    losses = [float(step(state, batch, stage)[1]) for state in states]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_population_is_a_vmap_over_members(plain):
    """Seeds and betas; close, not equal: XLA's batched dot adds in another order than a single one."""
    compression = plain.compression()
    tx = plain.optimizer(compression)
    epoch = make_epoch(make_step(plain.inst, compression, tx, cross_entropy))
    betas = (0.0, 1e-5, 1e-3)

    def member(seed: int, beta: float):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda w: w + jnp.asarray(rng.normal(0, 0.1, w.shape), jnp.float32), plain.inst.model.params)
        state = init_state(plain.inst, compression, tx, seed=seed, params=params)
        params, opt_state = pq.boundary(
            compression, state.params, state.opt_state, event=pq.Event.POST_PRETRAIN, stage=pq.Stage.TRAIN
        )
        opt_state = pq.update_state(opt_state, lambda s: pq.with_hyper(s, beta=beta, beta_end=beta))
        params, opt_state = pq.boundary(compression, params, opt_state, event=pq.Event.PRE_EPOCH, stage=pq.Stage.TRAIN)
        return state._replace(params=params, opt_state=opt_state)

    members = [member(seed, beta) for seed, beta in enumerate(betas)]
    data, order = batch_of(plain, 64), jnp.asarray(permutation(0, 0, 64, 16))
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *members)
    together, losses = jax.jit(jax.vmap(epoch, in_axes=(0, None, None, None)))(stacked, data, order, np.int32(1))
    alone = jax.jit(epoch)
    for n, state in enumerate(members):
        one, loss = alone(state, data, order, np.int32(1))
        np.testing.assert_allclose(losses[n], loss, rtol=1e-4)
        jax.tree.map(lambda a, b, n=n: np.testing.assert_allclose(a[n], b, rtol=1e-3, atol=1e-4), together.params, one.params)
    f = together.params.extra["hgq"]["f"]["a/kernel"]
    assert float(f[2].mean()) < float(f[0].mean())  # the larger beta has pushed bits away


def test_kernel_sparsity_counts_zeros_of_kernels_only():
    model = {"kernel": jnp.asarray([[0.0, 1.0], [0.0, 0.0]]), "bias": jnp.zeros(2)}
    assert float(kernel_sparsity(pq.View(model, {}, {}))) == 0.75
    assert float(kernel_sparsity(pq.View({"bias": jnp.zeros(2)}, {}, {}))) == 0.0


@pytest.mark.parametrize(("weight", "want"), [(None, 2.0), ([1, 1, 1], 2.0), ([0, 0, 2], 3.0), ([3, 1, 0], 1.25)])
def test_average(weight, want):
    weight = None if weight is None else jnp.asarray(weight, jnp.float32)
    assert float(average(jnp.float32([1, 2, 3]), weight)) == want


def test_average_of_a_scalar_is_itself():
    assert float(average(jnp.float32(4.0), jnp.float32([0.5, 9.0]))) == 4.0
