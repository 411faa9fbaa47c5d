"""as_optax and optimizer: the compression as the last link of an ordinary optax chain."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pquant_jax._base import Event, Params, SiteSpec, Stage
from pquant_jax._errors import TransformError
from pquant_jax.prune import DSTState, dst, pdp
from pquant_jax.quantize import Format, hgq
from pquant_jax.transforms import (
    CompressionState,
    as_optax,
    boundary,
    chain,
    optimizer,
    state_of,
    strong,
    update_state,
    with_hyper,
)

SITES = {"a/kernel": SiteSpec((4, 3), "kernel"), "a/input": SiteSpec((4,), "input")}
STATS = {"range": {"a/input": (jnp.full(4, -1.0), jnp.full(4, 1.0))}}


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_what_is_missing_is_named(model):
    tracked = hgq(SITES)
    params = tracked.attach(model)
    tx = as_optax(tracked)
    state = tx.init(params)
    with pytest.raises(TransformError, match="parameters"):
        tx.update(zeros(params), state, stage=Stage.TRAIN, stats=STATS)
    with pytest.raises(TransformError, match="stage"):
        tx.update(zeros(params), state, params, stats=STATS)
    with pytest.raises(TransformError, match=r"hgq.*range.*stats="):
        tx.update(zeros(params), state, params, stage=Stage.TRAIN)
    with pytest.raises(TransformError, match="'a/input'"):
        tx.update(zeros(params), state, params, stage=Stage.TRAIN, stats={"range": {}})
    tx.update(zeros(params), state, params, stage=Stage.TRAIN, stats=STATS)


def test_statistics_may_be_missing_where_no_method_needs_them(model):
    c = dst(alpha=1.0)
    params = c.attach(model)
    _, state = as_optax(c).update(zeros(params), as_optax(c).init(params), params, stage=Stage.TRAIN)
    assert int(state_of(state).stage) == Stage.TRAIN


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_leaf_that_the_step_leaves_alone_keeps_its_update_bitwise(transform, model):
    """1 + 1e-9 is 1 in float32: the difference of parameters would lose the update."""
    c = chain(dst(alpha=1.0), hgq({"a/kernel": SITES["a/kernel"]}))
    params = c.attach(model)
    tx = as_optax(c)
    tiny = jax.tree.map(lambda p: jnp.full_like(p, 1e-9), params)

    def update(tiny, state, params):
        return tx.update(tiny, state, params, stage=jnp.int32(Stage.TRAIN))[0]

    updates = transform(update)(tiny, tx.init(params), params)
    for path in (("a", "kernel"), ("a", "bias"), ("b", "kernel")):
        np.testing.assert_array_equal(updates.model[path[0]][path[1]], np.float32(1e-9))


def test_the_link_returns_what_the_step_changed(toy, model):
    """The step sees parameters + updates and raises the price by 1."""
    tx = as_optax(toy())
    params = toy().attach(model)
    updates = params._replace(model=zeros(model), extra={"toy": {"price": jnp.float32(0.25)}})
    out, state = tx.update(updates, tx.init(params), params, stage=Stage.TRAIN)
    assert float(out.extra["toy"]["price"]) == 1.25
    assert float(optax.apply_updates(params, out).extra["toy"]["price"]) == 1.25
    moved = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(moved, state, params, stage=Stage.TRAIN)
    want = sum(float(jnp.sum(w + 1)) for w in jax.tree.leaves(model))
    np.testing.assert_allclose(state_of(state).seen, want, rtol=1e-6)


def test_bits_never_leave_their_limits(model):
    c = hgq({"a/kernel": SITES["a/kernel"]}, weights=Format(i=2, f=23, k=1, overflow="SAT"))
    params = c.attach(model)
    tx = as_optax(c)
    state = tx.init(params)
    for push in (1e3, -1e5):
        updates = Params(zeros(model), jax.tree.map(lambda v, push=push: jnp.full_like(v, push), params.extra))
        out, state = tx.update(updates, state, params, stage=Stage.TRAIN)
        params = optax.apply_updates(params, out)
        for part, bound in (("f", 24), ("i", 23)):
            np.testing.assert_array_equal(params.extra["hgq"][part]["a/kernel"], np.sign(push) * bound)


def trained(tx, params, grads, steps=3, stats=STATS):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, stage=jnp.int32(Stage.TRAIN), stats=stats)
        params = optax.apply_updates(params, updates)
    return params, state


DECAY = optax.adamw(1e-2, weight_decay=0.5)
OTHERS = {
    "own optimizers": dict(bits=optax.adam(1e-2), thresholds=optax.adam(1e-2)),
    "defaults": {},
}


@pytest.mark.parametrize("others", OTHERS)
def test_weight_decay_never_reaches_bits_or_thresholds(others, model):
    c = chain(dst(alpha=0.0, threshold_init=0.2), hgq(SITES))
    params = c.attach(model)
    after, _ = trained(optimizer(c, weights=DECAY, **OTHERS[others]), params, zeros(params))
    assert np.all(np.abs(after.model["a"]["kernel"]) < np.abs(params.model["a"]["kernel"]))
    for ours, before in zip(jax.tree.leaves(after.extra), jax.tree.leaves(params.extra), strict=True):
        np.testing.assert_array_equal(ours, before)


@pytest.mark.parametrize("duals", [None, optax.sgd(0.1), optax.adam(0.1)], ids=["default", "sgd", "adam"])
def test_duals_ascend_while_weights_descend(duals, toy, model):
    """Maximize lambda * (w - 1) over lambda, minimize it over w > 1: lambda goes up, w comes down."""
    c = toy()._replace(step=lambda params, state, **_: (params, state))
    params = c.attach(model)
    tx = optimizer(c, weights=optax.adam(1e-2), **({} if duals is None else {"duals": duals}))
    grads = Params(jax.tree.map(jnp.ones_like, model), {"toy": {"price": jnp.float32(0.5)}})
    state, prices = tx.init(params), [0.0]
    for _ in range(5):
        updates, state = tx.update(grads, state, params, stage=Stage.TRAIN)
        params = optax.apply_updates(params, updates)
        prices.append(float(params.extra["toy"]["price"]))
    assert np.all(np.diff(prices) > 0)
    assert np.all(params.model["a"]["kernel"] < model["a"]["kernel"])


def test_each_label_has_its_own_optimizer(model):
    c = chain(dst(alpha=0.0), hgq({"a/kernel": SITES["a/kernel"]}))
    params = c.attach(model)
    tx = optimizer(c, weights=optax.sgd(1.0), bits=optax.sgd(10.0), thresholds=optax.sgd(100.0))
    after, _ = trained(tx, params, jax.tree.map(lambda p: jnp.full_like(p, 1e-3), params), steps=1)
    moves = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), after, params)
    np.testing.assert_allclose(jax.tree.leaves(moves.model), 1e-3, rtol=1e-3)
    np.testing.assert_allclose(jax.tree.leaves(moves.extra["hgq"]), 1e-2, rtol=1e-3)
    np.testing.assert_allclose(jax.tree.leaves(moves.extra["dst"]), 1e-1, rtol=1e-3)


@pytest.mark.parametrize("names", [("inner", "compression"), ("hyper", "state"), ("mask", "stage")])
def test_the_state_is_found_by_its_type(names, model):
    """A parameter may have any name that a field of a state has."""
    odd = {name: {"inner": model["a"]["kernel"], "compression": {"hyper": model["b"]["kernel"]}} for name in names}
    c = dst(alpha=1.0)
    params = c.attach(odd)
    tx = optimizer(c, weights=optax.adam(1e-2))
    state = tx.init(params)
    assert isinstance(state_of(state), DSTState) and float(state_of(state).hyper["alpha"]) == 1
    changed = update_state(state, lambda s: with_hyper(s, alpha=2.0))
    assert float(state_of(changed).hyper["alpha"]) == 2 and float(state_of(state).hyper["alpha"]) == 1
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    other = [x for x in jax.tree.leaves(changed, is_leaf=lambda n: isinstance(n, CompressionState)) if not isinstance(x, tuple)]
    before = [x for x in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, CompressionState)) if not isinstance(x, tuple)]
    assert len(other) > 2 and all(a is b for a, b in zip(other, before, strict=True))


def test_there_must_be_exactly_one_state(model):
    c = dst(alpha=1.0)
    params = c.attach(model)
    with pytest.raises(TransformError, match="0 compression states"):
        state_of(optax.adam(1e-3).init(params))
    twice = optax.chain(as_optax(c), as_optax(c)).init(params)
    with pytest.raises(TransformError, match="2 compression states"):
        state_of(twice)
    with pytest.raises(TransformError, match="2 compression states"):
        update_state(twice, lambda s: s)


def test_boundary_reaches_every_method(model, toy):
    c = chain(toy(), pdp(sparsity=0.5, epsilon=0.25))
    params = c.attach(model)
    tx = optimizer(c, weights=optax.sgd(1.0))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def tell(opt_state, event, stage, epoch):
        return boundary(c, params, opt_state, event=event, stage=stage, epoch=epoch, epochs=4)

    opt_state = tx.init(params)
    for epoch, ratio in enumerate((0.125, 0.25, 0.375, 0.5)):
        _, opt_state = tell(opt_state, jnp.int32(Event.PRE_EPOCH), jnp.int32(Stage.TRAIN), jnp.int32(epoch))
        np.testing.assert_allclose(list(state_of(opt_state)["pdp"].ratio.values()), ratio, rtol=1e-6)
    assert int(state_of(opt_state)["toy"].event) == Event.PRE_EPOCH
    plain, _ = boundary(c, params, opt_state, event=Event.POST_EPOCH, stage=Stage.TRAIN)
    assert jax.tree.structure(plain) == jax.tree.structure(params)


def test_strong_makes_every_type_explicit():
    weak = {"a": jnp.asarray(1.0), "b": 2, "c": jnp.int32(3)}
    assert weak["a"].weak_type
    ours = strong(weak)
    assert not any(v.weak_type for v in ours.values())
    assert {k: str(v.dtype) for k, v in ours.items()} == {"a": "float32", "b": "int32", "c": "int32"}
    assert {k: float(v) for k, v in ours.items()} == {"a": 1, "b": 2, "c": 3}
