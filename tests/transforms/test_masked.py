"""masked: the rule chooses, the rest of the model is left alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import Event, SiteSpec, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax.prune import dst
from pquant_jax.quantize import Format, fixed, hgq
from pquant_jax.transforms import chain, masked, with_hyper

HOW = dict(stage=jnp.int32(Stage.TRAIN), stats={})
RULES = {
    "path": "a/kernel",
    "regex": "a/.*",
    "predicate": lambda path, leaf: path.startswith("a/") and leaf.ndim == 2,
}


@pytest.mark.parametrize("rule", RULES)
def test_only_the_selected_leaves_change(rule, model):
    t = masked(dst(alpha=1.0, threshold_init=0.55), RULES[rule])
    params = t.attach(model)
    assert list(params.extra["dst"]) == ["a/kernel"]
    _, state = t.boundary(params, t.init(params), event=Event.PRE_EPOCH, epoch=0, epochs=1, **HOW)
    view, _ = t.apply(params, state)
    np.testing.assert_array_equal(view.model["a"]["kernel"], np.where(model["a"]["kernel"] > 0.55, model["a"]["kernel"], 0))
    assert view.model["b"]["kernel"] is params.model["b"]["kernel"] and view.model["a"]["bias"] is params.model["a"]["bias"]
    assert list(view.masks) == ["a/kernel"]
    np.testing.assert_allclose(t.penalty(params, state, view), 12 * np.exp(-0.55), rtol=1e-6)
    stepped, state = t.step(params, state, previous=params, view=View(params.model, {}, {}), **HOW)
    assert jax.tree.structure(stepped) == jax.tree.structure(params) and list(state.mask) == ["a/kernel"]
    assert jax.tree.structure(t.labels(params)) == jax.tree.structure(params)


@pytest.mark.parametrize("rule", ["a/kernal", "A/kernel", "a", "kernel", ".*/kernels"])
def test_a_rule_that_matches_nothing_is_an_error_with_the_closest_names(rule, model):
    with pytest.raises(TransformError, match=r"matches no parameter; (did you mean|known:).*'?a/"):
        masked(dst(alpha=1.0), rule).attach(model)


def test_a_predicate_that_matches_nothing_is_named_in_the_error(model):
    def huge(path, leaf):
        return leaf.size > 1000

    with pytest.raises(TransformError, match="huge"):
        masked(dst(alpha=1.0), huge).attach(model)


def test_a_regular_expression_that_is_none_is_a_typed_error(model):
    with pytest.raises(TransformError, match=r"a/\["):
        masked(dst(alpha=1.0), "a/[").attach(model)


def test_masked_in_a_chain(model):
    c = chain(masked(dst(alpha=1.0, threshold_init=0.55), "a/.*"), fixed({"b/kernel": SiteSpec((3, 2), "kernel")}))
    params = c.attach(model)
    _, state = c.boundary(params, c.init(params), event=Event.PRE_EPOCH, epoch=0, epochs=1, **HOW)
    view, _ = c.apply(params, state)
    assert list(view.masks) == ["a/kernel"] and list(view.sites) == ["b/kernel"]
    assert int(np.sum(np.asarray(view.model["a"]["kernel"]) == 0)) == 5
    state = with_hyper(state, dst__alpha=0.0)
    assert float(c.penalty(params, state, view)) == 0


SITES = {
    "a/input": SiteSpec((4,), "input"),
    "a/kernel": SiteSpec((4, 3), "kernel"),
    "b/kernel": SiteSpec((3, 2), "kernel"),
}


@pytest.mark.parametrize("overflow", ["SAT", "WRAP"])
@pytest.mark.parametrize("method", [fixed, hgq])
def test_masked_quantizers_declare_only_what_they_quantize(method, overflow, model):
    """A format in the view for a parameter that is not quantized would be counted in bits that it doesn't have."""
    t = masked(method(SITES, weights=Format(i=0, f=2, k=1, overflow=overflow)), "a/.*")
    params = t.attach(model)
    view, _ = t.apply(params, t.init(params))
    np.testing.assert_array_equal(view.model["b"]["kernel"], model["b"]["kernel"])
    assert np.any(np.asarray(view.model["a"]["kernel"]) != np.asarray(model["a"]["kernel"]))
    assert sorted(view.sites) == ["a/input", "a/kernel"]
