"""A run that was cut off goes on as if it had not been."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.train import _checkpoint

PLAN = pq.Plan(2, 2, 2, rounds=2, rewind="every-round")


def cut_at(epoch: int, error: type[BaseException] = KeyboardInterrupt):
    def callback(record, state):
        if record["epoch"] == epoch:
            raise error("cut")

    return callback


def figures(result: pq.Result) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in result.history]


@pytest.fixture(scope="module")
def whole(stateful) -> pq.Result:
    """The run that nobody interrupts."""
    return stateful.fit(PLAN)


# 1: the last of pre-training; 3: the end of a round, with its rewind; 5: the last of training; 7: the last of all
@pytest.mark.parametrize("epoch", [1, 3, 6, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2, 4, 5, 7))])
def test_resume_is_bit_identical(stateful, whole, assert_same, tmp_path, epoch):
    """Parameters, optimizer, statistics, keys, history and the best epoch; batch statistics and dropout are in it."""
    with pytest.raises(KeyboardInterrupt):
        stateful.fit(PLAN, checkpoints=tmp_path, callbacks=[cut_at(epoch)])
    resumed = []
    result = stateful.fit(
        PLAN, checkpoints=tmp_path, resume=True, callbacks=[lambda record, state: resumed.append(record["epoch"])]
    )
    assert resumed == list(range(epoch + 1, 8))
    assert_same(result.state, whole.state)
    assert_same(result.view, whole.view)
    assert figures(result) == figures(whole)
    assert result.best["epoch"] == whole.best["epoch"]
    assert result.traces == (1 if resumed else 0)


def test_resume_from_an_older_checkpoint(stateful, whole, assert_same, tmp_path):
    """A crash writes nothing more: the run goes on from the last one that was due."""
    with pytest.raises(RuntimeError, match="cut"):
        stateful.fit(PLAN, checkpoints=tmp_path, callbacks=[cut_at(4, RuntimeError)], checkpoint_every=3)
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000002", "000003"]
    resumed = []
    result = stateful.fit(
        PLAN, checkpoints=tmp_path, resume=True, callbacks=[lambda record, state: resumed.append(record["epoch"])]
    )
    assert resumed == [3, 4, 5, 6, 7]
    assert_same(result.state, whole.state)


@pytest.mark.parametrize("place", ["permutation", "_after"])
def test_interrupt_within_an_epoch(stateful, whole, assert_same, tmp_path, monkeypatch, place):
    """Ctrl-C in the middle of epoch 3, or while its kernels are being rewound: whole epochs are kept, that one is done again."""
    from pquant_jax.train import _fit

    real, calls = getattr(_fit, place), []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(_fit, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stateful.fit(PLAN, checkpoints=tmp_path)
    monkeypatch.undo()
    resumed = []
    result = stateful.fit(
        PLAN, checkpoints=tmp_path, resume=True, callbacks=[lambda record, state: resumed.append(record["epoch"])]
    )
    assert resumed == [3, 4, 5, 6, 7]
    assert_same(result.state, whole.state)
    assert figures(result) == figures(whole)


def test_folder_is_thinned(plain, tmp_path):
    """Every stage's last one stays, and the newest three of the others."""
    plain.fit_float(pq.Plan(2, 2, 7), checkpoints=tmp_path, checkpoint_every=1)
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000002", "000004", "000008", "000009", "000010", "000011"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [d.name for d in _checkpoint.available(tmp_path)]  # nothing half-written
    kept = {d.name: json.loads((d / "meta.json").read_text())["keep"] for d in _checkpoint.available(tmp_path)}
    assert [name for name, keep in kept.items() if keep] == ["000002", "000004", "000011"]


def test_one_per_stage_by_default(plain, tmp_path):
    plain.fit_float(pq.Plan(2, 1, 2), checkpoints=tmp_path)
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000002", "000003", "000005"]


def test_stopped_run_has_a_checkpoint(plain, tmp_path):
    plain.fit_float(pq.Plan(5, 0, 0), checkpoints=tmp_path, callbacks=[lambda record, state: record["epoch"] == 1])
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000002"]


def test_half_written_checkpoint_is_not_seen(plain, tmp_path):
    (tmp_path / "000009" / "state").mkdir(parents=True)
    (tmp_path / ".000008.partial" / "state").mkdir(parents=True)
    plain.fit_float(pq.Plan(1, 0, 0), checkpoints=tmp_path)
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000001"]


