"""Another weight set for the netlist that a run has written: proved in it, and as words to load."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pquant_jax import config, train
from pquant_jax._errors import ConfigError, ToolError
from pquant_jax.lower import ir, loaded, registers, sim, vectors_of, weights_of
from pquant_jax.run._files import open_run, write_json, write_text
from pquant_jax.run._hardware import Job, compare_registers, emulated_score, prove, read_infos
from pquant_jax.run._log import make_log, phase
from pquant_jax.run._run import restored
from pquant_jax.run._signals import stop_at_once


def weights(folder: str | Path, other: str | Path, out: str | Path | None = None, *, quiet: bool = False) -> dict[str, Any]:
    """Prove the weights of `other` in the netlist that a run has written, and write the words that load them.

    folder: a run lowered with `hardware.weights` of registers or ports; nothing is lowered again.
    other: a run of the same model with the same formats and masks, or its final.npz.
    Compared with the emulator are the JAX forward, the simulated RTL with these weights on its ports and, for registers, the
    register file at power-up (with the run's own set) and after this set is loaded.
    Written to `out` (default RUN/weights/NAME) when all are equal: weights.hex, regmap.json and proof.json, which is returned.
    Raises: ConfigError for a run that isn't lowered so, LoweringError for weights that don't fit, ToolError without a
      simulator, VerifyError at the first difference.
    """
    folder, experiment = _loadable_run(folder)
    source, name = _source(other)
    if missing := sim.missing_tools():
        raise ToolError("the weights are proved in simulated RTL, which needs: " + "; ".join(missing))
    log, hardware = make_log(quiet=quiet), experiment.hardware
    graph, infos = ir.load(folder / "graph.npz"), read_infos(folder)
    if hardware.weights == "registers":
        regs = registers.read_registers(folder / "rtl" / "registers", graph, infos["rtl_pipelined"], word=hardware.word)
        layout, voted = regs.map, regs.voted
    else:  # without gaps, so that the words are the bits of the port in their order
        regs, layout = None, registers.register_map(graph, infos["rtl_pipelined"], word=hardware.word or 8)
        voted = np.zeros(layout.words * layout.word, bool)
    with config.importing(experiment.folders), stop_at_once():
        prepared, *own = restored(folder, experiment, log)
        job = Job(prepared, *train.load_final(source, prepared.inst), folder, log, {"skipped": {}})
        with phase(log, "weights") as remarks:
            held, given = (weights_of(graph, prepared.inst, *trained) for trained in (own, (job.view, job.model_state)))
            changed = sum(int((a != b).sum()) for a, b in zip(held, given, strict=True))
            value = emulated_score(job, loaded(graph, given))
            remarks.append(f"{changed:,} of {sum(map(np.size, held)):,} weights are others than the run's")
            remarks.append(f"emulated test {prepared.metric.name} {value:.4f}")
        prove(job, graph, None, infos)
        if regs is not None:
            with phase(log, "registers") as remarks, tempfile.TemporaryDirectory(prefix="pquant-registers-") as work:
                inputs = vectors_of(
                    loaded(graph, given), prepared.inst, prepared.dataset.test.x, hardware.vectors, experiment.seed
                )
                count, job.summary["mismatches"]["registers"] = compare_registers(regs, graph, inputs, held, given, work)
                remarks.append(f"0 of {count:,} vectors differ, with the run's set at power-up and with this one loaded")
    proof = {"run": experiment.name, "weights": name, "metric": prepared.metric.name, "emulated": value, "changed": changed}
    proof |= {
        "vectors": job.summary["vectors"],
        "mismatches": {k: v for k, v in job.summary["mismatches"].items() if v is not None},
    }
    return _written(folder / "weights" / name if out is None else Path(out), (layout, voted), given, proof)


def _loadable_run(folder: str | Path) -> tuple[Path, config.Experiment]:
    folder, experiment = open_run(folder, "final.npz", "summary.json")
    if not (folder / "graph.npz").is_file() or not (folder / "rtl" / "info.json").is_file():
        raise ConfigError(f"{folder} is not lowered; `pquant-jax lower {folder} --weights registers`")
    if experiment.hardware.weights == "constants":
        raise ConfigError(
            f"the weights of {folder} are constants of its netlist; lower it with loadable ones: "
            f"`pquant-jax lower {folder} --weights registers`"
        )
    return folder, experiment


def _source(other: str | Path) -> tuple[Path, str]:
    """The file with the other weights, and a name for them."""
    path = Path(other).absolute()
    if path.suffix == ".npz":
        return path, path.parent.name if path.name == "final.npz" else path.stem
    return open_run(other, "final.npz")[0] / "final.npz", path.name


def _written(
    target: Path, layout: tuple[registers.RegisterMap, np.ndarray], given: list[np.ndarray], proof: dict[str, Any]
) -> dict[str, Any]:
    regs, voted = layout
    try:
        target.mkdir(parents=True, exist_ok=True)
        registers.write_weights(target / "weights.hex", regs, given)
        write_text(target / "regmap.json", json.dumps(registers.regmap_json(regs, voted), indent=1) + "\n")
        digest = hashlib.sha256((target / "weights.hex").read_bytes()).hexdigest()
        proof = proof | {"word": regs.word, "words": regs.words, "sha256": digest}
        write_json(target / "proof.json", proof)
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}; choose another folder with -o") from error
    return proof
