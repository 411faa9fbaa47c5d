"""DST: PQuantML's values, the stages, and the reset of a collapsed layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import AxisRole, Event, Params, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax._tree import sparsity
from pquant_jax.prune import dst

# PQuantML, torch backend: channelwise T = [.25, .15], alpha = 5e-6, loss = sum(upstream * out)
THRESHOLDS = [0.25, 0.15]
OUT = [[0.5, 0, 0, -0.9], [0.3, 0, -0.7, 0]]
DW = [[1.5, 0.72, 0.18, 5.44], [7.1, 1.08, 8.96, 0.2368]]
DT = [1.48, -1.4568]
LOSS = 8.197543e-6
# output channel on axis 0 as in torch and equinox, and on the last as in linen, which is the default
LAYOUTS = {
    "out first": (lambda a: a, {"kernel": AxisRole((1,), (0,), "input")}, (2, 1)),
    "out last": (jnp.transpose, {"kernel": AxisRole((0,), (1,), "input")}, (1, 2)),
    "default": (jnp.transpose, None, (1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_golden_channelwise(layout, w, upstream, train):
    turn, roles, shape = LAYOUTS[layout]
    t = dst(alpha=5e-6, granularity="channel", roles=roles)
    params = t.attach({"kernel": turn(w)})
    assert params.extra["dst"]["kernel"].shape == shape
    params = Params(params.model, {"dst": {"kernel": jnp.float32(THRESHOLDS).reshape(shape)}})
    state = train(t, params)

    def loss(params):
        view, _ = t.apply(params, state)
        return jnp.sum(turn(upstream) * view.model["kernel"]), view

    (_, view), grads = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(view.model["kernel"], turn(jnp.float32(OUT)), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(view.masks["kernel"], np.asarray(turn(jnp.float32(OUT))) != 0)
    np.testing.assert_allclose(grads.model["kernel"], turn(jnp.float32(DW)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(grads.extra["dst"]["kernel"].ravel(), DT, rtol=0, atol=1e-6)
    np.testing.assert_allclose(t.penalty(params, state, view), LOSS, rtol=1e-6)


@pytest.mark.parametrize(("granularity", "shape"), [("weight", (4, 3)), ("channel", (1, 3)), ("layer", (1, 1))])
def test_threshold_shapes(granularity, shape):
    params = dst(alpha=1.0, granularity=granularity).attach({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)})
    assert {k: v.shape for k, v in params.extra["dst"].items()} == {"kernel": shape}


def test_threshold_shapes_of_a_convolution():
    roles = {"kernel": AxisRole((0, 1, 2), (3,), "input")}
    params = dst(alpha=1.0, granularity="channel", roles=roles).attach({"kernel": jnp.ones((3, 3, 2, 5))})
    assert params.extra["dst"]["kernel"].shape == (1, 1, 1, 5)


def test_threshold_init_is_honoured(w, train):
    t = dst(alpha=1.0, threshold_init=0.25)
    params = t.attach({"kernel": w})
    np.testing.assert_array_equal(params.extra["dst"]["kernel"], np.full(w.shape, 0.25, np.float32))
    view, _ = t.apply(params, train(t, params))
    np.testing.assert_array_equal(view.model["kernel"], np.where(np.abs(w) > 0.25, w, 0))


def test_dense_in_pretraining(w, train):
    t = dst(alpha=1.0, threshold_init=0.25)
    params = t.attach({"kernel": w})
    for state in (t.init(params), train(t, params, stage=Stage.PRETRAIN)):
        view, _ = t.apply(params, state)
        np.testing.assert_array_equal(view.model["kernel"], w)
        np.testing.assert_array_equal(view.masks["kernel"], np.ones(w.shape))
        assert float(t.penalty(params, state, view)) == 0
    _, state = t.step(params, t.init(params), stage=jnp.int32(Stage.PRETRAIN), stats={})
    np.testing.assert_array_equal(state.mask["kernel"], np.ones(w.shape))


def test_the_mask_is_frozen_in_fine_tuning(w, train, tell):
    t = dst(alpha=1.0, threshold_init=0.25)
    params = t.attach({"kernel": w})
    _, state = t.step(params, train(t, params), stage=jnp.int32(Stage.TRAIN), stats={})
    _, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    grown = Params({"kernel": w + 10}, {"dst": {"kernel": jnp.full(w.shape, 100.0)}})
    kept = np.abs(w) > 0.25
    for _ in range(3):
        view, _ = t.apply(grown, state)
        np.testing.assert_array_equal(view.masks["kernel"], kept)
        np.testing.assert_array_equal(view.model["kernel"], np.where(kept, w + 10, 0))
        assert float(t.penalty(grown, state, view)) == 0
        after, state = t.step(grown, state, stage=jnp.int32(Stage.FINETUNE), stats={})
        after, state = tell(t, after, state, Event.POST_EPOCH, Stage.FINETUNE)
        np.testing.assert_array_equal(after.extra["dst"]["kernel"], np.full(w.shape, 100))


@pytest.mark.parametrize(("threshold", "collapsed"), [(0.8, True), (0.6, False)])
@pytest.mark.parametrize("event", Event)
def test_a_layer_that_ends_an_epoch_at_max_sparsity_gets_its_thresholds_back(threshold, collapsed, event, w, train, tell):
    """7 of 8 weights lie below 0.8, 6 below 0.6."""
    t = dst(alpha=1.0, max_sparsity=7 / 8)
    thresholds = {"a": jnp.full(w.shape, threshold), "b": jnp.full(w.shape, 0.1)}
    params = t.attach({"a": w, "b": w})._replace(extra={"dst": thresholds})
    after, _ = tell(t, params, train(t, params), event)
    reset = collapsed and event in (Event.POST_EPOCH, Event.PRE_FINETUNE)
    np.testing.assert_array_equal(after.extra["dst"]["a"], np.full(w.shape, 0 if reset else threshold, np.float32))
    np.testing.assert_array_equal(after.extra["dst"]["b"], thresholds["b"])


def test_only_the_training_stage_resets(w, tell, train):
    t = dst(alpha=1.0, threshold_init=100.0)
    params = t.attach({"kernel": w})
    for stage in (Stage.PRETRAIN, Stage.FINETUNE):
        after, _ = tell(t, params, train(t, params, stage=stage), Event.POST_EPOCH, stage)
        np.testing.assert_array_equal(after.extra["dst"]["kernel"], np.full(w.shape, 100))


@pytest.mark.parametrize("events", [(Event.POST_EPOCH, Event.PRE_FINETUNE), (Event.PRE_FINETUNE,)])
def test_a_collapsed_mask_is_not_what_fine_tuning_freezes(events, w, train, tell):
    """A layer that gets its thresholds back as the training stage ends is dense from then on, not empty."""
    t = dst(alpha=1.0, threshold_init=100.0)
    params = t.attach({"kernel": w})
    state = train(t, params)
    for event in events:
        params, state = tell(t, params, state, event, Stage.FINETUNE if event == Event.PRE_FINETUNE else Stage.TRAIN)
    np.testing.assert_array_equal(params.extra["dst"]["kernel"], np.zeros(w.shape))
    np.testing.assert_array_equal(t.apply(params, state)[0].model["kernel"], w)


def test_the_penalty_pushes_thresholds_up_and_with_it_the_sparsity(key, train):
    """Trained on the penalty alone, thresholds rise until the layer collapses and is given back."""
    t = dst(alpha=1.0)
    params = t.attach({"kernel": jax.random.normal(key, (20, 10))})
    state = train(t, params)
    seen = []
    for _ in range(12):
        grads = jax.grad(lambda p, s=state: t.penalty(p, s, View(p.model, {}, {})))(params)
        moved = Params(params.model, jax.tree.map(lambda v, g: v - 0.1 * g, params.extra, grads.extra))
        params, state = t.step(moved, state, stage=jnp.int32(Stage.TRAIN), stats={}, previous=params)
        seen.append(float(sparsity(t.apply(params, state)[0].masks)))
    assert np.all(np.diff(seen) > 0) and seen[-1] > 0.5


def test_errors(w):
    with pytest.raises(TransformError, match=r"'chanel'.*'weight', 'channel' or 'layer'"):
        dst(alpha=1.0, granularity="chanel")
    with pytest.raises(TransformError, match="'is_kernel' matches no parameter"):
        dst(alpha=1.0).attach({"bias": w[0]})


def test_defect_threshold_init_is_ignored(w, train):
    """The reference starts at T = 0 whatever is asked for."""
    pruned = {}
    for compat in (None, "pquantml"):
        t = dst(alpha=1.0, threshold_init=0.25, compat=compat)
        params = t.attach({"kernel": w})
        pruned[compat] = np.asarray(t.apply(params, train(t, params))[0].model["kernel"])
    np.testing.assert_array_equal(pruned[None], np.where(np.abs(w) > 0.25, w, 0))
    np.testing.assert_array_equal(pruned["pquantml"], w)


def test_defect_a_single_batch_resets_a_layer(w, train):
    """The reference looks at the sparsity in every forward, so one step's overshoot loses all that was learned."""
    thresholds = {}
    for compat in (None, "pquantml"):
        t = dst(alpha=1.0, max_sparsity=7 / 8, compat=compat)
        params = Params({"a": w, "b": w}, {"dst": {"a": jnp.full(w.shape, 0.8), "b": jnp.full(w.shape, 0.1)}})
        state = train(t, params)
        for stage in (Stage.PRETRAIN, Stage.FINETUNE):
            untouched, _ = t.step(params, state, stage=jnp.int32(stage), stats={})
            jax.tree.map(np.testing.assert_array_equal, untouched, params)
        after, _ = t.step(params, state, stage=jnp.int32(Stage.TRAIN), stats={})
        thresholds[compat] = after.extra["dst"]
        np.testing.assert_array_equal(after.extra["dst"]["b"], params.extra["dst"]["b"])
    np.testing.assert_array_equal(thresholds[None]["a"], np.full(w.shape, 0.8, np.float32))
    np.testing.assert_array_equal(thresholds["pquantml"]["a"], np.zeros(w.shape))


def test_a_target_moves_the_weight_of_the_penalty(w, train, tell):
    """Sparse enough: alpha falls; too dense: it rises; by exp(gain * (wanted - sparsity))."""
    for target, wanted in ((0.75, 0.75 - 0.5), (0.25, 0.25 - 0.5)):
        t = dst(alpha=1e-3, threshold_init=0.15, target=target, gain=4.0)
        params = t.attach({"kernel": jnp.abs(w).at[0, 1].set(0.1)})  # half of them above 0.15
        state = train(t, params)
        before = t.penalty(params, state, t.apply(params, state)[0])
        params, state = tell(t, params, state, Event.POST_EPOCH, epoch=9)
        after = t.penalty(params, state, t.apply(params, state)[0])
        np.testing.assert_allclose(after / before, np.exp(4 * wanted), rtol=1e-5)
