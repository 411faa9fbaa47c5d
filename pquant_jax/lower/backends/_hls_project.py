"""What an hls4ml project of a graph consists of: options checked, layers and netlists, and hls4ml's ModelGraph of them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, ToolError, did_you_mean
from pquant_jax.lower.backends import _hls_build, _hls_layers, _hls_regions
from pquant_jax.lower.backends._hls_build import Project
from pquant_jax.lower.backends._hls_types import tensor_type
from pquant_jax.lower.ir import Graph, label
from pquant_jax.lower.ranges import Interval
from pquant_jax.lower.structure import Layer, structure

IO_TYPES: Final = ("io_parallel", "io_stream")
STRATEGIES: Final = ("latency", "resource", "distributed_arithmetic")
DOUBLE_BITS: Final = 53  # the C simulation's ports are doubles
_MODEL_KEYS: Final = (
    "Precision", "ReuseFactor", "Strategy", "BramFactor", "TargetCycles", "ConvImplementation", "Compression", "PipelineStyle",
    "PipelineInterval", "TraceOutput", "BitExact",
)  # fmt: skip
_LAYER_KEYS: Final = ("ReuseFactor", "Strategy", "Precision", "Trace", "ParallelizationFactor", "ConvImplementation")


class Backend(NamedTuple):
    """What a backend of hls4ml can do here.

    flavor: the C++ of da4ml's netlists that it takes, None if it takes none.  heterogeneous: formats per element as a layer of
    its own (else as a netlist).  simulates: g++ alone compiles its C simulation.  tools: what `build` needs on PATH.
    converts: what hls4ml needs on PATH even to make the project.  part: the default of a backend for FPGAs of Xilinx; None leaves
    hls4ml's own, of another vendor.  boards: hls4ml takes the part of a board, and no other.
    """

    flavor: str | None
    heterogeneous: bool
    simulates: bool
    tools: tuple[str, ...]
    converts: tuple[str, ...] = ()
    part: str | None = None
    boards: bool = False


XILINX: Final = "xcvu13p-flga2577-2-e"
BACKENDS: Final[dict[str, Backend]] = {
    "Vitis": Backend("vitis", True, True, ("vitis-run",), part=XILINX),
    "Vivado": Backend("vitis", True, True, ("vivado_hls",), part=XILINX),
    "VivadoAccelerator": Backend("vitis", False, True, ("vivado_hls", "vivado"), boards=True),
    "Quartus": Backend(None, False, True, ("i++",)),
    "Catapult": Backend("hlslib", False, True, ("catapult",), part=XILINX),
    "oneAPI": Backend("oneapi", True, False, ("icpx", "cmake")),
    "Libero": Backend(None, False, False, ("shls",), ("shls",)),
}


def given(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`Model` and `LayerName` that were asked for, checked as far as they can be without the graph."""
    for key, choices in (("backend", BACKENDS), ("io_type", IO_TYPES)):
        if settings[key] not in choices:
            raise LoweringError(f"{key} is {settings[key]!r}; {did_you_mean(str(settings[key]), choices)}")
    name = str(settings["project_name"])
    if not (name.isascii() and name.isidentifier()):
        raise LoweringError(f"project_name is {name!r}, expected letters, digits and _, beginning with a letter")
    missing = [tool for tool in BACKENDS[settings["backend"]].converts if shutil.which(tool) is None]
    if missing:
        raise ToolError(
            f"hls4ml can't make a project of backend {settings['backend']!r} without {', '.join(missing)} on PATH: install the "
            "vendor's tools, or use Vitis or Vivado"
        )
    if settings["part"] is not None and BACKENDS[settings["backend"]].boards:
        raise LoweringError(
            f"part is {settings['part']!r}; with backend {settings['backend']!r} hls4ml takes that of the board: leave it out, "
            "or use Vitis or Vivado"
        )
    config = dict(settings["config"] or {})
    unknown = set(config) - {"Model", "LayerName"}
    if unknown:
        raise LoweringError(f"config has {sorted(unknown)}, expected Model and LayerName; `config(model)` gives one")
    model = {"ReuseFactor": settings["reuse_factor"], "Strategy": settings["strategy"], **config.get("Model", {})}
    model["Strategy"] = _strategy(str(model["Strategy"]), "the model")
    for key in set(model) - set(_MODEL_KEYS):
        raise LoweringError(f"Model has the option {key!r}; {did_you_mean(key, _MODEL_KEYS)}")
    if model.get("BitExact"):
        raise LoweringError("Model has BitExact: precisions come from the graph and are exact already; leave it out")
    by_name = {n: dict(v) for n, v in config.get("LayerName", {}).items()}
    for layer, options in (settings["layers"] or {}).items():
        by_name[layer] = {**by_name.get(layer, {}), **options}
    for layer, options in by_name.items():
        for key in set(options) - set(_LAYER_KEYS):
            raise LoweringError(f"layer {layer!r} has the option {key!r}; {did_you_mean(key, _LAYER_KEYS)}")
        if "Strategy" in options:
            options["Strategy"] = _strategy(str(options["Strategy"]), f"layer {layer!r}")
    return {"Model": model, "LayerName": by_name}


