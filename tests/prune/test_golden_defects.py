"""Where PQuantML errs (golden/pquantml.json): its recorded answer, and ours that differs.

`pquantml` is golden/pquantml_player.py; a Player with compat=None plays a case through what we do by default.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import _tree
from pquant_jax._base import Event, Params, Stage, View
from pquant_jax.constrain import mdmm, metrics
from pquant_jax.prune import NM, pdp, wanda
from pquant_jax.transforms import masked


@pytest.fixture
def played(pquantml):
    """(case's name, how many steps, compat) -> the player, the last step played and our answers to it."""

    def play(name, until=None, compat=None):
        case = next(c for c in pquantml.GOLDEN["cases"] if c["name"] == name)
        player, step, ours = pquantml.Player(case, compat), {}, {}
        for step in case["steps"][:until]:
            ours = player.step(step)
        return player, step, ours

    return play


RESETS = [f"dst/reset-{kind}/dense/0" for kind in ("layerwise", "channelwise", "weightwise")]


@pytest.mark.parametrize("name", RESETS)
def test_defect_dst_ignores_threshold_init(name, played):
    player, _, _ = played(name, until=0)
    assert player.case["parameters"]["threshold_init"] == 0.25
    assert not np.any(player.case["steps"][0]["state"]["threshold"])
    np.testing.assert_array_equal(player.method.of(player.params), np.float32(0.25))


@pytest.mark.parametrize("name", RESETS)
def test_defect_dst_resets_a_layer_in_the_forward(name, played):
    """One step's overshoot loses all thresholds of the layer; ours gives them back when the epoch ends."""
    player, step, ours = played(name, until=5)
    w, thresholds = player.weight(0), player.turned(player.case["steps"][3]["state"]["threshold"])
    kept = np.abs(w) > thresholds
    assert 1 - kept.mean() >= player.case["parameters"]["max_pruning_pct"]
    np.testing.assert_array_equal(player.answer(step, "out"), w)
    assert not np.any(player.theirs["threshold"])
    np.testing.assert_array_equal(ours["out"], np.where(kept, w, 0))
    np.testing.assert_array_equal(player.method.of(player.params), thresholds)
    player.step({"call": "post_epoch"})
    assert not np.any(player.method.of(player.params))


def test_defect_autosparse_jumps_when_fine_tuning_begins(played):
    """Theirs goes back to the weights that were not shrunk; ours stays where training ended."""
    player, step, ours = played("autosparse/channelwise/dense/0", until=-3)
    theirs, ended = step["out"], ours["out"]
    np.testing.assert_allclose(player.turned(theirs), ended, rtol=1e-5, atol=1e-6)
    player.step({"call": "pre_finetune"})
    np.testing.assert_array_equal(player.forward(step)["out"], ended)
    reference, _, _ = played("autosparse/channelwise/dense/0", until=-3, compat="pquantml")
    reference.step({"call": "pre_finetune"})
    jumped = reference.forward(step)["out"]
    np.testing.assert_array_equal(jumped, np.where(ended != 0, player.weight(step["w"]), 0))
    assert np.max(np.abs(jumped - ended)) > 0.1


def test_defect_cs_halves_the_weights_when_fine_tuning_begins(played):
    """sigmoid saturates at 1 / sigmoid(s0), which is 2 at s0 = 0; theirs' hard mask is 1 and so lacks the scaling."""
    player, step, ours = played("cs/beta/hand")
    w = player.weight(0)
    before = player.answer(player.case["steps"][-3], "out")
    np.testing.assert_allclose(before, np.where(player.turned(player.theirs["s"]) > 0, 2 * w, 0), atol=1e-6)
    np.testing.assert_allclose(player.answer(step, "out"), before / 2, atol=1e-6)
    np.testing.assert_allclose(ours["out"], before, atol=1e-6)


def test_defect_cs_has_a_hard_mask_where_pruning_is_disabled(played):
    """Theirs says 1 and trains s all the same; ours has no method there at all."""
    player, step, _ = played("cs/disabled/hand")
    assert step["hard_mask"] == 1 and step["loss"] > 0 and not player.case["parameters"]["enable_pruning"]
    t = pq.identity()
    params = t.attach({"kernel": player.weight(0)})
    view, state = t.apply(params, t.init(params))
    np.testing.assert_array_equal(view.model["kernel"], player.answer(step, "out"))
    assert view.masks == {} and params.extra == {} and float(t.penalty(params, state, view)) == 0


@pytest.mark.parametrize(
    ("name", "counts"),
    [("pdp/count-s=0.8/hundred", (19, 20)), ("pdp/count-s=0.3/dense/1", (16, 17)), ("pdp/count-s=0.0/dense/0", (31, 32))],
)
def test_defect_pdp_truncates_the_count(name, counts, played):
    """float32 (1 - 0.8) * 100 is just below 20, 0.7 * 24 is 16.8; and theirs prunes one weight even where the target is 0."""
    player, step, ours = played(name)
    half = np.abs(player.weight(0)) / 2
    assert tuple(int(np.sum(np.abs(out) > half)) for out in (player.answer(step, "out"), ours["out"])) == counts


def exact_structured(w, u, temperature):
    """dW of the structured soft mask at 0.5 in float64, and the norms.  (out, in)."""
    n = np.sqrt((w**2).sum(1))
    order = np.argsort(-n)
    middle = order[len(n) // 2 - 1 : len(n) // 2 + 1]
    t = n[middle].mean()
    m = 1 / (1 + np.exp(-(n**2 - t**2) / temperature))
    dx = (u * w).sum(1) * m * (1 - m)
    dn = dx * 2 * n / temperature
    dn[middle] -= dx.sum() * t / temperature
    return u * m[:, None] + dn[:, None] * w / n[:, None], n


def test_defect_pdp_loses_digits_in_a_difference_of_squares(played):
    """Near the threshold s^2 and t^2 agree in most of their bits; ours has (s - t)(s + t)."""
    player, step, ours = played("pdp/structured-t=0.1/dense/0", until=12, compat="pquantml")
    w, u = (np.float64(np.float32(v)) for v in (player.data["w"][1], player.data["u"]))
    exact, _ = exact_structured(w, u, np.float64(np.float32(0.1)))
    assert np.abs(np.asarray(step["dw"]) - exact).max() > 1e-5
    np.testing.assert_allclose(np.asarray(ours["dw"]).T, exact, rtol=0, atol=2e-6)


def test_defect_pdp_gives_one_of_equal_groups_the_gradient(played):
    """Of the outputs at the threshold two have the same norm; theirs pulls at one of them, ours at both."""
    player, step, ours = played("pdp/structured-t=0.1/ties", until=12, compat="pquantml")
    norms = np.linalg.norm(player.data["w"][1], axis=1)
    theirs, mine = np.asarray(step["dw"]), np.asarray(ours["dw"]).T
    tied = [int(v) for v in np.flatnonzero(np.abs(theirs - mine).max(1) > 1e-4)]
    assert len(tied) == 2 and norms[tied[0]] == norms[tied[1]]
    w = np.asarray(player.data["w"][1])[tied]
    pull = [((g[tied] * w).sum(1) / norms[tied]).sum() for g in (theirs, mine)]
    np.testing.assert_allclose(*pull, rtol=1e-4)  # the same in all


@pytest.mark.parametrize("number", range(4))
def test_budgets_are_theirs(number, pquantml, tell):
    case = pquantml.GOLDEN["budgets"][number]
    make = {"pdp": lambda **o: pdp(epsilon=1.0, **o), "wanda": wanda}[case["method"]]
    t = make(sparsity=case["sparsity"], budget="global", compat="pquantml")
    params = t.attach({f"{n}/kernel": jnp.float32(w).T for n, w in enumerate(case["weights"])})
    _, state = tell(t, params, t.init(params), Event.POST_PRETRAIN)
    np.testing.assert_allclose(list(state.share.values()), case["budget"], rtol=0, atol=1e-6)
    later = Params(jax.tree.map(jnp.ones_like, params.model), {})
    _, state = tell(t, later, state, Event.PRE_EPOCH)
    np.testing.assert_allclose(list(state.share.values()), case["budget"], rtol=0, atol=1e-6)


def test_defect_a_budget_counts_layers_that_are_not_pruned(pquantml, tell):
    """Theirs takes its threshold from all layers; here the first, which is not pruned, has the small weights."""
    first, second = (jnp.float32(v).T for v in pquantml.GOLDEN["budgets"][0]["weights"])
    model = {"a": {"kernel": first / 100}, "b": {"kernel": second}}
    found = {}
    for compat in (None, "pquantml"):
        whole = pdp(sparsity=0.5, epsilon=1.0, budget="global", compat=compat)
        for name, t in (("all", whole), ("one", masked(whole, "b/.*"))):
            params = t.attach(model)
            params, state = tell(t, params, t.init(params), Event.POST_PRETRAIN)
            _, state = tell(t, params, state, Event.PRE_EPOCH)
            found[name, compat] = float(state.ratio["b/kernel"])
    assert found["all", "pquantml"] < 0.1, "the budget of the second layer there, with the first in it"
    assert abs(found["one", None] - 0.5) < 0.5 / second.size + 1e-6


def test_defect_wanda_prunes_n_of_m_across_outputs(played):
    """Theirs cuts blocks of 3 from the whole kernel of 8 inputs, so the third has inputs of two outputs, and prunes 1."""
    player, _, _ = played("wanda/1:3/dense/1", until=10)
    theirs, ours = np.asarray(player.theirs["mask"]), np.asarray(player.state.mask["kernel"])
    assert set(theirs.reshape(-1, 3).sum(1)) == {2}
    for mask, holds in ((theirs, False), (ours, True)):
        kept = np.pad(mask, ((0, 0), (0, 1))).reshape(3, 3, 3).sum(-1)
        assert (set(np.unique(kept)) == {1}) == holds


def test_defect_wanda_compares_a_dense_layer_as_a_whole_and_truncates(played):
    """int(0.3 * 32) = 9 weights go wherever they are; the paper's 2.4, rounded, of every output's 8 in ours."""
    player, _, _ = played("wanda/s=0.3/dense/0", until=10)
    theirs, ours = np.asarray(player.theirs["mask"]), np.asarray(player.state.mask["kernel"])
    assert (theirs == 0).sum() == 9 and len(set(theirs.sum(1))) > 1
    assert list((ours == 0).sum(1)) == [2] * 4


def test_defect_wanda_excludes_zeros_on_top_of_the_target(played):
    player, _, _ = played("wanda/s=0.1/ties", until=10)
    w = np.asarray(player.data["w"][1])
    assert (w == 0).sum() > 0.1 * w.size and (np.asarray(player.theirs["mask"]) == 0).sum() == (w == 0).sum()
    assert np.asarray(player.state.mask["kernel"]).sum() == w.size  # 0.4 of an output's 4 weights are none


def test_defect_wanda_needs_the_training_mode_to_see_data(played):
    """Theirs' statistics and mask are written by the forward of a training step; ours are a pass over data."""
    player, step, _ = played("wanda/s=0.5/dense/0", until=8)
    assert step["call"] == "collect_input" and not step["training"] and "state" not in step
    model = pq.from_function(lambda p, x: x @ p["kernel"], {"kernel": jnp.float32(player.data["w"][0]).T})
    x = jnp.float32(player.data["x"][0])
    mask = pq.prune.wanda_from_data(pq.instrument(model, x[:1]), model.params, x, sparsity=0.5)["kernel"]
    np.testing.assert_array_equal(mask.sum(0), [4] * 4)


def test_defect_ap_waits_for_epochs_and_then_counts_batches(played):
    """t_delta = 2 batches after t_start = 1 epoch, and then another: the third batch of an epoch counts for nobody."""
    player, _, _ = played("activation_pruning/threshold=0.2/dense/0", until=11, compat="pquantml")
    assert player.theirs["batches_collected"] == 0 == float(player.state.batches)
    assert player.theirs["t"] == 0 == int(player.state.done)
    ours, _, _ = played("activation_pruning/threshold=0.2/dense/0", until=11)
    assert float(ours.state.batches) == 3 and int(ours.state.done) == 1


@pytest.mark.parametrize("name", ["dst/layerwise/hand", "autosparse/layerwise/hand"])
def test_defect_the_sparsity_of_a_layer_is_its_density(name, played):
    """`get_layer_sparsity` gives the fraction that is kept."""
    player, step, ours = played(name, until=6, compat="pquantml")
    density = float(np.mean(player.answer(step, "hard_mask")))
    assert step["keep"] == density and 0 < density < 0.5
    assert float(_tree.sparsity({"kernel": ours["hard_mask"]})) == 1 - density


def test_defect_mdmm_multiplier_grows_in_pretraining(played):
    """The recorded one is past 1 in the first step of training; ours stands still until then."""
    name = "mdmm/Equality-coarse-mean/dense/0"
    theirs, _, _ = played(name, until=4, compat="pquantml")
    assert theirs.theirs["constraint_layer.lmbda"] == pytest.approx(1 + 1e-3 * 10 * 0.16777201)
    ours, step, answers = played(name, until=4)
    assert float(ours.method.of(ours.params)) == 1, "where it was put"
    assert float(answers["loss"]) == pytest.approx(10 * (0.16777201 + 0.16777201**2 / 2), rel=1e-5)
    assert step["loss"] - float(answers["loss"]) == pytest.approx(10 * 0.0016777201 * 0.16777201, rel=1e-2)


def test_defect_a_forward_in_training_mode_moves_the_state(played):
    """Theirs' keep ratio and evaluation run the forward, which writes its state; asking ours twice changes nothing."""
    player, step, _ = played("mdmm/Equality-coarse-mean/dense/0", until=2, compat="pquantml")
    assert step["call"] == "forward" and step["state"] == {"constraint_layer.prev_infs": 0.16777201}
    before = jax.tree.map(np.asarray, (player.params, player.state))
    first, second = (player.ask(player.params, player.state, player.turned(player.data["u"])) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, before, (player.params, player.state))


def test_defect_mdmm_reports_a_mask_that_is_not_in_force(played):
    """In fine-tuning theirs masks by the present weights and says the mask of training; ours freezes that one and uses it."""
    player, step, ours = played("mdmm/Equality-coarse-mean/dense/0")
    told, out = player.answer(step, "hard_mask"), player.answer(step, "out")
    w = player.weight(step["w"])
    assert np.any((out != 0) != (told != 0))
    np.testing.assert_array_equal(out, np.where(np.abs(w) > np.float32(0.1), w, 0))
    np.testing.assert_array_equal(ours["out"], np.where(told != 0, w, 0))
    np.testing.assert_array_equal(ours["hard_mask"], told)


def test_defect_mdmm_structured_metric_has_no_gradient(played):
    player, step, _ = played("mdmm/rf=2/dense/0", until=4)
    assert step["loss"] > 0 and step["loss_grads"] == {}
    p = player.case["parameters"]
    metric = metrics.dsp_sparsity(reuse=p["rf"], epsilon=p["epsilon"])
    t = mdmm(metric, kind=">=", target=p["target_value"], scale=p["scale"], damping=p["damping"])
    params = t.attach({"kernel": player.weight(0).T})
    state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    found = metric.hard(params, View(params.model, {}, {}))
    assert p["target_value"] - float(found) == pytest.approx(player.theirs["constraint_layer.prev_infs"], abs=1e-6)
    gradient = jax.grad(lambda p: t.penalty(p, state, View(p.model, {}, {})))(params).model["kernel"]
    assert np.all(gradient != 0)


def test_defect_mdmm_multiplier_of_an_equality_never_comes_down(played):
    """|g| for g: whichever side of the target the metric is on, theirs pushes the multiplier up."""
    seen = {}
    for target in (-1.0, 1.0):  # far on either side of the recorded metric, 0.1678
        for compat in (None, "pquantml"):
            player, _, _ = played("mdmm/Equality-coarse-mean-grad/dense/0", until=1, compat=compat)
            player.state = pq.with_hyper(player.state, target=target)._replace(stage=jnp.int32(Stage.TRAIN))
            ours = player.ask(player.params, player.state, player.turned(player.data["u"]))
            seen[target, compat] = -float(ours["loss_dconstraint_layer.lmbda"])  # the way that the multiplier goes
    assert seen[-1.0, "pquantml"] > 0 and seen[1.0, "pquantml"] > 0
    assert seen[-1.0, None] > 0 > seen[1.0, None]


def test_options_of_compat(w):
    assert NM(1, 4) == NM(1, 4, across=False)
    t = mdmm(metrics.sparsity(), kind="==", target=0.0, rate=None, compat="pquantml")
    params = t.attach({"kernel": w})
    assert "rate" not in t.init(params).hyper and float(params.extra["mdmm"]["multiplier"]) == 1
