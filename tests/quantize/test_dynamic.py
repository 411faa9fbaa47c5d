"""Dynamic formats: the integer bits follow the data at a constant width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._base import Event, SiteSpec
from pquant_jax._errors import TransformError
from pquant_jax.numerics import oracle
from pquant_jax.quantize import Format, dynamic, fixed

SHARED = {"element": None, "channel": 0, "tensor": (0, 1)}


def view_of(t, model):
    params = t.attach(model)
    return t.apply(params, t.init(params))[0]


def of_kernel(w, granularity="channel", **options):
    w = jnp.float32(w)
    sites = {"kernel": SiteSpec(w.shape, "kernel", channel_axes=(1,))}
    fmt = Format(i=0, f=7, k=1, granularity=granularity, rounding="RND", overflow="SAT")
    view = view_of(dynamic(sites, weights=fmt, **options), {"kernel": w})
    return view.model["kernel"], view.sites["kernel"]


def smallest(values: np.ndarray, b: int) -> int:
    """Integer bits of the narrowest range that holds all values and their roundings to b bits with a sign, by trial."""
    for i in range(-40, 40):
        codes = np.floor(np.ldexp(values.astype(np.float64), b - 1 - i) + 0.5)
        inside = -(2.0**i) <= values.min() and values.max() < 2.0**i
        if inside and codes.min() >= -(2 ** (b - 1)) and codes.max() < 2 ** (b - 1):
            return i
    raise AssertionError(values)


@pytest.mark.parametrize("granularity", SHARED)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32).filter(lambda v: abs(v) > 1e-3), min_size=12, max_size=12))
def test_the_smallest_range_that_holds_the_values(granularity, values):
    w = np.float32(values).reshape(4, 3)
    q, fmt = of_kernel(w, granularity)
    groups = {"element": w.reshape(-1, 1), "channel": w.T, "tensor": w.reshape(1, -1)}[granularity]
    np.testing.assert_array_equal(np.ravel(fmt.i), [smallest(g, 8) for g in groups])
    np.testing.assert_array_equal(fmt.f, 7 - fmt.i)
    np.testing.assert_array_equal(q, oracle.quantize(w, 1, fmt.i, fmt.f))
    assert np.all(np.abs(q - w) <= 0.5 * np.ldexp(1.0, -np.rint(fmt.f).astype(int)))


@pytest.mark.parametrize(("reach", "i", "f"), [(0.2, 0, 7), (1.0, 1, 6), (3.0, 2, 5), (200.0, 7, 0)])
def test_pquantml_divides_the_width_alike(reach, i, f):
    """Their formula, as run: i = clip(ceil(log2(a + 1e-6)), 0, b - k)."""
    w = [[reach, -reach], [0.0, 0.1]]
    q, fmt = of_kernel(w, compat="pquantml")
    assert (fmt.i.tolist(), fmt.f.tolist()) == ([[i, i]], [[f, f]])
    np.testing.assert_array_equal(q, oracle.quantize(w, 1, i, f))
    assert float(q[0, 0]) == min(float(oracle.quantize(reach, 1, i, f)), 127)


def test_pquantml_leaves_what_has_one_format_alone(sites, model):
    t = dynamic(sites, weights=Format(i=0, f=7, k=1, granularity="tensor"), compat="pquantml")
    want = view_of(fixed(sites, weights=Format(i=0, f=7, k=1)), model)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(view_of(t, model).model["a"][leaf], want.model["a"][leaf])
    assert {n for n, c in t.formats.items() if c.moves} == {"a/input", "b/input"}


def test_the_gradient_is_straight_through_and_none_of_it_reaches_the_bits():
    def loss(w):
        return jnp.sum(of_kernel(w)[0] * jnp.arange(6.0).reshape(2, 3))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.float32([[0.3, -5, 7], [0.1, 2, 0.01]])), np.arange(6.0).reshape(2, 3))


def test_a_group_of_zeros_keeps_what_it_began_with():
    q, fmt = of_kernel([[0.0, 1.5], [0.0, -0.2]])
    assert fmt.i.tolist() == [[0, 1]] and q.tolist()[0] == [0.0, 1.5]


def ranges(low, high):
    return {"range": {"a/input": (jnp.float32([low] * 4), jnp.float32([high] * 4)), "b/input": (jnp.zeros(3), jnp.ones(3) * 0.4)}}


def test_activations_follow_the_range(sites, model, tell):
    t = dynamic(sites, decay=0.25)
    params = t.attach(model)
    _, state = t.step(params, t.init(params), stage=jnp.int32(1), stats=ranges(-9, 3))
    assert state.i["a/input"].tolist() == [4] and state.i["b/input"].tolist() == [1.75]
    _, state = t.step(params, state, stage=jnp.int32(1), stats=ranges(-0.1, 0.1))
    assert state.i["a/input"].tolist() == [3.75]
    state = tell(t, params, state, Event.CALIBRATE, stats=ranges(-0.1, 0.1))
    fmt = t.apply(params, state)[0].sites["a/input"]
    assert (fmt.k.tolist(), fmt.i.tolist(), fmt.f.tolist()) == ([1], [-3], [10])
    assert t.needs == {"range"} and t.apply(params, state)[0].sites["b/input"].i.tolist() == [-1]


def test_pquantml_takes_the_last_batch(sites, model):
    t = dynamic(sites, activations=Format(i=2, f=5), compat="pquantml")
    params = t.attach(model)
    for low, want in ((-9, 4), (-0.1, 0)):
        _, state = t.step(params, t.init(params), stage=jnp.int32(1), stats=ranges(low, 0.1))
        assert state.i["a/input"].tolist() == [want], "one format for the tensor, never below 0"


def test_what_is_not_trainable_stays(sites, model):
    t = dynamic(sites, rules=[(".*", {"trainable": False, "granularity": "tensor"})])
    want = view_of(fixed(sites, weights=Format(i=0, f=7, k=1, granularity="tensor")), model)
    np.testing.assert_array_equal(view_of(t, model).model["a"]["kernel"], want.model["a"]["kernel"])
    assert t.needs == frozenset() and {c.moves for c in t.formats.values()} == {""}


def test_widths_that_can_not_be(sites):
    with pytest.raises(TransformError, match=r"a/kernel: i \+ f is 0 \(default for kernel\), expected 1 to 24 bits"):
        dynamic(sites, weights=Format(i=0, f=0))
    with pytest.raises(TransformError, match="'t' has 13 bits"):
        dynamic({"t": SiteSpec((2,), "input", max_bits=12)}, activations=Format(i=2, f=10))
    with pytest.raises(TransformError, match="expected 'pquantml' or None"):
        dynamic(sites, compat="pquant")
