"""From a finished model to a netlist: graph, emulator, da4ml, Verilog, proof and resource count."""

from __future__ import annotations

import importlib
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from pquant_jax import config
from pquant_jax._base import Tree, View
from pquant_jax.graph import Instrumented
from pquant_jax.lower import (
    Graph,
    cost,
    emulate,
    ir,
    loaded,
    pipeline,
    remove_dead,
    trace,
    vectors_of,
    verify as compare,
    weight_ports,
    weights_of,
)  # fmt: skip
from pquant_jax.lower.dead import channels
from pquant_jax.lower.emulate import flatten_batch
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.run._exports import export, same
from pquant_jax.run._figures import CHUNK, score
from pquant_jax.run._files import read_json, write_json
from pquant_jax.run._log import Log, phase
from pquant_jax.run._prepare import Prepared

TESTBENCH: Final = 500  # vectors of the test set in a written project, and as many random ones
SWEEP: Final = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)  # times the run's own latency cutoff
LOADED: Final = 1000  # vectors that the register file is compared on, at power-up and after loading
SENSITIVITY: Final = 4096  # samples on which the bits are ranked


def lower_model(prepared: Prepared, view: View, model_state: Tree, folder: Path, log: Log, summary: dict[str, Any]) -> None:
    """graph.npz, rtl/, the proof and the cell count; every figure goes into `summary` as soon as it is known.

    Raises: LoweringError, VerifyError or ToolError; what was found before stays in `summary`.
    """
    metric, experiment, summary_cost = prepared.metric, prepared.experiment, summary["cost"]
    hardware = experiment.hardware
    _remove_old(folder)
    for old in ("layer_cost", "pipelines"):
        summary.pop(old, None)
    with phase(log, "lower") as remarks:
        graph = trace(prepared.inst, view, model_state, weights="constants" if hardware.weights == "constants" else "ports")
        ir.save(graph, folder / "graph.npz")
        weights = weights_of(graph, prepared.inst, view, model_state) if weight_ports(graph) else []
        fixed = loaded(graph, weights) if weights else graph
        predicted = emulated(fixed, prepared.inst, prepared.dataset.test.x)
        shape = jax.eval_shape(lambda x: prepared.inst.forward(view, model_state, x)[0], prepared.inst.sample)
        value = score(metric, jax.tree.unflatten(jax.tree.structure(shape), predicted), prepared.dataset.test)
        summary.setdefault(metric.name, {})["emulated"] = value
        total = channels(fixed)
        summary["channels"] = {"total": total, "dead": total - channels(remove_dead(fixed))}
        remarks.append(f"{len(graph.nodes)} nodes, emulated test {metric.name} {value:.4f}")
        if not weights:
            remarks.append(f"{summary['channels']['dead']} of {total} channels dead, which the netlist leaves out")
    with phase(log, "netlist") as remarks:
        inputs = vectors_of(fixed, prepared.inst, prepared.dataset.test.x, hardware.vectors, experiment.seed)
        found = netlist(prepared, graph)
        rtls = write_projects(prepared, graph, found, [*inputs, *weights], folder)
        summary_cost |= {hardware.backend: rtls["rtl_comb"].cost, "reg_bits": found.cut.reg_bits}
        summary_cost |= {key: getattr(found.cut, key) for key in ("latency_cycles", "latency_ns", "clock_ns", "ii")}
        latency = f"{found.cut.latency_cycles} cycles of {found.cut.clock_ns:g} ns"
        remarks.append(f"{hardware.backend} cost {rtls['rtl_comb'].cost:,.0f}, latency {latency}")
    prove(prepared, graph, view, model_state, found.comb, rtls, log, summary)
    counted = rtls["rtl_pipelined"]
    if hardware.weights == "registers":
        counted = register_file(prepared, graph, found, (view, model_state), (inputs, weights), folder, log, summary)
    export(prepared, graph, inputs, folder, log, summary)
    proof = {key: summary[key] for key in ("mismatches", "vectors")}
    write_projects(prepared, graph, found, [*inputs, *weights], folder, proof)
    if hardware.backend == "da4ml" and not weights:
        summary["layer_cost"] = cost.table(graph, backend_of(prepared), cutoff=found.cut.cutoff)
    cuts = [pipeline.cut(found.comb, c * found.cut.cutoff, backend_of(prepared)) for c in SWEEP]
    summary["pipelines"] = {hardware.backend: [c._asdict() for c in cuts]}
    if "synthesis" not in summary["skipped"]:
        from pquant_jax.lower import synth

        with phase(log, "synth") as remarks:
            cells = synth.synth(counted)
            summary_cost |= {key: cells[key] for key in ("lut", "ff", "dsp", "carry")}
            remarks.append(", ".join(f"{cells[key]:,} {key.upper()}" for key in ("lut", "ff", "dsp")))


def _remove_old(folder: Path) -> None:
    """What an earlier lowering wrote: nothing of it may stand beside another netlist."""
    for old in (folder / "rtl", folder / "hls"):
        shutil.rmtree(old, ignore_errors=True)
    for old in folder.glob("model*.onnx"):
        old.unlink()


def emulated(graph: Graph, inst: Instrumented, x: Tree) -> list[np.ndarray]:
    """The emulator's outputs for all samples of x, in the order of the graph's outputs."""
    ports = [np.asarray(v, np.float64) for v in jax.tree.leaves(inst.encode(x))]
    parts = [emulate(graph, [v[a : a + CHUNK] for v in ports]) for a in range(0, len(ports[0]), CHUNK)]
    return [np.concatenate(values) for values in zip(*parts, strict=True)]


class Netlist(NamedTuple):
    """A netlist and how its pipelined version is cut."""

    comb: Any
    cut: pipeline.Pipelined


