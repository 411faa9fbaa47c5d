"""Checkpoints: the whole training state, so that a resumed run continues bit for bit.  The only module that imports orbax."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from pquant_jax import _tree
from pquant_jax._errors import TrainingError

_KEEP = 3  # the newest ones; a stage's last checkpoint is kept as long as the run


def save(folder: Path, epoch: int, trees: dict[str, Any], meta: dict[str, Any], *, keep: bool) -> None:
    """Write `folder/<epoch>`, complete or not at all; meta is JSON.  keep: never thin this one out."""
    import orbax.checkpoint as ocp

    target = Path(folder).absolute() / f"{epoch:06d}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "state", trees)
    (partial / "meta.json").write_text(json.dumps({**meta, "epoch": epoch, "keep": keep, "leaves": _leaves(trees)}))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    others = [d for d in available(folder) if not json.loads((d / "meta.json").read_text())["keep"]]
    for old in others[:-_KEEP]:
        shutil.rmtree(old)


def available(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(d for d in Path(folder).absolute().glob("[0-9]*") if (d / "meta.json").exists())


def load(folder: Path, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trees, meta) of the newest checkpoint.  like: trees of the same structure, for shapes and dtypes.

    Raises: TrainingError if there is none, if it belongs to another model, or if it can't be read.
    """
    import orbax.checkpoint as ocp

    found = available(folder)
    if not found:
        raise TrainingError(f"no checkpoint in {folder}; start the run with `pquant-jax run`")
    newest = found[-1]
    meta = json.loads((newest / "meta.json").read_text())
    _check_leaves(newest, meta.pop("leaves", {}), _leaves(like))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            trees = checkpointer.restore(newest / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError, OSError) as error:
            line = str(error).splitlines()[0]
            raise TrainingError(f"{newest} can't be read: {line}; remove it to go on from the one before") from error
    return trees, meta


def _leaves(trees: dict[str, Any]) -> dict[str, str]:
    """What every leaf is, such as "float32 (4, 8)", by path."""
    return {path: f"{leaf.dtype} {leaf.shape}" for path, leaf in _tree.flatten(trees).items()}


def _check_leaves(folder: Path, received: dict[str, str], expected: dict[str, str]) -> None:
    """Compared here and not by restoring: a restore that fails leaves its other reads behind, unfinished."""
    for path in [*expected, *received]:
        here, wanted = received.get(path, "missing"), expected.get(path, "none")
        if here != wanted:
            raise TrainingError(
                f"{folder} is of another model or compression: {path} is {here}, expected {wanted}; "
                "resume with the settings it was trained with, or train into another folder"
            )
