"""`Graph` -> an hls4ml project -> C simulation, synthesis, reports.  Only this module and `_hls_*` import hls4ml, in functions.

Layers that hls4ml has (`structure` finds them) become its layers with exact types (`_hls_layers`); every other connected
part of the graph becomes one da4ml netlist inside the project (`_hls_regions`).  Values are the emulator's, bit for bit,
for everything the ports can hold.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import ToolError
from pquant_jax.lower.backends import _hls_project
from pquant_jax.lower.backends._hls_build import Made
from pquant_jax.lower.backends._hls_project import BACKENDS, IO_TYPES, STRATEGIES, Backend, quiet, reuse_factors
from pquant_jax.lower.emulate import check_inputs, flatten_batch
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.passes import simplify
from pquant_jax.lower.ranges import check_exact, intervals
from pquant_jax.lower.rtl import whole_folder

__all__ = [
    "BACKENDS", "IO_TYPES", "STRATEGIES", "Backend", "HLSModel", "build", "check_options", "compile", "config", "predict",
    "report", "to_hls", "trace", "valid_reuse_factors", "write",
]  # fmt: skip


_SCRIPTS: Final = frozenset({".cpp", ".h", ".hpp", ".sh", ".tcl", ".txt", ".yml", ".json"})


class HLSModel(NamedTuple):
    """An hls4ml project of a graph: `project` is hls4ml's ModelGraph, `layers` what it consists of, in order.

    output_sizes: values per sample of every output.  settings: what `to_hls` was called with.  compiled: whether `predict` can.
    """

    graph: Graph
    project: Any
    layers: tuple[Made, ...]
    output_sizes: tuple[int, ...]
    settings: Mapping[str, Any]
    directory: Path
    compiled: bool = False


def to_hls(
    graph: Graph,
    directory: str | Path,
    *,
    project_name: str = "pquant",
    backend: str = "Vitis",
    io_type: str = "io_parallel",
    strategy: str = "latency",
    reuse_factor: int = 1,
    part: str | None = None,
    clock_period: float = 5.0,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> HLSModel:
    """The hls4ml project of `graph`, not written yet (`write`, `compile`); clock_period in ns; part None:
    xcvu13p-flga2577-2-e on Vitis, Vivado and Catapult, hls4ml's default elsewhere.

    layers: {name: {"ReuseFactor": ..., "Strategy": ...}} for some layers.  config: a user's `hls_config` as `config` gives it;
    its `Model` and `LayerName` count more than the arguments, its precisions must be those of the graph.
    Raises: LoweringError, before anything is built or written, for unknown names, reuse factors that a layer can't have (with
    those it can), what io_stream can't say (with the layer), values over 53 bits, and whatever da4ml refuses in a netlist.
    """
    settings = dict(
        project_name=project_name, backend=backend, io_type=io_type, strategy=strategy, reuse_factor=reuse_factor,
        part=part, clock_period=clock_period, layers=layers, config=config,
    )  # fmt: skip
    asked, place = _hls_project.given(settings), Path(directory).absolute()
    graph = simplify(graph)
    known = intervals(graph)
    check_exact(graph)
    _hls_project.check_ports(graph)
    project, outputs = _hls_project.emitted(graph, known, asked, settings)
    names = _hls_project.configured(project, asked)
    _hls_project.check_reuse(project, names)
    modelled = _hls_project.model_graph(project, outputs, asked, names, settings, place)
    sizes = tuple(int(np.prod(graph.nodes[j].shape, dtype=np.int64)) for j in graph.outputs)
    return HLSModel(graph, modelled, tuple(project.made), sizes, settings, place)


def check_options(**options: Any) -> None:
    """Raise what `to_hls(graph, directory, **options)` would raise for every graph, before there is one.

    >>> check_options(backend="Vitis", strategy="resource", reuse_factor=4)
    """
    defaults = {key: p.default for key, p in inspect.signature(to_hls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    _hls_project.given(defaults | options)


def config(model: HLSModel) -> dict[str, Any]:
    """hls4ml's `hls_config` of the project, which `to_hls(config=...)` takes for the same project."""
    found = copy.deepcopy(model.project.config.config["HLSConfig"])
    names = {made.name for made in model.layers}
    return {"Model": found["Model"], "LayerName": {n: v for n, v in found["LayerName"].items() if n in names}}


def valid_reuse_factors(model: HLSModel) -> dict[str, tuple[int, ...]]:
    """Per layer with a kernel, the reuse factors that it can have with its strategy."""
    options = config(model)["LayerName"]
    return {
        m.name: reuse_factors(m.products, options[m.name]["Strategy"], convolution=m.kind.startswith("Conv"))
        for m in model.layers
        if m.products is not None
    }


def write(model: HLSModel, *, overwrite: bool = False) -> Path:
    """Write the project into its directory, which is complete or absent.  Raises: LoweringError if it exists."""
    options = model.project.config.config
    with whole_folder(model.directory, overwrite=overwrite) as partial, quiet("writing"):
        options["OutputDir"] = str(partial)
        try:
            model.project.write()
        finally:
            options["OutputDir"] = str(model.directory)
        for path in partial.rglob("*"):  # the writers put the place into scripts and headers
            if path.is_file() and path.suffix in _SCRIPTS and str(partial) in (text := path.read_text()):
                path.write_text(text.replace(str(partial), str(model.directory)))
    return model.directory


