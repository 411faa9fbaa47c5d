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

from pquant_jax._base import Tree, View
from pquant_jax._errors import VerifyError
from pquant_jax.graph import Instrumented
from pquant_jax.lower import (
    Graph,
    check_outputs,
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
from pquant_jax.run._exports import export
from pquant_jax.run._figures import score
from pquant_jax.run._files import read_json, write_json
from pquant_jax.run._log import Log, phase
from pquant_jax.run._prepare import Prepared
from pquant_jax.run._robust import sensitivity

TESTBENCH: Final = 500  # vectors of the test set in a written project, and as many random ones
SOURCE: Final = "samples of the data, then random codes of the whole port"
SWEEP: Final = (0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)  # times the run's own latency cutoff
LOADED: Final = 1000  # vectors that the register file is compared on, at power-up and after loading


class Job(NamedTuple):
    """A trained model, the directory of its run, and what is told of every step: a log, and a summary that takes the figures."""

    prepared: Prepared
    view: View
    model_state: Tree
    folder: Path
    log: Log
    summary: dict[str, Any]


class Netlist(NamedTuple):
    """A netlist and how its pipelined version is cut."""

    comb: Any
    cut: pipeline.Pipelined


def lower_model(job: Job) -> None:
    """graph.npz, rtl/ unless there is no netlist, the proof, the exports and the cell count.

    Every figure goes into the summary as soon as it is known.

    Raises: LoweringError, VerifyError or ToolError; what was found before stays in the summary.
    """
    _remove_old(job.folder)
    for old in ("layer_cost", "layer_cells", "pipelines"):
        job.summary.pop(old, None)
    graph, weights, fixed = _traced(job)
    experiment = job.prepared.experiment
    inputs = vectors_of(fixed, job.prepared.inst, job.prepared.dataset.test.x, experiment.hardware.vectors, experiment.seed)
    if experiment.hardware.backend is None:
        prove(job, graph, None, {})
        export(job.prepared, graph, inputs, job.folder, job.log, job.summary)
        return
    with phase(job.log, "netlist") as remarks:
        found = netlist(job.prepared, graph)
        rtls = write_projects(job.prepared, graph, found, [*inputs, *weights], job.folder)
        remarks.append(_costs(job, graph, found, rtls["rtl_comb"].cost))
    prove(job, graph, found.comb, rtls)
    counted = rtls["rtl_pipelined"]
    if experiment.hardware.weights == "registers":
        counted = register_file(job, graph, found, inputs, weights)
    export(job.prepared, graph, inputs, job.folder, job.log, job.summary)
    _quote_proof(job)
    if "synthesis" not in job.summary["skipped"]:
        _count_cells(job, graph, found, counted)


def _remove_old(folder: Path) -> None:
    """What an earlier lowering wrote: nothing of it may stand beside another netlist."""
    for old in (folder / "rtl", folder / "hls"):
        shutil.rmtree(old, ignore_errors=True)
    for old in folder.glob("model*.onnx"):
        old.unlink()


def _traced(job: Job) -> tuple[Graph, list[np.ndarray], Graph]:
    """The graph of the model, written; what its weight ports take, nothing for constants; and the graph with that in it."""
    prepared, summary = job.prepared, job.summary
    with phase(job.log, "lower") as remarks:
        graph = trace(prepared.inst, job.view, job.model_state, **prepared.experiment.hardware.traced)
        ir.save(graph, job.folder / "graph.npz")
        weights = weights_of(graph, prepared.inst, job.view, job.model_state) if weight_ports(graph) else []
        fixed = loaded(graph, weights) if weights else graph
        value, total = emulated_score(job, fixed), channels(fixed)
        summary.setdefault(prepared.metric.name, {})["emulated"] = value
        summary["channels"] = {"total": total, "dead": total - channels(remove_dead(fixed))}
        remarks.append(f"{len(graph.nodes)} nodes, emulated test {prepared.metric.name} {value:.4f}")
        if not weights and prepared.experiment.hardware.backend:
            remarks.append(f"{summary['channels']['dead']} of {total} channels dead, which the netlist leaves out")
    return graph, weights, fixed


def emulated_score(job: Job, graph: Graph) -> float:
    """The metric of the emulator's outputs on the test set."""
    prepared, test = job.prepared, job.prepared.dataset.test
    shape = jax.eval_shape(lambda x: prepared.inst.forward(job.view, job.model_state, x)[0], prepared.inst.sample)
    predicted = emulated(graph, prepared.inst, test.x)
    return score(prepared.metric, jax.tree.unflatten(jax.tree.structure(shape), predicted), test)


def _costs(job: Job, graph: Graph, found: Netlist, estimate: float) -> str:
    """Cost and latency, cells layer by layer, and what other cuts would give, into the summary; a remark."""
    backend, cut, summary = job.prepared.experiment.hardware.backend, found.cut, job.summary
    summary["cost"] |= {backend: estimate, "reg_bits": cut.reg_bits}
    summary["cost"] |= {key: getattr(cut, key) for key in ("latency_cycles", "latency_ns", "clock_ns", "ii")}
    if backend == "da4ml" and not weight_ports(graph):
        summary["layer_cost"] = cost.table(graph, backend_of(job.prepared), cutoff=cut.cutoff, reg_bits=cut.reg_bits)
    cuts = [pipeline.cut(found.comb, c * cut.cutoff, backend_of(job.prepared)) for c in SWEEP]
    summary["pipelines"] = {backend: [c._asdict() for c in cuts]}
    return f"{backend} cost {estimate:,.0f}, latency {cut.latency_cycles} cycles of {cut.clock_ns:g} ns"


def _quote_proof(job: Job) -> None:
    """What was found, into README and metadata of both projects."""
    from pquant_jax.lower.project import quoted

    for kind in ("comb", "pipelined"):
        quoted(job.folder / "rtl" / kind, {key: job.summary[key] for key in ("mismatches", "vectors")})


def _count_cells(job: Job, graph: Graph, found: Netlist, counted: RTLInfo) -> None:
    """Cells by Yosys, of the whole and, where weights are constants, of every layer alone."""
    from pquant_jax.lower import synth

    with phase(job.log, "synth") as remarks:
        cells = synth.synth(counted)
        job.summary["cost"] |= {key: cells[key] for key in cost.CELLS}
        remarks.append(", ".join(f"{cells[key]:,} {key.upper()}" for key in ("lut", "ff", "dsp")))
        if not weight_ports(graph):
            rows = cost.synthesize_layers(graph, backend_of(job.prepared), cutoff=found.cut.cutoff)
            rows = [{key: row[key] for key in ("layer", *cost.CELLS)} for row in [*rows, {"layer": "total", **cells}]]
            job.summary["layer_cells"] = rows
            remarks.append(f"{len(rows) - 1} layers counted alone too")


def emulated(graph: Graph, inst: Instrumented, x: Tree) -> list[np.ndarray]:
    """The emulator's outputs for all samples of x, in the order of the graph's outputs."""
    return emulate(graph, [np.asarray(v, np.float64) for v in jax.tree.leaves(inst.encode(x))])


def backend_of(prepared: Prepared) -> Any:
    """The module of `lower.backends` that the run asks for; None for a run without a netlist."""
    name = prepared.experiment.hardware.backend
    return name and importlib.import_module(f"pquant_jax.lower.backends.{name}")


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
) -> dict[str, Any]:
    """{"rtl_comb", "rtl_pipelined": RTLInfo}; rtl/comb and rtl/pipelined are whole projects.

    inputs: what their testbenches feed, arrays (N, *shape), and (*shape) for what is the same in every vector: weights.
    """
    from pquant_jax.lower.project import write_project

    hardware, name = prepared.experiment.hardware, top_module(prepared.experiment.name)
    data = [_ends(v) for v, j in zip(inputs, graph.inputs, strict=True) if np.ndim(v) > len(graph.nodes[j].shape)]
    some = [*data, *(np.broadcast_to(v, (len(data[0]), *v.shape)) for v in inputs[len(data) :])]
    infos = {}
    for kind, cutoff in {"comb": -1.0, "pipelined": found.cut.cutoff}.items():
        made = write_project(
            graph, found.comb, folder / "rtl" / kind, name=name, backend=backend_of(prepared),
            flavors=("verilog", "vhdl") if hardware.vhdl else ("verilog",), latency_cutoff=cutoff, part=hardware.part,
            clock_period=found.cut.clock_ns, vectors=some, overwrite=True,
            origin={"run": prepared.experiment.name}, source=SOURCE,
        )  # fmt: skip
        infos[f"rtl_{kind}"] = made.rtl["verilog"]
    write_json(folder / "rtl" / "info.json", {key: _info_json(info, folder) for key, info in infos.items()})
    return infos


