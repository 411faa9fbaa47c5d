"""PDP: PQuantML's values, the ramp, and the exact sparsity at the end."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from pquant_jax._base import AxisRole, Event, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax.prune import NM, Block, Cross, Heads, Reuse, pdp
from pquant_jax.transforms import with_hyper

# PQuantML, torch backend: sparsity .5, temperature .1, epsilon 1, epoch 0, loss = sum(upstream * out)
OUT = [[0.4335179, -0.0887972, 0.0177172, -0.8994899], [0.1704960, 0.0371684, -0.6903952, 0.0069911]]
DW = [[1.44346, 2.456359, 1.097349, 4.034439], [3.876185, 2.510345, 7.832306, 2.810984]]


def test_golden(w, upstream, train):
    t = pdp(sparsity=0.5, temperature=0.1, epsilon=1.0)
    params = t.attach({"kernel": w})
    state = train(t, params)

    def loss(params):
        view, _ = t.apply(params, state)
        return jnp.sum(upstream * view.model["kernel"]), view

    (_, view), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(view.model["kernel"], OUT, rtol=0, atol=1e-6)
    np.testing.assert_allclose(grads.model["kernel"], DW, rtol=1e-6, atol=1e-6)
    assert params.extra == {} and float(t.penalty(params, state, view)) == 0


SHAPES = ((10, 10), (100, 10), (7, 9), (64, 32), (3, 3, 4, 8))


def test_the_sparsity_is_reached_exactly(key, tell):
    """float32 (1 - 0.8) * 100 is just below 20: truncation keeps 19, as the reference does."""
    t = pdp(sparsity=0.5, epsilon=1.0)
    params = t.attach({str(shape): jax.random.normal(key, shape) for shape in SHAPES})

    @jax.jit
    def finished(state):
        _, state = tell(t, params, state, Event.PRE_EPOCH)
        _, state = tell(t, params, state, Event.POST_EPOCH)
        return t.apply(params, tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)[1])[0]

    for target in (0.8, 0.5, 0.7, 0.94):
        view = finished(with_hyper(t.init(params), sparsity=target))
        for name, w in params.model.items():
            kept = np.asarray(view.model[name]) != 0
            assert kept.sum() == round(w.size * (1 - target)), (name, target)
            assert np.abs(w)[kept].min() > np.abs(w)[~kept].max()
            np.testing.assert_array_equal(view.masks[name], kept)


def test_twenty_of_a_hundred(key, train):
    t = pdp(sparsity=0.8, epsilon=1.0)
    params = t.attach({"kernel": jax.random.normal(key, (10, 10))})
    view, _ = t.apply(params, train(t, params))
    assert int(np.sum(np.asarray(view.masks["kernel"]) > 0.5)) == 20


def test_the_target_ramps_over_the_epochs(w, tell):
    t = pdp(sparsity=0.8, epsilon=0.3)
    params = t.attach({"kernel": w})
    state, seen = t.init(params), []
    for epoch in range(5):
        _, state = tell(t, params, state, Event.PRE_EPOCH, epoch=epoch)
        seen.append(float(state.ratio["kernel"]))
    np.testing.assert_allclose(seen, np.minimum(1, 0.3 * np.arange(1, 6)) * 0.8, rtol=1e-6)
    _, state = tell(t, params, state, Event.PRE_EPOCH, epoch=0)  # a new round starts again
    np.testing.assert_allclose(state.ratio["kernel"], 0.24, rtol=1e-6)


def test_pquantml_ends_below_the_target_where_the_ramp_is_too_short(w, tell):
    """0.015 per epoch is a ramp of 67 epochs."""
    for compat, last in (("pquantml", 0.06), (None, 1)):
        t = pdp(sparsity=0.5, compat=compat)
        params = t.attach({"kernel": w})
        _, state = tell(t, params, t.init(params), Event.PRE_EPOCH, epoch=3, epochs=4)
        np.testing.assert_allclose(state.part, last, rtol=1e-6)


def test_only_the_training_stage_ramps(w, tell):
    t = pdp(sparsity=0.8, epsilon=1.0)
    params = t.attach({"kernel": w})
    for stage in (Stage.PRETRAIN, Stage.FINETUNE):
        assert float(tell(t, params, t.init(params), Event.PRE_EPOCH, stage)[1].ratio["kernel"]) == 0
    assert float(tell(t, params, t.init(params), Event.POST_EPOCH)[1].ratio["kernel"]) == 0


def test_dense_in_pretraining(w, train):
    t = pdp(sparsity=0.8, epsilon=1.0)
    params = t.attach({"kernel": w, "bias": w[0]})
    for state in (t.init(params), train(t, params, stage=Stage.PRETRAIN)):
        view, _ = t.apply(params, state)
        np.testing.assert_array_equal(view.model["kernel"], w)
        np.testing.assert_array_equal(view.masks["kernel"], np.ones(w.shape))
        assert list(view.masks) == ["kernel"]


def test_the_stored_mask_is_rounded_before_fine_tuning_and_then_frozen(w, tell, train):
    t = pdp(sparsity=0.5, temperature=0.1, epsilon=1.0)
    params = t.attach({"kernel": w})
    state = train(t, params)
    np.testing.assert_array_equal(state.mask["kernel"], np.ones(w.shape))  # stored at the end of an epoch only
    _, state = tell(t, params, state, Event.POST_EPOCH)
    soft = np.asarray(state.mask["kernel"])
    np.testing.assert_allclose(soft * w, OUT, rtol=0, atol=1e-6)
    assert np.any((soft > 0) & (soft < 1))
    _, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    hard = soft >= 0.5
    np.testing.assert_array_equal(state.mask["kernel"], hard)
    grown = params._replace(model={"kernel": w[:, ::-1] * 3})
    for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
        _, state = tell(t, grown, state, event, Stage.FINETUNE)
        _, state = t.step(grown, state, stage=jnp.int32(Stage.FINETUNE), stats={})
        np.testing.assert_array_equal(t.apply(grown, state)[0].model["kernel"], np.where(hard, w[:, ::-1] * 3, 0))


def test_the_epoch_mask_is_that_of_the_view_that_enters(w, tell, train):
    t = pdp(sparsity=0.5, epsilon=1.0)
    params = t.attach({"kernel": w})
    view = View({"kernel": 1 / w}, {}, {})
    _, state = tell(t, params, train(t, params), Event.POST_EPOCH, view=view)
    np.testing.assert_array_equal(state.mask["kernel"], np.abs(w) <= np.sort(np.abs(w), axis=None)[3])


def test_a_zero_target_prunes_nothing(w, train):
    t = pdp(sparsity=0.0, epsilon=1.0)
    params = t.attach({"kernel": w})
    np.testing.assert_array_equal(t.apply(params, train(t, params))[0].model["kernel"], w)


@pytest.mark.parametrize("kernel", [[[0.5]], [[0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.3, 0.3], [0.3, 0.3]]])
def test_small_and_constant_kernels_stay_finite(kernel, train):
    t = pdp(sparsity=0.5, epsilon=1.0)
    params = t.attach({"kernel": jnp.float32(kernel)})
    state = train(t, params)
    value, grads = jax.jit(jax.value_and_grad(lambda p: jnp.sum(t.apply(p, state)[0].model["kernel"])))(params)
    assert np.isfinite(value)
    assert np.all(np.isfinite(grads.model["kernel"]))


def test_errors(w):
    with pytest.raises(TransformError, match="'is_kernel' matches no parameter"):
        pdp(sparsity=0.5).attach({"bias": w[0]})


# PQuantML, torch backend, structured: the same settings, one mask for each output channel
STRUCTURED = [[0.4702037, -0.1880815, 0.0470204, -0.8463666], [0.0258299, 0.0086100, -0.0602697, 0.0017220]]
STRUCTURED_DW = [[0.775199, 1.946898, 2.804702, 4.059005], [0.587939, 0.569078, 0.235335, 0.699293]]
OUT_FIRST = {"kernel": AxisRole((1,), (0,), "input")}


@pytest.mark.parametrize("out_first", [True, False])
def test_golden_structured(out_first, w, upstream, train):
    turn, roles = (lambda a: a, OUT_FIRST) if out_first else (jnp.transpose, None)
    t = pdp(sparsity=0.5, temperature=0.1, epsilon=1.0, groups="out", roles=roles)
    params = t.attach({"kernel": turn(w)})
    state = train(t, params)

    def loss(params):
        out = t.apply(params, state)[0].model["kernel"]
        return jnp.sum(turn(upstream) * out), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(turn(out), STRUCTURED, rtol=0, atol=1e-6)
    np.testing.assert_allclose(turn(grads.model["kernel"]), STRUCTURED_DW, rtol=1e-6, atol=1e-6)


def masks_after(tell, t, params, state=None):
    """The soft masks of an epoch and the masks that fine-tuning gets."""
    return jax.jit(lambda params, state: both_masks(tell, t, params, state))(params, t.init(params) if state is None else state)


def both_masks(tell, t, params, state):
    _, state = tell(t, params, state, Event.PRE_EPOCH)
    soft = t.apply(params, state)[0].masks
    _, state = tell(t, params, state, Event.POST_EPOCH)
    return soft, tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)[1].mask


def test_pquantml_keeps_19_of_100(key, tell):
    """float32 (1 - 0.8) * 100 truncates to 19."""
    kernel = {"kernel": jax.random.normal(key, (10, 10))}
    for compat, kept in (("pquantml", 19), (None, 20)):
        t = pdp(sparsity=0.8, epsilon=1.0, compat=compat)
        soft, final = masks_after(tell, t, t.attach(kernel))
        assert int((soft["kernel"] > 0.5).sum()) == int(final["kernel"].sum()) == kept


def test_pquantml_prunes_one_group_at_a_target_of_zero(w, tell):
    for compat, kept in (("pquantml", 7), (None, 8)):
        t = pdp(sparsity=0.0, epsilon=1.0, compat=compat)
        assert int(masks_after(tell, t, t.attach({"kernel": w}))[1]["kernel"].sum()) == kept


def test_pquantml_keeps_every_tie_when_it_rounds(tell):
    """All soft masks are 0.5: rounding keeps all weights, counting keeps half of them."""
    for compat, kept in (("pquantml", 8), (None, 4)):
        t = pdp(sparsity=0.5, epsilon=1.0, compat=compat)
        soft, final = masks_after(tell, t, t.attach({"kernel": jnp.full((2, 4), 0.25)}))
        np.testing.assert_array_equal(soft["kernel"], np.full((2, 4), 0.5))
        assert int(final["kernel"].sum()) == kept


def test_pquantml_fine_tunes_with_the_stored_mask(w, tell, train):
    """Weights that moved after the last epoch's end, as a rewind moves them: ours scores what fine-tuning starts from."""
    moved = {"kernel": w[::-1, ::-1]}
    for compat, expected in (("pquantml", w), (None, moved["kernel"])):
        t = pdp(sparsity=0.5, epsilon=1.0, compat=compat)
        params = t.attach({"kernel": w})
        _, state = tell(t, params, train(t, params), Event.POST_EPOCH)
        _, state = tell(t, params._replace(model=moved), state, Event.PRE_FINETUNE, Stage.FINETUNE)
        np.testing.assert_array_equal(state.mask["kernel"], np.abs(expected) > 0.2)


