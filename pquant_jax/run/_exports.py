"""The other doors of a run: an hls4ml project and ONNX files, each compared with the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pquant_jax.config import Experiment, Hls
from pquant_jax.lower import Graph, check_outputs
from pquant_jax.lower.backends import hls4ml
from pquant_jax.lower.emulate import emulate, flatten_batch
from pquant_jax.run._log import Log, phase
from pquant_jax.run._prepare import Prepared, untrained_graph

ENGINES = {"qonnx": "qonnx", "onnx": "onnxruntime", "qdq": "onnxruntime"}


def check(prepared: Prepared) -> None:
    """Raise `LoweringError` before training for a model that hls4ml can't say, in whatever formats training may give it."""
    hardware = prepared.experiment.hardware
    if hardware.lower and hardware.hls is not None:
        hls4ml.to_hls(untrained_graph(prepared, apart=True), "hls", **hls_options(prepared.experiment))


def export(
    prepared: Prepared, graph: Graph, inputs: Sequence[np.ndarray], folder: Path, log: Log, summary: dict[str, Any]
) -> None:
    """hls/ and model.KIND.onnx, as `hardware.hls` and `hardware.onnx` ask; mismatches go into `summary`.

    inputs: arrays (N, *shape), one per port, on which everything is compared.
    Raises: LoweringError for what a format can't say, ToolError, VerifyError where an export computes something else.
    """
    hardware = prepared.experiment.hardware
    if hardware.hls is None and not hardware.onnx:
        return
    expected = flatten_batch(emulate(graph, inputs))
    if hardware.hls is not None:
        with phase(log, "hls4ml") as remarks:
            remarks.append(_hls(prepared, hardware.hls, graph, inputs, expected, folder / "hls", summary))
    for kind in hardware.onnx:
        from pquant_jax.lower.backends import onnx

        with phase(log, kind) as remarks:
            path = folder / ("model.onnx" if kind == "onnx" else f"model.{kind}.onnx")
            model = getattr(onnx, f"to_{kind}")(graph, path, name=prepared.experiment.name)
            found = onnx.execute(model, list(inputs), engine=ENGINES[kind])
            summary["mismatches"][kind] = check_outputs(f"{path.name} in {ENGINES[kind]}", found, expected, graph)
            remarks.append(f"{path}, {len(model.graph.node)} nodes, 0 of {len(expected):,} vectors differ in {ENGINES[kind]}")


def hls_options(experiment: Experiment) -> dict[str, Any]:
    """What `hls4ml.to_hls` is asked for; hardware.part is one of Xilinx, which means nothing to the tools of others."""
    hardware, asked = experiment.hardware, experiment.hardware.hls
    assert asked is not None
    options = asked.model_dump(exclude={"simulate"}) | {"clock_period": hardware.clock_period}
    if asked.part is None and hls4ml.BACKENDS[asked.backend].part is not None:
        options["part"] = hardware.part
    return options


def _hls(
    prepared: Prepared, asked: Hls, graph: Graph, inputs: Sequence[np.ndarray], expected: np.ndarray, folder: Path, summary: Any
) -> str:
    model = hls4ml.to_hls(graph, folder, project_name="model", **hls_options(prepared.experiment))
    what = f"{folder}, {asked.backend} {asked.io_type}, {len(model.layers)} layers"
    if not asked.simulate:
        hls4ml.write(model, overwrite=True)
        return f"{what}, not simulated"
    model = hls4ml.compile(model, overwrite=True)
    summary["mismatches"]["hls4ml"] = check_outputs(
        "the C simulation of hls4ml", hls4ml.predict(model, list(inputs)), expected, graph
    )
    return f"{what}, 0 of {len(expected):,} vectors differ in its C simulation"
