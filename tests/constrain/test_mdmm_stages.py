"""What the stages do to a multiplier and to the masks, against what PQuantML does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax._base import Event, Params, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax.constrain import Metric, mdmm, metrics
from pquant_jax.transforms import with_hyper

OFF = (Stage.PRETRAIN, Stage.FINETUNE)


def value(params: Params, view: View) -> jax.Array:
    del view
    return jnp.sum(params.model["a"]["kernel"])


@pytest.fixture
def model(key):
    a, b = jax.random.split(key)
    return {"a": {"kernel": jax.random.normal(a, (4, 6))}, "b": {"kernel": jax.random.normal(b, (6, 2))}}


def tell(t, params, state, event, stage):
    return t.boundary(
        params, state, stats={}, **{k: jnp.int32(v) for k, v in dict(event=event, stage=stage, epoch=0, epochs=1).items()}
    )


@pytest.mark.parametrize("stage", OFF)
@pytest.mark.parametrize("metric", [value, lambda params, view: jnp.float32(jnp.inf)], ids=["finite", "infinite"])
def test_no_penalty_and_no_gradient_outside_the_training_stage(model, stage, metric):
    t = mdmm(metric, kind="==", target=1.0, initial=0.7)
    params = t.attach(model)
    _, state = t.step(params, t.init(params), stage=jnp.int32(stage), stats={}, previous=params)
    found, grads = jax.value_and_grad(lambda p: t.penalty(p, state, t.apply(p, state)[0]))(params)
    assert float(found) == 0
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


def run(t, model, stages, duals, weights=None):
    """Plain optax through these stages: the multiplier after every step."""
    tx = pq.optimizer(t, weights=optax.sgd(1e-2) if weights is None else weights, duals=duals)
    params = t.attach(model)
    opt_state, seen, last = tx.init(params), [], None
    for stage in stages:
        if last == Stage.TRAIN and stage == Stage.FINETUNE:
            params, opt_state = pq.boundary(t, params, opt_state, event=Event.PRE_FINETUNE, stage=stage)
        elif stage != last:
            params, opt_state = pq.boundary(t, params, opt_state, event=Event.PRE_EPOCH, stage=stage)
        state, last = pq.state_of(opt_state), stage
        grads = jax.grad(lambda p, s=state: t.penalty(p, s, t.apply(p, s)[0]))(params)
        updates, opt_state = tx.update(grads, opt_state, params, stage=jnp.int32(stage))
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params.extra["mdmm"]["multiplier"]))
    return seen


def test_the_multiplier_grows_in_the_references_pretraining_and_not_in_ours(model):
    stages = [Stage.PRETRAIN] * 4
    ours = run(mdmm(value, kind="==", target=50.0, initial=0.7), model, stages, optax.adam(0.1))
    assert set(map(float, ours)) == {float(np.float32(0.7))}
    theirs = run(mdmm(value, kind="==", target=50.0, compat="pquantml"), model, stages, optax.adam(0.1))
    assert np.all(np.diff(theirs)[1:] > 0) and theirs[0] == 1


@pytest.mark.parametrize(
    "duals", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.adamw(0.1, weight_decay=0.1)], ids=range(3)
)
def test_momentum_and_decay_do_not_move_a_frozen_multiplier(model, duals):
    stages = [Stage.PRETRAIN] * 2 + [Stage.TRAIN] * 3 + [Stage.FINETUNE] * 3
    seen = np.asarray(run(mdmm(value, kind="==", target=50.0, initial=0.7), model, stages, duals))
    np.testing.assert_array_equal(seen[:2], np.float32(0.7))
    assert len(np.unique(seen[2:5])) == 3
    np.testing.assert_array_equal(seen[5:], seen[4])


def test_the_reference_sets_its_multiplier_to_0_for_fine_tuning(model):
    stages = [Stage.TRAIN] * 3 + [Stage.FINETUNE] * 3
    seen = run(mdmm(value, kind="==", target=50.0, compat="pquantml"), model, stages, optax.sgd(0.1))
    assert seen[2] > 1 and seen[3:] == [0, 0, 0]


def test_the_mask_of_fine_tuning_is_frozen_where_the_reference_makes_it_anew(model):
    for compat in (None, "pquantml"):
        t = mdmm(metrics.sparsity(epsilon=0.5), kind="==", target=0.5, prunes=0.5, compat=compat)
        params = t.attach(model)
        state = t.init(params)
        for event, stage in ((Event.PRE_EPOCH, Stage.PRETRAIN), (Event.PRE_EPOCH, Stage.TRAIN)):
            params, state = tell(t, params, state, event, stage)
            assert all(np.all(m == 1) for m in t.apply(params, state)[0].masks.values())
        params, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
        kept = np.abs(np.asarray(model["a"]["kernel"])) > 0.5
        np.testing.assert_array_equal(t.apply(params, state)[0].masks["a/kernel"], kept)
        grown = params._replace(model=jax.tree.map(lambda w: w + 10, model))
        view, _ = t.apply(grown, state)
        np.testing.assert_array_equal(view.masks["a/kernel"], kept if compat is None else np.ones((4, 6)))
        np.testing.assert_array_equal(
            view.model["a"]["kernel"], np.where(view.masks["a/kernel"] == 1, grown.model["a"]["kernel"], 0)
        )


def test_masks_of_groups(model):
    t = mdmm(value, kind="==", target=0.0, prunes=metrics.group_masks("out", epsilon=1.9))
    params = t.attach(model)
    params, state = tell(t, params, t.init(params), Event.PRE_FINETUNE, Stage.FINETUNE)
    norms = np.linalg.norm(model["a"]["kernel"], axis=0)
    assert 0 < (norms > 1.9).sum() < norms.size
    np.testing.assert_array_equal(t.apply(params, state)[0].masks["a/kernel"], np.broadcast_to(norms > 1.9, (4, 6)))


def test_every_layer_has_a_multiplier_of_its_own(model):
    t = mdmm(metrics.sparsity(mode="smooth", alpha=1.0, per="layer"), kind=">=", target=jnp.float32([0.9, 0.0]), scale=1.0)
    params = t.attach(model)
    assert params.extra["mdmm"]["multiplier"].shape == (2,)
    params, state = tell(t, params, t.init(params), Event.PRE_EPOCH, Stage.TRAIN)
    grads = jax.grad(lambda p: t.penalty(p, state, t.apply(p, state)[0]))(params)
    assert grads.extra["mdmm"]["multiplier"][0] > 0 and grads.extra["mdmm"]["multiplier"][1] == 0
    assert np.all(grads.model["a"]["kernel"] != 0) and np.all(grads.model["b"]["kernel"] == 0)


def test_the_metric_sees_what_the_rest_of_the_chain_made(model):
    """of="view" counts what another method masked; of="params" does not."""
    inner = {
        of: mdmm(metrics.sparsity(epsilon=0.0, of=of), kind="==", target=0.0, damping=0.0, initial=1.0)
        for of in ("view", "params")
    }
    for of, t in inner.items():
        chained = pq.chain(pq.prune.magnitude(sparsity=0.5), t)
        params = chained.attach(model)
        state = chained.init(params)
        for event, stage in ((Event.PRE_FINETUNE, Stage.FINETUNE), (Event.POST_EPOCH, Stage.TRAIN)):
            params, state = tell(chained, params, state, event, stage)
        view, _ = chained.apply(params, state)
        assert float(chained.penalty(params, state, view)) == (5.0 if of == "view" else 0.0)


def test_a_target_is_a_hyperparameter(model):
    t = mdmm(value, kind="==", target=1.0, damping=2.0, scale=1.0)
    params = t.attach(model)
    _, state = tell(t, params, t.init(params), Event.PRE_EPOCH, Stage.TRAIN)
    moved = with_hyper(state, target=3.0)
    total = float(value(params, View({}, {}, {})))
    np.testing.assert_allclose(t.penalty(params, moved, t.apply(params, moved)[0]), (total - 3) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: mdmm(value, kind="<", target=0.0), "kind is '<'"),
        (lambda: mdmm(value, kind="==", target=0.0, compat="hgq2"), "compat is 'hgq2'"),
        (lambda: mdmm(value, kind="==", target=0.0, prunes=lambda k: {"a/kernl": jnp.ones(3)}), "did you mean 'a/kernel'"),
        (lambda: mdmm(value, kind="==", target=0.0, prunes=lambda k: {"a/kernel": jnp.ones(3)}), r"shape \(3,\) for 'a/kernel'"),
        (lambda: mdmm(lambda p, v: jnp.ones(3), kind="==", target=0.0), r"shape \(3,\), expected \(\)"),
        (lambda: mdmm(Metric(value, value, lambda model: (2,)), kind="==", target=0.0), r"shape \(\), expected \(2,\)"),
    ],
    ids=range(6),
)
def test_errors(model, make, text):
    with pytest.raises(TransformError, match=text):
        t = make()
        params = t.attach(model)
        state = t.init(params)
        t.penalty(params, state, t.apply(params, state)[0])
