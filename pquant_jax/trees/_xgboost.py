"""XGBoost's models as a `Forest`: the JSON that `save_model` writes, or the live object.  Nothing of XGBoost is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.trees._forest import Forest, Tree, join

# how `base_score`, which the file holds as a prediction, becomes a margin
_LINKS: Final[dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    **dict.fromkeys(("binary:logistic", "reg:logistic"), lambda p: -np.log(1 / p - 1)),
    **dict.fromkeys(("count:poisson", "reg:gamma", "reg:tweedie", "survival:aft", "survival:cox"), np.log),
    **dict.fromkeys(
        (
            "reg:squarederror", "reg:squaredlogerror", "reg:absoluteerror", "reg:pseudohubererror", "reg:quantileerror",
            "binary:hinge", "binary:logitraw", "multi:softmax", "multi:softprob", "rank:ndcg", "rank:map", "rank:pairwise",
        ),
        lambda p: p,
    ),
}  # fmt: skip


def from_xgboost(model: Any) -> Forest:
    """The forest of an XGBoost model; its scores are `predict(x, output_margin=True)`.

    model: path of a `.json` that `save_model` wrote, what json.load made of it, a `Booster`, or an `XGBClassifier` or
    `XGBRegressor` (its best iteration if it stopped early).  XGBoost rounds x to float32 and asks x < threshold.
    Raises: DataError for a file that is none; LoweringError for categorical splits, linear boosters, trees with vectors at
    their leaves, and an objective whose base score it does not know.
    """
    data = _read(model)
    try:
        learner = data["learner"]
        booster, about = learner["gradient_booster"], learner["learner_model_param"]
        objective = learner["objective"]["name"]
        kind = booster["name"]
        if kind not in ("gbtree", "dart"):
            raise LoweringError(f"the booster is {kind!r}, which has no trees; train with booster='gbtree' or 'dart'")
        made = (booster["gbtree"] if kind == "dart" else booster)["model"]
        drop = booster["weight_drop"] if kind == "dart" else [1.0] * len(made["trees"])
        trees = [_tree(t, np.float32(w), j) for j, (t, w) in enumerate(zip(made["trees"], drop, strict=True))]
        outputs = max(int(about["num_class"]), int(about.get("num_target", 1)), 1)
        base = _base(about["base_score"], objective, outputs)
        return join(trees, made["tree_info"], base, int(about["num_feature"]), strict=True, dtype="float32")
    except (KeyError, TypeError) as error:
        raise DataError(f"no model of XGBoost ({type(error).__name__}: {error}); write it with save_model('m.json')") from error


def _read(model: Any) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    if hasattr(model, "get_booster"):
        booster = model.get_booster()
        last = getattr(model, "early_stopping_rounds", None) is not None and booster.attr("best_iteration")
        model = booster[: int(last) + 1] if last else booster
    if hasattr(model, "save_raw"):
        return json.loads(bytes(model.save_raw(raw_format="json")))
    if not isinstance(model, str | os.PathLike):
        raise DataError(f"got a {type(model).__name__}, expected a path, a dictionary, a Booster or an XGBModel")
    raw = Path(model).read_bytes() if Path(model).is_file() else None
    if raw is None:
        raise DataError(f"{model} is not a file")
    try:
        return json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{model} is no JSON ({error}); load the model in XGBoost and save_model('m.json'), whose name makes it JSON"
        ) from error


def _tree(tree: Mapping[str, Any], weight: np.float32, number: int) -> Tree:
    if int(tree["tree_param"].get("size_leaf_vector", 1)) > 1:
        raise LoweringError(f"tree {number} has vectors at its leaves; train with multi_strategy='one_output_per_tree'")
    if np.any(tree.get("split_type", 0)) or tree.get("categories"):
        raise LoweringError(
            f"tree {number} splits on categories, which have no order on a port; encode them as numbers and train again"
        )
    left = np.asarray(tree["left_children"], np.int64)
    condition = np.asarray(tree["split_conditions"], np.float64).astype(np.float32)  # of a leaf its value
    feature = np.where(left < 0, -1, tree["split_indices"])
    value = (condition * weight).astype(np.float64)
    return _in_order(Tree(feature, condition.astype(np.float64), left, np.asarray(tree["right_children"], np.int64), value))


def _in_order(tree: Tree) -> Tree:
    """Without nodes that pruning left behind, parents in front of their children."""
    order = [0]
    for j in order:
        if tree.feature[j] >= 0:
            order += [int(tree.left[j]), int(tree.right[j])]
    place = np.zeros(len(tree.feature), np.int64)
    place[order] = np.arange(len(order))
    left, right = (np.where(tree.feature[order] < 0, 0, place[v[order]]) for v in (tree.left, tree.right))
    return Tree(tree.feature[order], tree.threshold[order], left, right, tree.value[order])


def _base(text: Any, objective: str, outputs: int) -> np.ndarray:
    if objective not in _LINKS:
        raise LoweringError(f"the objective {objective!r} has an unknown base score; known: {', '.join(sorted(_LINKS))}")
    found = np.atleast_1d(np.asarray(json.loads(str(text)), np.float64)).astype(np.float32)
    return np.broadcast_to(_LINKS[objective](found.astype(np.float64)), (outputs,))
