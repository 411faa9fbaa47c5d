"""PDP: PQuantML's values, the ramp, and the exact sparsity at the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import Event, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax.prune import pdp
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
