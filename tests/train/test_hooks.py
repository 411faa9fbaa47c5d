"""What a method is told during a whole plan, in which order, and which kernels it finds: a transform that keeps a diary."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax import Event, Plan, Stage
from pquant_jax.train._plan import REWINDS

STEP, PAGES = -1, 64


class Diary(NamedTuple):
    """at: the next free page.  told: (event or STEP, stage, epoch, epochs).  seen: one weight, as it was then."""

    hyper: dict
    at: jax.Array
    told: jax.Array
    seen: jax.Array


def diary() -> pq.Transform:
    def write(params, state, *numbers):
        page = jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers])
        weight = params.model["kernel"][0, 0]
        return state._replace(at=state.at + 1, told=state.told.at[state.at].set(page), seen=state.seen.at[state.at].set(weight))

    def step(params, state, *, stage, **extra):
        return params, write(params, state, STEP, stage, 0, 0)

    def boundary(params, state, *, event, stage, epoch, epochs, **extra):
        return params, write(params, state, event, stage, epoch, epochs)

    def init(params):
        return Diary({}, jnp.zeros((), jnp.int32), jnp.zeros((PAGES, 4), jnp.int32), jnp.zeros(PAGES, jnp.float32))

    return pq.identity()._replace(name="diary", init=init, step=step, boundary=boundary)


def read(plan: Plan) -> tuple[list[tuple], list[float]]:
    """What the diary of a training with one step per epoch says."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    part = pq.data.Split(x, (x[:, 0] > 0).astype(np.int32))
    model = pq.from_function(lambda p, x: x @ p["kernel"], {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)})
    states, compression = [], diary()
    pq.fit(
        pq.instrument(model, x[:2]),
        pq.data.Dataset(part, part, part, classes=("0", "1")),
        plan=plan,
        compression=compression,
        optimizer=pq.optimizer(compression, weights=optax.sgd(0.1)),
        batch_size=16,
        callbacks=[lambda record, state: states.append(pq.state_of(state.opt_state))],
    )
    pages = int(states[-1].at)
    return [tuple(map(int, page)) for page in states[-1].told[:pages]], states[-1].seen[:pages].tolist()


def by_the_book(plan: Plan) -> list[tuple]:
    """PQuantML's trainer, hook by hook, and where the kernels are saved and go back; ours announces every round's end."""
    pages: list[tuple] = []

    def epoch(stage: Stage, e: int, epochs: int) -> None:
        pages.extend([(Event.PRE_EPOCH, stage, e, epochs), (STEP, stage, 0, 0), (Event.POST_EPOCH, stage, e, epochs)])

    for e in range(plan.pretrain):
        epoch(Stage.PRETRAIN, e, plan.pretrain)
    pages.append((Event.POST_PRETRAIN, Stage.TRAIN))
    for r in range(plan.rounds):
        for e in range(plan.train):
            if r == 0 and e == plan.save_epoch:
                pages.append(("save",))
            epoch(Stage.TRAIN, e, plan.train)
        last = r == plan.rounds - 1
        if plan.rewind == "every-round" or (plan.rewind == "post-training-stage" and last):
            pages.append(("rewind",))
        if not last:
            pages.append((Event.POST_ROUND, Stage.TRAIN))
    pages.append((Event.PRE_FINETUNE, Stage.FINETUNE))
    for e in range(plan.finetune):
        epoch(Stage.FINETUNE, e, plan.finetune)
    return pages


@pytest.mark.parametrize(
    "plan",
    [
        *(Plan(2, 3, 2, rounds=2, rewind=rewind, save_epoch=1) for rewind in REWINDS),
        Plan(0, 2, 1, rounds=3, rewind="every-round"),
        Plan(1, 2, 0, rewind="post-training-stage", save_epoch=1),
    ],
    ids=lambda p: f"{p.pretrain}-{p.rounds}x{p.train}-{p.finetune}-{p.rewind}",
)
def test_every_hook_in_its_order_with_the_kernels_of_its_moment(plan):
    """Saved before `save_epoch` is announced; put back after the round's last epoch, before its end is."""
    told, seen = read(plan)
    now, saved, n = None, None, 0
    for page in by_the_book(plan):
        if page == ("save",):
            saved = now
        elif page == ("rewind",):
            assert now != saved, "the epochs since have moved the kernel"
            now = saved
        else:
            assert told[n][: len(page)] == tuple(map(int, page)), n
            if page[0] == STEP:
                assert seen[n] != now
                now = seen[n]
            now = seen[n] if now is None else now
            assert seen[n] == now, f"the kernel of page {n}, {page}"
            n += 1
    assert n == len(told)