def test_nan_leaves_the_last_checkpoint_finite(plain, tmp_path):
    """The step that breaks the parameters is the last of an epoch: that epoch must not be saved."""
    explode = optax.chain(optax.sgd(0.1), optax.scale_by_schedule(lambda count: jnp.where(count == 3 * 25 - 1, jnp.nan, 1.0)))
    with pytest.raises(pq.TrainingError, match="The last checkpoint is kept"):
        plain.fit_float(pq.Plan(6, 0, 0), optimizer=explode, checkpoints=tmp_path, checkpoint_every=1)
    assert [d.name for d in _checkpoint.available(tmp_path)] == ["000001", "000002"]
    result = plain.fit_float(pq.Plan(2, 0, 0), optimizer=explode, checkpoints=tmp_path, resume=True)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(result.state.params))


def test_rewind_restores_the_kernels_of_the_saved_epoch(plain, assert_same):
    """After each round the kernels are those before epoch 1 of round 0; biases and bits go on."""
    states = []
    plain.fit(
        pq.Plan(0, 3, 0, rounds=2, rewind="every-round", save_epoch=1), callbacks=[lambda record, state: states.append(state)]
    )
    saved = states[0].params.model  # after epoch 0 is before epoch 1
    for end in (2, 5):
        model = states[end].params.model
        for layer in "ab":
            np.testing.assert_array_equal(model[layer]["kernel"], saved[layer]["kernel"])
            assert np.any(model[layer]["bias"] != saved[layer]["bias"])
        assert_same(states[end].model_state, {})
        f = [s.params.extra["hgq"]["f"]["a/kernel"] for s in (states[0], states[end])]
        assert np.any(f[0] != f[1])
    assert np.any(states[1].params.model["a"]["kernel"] != saved["a"]["kernel"])
    assert np.any(states[4].params.model["a"]["kernel"] != saved["a"]["kernel"])


def test_rewind_once(plain):
    states = []
    plan = pq.Plan(1, 2, 1, rounds=2, rewind="post-training-stage")
    plain.fit_float(plan, callbacks=[lambda record, state: states.append(state.params.model["a"]["kernel"])])
    np.testing.assert_array_equal(states[4], states[0])
    assert np.any(states[2] != states[0])


def test_resume_needs_a_folder(plain):
    with pytest.raises(pq.TrainingError, match=r"resume needs checkpoints="):
        plain.fit_float(pq.Plan(1, 0, 0), resume=True)


def test_resume_from_an_empty_folder(plain, tmp_path):
    with pytest.raises(pq.TrainingError, match=r"no checkpoint in .*; start the run"):
        plain.fit_float(pq.Plan(1, 0, 0), checkpoints=tmp_path, resume=True)


def test_resume_from_a_damaged_checkpoint(plain, tmp_path):
    plain.fit_float(pq.Plan(1, 0, 0), checkpoints=tmp_path)
    shutil.rmtree(tmp_path / "000001" / "state")
    with pytest.raises(pq.TrainingError, match=r"000001 can't be read: .*; remove it"):
        plain.fit_float(pq.Plan(2, 0, 0), checkpoints=tmp_path, resume=True)


def test_interrupt_before_the_first_epoch_is_done_writes_nothing(plain, tmp_path, monkeypatch):
    from pquant_jax.train import _fit

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(_fit, "permutation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plain.fit_float(pq.Plan(1, 0, 0), checkpoints=tmp_path)
    assert _checkpoint.available(tmp_path) == []


@pytest.mark.parametrize("other", ["compression", "model", "width"])
def test_resume_of_another_model(plain, stateful, tmp_path, other):
    plain.fit_float(pq.Plan(1, 0, 0), checkpoints=tmp_path)
    wide = {n: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for n, s in {"a": (4, 9), "b": (9, 3)}.items()}
    wider = plain._replace(inst=pq.instrument(plain.inst.model._replace(params=wide), plain.data.train.x[:2]))
    run = {"compression": plain.fit, "model": stateful.fit_float, "width": wider.fit_float}[other]
    with pytest.raises(pq.TrainingError, match=r"is of another model or compression: \S+ is .*, expected .*; resume with"):
        run(pq.Plan(1, 0, 0), checkpoints=tmp_path, resume=True)
