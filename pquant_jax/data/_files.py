"""Data sets from .npz files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.data._arrays import from_arrays
from pquant_jax.data._types import Dataset


def from_npz(path: str | os.PathLike[str], *, task: str = "classification", standardise: bool = False, seed: int = 0) -> Dataset:
    """A checked `Dataset` from an .npz file; `from_arrays` says which arrays it may hold and what the options do.

    Raises `DataError` for a file that is missing, is no .npz or holds data that can't be trained on.
    """
    path = Path(path)
    return from_arrays(read_npz(path), task=task, standardise=standardise, seed=seed, name=path.stem)


def from_csv(path: str | os.PathLike[str], *, task: str = "classification", standardise: bool = False, seed: int = 0) -> Dataset:
    """A checked `Dataset` from a table of numbers separated by commas, whose last column is the label or the target.

    A first line that is no row of numbers names the columns.  Labels are any texts; classes are numbered in the order of
    the alphabet.  The split and the options are those of `from_arrays`.
    Raises `DataError` for a file that is missing, has rows of different lengths, or a text where a number is expected.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist; expected a table of comma-separated values")
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    titled = bool(rows) and not _is_number(rows[0][0])
    names, rows = (rows[0], rows[1:]) if titled else ([], rows)
    first = 2 if titled else 1
    wrong = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
    if wrong is not None or not rows or len(rows[0]) < 2:
        found = f"{len(rows[wrong])} columns in line {wrong + first}" if wrong is not None else "no table"
        raise DataError(f"{str(path)!r} has {found}, expected as many in every row, at least 2")
    numeric = len(rows[0]) - (task == "classification")
    bad = next(((n, c) for n, row in enumerate(rows) for c in range(numeric) if not _is_number(row[c])), None)
    if bad is not None:
        raise DataError(f"{str(path)!r}: {rows[bad[0]][bad[1]]!r} in line {bad[0] + first}, column {bad[1]} is no number")
    x = np.asarray([row[:-1] for row in rows], np.float64)
    last = np.asarray([row[-1].strip() for row in rows])
    arrays: dict[str, np.ndarray] = {"x": x, "features": np.asarray([n.strip() for n in names[:-1]])}
    if task == "classification":
        classes, labels = np.unique(last, return_inverse=True)
        arrays |= {"y": labels, "classes": classes}
    else:
        arrays["y"] = last.astype(np.float64)
    return from_arrays(arrays, task=task, standardise=standardise, seed=seed, name=path.stem)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def located(path: str | os.PathLike[str] | None, name: str) -> Path:
    """`path`, or the file `name` in the folder that the environment variable PQUANT_DATA names.

    Raises `DataError` where neither is there: data that the package may not or can not ship.
    """
    if path is not None:
        return Path(path)
    folder = os.environ.get("PQUANT_DATA")
    if not folder:
        raise DataError(f"{name} is not shipped: give its path, or set PQUANT_DATA to the folder that holds it")
    found = Path(folder) / name
    if not found.is_file():
        raise DataError(f"PQUANT_DATA is {folder!r}, which holds no {name}; put it there, or give its path")
    return found


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name; `DataError` for a missing or unreadable one.  Pickles are refused."""
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise DataError(f"data file {str(path)!r} {what}; expected an .npz made with np.savez(path, x=x, y=y)")
    if not zipfile.is_zipfile(path):
        raise DataError(f"data file {str(path)!r} is no .npz archive; make one with np.savez(path, x=x, y=y)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"data file {str(path)!r} can't be read: {error}") from error
