"""The instrumented forward computes what the model computes, on the grids that its view says."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax import _tree

FRAMEWORKS = ("linen", "nnx", "equinox", "plain")
X = np.asarray(np.random.default_rng(3).integers(-80, 80, (16, 6)) / 16, np.float32)  # on the default port


def plain_forward(model: pq.Model, x, *, train: bool, rng=None):
    """The model as it came, jitted."""
    return jax.jit(lambda p, s, v, k: model.forward(p, s, v, train=train, rng=k))(model.params, model.state, x, rng)


def assert_trees_close(a, b, **tolerance) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, **tolerance), a, b)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_with_many_bits_it_is_the_model_itself(four, view_at, framework):
    """At f = 60 every float32 above 2^-37 is on its grid; the same products and sums are then formed."""
    model = four(0, False)[framework].model
    inst = pq.instrument(model, X[:2])
    y, _ = jax.jit(inst.forward)(view_at(inst, 40, 60), model.state, X)
    np.testing.assert_array_equal(y, plain_forward(model, X, train=False)[0])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_batchnorm_with_many_bits_is_the_frameworks_own(four, view_at, framework, train):
    """Close, not equal: x * scale + offset rounds in other places than (x - mean) * rsqrt(var + eps) * gamma + beta."""
    model = four(0, True)[framework].model
    inst = pq.instrument(model, X[:2])
    y, state = jax.jit(lambda v, s, x: inst.forward(v, s, x, train=train))(view_at(inst, 40, 60), model.state, X)
    want, want_state = plain_forward(model, X, train=train)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-5)
    assert_trees_close(state, want_state, rtol=1e-6, atol=1e-7)
    moved = [
        bool(np.any(np.asarray(a) != np.asarray(b))) for a, b in zip(*map(jax.tree.leaves, (state, model.state)), strict=True)
    ]
    assert any(moved) is train


def test_four_frameworks_compute_the_same_numbers(four, view_at):
    """Integers out, EBOPs and the statistics of a training batch; what XLA fuses may differ only where nothing is quantized."""
    outputs, costs = {}, {}
    for framework, w in four(1, True).items():
        inst = pq.instrument(w.model, X[:2])
        view = view_at(inst, 3, 4)
        y, _ = jax.jit(inst.forward)(view, w.model.state, X)
        outputs[framework], costs[framework] = np.asarray(y), float(inst.ebops(view))
    assert len(set(costs.values())) == 1
    for framework in FRAMEWORKS[1:]:
        np.testing.assert_array_equal(np.ldexp(outputs[framework], 8), np.ldexp(outputs["linen"], 8))
    assert np.all(np.ldexp(outputs["linen"], 8) == np.rint(np.ldexp(outputs["linen"], 8)))
    assert len(np.unique(outputs["linen"])) > 20


def test_quantizes_every_operand(view_at):
    """Against numpy's oracle, with the two formats told apart."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(0, 2, (6, 3)), jnp.float32), "b": jnp.asarray(rng.normal(0, 2, 3), jnp.float32)}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"] + p["b"], params), X[:2])
    kifs = {"w": pq.kif(1, 1, 2), "b": pq.kif(1, 0, 3, overflow="WRAP"), "w/input": pq.kif(1, 2, 1, rounding="TRN")}
    quantized = {n: pq.numerics.quantize(params[n], kifs[n]) for n in "wb"}
    y, _ = inst.forward(pq.View(quantized, kifs, {}), {}, X)
    oracle = pq.numerics.oracle.quantize
    x = oracle(X, 1, 2, 1, rounding="TRN")
    want = x @ oracle(params["w"], 1, 1, 2) + oracle(params["b"], 1, 0, 3, overflow="WRAP")
    np.testing.assert_array_equal(y, want)
    assert np.abs(want - (X @ np.asarray(params["w"]) + np.asarray(params["b"]))).max() > 0.5


