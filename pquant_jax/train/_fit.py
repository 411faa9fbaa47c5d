"""`fit`: the plan run epoch by epoch on the host, every epoch one call of one executable."""

from __future__ import annotations

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
from pquant_jax.train._calibrate import calibrate, view_of
from pquant_jax.train._losses import Metric, accuracy, cross_entropy
from pquant_jax.train._plan import Plan, Slot, opening, schedule
from pquant_jax.train._step import (
    STAGE_NAMES,
    Batch,
    TrainState,
    compile_epoch,
    init_state,
    make_epoch,
    make_evaluate,
    make_step,
    permutation,
)
from pquant_jax.transforms import CompressionState, as_optax, boundary, identity, optimizer as partitioned

Record = dict[str, Any]
Callback = Callable[[Record, TrainState], "bool | None"]


class Result(NamedTuple):
    """What `fit` gives back.

    state: the best epoch's of the last stage, by validation metric, ranges calibrated; where a compression is trained to the end
    without fine-tuning, the last epoch's with its masks made final, as earlier ones are pruned less.  view: what its forward
    sees.  history: one record per epoch.  best: the chosen epoch's record.  traces: how often the step was traced (1).
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


class _Progress(NamedTuple):
    """What belongs to the same `done` epochs, replaced as one: an interrupt finds either all of an epoch or nothing.

    saved: the kernels kept for a rewind.  best: (record, state) of the best epoch so far of the last stage.
    """

    done: int
    state: TrainState
    saved: dict[str, Any]
    history: list[Record]
    best: tuple[Record, TrainState] | None


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
      optimizer: `pq.optimizer(compression, ...)` or a chain of your own that ends in `pq.as_optax(compression)`, which
        the float model's may lack; default Adam(1e-3) everywhere.
      seed: of the shuffling and of dropout.
      params: model parameters to start from, such as a trained float model's.
      callbacks: each gets (record, state) after every epoch; True stops the training.
      checkpoints: folder; one per stage, one every `checkpoint_every` epochs, one on Ctrl-C.  resume: go on from the newest.
    Raises: TrainingError if the loss or a parameter stops being finite (the last checkpoint stays), DataError if a batch
      is larger than the training set.
    """
    compression = identity() if compression is None else compression
    tx = _link(inst, compression, optimizer)
    train, val, samples = _batches(inst, data, batch_size)
    state = init_state(inst, compression, tx, seed=seed, params=params)
    view = jax.eval_shape(lambda s: view_of(compression, s), state)
    run = _compile(inst, compression, tx, loss, metric, quantized=set(inst.sites) <= set(view.sites))
    slots = schedule(plan)
    chosen = slots[-1].stage if slots[-1].stage != Stage.TRAIN or compression.name == "identity" else None
    now = _resumed(_folder(checkpoints), state) if resume else _begun(run, plan, state)
    try:
        for n, slot in enumerate(slots[now.done :], now.done):
            order = permutation(seed, n, samples, batch_size, shuffle=shuffle)
            now = _next(run, now, slot, order, train, val, last=slot.stage == chosen, metric=metric)
            stop = any([callback(now.history[-1], now.state) for callback in callbacks])
            ends = n + 1 == len(slots) or slots[n + 1].stage != slot.stage
            if ends or stop or (checkpoint_every and (n + 1) % checkpoint_every == 0):
                _save(checkpoints, now, keep=ends)
            if stop:
                break
    except KeyboardInterrupt:
        if now.done:
            _save(checkpoints, now, keep=True)
        raise
    if chosen is None and now.done == len(slots):
        now = now._replace(best=({**now.history[-1], **_figures(run, now.state, val)[0]}, now.state))
    return _result(inst, compression, now, [train.x, val.x], run.traces[0])


def _result(inst: Instrumented, compression: Transform, now: _Progress, inputs: Sequence[Any], traces: int) -> Result:
    record, chosen = now.best if now.best is not None else (now.history[-1], now.state)
    chosen = calibrate(inst, compression, chosen, inputs)
    view = jax.jit(lambda s: view_of(compression, s))(chosen)
    return Result(chosen, view, now.history, record, traces, sum(r["seconds"] for r in now.history))


def _begun(run: _Run, plan: Plan, state: TrainState) -> _Progress:
    for event, stage in opening(plan):
        state = run.tell(state, event, stage, 0, 1)
    return _Progress(0, state, _kernels(state), [], None)


def _next(
    run: _Run, now: _Progress, slot: Slot, order: np.ndarray, train: Batch, val: Batch, *, last: bool, metric: Metric
) -> _Progress:
    """One epoch further, with the events after it.  last: it is of the last stage, whose best epoch is wanted."""
    saved = _kernels(now.state) if slot.save else now.saved
    state, record = _one_epoch(run, now.state, slot, now.done, order, train, val)
    best = now.best
    if last and (best is None or _better(record, best[0], metric)):
        best = (record, state)
    return _Progress(now.done + 1, _after(run, state, slot, saved), saved, [*now.history, record], best)


