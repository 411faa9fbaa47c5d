"""Many models of one method trained at once on the embedded jets: `vmap` over seed and level, one executable for all stages.

What `pq.fit` does for one model, for a population: the same steps, epochs, orders and events.  A level is a method's own
number, usually its target sparsity; it is a traced array like the seed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pquant_jax as pq
from pquant_jax._base import Event, Stage
from pquant_jax.train import Batch, compile_epoch, cross_entropy, init_state, make_epoch, make_step, permutation, schedule
from pquant_jax.train._plan import opening
from pquant_jax.zoo import mlp

HIDDEN = (64, 32, 32)  # the model of configs/jets_*.yaml
SAME = 1000  # seeds that differ by a multiple of it have the same initial weights


class Task(NamedTuple):
    """The data on the input port, on the device, and the instrumented model."""

    inst: pq.Instrumented
    train: Batch
    test: Batch


class Link(NamedTuple):
    """What one member is trained with."""

    compression: pq.Transform
    optimizer: Any


Make = Callable[[Any, Any], Link]  # (seed, level), both traced


class Population(NamedTuple):
    """A trained population; every array has the members in front.

    seconds: of all epochs together.  compile_s: of the first epoch above the second.  history: what `watch` gave, by epoch.
    """

    state: Any
    view: pq.View
    accuracy: np.ndarray
    ebops: np.ndarray
    seeds: np.ndarray
    levels: np.ndarray
    seconds: float
    compile_s: float
    history: list[Any]


@functools.cache
def task() -> Task:
    """40,000 jets and the 16-64-32-32-5 classifier."""
    data = pq.data.jets()
    x = np.zeros((2, 16), np.float32)
    model = pq.from_linen(mlp(HIDDEN, 5), x, rng=jax.random.key(0))
    inst = pq.instrument(model, x)
    train, test = (Batch(jnp.asarray(inst.encode(s.x)), jnp.asarray(s.y)) for s in (data.train, data.test))
    return Task(inst, train, test)


def fit(
    make: Make,
    members: Sequence[tuple[int, float]],
    plan: pq.Plan,
    *,
    batch_size: int = 512,
    watch: Callable[[Any, pq.View], Any] | None = None,
    prepare: Callable[[Any], Any] | None = None,
    problem: Task | None = None,
) -> Population:
    """Train one member per (seed, level).

    watch: (params, view) of a member -> what the history keeps of every epoch.  prepare: of all members' states, the start.
    """
    inst, train, test = task() if problem is None else problem
    link = make(members[0][0], members[0][1])
    seeds, levels = (jnp.asarray(v, d) for v, d in zip(zip(*members, strict=True), (jnp.uint32, jnp.float32), strict=True))

    def begin(seed: Any, level: Any) -> Any:
        own = make(seed, level)
        weights = inst.model.params if problem is not None else _weights(seed)
        return init_state(inst, own.compression, own.optimizer, seed=seed, params=weights)

    def told(state: Any, event: Any, stage: Any, epoch: Any, epochs: Any) -> Any:
        params, opt_state = pq.boundary(
            link.compression, state.params, state.opt_state, event=event, stage=stage, epoch=epoch, epochs=epochs
        )
        return state._replace(params=params, opt_state=opt_state)

    def seen(state: Any) -> Any:
        return watch(state.params, link.compression.apply(state.params, pq.state_of(state.opt_state))[0]) if watch else ()

    tell_all = jax.jit(jax.vmap(told, in_axes=(0, None, None, None, None)))
    step = make_step(inst, link.compression, link.optimizer, cross_entropy)
    epoch_all = compile_epoch(jax.vmap(make_epoch(step), in_axes=(0, None, None, None)))
    seen_all = jax.jit(jax.vmap(seen))

    def tell(state: Any, event: Event, stage: Stage, epoch: int, epochs: int) -> Any:
        return tell_all(state, *(np.int32(v) for v in (event, stage, epoch, epochs)))

    state = jax.jit(jax.vmap(begin))(seeds, levels)
    state = state if prepare is None else prepare(state)
    for event, stage in opening(plan):
        state = tell(state, event, stage, 0, 1)
    seconds, history = [], []
    for n, slot in enumerate(schedule(plan)):
        order = permutation(0, n, len(train.y), batch_size)
        start = time.perf_counter()
        state = tell(state, Event.PRE_EPOCH, slot.stage, slot.epoch, slot.epochs)
        state = jax.block_until_ready(epoch_all(state, train, jnp.asarray(order), np.int32(slot.stage))[0])
        state = tell(state, Event.POST_EPOCH, slot.stage, slot.epoch, slot.epochs)
        seconds.append(time.perf_counter() - start)
        history.append(jax.device_get(seen_all(state)) if watch else None)
        for event, stage in slot.after:
            state = tell(state, event, stage, slot.epoch, slot.epochs)
    usual = float(np.median(seconds))
    view, accuracy, ebops = _measured(inst, link.compression, state, test)
    return Population(
        state,
        view,
        accuracy,
        ebops,
        np.asarray(seeds),
        np.asarray(levels),
        usual * len(seconds),
        sum(seconds) - usual * len(seconds),
        history,
    )


def _weights(seed: Any) -> Any:
    return mlp(HIDDEN, 5).init(jax.random.key(seed % SAME), jnp.zeros((2, 16), jnp.float32))["params"]


def _measured(
    inst: pq.Instrumented, compression: pq.Transform, state: Any, test: Batch
) -> tuple[pq.View, np.ndarray, np.ndarray]:
    @jax.jit
    @jax.vmap
    def measure(state: Any) -> Any:
        view, _ = compression.apply(state.params, pq.state_of(state.opt_state))
        y, _ = inst.forward(view, state.model_state, test.x, train=False)
        ebops = inst.ebops(view) if set(inst.sites) <= set(view.sites) else jnp.float32(jnp.nan)
        return view, jnp.mean((jnp.argmax(y, -1) == test.y).astype(jnp.float32)), ebops

    view, accuracy, ebops = jax.device_get(measure(state))
    return view, accuracy, ebops


def member(tree: Any, n: int) -> Any:
    """The n-th member of a population's state or view."""
    return jax.tree.map(lambda v: v[n], tree)


def sparsities(population: Population) -> np.ndarray:
    """zeros / total of every member, over the masks that fine-tuning froze: what the method was told to reach."""
    masks = population.view.masks.values()
    gone = sum((np.sum(m == 0, axis=tuple(range(1, m.ndim))) for m in masks), np.zeros(len(population.seeds)))
    return gone / max(1, sum(m[0].size for m in masks))


def zeros(model: Any) -> np.ndarray:
    """zeros / total of every member, over all kernels as the hardware has them."""
    kernels = [np.asarray(v) for v in jax.tree.leaves(model) if np.ndim(v) == 3]  # a member's kernels have two axes
    gone = sum((np.sum(v == 0, axis=(1, 2)) for v in kernels), np.zeros(len(kernels[0])))
    return gone / sum(v[0].size for v in kernels)
