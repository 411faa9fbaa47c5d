"""Forests read from scikit-learn, XGBoost and LightGBM: the same leaf for every sample, the margin of the library."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from pquant_jax._errors import DataError, LoweringError, ToolError
from pquant_jax.trees import Forest, depth, from_lightgbm, from_sklearn, from_xgboost, leaves, load, scores

HERE = Path(__file__).parent


def on_the_edge(forest: Forest, dtype: type, n: int = 400) -> np.ndarray:
    """Random samples of which every number is a threshold of its feature, or its neighbour in `dtype` on either side."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(n, forest.features)).astype(dtype)
    for j in range(forest.features):
        own = forest.threshold[forest.feature == j].astype(dtype)
        if len(own):
            near = rng.choice(np.concatenate([own, np.nextafter(own, dtype(-9)), np.nextafter(own, dtype(9))]), n)
            x[:, j] = np.where(rng.random(n) < 0.8, near, x[:, j])
    return x


def samples(seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 5))
    return x, (np.digitize(x[:, 0] + x[:, 1] * x[:, 2], [-0.4, 0.5][: classes - 1])).astype(int)


def sklearn_models():
    from sklearn import ensemble, tree

    fit = dict(n_estimators=4, max_depth=3, random_state=0)
    return {
        "boosted_3": (ensemble.GradientBoostingClassifier(**fit), 3, "decision_function"),
        "boosted_2": (ensemble.GradientBoostingClassifier(**fit, init="zero"), 2, "decision_function"),
        "boosted": (ensemble.GradientBoostingRegressor(**fit), 0, "predict"),
        "hist_3": (ensemble.HistGradientBoostingClassifier(max_iter=4, max_leaf_nodes=6), 3, "decision_function"),
        "hist_2": (ensemble.HistGradientBoostingClassifier(max_iter=4, max_leaf_nodes=6), 2, "decision_function"),
        "hist": (ensemble.HistGradientBoostingRegressor(max_iter=4, max_leaf_nodes=6), 0, "predict"),
        "forest_3": (ensemble.RandomForestClassifier(**fit), 3, "predict_proba"),
        "forest": (ensemble.RandomForestRegressor(**fit), 0, "predict"),
        "extra_2": (ensemble.ExtraTreesClassifier(**fit), 2, "predict_proba"),
        "tree_3": (tree.DecisionTreeClassifier(max_depth=4), 3, "predict_proba"),
        "tree": (tree.DecisionTreeRegressor(), 0, "predict"),
    }


@pytest.mark.parametrize("name", ["boosted_3", "boosted_2", "boosted", "hist_3", "hist_2", "hist", "forest_3", "forest",
                                  "extra_2", "tree_3", "tree"])  # fmt: skip
def test_scikit_learn(name):
    pytest.importorskip("sklearn")
    model, classes, method = sklearn_models()[name]
    x, y = samples(classes=classes or 3)
    model.fit(x, y if classes else x[:, 0] ** 2 + x[:, 1])
    forest = from_sklearn(model)
    assert forest.strict is False and forest.dtype == ("float64" if name.startswith("hist") else "float32")
    for v in (x, x.astype(np.float32), on_the_edge(forest, np.float64), on_the_edge(forest, np.float32)):
        expected = getattr(model, method)(v).reshape(len(v), -1)
        np.testing.assert_allclose(scores(forest, v), expected, rtol=1e-12, atol=1e-12)
    if hasattr(model, "apply"):  # the very same leaves, numbered within each tree
        v = on_the_edge(forest, np.float64)
        theirs = np.asarray(model.apply(v)).reshape(len(v), -1)
        ours = (leaves(forest, v) - forest.root)[:, :: 1 if name.startswith("boosted") else len(forest.base)]
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["xgboost_5", "xgboost_2", "lightgbm_5", "lightgbm_2"])
def test_dumps_without_the_libraries(name):
    """Recorded answers; see make_dumps.py."""
    recorded = np.load(HERE / "margins.npz")
    path = HERE / (name + (".json" if name.startswith("xgboost") else ".txt"))
    forest = (from_xgboost if name.startswith("xgboost") else from_lightgbm)(path)
    assert len(forest.base) == (5 if name.endswith("5") else 1) and len(forest.root) == 2 * len(forest.base)
    assert (forest.strict, forest.dtype) == ((True, "float32") if name.startswith("xgboost") else (False, "float64"))
    expected = recorded[name].reshape(len(recorded["x"]), -1)
    np.testing.assert_allclose(scores(forest, recorded["x"]), expected, rtol=1e-6, atol=1e-6)
    text = path.read_text()
    again = from_xgboost(json.loads(text)) if name.startswith("xgboost") else from_lightgbm(text)
    np.testing.assert_array_equal(again.threshold, forest.threshold)


