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
