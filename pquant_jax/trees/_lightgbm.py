"""LightGBM's models as a `Forest`: text, JSON dump, or the live object.  Nothing of LightGBM is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.trees._forest import Forest, Tree, join, read_bytes, unnested

_CATEGORY, _DEFAULT_LEFT = 1, 2  # bits of decision_type; those of weight 4 and 8 say what counts as missing
_ZERO: Final = 1
_MISSING: Final = {"None": 0, "Zero": _ZERO, "NaN": 2}
_TINY: Final = float(np.float32(1e-35))  # what lies between -_TINY and _TINY is read as 0
_INFINITE: Final = 1e300  # LightGBM writes infinity so: the split asks whether the value is missing


def from_lightgbm(model: Any) -> Forest:
    """The forest of a LightGBM model; its scores are `predict(x, raw_score=True)`, of boosting_type="rf" the sum, not the mean.

    model: path of the text that `save_model` wrote or of the JSON of `dump_model()`, that text or dictionary itself, a
    `Booster`, or an `LGBMClassifier` or `LGBMRegressor` (its best iteration if it stopped early).  LightGBM compares
    x <= threshold in float64.
    Raises: DataError for a text that is none; LoweringError for categorical splits, linear trees, splits on missing values,
    and a forest where 0 counts as missing and goes elsewhere than numbers beside it.
    """
    model = _read(model)
    try:
        if isinstance(model, Mapping):
            about, trees = model, [_nested(tree, j) for j, tree in enumerate(model["tree_info"])]
        else:
            head, *blocks = model.split("\nend of trees")[0].split("\nTree=")
            about, trees = _fields(head), [_tree(_fields(block), j) for j, block in enumerate(blocks)]
        each, features = int(about["num_tree_per_iteration"]), int(about["max_feature_idx"]) + 1
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"this is no model of LightGBM ({type(error).__name__}: {error}): its text begins with 'tree'; write it with "
            "save_model('m.txt')"
        ) from error
    return join(trees, [j % each for j in range(len(trees))], np.zeros(each), features)


def _read(model: Any) -> str | Mapping[str, Any]:
    booster = getattr(model, "booster_", model)
    if hasattr(booster, "model_to_string"):
        return booster.model_to_string()
    if isinstance(model, Mapping) or (isinstance(model, str) and "\n" in model):
        return model
    raw = read_bytes(model, "the text, the dictionary of dump_model(), a Booster or an LGBMModel")
    try:
        text = raw.decode().replace("\r\n", "\n")
        return json.loads(text) if text.lstrip().startswith("{") else text
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{model} is no text ({error}); write it with save_model('m.txt')") from error


def _fields(block: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in block.splitlines() if "=" in line)


def _tree(fields: dict[str, str], number: int) -> Tree:
    def numbers(key: str) -> np.ndarray:
        return np.array(fields.get(key, "").split(), np.float64)

    value = numbers("leaf_value")
    if int(fields.get("is_linear", 0)):
        raise _linear(number)
    if len(value) != int(fields.get("num_leaves", -1)):
        raise DataError(
            f"tree {number} has {len(value)} values for {fields.get('num_leaves')} leaves; the text is cut or changed"
        )
    feature, threshold, kind = numbers("split_feature").astype(int), numbers("threshold"), numbers("decision_type").astype(int)
    threshold = _thresholds(number, threshold, kind)
    inner = len(feature)
    # a child below 0 is the leaf ~child; leaves follow the inner nodes
    left, right = (np.where(c < 0, inner + ~c, c) for c in (numbers(f"{side}_child").astype(int) for side in ("left", "right")))
    pad = np.zeros(len(value), int)
    columns = (np.append(feature, pad - 1), np.append(threshold, pad), np.append(left, pad), np.append(right, pad))
    return Tree(*columns, np.append(np.zeros(inner), value))


def _nested(tree: Mapping[str, Any], number: int) -> Tree:
    """A tree of `dump_model()`."""

    def read(node: Mapping[str, Any]) -> Any:
        if "leaf_value" in node:
            if "leaf_coeff" in node:
                raise _linear(number)
            return float(node["leaf_value"])
        kind = _CATEGORY * (node["decision_type"] != "<=") | _DEFAULT_LEFT * bool(node["default_left"])
        kind |= _MISSING[node["missing_type"]] << 2
        threshold = 0.0 if kind & _CATEGORY else float(node["threshold"])  # of categories it is a list of them
        limit = _thresholds(number, np.array([threshold]), np.array([kind]))
        return int(node["split_feature"]), float(limit[0]), node["left_child"], node["right_child"]

    return unnested(tree["tree_structure"], read)


def _linear(number: int) -> LoweringError:
    return LoweringError(f"tree {number} has linear models at its leaves; train with linear_tree=False")


def _thresholds(number: int, threshold: np.ndarray, kind: np.ndarray) -> np.ndarray:
    """What x is compared with, LightGBM's own zero taken into account."""
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
    threshold = np.where((threshold >= 0) & (threshold < _TINY), _TINY, threshold)
    return np.where((threshold < 0) & (threshold >= -_TINY), np.nextafter(-_TINY, -1), threshold)
