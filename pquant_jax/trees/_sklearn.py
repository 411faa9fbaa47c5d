"""scikit-learn's trees as a `Forest`, from the fitted object alone: nothing of scikit-learn is imported."""

from __future__ import annotations

from typing import Any

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.trees._forest import Forest, Tree, join

_READ = "GradientBoosting, HistGradientBoosting, RandomForest, ExtraTrees and DecisionTree, classifiers and regressors"


def from_sklearn(model: Any) -> Forest:
    """The forest of a fitted scikit-learn model; its scores are

    * `decision_function` of a boosted classifier (one output for two classes, else one per class),
    * `predict_proba` of a random forest or a single tree that classifies (one output per class),
    * `predict` of a regressor, with the logarithm of HistGradientBoosting's poisson and gamma losses left on.

    The model is the live object: its files are pickles, which run the code in them, so loading one is the caller's decision.
    scikit-learn rounds x to float32 and compares x <= threshold in float64; HistGradientBoosting does not round.
    Raises: DataError for another or an unfitted model; LoweringError for categorical splits, splits on missing values,
    several targets, and an `init` estimator that depends on x.
    """
    kinds = {c.__name__ for c in type(model).__mro__}
    if "BaseHistGradientBoosting" in kinds:
        read = _hist
    elif "BaseGradientBoosting" in kinds:
        read = _boosted
    elif {"ForestClassifier", "ForestRegressor"} & kinds:
        read = _forest
    elif "BaseDecisionTree" in kinds:
        read = _single
    else:
        raise DataError(f"got a {type(model).__name__}, expected one of scikit-learn's {_READ}")
    if not hasattr(model, "n_features_in_"):
        raise DataError(f"this {type(model).__name__} is not fitted; call fit(x, y) first")
    if getattr(model, "n_outputs_", 1) != 1:
        raise LoweringError(f"the model has {model.n_outputs_} targets; train one model per target")
    return read(model)


def _tree(tree: Any, value: np.ndarray) -> Tree:
    return Tree(
        np.where(tree.children_left < 0, -1, tree.feature), tree.threshold, tree.children_left, tree.children_right, value
    )


def _boosted(model: Any) -> Forest:
    if model.init_ != "zero" and type(model.init_).__name__ not in ("DummyClassifier", "DummyRegressor"):
        raise LoweringError(
            f"the boosting starts from a {type(model.init_).__name__}, which depends on x; train with init=None or init='zero'"
        )
    base = model._raw_predict_init(np.zeros((1, model.n_features_in_), np.float32))[0]
    trees, output = [], []
    for stage in model.estimators_:
        for k, estimator in enumerate(stage):
            trees.append(_tree(estimator.tree_, model.learning_rate * estimator.tree_.value[:, 0, 0]))
            output.append(k)
    return join(trees, output, base, model.n_features_in_, dtype="float32")


def _hist(model: Any) -> Forest:
    if model.is_categorical_ is not None and np.any(model.is_categorical_):
        raise LoweringError(
            "the model splits on categories, which have no order on a port; encode them as numbers (one column per category) "
            "and train again"
        )
    trees, output = [], []
    for stage in model._predictors:
        for k, predictor in enumerate(stage):
            n = predictor.nodes
            feature = np.where(n["is_leaf"].astype(bool), -1, n["feature_idx"])
            trees.append(Tree(feature, n["num_threshold"], n["left"], n["right"], n["value"]))
            output.append(k)
    return join(trees, output, np.ravel(model._baseline_prediction), model.n_features_in_)


def _forest(model: Any) -> Forest:
    return _averaged(model.estimators_, model)


def _single(model: Any) -> Forest:
    return _averaged([model], model)


def _averaged(estimators: Any, model: Any) -> Forest:
    """A classifier's leaves are vectors: one tree per class and estimator, with the same splits."""
    outputs = len(model.classes_) if hasattr(model, "classes_") else 1
    trees, output = [], []
    for estimator in estimators:
        for k in range(outputs):
            trees.append(_tree(estimator.tree_, estimator.tree_.value[:, 0, k] / len(estimators)))
            output.append(k)
    return join(trees, output, np.zeros(outputs), model.n_features_in_, dtype="float32")
