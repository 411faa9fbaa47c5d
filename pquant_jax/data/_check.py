"""Everything that makes data untrainable, each with one line that says where it is and what to do."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from jax import tree_util as jtu

from pquant_jax._errors import ConfigError, DataError, did_you_mean
from pquant_jax.data._types import TASKS, Dataset, Split, Tree

LISTS: Final = "a list is a tree of arrays here, so make one array of it with np.asarray"


def check(dataset: Dataset, task: str, n_classes: int | None = None) -> Dataset:
    """`dataset` itself, if it can be trained on.

    task: "classification" (y: integers (n,), 0 <= y < n_classes) or "regression" (y: finite floats).
    n_classes: the number of classes; by default that of `dataset.classes`, or no upper limit without names.

    Holds afterwards: no split is empty; all arrays of a split have one length; x is finite with at least two axes and
    one shape per sample in every split; weights are (n,), finite, not negative and not all zero; `features` names
    each column.  Raises `DataError` naming the split, the array and the first bad element; `ConfigError` for a task
    that isn't known.

    >>> ok = Split(np.zeros((4, 2), np.float32), np.array([0, 1, 1, 0]))
    >>> check(Dataset(ok, ok, ok), "classification", n_classes=1)
    Traceback (most recent call last):
    pquant_jax._errors.DataError: train: y has 2 labels outside 0..0 (1 class), the first is 1 at row 1
    """
    check_task(task)
    if task == "regression" and dataset.classes:
        raise DataError(f"{dataset.name or 'data'} has the classes {dataset.classes}: train it with task='classification'")
    if n_classes is None:
        n_classes = len(dataset.classes) or None
    for part in ("train", "val", "test"):
        split = getattr(dataset, part)
        where = f"{dataset.name}, {part}" if dataset.name else part
        check_raw(split, where)
        _check_finite(split.x, where, "x", dataset.features)
        if task == "regression":
            _check_finite(split.y, where, "y", ())
        else:
            for path, leaf in jtu.tree_leaves_with_path(split.y):
                _check_labels(np.asarray(leaf), f"{where}: y{jtu.keystr(path)}", n_classes)
        _check_shapes(dataset.train.x, split.x, where, "x")
        _check_shapes(dataset.train.y, split.y, where, "y")
    _check_features(dataset)
    return dataset


def check_task(task: str) -> str:
    """`task`, if it is one of `TASKS`; else `ConfigError`."""
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}, expected one of {TASKS}; {did_you_mean(str(task), TASKS)}")
    return task


def check_raw(split: Split, where: str) -> None:
    """Raises `DataError` unless the arrays of one split have one length, not zero, and x and weight their ranks."""
    leaves = [("x" + jtu.keystr(path), np.asarray(leaf)) for path, leaf in jtu.tree_leaves_with_path(split.x)]
    if not leaves:
        raise DataError(f"{where}: x holds no array")
    for name, leaf in leaves:
        if leaf.ndim < 2:
            hint = "use x[:, None] for one feature" if leaf.ndim else LISTS
            raise DataError(f"{where}: {name} has shape {leaf.shape}, expected (n, features...); {hint}")
    n, first = len(leaves[0][1]), leaves[0][0]
    targets = [("y" + jtu.keystr(path), np.asarray(leaf)) for path, leaf in jtu.tree_leaves_with_path(split.y)]
    if not targets:
        raise DataError(f"{where}: y holds no array")
    for name, leaf in leaves[1:] + targets:
        if leaf.ndim < 1 or len(leaf) != n:
            hint = "" if leaf.ndim else f"; {LISTS}"
            raise DataError(f"{where}: {name} has shape {leaf.shape}, expected {n} rows, the length of {first}{hint}")
    if n == 0:
        raise DataError(f"{where}: the split is empty, expected at least one row")
    if split.weight is not None:
        _check_weight(np.asarray(split.weight), n, where)


def _check_weight(weight: np.ndarray, n: int, where: str) -> None:
    if weight.shape != (n,):
        raise DataError(f"{where}: weight has shape {weight.shape}, expected ({n},): one number per row of x")
    _check_finite(weight, where, "weight", ())
    if (weight < 0).any():
        row = int(np.argmax(weight < 0))
        raise DataError(f"{where}: weight has {int((weight < 0).sum())} negative values, the first {weight[row]:g} at row {row}")
    if not weight.any():
        raise DataError(f"{where}: every weight is 0, so nothing would be learned")


def _check_finite(tree: Tree, where: str, name: str, features: tuple[str, ...]) -> None:
    for path, leaf in jtu.tree_leaves_with_path(tree):
        leaf = np.asarray(leaf)
        if leaf.dtype.kind not in "fiub":
            raise DataError(f"{where}: {name}{jtu.keystr(path)} has dtype {leaf.dtype}, expected numbers")
        bad = ~np.isfinite(leaf)
        if bad.any():
            first = np.unravel_index(int(np.argmax(bad)), leaf.shape)
            place = _place(first, leaf, features)
            raise DataError(
                f"{where}: {name}{jtu.keystr(path)} has {int(bad.sum())} NaN or infinite values, the first is "
                f"{leaf[first]} at {place}; drop those rows or fill them in"
            )


def _place(index: tuple[Any, ...], leaf: np.ndarray, features: tuple[str, ...]) -> str:
    row, *rest = map(int, index)
    if not rest:
        return f"row {row}"
    feature = f" (feature {features[rest[-1]]!r})" if len(features) == leaf.shape[-1] else ""
    return f"row {row}, column {rest[0] if len(rest) == 1 else tuple(rest)}{feature}"


def _check_labels(y: np.ndarray, name: str, n_classes: int | None) -> None:
    if y.ndim != 1:
        hint = "; use y.argmax(axis=-1) for one-hot rows" if y.ndim == 2 else ""
        raise DataError(f"{name} has shape {y.shape}, expected labels (n,){hint}")
    if y.dtype.kind not in "iu":
        raise DataError(f"{name} has dtype {y.dtype}, expected integer labels 0, 1, ...; use y.astype(int), or task='regression'")
    bad = (y < 0) if n_classes is None else (y < 0) | (y >= n_classes)
    if bad.any():
        row = int(np.argmax(bad))
        allowed = "0, 1, ..." if n_classes is None else f"0..{n_classes - 1} ({n_classes} class{'es' * (n_classes > 1)})"
        raise DataError(f"{name} has {int(bad.sum())} labels outside {allowed}, the first is {y[row]} at row {row}")


def _check_shapes(train: Tree, other: Tree, where: str, name: str) -> None:
    def shapes(tree: Tree) -> Tree:
        return jtu.tree_map(lambda leaf: np.shape(leaf)[1:], tree)

    if jtu.tree_structure(train) != jtu.tree_structure(other) or shapes(train) != shapes(other):
        raise DataError(f"{where}: one sample of {name} has shape {shapes(other)}, but {shapes(train)} in train")


def _check_features(dataset: Dataset) -> None:
    leaves = jtu.tree_leaves(dataset.train.x)
    if dataset.features and len(leaves) == 1 and leaves[0].shape[-1] != len(dataset.features):
        raise DataError(
            f"{dataset.name or 'data'}: x has {leaves[0].shape[-1]} columns but features names {len(dataset.features)}; "
            "give one name per column, or none"
        )
