"""CS: PQuantML's values, the temperature, rounds under every rewind, and a hard mask that does not jump."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax._base import Event, Params, Stage
from pquant_jax._errors import TransformError
from pquant_jax.prune import cs
from pquant_jax.train._plan import REWINDS, schedule

# PQuantML, torch backend: s0 = 0, final_temp 200, after 5 post_epoch of 5
BETA, S, SOFT, HARD = 752.12, [[0.5, -0.5]], [[2, 0]], [[1, 0]]
BOTH = (None, "pquantml")


def ready(t, kernel, s):
    params = t.attach({"kernel": jnp.float32(kernel)})
    return Params(params.model, {"cs": {"kernel": jnp.float32(s)}})


def test_golden(tell):
    t = cs(compat="pquantml")
    params = ready(t, [[1, 1]], S)
    state = t.init(params)
    for epoch in range(5):
        params, state = tell(t, params, state, Event.POST_EPOCH, epoch=epoch, epochs=5)
    np.testing.assert_allclose(state.beta, BETA, rtol=1e-6)
    np.testing.assert_allclose(t.apply(params, state)[0].model["kernel"], SOFT, rtol=0, atol=1e-6)
    params, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    np.testing.assert_array_equal(t.apply(params, state)[0].model["kernel"], HARD)


def test_gradients_and_the_penalty_are_those_of_the_formula(w, upstream, train):
    s = 0.3 * jnp.cos(jnp.arange(8.0, dtype=jnp.float32)).reshape(w.shape)
    t = cs(decay=1e-3, threshold_init=-0.2)
    params, k = ready(t, w, s), 1 / jax.nn.sigmoid(-0.2)
    state = train(t, params)._replace(beta=jnp.float32(3))
    assert t.attach({"kernel": w}).extra["cs"]["kernel"].tolist() == np.full(w.shape, np.float32(-0.2)).tolist()

    def loss(params):
        view, _ = t.apply(params, state)
        return jnp.sum(upstream * view.model["kernel"]) + t.penalty(params, state, view), view

    (_, view), grads = jax.value_and_grad(loss, has_aux=True)(params)
    soft = np.asarray(jax.nn.sigmoid(3 * s))
    np.testing.assert_allclose(view.masks["kernel"], soft, rtol=1e-6)
    np.testing.assert_allclose(view.model["kernel"], w * soft * k, rtol=1e-6)
    np.testing.assert_allclose(grads.model["kernel"], upstream * soft * k, rtol=1e-6)
    slope = 3 * soft * (1 - soft) * k
    np.testing.assert_allclose(grads.extra["cs"]["kernel"], (upstream * w + 1e-3) * slope, rtol=1e-5)
    np.testing.assert_allclose(t.penalty(params, state, view), 1e-3 * np.sum(soft * k), rtol=1e-6)


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_the_temperature_is_1_in_the_first_epoch_and_final_in_the_last(epochs, tell):
    t = cs(final_temperature=200.0)
    params = ready(t, [[1, 1]], S)
    betas, state = [], t.init(params)
    for epoch in range(epochs):
        _, state = tell(t, params, state, Event.PRE_EPOCH, epoch=epoch, epochs=epochs)
        betas.append(float(state.beta))
        _, state = tell(t, params, state, Event.POST_EPOCH, epoch=epoch, epochs=epochs)
        assert float(state.beta) == betas[-1]
    np.testing.assert_allclose(betas, [200 ** (e / max(epochs - 1, 1)) for e in range(epochs)], rtol=1e-6)


def test_defect_the_temperature_overshoots_and_rises_in_pretraining(tell):
    """The reference multiplies E times by the (E - 1)-th root, in every stage, and starts training with what it has."""
    betas = {}
    for compat in BOTH:
        t = cs(compat=compat)
        params = ready(t, [[1, 1]], S)
        state = t.init(params)
        for epoch, event in itertools.product(range(5), (Event.PRE_EPOCH, Event.POST_EPOCH)):
            _, state = tell(t, params, state, event, Stage.PRETRAIN, epoch, 5)
        entered = float(tell(t, params, state, Event.PRE_EPOCH, epoch=0, epochs=5)[1].beta)
        state = t.init(params)
        for epoch, event in itertools.product(range(5), (Event.PRE_EPOCH, Event.POST_EPOCH)):
            _, state = tell(t, params, state, event, epoch=epoch, epochs=5)
        betas[compat] = [entered, float(state.beta)]
    np.testing.assert_allclose(betas[None], [1, 200], rtol=1e-6)
    np.testing.assert_allclose(betas["pquantml"], [200**1.25, 200**1.25], rtol=1e-6)


@pytest.mark.parametrize("s0", [0.0, -0.5, 1.0])
def test_defect_weights_halve_when_fine_tuning_begins(s0, w, tell, train):
    """The soft mask saturates at 1 / sigmoid(s0), which is 2 for s0 = 0; the reference's hard mask at 1."""
    s, scale = jnp.where(jnp.abs(w) > 0.25, 1.0, -1.0), 1 / jax.nn.sigmoid(jnp.float32(s0))
    views = {}
    for compat in BOTH:
        t = cs(threshold_init=s0, compat=compat)
        params = ready(t, w, s)
        before = train(t, params)._replace(beta=jnp.float32(200))
        _, after = tell(t, params, before, Event.PRE_FINETUNE, Stage.FINETUNE)
        views[compat] = [np.asarray(t.apply(params, state)[0].model["kernel"]) for state in (before, after)]
        np.testing.assert_allclose(views[compat][0], np.where(s > 0, w * scale, 0), rtol=1e-6)
    np.testing.assert_array_equal(*views[None])
    np.testing.assert_array_equal(views["pquantml"][1], np.where(s > 0, w, 0))


