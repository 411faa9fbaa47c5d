"""A plan is data: which epochs there are, what happens around each, and in which order the batches come."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pquant_jax import ConfigError, Event, Plan, Stage
from pquant_jax.train import permutation, schedule
from pquant_jax.train._plan import opening

TO_TRAIN = (Event.POST_PRETRAIN, Stage.TRAIN)
ROUND = (Event.POST_ROUND, Stage.TRAIN)
TO_FINETUNE = (Event.PRE_FINETUNE, Stage.FINETUNE)


def outline(plan: Plan) -> list[tuple]:
    """(stage, epoch, epochs, after, save, rewind) of every slot, the flags as letters."""
    return [
        (s.stage.name[0], s.epoch, s.epochs, *([s.after] if s.after else []), *("S" * s.save), *("R" * s.rewind))
        for s in schedule(plan)
    ]


def test_three_stages():
    assert outline(Plan(2, 3, 2)) == [
        ("P", 0, 2), ("P", 1, 2, (TO_TRAIN,)),
        ("T", 0, 3, "S"), ("T", 1, 3), ("T", 2, 3, (TO_FINETUNE,)),
        ("F", 0, 2), ("F", 1, 2),
    ]  # fmt: skip


def test_rounds_are_numbered_from_zero_each():
    assert outline(Plan(1, 2, 1, rounds=3)) == [
        ("P", 0, 1, (TO_TRAIN,)),
        ("T", 0, 2, "S"), ("T", 1, 2, (ROUND,)),
        ("T", 0, 2), ("T", 1, 2, (ROUND,)),
        ("T", 0, 2), ("T", 1, 2, (TO_FINETUNE,)),
        ("F", 0, 1),
    ]  # fmt: skip


def test_rewind_after_every_round():
    slots = outline(Plan(0, 2, 1, rounds=2, rewind="every-round", save_epoch=1))
    assert slots == [("T", 0, 2), ("T", 1, 2, (ROUND,), "S", "R"), ("T", 0, 2), ("T", 1, 2, (TO_FINETUNE,), "R"), ("F", 0, 1)]


def test_rewind_after_the_training_stage():
    slots = outline(Plan(0, 2, 1, rounds=2, rewind="post-training-stage"))
    assert slots == [("T", 0, 2, "S"), ("T", 1, 2, (ROUND,)), ("T", 0, 2), ("T", 1, 2, (TO_FINETUNE,), "R"), ("F", 0, 1)]


@pytest.mark.parametrize(
    ("lengths", "before", "announced"),
    [
        ((2, 2, 2), (), [TO_TRAIN, TO_FINETUNE]),
        ((0, 2, 2), (TO_TRAIN,), [TO_FINETUNE]),
        ((0, 2, 0), (TO_TRAIN,), [TO_FINETUNE]),
        ((0, 0, 2), (TO_FINETUNE,), []),
        ((2, 0, 0), (), []),
        ((2, 2, 0), (), [TO_TRAIN, TO_FINETUNE]),
        ((2, 0, 2), (), [TO_FINETUNE]),  # nothing is trained in between, but masks still have to be made final
    ],
)
def test_every_stage_is_announced_before_its_first_epoch(lengths, before, announced):
    plan = Plan(*lengths)
    assert opening(plan) == before
    assert [event for slot in schedule(plan) for event in slot.after] == announced


@given(st.tuples(*[st.integers(0, 3)] * 3).filter(any), st.integers(1, 3))
def test_any_plan(lengths, rounds):
    """All epochs are there, and no epoch runs in a stage that was not announced as such."""
    plan = Plan(*lengths, rounds=rounds)
    slots = schedule(plan)
    assert [s.stage for s in slots] == sorted(s.stage for s in slots)
    counts = [sum(s.stage == stage for s in slots) for stage in Stage]
    assert counts == [lengths[0], lengths[1] * rounds, lengths[2]]
    stage = Stage.PRETRAIN
    for slot, after in zip(slots, [opening(plan), *(s.after for s in slots)], strict=False):
        stage = after[-1][1] if after else stage
        assert slot.stage == stage
        assert 0 <= slot.epoch < slot.epochs
    assert sum(s.save for s in slots) == (plan.train > 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(-1, 1, 1), r"plan.pretrain is -1, expected 0 or more"),
        (Plan(1, -2, 1), r"plan.train is -2"),
        (Plan(1, 1, -3), r"plan.finetune is -3"),
        (Plan(1, 1, 1, rounds=0), r"plan.rounds is 0, expected 1 or more"),
        (
            Plan(1, 1, 1, rewind="sometimes"),
            r"plan.rewind is 'sometimes', expected one of never, every-round, post-training-stage",
        ),
        (Plan(1, 2, 1, rewind="every-round", save_epoch=2), r"plan.save_epoch is 2, expected .* 0 to 1"),
        (Plan(1, 2, 1, rewind="every-round", save_epoch=-1), r"plan.save_epoch is -1"),
        (Plan(0, 0, 0), r"the plan has no epochs"),
    ],
)
def test_bad_plans(plan, message):
    with pytest.raises(ConfigError, match=message):
        schedule(plan)


@pytest.mark.parametrize(("samples", "batch_size"), [(64, 16), (65, 16), (100, 7), (5, 5)])
def test_permutation_uses_every_sample_at_most_once(samples, batch_size):
    order = permutation(1, 2, samples, batch_size)
    assert order.shape == (samples // batch_size, batch_size) and order.dtype == np.int32
    seen = np.sort(order.ravel())
    assert len(np.unique(seen)) == len(seen) and seen[0] >= 0 and seen[-1] < samples
    if samples % batch_size == 0:
        np.testing.assert_array_equal(seen, np.arange(samples))


def test_permutation_is_a_function_of_seed_and_epoch():
    orders = {(s, e): permutation(s, e, 64, 16).tobytes() for s, e in itertools.product((0, 1), (0, 1, 2))}
    assert len(set(orders.values())) == len(orders)
    assert all(permutation(s, e, 64, 16).tobytes() == order for (s, e), order in orders.items())


def test_samples_left_out_differ_from_epoch_to_epoch():
    left = [set(range(20)) - set(permutation(0, epoch, 20, 16).ravel().tolist()) for epoch in range(4)]
    assert all(len(rest) == 4 for rest in left) and len({frozenset(rest) for rest in left}) > 1


def test_no_shuffle():
    np.testing.assert_array_equal(permutation(9, 9, 7, 3, shuffle=False), [[0, 1, 2], [3, 4, 5]])
