"""The main job: data -> trained, compressed model -> proved netlist -> report; and its parts again on a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from pquant_jax import _tree, config, train
from pquant_jax._base import Tree, View
from pquant_jax._errors import ConfigError, LoweringError, ToolError, VerifyError
from pquant_jax.report import save_profiles
from pquant_jax.run._doctor import check_doors, skips
from pquant_jax.run._exports import check as check_exports
from pquant_jax.run._figures import model_figures, outputs, profiles, score
from pquant_jax.run._files import create, new_folder, open_run, read_json, write_json, write_npz, write_text
from pquant_jax.run._log import Log, make_log, phase
from pquant_jax.run._prepare import Prepared, check_same_data, describe_data, prepare, prepare_data, versions
from pquant_jax.run._report import write_report
from pquant_jax.run._signals import Stopped, stop_at_once
from pquant_jax.run._training import fit_compressed, fit_float
from pquant_jax.transforms import identity, state_of

ENGINES: Final = ("emulator", "rtl_comb", "rtl_pipelined")
COSTS: Final = ("latency_cycles", "latency_ns", "clock_ns", "ii", "reg_bits", "lut", "ff", "dsp", "carry")
PREPARING: Final = ("data", "model")  # phases that `lower` and `verify` repeat without being asked for them
FAILURES: Final = {LoweringError: "lower", VerifyError: "verify", ToolError: "tools"}


def run(
    experiment: config.Experiment,
    *,
    root: str | Path = "runs",
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do an experiment in `root/<name>/` and return its summary, which is also in summary.json.

    overwrite: replace a run of this name.  resume: go on with it from its newest checkpoint, to the same final bits.
    Everything that can be known to be wrong is raised before training starts.  What fails after training (lowering,
    verification, a tool) is raised when the summary and the report of the rest are written.
    Raises: PQuantError, each of one line; Stopped (a KeyboardInterrupt) after a signal.
    """
    if resume:
        return _resume(Path(root) / experiment.name, quiet)
    folder, log = new_folder(root, experiment.name, overwrite=overwrite), make_log(quiet=quiet)
    with config.importing(experiment.folders), stop_at_once():
        prepared = _prepared(experiment, log)
        check_exports(prepared)
        create(folder, experiment)
        write_json(folder / "dataset.json", describe_data(prepared.dataset))
        return _work(prepared, folder, log, resume=False)


