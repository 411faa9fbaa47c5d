"""Formats: granularity by axes, defaults by kind, rules of some fields, what the model asks for, and limits on the width."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._base import Event, Params, SiteSpec, Stage
from pquant_jax._errors import TransformError
from pquant_jax.numerics import oracle, quantize, total_bits
from pquant_jax.quantize import Format, fixed, hgq, of_kind

METHODS = pytest.mark.parametrize("method", [fixed, hgq])
EVERY_KIND = {kind: SiteSpec((3,), kind) for kind in ("input", "kernel", "bias", "scale", "offset", "table", "output")}
MODEL = {"kernel": jnp.zeros(3), "bias": jnp.zeros(3)}
TABLE = {"gelu/input": SiteSpec((3,), "input", max_bits=6)}


def view_of(t, model):
    params = t.attach(model)
    return t.apply(params, t.init(params))[0]


def f_of(view):
    return {name: float(np.max(fmt.f)) for name, fmt in view.sites.items()}


@METHODS
@pytest.mark.parametrize(
    ("axes", "kernel", "conv"),
    [((), (4, 3), (2, 2, 5)), ((0,), (1, 3), (1, 2, 5)), ((0, 1), (1, 1), (1, 1, 5)), ([-1], (4, 1), (2, 2, 1))],
)
def test_axes_that_share_a_format(method, axes, kernel, conv):
    sites = {"kernel": SiteSpec((4, 3), "kernel"), "input": SiteSpec((2, 2, 5), "input")}
    fmt = Format(k=1, granularity=axes)
    view = view_of(method(sites, weights=fmt, activations=fmt), {"kernel": jnp.ones((4, 3))})
    assert np.shape(view.sites["kernel"].f) == kernel and np.shape(view.sites["input"].i) == conv
    assert hash(fmt) == hash(replace(fmt)), "a format is a part of an equation's parameters"


@METHODS
def test_axes_that_a_site_lacks_are_an_error_that_names_it(method, sites):
    with pytest.raises(TransformError, match=r"'a/bias' of shape \(3,\) has no axes \(1,\).*default for bias"):
        method(sites, weights=Format(granularity=(1,)))
    method(sites, weights=Format(granularity=(1,)), biases=Format(granularity="tensor"))


@METHODS
def test_every_kind_has_a_default(method):
    given = dict(weights=Format(f=1), activations=Format(f=2))
    want = dict.fromkeys(("kernel", "bias", "scale", "offset"), 1) | dict.fromkeys(("input", "output"), 2) | {"table": 6}
    assert f_of(view_of(method(EVERY_KIND, **given), MODEL)) == want
    more = dict(biases=Format(f=3), tables=Format(f=4), outputs=Format(f=5))
    view = view_of(method(EVERY_KIND, **given, **more), MODEL)
    assert f_of(view) == want | {"bias": 3, "table": 4, "output": 5}
    assert np.shape(view_of(method(EVERY_KIND), MODEL).sites["table"].f) == (1,)


@METHODS
def test_a_rule_of_some_fields_keeps_the_others(method):
    sites = {**EVERY_KIND, "asked": SiteSpec((3,), "input", format=Format(i=4, f=3, overflow="SAT"))}
    base = Format(i=1, f=1, overflow="SAT_SYM")
    t = method(sites, weights=base, activations=base, rules=[(of_kind("kernel", "input"), {"f": 2.0})])
    view = view_of(t, MODEL)
    found = {n: (float(s.i.max()), float(s.f.max()), s.overflow) for n, s in view.sites.items()}
    assert found["kernel"] == found["input"] == (1, 2, "SAT_SYM") and found["bias"] == (1, 1, "SAT_SYM")
    assert found["asked"] == (4, 2, "SAT")
    sources = {name: c.source for name, c in t.formats.items()}
    assert sources["kernel"] == "rule 'kind kernel or input'" and sources["bias"] == "default for bias"


@METHODS
def test_what_the_model_asks_for_stands_between_rules_and_defaults(method):
    sites = {n: SiteSpec((3,), "input", format=Format(i=0, f=9, overflow="SAT")) for n in ("a", "b")}
    t = method(sites, rules=[("b", Format(i=1, f=1, overflow="SAT"))])
    assert f_of(view_of(t, {})) == {"a": 9, "b": 1}
    assert [c.source for c in t.formats.values()] == ["the model's own format", "rule 'b'"]
    with pytest.raises(TransformError, match=r"'a': the model asks for a tuple as format"):
        method({"a": SiteSpec((3,), "input", format=(1, 2))})


def test_rules_that_say_nothing_of_use(sites):
    with pytest.raises(TransformError, match="'kind table' matches no site"):
        fixed(sites, rules=[(of_kind("table"), {"f": 1})])
    with pytest.raises(TransformError, match=r"'a/.\*' sets 'bits'; known: f, granularity"):
        fixed(sites, rules=[("a/.*", {"bits": 1})])
    with pytest.raises(TransformError, match="'inputs' is no kind of site; did you mean 'input'"):
        of_kind("inputs")


def test_a_fixed_format_that_is_too_wide_is_an_error_that_names_the_site():
    fixed(TABLE, activations=Format(i=2, f=3, k=1))
    with pytest.raises(TransformError, match=r"'gelu/input' has 7 bits \(default for input\), the limit is 6.*'f': 3"):
        fixed(TABLE, activations=Format(i=2, f=4))
    with pytest.raises(TransformError, match="'gelu/input' has 7 bits"):
        hgq(TABLE, activations=Format(i=2, f=4, trainable=False))


def limited(i, f, overflow="SAT"):
    t = hgq(TABLE, activations=Format(k=1, overflow=overflow))
    params = t.attach({})
    full = {part: {"gelu/input": jnp.full(3, v)} for part, v in (("i", i), ("f", f))}
    extra = {part: full[part] if params.extra["hgq"][part] else {} for part in ("f", "i")}
    return t, Params({}, {"hgq": extra})


@settings(max_examples=40, deadline=None)
@given(st.floats(-8, 12), st.floats(-8, 12))
def test_trained_bits_stay_below_the_limit(i, f):
    t, params = limited(np.float32(i), np.float32(f))
    fmt = t.apply(params, t.init(params))[0].sites["gelu/input"]
    assert np.all(total_bits(fmt) <= 6)
    if 1 + np.rint(np.float32(i)) + np.rint(np.float32(f)) <= 6 and f < 5 - np.rint(np.float32(i)):
        np.testing.assert_array_equal(fmt.f, np.full(3, np.float32(f)))


@pytest.mark.parametrize(("f", "want"), [(2.0, (1, 0)), (7.0, (0, -1))])
def test_the_gradient_of_a_limited_width_goes_to_what_binds(f, want):
    t, params = limited(2.0, f)
    grads = jax.grad(lambda p: jnp.sum(t.apply(p, t.init(p))[0].sites["gelu/input"].f))(params).extra["hgq"]
    assert (float(grads["f"]["gelu/input"][0]), float(grads["i"]["gelu/input"][0])) == want


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2), st.sampled_from([0.0, 3.0, 12.0]))
def test_a_limited_calibration_holds_its_range(ends, f):
    """The coarser grid rounds the end of a range up to a power of two: nothing of what was calibrated wraps all the same."""
    t, params = limited(0.0, f, overflow="WRAP")
    low, high = (jnp.full(3, v, jnp.float32) for v in sorted(ends))
    numbers = {k: jnp.int32(v) for k, v in dict(event=Event.CALIBRATE, stage=Stage.TRAIN, epoch=0, epochs=1).items()}
    _, state = t.boundary(params, t.init(params), stats={"range": {"gelu/input": (low, high)}}, **numbers)
    fmt = t.apply(params, state)[0].sites["gelu/input"]
    assert np.all(total_bits(fmt) <= 6)
    for v in (low, high):
        np.testing.assert_array_equal(quantize(v, fmt), oracle.quantize(v, 1, 40, np.rint(fmt.f)))


def test_bits_that_are_not_trainable_do_not_move(sites, model):
    t = hgq(sites, rules=[("a/.*", {"trainable": False, "overflow": "WRAP"})])
    params = t.attach(model)
    assert params.extra["hgq"]["f"].keys() == {"b/input"} and t.needs == {"range"}
    state, ends = t.init(params), {"b/input": (jnp.full(3, -9.0), jnp.full(3, 9.0))}
    view = t.apply(params, t.step(params, state, stage=jnp.int32(1), stats={"range": ends})[1])[0]
    want = view_of(fixed(sites, rules=[("a/.*", {"overflow": "WRAP", "i": 2, "f": 6})]), model)
    np.testing.assert_array_equal(view.model["a"]["kernel"], oracle.quantize(model["a"]["kernel"], 1, 2, 6, overflow="WRAP"))
    for name in ("a/kernel", "a/input"):
        jax.tree.map(np.testing.assert_array_equal, view.sites[name], want.sites[name])
    assert {n: c.moves for n, c in t.formats.items()} == {
        "a/input": "", "a/kernel": "", "a/bias": "", "b/input": "f; i follows the range",
    }  # fmt: skip
