"""A finished run applied to new data: the quantized forward, checked against the emulator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pquant_jax import _tree, config, train
from pquant_jax._base import Tree, View
from pquant_jax._errors import DataError, did_you_mean
from pquant_jax.data import read_npz
from pquant_jax.graph import Instrumented
from pquant_jax.run._figures import outputs
from pquant_jax.run._files import open_run, read_json, write_npz


def predict(folder: str | Path, data: str | Path, out: str | Path | None = None, *, raw: bool = False) -> dict[str, np.ndarray]:
    """Predictions of a run for the samples of an .npz, written to `out` (default predictions.npz in the run).

    data: an .npz with `x`, or `x/NAME` for every input of a model with several.
    raw: standardise x as the run's data were: (x - mean) / std; otherwise x is what the model takes.
    Returns and writes: `prediction` float32 (n, ...), the jitted quantized forward; for a lowered run also `codes` int64
      (n, outputs) and `f` (outputs,), prediction = codes * 2^-f, which the emulator confirmed.
    Raises: DataError for data that don't fit the run, VerifyError if forward and emulator differ.
    """
    folder, experiment = open_run(folder, "final.npz", "dataset.json")
    known = read_json(folder / "dataset.json")
    x = _inputs(read_npz(Path(data)), known, str(data))
    x = _standardised(x, known, folder) if raw else x
    with config.importing(experiment.folders):
        sample = jax.tree.map(lambda v: np.zeros((2, *v.shape[1:]), np.float32), x)
        model = config.model(experiment, sample, known["outputs"], trained=False)
        inst = config.instrumented(experiment, model, sample)
        view, model_state = train.load_final(folder / "final.npz", inst)
        predicted = outputs(inst, view, model_state, x)
    arrays = {f"prediction/{path}".rstrip("/"): v for path, v in _tree.flatten(predicted).items()}
    if (folder / "graph.npz").is_file():
        arrays |= _codes(folder, (inst, view, model_state), x, predicted)
    target = folder / "predictions.npz" if out is None else Path(out)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_npz(target, arrays)
    except OSError as error:
        raise DataError(f"{target} can't be written: {error.strerror}; choose another file with -o") from error
    return arrays


def _inputs(arrays: Mapping[str, np.ndarray], known: Mapping[str, Any], where: str) -> Tree:
    """x as the model takes it, with the shapes that the run was trained on."""

    def leaf(path: tuple, shape: str) -> np.ndarray:
        name = "/".join(["x", *filter(None, [_tree.path_str(path)])])
        if name not in arrays:
            raise DataError(f"{where} has no array {name!r}; {did_you_mean(name, arrays)}")
        value, expected = arrays[name], tuple(int(n) for n in shape.split("x"))
        if value.dtype.kind not in "fiub" or value.shape[1:] != expected or not len(value):
            raise DataError(
                f"{where}: {name} has shape {value.shape} and dtype {value.dtype}, expected numbers of shape (n, "
                f"{', '.join(map(str, expected))}), as the run was trained on"
            )
        if not np.isfinite(value).all():
            raise DataError(f"{where}: {name} has {int((~np.isfinite(value)).sum())} NaN or infinite values; drop those rows")
        return value.astype(np.float32)

    x = jax.tree.map_with_path(leaf, known["x"])
    sizes = {len(v) for v in jax.tree.leaves(x)}
    if len(sizes) != 1:
        raise DataError(f"{where}: the inputs have {sorted(sizes)} rows, expected equally many in all")
    return x


def _standardised(x: Tree, known: Mapping[str, Any], folder: Path) -> Tree:
    if known["mean"] is None:
        raise DataError(
            f"--raw: the data of {folder} were not standardised, so there is no mean and deviation to apply; leave it out"
        )

    def scaled(path: tuple, value: np.ndarray) -> np.ndarray:
        name = _tree.path_str(path)
        return ((value - np.asarray(known["mean"][name])) / np.asarray(known["std"][name])).astype(np.float32)

    return jax.tree.map_with_path(scaled, x)


def _codes(folder: Path, trained: tuple[Instrumented, View, Tree], x: Tree, predicted: Tree) -> dict[str, np.ndarray]:
    """Integers of the emulator, in the format of the netlist's outputs; the forward must give the same."""
    from pquant_jax.lower import check_outputs, ir, loaded, output_f, weight_ports, weights_of
    from pquant_jax.lower.emulate import flatten_batch, to_codes
    from pquant_jax.run._hardware import emulated

    graph = ir.load(folder / "graph.npz")
    f = output_f(graph)
    if weight_ports(graph):
        graph = loaded(graph, weights_of(graph, *trained))
    expected = flatten_batch(emulated(graph, trained[0], x))
    forward = flatten_batch([np.asarray(v, np.float64) for v in jax.tree.leaves(predicted)])
    check_outputs("the forward", forward, expected, graph)
    return {"codes": to_codes(expected, f), "f": f}
