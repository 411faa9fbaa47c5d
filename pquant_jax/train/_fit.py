"""`fit`: the plan run epoch by epoch on the host, every epoch one call of one executable."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pquant_jax import _tree
from pquant_jax._base import Event, Stage, Transform, Tree, View
from pquant_jax._errors import DataError, TrainingError
from pquant_jax.graph import Instrumented
from pquant_jax.train import _checkpoint
from pquant_jax.train._losses import Metric, accuracy, cross_entropy
from pquant_jax.train._plan import Plan, Slot, opening, schedule
from pquant_jax.train._step import (
    STAGE_NAMES,
    Batch,
    TrainState,
    init_state,
    make_epoch,
    make_evaluate,
    make_step,
    permutation,
)
from pquant_jax.transforms import as_optax, boundary, identity, state_of

Record = dict[str, Any]
Callback = Callable[[Record, TrainState], "bool | None"]


class Result(NamedTuple):
    """What `fit` gives back.

    state: the best epoch's of the last stage, by validation metric, ranges calibrated.  view: what its forward sees.
    history: one record per epoch.  best: the chosen epoch's record.  traces: how often the step was traced (1).
    seconds: of the epochs together.
    """

    state: TrainState
    view: View
    history: list[Record]
    best: Record
    traces: int
    seconds: float


class _Run(NamedTuple):
    epoch: Callable
    evaluate: Callable
    tell: Callable
    traces: list[int]


def fit(
    inst: Instrumented,
    data: Any,
    *,
    loss: Callable = cross_entropy,
    metric: Metric = accuracy,
    plan: Plan = Plan(),
    compression: Transform | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int = 1024,
    seed: int = 0,
    shuffle: bool = True,
    params: Tree | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoints: str | Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = False,
) -> Result:
    """Train through the plan's stages; one trace and one executable serve all of them.

    Args:
      inst: from `pq.instrument`.
      data: a `Dataset`, or anything with `train` and `val` that have x, y and weight.  Put on the input ports here.
      loss, metric: of (prediction, target), one value per sample.
      compression: a transform; None trains the float model.
      optimizer: `pq.optimizer(compression, ...)` or a chain of your own that ends in `pq.as_optax(compression)`;
        default Adam(1e-3) everywhere.
      seed: of the shuffling and of dropout.
      params: model parameters to start from, such as a trained float model's.
      callbacks: each gets (record, state) after every epoch; True stops the training.
      checkpoints: folder; one checkpoint per stage, and one every `checkpoint_every` epochs.  resume: go on from the newest.
    Raises: TrainingError if the loss stops being finite (the last checkpoint stays), DataError if a batch is larger
      than the training set.
    """
    compression = identity() if compression is None else compression
    tx = _link(compression, optimizer)
    train, val = (Batch(*_on_device(inst, split)) for split in (data.train, data.val))
    samples = jax.tree.leaves(train.x)[0].shape[0]
    if samples < batch_size:
        raise DataError(f"batch_size is {batch_size}, the training set has {samples} samples; choose a smaller batch")
    state = init_state(inst, compression, tx, seed=seed, params=params)
    view = jax.eval_shape(lambda s: view_of(compression, s), state)
    run = _compile(inst, compression, tx, loss, metric, quantized=set(inst.sites) <= set(view.sites))
    slots, history, saved, best = schedule(plan), [], _kernels(state), None
    first = 0
    if resume:
        trees, meta = _checkpoint.load(_folder(checkpoints), dict(state=state, saved=saved, best=state))
        state, saved, history, first = TrainState(*trees["state"]), trees["saved"], meta["history"], meta["epoch"]
        best = (meta["best"], TrainState(*trees["best"])) if meta["best"] is not None else None
    else:
        for event, stage in opening(plan):
            state = run.tell(state, event, stage, 0, 1)
    last_stage = slots[-1].stage

    def checkpoint(done: int, *, keep: bool) -> None:
        if checkpoints is not None:
            record, chosen = best if best is not None else (None, state)
            trees = dict(state=state, saved=saved, best=chosen)
            _checkpoint.save(_folder(checkpoints), done, trees, dict(history=history, best=record), keep=keep)

    n = first
    try:
        for n, slot in enumerate(slots[first:], first):
            if slot.save:
                saved = _kernels(state)
            order = permutation(seed, n, samples, batch_size, shuffle=shuffle)
            state, record = _one_epoch(run, state, slot, n, order, train, val)
            trained, state = state, _after(run, state, slot, saved)
            history.append(record)
            if slot.stage == last_stage and (best is None or _better(record, best[0], metric)):
                best = (record, trained)
            stop = any([callback(record, state) for callback in callbacks])
            ends = n + 1 == len(slots) or slots[n + 1].stage != slot.stage
            if ends or stop or (checkpoint_every and (n + 1) % checkpoint_every == 0):
                checkpoint(n + 1, keep=ends)
            if stop:
                break
    except KeyboardInterrupt:
        if history and history[-1]["epoch"] == n:
            checkpoint(n + 1, keep=True)
        raise
    record, chosen = best if best is not None else (history[-1], state)
    chosen = calibrate(inst, compression, chosen, [train.x, val.x])
    view = jax.jit(lambda s: view_of(compression, s))(chosen)
    return Result(chosen, view, history, record, run.traces[0], sum(r["seconds"] for r in history))


def _folder(checkpoints: str | Path | None) -> Path:
    if checkpoints is None:
        raise TrainingError("resume needs checkpoints=: the folder that the first run wrote to")
    return Path(checkpoints)


def _link(compression: Transform, optimizer: Any) -> Any:
    """The optimizer, with `as_optax` behind it where the caller left the float model's optimizer bare."""
    from pquant_jax.transforms import optimizer as partitioned

    if optimizer is None:
        return partitioned(compression, weights=optax.adam(1e-3))
    return optax.chain(optimizer, as_optax(compression)) if compression.name == "identity" else optimizer


