"""Quantized forests: thresholds without loss, pruning without loss, the graph, and the libraries as independent oracles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pquant_jax import KIF, InputSpec
from pquant_jax._errors import DataError, LoweringError, SearchError, VerifyError
from pquant_jax.lower import synth
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, port_grid
from pquant_jax.trees import (
    Tree,
    encode,
    from_lightgbm,
    from_sklearn,
    from_xgboost,
    join,
    leaves,
    luts,
    prove,
    prune,
    prune_path,
    quantize,
    scores,
    simplify,
    to_graph,
)  # fmt: skip

HERE = Path(__file__).parent
SPECS = (InputSpec(1, 3, 4), InputSpec(1, 5, 10), InputSpec(0, 2, 3), InputSpec(1, 2, 26))


def random_forest(seed: int, trees: int = 6, depth: int = 4, outputs: int = 2, features: int = 3, **kind):
    """Unbalanced trees with thresholds in and out of the port, repeated questions and repeated leaves."""
    rng = np.random.default_rng(seed)
    grid = np.ldexp(rng.integers(-70, 70, 12), -4) + rng.choice([0, 0, 2.0**-40, 0.01, 1e-9], 12)

    def grow(rows: list, level: int) -> int:
        at = len(rows)
        rows.append([-1, 0.0, 0, 0, float(rng.choice([-0.5, 0.125, 0.3, 0.77]))])
        if level and rng.random() < 0.85:
            rows[at][:2] = int(rng.integers(features)), float(rng.choice(grid))
            rows[at][2], rows[at][3] = grow(rows, level - 1), grow(rows, level - 1)
        return at

    made = []
    for _ in range(trees):
        rows: list = []
        grow(rows, depth)
        made.append(Tree(*zip(*rows, strict=True)))
    return join(made, rng.integers(0, outputs, trees), rng.normal(size=outputs), features, **kind)


def all_codes(spec: InputSpec, features: int, n: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(1)
    span = 2 ** (spec.i + spec.f)
    return np.ldexp(rng.integers(-spec.k * span, span, (n, features)).astype(float), -spec.f)


@pytest.mark.parametrize("kind", [{}, {"strict": True, "dtype": "float32"}, {"dtype": "float32"}], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_thresholds_lose_nothing(spec, kind):
    """The same leaf on every code of the port; with 29 bits that holds only if rounding to float32 is taken into account."""
    for seed in range(3):
        forest = random_forest(seed, **kind)
        made = quantize(forest, spec)
        x = all_codes(spec, 3)
        edges = encode(made, np.concatenate([forest.threshold[:, None] + [[-(2.0**-spec.f), 0, 2.0**-spec.f]]]))
        x = np.concatenate([x, edges])
        np.testing.assert_array_equal(leaves(made.forest, x), leaves(forest, x))
        assert made.forest.dtype == "float64" and not made.forest.strict


def test_leaves_are_rounded_once_and_the_sum_is_exact():
    forest = random_forest(5)
    x = all_codes(InputSpec(1, 3, 4), 3, 300)
    for shift in (True, False):
        made = quantize(forest, InputSpec(1, 3, 4), leaves=12, shift=shift)
        assert made.leaves.k == (0 if shift else 1)
        codes = np.ldexp(scores(made.forest, x), made.leaves.f)
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert np.abs(scores(made.forest, x) - scores(forest, x)).max() < 7 * 2.0**-made.leaves.f / 2
    made = quantize(forest, leaves=KIF(1, 0, 3), shift=False)
    np.testing.assert_array_equal(np.unique(made.forest.value), [-0.5, 0.0, 0.125, 0.25, 0.75])


def test_a_port_of_every_feature_its_own():
    forest = random_forest(2)
    specs = (InputSpec(1, 3, 2), InputSpec(0, 3, 4), InputSpec(1, 2, 7))
    made = quantize(forest, specs)
    graph = to_graph(made)
    x = port_grid(graph, 2000, np.random.default_rng(0))[0]
    np.testing.assert_array_equal(leaves(made.forest, x), leaves(forest, x))
    np.testing.assert_array_equal(emulate(graph, [x])[0], scores(made.forest, x))
    with pytest.raises(LoweringError, match="features"):
        quantize(forest, specs[:2])
    with pytest.raises(LoweringError, match="53 bits"):
        quantize(forest, InputSpec(1, 40, 20))
    with pytest.raises(LoweringError, match="leaves have"):
        quantize(forest, leaves=0)


@pytest.mark.parametrize("compare", ["tables", "lt"])
@pytest.mark.parametrize("table_bits", [0, 1, 2, 4, 6])
def test_graph_equals_the_walk(table_bits, compare):
    for seed in range(8):
        made = quantize(random_forest(seed, depth=seed % 6), InputSpec(1, 2, 3), leaves=3 + seed % 5)
        for forest in (made, simplify(made)):
            graph = to_graph(forest, table_bits=table_bits, compare=compare)
            comb = da4ml.to_comb(graph)
            result = prove(forest, np.zeros((1, 3)), graph=graph, comb=comb, vectors=400)
            assert result["mismatches"] == {"emulator": 0, "da4ml": 0}


EDGES = (InputSpec(0, 0, 6), InputSpec(1, 0, 6), InputSpec(1, 12, -7), InputSpec(0, 11, 1))


@pytest.mark.parametrize("spec", [*SPECS, *EDGES], ids=str)
def test_comparisons_by_digits(spec):
    """Every limit on small ports, random ones on wide ports, each at its own edges and at random codes."""
    rng, bits = np.random.default_rng(4), spec.k + spec.i + spec.f
    lowest = -spec.k * 2 ** (spec.i + spec.f)
    n = min(2**bits - 1, 120)
    limits = lowest + (np.arange(n) if bits <= 7 else np.sort(rng.choice(2**20, n, False)) * 2**bits // 2**20)
    stumps = [Tree([0, -1, -1], [np.ldexp(float(c), -spec.f), 0, 0], [1, 0, 0], [2, 0, 0], [0, 1.0, 0.0]) for c in limits]
    made = quantize(join(stumps, range(n), np.zeros(n), 1), spec, leaves=1)
    codes = np.concatenate([limits, limits + 1, limits - 1, all_codes(spec, 1, 300)[:, 0] * 2.0**spec.f])
    codes = np.unique(np.maximum(codes, lowest))
    x = np.ldexp(codes[codes < 2 ** (spec.i + spec.f)], -spec.f)[:, None]
    for compare in ("tables", "lt"):
        graph = to_graph(made, compare=compare)
        np.testing.assert_array_equal(emulate(graph, [x])[0], x * 2.0**spec.f <= limits)
        if compare == "lt" and bits > 24:
            with pytest.raises(LoweringError, match="constant"):  # only digits go beyond what da4ml takes for a constant
                da4ml.to_comb(graph)
        else:
            np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), x), x * 2.0**spec.f <= limits)


def test_graph_shares():
    """A question that many trees ask is one comparison; a tree that comes twice is built once."""
    one = Tree([0, 1, -1, -1, -1], [0.5, 0.25, 0, 0, 0], [1, 2, 0, 0, 0], [4, 3, 0, 0, 0], [0, 0, 1.0, 2.0, 3.0])
    other = Tree([0, -1, -1], [0.5, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1.0, 5.0])
    graph = to_graph(quantize(join([one, other, one], [0, 1, 1], [0.0, 0.0], 2), InputSpec(1, 3, 4)))
    assert {n.shape for n in graph.nodes if n.name == "trees/compare"} == {(2,)}
    assert sum(n.shape[0] for n in graph.nodes if n.op == "table" and n.name.startswith("trees/leaves")) == 2
    with pytest.raises(LoweringError, match="compare is"):
        to_graph(quantize(random_forest(0)), compare="le")
    with pytest.raises(LoweringError, match="table_bits"):
        to_graph(quantize(random_forest(0)), table_bits=13)


def test_forests_without_a_split():
    leaf = Tree([-1], [0.0], [0], [0], [0.75])
    for forest in (join([leaf, leaf], [0, 0], [0.5, -1.0], 2), join([], [], [0.5, -1.0], 2)):
        made = quantize(forest)
        expected = [[0.5 + 1.5 * (len(forest.root) > 0), -1.0]]
        for small in (made, simplify(made)):
            assert scores(small.forest, np.zeros((1, 2))).tolist() == emulate(to_graph(small), [np.zeros((1, 2))])[0].tolist()
            np.testing.assert_allclose(scores(small.forest, np.zeros((1, 2))), expected)


def test_simplify_changes_no_code():
    for seed in range(10):
        made = quantize(random_forest(seed, depth=6), InputSpec(1, 1, 2), leaves=2)
        small = simplify(made)
        x = np.stack([v.ravel() for v in np.meshgrid(*[np.arange(-8, 8) / 4] * 3)], 1)  # every code of the port
        np.testing.assert_array_equal(scores(small.forest, x), scores(made.forest, x))
        reached = np.unique(leaves(small.forest, x))
        assert len(reached) == (small.forest.feature < 0).sum()  # per tree every leaf that is left
        assert len(small.forest.feature) < len(made.forest.feature)
        assert luts(small) <= luts(made)


def test_pruning_follows_the_budget():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 3))
    made = quantize(random_forest(1, trees=20, depth=5), InputSpec(1, 3, 4))
    points = list(prune_path(made, x, step=0.1))
    costs = [p.cost for p in points]
    assert all(a > b for a, b in zip(costs, costs[1:], strict=False)) and not len(points[-1].made.forest.root)
    assert points[0].loss == 0 and points[-1].loss > points[2 * len(points) // 3].loss > 0
    half = prune(made, x, budget=costs[0] / 2, step=0.1)
    assert half.cost == next(c for c in costs if c <= costs[0] / 2)
    with pytest.raises(SearchError, match="budget"):
        prune(made, x, budget=-1, step=0.1)


def test_pruning_by_labels_beats_pruning_without():
    """The trees that only fit noise go first when the loss knows the labels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3000, 3))
    y = (x[:, 0] > 0.3).astype(int)
    signal = Tree([0, -1, -1], [0.3, 0, 0], [1, 0, 0], [2, 0, 0], [0, -2.0, 2.0])
    noise = Tree([1, -1, -1], [0.1, 0, 0], [1, 0, 0], [2, 0, 0], [0, -2.5, 2.5])
    made = quantize(join([signal, noise], [0, 0], [0.0], 3), InputSpec(1, 3, 4))
    left = [p.made.forest.feature.max(initial=-1) for p in prune_path(made, x, y, loss="logistic", step=0.01)]
    assert left[:3] == [1, 0, -1]
    assert [p.made.forest.feature.max(initial=-1) for p in prune_path(made, x, step=0.01)][1] == 1  # without labels the weaker
    for wrong, match in (({"loss": "hinge"}, "loss is"), ({"loss": "softmax"}, "outputs"), ({}, "samples")):
        with pytest.raises(DataError, match=match):
            next(prune_path(made, x, y if wrong else y[:5], **wrong))
    with pytest.raises(DataError, match="needs the labels"):
        next(prune_path(made, x, loss="logistic"))