@functools.cache
def compiled(tell, shape, **options):
    """(kernel, target) -> both masks, compiled once for all examples."""
    t = pdp(sparsity=0.0, epsilon=1.0, temperature=1e-9, **options)

    def run(kernel, target):
        params = t.attach({"kernel": kernel})
        return both_masks(tell, t, params, with_hyper(t.init(params), sparsity=target))

    return jax.jit(run)


@given(st.sampled_from([(1, 2, 5, 3), (2, 4, 8, 2), (3, 4, 13, 2), (4, 4, 6, 1), (1, 4, 3, 2)]), st.integers(0, 99))
def test_nm_holds_in_every_group(tell, case, seed):
    """PQuantML promises N:M for PDP and has none."""
    n, m, into, out = case
    w = np.random.default_rng(seed).normal(size=(into, out)).astype(np.float32)
    soft, final = compiled(tell, w.shape, groups=NM(n, m))(w, 0.5)
    for start in range(0, into, m):
        group = slice(start, start + m)
        assert (np.asarray(final["kernel"])[group].sum(0) == min(n, len(w[group]))).all()
        np.testing.assert_array_equal(np.round(soft["kernel"][group]), final["kernel"][group])


def test_nm_is_soft_and_differentiable_inside_each_block(train):
    t = pdp(sparsity=0.5, epsilon=1.0, temperature=0.1, groups=NM(1, 2))
    params = t.attach({"kernel": jnp.float32([[0.5], [0.3], [0.2], [0.9]])})
    state = train(t, params)
    view, _ = t.apply(params, state)
    sigmoid = jax.nn.sigmoid(jnp.float32([0.25 - 0.16, 0.09 - 0.16, 0.04 - 0.3025, 0.81 - 0.3025]) / 0.1)
    np.testing.assert_allclose(view.masks["kernel"].ravel(), sigmoid, rtol=1e-6)
    grads = jax.grad(lambda p: t.apply(p, state)[0].model["kernel"][0, 0])(params).model["kernel"].ravel()
    assert grads[1] < 0 and np.all(grads[2:] == 0), "the neighbour in the block raises the threshold, other blocks don't"


