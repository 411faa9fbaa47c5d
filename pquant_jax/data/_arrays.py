"""From named arrays to a checked `Dataset`: conversion, seeded split, standardisation, digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from jax import tree_util as jtu

from pquant_jax._errors import DataError
from pquant_jax.data._check import check, check_raw, check_task
from pquant_jax.data._types import Dataset, Split, Tree

PARTS: Final = ("train", "val", "test")
TRAIN_FRACTION: Final = 0.72
VAL_FRACTION: Final = 0.08


def from_arrays(
    arrays: Mapping[str, Any],
    *,
    task: str = "classification",
    standardise: bool = False,
    seed: int = 0,
    name: str = "arrays",
) -> Dataset:
    """A checked `Dataset` from arrays called `x`, `y`, or `x_train`, `y_train`, `x_val`, `y_val`, `x_test`, `y_test`.

    arrays: `x` (n, ...) numbers or a pytree of them, `y` (n,) integers for task="classification" or (n, ...) numbers
        for "regression"; optional `weight` (n,) or `weight_train`, `weight_val`, `weight_test`; optional texts
        `classes`, `features`, `source`, `licence`.
    standardise: x <- (x - mean) / std per column of the last axis, mean and std (ddof = 0) over train and validation;
        a constant column is only shifted.  y is left alone.
    seed: of the permutation that cuts one `x` into 72 % train, 8 % validation and 20 % test; unused for given parts.

    Raises `DataError` for arrays that are missing or can't be trained on, `ConfigError` for an unknown task.

    >>> data = from_arrays({"x": np.arange(50.0)[:, None], "y": np.arange(50) % 2})
    >>> [len(part.y) for part in (data.train, data.val, data.test)], data.classes
    ([36, 4, 10], ('0', '1'))
    """
    check_task(task)
    splits = _given(arrays, name, task) if _has_parts(arrays) else _cut(_one(arrays, name, task), seed, name)
    mean = std = None
    if standardise:
        splits, mean, std = _standardised(splits)
    classes = () if task == "regression" else _texts(arrays, "classes") or _numbered(splits, name)
    dataset = Dataset(
        *splits,
        classes=classes,
        features=_texts(arrays, "features"),
        name=name,
        digest=digest(splits),
        source=" ".join(_texts(arrays, "source")),
        licence=" ".join(_texts(arrays, "licence")),
        mean=mean,
        std=std,
    )
    return check(dataset, task)


def digest(splits: Iterable[Split]) -> str:
    """The first 16 hex characters of the SHA-256 of every array's dtype, shape and bytes, in order.

    >>> digest([Split(np.zeros((2, 1), np.float32), np.zeros(2, np.int32))])
    'feacac63eea59072'
    """
    hasher = hashlib.sha256()
    for leaf in jtu.tree_leaves(list(splits)):
        leaf = np.ascontiguousarray(leaf)
        hasher.update(f"{leaf.dtype.str}{leaf.shape}".encode())
        hasher.update(leaf.tobytes())
    return hasher.hexdigest()[:16]


def take(split: Split, index: np.ndarray | slice) -> Split:
    """The rows `index` of every array of `split`.

    >>> take(Split(np.arange(6).reshape(3, 2), np.arange(3)), slice(0, 2)).y
    array([0, 1])
    """
    return jtu.tree_map(lambda leaf: leaf[index], split)


def leading(dataset: Dataset, n: int, least: int) -> Dataset:
    """The leading 72 % + 8 % + 20 % of `n` rows of the three splits; `DataError` unless least <= n <= what there is."""
    total = sum(len(jtu.tree_leaves(getattr(dataset, part).y)[0]) for part in PARTS)
    if isinstance(n, bool) or not isinstance(n, int) or not least <= n <= total:
        raise DataError(f"{dataset.name}(n={n!r}): n must be from {least} to {total}, or None for all of them")
    sizes = [round(TRAIN_FRACTION * n), round(VAL_FRACTION * n)]
    sizes.append(n - sum(sizes))
    splits = [take(getattr(dataset, part), slice(size)) for part, size in zip(PARTS, sizes, strict=True)]
    return dataset._replace(**dict(zip(PARTS, splits, strict=True)), digest=digest(splits))


def _has_parts(arrays: Mapping[str, Any]) -> bool:
    return any(f"{key}_{part}" in arrays for key in "xy" for part in PARTS)


def _require(arrays: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(
            f"{where} has no array {', '.join(map(repr, missing))}: it holds {sorted(arrays) or 'nothing'}, expected "
            "'x' and 'y', or 'x_train', 'y_train', 'x_val', 'y_val', 'x_test' and 'y_test'"
        )


def _one(arrays: Mapping[str, Any], where: str, task: str) -> Split:
    _require(arrays, ("x", "y"), where)
    split = _converted(Split(arrays["x"], arrays["y"], arrays.get("weight")), where, task)
    check_raw(split, where)  # before the cut, whose indexing would hide unequal lengths
    return split


def _given(arrays: Mapping[str, Any], where: str, task: str) -> tuple[Split, ...]:
    _require(arrays, [f"{key}_{part}" for part in PARTS for key in "xy"], where)
    splits = [Split(*(arrays.get(f"{key}_{part}") for key in Split._fields)) for part in PARTS]
    splits = tuple(_converted(split, f"{where}, {part}", task) for split, part in zip(splits, PARTS, strict=True))
    for split, part in zip(splits, PARTS, strict=True):
        check_raw(split, f"{where}, {part}")
    return splits


def _converted(split: Split, where: str, task: str) -> Split:
    def number(path: tuple, leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.dtype.kind not in "fiub":
            raise DataError(f"{where}: {jtu.keystr(path)} has dtype {leaf.dtype}, expected numbers")
        if task == "classification" and path[0] == jtu.GetAttrKey("y"):
            return leaf if leaf.dtype.kind == "f" else _labels(leaf, where)  # `check` says what is wrong with a float
        with np.errstate(over="ignore"):  # `check` reports what overflows to infinity, with its place
            return leaf.astype(np.float32)

    return jtu.tree_map_with_path(number, split)


def _cut(split: Split, seed: int, where: str) -> tuple[Split, ...]:
    n = len(jtu.tree_leaves(split.x)[0])
    n_train, n_val = round(TRAIN_FRACTION * n), round(VAL_FRACTION * n)
    if min(n_train, n_val, n - n_train - n_val) < 1:
        raise DataError(f"{where} has {n} rows, too few for a 72/8/20 % split: give at least 10")
    order = np.random.Generator(np.random.Philox(seed)).permutation(n)
    return tuple(take(split, index) for index in np.split(order, [n_train, n_train + n_val]))


def _standardised(splits: tuple[Split, ...]) -> tuple[tuple[Split, ...], Tree, Tree]:
    def fitted(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts]).astype(np.float64)

    def spread(*parts: np.ndarray) -> np.ndarray:
        std = fitted(*parts).std(axis=0)
        return np.where(std > 0, std, 1.0)

    train, val, _ = splits
    mean = jtu.tree_map(lambda *parts: fitted(*parts).mean(axis=0), train.x, val.x)
    std = jtu.tree_map(spread, train.x, val.x)
    scaled = [jtu.tree_map(lambda x, m, s: ((x - m) / s).astype(np.float32), split.x, mean, std) for split in splits]
    return tuple(split._replace(x=x) for split, x in zip(splits, scaled, strict=True)), mean, std


def _texts(arrays: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(map(str, np.atleast_1d(np.asarray(arrays.get(key, ()))).tolist()))


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    if y.size and max(int(y.max()), -int(y.min())) >= 2**31:
        raise DataError(f"{where}: y has labels from {y.min()} to {y.max()}, expected 0, 1, ... below 2^31")
    return y.astype(np.int32)


def _numbered(splits: tuple[Split, ...], where: str) -> tuple[str, ...]:
    leaves = [leaf for split in splits for leaf in jtu.tree_leaves(split.y) if leaf.dtype.kind == "i" and leaf.size]
    n_classes = max((int(leaf.max()) + 1 for leaf in leaves), default=0)
    if n_classes > sum(leaf.size for leaf in leaves):  # identifiers, not labels: naming them all could fill the memory
        raise DataError(f"{where}: y has the label {n_classes - 1} but fewer rows; number the classes 0, 1, ...")
    return tuple(map(str, range(n_classes)))