def backend_of(prepared: Prepared) -> Any:
    """The module of `lower.backends` that the run asks for."""
    return importlib.import_module(f"pquant_jax.lower.backends.{prepared.experiment.hardware.backend}")


def netlist(prepared: Prepared, graph: Graph) -> Netlist:
    """The netlist of `graph`, cut as `hardware.latency_cutoff`, or else clock and latency, ask."""
    hardware, backend = prepared.experiment.hardware, backend_of(prepared)
    comb, clock = backend.to_comb(graph), hardware.clock_period
    if hardware.latency_cutoff is not None:
        return Netlist(comb, pipeline.cut(comb, hardware.latency_cutoff, backend, clock_ns=clock))
    if hardware.latency_ns is not None:
        return Netlist(comb, pipeline.pipeline(comb, backend, latency_ns=hardware.latency_ns))
    return Netlist(comb, pipeline.pipeline(comb, backend, clock_ns=clock))


def write_projects(
    prepared: Prepared,
    graph: Graph,
    found: Netlist,
    inputs: Sequence[np.ndarray],
    folder: Path,
    proof: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"rtl_comb", "rtl_pipelined": RTLInfo}; rtl/comb and rtl/pipelined are whole projects.

    inputs: what their testbenches feed, arrays (N, *shape), and (*shape) for what is the same in every vector: weights.
    proof: what `verify` found, which their READMEs quote.
    """
    from pquant_jax.lower.project import write_project

    hardware, name = prepared.experiment.hardware, top_module(prepared.experiment.name)
    some = [_testbench_vectors(v, np.ndim(v) == len(graph.nodes[j].shape)) for v, j in zip(inputs, graph.inputs, strict=True)]
    infos = {}
    for kind, cutoff in {"comb": -1.0, "pipelined": found.cut.cutoff}.items():
        made = write_project(
            graph, found.comb, folder / "rtl" / kind, name=name, backend=backend_of(prepared),
            flavors=("verilog", "vhdl") if hardware.vhdl else ("verilog",), latency_cutoff=cutoff, part=hardware.part,
            clock_period=found.cut.clock_ns, vectors=some, overwrite=True,
            origin={"run": prepared.experiment.name, **(proof or {})},
        )  # fmt: skip
        infos[f"rtl_{kind}"] = made.rtl["verilog"]
    write_json(folder / "rtl" / "info.json", {key: _info_json(info, folder) for key, info in infos.items()})
    return infos


def _testbench_vectors(x: np.ndarray, same: bool) -> np.ndarray:
    return np.broadcast_to(x, (2 * TESTBENCH, *x.shape)) if same else np.concatenate([x[:TESTBENCH], x[-TESTBENCH:]])


def register_file(
    prepared: Prepared,
    graph: Graph,
    found: Netlist,
    trained: tuple[View, Tree],
    vectors: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    folder: Path,
    log: Log,
    summary: dict[str, Any],
) -> RTLInfo:
    """rtl/registers: the pipelined netlist in a register file that holds the trained weights, loaded and compared.

    Returns what it and the netlist are together.
    trained: view and model state.  vectors: (inputs, the weight set).  The bits to triplicate are those whose flip changes
    the loss on the training set most.
    """
    from pquant_jax import robust
    from pquant_jax.lower import registers

    (inputs, weights), hardware = vectors, prepared.experiment.hardware
    with phase(log, "registers") as remarks, tempfile.TemporaryDirectory(prefix="pquant-registers-") as work:
        info = backend_of(prepared).write_rtl(
            found.comb, Path(work) / "rtl", name=top_module(prepared.experiment.name), latency_cutoff=found.cut.cutoff
        )
        voted = None
        if hardware.tmr:
            x, y = jax.tree.map(lambda v: v[:SENSITIVITY], (prepared.dataset.train.x, prepared.dataset.train.y))
            scores = robust.bit_sensitivity(prepared.inst, *trained, x, y, loss=config.loss(prepared.experiment)).score
            voted = registers.most_sensitive(registers.register_map(graph, info, word=hardware.word), scores, hardware.tmr)
        regs = registers.write_registers(
            graph, info, weights, folder / "rtl" / "registers", word=hardware.word, voted=voted, overwrite=True
        )
        remarks.append(f"{regs.map.words:,} words of {regs.map.word} bits, {int(regs.voted.sum()):,} bits triplicated")
        whole = regs.netlist._replace(name=regs.top)
        if "simulation" in summary["skipped"]:
            return whole
        flat = flatten_batch([v[:LOADED] for v in inputs])
        expected = flatten_batch(emulate(loaded(graph, weights), [v[:LOADED] for v in inputs]))
        program = registers.build(regs, Path(work) / "sim")
        load = registers.load(regs.image, flat.shape[1])
        (awake, _, again), _ = registers.play(program, regs, [registers.vectors(flat), load, registers.vectors(flat)])
        summary["mismatches"]["registers"] = max(same("the register file", v, expected) for v in (awake, again))
        remarks.append(f"0 of {len(flat):,} vectors differ, at power-up and after loading")
        return whole


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
    """Compare JAX, emulator, netlist and, unless it is skipped, the simulated Verilog; mismatches go into `summary`."""
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
            backend=backend_of(prepared),
            rtls={} if "simulation" in summary["skipped"] else rtls,
            work=work,  # shared, so that the simulator's own runtime is compiled once for both netlists
        )
        kept = {name: count for name, count in summary.get("mismatches", {}).items() if count is not None}
        summary |= found | {"mismatches": kept | found["mismatches"]}
        names = [name for name, count in found["mismatches"].items() if count is not None]
        remarks.append(f"0 of {found['vectors']:,} vectors x {found['outputs']} outputs differ ({', '.join(names)})")
