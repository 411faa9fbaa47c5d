"""LightGBM's models as a `Forest`: the text that `save_model` writes, or the live object.  Nothing of LightGBM is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.trees._forest import Forest, Tree, join

_CATEGORY, _DEFAULT_LEFT = 1, 2  # bits of decision_type; those of weight 4 and 8 say what counts as missing
_ZERO: Final = 1
_TINY: Final = float(np.float32(1e-35))  # what lies between -_TINY and _TINY is read as 0
_INFINITE: Final = 1e300  # LightGBM writes infinity so: the split asks whether the value is missing


def from_lightgbm(model: Any) -> Forest:
    """The forest of a LightGBM model; its scores are `predict(x, raw_score=True)`, of boosting_type="rf" the sum, not the mean.

    model: path of the text that `save_model` wrote, that text itself, a `Booster`, or an `LGBMClassifier` or `LGBMRegressor`
    (its best iteration if it stopped early).  LightGBM compares x <= threshold in float64.
    Raises: DataError for a text that is none; LoweringError for categorical splits, linear trees, splits on missing values,
    and a forest where 0 counts as missing and goes elsewhere than numbers beside it.
    """
    text = _read(model)
    head, *blocks = text.split("\nend of trees")[0].split("\nTree=")
    about = _fields(head)
    if not head.startswith("tree\n") or "num_tree_per_iteration" not in about:
        raise DataError("this is no model of LightGBM: its text begins with 'tree'; write it with save_model('m.txt')")
    each = int(about["num_tree_per_iteration"])
    trees = [_tree(_fields(block), j) for j, block in enumerate(blocks)]
    return join(trees, [j % each for j in range(len(trees))], np.zeros(each), int(about["max_feature_idx"]) + 1)


def _read(model: Any) -> str:
    booster = getattr(model, "booster_", model)
    if hasattr(booster, "model_to_string"):
        return booster.model_to_string()
    if isinstance(model, str) and "\n" in model:
        return model
    if not isinstance(model, str | os.PathLike):
        raise DataError(f"got a {type(model).__name__}, expected a path, the text, a Booster or an LGBMModel")
    if not Path(model).is_file():
        raise DataError(f"{model} is not a file")
    try:
        return Path(model).read_text()
    except UnicodeDecodeError as error:
        raise DataError(f"{model} is no text ({error}); write it with save_model('m.txt')") from error


def _fields(block: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in block.splitlines() if "=" in line)


def _tree(fields: dict[str, str], number: int) -> Tree:
    def numbers(key: str) -> np.ndarray:
        return np.array(fields.get(key, "").split(), np.float64)

    value = numbers("leaf_value")
    if int(fields.get("is_linear", 0)):
        raise LoweringError(f"tree {number} has linear models at its leaves; train with linear_tree=False")
    if len(value) != int(fields.get("num_leaves", -1)):
        raise DataError(
            f"tree {number} has {len(value)} values for {fields.get('num_leaves')} leaves; the text is cut or changed"
        )
    feature, threshold, kind = numbers("split_feature").astype(int), numbers("threshold"), numbers("decision_type").astype(int)
    _check_splits(number, threshold, kind)
    threshold = np.where((threshold >= 0) & (threshold < _TINY), _TINY, threshold)
    threshold = np.where((threshold < 0) & (threshold >= -_TINY), np.nextafter(-_TINY, -1), threshold)
    inner = len(feature)
    # a child below 0 is the leaf ~child; leaves follow the inner nodes
    left, right = (np.where(c < 0, inner + ~c, c) for c in (numbers(f"{side}_child").astype(int) for side in ("left", "right")))
    pad = np.zeros(len(value), int)
    columns = (np.append(feature, pad - 1), np.append(threshold, pad), np.append(left, pad), np.append(right, pad))
    return Tree(*columns, np.append(np.zeros(inner), value))


def _check_splits(number: int, threshold: np.ndarray, kind: np.ndarray) -> None:
    if (kind & _CATEGORY).any():
        raise LoweringError(
            f"tree {number} splits on categories, which have no order on a port; encode them as numbers and train again"
        )
    missing = (kind >> 2) & 3
    elsewhere = (missing == _ZERO) & (((kind & _DEFAULT_LEFT) > 0) != (threshold >= 0))
    if elsewhere.any():
        raise LoweringError(
            f"tree {number}: 0 counts as missing there, and goes the other way than the numbers beside it; train with "
            "zero_as_missing=False"
        )
    if (np.abs(threshold) >= _INFINITE).any():
        raise LoweringError(
            f"tree {number} asks whether a value is missing; a fixed-point port has no NaN: fill in the missing values and "
            "train again"
        )
