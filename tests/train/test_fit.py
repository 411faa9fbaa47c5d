"""`fit`: losses and data of any shape, switches that turn parts off, and how it ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.train import absolute_error, mae, mse, squared_error

KEYS = {"epoch", "stage", "loss", "val_loss", "val_metric", "sparsity", "seconds"}


def without_seconds(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


@pytest.fixture(scope="module")
def run(plain) -> tuple[pq.Transform, pq.Result, list]:
    """One whole run, and what its callback was told."""
    seen, compression = [], plain.compression()
    result = plain.fit(pq.Plan(1, 3, 4), compression=compression, callbacks=[lambda *told: seen.append(told)])
    return compression, result, seen


def test_records_of_a_whole_run(plain, run):
    _, result, seen = run
    assert [r["epoch"] for r in result.history] == list(range(8))
    assert [record for record, _ in seen] == result.history
    assert [int(state.count) for _, state in seen] == [25 * (n + 1) for n in range(8)]
    assert all(set(r) == KEYS | {"ebops", "beta"} for r in result.history)
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert np.isclose(result.seconds, sum(r["seconds"] for r in result.history))
    assert set(plain.inst.sites) == set(result.view.sites)


def test_best_epoch_is_one_of_the_last_stage(run):
    """By validation accuracy; figures and state belong to the same epoch."""
    _, result, seen = run
    last = [r for r in result.history if r["stage"] == "finetune"]
    assert result.best == max(last, key=lambda r: r["val_metric"])  # the first of equals
    jax.tree.map(np.testing.assert_array_equal, result.state.params.model, seen[result.best["epoch"]][1].params.model)


def test_figures_are_those_of_the_compressed_model(plain, run):
    """Forward with wrapping, on the encoded validation set; fine-tuning has no event after its epochs."""
    compression, _, seen = run
    record, state = seen[-1]
    view, _ = compression.apply(state.params, pq.state_of(state.opt_state))
    logits, _ = jax.jit(plain.inst.forward)(view, state.model_state, plain.inst.encode(plain.data.val.x))
    assert record["val_metric"] == np.mean(np.argmax(logits, -1) == plain.data.val.y)
    assert record["ebops"] == float(jax.jit(plain.inst.ebops)(view))
    kernels = [np.asarray(view.model[n]["kernel"]) for n in "ab"]
    assert np.isclose(record["sparsity"], sum((w == 0).sum() for w in kernels) / sum(w.size for w in kernels))


def test_float_model(plain):
    """No compression, and an optimizer without a link for it."""
    result = plain.fit_float(pq.Plan(3, 0, 0))
    assert all(set(r) == KEYS for r in result.history)
    assert result.view.sites == {} and result.view.masks == {}
    assert result.history[-1]["val_metric"] > result.history[0]["val_metric"] - 0.05
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_float_model_by_name(plain):
    """The identity and its own optimizer: the same float model."""
    tx = pq.optimizer(pq.identity(), weights=optax.adam(1e-2))
    result = plain.fit(pq.Plan(1, 0, 0), compression=pq.identity(), optimizer=tx)
    other = plain.fit_float(pq.Plan(1, 0, 0))
    assert result.history[0]["loss"] == other.history[0]["loss"]


def test_default_optimizer(plain):
    result = pq.fit(plain.inst, plain.data, plan=pq.Plan(1, 0, 0), compression=pq.prune.dst(alpha=1e-4), batch_size=16)
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (result.state.params.model, plain.inst.model.params)), strict=True)
    )


def test_prune_only(plain):
    """No formats: it trains and reports without EBOPs."""
    result = plain.fit(pq.Plan(1, 3, 2), compression=pq.prune.pdp(sparsity=0.75, epsilon=0.5))
    assert all(set(r) == KEYS for r in result.history)
    assert result.view.sites == {} and set(result.view.masks) == {"a/kernel", "b/kernel"}
    assert result.history[0]["sparsity"] == 0
    assert np.isclose(result.history[-1]["sparsity"], 0.75)  # 24 of 32 and 18 of 24
    assert {float(v) for m in result.view.masks.values() for v in np.ravel(m)} == {0.0, 1.0}


def test_without_fine_tuning_the_masks_are_final_and_the_figures_are_theirs(plain):
    """An earlier epoch may have been better, because it was pruned less."""
    compression = pq.prune.pdp(sparsity=0.75, epsilon=0.5)
    result = plain.fit(pq.Plan(0, 3, 0), compression=compression)
    assert {float(v) for m in result.view.masks.values() for v in np.ravel(m)} == {0.0, 1.0}
    assert result.best["epoch"] == 2 and np.isclose(result.best["sparsity"], 0.75)
    logits, _ = jax.jit(plain.inst.forward)(result.view, result.state.model_state, plain.inst.encode(plain.data.val.x))
    assert result.best["val_metric"] == np.mean(np.argmax(logits, -1) == plain.data.val.y)


def test_quantize_only(plain):
    inst = plain.inst
    compression = pq.quantize.fixed(inst.sites, weights=pq.quantize.Format(1, 4, 1), activations=pq.quantize.Format(3, 4))
    result = plain.fit(pq.Plan(0, 2, 0), compression=compression)
    assert result.view.masks == {}
    assert result.history[-1]["ebops"] == (4 * 8) * (1 + 3 + 4) * 6 + (8 * 3) * (3 + 4) * 6


def test_same_seed_same_result(stateful, assert_same):
    one, two, other = (stateful.fit(pq.Plan(0, 1, 1), seed=s) for s in (3, 3, 4))
    assert_same(one.state, two.state)
    assert without_seconds(one.history) == without_seconds(two.history)
    assert one.history[0]["loss"] != other.history[0]["loss"]


def test_shuffle_off_keeps_the_order(plain):
    """Without shuffling, and without dropout, the seed does not matter."""
    losses = []
    for seed, shuffle in ((0, False), (1, False), (0, True)):
        losses.append(plain.fit_float(pq.Plan(1, 0, 0), seed=seed, shuffle=shuffle).history[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_sample_of_weight_zero_is_no_sample(plain):
    """One full batch: 32 samples, and the same 32 with weight 2 beside 32 of weight 0 that have wrong labels."""
    part = plain.data.train
    x, y = part.x[:64], np.concatenate([part.y[:32], (part.y[32:64] + 1) % 3])
    weight = np.repeat([2.0, 0.0], 32).astype(np.float32)
    few = plain.data._replace(train=pq.data.Split(x[:32], y[:32]), val=pq.data.Split(x[:32], y[:32]))
    many = plain.data._replace(train=pq.data.Split(x, y, weight), val=pq.data.Split(x, y, weight))

    def run(data, size):
        return plain.fit_float(pq.Plan(8, 0, 0), data=data, optimizer=optax.sgd(0.5), batch_size=size, shuffle=False)

    a, b = run(few, 32), run(many, 64)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-4, atol=1e-5), a.state.params, b.state.params)
    for ours, theirs in zip(a.history, b.history, strict=True):
        for key in ("loss", "val_loss", "val_metric"):
            assert np.isclose(ours[key], theirs[key], rtol=1e-5)
    unweighted = run(many._replace(train=many.train._replace(weight=None)), 64)
    assert not np.allclose(unweighted.state.params.model["b"]["kernel"], a.state.params.model["b"]["kernel"], atol=1e-3)


@pytest.mark.parametrize(("loss", "metric"), [(squared_error, mse), (absolute_error, mae)])
def test_regression(plain, loss, metric):
    """Targets of a known linear map; the best epoch is the one with the smallest error."""
    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    data = plain.data._replace(**{n: pq.data.Split(s.x, s.x @ w) for n, s in zip(("train", "val"), plain.data[:2], strict=True)})
    result = plain.fit_float(pq.Plan(3, 0, 4), data=data, loss=loss, metric=metric)
    assert result.history[-1]["val_loss"] < 0.5 * result.history[0]["val_loss"]
    last = [r["val_metric"] for r in result.history if r["stage"] == "finetune"]
    assert result.best["val_metric"] == min(last)
    assert all(r["val_metric"] == r["val_loss"] for r in result.history)


def test_several_inputs_and_outputs():
    """A dict in, a dict out, targets in a dict, and a loss of one's own."""
    rng = np.random.default_rng(0)
    shapes = {"left": (3, 6), "right": (2, 6), "kind": (6, 3), "size": (6, 1)}
    params = {n: {"kernel": jnp.asarray(rng.normal(0, 0.5, s), jnp.float32)} for n, s in shapes.items()}

    def forward(p, x):
        h = jax.nn.relu(x["left"] @ p["left"]["kernel"] + x["right"] @ p["right"]["kernel"])
        return {"kind": h @ p["kind"]["kernel"], "size": h @ p["size"]["kernel"]}

    def part(n):
        x = {"left": rng.normal(size=(n, 3)).astype(np.float32), "right": rng.normal(size=(n, 2)).astype(np.float32)}
        return pq.data.Split(x, {"kind": np.argmax(x["left"], 1).astype(np.int32), "size": np.abs(x["right"][:, :1])})

    data = pq.data.Dataset(part(320), part(64), part(64))
    inst = pq.instrument(pq.from_function(forward, params), data.train.x)

    def loss(y, target):
        return optax.softmax_cross_entropy_with_integer_labels(y["kind"], target["kind"]) + squared_error(
            y["size"], target["size"]
        )

    metric = pq.Metric("kind", lambda y, target: (jnp.argmax(y["kind"], -1) == target["kind"]).astype(jnp.float32))
    compression = pq.quantize.fixed(inst.sites, weights=pq.quantize.Format(1, 5, 1), activations=pq.quantize.Format(3, 4))
    tx = pq.optimizer(compression, weights=optax.adam(2e-2))
    options = dict(plan=pq.Plan(2, 3, 0), loss=loss, metric=metric, batch_size=32)
    result = pq.fit(inst, data, compression=compression, optimizer=tx, **options)
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    assert result.best["val_metric"] > 0.7
    y, _ = inst.forward(result.view, {}, inst.encode(data.test.x))
    assert {n: v.shape for n, v in y.items()} == {"kind": (64, 3), "size": (64, 1)}


