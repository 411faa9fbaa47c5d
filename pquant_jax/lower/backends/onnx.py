"""`Graph` -> ONNX: with QONNX's `Quant` nodes, in standard ops alone, or with QuantizeLinear and DequantizeLinear.

All three give the integers of the emulator for any float input.  Only the functions of this folder import onnx.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError, ToolError, did_you_mean
from pquant_jax.lower.backends._onnx_layers import layers, write_layer
from pquant_jax.lower.backends._onnx_nodes import operation
from pquant_jax.lower.backends._onnx_quant import FLOAT_BITS, bits_needed, plan, port
from pquant_jax.lower.backends._onnx_writer import (
    BATCH,
    IR_VERSION,
    OPSET,
    QONNX_DOMAIN,
    Operand,
    Writer,
    batched,
    physical,
    reshaped,
    unique,
)
from pquant_jax.lower.emulate import flatten_batch
from pquant_jax.lower.ir import Graph, label
from pquant_jax.lower.ranges import Interval, check_exact, check_float32, intervals
from pquant_jax.lower.structure import Layer

if TYPE_CHECKING:
    from onnx import ModelProto

ENGINES: Final = ("qonnx", "onnxruntime")


def to_qonnx(graph: Graph, path: str | Path | None = None, *, name: str = "pquant") -> ModelProto:
    """`graph` as an ONNX model with QONNX `Quant` nodes, for FINN, hls4ml, Netron and qonnx's own executor.

    Ports are float32 tensors (N, *shape): the graph begins with the port's own quantizer (TRN, WRAP), so any number may
    be fed.  Every quantizer ends in a `Quant`; what that can't say (halves upwards, wrapping) stands in front of it, see
    `_onnx_quant`.  Constants of products and sums carry a `Quant` of the narrowest format that holds them.  Where a value
    needs more than the 24 bits of a float32 the whole model is in float64.  path: also write it, through a temporary name.
    Raises: LoweringError for a value of more than 53 bits, naming the node; ToolError without the package onnx.
    """
    return _written(graph, path, name, "qonnx")


def to_onnx(graph: Graph, path: str | Path | None = None, *, name: str = "pquant") -> ModelProto:
    """`graph` in the ops of ONNX alone, for onnxruntime and everything else; quantizers are Mul, Floor, Clip, Mul.

    Types, ports and errors are those of `to_qonnx`.
    """
    return _written(graph, path, name, "onnx")


def to_qdq(graph: Graph, path: str | Path | None = None, *, name: str = "pquant") -> ModelProto:
    """`graph` with QuantizeLinear and DequantizeLinear (scales are powers of two, zero points 0) for formats of 8 bits at most.

    A format narrower than 8 bits has a Clip of its integers.  Kernels are int8 or uint8 where their format fits, per tensor
    or per channel.  onnxruntime fuses such models into integer kernels, which on x86 CPUs without VNNI add pairs of products
    of uint8 and int8 in 16 bits and saturate; `execute` runs the nodes as they are.
    Raises: LoweringError for a site that rounds otherwise than half to even, wraps, has more than 8 bits or scales along
      several axes, and for a value of more than 24 bits.
    """
    return _written(graph, path, name, "qdq")


def _written(graph: Graph, path: str | Path | None, name: str, dialect: str) -> ModelProto:
    onnx = _package("onnx")
    known = intervals(graph)
    w = Writer(dialect, real_type(graph, known, only_float32=dialect == "qdq"), [], {}, {}, {})
    ports, results = _body(w, graph, known)
    model = _model(w, graph, ports, results, name)
    onnx.checker.check_model(model)
    if path is not None:
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        onnx.save(model, str(partial))
        partial.replace(target)
    return model


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ToolError(f"no {name}: `pip install {name.split('.')[0]}`") from error


def real_type(graph: Graph, known: Sequence[Interval], *, only_float32: bool = False) -> np.dtype:
    """float32 if that computes every node exactly, else float64.

    Raises: LoweringError, naming the node, for one that needs more than 53 bits, or 24 with `only_float32`.
    """
    check_exact(graph)
    limit = FLOAT_BITS["float32" if only_float32 else "float64"]
    needed = 0
    for index, node in enumerate(graph.nodes):
        if node.op == "quantize":
            bits = bits_needed(node, known[node.inputs[0]])
            if bits > limit:
                raise LoweringError(
                    f"{label(graph, index)}: rounding and wrapping in floats needs {bits} bits there, a float has {limit}; "
                    "use fewer fractional bits at the site in front of it"
                )
            needed = max(needed, bits)
    try:
        check_float32(graph)
    except LoweringError:
        if only_float32:
            raise
        return np.dtype(np.float64)
    return np.dtype(np.float32 if needed <= FLOAT_BITS["float32"] else np.float64)


def _body(w: Writer, graph: Graph, known: Sequence[Interval]) -> tuple[list[str], list[str]]:
    """Write every node; returns the names of the model's inputs and outputs."""
    if not graph.inputs:
        raise LoweringError("the graph has no input, so an ONNX model of it has no batch; evaluate it with lower.emulate")
    values: dict[int, Operand] = {}
    ports: dict[int, str] = {}
    found = layers(w, graph)
    for index in _needed(graph, found):
        node = graph.nodes[index]
        if index in found:
            values[index] = write_layer(w, found[index], values[found[index].inputs[0]])
        elif node.op == "input":
            ports[index] = unique(w, node.name or "input")
            w.tensors[ports[index]] = (w.real, node.shape)
            shape = physical(node.shape)
            x = reshaped(w, ports[index], shape, "port")
            values[index] = port(w, x, plan(node, None, shape), shape, "port")
        else:
            values[index] = operation(w, graph, index, [values[j] for j in node.inputs], known)
    like = ports[graph.inputs[0]]
    results = []
    for place, index in enumerate(graph.outputs):
        shape = graph.nodes[index].shape
        x = reshaped(w, batched(w, values[index], shape, like), shape, "output")
        results.append(_named(w, x, "output" if len(graph.outputs) == 1 else f"output_{place}"))
    return [ports[j] for j in graph.inputs], results