def same_scores(forest: Forest, other: Forest) -> None:
    """Bit for bit: thresholds and leaves are the same numbers, in another order of nodes."""
    x = np.concatenate([np.load(HERE / "margins.npz")["x"], on_the_edge(other, np.float32)])
    np.testing.assert_array_equal(scores(forest, x), scores(other, x))
    for field in ("threshold", "value"):
        np.testing.assert_array_equal(np.sort(getattr(forest, field)), np.sort(getattr(other, field)))
    assert (forest.strict, forest.dtype, forest.features) == (other.strict, other.dtype, other.features)


def test_xgboost_nested_dumps():
    saved = from_xgboost(HERE / "xgboost_5.json")
    about = dict(base_margin=saved.base, features=16)
    trees = json.loads((HERE / "xgboost_5_dump.json").read_text())
    for model in (HERE / "xgboost_5_dump.json", trees, [json.dumps(tree) for tree in trees]):
        same_scores(from_xgboost(model, **about), saved)
    same_scores(load(HERE / "xgboost_5_dump.json", **about), saved)
    names = [f"x{j}" for j in range(16)]
    named = json.loads(json.dumps(trees).replace('"split": "f', '"split": "x'))
    same_scores(from_xgboost(named, base_margin=saved.base, features=names), saved)
    with pytest.raises(DataError, match="asks for feature 'x.*', features are f0, f1, f2, f3 ...; give their number"):
        from_xgboost(named, **about)
    with pytest.raises(DataError, match="neither base score nor number of features: give base_margin and features, or"):
        from_xgboost(trees)
    with pytest.raises(DataError, match="give base_margin, or"):
        from_xgboost(trees, features=16)
    with pytest.raises(DataError, match="10 trees can't take turns among the outputs of base_margin, an array of shape .3,"):
        from_xgboost(trees, base_margin=[0.0] * 3, features=16)
    with pytest.raises(DataError, match="are for a dump"):
        from_xgboost(HERE / "xgboost_5.json", **about)
    with pytest.raises(DataError, match="dump_format='json'"):
        from_xgboost(["0:[f0<0.5] yes=1,no=2,missing=2"], **about)
    stump = {"nodeid": 0, "split": "f0", "split_condition": [1, 3], "yes": 1, "no": 2, "children": []}
    with pytest.raises(LoweringError, match="split of 'f0' asks for categories"):
        from_xgboost([stump], base_margin=0.0, features=1)
    with pytest.raises(LoweringError, match="vector"):
        from_xgboost([{"nodeid": 0, "leaf": [1.0, 2.0]}], base_margin=0.0, features=1)
    with pytest.raises(DataError, match="split of 'b' has no threshold: an indicator"):
        from_xgboost([{"nodeid": 0, "split": "b", "yes": 1, "no": 2}], base_margin=0.0, features=["b"])
    with pytest.raises(DataError, match="no model of XGBoost .KeyError: 'children'"):
        from_xgboost([{"nodeid": 0, "split": "f0", "split_condition": 1.0}], base_margin=0.0, features=1)


