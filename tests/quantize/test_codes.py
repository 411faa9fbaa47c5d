"""Binary, ternary and minifloat kernels: the values, the gradients, what they cost, and the same integers in the emulator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax._base import Stage
from pquant_jax._errors import TransformError
from pquant_jax.numerics import minifloat as float_of, oracle, quantize, total_bits
from pquant_jax.quantize import Format, binary, minifloat, of_kind, ternary

LINEAR = {"binary": binary, "ternary": ternary}
ALL = {**LINEAR, "minifloat": minifloat}
METHODS = pytest.mark.parametrize("method", ALL)
RNG = np.random.default_rng(3)
NORMAL = np.float32(RNG.normal(0, 0.6, (64, 5)) * 2.0 ** np.arange(-2, 3))


def view_of(t, model):
    params = t.attach(model)
    return t.apply(params, t.init(params))[0]


def coded(method, w, **options):
    sites = {"kernel": pq.SiteSpec(np.shape(w), "kernel", channel_axes=(1,))}
    view = view_of(ALL[method](sites, **options), {"kernel": jnp.float32(w)})
    return np.asarray(view.model["kernel"]), view.sites["kernel"]


def nearest_power(mean: float) -> float:
    return 2.0 ** np.round(np.log2(mean))


@pytest.mark.parametrize(("granularity", "groups"), [("channel", list(NORMAL.T)), ("tensor", [NORMAL])])
def test_binary(granularity, groups):
    q, fmt = coded("binary", NORMAL, granularity=granularity)
    want = [np.sign(g) * nearest_power(np.abs(g).astype(float).mean()) for g in groups]
    np.testing.assert_array_equal(q, want[0] if granularity == "tensor" else np.stack(want, 1))
    np.testing.assert_array_equal(oracle.quantize(q, fmt.k, fmt.i, fmt.f), q)
    np.testing.assert_array_equal(np.broadcast_to(total_bits(fmt), q.shape), np.ones_like(q))


@pytest.mark.parametrize("threshold", [0.7, 0.2])
def test_ternary(threshold):
    q, fmt = coded("ternary", NORMAL, threshold=threshold)
    for g, ours in zip(NORMAL.T.astype(float), q.T, strict=True):
        above = np.abs(g) > threshold * np.abs(g).mean()
        np.testing.assert_array_equal(ours, np.where(above, np.sign(g) * nearest_power(np.abs(g)[above].mean()), 0))
    np.testing.assert_array_equal(quantize(jnp.asarray(q), fmt), q)
    np.testing.assert_array_equal(np.broadcast_to(total_bits(fmt), q.shape), np.full_like(q, 2))


@pytest.mark.parametrize("method", LINEAR)
@settings(max_examples=30, deadline=None)
@given(st.floats(-20, 20))
def test_the_scale_turns_at_the_root_of_two(method, exponent):
    """Weights of one size, between two powers of two: the nearer on a logarithmic scale."""
    size = np.float32(2.0**exponent)
    q, _ = coded(method, np.full((3, 1), size))
    if abs(exponent % 1 - 0.5) > 1e-5:
        np.testing.assert_array_equal(q, np.full((3, 1), 2.0 ** np.round(exponent)))


@pytest.mark.parametrize("method", LINEAR)
def test_pruned_weights_stay_away(method):
    """A weight that is 0 in front of here is no weight: it takes no part in the scale and has no value."""
    w = np.float32([[0.5, 0], [0, 0], [-0.55, 0], [0, 0]])
    q, fmt = coded(method, w)
    np.testing.assert_array_equal(q, [[0.5, 0], [0, 0], [-0.5, 0], [0, 0]])
    if method == "binary":
        np.testing.assert_array_equal(total_bits(fmt), np.float32(w != 0))


@pytest.mark.parametrize("method", LINEAR)
def test_the_gradient_passes_up_to_the_clip(method):
    sites = {"kernel": pq.SiteSpec((4, 1), "kernel", channel_axes=(1,))}
    t = ALL[method](sites, clip=1.5)
    w = jnp.float32([[1.0], [-1.2], [0.05], [1.9]])  # the scale is 1
    params = t.attach({"kernel": w})
    state = t.init(params)
    u = jnp.float32([[1], [2], [3], [4]])
    grads = jax.grad(lambda p: jnp.sum(u * t.apply(p, state)[0].model["kernel"]))(params).model["kernel"]
    np.testing.assert_array_equal(grads, [[1], [2], [3], [0]])
    wide = pq.with_hyper(state, clip=2.0)
    assert float(jax.grad(lambda p: jnp.sum(t.apply(p, wide)[0].model["kernel"]))(params).model["kernel"][3, 0]) == 1


def test_minifloat_weights_are_the_numerics(sites, model):
    rules = [(of_kind("kernel"), {"m": 1.0, "e": 2.0})]
    t = minifloat(sites, rules=rules, granularity="tensor", e0=-1.0)
    params = t.attach(model)
    view = t.apply(params, t.init(params))[0]
    w = model["a"]["kernel"]
    np.testing.assert_array_equal(view.model["a"]["kernel"], float_of(w, *map(jnp.float32, (1, 2, -1))))
    fmt = view.sites["a/kernel"]
    np.testing.assert_array_equal(oracle.quantize(view.model["a"]["kernel"], fmt.k, fmt.i, fmt.f), view.model["a"]["kernel"])
    assert {p: v["a/kernel"].shape for p, v in params.extra["minifloat"].items()} == dict.fromkeys(("m", "e", "e0"), (1, 1))
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(t.apply(p, t.init(p))[0].model["a"]["kernel"])))(params).extra["minifloat"]
    assert all(np.any(grads[part]["a/kernel"] != 0) for part in ("m", "e", "e0"))


def test_minifloat_widths_are_priced_and_freeze(sites, model):
    t = minifloat(sites, beta=0.5, cost=lambda view: jnp.sum(total_bits(view.sites["a/kernel"])), granularity="tensor")
    params = t.attach(model)
    state = t.init(params)
    assert float(t.penalty(params, state, t.apply(params, state)[0])) == 0, "none in pre-training"
    moved = params._replace(extra=jax.tree.map(lambda v: v - 40, params.extra))
    after, state = t.step(moved, state, stage=jnp.int32(Stage.TRAIN), previous=params)
    assert [float(after.extra["minifloat"][p]["a/kernel"][0, 0]) for p in ("m", "e", "e0")] == [-1, 0, -16]
    _, state = t.step(params, state, stage=jnp.int32(Stage.TRAIN), previous=params)
    w = np.asarray(t.apply(params, state)[0].model["a"]["kernel"])
    assert float(t.penalty(params, state, t.apply(params, state)[0])) == 0.5 * np.sum((w != 0) * (4 + (w < 0)))
    still, _ = t.step(moved, state, stage=jnp.int32(Stage.FINETUNE), previous=params)
    jax.tree.map(np.testing.assert_array_equal, still.extra, params.extra)


@METHODS
def test_a_rule_makes_a_kernel_a_fixed_point_number(method, sites, model):
    t = ALL[method](sites, rules=[("a/kernel", Format(i=1, f=4, k=1))])
    np.testing.assert_array_equal(view_of(t, model).model["a"]["kernel"], oracle.quantize(model["a"]["kernel"], 1, 1, 4))
    assert t.formats["a/kernel"].source == "rule 'a/kernel'" and t.attach(model).extra in (
        {},
        {"minifloat": dict(m={}, e={}, e0={})},
    )
    assert ALL[method](sites).formats["a/kernel"].source == f"{method} kernel"


def test_what_can_not_be_a_minifloat(sites):
    with pytest.raises(TransformError, match=r"'a/.\*' gives 'a/input', of kind input, a mantissa: minifloats are for kernels"):
        minifloat(sites, rules=[("a/.*", {"m": 2})])
    with pytest.raises(TransformError, match="mixes f with m, e, e0"):
        minifloat(sites, rules=[("a/kernel", {"m": 2, "f": 3})])
    with pytest.raises(TransformError, match="'b/kernel' matches no site"):
        minifloat(sites, rules=[("b/kernel", {"m": 2})])
    with pytest.raises(TransformError, match="a/kernel: e is 9, expected 0 to 5"):
        minifloat(sites, e=9)
    with pytest.raises(TransformError, match="no axes"):
        binary(sites, granularity=(2,))


def test_the_first_rule_wins_whatever_it_is(sites, model):
    both = [("a/kernel", {"m": 2.0}), ("a/kernel", Format(i=1, f=4, k=1))]
    assert minifloat(sites, rules=both).formats["a/kernel"].source == "minifloat kernel"
    assert minifloat(sites, rules=both[::-1]).formats["a/kernel"].source == "rule 'a/kernel'"


@METHODS
def test_the_emulator_has_the_same_integers(method):
    """Lowered and compared on codes of the whole input port; kernels hold two or three values."""
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 8), "b": (8, 3)}
    params = {
        n: {"kernel": jnp.float32(rng.normal(0, 0.7, s)), "bias": jnp.float32(rng.normal(size=s[1]))} for n, s in shapes.items()
    }

    def forward(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"]

    inst = pq.instrument(pq.from_function(forward, params), jnp.ones((1, 6)), inputs=pq.InputSpec(1, 3, 4))
    compression = ALL[method](inst.sites, biases=Format(i=3, f=4, k=1))
    attached = compression.attach(params)
    state = compression.init(attached)
    view = compression.apply(attached, state)[0]
    graph = lower.trace(inst, view, {})
    values = [np.unique(column).size for n in "ab" for column in np.asarray(view.model[n]["kernel"]).T]
    assert max(values) <= {"binary": 2, "ternary": 3, "minifloat": 8}[method]
    inputs = [rng.integers(-128, 128, (400, 6)) / 16.0]
    emulated = np.concatenate([v.reshape(400, -1) for v in lower.emulate(graph, inputs)], 1)
    np.testing.assert_array_equal(emulated, lower.forward_outputs(inst, view, {}, inputs))
    arrays = pq.finalize(compression, attached, state)
    for n in "ab":
        codes = np.ldexp(arrays[f"codes/{n}/kernel"].astype(float), -arrays[f"f/{n}/kernel"])
        np.testing.assert_array_equal(codes, view.model[n]["kernel"])
    bits = {"binary": 1, "ternary": 2}.get(method)
    if bits is not None:
        assert float(inst.ebops(view)) == bits * (6 * 8 * 8 + 8 * 3 * 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pq.quantize.dynamic,
        ternary,
        minifloat,
        lambda sites: pq.quantize.hgq(sites, activations=Format(i=2, f=14, overflow="WRAP")),  # the tables' limit binds
    ],
    ids=["dynamic", "ternary", "minifloat", "hgq"],
)
def test_a_model_with_tables_is_exact(make):
    """tanh, softmax and a declared output: every kind of site, calibrated and lowered."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (5, 3)}
    params = {n: {"kernel": jnp.float32(rng.normal(0, 0.7, s)), "bias": jnp.zeros(s[1])} for n, s in shapes.items()}

    def forward(p, x):
        return jax.nn.softmax(jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]["kernel"] + p["b"]["bias"])

    x = rng.normal(size=(200, 4)).astype(np.float32) * 2
    inst = pq.instrument(pq.from_function(forward, params), x[:1], inputs=pq.InputSpec(1, 4, 5), outputs=Format(i=1, f=8))
    compression = make(inst.sites)
    tx = pq.optimizer(compression, weights=optax.adam(1e-3))
    state = pq.train.init_state(inst, compression, tx, seed=0)
    state = pq.calibrate(inst, compression, state, [inst.encode(x)])
    view = compression.apply(state.params, pq.state_of(state.opt_state))[0]
    for name, spec in inst.sites.items():
        assert not spec.max_bits or np.max(total_bits(view.sites[name])) <= spec.max_bits, name
    view = view._replace(tables=inst.tables(view, state.model_state))
    graph = lower.trace(inst, view, state.model_state)
    inputs = [rng.integers(-512, 512, (300, 4)) / 32.0]
    emulated = np.concatenate([v.reshape(300, -1) for v in lower.emulate(graph, inputs)], 1)
    np.testing.assert_array_equal(emulated, lower.forward_outputs(inst, view, state.model_state, inputs))