def _needed(graph: Graph, found: Mapping[int, Layer]) -> list[int]:
    """The nodes that are written: a layer needs its inputs only."""
    needed = {*graph.inputs, *graph.outputs}
    for index in reversed(range(len(graph.nodes))):
        if index in needed:
            needed.update(found[index].inputs if index in found else graph.nodes[index].inputs)
    return sorted(needed)


def _named(w: Writer, x: str, name: str) -> str:
    """A tensor of its own for an output: an output may be read inside, or be there twice."""
    from onnx import helper

    out = unique(w, name)
    w.tensors[out] = w.tensors[x]
    w.nodes.append(helper.make_node("Identity", [x], [out], name=out))
    return out


def _model(w: Writer, graph: Graph, ports: list[str], results: list[str], name: str) -> ModelProto:
    from onnx import helper, numpy_helper

    def info(tensor: str) -> Any:
        dtype, shape = w.tensors[tensor]
        dims = shape[1:] if shape[:1] == (-1,) else (BATCH, *shape)
        if dtype == np.int64 and shape == (-1,):
            return None  # the shape of something
        return helper.make_tensor_value_info(tensor, helper.np_dtype_to_tensor_dtype(dtype), dims)

    inner = [info(t) for t in w.tensors if t not in (*ports, *results)]
    body = helper.make_graph(
        w.nodes, name, [info(t) for t in ports], [info(t) for t in results],
        [numpy_helper.from_array(v, n) for n, v in w.constants.items()], value_info=[v for v in inner if v is not None],
    )  # fmt: skip
    domains = [helper.make_opsetid("", OPSET)]
    if w.dialect == "qonnx":
        domains.append(helper.make_opsetid(QONNX_DOMAIN, 1))
    return helper.make_model(body, opset_imports=domains, ir_version=IR_VERSION, producer_name="pquant_jax")


