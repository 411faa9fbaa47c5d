"""The two fits of a run: the uncompressed model to compare with, and the compressed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pquant_jax import config, search, train
from pquant_jax.run._files import recorder, write_json
from pquant_jax.run._log import Log, progress
from pquant_jax.run._prepare import Prepared
from pquant_jax.run._signals import Stopped, stop_between_epochs


def fit_float(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> train.Result:
    """Train the model without compression for as many epochs as all stages together; best validation epoch."""
    plan = train.Plan(pretrain=prepared.epochs, train=0, finetune=0)
    tx = config.weights_optimizer(prepared.experiment, prepared.steps)
    return _fit(prepared, folder, log, "float", resume=resume, plan=plan, compression=None, optimizer=tx)


def fit_compressed(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> tuple[Prepared, train.Result]:
    """Train through the stages of the plan; best validation epoch of the last stage, ranges calibrated.

    With a search pre-training is a fit of its own, and the rest of the plan one with what was found, under the same rates;
    the experiment that comes back has the compression of the second.
    """
    if prepared.experiment.search is not None:
        return _fit_around_search(prepared, folder, log, resume=resume)
    tx = config.optimizer(prepared.experiment, prepared.compression, prepared.steps)
    plan, compression = prepared.plan, prepared.compression
    return prepared, _fit(prepared, folder, log, "model", resume=resume, plan=plan, compression=compression, optimizer=tx)


def _fit_around_search(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> tuple[Prepared, train.Result]:
    experiment, plan, inst = prepared.experiment, prepared.plan, prepared.inst
    if plan.pretrain:
        before = train.Plan(pretrain=plan.pretrain, train=0, finetune=0)
        tx = config.optimizer(experiment, prepared.compression, prepared.steps)
        parts: dict[str, Any] = dict(plan=before, compression=prepared.compression, optimizer=tx)
        state = _fit(prepared, folder, log, "pretrain", resume=resume, **parts).state
        inst = inst._replace(model=inst.model._replace(params=state.params.model, state=state.model_state))
    found = config.search(experiment, inst, inst.model.params, prepared.dataset.train, inst.model.state)
    figures = {key: value for key, value in found._asdict().items() if isinstance(value, (int, float)) or key == "bits"}
    write_json(folder / "search.json", figures)
    compression = search.compression(inst, found)
    prepared = prepared._replace(inst=inst, compression=compression)
    done = prepared.steps * plan.pretrain // prepared.epochs
    tx = config.optimizer(experiment, compression, prepared.steps, first=done)
    parts = dict(plan=plan._replace(pretrain=0), compression=compression, optimizer=tx, first=plan.pretrain)
    return prepared, _fit(prepared, folder, log, "model", resume=resume, **parts)


def _fit(
    prepared: Prepared, folder: Path, log: Log, name: str, *, resume: bool, first: int = 0, **arguments: Any
) -> train.Result:
    """One fit with checkpoints, metrics and progress.  first: the number of its first epoch, after those of another fit.

    Raises: Stopped after a signal, when its checkpoint is written.
    """
    t, metrics = prepared.experiment.training, folder / ("float_metrics.jsonl" if name == "float" else "metrics.jsonl")
    checkpoints = folder / "checkpoints" / name

    def later(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "epoch": record["epoch"] + first} if first else record

    with (
        recorder(metrics) as append,
        progress(log, name, prepared.epochs, prepared.metric.name) as show,
        stop_between_epochs(quiet=log.console.quiet) as requested,
    ):
        result = train.fit(
            prepared.inst,
            prepared.dataset,
            loss=prepared.loss,
            metric=prepared.metric,
            batch_size=t.batch_size,
            seed=prepared.experiment.seed,
            shuffle=t.shuffle,
            callbacks=[lambda record, _: append(later(record)), lambda record, _: show(later(record)), _stop(requested)],
            checkpoints=checkpoints,
            checkpoint_every=t.checkpoint_every,
            resume=resume and any(checkpoints.glob("[0-9]*/meta.json")),
            **arguments,
        )
        signum = requested()
    if signum is not None:
        raise Stopped(signum)
    return result._replace(best=later(result.best), history=[later(record) for record in result.history])


def _stop(requested: Callable[[], int | None]) -> Callable[[Any, Any], bool]:
    return lambda record, state: requested() is not None