def test_formats_per_element_line_up_with_the_sample_axes():
    params = {"w": jnp.eye(6)}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], params), X[:2])
    f = jnp.asarray([-1, 0, 1, 2, 3, 4], jnp.float32)
    y, _ = inst.forward(pq.View(params, {"w/input": pq.kif(jnp.ones(6), jnp.full(6, 5), f)}, {}), {}, X)
    np.testing.assert_array_equal(y, pq.numerics.oracle.quantize(X, 1, 5, np.asarray(f)))


def test_site_without_format_stays_float():
    """A prune-only chain puts no value on a grid."""
    params = {"a": {"w": jnp.full((6, 4), 0.1, jnp.float32)}, "b": {"w": jnp.full((4, 2), 0.3, jnp.float32)}}
    model = pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"], params)
    inst = pq.instrument(model, X[:2])
    np.testing.assert_array_equal(
        jax.jit(inst.forward)(pq.View(params, {}, {}), {}, X)[0], plain_forward(model, X, train=False)[0]
    )
    only_b, _ = inst.forward(pq.View(params, {"b/input": pq.kif(0, 6, -2)}, {}), {}, X)
    h = np.maximum(X @ np.asarray(params["a"]["w"]), 0)
    want = pq.numerics.oracle.quantize(h, 0, 6, -2) @ np.asarray(params["b"]["w"])
    np.testing.assert_allclose(only_b, want, rtol=1e-6)


def test_wrap_is_for_inference():
    """5 in fixed<4,3> wraps to -3; the training trace only rounds, and says otherwise when it is asked to."""
    params = {"w": jnp.eye(2)}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], params), np.zeros((2, 2), np.float32))
    view = pq.View(params, {"w/input": pq.kif(1, 2, 1, overflow="WRAP")}, {})
    x = np.float32([[5.0, 1.25]])

    def run(**modes):
        return inst.forward(view, {}, x, **modes)[0].tolist()

    assert run(train=False) == run(train=True, wrap=True) == [[-3.0, 1.5]]
    assert run(train=True) == run(train=False, wrap=False) == [[5.0, 1.5]]


def test_derived_parameters_wrap_even_in_training():
    """A fused scale has no tracked range, so what wraps in inference wraps in training as well: 3 in fixed<3,2> is -1."""
    params = {"bn": {"scale": jnp.full(2, 6.0), "norm": jnp.full(2, 0.5), "bias": jnp.zeros(2)}}
    model = pq.from_function(lambda p, x: x * (p["bn"]["scale"] * p["bn"]["norm"]) + p["bn"]["bias"], params)
    inst = pq.instrument(model, np.zeros((2, 2), np.float32))
    view = pq.View(params, {"bn/fused_scale": pq.kif(1, 1, 1, overflow="WRAP")}, {})
    for train in (True, False):
        np.testing.assert_array_equal(inst.forward(view, {}, np.ones((1, 2), np.float32), train=train)[0], [[-1.0, -1.0]])


@pytest.mark.parametrize("port", [pq.InputSpec(1, 5, 10), pq.InputSpec(1, 1, 2), pq.InputSpec(0, 2, 1), pq.InputSpec(1, 3, -1)])
def test_port_saturates_and_rounds(port):
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(4)}), np.zeros((2, 4), np.float32), inputs=port)
    x = np.float32([[100.0, -100.0, 0.37, -0.37], [3.3, 0.5, -0.5, 1e-6]])
    encoded = inst.encode(x)
    assert encoded.dtype == np.float32
    np.testing.assert_array_equal(encoded, pq.numerics.oracle.quantize(x, port.k, port.i, port.f, rounding="RND", overflow="SAT"))
    assert encoded[0, 0] == 2.0**port.i - 2.0**-port.f
    assert encoded[0, 1] == -port.k * 2.0**port.i
    np.testing.assert_array_equal(inst.encode(encoded), encoded)