def jets_like(n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(n, 4))
    return x, np.digitize(x[:, 0] * x[:, 1] + x[:, 2], [-0.5, 0.5])


def test_scikit_learn_with_quantized_arrays_is_the_same_function(benchmark_module):
    """The oracle that knows nothing of this package: the model itself with our thresholds and leaves written into it."""
    pytest.importorskip("sklearn")
    from sklearn.ensemble import GradientBoostingClassifier

    x, y = jets_like()
    model = GradientBoostingClassifier(n_estimators=4, max_depth=4, random_state=0).fit(x, y)
    made = quantize(from_sklearn(model), InputSpec(1, 3, 5), leaves=7)
    oracle = benchmark_module("hardware_trees").rewritten(model, made)
    comb = da4ml.to_comb(to_graph(made))
    others = {"scikit-learn": lambda v: oracle.decision_function(v) + made.forest.base}
    result = prove(made, x, comb=comb, others=others, vectors=3000)
    assert result["mismatches"] == {"emulator": 0, "da4ml": 0, "scikit-learn": 0}
    one = oracle.estimators_[0, 0].tree_  # and it sees one leaf that is one step off
    one.value[one.children_left < 0, 0, 0] += 2.0**-made.leaves.f
    with pytest.raises(VerifyError, match="scikit-learn differs"):
        prove(made, x, others=others, vectors=100)


