"""A forest of decision trees as flat arrays, and what it predicts.  numpy only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, LoweringError

_AT_ONCE: Final = 1 << 22  # (sample, tree) pairs that are walked together


class Forest(NamedTuple):
    """Binary trees whose leaves add up to one score per output: scores[o] = base[o] + sum of the leaves of its trees.

    A node asks x[feature] <= threshold (x[feature] < threshold if `strict`) and goes `left` if so, else `right`; a leaf has
    feature -1 and points to itself.  Values at inner nodes are 0.

    feature, left, right: int32 (nodes,), left and right as indices of nodes.  threshold, value: float64 (nodes,).
    root, output: int32 (trees,), the node where a tree begins and the output that it adds to.  base: float64 (outputs,).
    features: how many columns x has.  dtype: "float32" or "float64", what x is rounded to before it is compared.
    """

    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray
    root: np.ndarray
    output: np.ndarray
    base: np.ndarray
    features: int
    strict: bool = False
    dtype: str = "float64"


class Tree(NamedTuple):
    """One tree as the libraries have it: node 0 is the root, a leaf has feature -1, its children don't matter."""

    feature: Any
    threshold: Any
    left: Any
    right: Any
    value: Any


def unnested(item: Any, read: Callable[[Any], float | tuple[int, float, Any, Any]]) -> Tree:
    """A tree of nested nodes; read(node) is a leaf's value, or (feature, threshold, left node, right node).

    >>> unnested((0, 0.5, 3.0, 4.0), lambda v: v).left
    [1, 1, 2]
    """
    rows: list[list] = []

    def put(item: Any) -> int:
        at, found = len(rows), read(item)
        if isinstance(found, tuple):
            rows.append([*found[:2], 0, 0, 0.0])
            rows[at][2], rows[at][3] = put(found[2]), put(found[3])
        else:
            rows.append([-1, 0.0, at, at, found])
        return at

    put(item)
    return Tree(*map(list, zip(*rows, strict=True)))


def join(
    trees: Sequence[Tree], output: Sequence[int], base: Any, features: int, *, strict: bool = False, dtype: str = "float64"
) -> Forest:
    """The forest of `trees`, each adding to its `output`.

    Raises: LoweringError if a threshold is not finite: that split asks whether a value is missing, which a port can't say.

    >>> stump = Tree([0, -1, -1], [0.5, 0, 0], [1, 0, 0], [2, 0, 0], [0, 3.0, 4.0])
    >>> scores(join([stump, stump], [0, 0], [1.0], 1), np.array([[0.5], [0.6]])).tolist()
    [[7.0], [9.0]]
    """
    parts: list[list[np.ndarray]] = [[] for _ in Tree._fields]
    sizes = [len(tree.feature) for tree in trees]
    starts = np.cumsum([0, *sizes])[:-1].astype(np.int32)
    for start, tree in zip(starts, trees, strict=True):
        feature = np.asarray(tree.feature, np.int32)
        own, leaf = np.arange(len(feature)), feature < 0
        inner = (np.where(leaf, own, np.asarray(v, np.int64)) + start for v in (tree.left, tree.right))
        threshold, value = (np.asarray(v, np.float64) for v in (tree.threshold, tree.value))
        columns = (np.where(leaf, -1, feature), np.where(leaf, 0.0, threshold), *inner, np.where(leaf, value, 0.0))
        for part, column in zip(parts, columns, strict=True):
            part.append(column)
    feature, threshold, left, right, value = (np.concatenate(p) if p else np.zeros(0) for p in parts)
    forest = Forest(
        feature.astype(np.int32), threshold, left.astype(np.int32), right.astype(np.int32), value, starts,
        np.asarray(output, np.int32), np.atleast_1d(np.asarray(base, np.float64)), int(features), strict, dtype,
    )  # fmt: skip
    return _checked(forest)


