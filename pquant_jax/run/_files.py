"""The run directory: every file is complete or absent, and metrics are flushed line by line."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from pquant_jax import config
from pquant_jax._errors import ConfigError

Record = dict[str, Any]


def new_folder(root: str | Path, name: str, *, overwrite: bool) -> Path:
    """The path of the run `name`, which does not exist yet or may be replaced.

    Raises: ConfigError for an existing directory without `overwrite`, and for one that is no run in any case.
    """
    folder = Path(root) / name
    if not folder.exists():
        return folder
    if not overwrite:
        raise ConfigError(f"{folder} exists; choose another --name, replace it with --overwrite, or `pquant-jax resume {folder}`")
    if not (folder / "config.yaml").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is no run directory (it has no config.yaml), so --overwrite leaves it alone; choose another --name"
        )
    return folder


def create(folder: Path, experiment: config.Experiment) -> None:
    """Make an empty run directory that holds the resolved configuration; an old one of this name goes."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_text(folder / "config.yaml", config.dump(experiment))
    except OSError as error:
        raise ConfigError(f"{folder} can't be written: {error.strerror}; choose another --root") from error


def open_run(folder: str | Path, *needed: str) -> tuple[Path, config.Experiment]:
    """The directory of a run and its configuration.

    needed: files that must be there.
    Raises: ConfigError if it is no run directory, or one whose training has not ended.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        what = "is no run directory: it has no config.yaml" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} {what}; give the path of a run such as runs/jets_hgq")
    for name in needed:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}: the run is not finished; go on with `pquant-jax resume {folder}`")
    raw = (folder / "config.yaml").read_text(encoding="utf-8")
    return folder, config.parse(config.read_yaml(raw, str(folder / "config.yaml")))


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON through a temporary name; NaN and infinity become null."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote, or {} if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz through a temporary name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict[str, Any](arrays))
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic) or (hasattr(value, "ndim") and value.ndim == 0):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_records(path: Path) -> list[Record]:
    """The epochs of a metrics file; a last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


@contextmanager
def recorder(path: Path) -> Iterator[Callable[[Record], None]]:
    """append(record): one JSON line per epoch, flushed.

    Epochs from the first appended one on are dropped from an existing file: a resumed run repeats what came after its
    last checkpoint.
    """
    with ExitStack() as stack:
        files: list[TextIO] = []

        def append(record: Record) -> None:
            if not files:
                kept = [r for r in read_records(path) if r["epoch"] < record["epoch"]]
                write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
                files.append(stack.enter_context(path.open("a", encoding="utf-8")))
            files[0].write(json.dumps(_plain(record), allow_nan=False) + "\n")
            files[0].flush()

        yield append