def _strategy(name: str, where: str) -> str:
    found = {"da": "distributed_arithmetic", "distributedarithmetic": "distributed_arithmetic"}.get(name.lower(), name.lower())
    if found not in STRATEGIES:
        raise LoweringError(f"the strategy of {where} is {name!r}; {did_you_mean(found, STRATEGIES)}")
    return found


def check_ports(graph: Graph) -> None:
    for index in graph.inputs:
        if any(np.ndim(graph.nodes[index].attrs[key]) for key in "kif"):
            raise LoweringError(
                f"{label(graph, index)}: a port with a format per element; an HLS project takes one per port, so trace with "
                "weights='constants'"
            )
        k, i, f = (int(graph.nodes[index].attrs[key]) for key in "kif")
        if not 0 < k + i + f <= DOUBLE_BITS:
            raise LoweringError(
                f"{label(graph, index)}: a port of {k + i + f} bits; an HLS project takes 1 to {DOUBLE_BITS} (doubles carry "
                "them in the C simulation); declare another InputSpec"
            )


def emitted(graph: Graph, known: Sequence[Interval], asked: Mapping, settings: Mapping) -> tuple[Project, list[str]]:
    """Every layer and netlist of the project, and the layers that give the outputs."""
    backend = BACKENDS[settings["backend"]]
    stream = settings["io_type"] == "io_stream"
    layers = _folded(graph, structure(graph))
    plain = _natives(layers, known, graph, backend, stream)
    parts = _hls_regions.regions(layers, set(graph.outputs), lambda layer: plain[layer.output])
    for part in parts:
        if isinstance(part, _hls_regions.Region) and (stream or backend.flavor is None):
            _refuse(graph, part.layers[0], settings)
    reads: dict[int, int] = {j: graph.outputs.count(j) for j in range(len(graph.nodes))}
    for part in parts:
        for j in part.inputs:
            reads[j] += 1

    def strategy(name: str) -> str:
        return asked["LayerName"].get(name, {}).get("Strategy", asked["Model"]["Strategy"])

    project = Project(graph, known, strategy, stream, reads=reads)
    for part in parts:
        if isinstance(part, Layer):
            _hls_layers.EMIT[part.op](project, part)
        else:
            _emit_region(project, part, str(backend.flavor))
    return project, [_output(project, j, n, stream) for n, j in enumerate(graph.outputs)]


def _folded(graph: Graph, layers: Sequence[Layer]) -> list[Layer]:
    """Layers without constants, which are part of what reads them; one that is an output reads a port, as all must."""
    constant = {layer.output for layer in layers if layer.op == "const"}
    out = []
    for layer in layers:
        if layer.op == "const":
            if layer.output in graph.outputs:
                out.append(layer._replace(inputs=graph.inputs[:1]))
        elif constant.isdisjoint(layer.inputs):
            out.append(layer)
        else:
            kept = tuple(j for j in layer.inputs if j not in constant or j in graph.outputs)
            out.append(layer._replace(inputs=kept or graph.inputs[:1], op=f"{layer.op} with a constant"))
    return out