def test_xgboost_ubjson(monkeypatch):
    """Through whichever package is there; without one the error says how to get JSON."""
    saved = from_xgboost(HERE / "xgboost_5.json")
    path = HERE / "xgboost_5.ubj"
    calls = []

    def loadb(raw: bytes, *, no_bytes: bool) -> dict:
        calls.append((raw, no_bytes))
        return json.loads((HERE / "xgboost_5.json").read_text())

    find = importlib.util.find_spec
    here = {"ubjson": types.SimpleNamespace(loadb=loadb)}
    with monkeypatch.context() as without:
        without.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("xgboost", "ubjson") else find(name, *a))
        with pytest.raises(ToolError, match=r"xgboost_5.ubj is UBJSON.*pip install xgboost-cpu.*save_model\('m.json'\)"):
            from_xgboost(path)
        without.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xgboost" else here.get(name))
        without.setitem(sys.modules, "ubjson", here["ubjson"])
        same_scores(from_xgboost(path), saved)
        assert calls == [(path.read_bytes(), True)]
    pytest.importorskip("xgboost")
    same_scores(from_xgboost(path), saved)
    same_scores(load(path), saved)


def test_lightgbm_dump_model(tmp_path):
    saved = from_lightgbm(HERE / "lightgbm_5.txt")
    dump = json.loads((HERE / "lightgbm_5.json").read_text())
    for forest in (from_lightgbm(HERE / "lightgbm_5.json"), from_lightgbm(dump), load(HERE / "lightgbm_5.json")):
        same_scores(forest, saved)
    same_scores(load(HERE / "lightgbm_5.txt"), saved)

    def stump(**changes):
        leaves = {"left_child": {"leaf_index": 0, "leaf_value": 1.0}, "right_child": {"leaf_index": 1, "leaf_value": 2.0}}
        split = {"split_feature": 0, "threshold": 0.5, "decision_type": "<=", "default_left": True, "missing_type": "None"}
        tree = {"tree_structure": {**split, **leaves, **changes}}
        return {"num_tree_per_iteration": 1, "max_feature_idx": 0, "tree_info": [tree]}

    edges = np.array([[0.0], [1e-36], [-1e-36], [1.0], [-1.0]])
    assert scores(from_lightgbm(stump(threshold=0.0)), edges).ravel().tolist() == [1, 1, 1, 2, 1]
    assert scores(from_lightgbm(stump(threshold=-1e-36)), edges).ravel().tolist() == [2, 2, 2, 2, 1]
    for changes, words in (
        ({"decision_type": "==", "threshold": "1||3"}, "categories"),
        ({"missing_type": "Zero", "default_left": False}, "0 counts as missing"),
        ({"threshold": 1e300}, "missing"),
        ({"left_child": {"leaf_value": 1.0, "leaf_coeff": [0.5]}}, "linear"),
    ):
        with pytest.raises(LoweringError, match=words):
            from_lightgbm(stump(**changes))
    with pytest.raises(DataError, match="no model of LightGBM .KeyError: .Odd"):
        from_lightgbm(stump(missing_type="Odd"))


def test_load_tells_files_by_their_content(tmp_path):
    for name, words in (("a pickle", b"\x80\x04"), ("no JSON", b"nonsense"), ("no model of XGBoost", b"{}"), ("no JSON", b"")):
        (tmp_path / "m").write_bytes(words)
        with pytest.raises(DataError, match=name):
            load(tmp_path / "m")
    same_scores(load(HERE / "xgboost_2.json"), from_xgboost(HERE / "xgboost_2.json"))