def test_callbacks_can_stop(plain):
    told = []

    def stop(record, state):
        return record["epoch"] == 1

    result = plain.fit_float(pq.Plan(1, 3, 2), callbacks=[stop, lambda *args: told.append(args)])
    assert len(told) == 2  # the one that stops does not keep the others from being told
    assert len(result.history) == 2 and result.best == result.history[-1]


def test_starts_from_given_parameters(plain, assert_same):
    """With a learning rate of 0 they come out as they went in."""
    trained = jax.tree.map(lambda w: w + 0.25, plain.inst.model.params)
    result = plain.fit(pq.Plan(0, 1, 0), params=trained, optimizer=pq.optimizer(plain.compression(), weights=optax.sgd(0.0)))
    assert_same(result.state.params.model, trained)


def test_batch_larger_than_the_set(plain):
    with pytest.raises(pq.DataError, match=r"batch_size is 512, the training set has 400 samples"):
        plain.fit(pq.Plan(1, 0, 0), batch_size=512)


def test_optimizer_without_the_compression_is_an_error(plain):
    with pytest.raises(pq.TransformError, match=r"0 compression states, expected 1: is pq.as_optax in the chain"):
        plain.fit(pq.Plan(1, 0, 0), optimizer=optax.adam(1e-3))


@pytest.mark.parametrize("steps", [30, 50], ids=["within an epoch", "with the last step of an epoch"])
def test_loss_that_is_not_finite_is_an_error(plain, steps):
    """25 steps per epoch; both are found in epoch 1, where they happen."""
    explode = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: jnp.where(count == steps - 1, jnp.nan, 1.0)))
    epochs = []
    with pytest.raises(pq.TrainingError, match=r"nan in epoch 1 \(pretrain\); lower the learning rate"):
        plain.fit_float(pq.Plan(4, 0, 0), optimizer=explode, callbacks=[lambda record, state: epochs.append(record["epoch"])])
    assert epochs == [0]


