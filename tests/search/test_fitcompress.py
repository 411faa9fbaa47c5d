"""FITCompress: goals are met, any model works, and each defect of the reference (pquantml.md, section 7) is gone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.search import _walk, fitcompress

from .conftest import split
from .test_golden_fitcompress import PATHS, SEARCHES, setting

FEW = dict(samples=256, batch_size=128, sparsities=(0.2, 0.4, 0.6, 0.8, 0.9), widths=(8, 6, 4))


def kept_bits(found: pq.search.FITCompressed) -> float:
    """Counted from the result alone."""
    masks = found.masks
    return sum(float(m.sum()) * found.bits[path] for path, m in masks.items()) / (32 * sum(m.size for m in masks.values()))


@pytest.mark.parametrize("ratio", [0.2, 0.03])
def test_a_ratio_is_met(jets, view_of, ratio):
    found = fitcompress(jets.inst, jets.params, jets.data.train, ratio=ratio, **FEW)
    assert kept_bits(found) == pytest.approx(found.ratio) and found.ratio <= ratio * (1 + 1e-6)
    assert found.ratio > ratio / 2  # and not far below: the next to last node was above it
    assert found.path[-2].ratio > ratio
    view = view_of(jets.inst, jets.params, found)
    assert float(jets.inst.ebops(view)) == found.ebops


@pytest.mark.parametrize("budget", [12_000, 2_500])
def test_an_ebops_budget_is_met_and_stays_met_in_training(jets, view_of, budget):
    found = fitcompress(jets.inst, jets.params, jets.data.train, ebops=budget, **FEW)
    assert budget / 2 < found.ebops <= budget
    assert float(jets.inst.ebops(view_of(jets.inst, jets.params, found))) == found.ebops
    if budget == 12_000:
        return
    compression, plan = pq.search.compression(jets.inst, found), pq.Plan(pretrain=0, train=0, finetune=2)
    trained = pq.fit(jets.inst, jets.data, plan=plan, compression=compression, params=jets.params, batch_size=64)
    assert float(jets.inst.ebops(trained.view)) == found.ebops


def test_every_site_has_a_format_and_the_masks_are_binary(jets):
    found = fitcompress(jets.inst, jets.params, jets.data.train, ratio=0.1, **FEW)
    assert set(found.bits) == set(jets.inst.sites) and len(found.rules) == len(jets.inst.sites)
    assert set(found.masks) == {path for path in jets.inst.sites if path.endswith("kernel")}
    assert {float(v) for m in found.masks.values() for v in np.unique(m)} <= {0.0, 1.0}
    assert found.sparsity == pytest.approx(float(pq._tree.sparsity(found.masks)))


def test_an_unreachable_goal_is_a_typed_error_that_says_the_least(jets):
    """The reference returns None after a thousand nodes, and its caller fails with a TypeError."""
    cells = 16 * 16 + 16 * 8 + 8 * 5
    least = (cells - int(0.9 * cells)) * 4 / (32 * cells)
    with pytest.raises(pq.SearchError, match=f"a ratio of 0.01 can't be reached: no choice goes below {least:.6g}"):
        fitcompress(jets.inst, jets.params, jets.data.train, ratio=0.01, **FEW)
    dense = cells * 8 * 4  # widths of 8 and 4
    with pytest.raises(pq.SearchError, match=f"EBOPs of 1000 can't be reached: no choice goes below {dense}"):
        fitcompress(jets.inst, jets.params, jets.data.train, ebops=1000, **{**FEW, "sparsities": ()})


def test_a_goal_that_the_way_misses_is_an_error_too(signal):
    """Here the weights of a convolution cost more, so that a bound on the dearest is below what the search comes to."""
    options = dict(samples=32, batch_size=32, sparsities=(0.5,), widths=(4,))
    with pytest.raises(pq.SearchError, match="no choice goes below") as bound:
        fitcompress(signal.inst, signal.params, signal.data.train, ebops=1.0, **options)
    least = float(str(bound.value).split("below ")[1].split(";")[0])
    with pytest.raises(pq.SearchError, match="the search came down to") as end:
        fitcompress(signal.inst, signal.params, signal.data.train, ebops=least * 1.001, **options)
    reached = float(str(end.value).split("down to ")[1].split(";")[0])
    found = fitcompress(signal.inst, signal.params, signal.data.train, ebops=reached * 1.0001, **options)
    assert found.ebops == pytest.approx(reached, rel=1e-5)


def test_convolutions_of_one_dimension_and_batchnorm(signal):
    """The reference knows dense and two-dimensional layers; a one-dimensional one shifts all masks by a layer."""
    found = fitcompress(signal.inst, signal.params, signal.data.train, ratio=0.1, **{**FEW, "samples": 64, "batch_size": 32})
    assert {path: m.shape for path, m in found.masks.items()} == {
        "Conv_0/kernel": (3, 2, 4), "Conv_1/kernel": (3, 1, 4), "Dense_0/kernel": (16, 3),
    }  # fmt: skip
    assert found.ratio <= 0.1 and found.bits["BatchNorm_0/fused_scale"] == 8


def one_kernel(w) -> tuple[pq.Instrumented, dict, object]:
    params = {"w": jnp.float32(w)}
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, len(w))), rng.integers(0, len(w[0]), 16)
    return pq.instrument(pq.from_function(lambda p, x: x @ p["w"], params), np.float32(x)), params, split(x, y)


def test_one_kernel_alone_can_be_searched_over():
    inst, params, data = one_kernel([[0.9, -0.8], [0.1, 0.4]])
    found = fitcompress(inst, params, data, ratio=0.1, samples=16, sparsities=np.array([0.25, 0.5]))
    assert found.ratio <= 0.1


def test_activations_get_formats_from_what_they_hold(jets):
    """The reference has a calibration for that, which nothing calls any more."""
    found = fitcompress(jets.inst, jets.params, jets.data.train, ratio=0.2, activations=6, **FEW)
    formats = dict(found.rules)
    stats = jets.inst.capture(pq.View(jets.params, {}, {}), {}, jnp.asarray(jets.data.train.x[:256]))[2]["range"]
    for name, spec in jets.inst.sites.items():
        if spec.kind == "input":
            fmt, high = formats[name], float(np.max(stats[name][1]))
            assert fmt.k + fmt.i + fmt.f == 6 and fmt.k == spec.signed
            assert 2.0**fmt.i <= 4 * high and 2.0**fmt.i * 16 > high


def test_the_nearest_node_at_the_goal_is_taken_not_the_first():
    """Both halves of this model can go to 4 bits to meet the goal; the second loses less."""
    grid, off = np.float32([[0.875]]), np.float32([[0.53]])

    def task(compat):
        def quantized(path, w, width):
            return None, w if width == 32 else np.float32(np.round(w * 8) / 8)

        def spent(weights, masks, widths):
            return sum(widths.values()) / 64

        goal = _walk.Goal(0.6, spent, lambda width, sparsity: 0.0, "a ratio", 1.0)
        return _walk.Task(
            lambda w: {p: np.ones((1, 1)) for p in w}, quantized, goal, _walk.Steps((4,), (), True, True, 1.0), compat
        )

    found = {}
    for compat in (None, "pquantml"):
        this = task(compat)
        found[compat] = _walk.walk(this, _walk.start(this, {"a": off, "b": grid}, None)).node.widths
    assert found == {None: {"a": 32, "b": 4}, "pquantml": {"a": 4, "b": 32}}


def test_every_kept_weight_counts():
    """There, weights below four steps count as pruned while the mask keeps them: its answer is twice the size it says."""
    given = SEARCHES[0]
    inst, weights, data = setting(given)
    steps = (1 - np.logspace(0, -2, 12))[1:]
    theirs = fitcompress(inst, weights, data, ratio=0.05, sparsities=list(steps), compat="pquantml")
    assert theirs.ratio < 0.05 < 0.1 < kept_bits(theirs) and theirs.sparsity == 0
    ours = fitcompress(inst, weights, data, ratio=0.05, sparsities=list(steps))
    assert kept_bits(ours) == pytest.approx(ours.ratio) and ours.ratio <= 0.05 and ours.sparsity > 0.5


def test_the_first_pruning_step_is_not_free():
    """There, the start's weights are the network's own, and have been pruned by the time the distance is taken."""
    given = SEARCHES[2]
    inst, weights, data = setting(given)
    steps = list((1 - np.logspace(0, -2, 12))[1:])
    found = {c: fitcompress(inst, weights, data, ratio=0.3, widths=(), sparsities=steps, compat=c) for c in (None, "pquantml")}
    assert found["pquantml"].path[1].g == 0 < found[None].path[1].g
    assert found[None].path[1].sparsity == found["pquantml"].path[1].sparsity


def test_the_whole_search_opens_no_node_twice(monkeypatch):
    given = SEARCHES[3]
    inst, weights, data = setting(given)
    opened, neighbours = [], _walk._neighbours
    monkeypatch.setattr(_walk, "_neighbours", lambda task, point: (opened.append(point.level), neighbours(task, point))[1])
    steps = list((1 - np.logspace(0, -2, 12))[1:])
    for compat in (None, "pquantml"):
        opened.clear()
        fitcompress(inst, weights, data, ratio=0.08, sparsities=steps, greedy=False, compat=compat)
        assert (len(set(opened)) < len(opened)) == (compat is not None)


def test_widths_stay_what_they_say_and_integer_bits_can_be_negative():
    """There, f is at least 1 and i at least 0: 4 bits become 5 for weights up to 8, and a third of them is lost below 1/8."""
    for scale, expected in ((8.0, (5, 4)), (0.1, (4, 4))):
        inst, params, data = one_kernel([[0.9 * scale, -0.8 * scale], [0.1 * scale, 0.4 * scale]])
        options = dict(ratio=0.13, samples=16, sparsities=(), widths=(4,))
        theirs, ours = (fitcompress(inst, params, data, compat=c, **options) for c in ("pquantml", None))
        assert (theirs.bits["w"], ours.bits["w"]) == expected
        assert (dict(ours.rules)["w"].i < 0) == (scale < 1) and dict(theirs.rules)["w"].i >= 0


def test_what_is_pruned_counts_first():
    """Weights that are 0 on the grid tie with pruned ones there; then more are dropped than the schedule says."""
    inst, params, data = one_kernel([[1.0, 0.03], [0.02, 0.01]])
    del inst, params, data
    ones = {"w": np.ones((1, 4))}
    masks, latent = {"w": np.float32([[1, 1, 1, 0]])}, {"w": np.float32([[1.0, 0.03, 0.02, 0]])}
    weights = {"w": np.float32([[1, 0, 0, 0]])}
    node = _walk.Node({"w": 4}, 0.25, 0.0, 0.0, 1.0)
    point = _walk.Point(latent, weights, masks, (1, 1), ones, node, ())
    goal = _walk.Goal(0.1, lambda *_: 1.0, lambda *_: 0.0, "", 1.0)
    task = _walk.Task(lambda w: ones, lambda p, w, b: (None, w), goal, _walk.Steps((4,), (0.25, 0.5), True, True, 1.0), None)
    assert _walk._pruned(task, point, 0.5)["w"].tolist() == [[1, 1, 0, 0]]
    assert _walk._pruned(task._replace(compat="pquantml"), point, 0.5)["w"].tolist() == [[1, 0, 0, 0]]


def test_a_limit_on_the_range_caps_the_integer_bits():
    inst, params, data = one_kernel([[3.5, -0.8], [0.1, 0.4]])
    free, capped = (fitcompress(inst, params, data, ratio=0.2, samples=16, limit=limit) for limit in (None, 1.0))
    assert max(fmt.i for _, fmt in free.rules) == 2 or dict(free.rules)["w"].i > dict(capped.rules)["w"].i
    assert dict(capped.rules)["w"].i <= 1


def test_a_rule_chooses_the_kernels(jets):
    found = fitcompress(jets.inst, jets.params, jets.data.train, ratio=0.05, where="Dense_1/.*", **FEW)
    assert list(found.masks) == ["Dense_1/kernel"] and found.bits["Dense_0/kernel"] == 8
    assert found.ratio <= 0.05


def test_pretraining_at_a_high_width_goes_before(jets):
    """Starting from parameters of a training, whose forward saturated the weights."""
    params = pq.Params(jets.params, {})
    a = fitcompress(jets.inst, params, jets.data.train, ratio=0.2, **FEW)
    b = fitcompress(jets.inst, jets.params, jets.data.train, ratio=0.2, **FEW)
    assert a.bits == b.bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one goal"),
        ({"ratio": 0.1, "ebops": 100}, "exactly one goal"),
        ({"ratio": -0.1}, "positive"),
        ({"ratio": 0.1, "widths": (4, 8)}, "falling"),
        ({"ratio": 0.1, "widths": (8, 1)}, "falling"),
        ({"ratio": 0.1, "sparsities": (0.5, 0.2)}, "rising"),
        ({"ratio": 0.1, "sparsities": (0.5, 1.0)}, "rising"),
        ({"ratio": 0.1, "sparsities": (), "widths": ()}, "nothing to search"),
        ({"ebops": 100, "compat": "pquantml"}, "compat"),
        ({"ratio": 0.1, "where": "nothing"}, "matches no parameter"),
    ],
)
def test_questions_without_an_answer(options, said):
    inst, params, data = one_kernel([[0.9, -0.8], [0.1, 0.4]])
    with pytest.raises(pq.TransformError, match=said):
        fitcompress(inst, params, data, **options)


def test_the_paths_of_the_goldens_are_those_of_the_network():
    assert list(setting(SEARCHES[0])[1]) == list(PATHS)