OBJECTIVES = ["binary:logistic", "binary:logitraw", "reg:logistic", "count:poisson", "reg:gamma", "reg:tweedie", "survival:aft",
              "survival:cox", "reg:squarederror", "reg:squaredlogerror", "reg:absoluteerror", "reg:pseudohubererror",
              "binary:hinge", "rank:pairwise"]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_xgboost_base_scores(objective):
    xgboost = pytest.importorskip("xgboost")
    x, y = samples(classes=2)
    y = y if objective.split(":")[0] in ("binary", "rank") or "logistic" in objective else y + 0.5
    matrix = xgboost.DMatrix(x, y)
    if objective == "survival:aft":
        matrix.set_float_info("label_lower_bound", y)
        matrix.set_float_info("label_upper_bound", y + 1)
    if objective.startswith("rank"):
        matrix.set_group([100, 200])
    for extra in ({}, {"base_score": 0.3}):
        booster = xgboost.train({"objective": objective, "max_depth": 2, "nthread": 1, **extra}, matrix, 2)
        theirs = booster.predict(xgboost.DMatrix(x), output_margin=True)
        np.testing.assert_allclose(scores(from_xgboost(booster), x)[:, 0], theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "extra", [{}, {"booster": "dart", "rate_drop": 0.5}, {"num_parallel_tree": 2, "subsample": 0.5}], ids=str
)
def test_xgboost_paths_at_the_thresholds(extra):
    xgboost = pytest.importorskip("xgboost")
    x, y = samples()
    model = xgboost.XGBClassifier(n_estimators=4, max_depth=4, n_jobs=1, **extra).fit(x, y)
    forest = from_xgboost(model)
    for v in (on_the_edge(forest, np.float32), on_the_edge(forest, np.float64)):
        theirs = model.get_booster().predict(xgboost.DMatrix(v), output_margin=True)
        np.testing.assert_allclose(scores(forest, v), theirs, rtol=1e-5, atol=1e-5)