def test_nothing_jumps_when_training_begins(w, train, tell):
    """At beta = 1 and s = s0 the scaled mask is 1, so that the first epoch sees the pre-trained weights."""
    t = cs(threshold_init=-0.7)
    params = t.attach({"kernel": w})
    dense = train(t, params, stage=Stage.PRETRAIN)
    view, _ = t.apply(params, dense)
    np.testing.assert_array_equal(view.model["kernel"], w)
    assert float(t.penalty(params, dense, view)) == 0
    _, begun = tell(t, params, dense, Event.PRE_EPOCH)
    np.testing.assert_allclose(t.apply(params, begun)[0].model["kernel"], w, rtol=1e-6)


def test_the_mask_is_frozen_in_fine_tuning(w, tell, train):
    t = cs()
    params = ready(t, w, w)
    params, state = tell(t, params, train(t, params), Event.PRE_FINETUNE, Stage.FINETUNE)
    later = ready(t, w + 10, -w)
    for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
        later, state = tell(t, later, state, event, Stage.FINETUNE)
        later, state = t.step(later, state, stage=jnp.int32(Stage.FINETUNE), stats={})
        view, _ = t.apply(later, state)
        np.testing.assert_array_equal(view.model["kernel"], np.where(w > 0, (w + 10) * 2, 0))
        np.testing.assert_array_equal(view.masks["kernel"], w > 0)
        assert float(t.penalty(later, state, view)) == 0


@pytest.mark.parametrize("compat", BOTH)
@pytest.mark.parametrize("rewind", REWINDS)
def test_every_round_cuts_for_good_whatever_is_rewound(rewind, compat, tell):
    """What was cut can't come back, what lives starts at s0; the reference's "every-round" has no end of a round."""
    t = cs(threshold_init=0.1, compat=compat)
    params = ready(t, [[1, 1, 1]], [[0.5, 0.05, -0.5]])
    state = t.init(params)
    seen = []
    for slot in schedule(pq.Plan(pretrain=0, train=3, finetune=0, rounds=3, rewind=rewind)):
        now = dict(stage=slot.stage, epoch=slot.epoch, epochs=slot.epochs)
        params, state = tell(t, params, state, Event.PRE_EPOCH, **now)
        params, state = t.step(params, state, stage=jnp.int32(slot.stage), stats={})
        params, state = tell(t, params, state, Event.POST_EPOCH, **now)
        for event, stage in slot.after:
            params, state = tell(t, params, state, event, **{**now, "stage": stage})
            if event == Event.POST_ROUND:
                assert float(state.beta) == 1
                seen.append(np.asarray(params.extra["cs"]["kernel"])[0])
    heat = 200 ** (1.5 if compat else 1)
    assert len(seen) == 2
    np.testing.assert_allclose(seen[0], [0.1, 0.1, -0.5 * heat], rtol=1e-5)
    np.testing.assert_allclose(seen[1], [0.1, 0.1, -0.5 * heat**2], rtol=1e-5)
    np.testing.assert_array_equal(state.mask["kernel"], [[1, 1, 0]])