def _compile(inst: Instrumented, compression: Transform, tx: Any, loss: Callable, metric: Metric, *, quantized: bool) -> _Run:
    traces = [0]
    step = make_step(inst, compression, tx, loss)

    def counted(state: TrainState, batch: Batch, stage: jax.Array) -> tuple[TrainState, jax.Array]:
        traces[0] += 1  # runs once per trace, never per step
        return step(state, batch, stage)

    @jax.jit
    def tell(state: TrainState, event: Any, stage: Any, epoch: Any, epochs: Any) -> TrainState:
        params, opt_state = boundary(
            compression, state.params, state.opt_state, event=event, stage=stage, epoch=epoch, epochs=epochs
        )
        return state._replace(params=params, opt_state=opt_state)

    def told(state: TrainState, event: Event, stage: Stage, epoch: int, epochs: int) -> TrainState:
        return tell(state, *(np.int32(v) for v in (event, stage, epoch, epochs)))

    evaluate = jax.jit(make_evaluate(inst, compression, loss, metric, quantized=quantized))
    return _Run(jax.jit(make_epoch(counted)), evaluate, told, traces)


def _one_epoch(
    run: _Run, state: TrainState, slot: Slot, n: int, order: np.ndarray, train: Batch, val: Batch
) -> tuple[TrainState, Record]:
    start = time.perf_counter()
    state = run.tell(state, Event.PRE_EPOCH, slot.stage, slot.epoch, slot.epochs)
    state, loss = run.epoch(state, train, jnp.asarray(order), np.int32(slot.stage))
    state = run.tell(state, Event.POST_EPOCH, slot.stage, slot.epoch, slot.epochs)
    figures = {name: float(v) for name, v in run.evaluate(state, val).items()}
    record = dict(epoch=n, stage=STAGE_NAMES[slot.stage], loss=float(loss), **figures, seconds=time.perf_counter() - start)
    if not np.isfinite(record["loss"]):
        raise TrainingError(
            f"the loss is {record['loss']} in epoch {n} ({record['stage']}); lower the learning rate or beta, "
            "or look for an unbounded output. The last checkpoint is kept"
        )
    return state, record


def _after(run: _Run, state: TrainState, slot: Slot, saved: dict[str, Any]) -> TrainState:
    if slot.rewind:
        state = state._replace(params=state.params._replace(model=_tree.replace(state.params.model, saved)))
    for event, stage in slot.after:
        state = run.tell(state, event, stage, slot.epoch, slot.epochs)
    return state


def _kernels(state: TrainState) -> dict[str, Any]:
    return {p: w for p, w in _tree.flatten(state.params.model).items() if _tree.is_kernel(p, w)}


def _better(new: Record, old: Record, metric: Metric) -> bool:
    a, b = new["val_metric"], old["val_metric"]
    return a > b if metric.higher_is_better else a < b


def _on_device(inst: Instrumented, split: Any) -> tuple[Any, Any, Any]:
    weight = None if split.weight is None else jnp.asarray(split.weight, jnp.float32)
    return jax.tree.map(jnp.asarray, inst.encode(split.x)), jax.tree.map(jnp.asarray, split.y), weight


def calibrate(inst: Instrumented, compression: Transform, state: TrainState, inputs: Sequence[Any]) -> TrainState:
    """Give every tracked range exactly the integer bits and sign that `inputs` need, in inference mode.

    inputs: arrays (or trees) of samples on the input ports; what lies outside their ranges wraps.
    """
    if "range" not in compression.needs:
        return state

    @jax.jit
    def ranges(state: TrainState, x: Any) -> Any:
        return inst.capture(view_of(compression, state), state.model_state, x, train=False, wrap=False)[2]["range"]

    @jax.jit
    def told(state: TrainState, found: Any) -> TrainState:
        merged = {}
        for name in found[0]:
            lows, highs = zip(*(r[name] for r in found), strict=True)
            merged[name] = (functools.reduce(jnp.minimum, lows), functools.reduce(jnp.maximum, highs))
        params, opt_state = boundary(
            compression, state.params, state.opt_state, event=Event.CALIBRATE, stage=Stage.FINETUNE, stats={"range": merged}
        )
        return state._replace(params=params, opt_state=opt_state)

    return told(state, [ranges(state, x) for x in inputs])


def view_of(compression: Transform, state: TrainState) -> View:
    """What the forward of a training state sees."""
    return compression.apply(state.params, state_of(state.opt_state))[0]