def resume(folder: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Go on with an interrupted run from its newest checkpoint; a finished one is left as it is.

    Raises: ConfigError for what is no run, DataError if its data have changed, and what `run` raises.
    """
    return _resume(Path(folder), quiet)


def _resume(path: Path, quiet: bool) -> dict[str, Any]:
    folder, experiment = open_run(path)
    log = make_log(quiet=quiet)
    if (folder / "summary.json").is_file():
        log.console.print(f"{folder} is finished; see {folder / 'report.html'}")
        return read_json(folder / "summary.json")
    with config.importing(experiment.folders), stop_at_once():
        prepared = _prepared(experiment, log)
        check_same_data(prepared.dataset, folder)
        write_json(folder / "dataset.json", describe_data(prepared.dataset))
        return _work(prepared, folder, log, resume=True)


def _prepared(experiment: config.Experiment, log: Log) -> Prepared:
    check_doors(experiment)
    log.console.print(f"{experiment.name}: {experiment.model.build} on {experiment.data.source}")
    for step, reason in skips(experiment).items():
        log.console.print(f"skipped: {step}: {reason}")
    with phase(log, "data") as remarks:
        dataset = prepare_data(experiment)
        sizes = [len(jax.tree.leaves(s.y)[0]) for s in (dataset.train, dataset.val, dataset.test)]
        remarks.append(f"{dataset.name}: {sizes[0]:,} train, {sizes[1]:,} validation, {sizes[2]:,} test")
    with phase(log, "model") as remarks:
        prepared = prepare(experiment, dataset)
        weights = sum(np.size(v) for v in jax.tree.leaves(prepared.inst.model.params))
        remarks.append(f"{weights:,} parameters, {len(prepared.inst.sites)} quantize sites")
    return prepared


def _work(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> dict[str, Any]:
    try:
        return _phases(prepared, folder, log, resume=resume)
    except Stopped as stop:
        raise Stopped(stop.signum, f"go on with `pquant-jax resume {folder}`") from None


def _phases(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> dict[str, Any]:
    summary = _empty_summary(prepared)
    scores = summary[prepared.metric.name]
    if "float" not in summary["skipped"]:
        with phase(log, "float", live=True) as remarks:
            scores["float"] = _float(prepared, folder, log, resume=resume)
            remarks.append(f"test {prepared.metric.name} {scores['float']:.4f}")
    with phase(log, "train", live=True) as remarks:
        prepared, result = fit_compressed(prepared, folder, log, resume=resume)
        summary |= {"best_epoch": result.best["epoch"], "traces": result.traces}
        remarks.append(f"best validation {prepared.metric.name} {result.best['val_metric']:.4f} in epoch {result.best['epoch']}")
    with phase(log, "evaluate") as remarks:
        view, model_state = _finalize(prepared, result, folder)
        summary |= _evaluated(prepared, view, model_state, folder, scores)
        latent = result.state.params.model
        save_profiles(folder / "profiles.npz", profiles(prepared.inst, view, latent, model_state, prepared.dataset.train.x))
        remarks.append(_headline(prepared, summary))
    return _hardware(prepared, view, model_state, folder, log, summary)


def _empty_summary(prepared: Prepared) -> dict[str, Any]:
    experiment, metric = prepared.experiment, prepared.metric.name
    return {
        "name": experiment.name,
        "metric": metric,
        metric: {"compressed": None},
        "mismatches": dict.fromkeys((ENGINES[0], experiment.hardware.backend, *ENGINES[1:])),
        "vectors": None,
        "cost": dict.fromkeys((experiment.hardware.backend, *COSTS)),
        "seeds": {"run": experiment.seed},
        "skipped": skips(experiment),
        "versions": versions(),
        "epochs": prepared.epochs,
        "steps": prepared.steps,
    }


def _float(prepared: Prepared, folder: Path, log: Log, *, resume: bool) -> float:
    result = fit_float(prepared, folder, log, resume=resume)
    state = result.state
    arrays = train.finalize(identity(), state.params, state_of(state.opt_state), state.model_state)
    train.save_final(folder / "float.npz", arrays)
    test = prepared.dataset.test
    return score(prepared.metric, outputs(prepared.inst, result.view, state.model_state, test.x), test)


def _finalize(prepared: Prepared, result: train.Result, folder: Path) -> tuple[View, Tree]:
    """final.npz, and what is read back from it: that is what is judged and lowered from here on."""
    state = result.state
    compression = prepared.compression if prepared.compression is not None else identity()
    arrays = train.finalize(compression, state.params, state_of(state.opt_state), state.model_state, inst=prepared.inst)
    train.save_final(folder / "final.npz", arrays)
    return train.load_final(folder / "final.npz", prepared.inst)


def _evaluated(prepared: Prepared, view: View, model_state: Tree, folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    test = prepared.dataset.test
    predicted = outputs(prepared.inst, view, model_state, test.x)
    scores["compressed"] = score(prepared.metric, predicted, test)
    named = {f"prediction/{p}".rstrip("/"): v for p, v in _tree.flatten(predicted).items()}
    named |= {f"target/{p}".rstrip("/"): np.asarray(v) for p, v in _tree.flatten(test.y).items()}
    write_npz(folder / "test.npz", named)
    return model_figures(prepared.inst, view)


def _headline(prepared: Prepared, summary: dict[str, Any]) -> str:
    metric = prepared.metric.name
    parts = [f"test {metric} {summary[metric]['compressed']:.4f}", f"sparsity {summary['sparsity']:.1%}"]
    if summary["ebops"]["final"] is not None:
        parts.append(f"{summary['ebops']['final']:,.0f} EBOPs of {summary['ebops']['reference8']:,.0f}")
    return ", ".join(parts)


def _hardware(
    prepared: Prepared, view: View, model_state: Tree, folder: Path, log: Log, summary: dict[str, Any]
) -> dict[str, Any]:
    """Lower if that is wanted; write summary and report in any case, then raise what failed."""
    failure: LoweringError | VerifyError | ToolError | None = None
    if "lower" not in summary["skipped"]:
        from pquant_jax.run._hardware import Job, lower_model

        summary["seeds"]["vectors"] = prepared.experiment.seed
        try:
            lower_model(Job(prepared, view, model_state, folder, log, summary))
        except tuple(FAILURES) as error:
            failure = error
            summary["skipped"][FAILURES[type(error)]] = f"failed: {error}"
    _finish(folder, summary, log)
    if failure is not None:
        raise failure
    return read_json(folder / "summary.json")


def _finish(folder: Path, summary: dict[str, Any], log: Log) -> None:
    """report.html, then summary.json: where that is, the run is finished."""
    known = summary.get("seconds", {})
    summary["seconds"] = {**known, **{k: v for k, v in log.seconds.items() if k not in known or k not in PREPARING}}
    with phase(log, "report") as remarks:
        write_report(folder, summary)
        remarks.append(str(folder / "report.html"))
    summary["seconds"]["report"] = log.seconds["report"]
    write_json(folder / "summary.json", summary)


def lower(folder: str | Path, overrides: Sequence[str] = (), *, quiet: bool = False) -> dict[str, Any]:
    """Lower a trained run again, with other settings of `hardware`; returns its new summary.

    overrides: "hardware.latency_cutoff=3"; config.yaml keeps them.
    Raises: ConfigError for a run that isn't trained or isn't quantized, and what `run` raises.
    """
    folder, experiment = open_run(folder, "final.npz", "summary.json")
    other = [o for o in overrides if not o.strip().startswith("hardware.")]
    if other:
        raise ConfigError(f"--set {other[0]}: lower takes settings of hardware only, such as hardware.latency_cutoff=3")
    experiment = config.parse(experiment.model_dump(), overrides)
    log = make_log(quiet=quiet)
    with config.importing(experiment.folders), stop_at_once():
        prepared, view, model_state = restored(folder, experiment, log)
        fresh = _empty_summary(prepared)
        if "lower" in fresh["skipped"]:
            raise ConfigError(f"{folder} can't be lowered: {fresh['skipped']['lower']}")
        summary = read_json(folder / "summary.json") | {k: fresh[k] for k in ("mismatches", "vectors", "cost", "skipped")}
        write_text(folder / "config.yaml", config.dump(experiment))
        return _hardware(prepared, view, model_state, folder, log, summary)


def restored(folder: Path, experiment: config.Experiment, log: Log) -> tuple[Prepared, View, Tree]:
    """A trained run: its parts built again, and what final.npz holds."""
    started = experiment.model_copy(update={"training": experiment.training.model_copy(update={"init": None})})
    prepared = _prepared(started, log)._replace(experiment=experiment)
    check_same_data(prepared.dataset, folder)
    return prepared, *train.load_final(folder / "final.npz", prepared.inst)


def verify(folder: str | Path, *, vectors: int | None = None, seed: int | None = None, quiet: bool = False) -> dict[str, Any]:
    """Compare JAX, emulator, da4ml and the written Verilog of a lowered run once more; returns its new summary.

    vectors, seed: other ones than the run's, to draw new inputs.
    Raises: VerifyError at the first difference, ConfigError for a run that isn't lowered.
    """
    from pquant_jax.lower import ir
    from pquant_jax.run._hardware import Job, backend_of, prove, read_infos

    folder, experiment = open_run(folder, "final.npz", "summary.json")
    if not (folder / "graph.npz").is_file():
        raise ConfigError(f"{folder} has no graph.npz: it is not lowered; `pquant-jax lower {folder}`")
    hardware = experiment.hardware.model_copy(update={} if vectors is None else {"vectors": vectors})
    other = experiment.model_copy(update={"hardware": hardware, "seed": experiment.seed if seed is None else seed})
    log = make_log(quiet=quiet)
    with config.importing(experiment.folders), stop_at_once():
        prepared, view, model_state = restored(folder, experiment, log)
        summary, graph = read_json(folder / "summary.json"), ir.load(folder / "graph.npz")
        summary["seeds"]["vectors"] = other.seed
        kept = {k: v for k, v in summary["skipped"].items() if k not in ("simulation", "verify")}
        summary["skipped"] = kept | {k: v for k, v in skips(experiment).items() if k == "simulation"}
        comb = backend_of(prepared).to_comb(graph)
        job = Job(prepared._replace(experiment=other), view, model_state, folder, log, summary)
        prove(job, graph, comb, read_infos(folder))
        _finish(folder, summary, log)
    return read_json(folder / "summary.json")