def test_xgboost_stops_early():
    xgboost = pytest.importorskip("xgboost")
    x, y = samples()
    flipped = np.random.default_rng(0).permutation(y)
    model = xgboost.XGBClassifier(n_estimators=30, max_depth=4, n_jobs=1, early_stopping_rounds=2)
    model.fit(x, y, eval_set=[(x, flipped)], verbose=False)
    np.testing.assert_allclose(scores(from_xgboost(model), x), model.predict(x, output_margin=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [{}, {"boosting_type": "rf", "subsample": 0.5, "subsample_freq": 1}, {"max_depth": 2}], ids=str)
def test_lightgbm_paths_at_the_thresholds(extra):
    lightgbm = pytest.importorskip("lightgbm")
    x, y = samples()
    model = lightgbm.LGBMClassifier(n_estimators=4, min_child_samples=5, verbose=-1, n_jobs=1, **extra).fit(x, y)
    forest = from_lightgbm(model)
    for v in (on_the_edge(forest, np.float64), on_the_edge(forest, np.float32)):
        np.testing.assert_allclose(scores(forest, v), model.booster_.predict(v, raw_score=True), rtol=1e-12, atol=1e-12)


def test_lightgbm_where_zero_is_missing():
    """Only a model that sends 0 elsewhere than its neighbours is refused."""
    text = (HERE / "lightgbm_2.txt").read_text()
    assert "decision_type=2 " in text
    marked = text.replace("decision_type=2", "decision_type=6")  # missing: zero, default: left
    assert "threshold=-" in marked or " -" in marked
    with pytest.raises(LoweringError, match="0 counts as missing"):
        from_lightgbm(marked)
    stump = "tree\nnum_tree_per_iteration=1\nmax_feature_idx=0\n\nTree=0\nnum_leaves=2\nsplit_feature=0\nthreshold=0.5\n" \
        "decision_type={}\nleft_child=-1\nright_child=-2\nleaf_value=1 2\nis_linear=0\n"  # fmt: skip
    assert scores(from_lightgbm(stump.format(6)), np.array([[0.0], [1.0]])).tolist() == [[1.0], [2.0]]
    with pytest.raises(LoweringError, match="0 counts as missing"):
        from_lightgbm(stump.format(4))
    with pytest.raises(LoweringError, match="categories"):
        from_lightgbm(stump.format(1))
    with pytest.raises(LoweringError, match="linear"):
        from_lightgbm(stump.format(2).replace("is_linear=0", "is_linear=1"))
    with pytest.raises(LoweringError, match="missing"):
        from_lightgbm(stump.format(10).replace("threshold=0.5", "threshold=1.0000000000000001e+300"))
    with pytest.raises(DataError, match="cut"):
        from_lightgbm(stump.format(2).replace("num_leaves=2", "num_leaves=3"))


def test_scikit_learn_refuses_what_hardware_lacks():
    pytest.importorskip("sklearn")
    from sklearn import ensemble, linear_model, tree

    x, y = samples(classes=2)
    with pytest.raises(DataError, match="not fitted"):
        from_sklearn(tree.DecisionTreeClassifier())
    for wrong in (ensemble.AdaBoostClassifier(n_estimators=2).fit(x, y), linear_model.LinearRegression().fit(x, y), 3):
        with pytest.raises(DataError, match="expected one of"):
            from_sklearn(wrong)
    with pytest.raises(LoweringError, match="2 targets"):
        from_sklearn(tree.DecisionTreeRegressor(max_depth=2).fit(x, x[:, :2]))
    with pytest.raises(LoweringError, match="categories"):
        z = np.concatenate([np.random.default_rng(0).integers(0, 5, (300, 1)), x], 1)
        from_sklearn(ensemble.HistGradientBoostingClassifier(max_iter=2, categorical_features=[0]).fit(z, y))
    with pytest.raises(LoweringError, match="depends on x"):
        from_sklearn(ensemble.GradientBoostingRegressor(n_estimators=2, init=linear_model.LinearRegression()).fit(x, y))
    z = x.copy()
    z[y == 1, 0] = np.nan
    for model in (ensemble.HistGradientBoostingClassifier(max_iter=2), tree.DecisionTreeClassifier(max_depth=2)):
        with pytest.raises(LoweringError, match="whether the value is missing"):
            from_sklearn(model.fit(z, y))


def test_xgboost_refuses_what_hardware_lacks(tmp_path):
    model = json.loads((HERE / "xgboost_2.json").read_text())

    def changed(change):
        copy = json.loads(json.dumps(model))
        change(copy["learner"])
        return copy

    def tree(learner):
        return learner["gradient_booster"]["model"]["trees"][0]

    with pytest.raises(LoweringError, match="categories"):
        from_xgboost(changed(lambda v: tree(v).update(split_type=[1])))
    with pytest.raises(LoweringError, match="vectors"):
        from_xgboost(changed(lambda v: tree(v)["tree_param"].update(size_leaf_vector="3")))
    with pytest.raises(LoweringError, match="no trees"):
        from_xgboost(changed(lambda v: v["gradient_booster"].update(name="gblinear")))
    with pytest.raises(LoweringError, match="unknown base score"):
        from_xgboost(changed(lambda v: v["objective"].update(name="my:own")))
    with pytest.raises(DataError, match="no model of XGBoost"):
        from_xgboost({"a": 1})
    with pytest.raises(DataError, match="no JSON"):
        (tmp_path / "m.ubj").write_bytes(b"{L\x00\x00\xff")
        from_xgboost(tmp_path / "m.ubj")
    for read in (from_xgboost, from_lightgbm):
        with pytest.raises(DataError, match="not a file"):
            read(tmp_path / "none")
        with pytest.raises(DataError, match="expected a path"):
            read(3)
    with pytest.raises(DataError, match="no model of LightGBM"):
        from_lightgbm("nothing\nof it\n")


def test_what_a_forest_takes():
    forest = from_xgboost(HERE / "xgboost_5.json")
    assert depth(forest) == 3
    assert scores(forest, np.zeros((0, 16))).shape == (0, 5)
    with pytest.raises(DataError, match="takes"):
        scores(forest, np.zeros((3, 15)))
    with pytest.raises(DataError, match="NaN"):
        scores(forest, np.full((3, 16), np.nan))