def compile(model: HLSModel, *, overwrite: bool = False, optimize: str = "-O1") -> HLSModel:
    """Write the project and build its C simulation with g++; `optimize` is g++'s, which changes times and not values.

    Raises: ToolError without g++, with what it says where it fails, and for backends that g++ can't simulate.
    """
    backend = model.settings["backend"]
    if not BACKENDS[backend].simulates:
        able = [name for name, found in BACKENDS.items() if found.simulates]
        raise ToolError(
            f"the C simulation of backend {backend!r} needs {' and '.join(BACKENDS[backend].tools)}, not g++ alone; `write` "
            f"writes the project, and g++ simulates {', '.join(able)}"
        )
    if shutil.which("g++") is None:
        raise ToolError("g++ is not on PATH: the C simulation is compiled with it (apt install g++)")
    write(model, overwrite=overwrite)
    script = model.directory / "build_lib.sh"
    script.write_text(script.read_text().replace("-O3", optimize))
    done = subprocess.run(["bash", "build_lib.sh"], cwd=model.directory, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise ToolError(f"g++ can't compile {model.directory}: " + "\n".join(lines[:10]))
    stamp = model.project.config.get_config_value("Stamp")
    library = (model.directory / "firmware" / f"{model.settings['project_name']}-{stamp}.so").absolute()
    model.project._top_function_lib = ctypes.CDLL(str(library))
    return model._replace(compiled=True)


def predict(model: HLSModel, x: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """The C simulation's outputs side by side, float64 (N, outputs), for arrays (N, *shape), one per input.

    Real numbers pass the ports as in hardware (TRN, WRAP).  Raises: ToolError before `compile`, DataError for wrong arrays.
    """
    if not model.compiled:
        raise ToolError("the project is not compiled; call `compile(model)` and use what it returns")
    arrays, n = _samples(model, x)
    out = model.project.predict(arrays[0] if len(arrays) == 1 else arrays)
    return _side_by_side(out)[:n]


def _samples(model: HLSModel, x: np.ndarray | Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """(one contiguous float64 (N, elements) per port, N); one sample is there twice, because hls4ml drops its batch axis."""
    given = [x] if isinstance(x, np.ndarray) else list(x)
    arrays = [np.ascontiguousarray(v.reshape(len(v), -1)) for v in check_inputs(model.graph, given)]
    n = len(arrays[0])
    return ([np.concatenate([a, a]) for a in arrays] if n == 1 else arrays), n


def _side_by_side(out: Any) -> np.ndarray:
    parts = [out] if isinstance(out, np.ndarray) else list(out)
    return flatten_batch([np.asarray(v, np.float64).reshape(len(v), -1) for v in parts])


def trace(model: HLSModel, x: np.ndarray | Sequence[np.ndarray], *, optimize: str = "-O1") -> dict[str, tuple[int, np.ndarray]]:
    """Per layer the graph node and its value (N, *node shape) in the C simulation, comparable with `emulate.trace_values`.

    Builds a second project with hls4ml's tracing in a temporary folder.  Layers that hls4ml merged into others, the ports, and
    netlists of several outputs are not there.
    """
    asked = copy.deepcopy(config(model))
    traced = {m.name: m.output for m in model.layers if m.output >= 0 and m.kind != "InputLayer"}
    for name in traced:
        asked["LayerName"][name]["Trace"] = True
    with tempfile.TemporaryDirectory() as work:
        settings = {**model.settings, "config": asked, "layers": None}
        made = to_hls(model.graph, Path(work) / "traced", **settings)
        made.project.config.trace_output = True
        made = compile(made, optimize=optimize)
        made.project.compile = lambda: None  # it is; hls4ml would do so again
        arrays, n = _samples(model, x)
        with quiet("tracing"):
            _, values = made.project.trace(arrays[0] if len(arrays) == 1 else arrays)
    nodes = model.graph.nodes
    return {
        name: (traced[name], np.asarray(value, np.float64)[:n].reshape(n, *nodes[traced[name]].shape))
        for name, value in values.items()
        if name in traced
    }


def build(model: HLSModel, **options: Any) -> dict[str, Any]:
    """Run the vendor's synthesis in the written project and return its reports; options are hls4ml's (`csim=`, `vsynth=`, ...).

    Raises: ToolError, before anything runs, where the vendor's tools are not on PATH or the project is not written.
    """
    backend = model.settings["backend"]
    missing = [tool for tool in BACKENDS[backend].tools if shutil.which(tool) is None]
    if missing:
        raise ToolError(
            f"synthesis with backend {backend!r} needs {', '.join(missing)} on PATH: install the vendor's tools (AMD's: and "
            "source settings64.sh); the C simulation (`compile`, `predict`) and the RTL of da4ml need none"
        )
    if not (model.directory / "firmware").is_dir():
        raise ToolError(f"{model.directory} is not written; call `write` or `compile` first")
    with quiet("building"):
        found = model.project.build(**options)  # of tools that `report` can't read, too
    return found or report(model.directory)


def report(directory: str | Path) -> dict[str, Any]:
    """What Vivado or Vitis reported of the project in `directory`, by hls4ml's parser: clock, latency, II, LUT, FF, DSP, BRAM.

    Sections that exist: `CSynthesisReport`, `VivadoSynthReport`, `CosimReport`, `ImplementationReport`.
    Raises: ToolError where there is no report.
    """
    from hls4ml.report import parse_vivado_report

    found: dict[str, Any] | None = None
    place = Path(directory)
    if list(place.glob("*_prj/*.app")):  # the list of solutions that the tools write
        with quiet("reading reports"):
            found = parse_vivado_report(str(place))
    if not found:
        raise ToolError(f"{directory} holds no report of Vivado or Vitis; `build` runs them where they are installed")
    return found
