"""Models as ONNX: mismatches against the emulator in qonnx's executor and in onnxruntime, seconds, and what the files hold.

    python benchmarks/hardware_qonnx.py GRAPH.npz ... [--vectors N]

Vectors are codes of the whole port, so that they overflow inside, and numbers that no port holds.  qonnx's executor makes an
onnxruntime session per node; the batch of the file is open, so all vectors go through one pass of it.  `returns` is whether
`from_qonnx` gives a graph with the same integers, or why it can't.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower import from_qonnx, ir
from pquant_jax.lower.backends import onnx as doors
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

VECTORS = 1000


def vectors(graph: ir.Graph, n: int, seed: int = 0) -> list[np.ndarray]:
    """Per input `n` codes of the port and n / 8 float32 numbers of up to four times its range, off its grid."""
    rng = np.random.default_rng(seed)
    out = []
    for index, x in zip(graph.inputs, port_grid(graph, n, rng), strict=True):
        reach = np.ldexp(4.0, np.broadcast_to(np.asarray(graph.nodes[index].attrs["i"], np.int64), graph.nodes[index].shape))
        outside = (rng.uniform(-1, 1, (max(n // 8, 1), *x.shape[1:])) * reach).astype(np.float32)
        out.append(np.concatenate([x, outside.astype(np.float64)]))
    return out


def returns(model: Any, xs: list[np.ndarray], want: np.ndarray) -> bool | str:
    """Does the file come back with the same integers?  The reason if it can't be read."""
    try:
        back = from_qonnx(model).graph
    except LoweringError as error:
        return str(error)
    shaped = [x.reshape(len(x), *back.nodes[j].shape) for x, j in zip(xs, back.inputs, strict=True)]
    return bool(np.array_equal(flatten_batch(emulate(back, shaped)), want))


def run(graph: ir.Graph, n: int = VECTORS) -> dict[str, Any]:
    """One model: {"vectors", "outputs", "qonnx", "onnxruntime" (mismatches), "seconds", "ops", "bits", "returns"}."""
    xs = vectors(graph, n)
    want = flatten_batch(emulate(graph, xs))
    found: dict[str, Any] = {"vectors": len(want), "outputs": int(want.shape[1]), "seconds": {}}
    writers: dict[str, Callable[[ir.Graph], Any]] = {"qonnx": doors.to_qonnx, "onnxruntime": doors.to_onnx}
    for engine, write in writers.items():
        start = time.perf_counter()
        model = write(graph)
        got = doors.execute(model, xs, engine=engine)
        found[engine] = int((got != want).sum())
        found["seconds"][engine] = round(time.perf_counter() - start, 3)
        if engine == "qonnx":
            found["ops"] = doors.op_counts(model)
            found["bits"] = 32 if model.graph.input[0].type.tensor_type.elem_type == 1 else 64
            found["returns"] = returns(model, xs, want)
    found["varying"] = int((want != want[:1]).any(0).sum())
    return found


def zoo_lines(graphs: Mapping[str, ir.Graph], n: int = VECTORS) -> Iterator[dict[str, Any]]:
    """`run` of every graph, with its name; "holds": no mismatch in either engine, and the outputs vary."""
    for name, graph in graphs.items():
        found = run(graph, n)
        yield {"model": name, "holds": not found["qonnx"] and not found["onnxruntime"] and found["varying"] > 0, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--vectors", type=int, default=VECTORS)
    at = parser.parse_args()
    for line in zoo_lines({path.stem: ir.load(path) for path in at.graphs}, at.vectors):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