def op_counts(model: ModelProto) -> dict[str, int]:
    """{op: how many nodes of it}."""
    return dict(sorted(collections.Counter(n.op_type for n in model.graph.node).items()))


def execute(model: Any, x: Any, *, engine: str = "onnxruntime") -> np.ndarray:
    """Outputs of an ONNX model, float64 (N, outputs), all flattened side by side, of one array (N, *shape) or one per input.

    engine: "onnxruntime", or "qonnx", whose executor knows `Quant`.  A model with a fixed batch is run in pieces of it.
    Raises: DataError for inputs that don't fit, ToolError without the package, LoweringError for an unknown engine.
    """
    if engine not in ENGINES:
        raise LoweringError(f"engine is {engine!r}; {did_you_mean(engine, ENGINES)}")
    onnx = _package("onnx")
    model = onnx.load(str(model)) if isinstance(model, str | Path) else model
    held = {t.name for t in model.graph.initializer}
    ports = [v for v in model.graph.input if v.name not in held]
    arrays = list(x) if isinstance(x, list | tuple) else [x]
    feeds = _feeds(onnx, ports, arrays)
    n = len(arrays[0])
    fixed = ports[0].type.tensor_type.shape.dim[0].dim_value
    if fixed == 0 or fixed == n:
        return _run(model, feeds, n, engine)
    if n % fixed:
        raise DataError(f"the model takes batches of {fixed}, got {n} samples")
    pieces = [{k: v[j : j + fixed] for k, v in feeds.items()} for j in range(0, n, fixed)]
    return np.concatenate([_run(model, piece, fixed, engine) for piece in pieces])


def _feeds(onnx: Any, ports: Sequence[Any], arrays: Sequence[Any]) -> dict[str, np.ndarray]:
    if len(arrays) != len(ports):
        raise DataError(f"the model has {len(ports)} inputs, got {len(arrays)} arrays; pass one (N, *shape) array per input")
    feeds = {}
    for info, v in zip(ports, arrays, strict=True):
        shape = tuple(d.dim_value for d in info.type.tensor_type.shape.dim)
        if np.shape(v)[1:] != shape[1:] or len(v) != len(arrays[0]):
            raise DataError(f"{info.name!r} takes (N, {', '.join(map(str, shape[1:]))}), got {np.shape(v)}")
        feeds[info.name] = np.asarray(v, onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    return feeds


def _run(model: Any, feeds: dict[str, np.ndarray], n: int, engine: str) -> np.ndarray:
    names = [o.name for o in model.graph.output]
    if engine == "onnxruntime":
        runtime = _package("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # see `to_qdq`
        found = runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(names, feeds)
    else:
        found = _run_qonnx(model, feeds, n, names)
    return flatten_batch([np.asarray(v, np.float64) for v in found])


def _run_qonnx(model: Any, feeds: dict[str, np.ndarray], n: int, names: Sequence[str]) -> list[np.ndarray]:
    """qonnx's executor wants every shape in numbers: the batch of a copy is made `n`, which runs it all at once."""
    wrapper, executor = _package("qonnx.core.modelwrapper"), _package("qonnx.core.onnx_exec")
    copy = type(model)()
    copy.CopyFrom(model)
    for info in (*copy.graph.input, *copy.graph.output, *copy.graph.value_info):
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param == BATCH:
                dim.dim_value = n
    wrapped = wrapper.ModelWrapper(copy)
    if not wrapped.check_all_tensor_shapes_specified():
        wrapped = wrapped.transform(_package("qonnx.transformation.infer_shapes").InferShapes())
    with _readable(executor):
        out = executor.execute_onnx(wrapped, feeds)
    return [out[name] for name in names]


@contextmanager
def _readable(executor: Any) -> Iterator[None]:
    """qonnx makes a model of every node, of onnx's newest IR version, which onnxruntime may not read yet (14 against 13)."""
    newest = executor.qonnx_make_model
    executor.qonnx_make_model = functools.partial(newest, ir_version=IR_VERSION)
    try:
        yield
    finally:
        executor.qonnx_make_model = newest
