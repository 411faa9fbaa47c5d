"""The two fits of a run: the uncompressed model to compare with, and the compressed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pquant_jax import config, train
from pquant_jax.run._files import recorder
from pquant_jax.run._log import Log, progress
from pquant_jax.run._prepare import Prepared
from pquant_jax.run._signals import Stopped, stop_between_epochs


def fit_float(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> train.Result:
    """Train the model without compression for as many epochs as all stages together; best validation epoch."""
    plan = train.Plan(pretrain=prepared.epochs, train=0, finetune=0)
    tx = config.weights_optimizer(prepared.experiment, prepared.steps)
    return _fit(prepared, folder, log, "float", resume=resume, plan=plan, compression=None, optimizer=tx)


def fit_compressed(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> train.Result:
    """Train through the stages of the plan; best validation epoch of the last stage, ranges calibrated."""
    experiment, compression = prepared.experiment, prepared.compression
    tx = config.optimizer(experiment, compression, prepared.steps)
    return _fit(prepared, folder, log, "model", resume=resume, plan=prepared.plan, compression=compression, optimizer=tx)


def _fit(prepared: Prepared, folder: Path, log: Log, name: str, *, resume: bool, **arguments: Any) -> train.Result:
    """One fit with checkpoints, metrics and progress.  Raises: Stopped after a signal, when its checkpoint is written."""
    t, metrics = prepared.experiment.training, folder / ("metrics.jsonl" if name == "model" else f"{name}_metrics.jsonl")
    checkpoints = folder / "checkpoints" / name
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
            callbacks=[lambda record, state: append(record), lambda record, state: show(record), _stop(requested)],
            checkpoints=checkpoints,
            checkpoint_every=t.checkpoint_every,
            resume=resume and any(checkpoints.glob("[0-9]*/meta.json")),
            **arguments,
        )
        signum = requested()
    if signum is not None:
        raise Stopped(signum)
    return result


def _stop(requested: Callable[[], int | None]) -> Callable[[Any, Any], bool]:
    return lambda record, state: requested() is not None
