"""chain, named, identity: order, names, and what each method of a chain sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import Event, Params, SiteSpec, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax._tree import flatten
from pquant_jax.prune import dst, pdp
from pquant_jax.quantize import Format, fixed
from pquant_jax.transforms import chain, identity, named, with_hyper

HOW = dict(stage=jnp.int32(Stage.TRAIN), stats={})


def total(tree) -> float:
    return float(sum(jnp.sum(w) for w in jax.tree.leaves(tree)))


def test_views_go_left_to_right_and_each_method_sees_what_enters_it(toy, model):
    c = chain(toy("one", gain=2), toy("two", gain=3), toy("three", gain=5))
    params = c.attach(model)
    state = c.init(params)
    view, back = c.apply(params, state)
    assert back is state
    np.testing.assert_allclose(total(view.model), 30 * total(model), rtol=1e-6)
    _, state = c.step(params, state, **HOW)
    seen = [float(state[name].seen) for name in ("one", "two", "three")]
    np.testing.assert_allclose(seen, np.array([1, 2, 6]) * total(model), rtol=1e-6)


def test_every_method_keeps_its_own_trainables_and_state(toy, model):
    c = chain(toy("one", weight=1), toy("two", weight=10))
    params = c.attach(model)
    assert sorted(params.extra) == ["one", "two"]
    params = params._replace(extra={"one": {"price": jnp.float32(3)}, "two": {"price": jnp.float32(5)}})
    state = c.init(params)
    stepped, _ = c.step(params, state, **HOW)
    assert {k: float(v["price"]) for k, v in stepped.extra.items()} == {"one": 4, "two": 6}
    _, state = c.boundary(params, state, event=Event.POST_ROUND, epoch=0, epochs=1, **HOW)
    assert int(state["one"].event) == int(state["two"].event) == Event.POST_ROUND
    assert float(c.penalty(params, state, View(model, {}, {}))) == 1 * 3 + 10 * 5


def test_labels_and_needs_are_those_of_the_parts(toy, model):
    c = chain(toy("one", label="bits"), toy("two", label="duals", needs=("range",)), pdp(sparsity=0.5))
    labels = c.labels(c.attach(model))
    assert labels.extra == {"one": {"price": "bits"}, "two": {"price": "duals"}}
    assert set(flatten(labels.model).values()) == {"weights"}
    assert c.needs == {"range"}


def test_a_name_can_appear_once(toy):
    with pytest.raises(TransformError, match=r"'toy'.*pq\.named"):
        chain(toy(), toy())


@pytest.mark.parametrize("thresholds", [(0.35, 0.55), (0.55, 0.35), (0.55, -0.1)])
def test_masks_of_two_pruners_multiply(thresholds, model):
    """The last pair: a pruner that keeps everything does not bring back what the one before it took."""
    names = ("first", "second")
    c = chain(*(named(dst(alpha=0, threshold_init=t), name) for t, name in zip(thresholds, names, strict=True)))
    params = c.attach(model)
    _, state = c.boundary(params, c.init(params), event=Event.PRE_EPOCH, epoch=0, epochs=1, **HOW)
    view, _ = c.apply(params, state)
    np.testing.assert_array_equal(view.masks["a/kernel"], np.abs(model["a"]["kernel"]) > 0.55)
    np.testing.assert_array_equal(view.model["a"]["kernel"], np.where(view.masks["a/kernel"], model["a"]["kernel"], 0))


def test_prune_then_quantize_and_its_reverse_differ():
    """0.26 quantizes to 0.5 in steps of a half: above the threshold only once it is quantized."""
    model = {"kernel": jnp.float32([[0.26, 0.9], [0.1, -0.45]])}
    sites = {"kernel": SiteSpec((2, 2), "kernel")}
    prune, quantize = dst(alpha=0, threshold_init=0.3), fixed(sites, weights=Format(k=1, i=1, f=1))
    seen = {}
    for order in ((prune, quantize), (quantize, prune)):
        c = chain(*order)
        params = c.attach(model)
        _, state = c.boundary(params, c.init(params), event=Event.PRE_EPOCH, epoch=0, epochs=1, **HOW)
        seen[order[0].name] = c.apply(params, state)[0]
    np.testing.assert_array_equal(seen["dst"].model["kernel"], [[0, 1], [0, -0.5]])
    np.testing.assert_array_equal(seen["dst"].masks["kernel"], [[0, 1], [0, 1]])
    np.testing.assert_array_equal(seen["fixed"].model["kernel"], [[0.5, 1], [0, -0.5]])
    np.testing.assert_array_equal(seen["fixed"].masks["kernel"], [[1, 1], [0, 1]])
    assert seen["dst"].sites.keys() == seen["fixed"].sites.keys() == {"kernel"}


def test_a_chain_in_a_chain_is_the_flat_chain(toy, model):
    nested = chain(chain(toy("one", gain=2), toy("two", gain=3)), toy("three", gain=5))
    flat = chain(toy("one", gain=2), toy("two", gain=3), toy("three", gain=5))
    params = nested.attach(model)
    assert sorted(params.extra) == sorted(flat.attach(model).extra), "the inner chain's trainables are lost"
    views = [c.apply(params, c.init(params))[0].model for c in (nested, flat)]
    np.testing.assert_array_equal(*(v["a"]["kernel"] for v in views))
    stepped, _ = nested.step(params, nested.init(params), **HOW)
    assert {k: float(v["price"]) for k, v in stepped.extra.items()} == {"one": 1, "two": 1, "three": 1}
    assert jax.tree.structure(nested.labels(params)) == jax.tree.structure(params)


def test_hyperparameters_of_a_chain_in_a_chain(toy, model):
    c = chain(chain(toy("one", gain=2), identity()), toy("three", gain=5))
    params = c.attach(model)
    state = with_hyper(c.init(params), one__gain=7.0)
    np.testing.assert_allclose(total(c.apply(params, state)[0].model), 35 * total(model), rtol=1e-6)


def test_named_twice_in_a_chain_trains_apart(model):
    c = chain(named(dst(alpha=1.0), "low"), named(dst(alpha=2.0), "high"))
    params = c.attach(model)
    assert sorted(params.extra) == ["high", "low"]
    assert set(flatten(c.labels(params).extra).values()) == {"thresholds"}
    raised = Params(params.model, {**params.extra, "high": jax.tree.map(lambda t: t + 0.65, params.extra["high"])})
    _, state = c.step(raised, c.init(params), previous=params, **HOW)
    view, _ = c.apply(raised, state)
    np.testing.assert_array_equal(view.masks["a/kernel"], np.asarray(model["a"]["kernel"]) > 0.65)
    assert np.all(np.asarray(state["low"].mask["a/kernel"]) == 1)
    # sum of exp(-T): 18 weights at T = 0, and 18 at T = 0.65
    np.testing.assert_allclose(c.penalty(raised, state, view), 18 + 2 * 18 * np.exp(-0.65), rtol=1e-6)


def test_named_renames_nothing_else(toy, model):
    t = named(toy("old", gain=2, weight=3, needs=("range",)), "new")
    params = t.attach(model)
    assert t.name == "new" and t.needs == {"range"} and sorted(params.extra) == ["new"]
    other = Params(params.model, {**params.extra, "other": jnp.float32(9)})
    stepped, _ = t.step(other, t.init(params), **HOW)
    assert float(stepped.extra["new"]["price"]) == 1 and float(stepped.extra["other"]) == 9
    assert float(t.penalty(stepped, t.init(params), View(model, {}, {}))) == 3


def test_identity_changes_nothing(model):
    t = identity()
    params = t.attach(model)
    state = t.init(params)
    view, _ = t.apply(params, state)
    assert view.model is params.model and not view.sites and not view.masks and not params.extra
    assert t.step(params, state, **HOW)[0] is params
    assert float(t.penalty(params, state, view)) == 0
    assert set(flatten(t.labels(params)).values()) == {"weights"}