def test_inference_puts_its_input_on_the_port(view_at, four):
    """Data that someone forgot to encode give what encoded data give."""
    model = four(2, False)["linen"].model
    inst = pq.instrument(model, X[:2], inputs=pq.InputSpec(1, 2, 3))
    view = view_at(inst, 6, 8)
    x = np.random.default_rng(0).normal(0, 4, (64, 6)).astype(np.float32)
    forward = jax.jit(inst.forward)
    y, _ = forward(view, model.state, x)
    np.testing.assert_array_equal(y, forward(view, model.state, inst.encode(x))[0])
    far, _ = forward(view, model.state, x + 0.05)
    assert np.any(far != y)


def test_every_port_has_its_own_format():
    ports = {"a": pq.InputSpec(1, 2, 0), "b": pq.InputSpec(0, 1, 1)}
    inst = pq.instrument(
        pq.from_function(lambda p, x: x["a"] @ p["w"] - x["b"], {"w": jnp.eye(2)}),
        {"a": np.zeros((1, 2), np.float32), "b": np.zeros((1, 2), np.float32)},
        inputs=ports,
    )
    x = {"a": np.float32([[9.0, 1.4]]), "b": np.float32([[0.4, -3.0]])}
    assert {n: v.tolist() for n, v in inst.encode(x).items()} == {"a": [[3.0, 1.0]], "b": [[0.5, 0.0]]}
    wide = {name: pq.kif(1, 8, 8) for name in inst.sites}
    np.testing.assert_array_equal(inst.forward(pq.View(inst.model.params, wide, {}), {}, x)[0], [[2.5, 1.0]])


def test_relu_keeps_its_gradient_at_zero():
    """0 by the rule of `jax.nn.relu`; a bare max would give 1/2."""
    params = {"w": jnp.zeros((1, 1))}
    inst = pq.instrument(pq.from_function(lambda p, x: jax.nn.relu(x @ p["w"]), params), np.zeros((1, 1), np.float32))

    def loss(w, forward):
        return jnp.sum(forward(w))

    x = np.ones((1, 1), np.float32)
    assert float(jax.grad(lambda w: jnp.sum(jnp.maximum(x @ w, 0)))(params["w"])[0, 0]) == 0.5
    for train in (True, False):
        grad = jax.grad(lambda w, t=train: jnp.sum(inst.forward(pq.View({"w": w}, {}, {}), {}, x, train=t)[0]))(params["w"])
        assert float(grad[0, 0]) == 0.0


def test_gradients_with_many_bits_are_the_models(four, view_at):
    """Straight-through rounding: the same gradient of every parameter, BatchNorm and residual included."""
    model = four(0, True)["linen"].model
    inst = pq.instrument(model, X[:2])
    view = view_at(inst, 40, 60)

    def ours(params):
        return jnp.sum(jnp.square(inst.forward(view._replace(model=params), model.state, X, train=True)[0]))

    def theirs(params):
        return jnp.sum(jnp.square(model.forward(params, model.state, X, train=True, rng=None)[0]))

    assert_trees_close(jax.jit(jax.grad(ours))(model.params), jax.jit(jax.grad(theirs))(model.params), rtol=1e-3, atol=2e-3)


