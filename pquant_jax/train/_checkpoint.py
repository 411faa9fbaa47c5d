"""Checkpoints: the whole training state, so that a resumed run continues bit for bit.  The only module that imports orbax."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from pquant_jax._errors import TrainingError

_KEEP = 3  # the newest ones; a stage's last checkpoint is kept as long as the run


def save(folder: Path, epoch: int, trees: dict[str, Any], meta: dict[str, Any], *, keep: bool) -> None:
    """Write `folder/<epoch>`, complete or not at all; meta is JSON.  keep: never thin this one out."""
    import orbax.checkpoint as ocp

    target = Path(folder).absolute() / f"{epoch:06d}"
    shutil.rmtree(target, ignore_errors=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "state", trees)
    (partial / "meta.json").write_text(json.dumps({**meta, "epoch": epoch, "keep": keep}))
    partial.rename(target)
    others = [d for d in available(folder) if not json.loads((d / "meta.json").read_text())["keep"]]
    for old in others[:-_KEEP]:
        shutil.rmtree(old)


def available(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(d for d in Path(folder).absolute().glob("[0-9]*") if (d / "meta.json").exists())


def load(folder: Path, like: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trees, meta) of the newest checkpoint.  like: trees of the same structure, for shapes and dtypes.

    Raises: TrainingError if there is none, or if it belongs to another model.
    """
    import orbax.checkpoint as ocp

    found = available(folder)
    if not found:
        raise TrainingError(f"no checkpoint in {folder}; start the run with `pquant-jax run`")
    newest = found[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            trees = checkpointer.restore(newest / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
        except (ValueError, KeyError) as error:
            line = str(error).splitlines()[0]
            raise TrainingError(f"{newest} is of another model or compression: {line}") from error
    return trees, json.loads((newest / "meta.json").read_text())
