"""hls4ml's C simulation against the emulator: every model, backend and io_type, and every reuse factor of three layers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pquant_jax as pq
from pquant_jax import lower, zoo
from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import hls4ml as hls
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, validate


def zoo_lines(
    graphs: Mapping[str, Graph], backends: Sequence[str] = ("Vitis", "Vivado"), n: int = 500, optimize: str = "-O0"
) -> Iterator[dict[str, Any]]:
    """Per model, backend and io_type: mismatches over `n` vectors of the whole port and `n` real ones, seconds, layers.

    A stream takes one format per tensor: graphs with formats per element are skipped there, with the reason, and run once more
    with every quantizer widened to one format (`formats` says which), which is another function but the same layers.
    """
    for name, graph in graphs.items():
        for backend in backends:
            yield _line(name, graph, backend, "io_parallel", "as trained", _vectors(graph, n), optimize)
            stream = _line(name, graph, backend, "io_stream", "as trained", _vectors(graph, n), optimize)
            yield stream
            if stream["skipped"]:
                yield _line(name, uniform(graph), backend, "io_stream", "one per tensor", _vectors(graph, n), optimize)


def _vectors(graph: Graph, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.concatenate([x, rng.normal(size=x.shape) * 8]) for x in port_grid(graph, n, rng)]


def _line(
    name: str, graph: Graph, backend: str, io_type: str, formats: str, inputs: list[np.ndarray], optimize: str
) -> dict[str, Any]:
    line = dict(model=name, backend=backend, io_type=io_type, formats=formats, mismatches=None, values=0, seconds=0.0)
    line |= dict(layers=0, netlists=0, skipped="")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        try:
            model = hls.to_hls(graph, Path(work) / name, backend=backend, io_type=io_type)
        except LoweringError as error:
            if io_type == "io_parallel":
                raise
            return line | dict(skipped=str(error))
        model = hls.compile(model, optimize=optimize)
        expected = flatten_batch(emulate(graph, inputs))
        line |= dict(mismatches=int((hls.predict(model, inputs) != expected).sum()), values=expected.size)
    netlists = sum(layer.kind == "Netlist" for layer in model.layers)
    own = sum(layer.kind not in ("Netlist", "InputLayer", "Reshape") for layer in model.layers)
    return line | dict(seconds=round(time.perf_counter() - start, 1), layers=own, netlists=netlists)


def uniform(graph: Graph) -> Graph:
    """`graph` with one format per quantizer, the widest of its elements."""
    nodes = []
    for node in graph.nodes:
        if node.op == "quantize":
            k, i, f = (np.asarray(node.attrs[key], np.int64) for key in "kif")
            alive = k + i + f > 0
            widest = [int(v[alive].max()) if alive.any() else n for v, n in ((k, 0), (i, 1), (f, 0))]
            form = {key: np.full(node.shape, v, np.int64) for key, v in zip("kif", widest, strict=True)}
            node = replace(node, attrs={**node.attrs, **form})
        nodes.append(node)
    return validate(Graph(tuple(nodes), graph.inputs, graph.outputs))


def resnet_lines(backends: Sequence[str] = ("Vitis", "Vivado"), n: int = 20) -> Iterator[dict[str, Any]]:
    """ResNet-20 on 32 x 32 x 3 (untrained), too large for a parallel netlist, as a stream; rows as `zoo_lines` has them."""
    x = np.random.default_rng(0).normal(size=(n, 32, 32, 3)).astype(np.float32)
    inst = pq.instrument(zoo.resnet20(), x[:1], inputs=pq.InputSpec(1, 2, 5))
    fixed = pq.quantize.fixed(inst.sites, weights=pq.quantize.Format(1, 6, 1), activations=pq.quantize.Format(2, 5))
    params = fixed.attach(inst.model.params)
    graph = lower.trace(inst, fixed.apply(params, fixed.init(params))[0], inst.model.state, limit=float("inf"))
    for backend in backends:
        yield _line("resnet20", graph, backend, "io_stream", "one per tensor", [np.asarray(inst.encode(x), np.float64)], "-O1")


def reuse_lines(backend: str = "Vitis", n: int = 200, optimize: str = "-O0") -> Iterator[dict[str, Any]]:
    """A dense layer, a Conv2D and a Conv1D: every valid reuse factor predicts the same, every other one is refused unwritten.

    Per layer: `valid`, `mismatches` over all of them, `refused` of the `invalid` ones of 1..n_in * n_out, `written` by refusals.
    """
    for name, graph in _three().items():
        with tempfile.TemporaryDirectory() as work:
            start, folder = time.perf_counter(), Path(work) / name
            rng = np.random.default_rng(1)
            inputs = port_grid(graph, n, rng)
            expected = flatten_batch(emulate(graph, inputs))
            ((layer, valid),) = hls.valid_reuse_factors(hls.to_hls(graph, folder, backend=backend, strategy="resource")).items()
            mismatches, refused, invalid = 0, 0, [f for f in range(1, _products(graph) + 1) if f not in valid]
            for factor in invalid:
                try:
                    hls.to_hls(graph, folder, backend=backend, strategy="resource", reuse_factor=factor)
                except LoweringError:
                    refused += 1
            written = int(folder.exists())
            for factor in valid:
                model = hls.to_hls(graph, folder, backend=backend, strategy="resource", reuse_factor=factor)
                used = hls.config(model)["LayerName"][layer]["ReuseFactor"]
                predicted = hls.predict(hls.compile(model, overwrite=True, optimize=optimize), inputs)
                mismatches += int((predicted != expected).sum()) + int(used != factor)
        yield dict(
            layer=name, backend=backend, valid=valid, mismatches=mismatches, values=expected.size * len(valid),
            invalid=len(invalid), refused=refused, written=written, seconds=round(time.perf_counter() - start, 1),
        )  # fmt: skip


def _products(graph: Graph) -> int:
    """n_in * n_out of the one kernel."""
    (kernel,) = (node for node in graph.nodes if node.op == "const" and np.ndim(node.attrs["value"]) == 3 and node.shape[1] > 1)
    return int(np.prod(kernel.shape))


def _three() -> dict[str, Graph]:
    def conv(names: tuple[str, str, str]) -> Callable:
        rank = len(names[0]) - 2
        return lambda p, x: lax.conv_general_dilated(x, p["kernel"], (1,) * rank, "SAME", dimension_numbers=names)

    return {
        "dense": _graph(lambda p, x: x @ p["kernel"], (6, 4), (6,)),
        "conv2d": _graph(conv(("NHWC", "HWIO", "NHWC")), (2, 2, 2, 3), (4, 4, 2)),
        "conv1d": _graph(conv(("NHC", "HIO", "NHC")), (3, 2, 4), (6, 2)),
    }


def _graph(forward: Callable, kernel: tuple[int, ...], shape: tuple[int, ...]) -> Graph:
    params: dict[str, jax.Array] = {"kernel": jnp.asarray(np.random.default_rng(0).integers(-7, 8, kernel) / 8, jnp.float32)}
    inst = pq.instrument(pq.from_function(forward, params), np.zeros((2, *shape)), inputs=pq.InputSpec(1, 2, 5))
    view = pq.View(params, {name: pq.kif(1, 2, 3, overflow="WRAP") for name in inst.sites}, {})
    return lower.trace(inst, view, {})