def test_capture_is_the_range_of_the_batch(four, float_view):
    """Per element of a sample, before the quantizer; the low of a site that can't be negative is 0."""
    model = four(0, False)["plain"].model
    inst = pq.instrument(model, X[:2])
    y, _, stats = jax.jit(inst.capture)(float_view(inst), model.state, X)
    np.testing.assert_array_equal(y, jax.jit(inst.forward)(float_view(inst), model.state, X)[0])
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), model.params)
    first = np.maximum(X @ p["a"]["kernel"] + p["a"]["bias"], 0)
    second = first + np.maximum(first @ p["b"]["kernel"] + p["b"]["bias"], 0)
    for site, values in {"a/input": X, "b/input": first, "c/input": second}.items():
        low, high = stats["range"][site]
        assert low.shape == high.shape == inst.sites[site].shape
        np.testing.assert_allclose(high, values.max(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(low, values.min(0) if inst.sites[site].signed else 0 * low, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 63, 64, 1024, 1031])
def test_capture_folds_any_batch(samples, float_view):
    """Minimum and maximum are exact, so the folded reduction equals numpy's for every length."""
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}), np.zeros((1, 3), np.float32))
    x = np.random.default_rng(samples).normal(size=(samples, 3)).astype(np.float32)
    low, high = inst.capture(float_view(inst), {}, x, train=True)[2]["range"]["w/input"]
    np.testing.assert_array_equal(low, x.min(0))
    np.testing.assert_array_equal(high, x.max(0))


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(32)(x)))
        return nn.Dense(2)(h)


class NnxDropout(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b, self.drop = nnx.Linear(6, 32, rngs=rngs), nnx.Linear(32, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.a(x))))


class EquinoxDropout(eqx.Module):
    a: eqx.nn.Linear
    b: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.a, self.b, self.drop = eqx.nn.Linear(6, 32, key=one), eqx.nn.Linear(32, 2, key=two), eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        return self.b(self.drop(jax.nn.relu(self.a(x)), key=key))


DROPOUTS = {
    "linen": lambda: pq.from_linen(LinenDropout(), X[:2]),
    "nnx": lambda: pq.from_nnx(NnxDropout(nnx.Rngs(0))),
    "equinox": lambda: pq.from_equinox(EquinoxDropout(jax.random.key(0))),
}


@pytest.mark.parametrize("framework", DROPOUTS)
def test_dropout_follows_the_key(framework, float_view):
    model = DROPOUTS[framework]()
    inst = pq.instrument(model, X[:2])
    view = float_view(inst)
    step = jax.jit(lambda key: inst.forward(view, model.state, X, train=True, rng=key)[0])
    one, again, other = step(jax.random.key(1)), step(jax.random.key(1)), step(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    np.testing.assert_allclose(one, plain_forward(model, X, train=True, rng=jax.random.key(1))[0], rtol=1e-5, atol=1e-5)
    assert np.mean(one != other) > 0.9
    calm = inst.forward(view, model.state, X, train=False)[0]
    np.testing.assert_allclose(calm, plain_forward(model, X, train=False)[0], rtol=1e-5, atol=1e-6)
    assert np.mean(one != calm) > 0.9


def test_dropout_keeps_the_range_of_what_is_kept(float_view):
    """Kept values are doubled, so the captured maximum of a training batch is twice the value of some sample."""
    model = DROPOUTS["linen"]()
    inst = pq.instrument(model, X[:2])
    train = inst.capture(float_view(inst), model.state, X, train=True, rng=jax.random.key(0))[2]["range"]["Dense_1/input"][1]
    calm = inst.capture(float_view(inst), model.state, X, train=False)[2]["range"]["Dense_1/input"][1]
    assert np.all(train <= 2 * calm + 1e-5) and np.any(train > calm)


def test_outputs_keep_their_structure(float_view):
    def forward(p, x):
        h = x["left"] @ p["w"]
        return {"sum": h + x["right"][0], "both": (h, jax.nn.relu(h)), "first": h[:, 0]}

    params = {"w": jnp.ones((3, 2))}
    x = {"left": np.ones((5, 3), np.float32), "right": [np.ones((5, 2), np.float32)]}
    inst = pq.instrument(pq.from_function(forward, params), x)
    y, state = inst.forward(float_view(inst), {}, x)
    want = forward(params, x)
    assert state == {}
    assert_trees_close(y, want, rtol=0)
    assert y["first"].shape == (5,)


def test_forward_vmaps_over_views(four, view_at):
    """A population: a leading axis on every parameter and format."""
    model = four(0, False)["plain"].model
    inst = pq.instrument(model, X[:2])
    views = [view_at(inst, i, f) for i, f in ((2, 1), (3, 4), (1, 6))]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *views)
    y, _ = jax.jit(jax.vmap(inst.forward, in_axes=(0, None, None)))(stacked, model.state, X)
    for n, view in enumerate(views):
        np.testing.assert_array_equal(y[n], jax.jit(inst.forward)(view, model.state, X)[0])