def test_many_rounds_stay_finite(tell):
    t = cs()
    params = ready(t, [[1, 1]], [[0.5, -0.5]])
    state = t.init(params)
    for _ in range(20):  # 200^20 is beyond float32
        state = state._replace(beta=jnp.float32(200), stage=jnp.int32(Stage.TRAIN))
        params, state = tell(t, params, state, Event.POST_ROUND)
    grads = jax.grad(lambda p: jnp.sum(t.apply(p, state)[0].model["kernel"]))(params)
    assert np.isfinite(params.extra["cs"]["kernel"]).all()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("rewind", REWINDS)
def test_rounds_progress_in_training(rewind):
    """The temperature starts at 1 again and what was cut stays cut, whenever the weights go back; s never does."""
    x = np.random.default_rng(0).normal(size=(128, 4)).astype(np.float32)
    part = pq.data.Split(x, (x[:, 0] > 0).astype(np.int32))
    data = pq.data.Dataset(part, part, part, classes=("0", "1"))
    model = pq.from_function(lambda p, x: x @ p["kernel"], {"kernel": jnp.full((4, 2), 0.3)})
    t = cs(decay=1e-2)
    states = []
    pq.fit(
        pq.instrument(model, x[:2]),
        data,
        plan=pq.Plan(pretrain=0, train=2, finetune=1, rounds=2, rewind=rewind),
        compression=t,
        optimizer=pq.optimizer(t, weights=optax.adam(1e-2), thresholds=optax.adam(1e-1)),
        batch_size=32,
        callbacks=[lambda record, state: states.append(state)],
    )
    s, cut = np.asarray(states[1].params.extra["cs"]["kernel"]), np.asarray(states[0].params.extra["cs"]["kernel"]) < -0.1
    start = np.full((4, 2), 0.3, np.float32)
    back = [np.array_equal(states[n].params.model["kernel"], start) for n in (1, 3)]
    assert back == {"never": [False, False], "every-round": [True, True], "post-training-stage": [False, True]}[rewind]
    np.testing.assert_allclose([float(pq.state_of(v.opt_state).beta) for v in states], [1, 1, 1, 200, 200], rtol=1e-6)
    assert cut.any()
    assert np.all(s[cut] < -1)
    assert np.all(s <= 0)
    np.testing.assert_array_equal(pq.state_of(states[-1].opt_state).mask["kernel"][cut], 0)


@pytest.mark.parametrize(("target", "left"), [(0.75, 0.75), (0.25, 0.25), (0.5, 0.5)])
def test_a_target_moves_all_s_alike(target, left, tell, train):
    """Half are cut by themselves.  What a former round has cut stays far below."""
    t = cs(target=target)
    params = ready(t, [[1, 1], [1, 1]], [[0.3, 0.1], [-0.1, -80]])
    after, state = tell(t, params, train(t, params), Event.POST_EPOCH, epoch=9)
    before, s = np.asarray(params.extra["cs"]["kernel"]), np.asarray(after.extra["cs"]["kernel"])
    assert np.mean(s <= 0) == left
    assert s[1, 1] < -79
    np.testing.assert_allclose(s - before, np.full((2, 2), (s - before)[0, 0]), atol=1e-5)
    np.testing.assert_array_equal(state.mask["kernel"], s > 0)


def test_a_target_waits_for_its_ramp(tell, train):
    """In the first epoch of ten a sparsity of a half lies between 0.075 and 0.75."""
    t = cs(target=0.75)
    params = ready(t, [[1, 1], [1, 1]], [[0.3, 0.1], [-0.1, -0.2]])
    after, _ = tell(t, params, train(t, params), Event.POST_EPOCH, epoch=0)
    np.testing.assert_array_equal(after.extra["cs"]["kernel"], params.extra["cs"]["kernel"])


def test_errors(w):
    with pytest.raises(TransformError, match="'is_kernel' matches no parameter"):
        cs().attach({"bias": w[0]})