@given(st.floats(0, 1, width=32), st.integers(0, 99))
def test_the_final_mask_is_within_one_weight_of_any_target(tell, target, seed):
    w = np.random.default_rng(seed).normal(size=(7, 9)).astype(np.float32)
    final = compiled(tell, w.shape)(w, target)[1]["kernel"]
    assert abs(int((final == 0).sum()) - target * w.size) <= 1


@pytest.mark.parametrize(
    "groups", ["weight", "row", "in", "out", "layer", NM(2, 4), Block(2, 3), Cross(), Reuse(5), Heads(2)], ids=str
)
def test_soft_and_final_masks_agree_in_density(groups, key, tell):
    """On every kind of group, uneven blocks and crosses (where rows and columns multiply) included."""
    t = pdp(sparsity=0.5, epsilon=1.0, temperature=1e-9, groups=groups)
    params = t.attach({"kernel": jax.random.normal(key, (14, 20))})
    soft, final = (np.asarray(m["kernel"]) for m in masks_after(tell, t, params))
    assert set(np.unique(final)) <= {0.0, 1.0}
    if groups != "layer":  # one group: all or nothing
        np.testing.assert_array_equal(soft > 0.5, final)
        assert isinstance(groups, NM) or abs(final.mean() - 0.5) <= 20 / 280  # 14 is no multiple of 4


