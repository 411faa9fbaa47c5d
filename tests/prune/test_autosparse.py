"""AutoSparse: PQuantML's values, the gradient of what is cut, and a fine-tuning that does not jump."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._base import AxisRole, Event, Params, Stage
from pquant_jax._errors import TransformError
from pquant_jax._tree import sparsity
from pquant_jax.prune import autosparse
from pquant_jax.prune._autosparse import soft_threshold
from pquant_jax.transforms import with_hyper

# PQuantML, torch backend: channelwise T = -1, alpha = .5, loss = sum(upstream * out)
OUT = [[0.2310586, 0, 0, -0.6310586], [0.0310586, 0, -0.4310586, 0]]
DW = [[1, 1, 1.5, 4], [5, 3, 7, 4]]
DT = [0.4915299, -0.9830597]
ALPHAS = {0: 0.5, 3: 0.4584137, 6: 0.1727457, 9: 0.0122359}  # after post_epoch(e, 10)
LAYOUTS = {
    "out first": (lambda a: a, {"kernel": AxisRole((1,), (0,), "input")}, (2, 1)),
    "out last": (jnp.transpose, {"kernel": AxisRole((0,), (1,), "input")}, (1, 2)),
    "default": (jnp.transpose, None, (1, 2)),
}


def gradients(t, params, state, upstream):
    def loss(params):
        view, _ = t.apply(params, state)
        return jnp.sum(upstream * view.model["kernel"]), view

    (_, view), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return view, grads


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_channelwise(layout, w, upstream, train):
    turn, roles, shape = LAYOUTS[layout]
    t = autosparse(alpha=0.5, threshold_init=-1.0, roles=roles)
    params = t.attach({"kernel": turn(w)})
    assert params.extra["autosparse"]["kernel"].shape == shape
    state = train(t, params)
    view, grads = gradients(t, params, state, turn(upstream))
    np.testing.assert_allclose(view.model["kernel"], turn(jnp.float32(OUT)), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(view.masks["kernel"], np.asarray(turn(jnp.float32(OUT))) != 0)
    np.testing.assert_allclose(grads.model["kernel"], turn(jnp.float32(DW)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(grads.extra["autosparse"]["kernel"].ravel(), DT, rtol=0, atol=1e-6)
    assert float(t.penalty(params, state, view)) == 0


@pytest.mark.parametrize(("granularity", "shape"), [("weight", (4, 3)), ("channel", (1, 3)), ("layer", (1, 1))])
def test_threshold_shapes(granularity, shape):
    params = autosparse(granularity=granularity).attach({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})
    assert {k: v.shape for k, v in params.extra["autosparse"].items()} == {"kernel": shape}
    assert float(params.extra["autosparse"]["kernel"].max()) == -5


@pytest.mark.parametrize(("compat", "event"), [(None, Event.PRE_EPOCH), ("pquantml", Event.POST_EPOCH)])
def test_golden_alpha(compat, event, w, tell):
    t = autosparse(compat=compat)
    params = t.attach({"kernel": w})
    for epoch, alpha in ALPHAS.items():
        _, state = tell(t, params, t.init(params), event, epoch=epoch, epochs=10)
        np.testing.assert_allclose(state.alpha, alpha, rtol=0, atol=1e-6)


def test_alpha_is_zero_from_its_reset_epoch_on(w, tell):
    t = autosparse(alpha_reset_epoch=3)
    params = t.attach({"kernel": w})
    alphas = [float(tell(t, params, t.init(params), Event.PRE_EPOCH, epoch=e)[1].alpha) for e in range(5)]
    assert all(a > 0 for a in alphas[:3])
    assert alphas[3:] == [0, 0]


def test_defect_alpha_decays_in_pretraining_and_one_epoch_late(w, tell):
    """The reference enters training with an alpha of nearly 0, and without pre-training repeats its first one."""
    first, second = {}, {}
    for compat in (None, "pquantml"):
        t = autosparse(compat=compat)
        params = t.attach({"kernel": w})
        state = t.init(params)
        for epoch in range(10):
            for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
                _, state = tell(t, params, state, event, Stage.PRETRAIN, epoch)
        first[compat] = float(tell(t, params, state, Event.PRE_EPOCH)[1].alpha)
        state = t.init(params)
        for event, epoch in ((Event.PRE_EPOCH, 0), (Event.POST_EPOCH, 0), (Event.PRE_EPOCH, 1)):
            _, state = tell(t, params, state, event, epoch=epoch)
        second[compat] = float(state.alpha)
    assert first[None] == 0.5
    assert first["pquantml"] < 0.02
    assert second[None] < 0.5
    assert second["pquantml"] == 0.5


def test_defect_weights_jump_when_fine_tuning_begins(w, tell, train):
    """The reference goes from the shrunk weights to the whole ones: 0.2311 -> 0.5."""
    views = {}
    for compat in (None, "pquantml"):
        t = autosparse(threshold_init=-1.0, granularity="layer", compat=compat)
        params = t.attach({"kernel": w})
        before = train(t, params)
        _, after = tell(t, params, before, Event.PRE_FINETUNE, Stage.FINETUNE)
        views[compat] = [np.asarray(t.apply(params, state)[0].model["kernel"]) for state in (before, after)]
        np.testing.assert_allclose(views[compat][0], OUT, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(*views[None])
    np.testing.assert_array_equal(views["pquantml"][1], np.where(np.array(OUT) != 0, w, 0))


def test_not_a_bit_moves_when_fine_tuning_begins(key, tell, train):
    t = autosparse(threshold_init=-0.3)
    params = t.attach({"kernel": jax.random.normal(key, (40, 30))})
    before = train(t, params)
    _, after = tell(t, params, before, Event.PRE_FINETUNE, Stage.FINETUNE)
    views = [t.apply(params, state)[0] for state in (before, after)]
    assert 0.2 < float(sparsity(views[0].masks)) < 0.8
    jax.tree.map(np.testing.assert_array_equal, *views)


def test_mask_and_thresholds_are_frozen_in_fine_tuning(w, upstream, tell, train):
    t = autosparse(threshold_init=-1.0, granularity="layer")
    params = t.attach({"kernel": w})
    params, state = tell(t, params, train(t, params), Event.PRE_FINETUNE, Stage.FINETUNE)
    kept, shrunk = np.array(OUT) != 0, np.asarray(t.apply(params, state)[0].model["kernel"])
    later = Params({"kernel": w - 0.3}, {"autosparse": {"kernel": jnp.full((1, 1), 5.0)}})
    view, grads = gradients(t, later, state, upstream)
    np.testing.assert_allclose(view.model["kernel"], np.where(kept, shrunk - 0.3, 0), rtol=0, atol=1e-6)  # one passes 0
    np.testing.assert_array_equal(view.masks["kernel"], kept)
    np.testing.assert_array_equal(grads.model["kernel"], np.where(kept, upstream, 0))
    np.testing.assert_array_equal(grads.extra["autosparse"]["kernel"], [[0]])
    for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
        later, state = tell(t, later, state, event, Stage.FINETUNE)
        later, state = t.step(later, state, stage=jnp.int32(Stage.FINETUNE), stats={})
    np.testing.assert_array_equal(t.apply(later, state)[0].model["kernel"], view.model["kernel"])
    np.testing.assert_array_equal(later.extra["autosparse"]["kernel"], [[5]])


def test_dense_in_pretraining(w, train):
    t = autosparse(threshold_init=1.0)
    params = t.attach({"kernel": w})
    for state in (t.init(params), train(t, params, stage=Stage.PRETRAIN)):
        view, _ = t.apply(params, state)
        np.testing.assert_array_equal(view.model["kernel"], w)
        np.testing.assert_array_equal(view.masks["kernel"], np.ones(w.shape))


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, 4), (0.8, 1), (1.0, 1), (0.25, 6), (0.0, 8)])
@pytest.mark.parametrize("threshold", [-8.0, -1.0, 8.0])  # nothing, a part and everything is below it
def test_backward_sparsity_leaves_the_highest_their_gradient(fraction, kept, threshold, w, train):
    t = autosparse(alpha=0.5, threshold_init=threshold, granularity="layer", backward_sparsity=fraction)
    params = t.attach({"kernel": w})
    _, grads = gradients(t, params, train(t, params), jnp.ones(w.shape))
    level = jax.nn.sigmoid(jnp.float32(threshold))
    highest = np.abs(w) >= np.sort(np.abs(w), axis=None)[-kept]
    expected = np.where(highest, np.where(np.abs(w) > level, 1, 0.5), 0)
    np.testing.assert_array_equal(grads.model["kernel"], expected)


def test_backward_sparsity_counts_as_the_reference_and_is_traced(train):
    """int(0.5 * 7) = 3 of 7 keep their gradient."""
    w = jnp.linspace(0.1, 0.7, 7)[:, None]
    t = autosparse(backward_sparsity=0.5)
    params = t.attach({"kernel": w})
    state = train(t, params)
    counts = [
        int(jnp.sum(gradients(t, params, s, jnp.ones(w.shape))[1].model["kernel"] != 0))
        for s in (state, with_hyper(state, backward_sparsity=0.0))
    ]
    assert counts == [3, 7]


def test_a_weight_of_zero_can_come_back(train):
    """sign(0) = 0 in the reference's product, so a rewound or quantized 0 would stay for ever."""
    t = autosparse(alpha=0.5)
    params = t.attach({"kernel": jnp.float32([[0.0], [0.5]])})
    _, grads = gradients(t, params, train(t, params), jnp.ones((2, 1)))
    assert grads.model["kernel"].ravel().tolist() == [0.5, 1.0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20), st.floats(0, 1.5, width=32))
