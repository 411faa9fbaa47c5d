"""XGBoost's models as a `Forest`: JSON, a dump, or the live object.  XGBoost is imported for UBJSON alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError, LoweringError, ToolError
from pquant_jax.trees._forest import Forest, Tree, join, read_bytes, unnested

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


_CATEGORIES: Final = "asks for categories, which have no order on a port; encode them as numbers and train again"


def from_xgboost(model: Any, *, base_margin: Any = None, features: int | Sequence[str] | None = None) -> Forest:
    """The forest of an XGBoost model; its scores are `predict(x, output_margin=True)`.

    model: path of what `save_model` wrote (JSON or UBJSON), what json.load made of it, a `Booster`, an `XGBClassifier` or
    `XGBRegressor` (its best iteration if it stopped early), or a dump: what `get_dump(dump_format="json")` gives or
    `dump_model(..., dump_format="json")` writes.  XGBoost rounds x to float32 and asks x < threshold.
    base_margin, features: what a dump leaves out and nothing else needs.  A margin (not a probability) per output, among
    which the trees take turns, and how many features there are, or their names in the order of x.  A dump has neither the
    weights of dart nor num_parallel_tree: take save_model's file for those.
    Raises: DataError for a file that is none; LoweringError for categorical splits, linear boosters, trees with vectors at
    their leaves, and an objective whose base score it does not know; ToolError for UBJSON without a package that reads it.
    """
    data = _read(model)
    try:
        if isinstance(data, Sequence):
            return _dumped(data, base_margin, features)
        if base_margin is not None or features is not None:
            raise DataError("base_margin and features are for a dump; this model has its own, leave them out")
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
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"no model of XGBoost ({type(error).__name__}: {error}); write it with save_model('m.json')") from error


def _read(model: Any) -> Mapping[str, Any] | Sequence[Any]:
    if isinstance(model, Mapping):
        return model
    if isinstance(model, list | tuple):
        return [_parsed(tree.encode(), "a tree of the dump") if isinstance(tree, str) else tree for tree in model]
    if hasattr(model, "get_booster"):
        booster = model.get_booster()
        last = getattr(model, "early_stopping_rounds", None) is not None and booster.attr("best_iteration")
        model = booster[: int(last) + 1] if last else booster
    if hasattr(model, "save_raw"):
        return json.loads(bytes(model.save_raw(raw_format="json")))
    raw = read_bytes(model, "a dictionary, a dump, a Booster or an XGBModel")
    if raw[:1] == b"{" and raw[1:2] in b"iUIlL$#":  # a key of JSON begins with a quote, one of UBJSON with its length
        return _unpacked(raw, model)
    return _parsed(raw, str(model))


def _parsed(raw: bytes, what: str) -> Any:
    try:
        return json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        hint = "load the model in XGBoost and save_model('m.json'), whose name makes it JSON; a dump needs dump_format='json'"
        raise DataError(f"{what} is no JSON ({error}); {hint}") from error


def _unpacked(raw: bytes, path: Any) -> Mapping[str, Any]:
    """UBJSON by the first package that is there."""
    for name, load in (
        ("xgboost", lambda package: json.loads(bytes(package.Booster(model_file=bytearray(raw)).save_raw(raw_format="json")))),
        ("ubjson", lambda package: package.loadb(raw, no_bytes=True)),
    ):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            return load(importlib.import_module(name))
        except Exception as error:  # both packages have their own
            first = str(error).strip().splitlines()[:1]
            raise DataError(f"{path} is no JSON, and no UBJSON that {name} reads ({type(error).__name__}: {first})") from error
    raise ToolError(
        f"{path} is UBJSON, which takes a package to read: `pip install xgboost-cpu` or `pip install py-ubjson`; or write JSON "
        "where the model is, save_model('m.json')"
    )


def _dumped(trees: Sequence[Any], base_margin: Any, features: int | Sequence[str] | None) -> Forest:
    missing = [name for name, v in (("base_margin", base_margin), ("features", features)) if v is None]
    if missing or features is None:
        raise DataError(
            "a dump of XGBoost has neither base score nor number of features: "
            f"give {' and '.join(missing)}, or take what save_model('m.json') writes"
        )
    base = np.atleast_1d(np.asarray(base_margin, np.float64))
    if base.ndim != 1 or len(trees) % len(base):
        raise DataError(f"{len(trees)} trees can't take turns among the outputs of base_margin, an array of shape {base.shape}")
    names = [f"f{j}" for j in range(features)] if isinstance(features, int) else list(features)
    place = {name: j for j, name in enumerate(names)}

    def read(node: Mapping[str, Any]) -> Any:
        if "leaf" in node:
            if isinstance(node["leaf"], list):
                raise LoweringError("a leaf is a vector; train with multi_strategy='one_output_per_tree'")
            return float(np.float32(node["leaf"]))
        if "split_condition" not in node and "split" in node:
            raise DataError(f"a split of {node['split']!r} has no threshold: an indicator; take what save_model('m.json') writes")
        if isinstance(node.get("split_condition"), list):
            raise LoweringError(f"a split of {node['split']!r} {_CATEGORIES}")
        if node["split"] not in place:
            raise DataError(
                f"the dump asks for feature {node['split']!r}, features are {', '.join(names[:4])}{' ...' * (len(names) > 4)}; "
                "give their number if they are f0, f1 ..., else the list of their names in the order of x"
            )
        child = {c["nodeid"]: c for c in node["children"]}
        return place[node["split"]], float(np.float32(node["split_condition"])), child[node["yes"]], child[node["no"]]

    made = [unnested(tree, read) for tree in trees]
    return join(made, [j % len(base) for j in range(len(made))], base, len(names), strict=True, dtype="float32")


def _tree(tree: Mapping[str, Any], weight: np.float32, number: int) -> Tree:
    if int(tree["tree_param"].get("size_leaf_vector", 1)) > 1:
        raise LoweringError(f"tree {number} has vectors at its leaves; train with multi_strategy='one_output_per_tree'")
    if np.any(tree.get("split_type", 0)) or tree.get("categories"):
        raise LoweringError(f"tree {number} {_CATEGORIES}")
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
