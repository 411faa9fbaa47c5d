"""The finished model as integers: what a deployment needs of it, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, State, Transform, Tree, View
from pquant_jax._errors import DataError
from pquant_jax.graph import Instrumented

_PARTS = ("k", "i", "f")


def finalize(compression: Transform, params: Params, state: State, model_state: Tree = ()) -> dict[str, np.ndarray]:
    """The integers and scales of a trained model, as arrays for `numpy.savez`.

    `codes/PATH` int32 and `f/PATH` int32 with value = codes * 2^-f for every quantized parameter, `value/PATH` for
    the others; `k|i|f/SITE` int32 and `modes/SITE` for every activation; `state/PATH` for the model's state.
    """
    view, _ = compression.apply(params, state)
    arrays: dict[str, np.ndarray] = {}
    for path, leaf in _tree.flatten(view.model).items():
        value, fmt = np.asarray(leaf), view.sites.get(path)
        if fmt is None:
            arrays[f"value/{path}"] = value
            continue
        f = np.broadcast_to(np.rint(np.asarray(fmt.f)).astype(np.int32), value.shape)
        arrays[f"codes/{path}"] = np.ldexp(value.astype(np.float64), f).astype(np.int32)
    for name, fmt in view.sites.items():
        arrays.update({f"{part}/{name}": np.rint(np.asarray(getattr(fmt, part))).astype(np.int32) for part in _PARTS})
        arrays[f"modes/{name}"] = np.asarray([fmt.rounding, fmt.overflow])
    arrays.update({f"mask/{path}": np.asarray(m) for path, m in view.masks.items()})
    arrays.update({f"state/{path}": np.asarray(v) for path, v in _tree.flatten(model_state).items()})
    return arrays


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

    Raises: DataError if the file is of another model.
    """
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    leaves: dict[str, Any] = {}
    for name in _tree.flatten(inst.model.params):
        if f"codes/{name}" in arrays:
            leaves[name] = jnp.asarray(np.ldexp(arrays[f"codes/{name}"].astype(np.float64), -arrays[f"f/{name}"]), jnp.float32)
        elif f"value/{name}" in arrays:
            leaves[name] = jnp.asarray(arrays[f"value/{name}"])
        else:
            raise DataError(f"{path} lacks the parameter {name!r}; it was written for another model")
    sites = {}
    for key in arrays:
        kind, _, name = key.partition("/")
        if kind == "modes":
            rounding, overflow = (str(v) for v in arrays[key])
            k, i, f = (jnp.asarray(arrays[f"{part}/{name}"], jnp.float32) for part in _PARTS)
            sites[name] = KIF(k, i, f, rounding, overflow)
    masks = {key[5:]: jnp.asarray(v) for key, v in arrays.items() if key.startswith("mask/")}
    state = {key[6:]: jnp.asarray(v) for key, v in arrays.items() if key.startswith("state/")}
    return View(_tree.replace(inst.model.params, leaves), sites, masks), _tree.replace(inst.model.state, state)