def _checked(forest: Forest) -> Forest:
    inner = forest.feature >= 0
    for kind in ("left", "right"):
        child = getattr(forest, kind)
        bad = (child < 0) | (child >= len(forest.feature)) | (inner & (child <= np.arange(len(child))))
        if bad.any():
            j = int(np.flatnonzero(bad)[0])
            raise DataError(f"node {j}: its {kind} child is {child[j]}, expected a later node below {len(forest.feature)}")
    if (forest.feature >= forest.features).any():
        raise DataError(f"a node asks for feature {forest.feature.max()}, the model has {forest.features} (from 0)")
    if len(forest.output) and not 0 <= forest.output.min() <= forest.output.max() < len(forest.base):
        raise DataError(f"trees add to outputs {forest.output.min()} to {forest.output.max()}, there are {len(forest.base)}")
    if not np.isfinite(forest.threshold).all():
        j = int(np.flatnonzero(~np.isfinite(forest.threshold))[0])
        raise LoweringError(
            f"node {j}: the split of feature {forest.feature[j]} at {forest.threshold[j]} asks whether the value is missing; a "
            "fixed-point port has no NaN: fill in the missing values and train again"
        )
    if not (np.isfinite(forest.value).all() and np.isfinite(forest.base).all()):
        raise DataError("a leaf or the base score holds NaN or infinity; check the model")
    return forest


def leaves(forest: Forest, x: np.ndarray) -> np.ndarray:
    """The leaf that every sample reaches in every tree: int32 (N, trees), indices of nodes.

    x: (N, features), finite; it is rounded to `forest.dtype` first, as the library does.
    Raises: DataError for another shape, NaN or infinity.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] != forest.features:
        raise DataError(f"the forest takes (N, {forest.features}), got an array of shape {x.shape}")
    if not np.isfinite(x).all():
        raise DataError("x holds NaN or infinity, which no fixed-point port can take; fill in missing values")
    x = x.astype(forest.dtype).astype(np.float64)
    step = max(_AT_ONCE // max(len(forest.root), 1), 1)
    parts = [_walk(forest, x[start : start + step]) for start in range(0, len(x), step)]
    return np.concatenate(parts) if parts else np.zeros((0, len(forest.root)), np.int32)


def _walk(forest: Forest, x: np.ndarray) -> np.ndarray:
    at = np.broadcast_to(forest.root, (len(x), len(forest.root)))
    rows = np.arange(len(x))[:, None]
    while (forest.feature[at] >= 0).any():
        seen, limit = x[rows, forest.feature[at]], forest.threshold[at]
        at = np.where(seen < limit if forest.strict else seen <= limit, forest.left[at], forest.right[at])
    return np.asarray(at, np.int32)


def scores(forest: Forest, x: np.ndarray) -> np.ndarray:
    """The raw margins, float64 (N, outputs): base + sum of leaves.  x and errors: `leaves`.

    A quantized forest's are exact: multiples of its leaves' step, whatever the order of summation.
    """
    reached = forest.value[leaves(forest, x)]
    adds = (forest.output[:, None] == np.arange(len(forest.base))).astype(np.float64)
    return reached @ adds + forest.base


def heights(forest: Forest) -> np.ndarray:
    """Splits on the longest way from each node to a leaf, int64 (nodes,)."""
    height = np.zeros(len(forest.feature), np.int64)
    for j in np.flatnonzero(forest.feature >= 0)[::-1]:  # children come behind their parents
        height[j] = 1 + max(height[forest.left[j]], height[forest.right[j]])
    return height


def depth(forest: Forest) -> int:
    """Splits on the longest way from a root to a leaf."""
    return int(heights(forest)[forest.root].max(initial=0))


def read_bytes(path: Any, others: str) -> bytes:
    """The bytes of a file.  Raises: DataError if it is none; others: what the caller takes besides a path."""
    if not isinstance(path, str | os.PathLike):
        raise DataError(f"got a {type(path).__name__}, expected a path, {others}")
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file")
    return Path(path).read_bytes()