def test_attention_of_one_sample_is_its_row_of_the_batch():
    """Products of two activations, and a batch of one that `jnp.matmul` squeezes away."""
    rng = np.random.default_rng(0)
    params = {n: {"w": jnp.asarray(rng.integers(-8, 8, (3, 4)) / 4, jnp.float32)} for n in "qkv"}

    def forward(p, x):
        q, k, v = (x @ p[n]["w"] for n in "qkv")
        return jnp.maximum(q @ jnp.swapaxes(k, 1, 2), 0) @ v

    x = rng.integers(-16, 16, (5, 2, 3)).astype(np.float32) / 8
    inst = pq.instrument(pq.from_function(forward, params), x)
    sites = {n: s for n, s in inst.sites.items() if s.kind == "input"}
    assert sorted(s.shape for s in sites.values()) == [(2, 2), (2, 3), (2, 4), (2, 4), (4, 2)]
    formats = {n: pq.kif(float(s.signed), jnp.full(s.shape, 3.0), jnp.full(s.shape, 1.0)) for n, s in sites.items()}
    y, _ = inst.forward(pq.View(params, formats, {}), {}, x)
    assert y.shape == (5, 2, 4) and np.any(y != forward(params, x))
    for n in range(5):
        np.testing.assert_array_equal(inst.forward(pq.View(params, formats, {}), {}, x[n : n + 1])[0], y[n : n + 1])


def test_instrumenting_twice_gives_the_same(four):
    model = four(0, True)["nnx"].model
    first, second = (pq.instrument(model, X[:n]) for n in (2, 5))
    assert first.sites == second.sites and first.roles == second.roles
    assert list(first.sites) == list(second.sites)


def test_parameters_may_be_any_tree(float_view):
    """Lists, tuples and nested dicts: the path is the keys joined by "/"."""
    params = [{"w": jnp.ones((6, 2))}, (jnp.ones((2, 2)), jnp.zeros(2))]
    inst = pq.instrument(pq.from_function(lambda p, x: jax.nn.relu(x @ p[0]["w"]) @ p[1][0] + p[1][1], params), X[:2])
    assert set(inst.sites) == {"0/w", "0/input", "1/0", "1/input", "1/1"}
    assert set(_tree.flatten(inst.model.params)) == {"0/w", "1/0", "1/1"}
    np.testing.assert_allclose(
        inst.forward(float_view(inst), {}, X)[0], jax.nn.relu(X @ params[0]["w"]) @ params[1][0], rtol=1e-6
    )


def test_range_of_relu_is_that_of_its_values(float_view):
    """It is taken before the bias and relu, on other arrays than the forward's, and must not differ in a bit."""
    rng = np.random.default_rng(11)
    w, v, b, c = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (5, 3), (5,), (3,)))
    params = {"w": w, "v": v, "b": b, "c": c}

    def hidden(p, x):
        return jnp.maximum(jax.nn.relu(x @ p["w"] + p["b"]), 0.25)

    inst = pq.instrument(pq.from_function(lambda p, x: hidden(p, x) @ p["v"] - p["c"], params), X[:2])
    ranges = jax.jit(lambda x: inst.capture(float_view(inst), {}, x, train=True)[2]["range"])(X)
    values = np.asarray(jax.jit(hidden)(params, X))
    np.testing.assert_array_equal(ranges["v/input"][1], values.max(0))
    np.testing.assert_array_equal(ranges["w/input"][0], X.min(0))
    np.testing.assert_array_equal(ranges["w/input"][1], X.max(0))