def test_xgboost_and_lightgbm_with_quantized_numbers_are_the_same_functions():
    xgboost, lightgbm = pytest.importorskip("xgboost"), pytest.importorskip("lightgbm")
    recorded = np.load(HERE / "margins.npz")["x"]
    made = quantize(from_xgboost(HERE / "xgboost_5.json"), InputSpec(1, 5, 6), leaves=7)
    dump = json.loads((HERE / "xgboost_5.json").read_text())
    for start, tree in zip(made.forest.root, dump["learner"]["gradient_booster"]["model"]["trees"], strict=True):
        own = slice(start, start + len(tree["left_children"]))
        leaf = made.forest.feature[own] < 0  # nodes keep their order, breadth first; x < t + step is x <= t
        tree["split_conditions"] = np.where(leaf, made.forest.value[own], made.forest.threshold[own] + 2.0**-6).tolist()
    dump["learner"]["learner_model_param"]["base_score"] = json.dumps([0.0] * 5)
    booster = xgboost.Booster()
    booster.load_model(bytearray(json.dumps(dump).encode()))

    def theirs(v: np.ndarray) -> np.ndarray:
        return booster.predict(xgboost.DMatrix(v), output_margin=True).astype(np.float64) + made.forest.base

    assert prove(made, recorded, others={"xgboost": theirs}, vectors=2000)["mismatches"] == {"emulator": 0, "xgboost": 0}
    text = (HERE / "lightgbm_5.txt").read_text()
    made = quantize(from_lightgbm(text), InputSpec(1, 5, 6), leaves=7)
    lines, tree = text.splitlines(), -1
    for n, line in enumerate(lines):
        tree += line.startswith("Tree=")
        start = int(made.forest.root[tree]) if tree >= 0 else 0
        leaf = made.forest.feature[start : made.forest.root[tree + 1] if tree + 1 < len(made.forest.root) else None] < 0
        if line.startswith("threshold="):
            lines[n] = "threshold=" + " ".join(map(repr, made.forest.threshold[start : start + len(leaf)][~leaf].tolist()))
        if line.startswith("leaf_value="):
            lines[n] = "leaf_value=" + " ".join(map(repr, made.forest.value[start : start + len(leaf)][leaf].tolist()))
    kept = [line for line in lines if not line.startswith("tree_sizes=")]
    other = lightgbm.Booster(model_str="\n".join(kept) + "\n")
    others = {"lightgbm": lambda v: other.predict(v, raw_score=True) + made.forest.base}
    assert prove(made, recorded, others=others, vectors=2000)["mismatches"] == {"emulator": 0, "lightgbm": 0}


@pytest.mark.slow
def test_verilog_equals_the_walk(tmp_path):
    from pquant_jax.lower import sim

    if sim.missing_tools():
        pytest.skip("; ".join(sim.missing_tools()))
    made = simplify(quantize(from_lightgbm(HERE / "lightgbm_5.txt"), InputSpec(1, 3, 4)))
    comb = da4ml.to_comb(to_graph(made))
    rtls = {
        name: da4ml.write_rtl(comb, tmp_path / name, name="forest", latency_cutoff=cutoff)
        for name, cutoff in (("rtl_comb", -1), ("rtl_pipelined", 3))
    }
    found = prove(made, np.load(HERE / "margins.npz")["x"], comb=comb, rtls=rtls, vectors=2000, work=tmp_path)
    assert found["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": 0, "rtl_pipelined": 0}
    if not synth.missing_tools():
        assert 0.5 < synth.synth(rtls["rtl_comb"])["lut"] / luts(made) < 2