def _natives(layers: Sequence[Layer], known: Sequence[Interval], graph: Graph, backend: Backend, stream: bool) -> dict[int, bool]:
    """Per layer (its output) whether it is a layer of hls4ml's; formats per element join a netlist that alone reads them."""
    plain = {}
    for layer in layers:
        own = _hls_layers.has_layer(layer, known)
        if layer.op == "quantize" and _hls_layers.uniform(layer) is None:
            own = own and backend.heterogeneous and not stream
        if stream and layer.op == "einsum":
            own = False
        if stream and layer.op == "reduce" and layer.attrs["kind"] == "sum":
            shape = layer.attrs["in_shapes"][0]
            own = len(shape) in (2, 3) and layer.attrs["axes"] == tuple(range(len(shape) - 1))
        plain[layer.output] = own
    for layer in reversed(layers):
        readers = [a.output for a in layers if layer.output in a.inputs]
        if layer.op == "quantize" and _hls_layers.uniform(layer) is None and layer.output not in graph.outputs and readers:
            if not any(plain[j] for j in readers):
                plain[layer.output] = False
    return plain


def _refuse(graph: Graph, layer: Layer, settings: Mapping) -> None:
    what = f"{label(graph, layer.output)} ({layer.op})"
    if layer.op == "quantize":
        why = "it has a format per element, or no bits, a layer takes one per tensor there: quantize with granularity 'tensor'"
    elif settings["io_type"] == "io_stream":
        why = "hls4ml has no such layer, and a netlist takes all elements at once"
    else:
        why = "hls4ml has no such layer, and the backend takes no netlist"
    raise LoweringError(
        f"{what}: not possible with backend {settings['backend']!r} and io_type {settings['io_type']!r}: {why}; or "
        "use io_parallel on Vitis or Vivado"
    )


def _emit_region(project: Project, region: _hls_regions.Region, flavor: str) -> None:
    graph, known = project.graph, project.known
    name = _hls_build.unique(project, next((a.name for a in region.layers if a.name), "netlist"), "_netlist")
    code = _hls_regions.netlist_code(name, graph, known, region, flavor)
    outputs = [name] if len(region.outputs) == 1 else [f"{name}_{n}" for n in range(len(region.outputs))]
    types = [tensor_type(known[j]) for j in region.outputs]
    shapes = [_hls_build.plain(graph.nodes[j].shape) for j in region.outputs]
    more = dict(code=code, outputs=outputs, output_shapes=shapes, precision=dict(zip(outputs, types, strict=True)))
    sources = [project.where[j] for j in region.inputs]
    kind = _hls_regions.register_netlist()
    _hls_build.add(project, name, kind, sources, shapes[0], types[0], **more)
    project.made[-1] = project.made[-1]._replace(output=region.outputs[0] if len(outputs) == 1 else -1)
    for j, output, shape, t in zip(region.outputs, outputs, shapes, types, strict=True):
        project.where[j], project.shapes[output], project.types[output] = output, shape, t


def _output(project: Project, node: int, place: int, stream: bool) -> str:
    """The layer of an output of the graph: one of its own, which no other output is."""
    name = project.where[node]
    made = next((m for m in project.made if m.name == name), None)
    taken = any(project.where[j] == name for j in project.graph.outputs[:place])
    if made is not None and made.kind not in ("InputLayer", "Reshape") and not taken:
        return name
    if stream:
        raise LoweringError(
            f"{label(project.graph, node)}: an output that is an input, or is there twice, has no stream; use io_parallel"
        )
    new = _hls_build.unique(project, f"output_{place + 1}", "")
    shape, t = project.shapes[name], project.types[name]
    code = _hls_regions.copy_code(new, int(np.prod(shape)))
    more = dict(code=code, outputs=[new], output_shapes=[shape], precision={new: t})
    _hls_build.add(project, new, _hls_regions.register_netlist(), [name], shape, t, **more)
    return new