def test_stages_do_what_they_are_for(plain, run):
    """Dense at first; in fine-tuning the mask and the bits stand still while the weights go on."""
    _, result, seen = run
    first, *_, before, last = (state for _, state in seen)
    assert all(np.all(m == 1) for m in pq.state_of(first.opt_state)["dst"].mask.values())
    assert any(np.any(m == 0) for m in pq.state_of(last.opt_state)["dst"].mask.values())
    masks = [pq.state_of(s.opt_state)["dst"].mask for s in (before, last)]
    bits = [s.params.extra["hgq"] for s in (before, last)]
    for tree in (masks, bits):
        jax.tree.map(np.testing.assert_array_equal, *tree)
    assert np.any(before.params.model["a"]["kernel"] != last.params.model["a"]["kernel"])
    assert np.any(seen[1][1].params.extra["hgq"]["f"]["a/kernel"] != seen[3][1].params.extra["hgq"]["f"]["a/kernel"])


def test_pressure_on_bits_lowers_ebops(plain):
    inst = plain.inst
    compression = pq.quantize.hgq(inst.sites, beta=1e-3, cost=inst.ebops)
    tx = pq.optimizer(compression, weights=optax.adam(2e-2), bits=optax.adam(2e-2))  # 100 steps of 0.02 bits
    result = plain.fit(pq.Plan(1, 4, 0), compression=compression, optimizer=tx)
    assert result.history[-1]["ebops"] < 0.8 * result.history[0]["ebops"]


def test_a_controller_reaches_its_target(plain):
    """Within 10 % and to stay, from five times as much, by a beta it has to find; every epoch's beta is in the history."""
    inst = plain.inst
    target = 0.25 * inst.reference8
    beta = pq.quantize.pid(target, beta=3e-5, i=0.6, warmup=5)
    compression = pq.quantize.hgq(inst.sites, beta=beta, cost=inst.ebops)
    tx = pq.optimizer(compression, weights=optax.adam(1e-2), bits=optax.adam(3e-2))
    result = plain.fit(pq.Plan(1, 30, 0), compression=compression, optimizer=tx)
    costs, betas = (np.array([r[key] for r in result.history]) for key in ("ebops", "beta"))
    assert costs[0] > 4 * target
    np.testing.assert_allclose(costs[-4:], target, rtol=0.1)
    np.testing.assert_allclose(betas[:6], 3e-5, rtol=1e-5)  # pre-training and the warm-up
    assert betas[-1] > 2 * betas[0] and np.all(np.diff(betas[6:]) != 0) and result.traces == 1
