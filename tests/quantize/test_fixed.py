"""Fixed formats: rules, granularities, and the view."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import KIF, Event, SiteSpec, Stage
from pquant_jax._errors import TransformError
from pquant_jax.numerics import oracle
from pquant_jax.quantize import Format, fixed, frozen, hgq

METHODS = pytest.mark.parametrize("method", [fixed, hgq])


def view_of(t, model):
    params = t.attach(model)
    return t.apply(params, t.init(params))[0]


def kif_of(view, name):
    fmt = view.sites[name]
    return tuple(np.unique(np.asarray(v)).tolist() for v in (fmt.k, fmt.i, fmt.f))


def test_parameters_are_on_the_grid_that_was_asked_for(sites, model):
    weights = Format(k=1, i=0, f=2, rounding="TRN", overflow="SAT_SYM")
    view = view_of(fixed(sites, weights=weights, activations=Format(i=3, f=1)), model)
    for leaf in ("kernel", "bias"):
        want = oracle.quantize(model["a"][leaf], 1, 0, 2, rounding="TRN", overflow="SAT_SYM")
        np.testing.assert_array_equal(view.model["a"][leaf], want)
    assert view.sites.keys() == sites.keys() and not view.masks
    assert kif_of(view, "a/kernel") == ([1], [0], [2])
    assert (view.sites["a/kernel"].rounding, view.sites["a/kernel"].overflow) == ("TRN", "SAT_SYM")
    assert kif_of(view, "a/input") == ([1], [3], [1]) and kif_of(view, "b/input") == ([0], [3], [1])


def test_the_sign_bit_can_be_set_against_the_site(sites, model):
    view = view_of(fixed(sites, weights=Format(k=0, i=2, f=3), activations=Format(k=1)), model)
    assert kif_of(view, "b/input")[0] == [1] and kif_of(view, "a/kernel")[0] == [0]
    assert np.min(view.model["a"]["kernel"]) == 0


def test_all_stages_quantize_alike(sites, model, tell):
    t = fixed(sites, weights=Format(k=1, i=0, f=2))
    params = t.attach(model)
    for stage in Stage:
        state = tell(t, params, t.init(params), Event.PRE_EPOCH, stage)
        _, state = t.step(params, state, stage=jnp.int32(stage), stats={})
        want = oracle.quantize(model["a"]["kernel"], 1, 0, 2)
        np.testing.assert_array_equal(t.apply(params, state)[0].model["a"]["kernel"], want)
        assert float(t.penalty(params, state, t.apply(params, state)[0])) == 0


@METHODS
@pytest.mark.parametrize(
    ("granularity", "shapes"),
    [
        ("element", {"a/kernel": (4, 3), "a/bias": (3,), "a/input": (4,), "b/input": (3,)}),
        ("channel", {"a/kernel": (1, 3), "a/bias": (1,), "a/input": (4,), "b/input": (3,)}),
        ("tensor", {"a/kernel": (1, 1), "a/bias": (1,), "a/input": (1,), "b/input": (1,)}),
    ],
)
def test_granularity(method, granularity, shapes, sites, model):
    fmt = Format(k=1, granularity=granularity)
    view = view_of(method(sites, weights=fmt, activations=fmt), model)
    for name, kif in view.sites.items():
        assert {np.shape(v) for v in (kif.k, kif.i, kif.f)} == {shapes[name]}, name
        assert {v.dtype for v in (kif.k, kif.i, kif.f)} == {jnp.dtype("float32")}


@METHODS
def test_the_first_rule_that_matches_wins(method, sites, model):
    rules = [("a/kernel", Format(i=1, f=1, k=1)), (r"a/.*", Format(i=3, f=3, k=1)), (r".*", Format(i=5, f=5, k=1))]
    sat = [(where, Format(fmt.i, fmt.f, fmt.k, overflow="SAT")) for where, fmt in rules]
    view = view_of(method(sites, rules=sat), model)
    assert {name: kif_of(view, name)[1:] for name in view.sites} == {
        "a/kernel": ([1], [1]),
        "a/input": ([3], [3]),
        "a/bias": ([3], [3]),
        "b/input": ([5], [5]),
    }
    view = view_of(method(sites, rules=sat[::-1]), model)
    assert {kif_of(view, name)[1:] == ([5], [5]) for name in view.sites} == {True}


@METHODS
def test_a_rule_can_be_a_predicate_on_the_site(method, sites, model):
    rules = [(lambda name, spec: spec.kind == "bias", Format(i=4, f=4, k=1, overflow="SAT"))]
    view = view_of(method(sites, rules=rules), model)
    assert kif_of(view, "a/bias") == ([1], [4], [4]) and kif_of(view, "a/kernel") != ([1], [4], [4])


@METHODS
def test_a_rule_that_matches_no_site_is_an_error_with_the_closest_names(method, sites):
    with pytest.raises(TransformError, match=r"'a/kernal' matches no site; did you mean 'a/kernel'"):
        method(sites, rules=[("a/kernal", Format())])
    with pytest.raises(TransformError, match="matches no site"):
        method(sites, rules=[(lambda name, spec: spec.kind == "scale", Format())])


@pytest.mark.parametrize("wrong", [dict(rounding="ROUND"), dict(overflow="CLIP"), dict(granularity="chanel")])
def test_unknown_names_in_a_format_are_typed_errors(wrong):
    with pytest.raises(TransformError, match=f"{next(iter(wrong.values()))!r}, expected one of"):
        Format(**wrong)


def test_a_parameter_without_a_site_is_left_alone(sites, model):
    del sites["a/bias"]
    view = view_of(fixed(sites), model)
    np.testing.assert_array_equal(view.model["a"]["bias"], model["a"]["bias"])
    assert "a/bias" not in view.sites


def test_a_format_can_be_set_by_hand_in_the_state(sites, model):
    t = fixed(sites)
    params = t.attach(model)
    state = t.init(params)
    coarse = state.kifs["a/kernel"].__class__(*(jnp.float32(v) for v in (1, 2, -1)))
    view, _ = t.apply(params, state._replace(kifs={**state.kifs, "a/kernel": coarse}))
    np.testing.assert_array_equal(view.model["a"]["kernel"], oracle.quantize(model["a"]["kernel"], 1, 2, -1))


def test_weights_that_wrap_do():
    """As the literals of a header would; under hgq i follows the weights, so that there is nothing to wrap."""
    sites = {"w": SiteSpec((3,), "kernel")}
    t = fixed(sites, weights=Format(i=0, f=2, k=1, overflow="WRAP"))
    params = t.attach({"w": jnp.float32([0.5, 1.25, -1.5])})
    assert t.apply(params, t.init(params))[0].model["w"].tolist() == [0.5, -0.75, 0.5]


def test_frozen_formats_are_those_of_the_other_model(sites, model):
    found = view_of(hgq(sites, weights=Format(k=1, i=1, f=3, overflow="WRAP")), model).sites
    bits = np.arange(np.prod(sites["a/kernel"].shape)).reshape(sites["a/kernel"].shape) % 4
    found["a/kernel"] = KIF(np.ones_like(bits), np.ones_like(bits), bits, "RND", "WRAP")
    large = {**model, "a": {**model["a"], "kernel": 5 * model["a"]["kernel"]}}
    made = view_of(frozen(sites, found), large)
    for name, fmt in made.sites.items():
        for part in "kif":
            np.testing.assert_array_equal(getattr(fmt, part), np.float32(getattr(found[name], part)))
    want = oracle.quantize(large["a"]["kernel"], 1, 1, bits, rounding="RND", overflow="SAT")  # never another sign
    np.testing.assert_array_equal(made.model["a"]["kernel"], want)
    assert made.sites["a/input"].overflow == found["a/input"].overflow
    with pytest.raises(TransformError, match="no site 'a/kernle' for a format; did you mean 'a/kernel'"):
        frozen(sites, {"a/kernle": found["a/kernel"]})
    with pytest.raises(TransformError, match=r"has the shape \(2,\), expected the site's \(4, 3\)"):
        frozen(sites, {"a/kernel": KIF(np.ones(2), np.ones(2), np.ones(2))})