def configured(project: Project, asked: Mapping) -> dict[str, dict[str, Any]]:
    """`LayerName` of hls4ml: the types of the graph, and what was asked for."""
    names = copy.deepcopy(project.names)
    for layer, options in asked["LayerName"].items():
        if layer not in names:
            raise LoweringError(f"LayerName has {layer!r}; {did_you_mean(layer, names)}")
        options = dict(options)
        precision = options.pop("Precision", names[layer]["Precision"])
        for key, value in precision.items() if isinstance(precision, Mapping) else [("default", precision)]:
            own = names[layer]["Precision"].get(key)
            if str(value).replace(" ", "") != own:
                raise LoweringError(
                    f"the precision {key!r} of layer {layer!r} is {value!r}, the graph needs {own}: precisions come from the "
                    "graph, or the project would compute something else; change the model's quantizers"
                )
        names[layer].update(options)
    for made in project.made:
        options = names[made.name]
        options.setdefault("ReuseFactor", 1 if made.products is None else asked["Model"]["ReuseFactor"])
        strategic = made.products is not None or made.kind.startswith("Einsum")  # hls4ml refuses distributed arithmetic elsewhere
        options.setdefault("Strategy", asked["Model"]["Strategy"] if strategic else "latency")
        options.setdefault("Trace", False)
    return names


def reuse_factors(products: tuple[int, int] | None, strategy: str, *, convolution: bool = False) -> tuple[int, ...]:
    """The reuse factors that a layer of n_in x n_out products can have, those that hls4ml itself would leave alone.

    Of a convolution no more than n_in: beyond that hls4ml 1.3.0 computes something else (Conv2D) or stops (Conv1D).

    >>> reuse_factors((4, 2), "resource"), reuse_factors((4, 2), "distributed_arithmetic")
    ((1, 2, 4, 8), (1,))
    >>> reuse_factors((4, 2), "resource", convolution=True)
    (1, 2, 4)
    """
    if products is None or strategy == "distributed_arithmetic":
        return (1,)
    from hls4ml.backends import get_backend

    valid = get_backend("Vivado").get_valid_reuse_factors(*products)
    return tuple(factor for factor in valid if not convolution or factor <= products[0])


def check_reuse(project: Project, names: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises: LoweringError for the first reuse factor that its layer can't have, which hls4ml would replace by another."""
    for made in project.made:
        factor, strategy = names[made.name]["ReuseFactor"], names[made.name]["Strategy"]
        if factor == 1:
            continue
        valid = reuse_factors(made.products, strategy, convolution=made.kind.startswith("Conv"))
        if factor not in valid:
            size = "" if made.products is None else f" of {made.products[0]} x {made.products[1]} products"
            raise LoweringError(
                f"layer {made.name!r}{size} with strategy {strategy!r} can't have the reuse factor {factor}; it can have "
                f"{', '.join(map(str, valid))}"
            )


def model_graph(
    project: Project, outputs: Sequence[str], asked: Mapping, names: Mapping, settings: Mapping, directory: Path
) -> Any:
    """hls4ml's ModelGraph, with every optimization done.  Raises: ToolError where the backend needs a tool even for that."""
    from hls4ml.backends import get_backend
    from hls4ml.model.graph import ModelGraph
    from hls4ml.utils.config import create_config

    model = {
        "Precision": {"default": "fixed<32,16>"}, "BramFactor": 1_000_000_000, "TraceOutput": False, "BitExact": False,
        **asked["Model"],
    }  # fmt: skip
    inputs = [m.name for m in project.made if m.kind == "InputLayer"]
    with quiet("converting"):
        wanted = {key: settings[key] for key in ("clock_period", "io_type")}
        wanted["part"] = settings["part"] or BACKENDS[settings["backend"]].part
        takes = inspect.signature(get_backend(settings["backend"]).create_initial_config).parameters
        known = {key: value for key, value in wanted.items() if key in takes and value is not None}
        place = dict(output_dir=str(directory), project_name=settings["project_name"], backend=settings["backend"])
        cfg = create_config(**place, **known)
        cfg["HLSConfig"] = {"Model": model, "LayerName": copy.deepcopy(dict(names))}
        made = ModelGraph.from_layer_list(cfg, copy.deepcopy(project.dicts), inputs, list(outputs))
        _hls_regions.call_netlists(made)
    return made


@contextlib.contextmanager
def quiet(doing: str) -> Iterator[None]:
    """Without what hls4ml prints and warns; its errors, of any type, become ours."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (LoweringError, ToolError):
        raise
    except Exception as error:
        raise LoweringError(f"hls4ml failed while {doing} ({type(error).__name__}: {error})") from error
