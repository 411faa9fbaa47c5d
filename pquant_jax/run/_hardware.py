"""From a finished model to a netlist: graph, emulator, da4ml, Verilog, proof and resource count."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from pquant_jax._base import Tree, View
from pquant_jax.graph import Instrumented
from pquant_jax.lower import Graph, emulate, ir, remove_dead, trace, vectors_of, verify as compare
from pquant_jax.lower.dead import channels
from pquant_jax.run._exports import export
from pquant_jax.run._figures import CHUNK, score
from pquant_jax.run._files import read_json, write_json
from pquant_jax.run._log import Log, phase
from pquant_jax.run._prepare import Prepared

TESTBENCH: Final = 500  # vectors of the test set in a written project, and as many random ones


def lower_model(prepared: Prepared, view: View, model_state: Tree, folder: Path, log: Log, summary: dict[str, Any]) -> None:
    """graph.npz, rtl/, the proof and the cell count; every figure goes into `summary` as soon as it is known.

    Raises: LoweringError, VerifyError or ToolError; what was found before stays in `summary`.
    """
    metric = prepared.metric
    with phase(log, "lower") as remarks:
        graph = trace(prepared.inst, view, model_state)
        ir.save(graph, folder / "graph.npz")
        predicted = emulated(graph, prepared.inst, prepared.dataset.test.x)
        shape = jax.eval_shape(lambda x: prepared.inst.forward(view, model_state, x)[0], prepared.inst.sample)
        value = score(metric, jax.tree.unflatten(jax.tree.structure(shape), predicted), prepared.dataset.test)
        summary.setdefault(metric.name, {})["emulated"] = value
        total = channels(graph)
        summary["channels"] = {"total": total, "dead": total - channels(remove_dead(graph))}
        remarks.append(f"{len(graph.nodes)} nodes, emulated test {metric.name} {value:.4f}")
        remarks.append(f"{summary['channels']['dead']} of {total} channels dead, which the netlist leaves out")
    with phase(log, "netlist") as remarks:
        experiment = prepared.experiment
        inputs = vectors_of(graph, prepared.inst, prepared.dataset.test.x, experiment.hardware.vectors, experiment.seed)
        comb, rtls = write_netlists(prepared, graph, inputs, folder)
        summary["cost"] |= {"da4ml": rtls["rtl_comb"].cost}
        summary["cost"] |= {"latency_cycles": rtls["rtl_pipelined"].latency_cycles, "ii": rtls["rtl_pipelined"].ii}
        remarks.append(f"da4ml cost {rtls['rtl_comb'].cost:,.0f}, latency {rtls['rtl_pipelined'].latency_cycles} cycles")
    prove(prepared, graph, view, model_state, comb, rtls, log, summary)
    export(prepared, graph, inputs, folder, log, summary)
    write_netlists(prepared, graph, inputs, folder, {key: summary[key] for key in ("mismatches", "vectors")})
    if "synthesis" not in summary["skipped"]:
        from pquant_jax.lower import synth

        with phase(log, "synth") as remarks:
            cells = synth.synth(rtls["rtl_pipelined"])
            summary["cost"] |= {key: cells[key] for key in ("lut", "ff", "dsp", "carry")}
            remarks.append(", ".join(f"{cells[key]:,} {key.upper()}" for key in ("lut", "ff", "dsp")))


def emulated(graph: Graph, inst: Instrumented, x: Tree) -> list[np.ndarray]:
    """The emulator's outputs for all samples of x, in the order of the graph's outputs."""
    ports = [np.asarray(v, np.float64) for v in jax.tree.leaves(inst.encode(x))]
    parts = [emulate(graph, [v[a : a + CHUNK] for v in ports]) for a in range(0, len(ports[0]), CHUNK)]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


def write_netlists(
    prepared: Prepared, graph: Graph, inputs: Sequence[np.ndarray], folder: Path, proof: Mapping[str, Any] | None = None
) -> tuple[Any, dict[str, Any]]:
    """(da4ml's netlist, {"rtl_comb", "rtl_pipelined": RTLInfo}); rtl/comb and rtl/pipelined are whole projects.

    inputs: what their testbenches feed, arrays (N, *shape).  proof: what `verify` found, which their READMEs quote.
    """
    from pquant_jax.lower.backends import da4ml
    from pquant_jax.lower.project import write_project

    hardware, name = prepared.experiment.hardware, top_module(prepared.experiment.name)
    comb = da4ml.to_comb(graph)
    infos = {}
    some = [np.concatenate([v[:TESTBENCH], v[-TESTBENCH:]]) for v in inputs]
    for kind, cutoff in {"comb": -1.0, "pipelined": hardware.latency_cutoff}.items():
        made = write_project(
            graph, comb, folder / "rtl" / kind, name=name, flavors=("verilog", "vhdl") if hardware.vhdl else ("verilog",),
            latency_cutoff=cutoff, part=hardware.part, clock_period=hardware.clock_period, overwrite=True,
            vectors=some, origin={"run": prepared.experiment.name, **(proof or {})},
        )  # fmt: skip
        infos[f"rtl_{kind}"] = made.rtl["verilog"]
    write_json(folder / "rtl" / "info.json", {key: _info_json(info, folder) for key, info in infos.items()})
    return comb, infos


def top_module(name: str) -> str:
    """The run's name as an identifier of Verilog and VHDL.

    >>> top_module("jets-hgq..v2_")
    'pq_jets_hgq_v2'
    """
    return "pq_" + re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


def _info_json(info: Any, folder: Path) -> dict[str, Any]:
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in info._asdict().items()}
    return plain | {key: str(Path(plain[key]).relative_to(folder.absolute())) for key in ("directory", "src")}


def read_infos(folder: Path) -> dict[str, Any]:
    """The `RTLInfo`s that `write_netlists` left in rtl/info.json."""
    from pquant_jax.lower.rtl import RTLInfo

    def restored(fields: Mapping[str, Any]) -> Any:
        paths = {key: folder.absolute() / fields[key] for key in ("directory", "src")}
        arrays = {key: np.asarray(fields[key], np.int64) for key in ("inp_kifs", "out_kifs")}
        return RTLInfo(**{**fields, **paths, **arrays})

    return {key: restored(fields) for key, fields in read_json(folder / "rtl" / "info.json").items()}


def prove(
    prepared: Prepared,
    graph: Graph,
    view: View,
    model_state: Tree,
    comb: Any,
    rtls: Mapping[str, Any],
    log: Log,
    summary: dict[str, Any],
) -> None:
    """Compare JAX, emulator, da4ml and, unless it is skipped, the simulated Verilog; mismatches go into `summary`."""
    experiment = prepared.experiment
    with phase(log, "verify") as remarks, tempfile.TemporaryDirectory(prefix="pquant-sim-") as work:
        found = compare(
            graph,
            prepared.inst,
            view,
            model_state,
            x_test=prepared.dataset.test.x,
            vectors=experiment.hardware.vectors,
            seed=experiment.seed,
            comb=comb,
            rtls={} if "simulation" in summary["skipped"] else rtls,
            work=work,  # shared, so that the simulator's own runtime is compiled once for both netlists
        )
        summary |= found
        names = [name for name, count in found["mismatches"].items() if count is not None]
        remarks.append(f"0 of {found['vectors']:,} vectors x {found['outputs']} outputs differ ({', '.join(names)})")