def _save(checkpoints: str | Path | None, now: _Progress, *, keep: bool) -> None:
    if checkpoints is not None:
        record, chosen = now.best if now.best is not None else (None, now.state)
        trees = dict(state=now.state, saved=now.saved, best=chosen)
        _checkpoint.save(_folder(checkpoints), now.done, trees, dict(history=now.history, best=record), keep=keep)


def _resumed(folder: Path, state: TrainState) -> _Progress:
    """What `_save` wrote last.  state: a fresh one, for its structure."""
    trees, meta = _checkpoint.load(folder, dict(state=state, saved=_kernels(state), best=state))
    best = (meta["best"], TrainState(*trees["best"])) if meta["best"] is not None else None
    return _Progress(meta["epoch"], TrainState(*trees["state"]), trees["saved"], meta["history"], best)


def _folder(checkpoints: str | Path | None) -> Path:
    if checkpoints is None:
        raise TrainingError("resume needs checkpoints=: the folder that the first run wrote to")
    return Path(checkpoints)


def _link(inst: Instrumented, compression: Transform, optimizer: Any) -> Any:
    """The optimizer, with `as_optax` behind it where the caller left the float model's optimizer bare."""
    if optimizer is None:
        return partitioned(compression, weights=optax.adam(1e-3))
    if compression.name != "identity":
        return optimizer
    opt_state = jax.eval_shape(lambda model: optimizer.init(compression.attach(model)), inst.model.params)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, CompressionState))
    linked = any(isinstance(node, CompressionState) for node in leaves)
    return optimizer if linked else optax.chain(optimizer, as_optax(compression))


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

    measure = make_evaluate(inst, compression, loss, metric, quantized=quantized)

    @jax.jit
    def evaluate(state: TrainState, data: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        values = _tree.flatten({**state.params._asdict(), "state": state.model_state})
        return measure(state, data), {path: jnp.all(jnp.isfinite(v)) for path, v in values.items()}

    return _Run(compile_epoch(make_epoch(counted)), evaluate, told, traces)


def _one_epoch(
    run: _Run, state: TrainState, slot: Slot, n: int, order: np.ndarray, train: Batch, val: Batch
) -> tuple[TrainState, Record]:
    start = time.perf_counter()
    state = run.tell(state, Event.PRE_EPOCH, slot.stage, slot.epoch, slot.epochs)
    state, loss = run.epoch(state, train, jnp.asarray(order), np.int32(slot.stage))
    state = run.tell(state, Event.POST_EPOCH, slot.stage, slot.epoch, slot.epochs)
    figures, finite = _figures(run, state, val)
    record = dict(epoch=n, stage=STAGE_NAMES[slot.stage], loss=float(loss), **figures, seconds=time.perf_counter() - start)
    # the loss is of the parameters before each step: what the last step of an epoch did shows in them alone
    broken = [path for path, is_finite in finite.items() if not is_finite]
    if broken or not np.isfinite(record["loss"]):
        what = f"the loss is {record['loss']}" if not np.isfinite(record["loss"]) else f"{broken[0]} is inf or nan"
        raise TrainingError(
            f"{what} in epoch {n} ({record['stage']}); lower the learning rate or beta, "
            "or look for an unbounded output. The last checkpoint is kept"
        )
    return state, record


def _figures(run: _Run, state: TrainState, val: Batch) -> tuple[Record, dict[str, bool]]:
    """What is measured on the validation set, and {path: is all of it finite}."""
    measured, finite = jax.device_get(run.evaluate(state, val))
    return {name: float(v) for name, v in measured.items()}, finite


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
    return bool(np.isnan(b)) or (a > b if metric.higher_is_better else a < b)


def _batches(inst: Instrumented, data: Any, batch_size: int) -> tuple[Batch, Batch, int]:
    """Training and validation set on the device, and how many samples there are to train on."""
    train, val = (Batch(*_on_device(inst, split)) for split in (data.train, data.val))
    samples = jax.tree.leaves(train.x)[0].shape[0]
    if samples < batch_size:
        raise DataError(f"batch_size is {batch_size}, the training set has {samples} samples; choose a smaller batch")
    return train, val, samples


def _on_device(inst: Instrumented, split: Any) -> tuple[Any, Any, Any]:
    weight = None if split.weight is None else jnp.asarray(split.weight, jnp.float32)
    return jax.tree.map(jnp.asarray, inst.encode(split.x)), jax.tree.map(jnp.asarray, split.y), weight