@pytest.mark.parametrize("groups", ["weight", "row", "out", Block(2, 3), Cross()], ids=str)
def test_no_sort_in_the_step(groups, key):
    t = pdp(sparsity=0.5, groups=groups)
    params = t.attach({"kernel": jax.random.normal(key, (4, 6))})
    state = t.init(params)
    text = str(jax.make_jaxpr(lambda p: t.step(t.apply(p, state)[0], state, stage=jnp.int32(1), stats={}))(params))
    assert "while" in text or "scan" in text
    assert "sort" not in text.replace("unsorted", "") and "top_k" not in text


def test_a_global_budget_is_one_threshold(key, tell):
    t = pdp(sparsity=0.5, epsilon=1.0, budget="global")
    a, b = jax.random.normal(key, (8, 8)), 0.3 * jax.random.normal(jax.random.key(1), (8, 6))
    _, final = masks_after(tell, t, t.attach({"a": a, "b": b}))
    order = np.sort(np.abs(np.concatenate([a.ravel(), b.ravel()])))
    for path, w in (("a", a), ("b", b)):
        np.testing.assert_array_equal(final[path], np.abs(w) >= order[56])


def test_a_fisher_budget_prunes_where_the_loss_does_not_care(key, tell):
    t = pdp(sparsity=0.5, epsilon=1.0, budget="fisher")
    kernels = {"a": jax.random.normal(key, (8, 8)), "b": jax.random.normal(jax.random.key(1), (8, 8))}
    params = t.attach(kernels)
    gradient = {"a": jnp.ones((8, 8)), "b": jnp.full((8, 8), 1e-3)}
    _, state = t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats={"gradient": gradient})
    _, final = masks_after(tell, t, params, state)
    total = [int(final[p].sum()) for p in "ab"]
    assert t.needs == {"gradient"} and abs(sum(total) - 64) <= 1
    assert total[0] > 60


def test_every_rule_has_its_target(key, tell):
    t = pdp(sparsity={"a": 0.25, ".*": 0.75}, epsilon=1.0)
    _, final = masks_after(tell, t, t.attach({p: jax.random.normal(key, (8, 8)) for p in "ab"}))
    assert [int(final[p].sum()) for p in "ab"] == [48, 16]


def test_options_that_can_not_be(w):
    with pytest.raises(TransformError, match="no N:M"):
        pdp(sparsity=0.5, groups=NM(1, 2), compat="pquantml")
    with pytest.raises(TransformError, match="'pquantml' or None"):
        pdp(sparsity=0.5, compat="hgq2")
    with pytest.raises(TransformError, match="did you mean 'global'"):
        pdp(sparsity=0.5, budget="globl")
    with pytest.raises(TransformError, match="3 equal heads"):
        pdp(sparsity=0.5, groups=Heads(3)).attach({"kernel": w})
    with pytest.raises(TransformError, match="matches no kernel"):
        t = pdp(sparsity={"Dense.*": 0.5})
        t.init(t.attach({"kernel": w}))