def test_soft_thresholding(values, level):
    """It is odd, never grows a weight, moves none by more than the level, and keeps order."""
    w = jnp.sort(jnp.float32(values))
    out = np.asarray(soft_threshold(w, jnp.float32(level), jnp.float32(0.5), jnp.float32(-jnp.inf)))
    np.testing.assert_array_equal(soft_threshold(-w, jnp.float32(level), jnp.float32(0.5), jnp.float32(-jnp.inf)), -out)
    assert np.all(np.abs(out) <= np.abs(w))
    assert np.all(np.abs(out - w) <= np.float32(level) * (1 + 1e-6))
    assert np.all(np.diff(out) >= 0)


def test_a_target_brings_back_cut_weights_with_what_they_were_cut_by(w, tell, train):
    """All are cut, half are wanted: the four least cut come back, small, with their sign."""
    t = autosparse(threshold_init=8.0, granularity="layer", target=0.5)
    params = t.attach({"kernel": w})
    params, state = tell(t, params, train(t, params), Event.PRE_FINETUNE, Stage.FINETUNE)
    view, _ = t.apply(params, state)
    assert float(sparsity(view.masks)) == 0.5
    level, largest = jax.nn.sigmoid(8.0), np.abs(w) >= 0.3
    expected = np.where(largest, np.sign(w) * np.abs(np.abs(w) - level), 0)
    np.testing.assert_allclose(view.model["kernel"], expected, rtol=0, atol=1e-6)


def test_errors(w):
    with pytest.raises(TransformError, match=r"'chanel'.*'weight', 'channel' or 'layer'"):
        autosparse(granularity="chanel")
    with pytest.raises(TransformError, match="'is_kernel' matches no parameter"):
        autosparse().attach({"bias": w[0]})
