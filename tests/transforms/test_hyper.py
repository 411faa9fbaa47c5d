"""hyper and with_hyper: numbers are arrays, and a new number compiles nothing."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._errors import TransformError
from pquant_jax.prune import dst, pdp
from pquant_jax.transforms import chain, hyper, named, with_hyper


def test_hyper_has_explicit_types():
    made = hyper(a=1, b=2.5, c=True, d=jnp.bool_(False), e=np.float64(0.1), f=jnp.arange(3))
    assert {k: str(v.dtype) for k, v in made.items()} == {
        "a": "float32",
        "b": "float32",
        "c": "bool",
        "d": "bool",
        "e": "float32",
        "f": "float32",
    }
    assert not any(v.weak_type for v in made.values())


def test_a_method_alone(model):
    t = dst(alpha=1.0)
    state = t.init(t.attach(model))
    new = with_hyper(state, alpha=3, max_sparsity=0.5)
    assert float(new.hyper["alpha"]) == 3 and float(new.hyper["max_sparsity"]) == 0.5
    assert float(state.hyper["alpha"]) == 1, "the old state is a value"
    assert jax.tree.map(lambda v: (v.dtype, v.weak_type), new) == jax.tree.map(lambda v: (v.dtype, v.weak_type), state)


def test_a_chain_is_searched_by_name(model):
    c = chain(dst(alpha=1.0), pdp(sparsity=0.5))
    state = with_hyper(c.init(c.attach(model)), alpha=3.0, sparsity=0.25, pdp__epsilon=0.1)
    assert float(state["dst"].hyper["alpha"]) == 3
    assert float(state["pdp"].hyper["sparsity"]) == 0.25
    np.testing.assert_allclose(state["pdp"].hyper["epsilon"], 0.1)


def test_an_unknown_name_is_an_error_with_a_suggestion(model):
    c = chain(dst(alpha=1.0), pdp(sparsity=0.5))
    state = c.init(c.attach(model))
    with pytest.raises(TransformError, match=r"'sparcity'.*did you mean 'sparsity'"):
        with_hyper(state, sparcity=0.1)
    with pytest.raises(TransformError, match=r"'dst__sparsity'"):
        with_hyper(state, dst__sparsity=0.1)
    with pytest.raises(TransformError, match=r"'dts__alpha'"):
        with_hyper(state, dts__alpha=0.1)


def test_an_ambiguous_name_is_an_error_that_lists_the_choices(model):
    c = chain(named(dst(alpha=1.0), "low"), named(dst(alpha=2.0), "high"))
    state = c.init(c.attach(model))
    with pytest.raises(TransformError, match=r"'alpha' belongs to 2 methods.*low__alpha or high__alpha"):
        with_hyper(state, alpha=3.0)
    state = with_hyper(state, high__alpha=5.0)
    assert float(state["low"].hyper["alpha"]) == 1 and float(state["high"].hyper["alpha"]) == 5


def test_a_new_value_compiles_nothing(model):
    c = chain(dst(alpha=1.0), pdp(sparsity=0.5))
    params = c.attach(model)
    state = c.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(params, state):
        view, state = c.apply(params, state)
        return c.penalty(params, state, view)

    forward(params, state)
    for value in (2, 2.0, jnp.float32(3), np.float64(4), jnp.asarray(5.0)):
        forward(params, with_hyper(state, alpha=value, sparsity=value))


def test_a_population_carries_one_value_per_member(model):
    t = dst(alpha=1.0, threshold_init=0.0)
    params = t.attach(model)
    state = t.init(params)._replace(stage=jnp.int32(1))
    alphas = jnp.float32([1, 2, 4])
    many = with_hyper(jax.tree.map(lambda v: jnp.broadcast_to(v, (3, *v.shape)), state), alpha=alphas)
    penalties = jax.vmap(lambda s: t.penalty(params, s, t.apply(params, s)[0]))(many)
    np.testing.assert_allclose(penalties, 18 * alphas, rtol=1e-6)