def _ends(x: np.ndarray) -> np.ndarray:
    """Vectors of the test set, which come first, and random ones; all of them if they are few."""
    return x if len(x) <= 2 * TESTBENCH else np.concatenate([x[:TESTBENCH], x[-TESTBENCH:]])


def register_file(job: Job, graph: Graph, found: Netlist, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> RTLInfo:
    """rtl/registers: the pipelined netlist in a register file that holds the trained weights, loaded and compared.

    Returns what it and the netlist are together.  The bits to triplicate are those whose flip changes the loss on the
    training set most.
    """
    from pquant_jax.lower import registers

    prepared, hardware = job.prepared, job.prepared.experiment.hardware
    with phase(job.log, "registers") as remarks, tempfile.TemporaryDirectory(prefix="pquant-registers-") as work:
        info = backend_of(prepared).write_rtl(
            found.comb, Path(work) / "rtl", name=top_module(prepared.experiment.name), latency_cutoff=found.cut.cutoff
        )
        voted = None
        if hardware.tmr:
            scores = sensitivity(prepared, job.view, job.model_state).score
            voted = registers.most_sensitive(registers.register_map(graph, info, word=hardware.word), scores, hardware.tmr)
        regs = registers.write_registers(
            graph, info, weights, job.folder / "rtl" / "registers", word=hardware.word, voted=voted, overwrite=True
        )
        remarks.append(f"{regs.map.words:,} words of {regs.map.word} bits, {int(regs.voted.sum()):,} bits triplicated")
        if "simulation" not in job.summary["skipped"]:
            count, job.summary["mismatches"]["registers"] = compare_registers(regs, graph, inputs, weights, weights, work)
            remarks.append(f"0 of {count:,} vectors differ, at power-up and after loading")
        return regs.netlist._replace(name=regs.top)


def compare_registers(
    regs: Any,
    graph: Graph,
    inputs: Sequence[np.ndarray],
    held: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    work: str | Path,
) -> tuple[int, int]:
    """(vectors, mismatches) of a simulated register file: with the set `held` it has at power-up, then with `weights` loaded.

    regs: a `lower.registers.Registers`.  Raises: VerifyError where it differs from the emulator or reads back other words.
    """
    from pquant_jax.lower import registers

    some = [v[:LOADED] for v in inputs]
    flat, image = flatten_batch(some), registers.image(regs.map, weights)
    load = registers.load(image, flat.shape[1])
    read = load._replace(bus=load.bus * np.array([0, 0, 1, 0], np.uint64))  # every address, nothing written
    parts = [registers.vectors(flat), load, registers.vectors(flat), read]
    (awake, _, again, _), rdata = registers.play(registers.build(regs, Path(work) / "sim"), regs, parts)
    words = rdata[-len(image) :]
    if (wrong := np.flatnonzero(words != image)).size:
        n = int(wrong[0])
        raise VerifyError(f"the register file holds {words[n]:#x} in word {n} after loading {image[n]:#x}")
    counts = []
    for name, values, its in (("at power-up", awake, held), ("after loading", again, weights)):
        fixed = loaded(graph, its)
        counts.append(check_outputs(f"the register file {name}", values, flatten_batch(emulate(fixed, some)), fixed))
    return len(flat), max(counts)


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
    """The `RTLInfo`s that `write_projects` left in rtl/info.json."""

    def restored(fields: Mapping[str, Any]) -> Any:
        paths = {key: folder.absolute() / fields[key] for key in ("directory", "src")}
        arrays = {key: np.asarray(fields[key], np.int64) for key in ("inp_kifs", "out_kifs")}
        return RTLInfo(**{**fields, **paths, **arrays})

    return {key: restored(fields) for key, fields in read_json(folder / "rtl" / "info.json").items()}


def prove(job: Job, graph: Graph, comb: Any, rtls: Mapping[str, Any]) -> None:
    """Compare JAX, emulator, netlist and, unless it is skipped, the simulated Verilog; mismatches go into the summary."""
    prepared, summary, backend = job.prepared, job.summary, backend_of(job.prepared)
    with phase(job.log, "verify") as remarks, tempfile.TemporaryDirectory(prefix="pquant-sim-") as work:
        found = compare(
            graph,
            prepared.inst,
            job.view,
            job.model_state,
            x_test=prepared.dataset.test.x,
            vectors=prepared.experiment.hardware.vectors,
            seed=prepared.experiment.seed,
            comb=comb,
            backend=backend,
            rtls={} if "simulation" in summary["skipped"] else rtls,
            work=work,  # shared, so that the simulator's own runtime is compiled once for both netlists
        )
        kept = {name: count for name, count in summary.get("mismatches", {}).items() if count is not None}
        names = [name for name, count in found["mismatches"].items() if count is not None]
        missed = {} if backend is None else dict.fromkeys(found["mismatches"])  # netlist and RTL that were not compared
        summary.update(found | {"mismatches": missed | kept | {name: found["mismatches"][name] for name in names}})
        remarks.append(f"0 of {found['vectors']:,} vectors x {found['outputs']} outputs differ ({', '.join(names)})")
