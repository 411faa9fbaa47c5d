"""The finished model as integers: what a deployment needs of it, and back."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, State, Table, Transform, Tree, View
from pquant_jax._errors import DataError, TransformError, did_you_mean
from pquant_jax.graph import Instrumented

_PARTS = ("k", "i", "f")


def finalize(
    compression: Transform, params: Params, state: State, model_state: Tree = (), *, inst: Instrumented | None = None
) -> dict[str, np.ndarray]:
    """The integers and scales of a trained model, as arrays for `numpy.savez`.

    `codes/PATH` int32 and `f/PATH` int32 with value = codes * 2^-f for every quantized parameter, `value/PATH` for
    the others; `k|i|f/SITE` int32 and `modes/SITE` for every activation; `state/PATH` for the model's state; with `inst`,
    `table/NAME/codes|f|which` int32 for everything that is looked up, so that no other machine computes it again.

    Raises: TransformError if a value is no multiple of its 2^-f: something behind the quantizer moved it.
    """
    view, _ = compression.apply(params, state)
    tables = inst.tables(view, model_state) if inst is not None and view.sites else {}
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _tree.flatten(view.model).items():
        value, fmt = np.asarray(leaf), view.sites.get(path)
        if fmt is None:
            arrays[f"value/{path}"] = value
            continue
        arrays[f"codes/{path}"] = _codes(path, value, np.asarray(fmt.f))
    for name, fmt in view.sites.items():
        arrays.update({f"{part}/{name}": np.rint(np.asarray(getattr(fmt, part))).astype(np.int32) for part in _PARTS})
        arrays[f"modes/{name}"] = np.asarray([fmt.rounding, fmt.overflow])
    arrays.update({f"mask/{path}": np.asarray(m) for path, m in view.masks.items()})
    arrays.update({f"table/{name}/{part}": np.asarray(v) for name, t in tables.items() for part, v in t._asdict().items()})
    arrays.update({f"state/{path}": np.asarray(v) for path, v in _tree.flatten(model_state).items()})
    return arrays


def _codes(path: str, value: np.ndarray, f: np.ndarray) -> np.ndarray:
    codes = np.ldexp(value.astype(np.float64), np.broadcast_to(np.rint(f).astype(np.int32), value.shape))
    off = np.ravel(codes != np.rint(codes))  # nan is off the grid too
    if off.any():
        raise TransformError(
            f"{path}: {off.sum()} of {off.size} values are off the grid of their format, the first is "
            f"{np.ravel(value)[off.argmax()]:g}; put soft masks before the quantizer in pq.chain, or finalize when all are 0 or 1"
        )
    return codes.astype(np.int32)


def save_final(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what `finalize` gave to an .npz, through a temporary name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(target)


def load_final(path: str | Path, inst: Instrumented) -> tuple[View, Tree]:
    """(view, model state) of a finalized model, ready for `inst.forward`.

    Raises: DataError if the file is missing, can't be read or is of another model.
    """
    arrays, where = _read(Path(path)), str(path)
    params, state = ({p: np.shape(v) for p, v in _tree.flatten(t).items()} for t in (inst.model.params, inst.model.state))
    shapes = {name: spec.shape for name, spec in inst.sites.items()}
    codes, values = _part(arrays, "codes"), _part(arrays, "value")
    formats = {part: _part(arrays, part) for part in (*_PARTS, "modes")}
    _check(where, "the parameter", {**values, **codes}, params, whole=True)
    _check(where, "the state", _part(arrays, "state"), state, whole=True)
    _check(where, "the mask", _part(arrays, "mask"), params)
    for part in _PARTS:
        if set(formats[part]) != set(formats["modes"]):
            raise DataError(f"{where} is damaged: {part}/* and modes/* are not of the same sites; write it with pq.save_final")
        _check(where, "the site", formats[part], shapes, spread=True)
    leaves: dict[str, Any] = {name: jnp.asarray(v) for name, v in values.items()}
    for name, code in codes.items():
        if name not in formats["f"]:
            raise DataError(f"{where} is damaged: codes/{name} without f/{name}; write it with pq.save_final")
        leaves[name] = jnp.asarray(np.ldexp(code.astype(np.float64), -formats["f"][name]), jnp.float32)
    sites = {}
    for name, modes in formats["modes"].items():
        rounding, overflow = (str(v) for v in modes)
        k, i, f = (jnp.asarray(formats[part][name], jnp.float32) for part in _PARTS)
        sites[name] = KIF(k, i, f, rounding, overflow)
    masks = {name: jnp.asarray(v) for name, v in _part(arrays, "mask").items()}
    model_state = {name: jnp.asarray(v) for name, v in _part(arrays, "state").items()}
    tables = _tables(where, _part(arrays, "table"), inst)
    return View(_tree.replace(inst.model.params, leaves), sites, masks, tables), _tree.replace(inst.model.state, model_state)


def _tables(where: str, parts: Mapping[str, np.ndarray], inst: Instrumented) -> dict[str, Table]:
    names = {name.rpartition("/")[0] for name in parts}
    for name in names:
        if f"{name}/table" not in inst.sites:
            known = [n for n, spec in inst.sites.items() if spec.kind == "table"]
            raise DataError(f"{where} has the table {name!r}, which this model lacks ({did_you_mean(f'{name}/table', known)})")
        missing = [part for part in Table._fields if f"{name}/{part}" not in parts]
        if missing:
            raise DataError(f"{where} is damaged: the table {name!r} lacks {missing[0]}; write it with pq.save_final")
    return {name: Table(*(parts[f"{name}/{part}"] for part in Table._fields)) for name in sorted(names)}


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path} is no file; expected one that pq.save_final wrote")
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} can't be read: {error}; expected a file that pq.save_final wrote") from error


def _part(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    return {key[len(kind) + 1 :]: v for key, v in arrays.items() if key.startswith(f"{kind}/")}


def _check(
    where: str,
    what: str,
    found: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    whole: bool = False,
    spread: bool = False,
) -> None:
    """Names and shapes are those of this model.  whole: all of them are there.  spread: a shape may broadcast to its own."""
    fix = "it was written for another model; load it with the one that was trained"
    for name in [*found, *(shapes if whole else ())]:
        if name not in shapes:
            raise DataError(f"{where} has {what} {name!r}, which this model lacks ({did_you_mean(name, shapes)}); {fix}")
        if name not in found:
            raise DataError(f"{where} lacks {what} {name!r}; {fix}")
        received, expected = found[name].shape, shapes[name]
        if received != expected and not (spread and _broadcasts(received, expected)):
            raise DataError(f"{where}: {what} {name!r} has shape {received}, expected {expected}; {fix}")


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, to) == to
    except ValueError:
        return False
