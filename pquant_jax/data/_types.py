"""What every loader returns: three splits of numpy arrays and where they came from.  Imports numpy only."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

Tree = Any
"""One array, or dicts, tuples and lists of arrays that share their leading axis."""

TASKS: Final = ("classification", "regression")


class Split(NamedTuple):
    """One part of a data set.

    x: float32 (n, ...), or a pytree of such arrays with one leading axis.
    y: int32 labels (n,) for classification, float32 targets (n, ...) for regression; array or pytree.
    weight: float32 (n,), none negative, or None for equal weights.
    """

    x: Tree
    y: Tree
    weight: np.ndarray | None = None


class Dataset(NamedTuple):
    """Train, validation and test data, with what a report and a deployment need to know of them.

    classes: one name per label, empty for regression.
    features: one name per column of the last axis of x, or empty.
    digest: the first 16 hex characters of the SHA-256 of all arrays.
    mean, std: x = (raw - mean) / std was applied, with the structure of x; None if x is as it was found.
    """

    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    name: str = ""
    digest: str = ""
    source: str = ""
    licence: str = ""
    mean: Tree = None
    std: Tree = None
