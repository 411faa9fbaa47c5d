"""Where `instrument` puts sites, what it calls them and what it knows of them."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq

X = np.zeros((2, 4), np.float32)
RELU = {"Dense_0/kernel", "Dense_0/bias", "Dense_0/input", "Dense_1/kernel", "Dense_1/bias", "Dense_1/input"}


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def sites_of(forward, params, x=X, **options) -> dict[str, pq.SiteSpec]:
    return pq.instrument(pq.from_function(forward, params), x, **options).sites


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(h)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(4, use_bias=False, name=n)(x) for n in "qkv")
        return nn.Dense(2, use_bias=False, name="out")(jnp.maximum(q, k) + v)


def test_names_are_parameter_paths():
    inst = pq.instrument(Mlp(), X)
    assert set(inst.sites) == RELU
    kinds = {name: spec.kind for name, spec in inst.sites.items()}
    assert kinds == {n: n.rpartition("/")[2] for n in RELU}
    assert inst.sites["Dense_0/kernel"].shape == (4, 5)
    assert inst.sites["Dense_1/input"].shape == (5,)


def test_axis_roles_of_linen():
    inst = pq.instrument(Mlp(), X)
    assert inst.roles["Dense_1/kernel"] == pq.AxisRole(in_axes=(0,), out_axes=(1,), input_site="Dense_1/input")
    assert inst.sites["Dense_1/kernel"].channel_axes == (1,)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_four_frameworks_have_the_same_sites(four, common_name, batchnorm):
    written = four(0, batchnorm)
    found = {}
    for framework, w in written.items():
        inst = pq.instrument(w.model, np.zeros((2, 6), np.float32))
        specs = []
        for name, spec in inst.sites.items():
            flip = w.transposed and spec.kind == "kernel" and len(spec.shape) == 2
            channels = tuple(len(spec.shape) - 1 - a for a in spec.channel_axes) if flip else spec.channel_axes
            shape = spec.shape[::-1] if flip else spec.shape
            specs.append((common_name(name, w), shape, spec.kind, spec.signed, channels))
        found[framework] = sorted(specs), inst.reference8
    assert found["linen"] == found["nnx"] == found["equinox"] == found["plain"]
    names = {spec[0] for spec in found["linen"][0]}
    bn = {"bn/input", "bn/fused_scale", "bn/fused_offset"} if batchnorm else set()
    assert names == {f"{layer}/{part}" for layer in "abc" for part in ("kernel", "bias", "input")} | bn


def test_equinox_kernels_are_out_in(four):
    inst = pq.instrument(four(0, False)["equinox"].model, np.zeros((2, 6), np.float32))
    assert inst.roles["a/weight"] == pq.AxisRole(in_axes=(1,), out_axes=(0,), input_site="a/input")
    assert inst.sites["a/weight"].channel_axes == (0,)
    compression = pq.quantize.fixed(inst.sites, weights=pq.quantize.Format(i=0, f=3, granularity="channel"))
    kifs = compression.init(compression.attach(inst.model.params)).kifs
    assert kifs["a/weight"].f.shape == (8, 1)  # 8 outputs, not 6 inputs


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox", "plain"])
def test_training_has_the_sites_of_inference(four, float_view, framework):
    """The squares and means of batch statistics are products, but no hardware."""
    inst = pq.instrument(four(0, True)[framework].model, np.zeros((2, 6), np.float32))
    view, x = float_view(inst), np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    traced = {}
    for train in (True, False):
        stats = jax.eval_shape(lambda v, x, t=train: inst.capture(v, inst.model.state, x, train=t)[2], view, x)
        traced[train] = {name: tuple(v.shape for v in pair) for name, pair in stats["range"].items()}
    assert traced[True] == traced[False]
    assert set(traced[True]) == {n for n, spec in inst.sites.items() if spec.kind not in ("kernel", "bias")}


def test_positions_of_a_convolution_are_apart_from_its_channels():
    linen, x = nn.Conv(4, (2, 3)), jnp.ones((1, 5, 5, 2))
    inst = pq.instrument(pq.from_linen(linen, x, rng=jax.random.key(0)), x)
    assert inst.roles["kernel"] == pq.AxisRole((0, 1, 2), (3,), "kernel/input", positions=(0, 1))
    equinox, x = eqx.nn.Conv2d(2, 4, (2, 3), key=jax.random.key(0)), jnp.ones((1, 2, 5, 5))
    inst = pq.instrument(pq.from_equinox(equinox), x)
    assert inst.roles["weight"] == pq.AxisRole((1, 2, 3), (0,), "weight/input", positions=(2, 3))


def test_reused_parameter_gets_a_number():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4)
            return layer(nn.relu(layer(x)))

    inst = pq.instrument(Twice(), X)
    assert set(inst.sites) == {"Dense_0/kernel", "Dense_0/bias", "Dense_0/input", "Dense_0/input#1"}
    assert inst.sites["Dense_0/input"].signed and not inst.sites["Dense_0/input#1"].signed
    assert inst.roles["Dense_0/kernel"].input_site == "Dense_0/input"


def test_input_of_two_kernels_in_one_folder_is_named_by_the_kernel():
    sites = sites_of(lambda p, x: (x @ p["m"]["u"]) + (jnp.abs(x) @ p["m"]["v"]), {"m": {"u": ones(4, 3), "v": ones(4, 3)}})
    assert set(sites) == {"m/u", "m/v", "m/u/input", "m/v/input"}


def test_shared_input_has_one_site():
    inst = pq.instrument(Attention(), X)
    assert {n for n, s in inst.sites.items() if s.kind == "input"} == {"q/input", "out/input"}
    assert {inst.roles[f"{n}/kernel"].input_site for n in "qkv"} == {"q/input"}


@pytest.mark.parametrize("split", [["k/input"], ["[kv]/input"], [lambda name, leaf: name == "v/input"]])
def test_split_gives_a_site_of_its_own(split):
    """The other products go on sharing the site that they shared."""
    inst = pq.instrument(Attention(), X, split=split)
    own = {n for n in ("k/input", "v/input") if any(pq._tree.matches(where, n) for where in split)}
    assert {n for n, s in inst.sites.items() if s.kind == "input"} == {"q/input", "out/input", *own}
    assert {n: inst.roles[f"{n}/kernel"].input_site for n in "qkv"} == {
        n: f"{n}/input" if f"{n}/input" in own else "q/input" for n in "qkv"
    }


def test_split_site_has_its_own_format():
    """Only the product with `k` sees the coarser grid: 0.25 becomes 0 there."""
    params = {n: {"w": jnp.eye(4)} for n in "qkv"}
    model = pq.from_function(lambda p, x: jnp.concatenate([x @ p[n]["w"] for n in "qkv"], -1), params)
    inst = pq.instrument(model, X, split=["k/input"])
    view = pq.View(params, {"q/input": pq.kif(1, 4, 4), "k/input": pq.kif(1, 4, 0)}, {})
    y, _ = inst.forward(view, {}, np.full((1, 4), 0.25, np.float32))
    np.testing.assert_array_equal(y, [[0.25] * 4 + [0.0] * 4 + [0.25] * 4])


def test_split_that_matches_nothing_names_what_is_close():
    with pytest.raises(pq.TraceError, match=r"'k/inputs' matches no site; did you mean .*'[qk]/input'"):
        pq.instrument(Attention(), X, split=["k/inputs"])


@pytest.mark.parametrize(
    ("function", "signed"),
    [
        (jax.nn.relu, False),
        (jnp.abs, False),
        (jnp.square, False),
        (lambda h: h**4, False),
        (lambda h: jax.nn.relu(h)[:, ::-1], False),
        (lambda h: jax.nn.relu(h) + jnp.abs(h), False),
        (lambda h: jnp.maximum(h, 0), False),
        (lambda h: jnp.clip(h, 0, 1), False),
        (jax.nn.relu6, False),
        (lambda h: jnp.where(h > 0, h, 0), True),  # a sound answer, not the best one
        (lambda h: h**3, True),
        (lambda h: -jax.nn.relu(h), True),
        (lambda h: jax.nn.relu(h) - 1, True),
        (lambda h: jnp.minimum(h, 0), True),
        (lambda h: jax.nn.leaky_relu(h, 0.25), True),
        (lambda h: jnp.clip(h, -1, 1), True),
        (lambda h: h, True),
    ],
)
def test_sign_of_a_site(function, signed):
    sites = sites_of(lambda p, x: function(x @ p["a"]["w"]) @ p["b"]["w"], {"a": {"w": ones(4, 3)}, "b": {"w": ones(3, 2)}})
    assert sites["b/input"].signed is signed


def test_unsigned_port_makes_unsigned_sites():
    sites = sites_of(lambda p, x: x @ p["w"], {"w": ones(4, 2)}, inputs=pq.InputSpec(k=0, i=4, f=4))
    assert not sites["w/input"].signed


def test_product_of_two_activations_has_a_site_on_each():
    sites = sites_of(lambda p, x: (x @ p["w"]) * jnp.abs(x), {"w": ones(4, 4)})
    assert {n for n, s in sites.items() if s.kind == "input"} == {"w/input", "mul/input", "mul/input#1"}
    assert not sites["mul/input#1"].signed


def test_square_has_one_site():
    assert set(sites_of(lambda p, x: jnp.square(x @ p["w"]), {"w": ones(4, 4)})) == {"w", "w/input", "square/input"}


def test_constant_factor_is_no_site():
    assert set(sites_of(lambda p, x: 0.5 * (x @ p["w"]), {"w": ones(4, 4)})) == {"w", "w/input"}


def test_scale_and_offset_of_all_samples_are_fused():
    """(x - shift) * scale / norm + bias is one product and one sum in hardware."""
    params = {"bn": {"scale": 2 * ones(4), "bias": 3 * ones(4), "shift": 0.5 * ones(4), "norm": 4 * ones(4)}}

    def forward(p, x):
        return (x - p["bn"]["shift"]) * p["bn"]["scale"] / p["bn"]["norm"] + p["bn"]["bias"]

    inst = pq.instrument(pq.from_function(forward, params), X)
    assert set(inst.sites) == {"bn/input", "bn/fused_scale", "bn/fused_offset"}
    assert {n: s.kind for n, s in inst.sites.items()} == {
        "bn/input": "input",
        "bn/fused_scale": "scale",
        "bn/fused_offset": "offset",
    }
    x = np.float32([[1, 2, 3, 4]])
    y, _, stats = inst.capture(pq.View(params, {}, {}), {}, x)
    np.testing.assert_array_equal(y, (x - 0.5) * 0.5 + 3)
    np.testing.assert_array_equal(np.ravel(stats["range"]["bn/fused_scale"][0]), np.full(4, 0.5))
    np.testing.assert_array_equal(np.ravel(stats["range"]["bn/fused_offset"][0]), np.full(4, 2.75))


@pytest.mark.parametrize(
    ("forward", "want"),
    [
        (lambda p, x: p["c"] - x, lambda x: 3 - x),
        (lambda p, x: p["c"] * (p["c"] - x) - p["c"], lambda x: 3 * (3 - x) - 3),
        (lambda p, x: p["c"] - (x * p["c"] - p["c"]), lambda x: 3 - (3 * x - 3)),
        (lambda p, x: -x / p["c"] * 3 + p["c"] + p["c"], lambda x: -x + 6),
        (lambda p, x: (x + p["c"]) * p["c"] * p["c"], lambda x: 9 * x + 27),
    ],
)
def test_fusing_keeps_the_value(forward, want):
    inst = pq.instrument(pq.from_function(forward, {"c": 3 * ones(4)}), X)
    x = np.float32([[1, 2, -3, 4]])
    np.testing.assert_allclose(inst.forward(pq.View(inst.model.params, {}, {}), {}, x)[0], want(x), rtol=1e-6)


def test_named_site_of_the_users_own():
    def forward(p, x):
        return pq.site(x @ p["w"], "logits")

    inst = pq.instrument(pq.from_function(forward, {"w": ones(4, 2)}), X)
    assert inst.sites["logits"] == pq.SiteSpec((2,), "input", True, (0,))


def test_sites_of_dict_inputs_and_tuple_outputs():
    def forward(p, x):
        h = x["left"] @ p["a"]["w"]
        return h + x["right"] @ p["b"]["w"], jax.nn.relu(h)

    params = {"a": {"w": ones(4, 3)}, "b": {"w": ones(2, 3)}}
    x = {"left": X, "right": np.zeros((2, 2), np.float32)}
    ports = {"left": pq.InputSpec(1, 2, 3), "right": pq.InputSpec(0, 1, 2)}
    inst = pq.instrument(pq.from_function(forward, params), x, inputs=ports)
    assert set(inst.sites) == {"a/w", "b/w", "a/input", "b/input"}
    assert inst.sites["a/input"].signed and not inst.sites["b/input"].signed
    assert jax.tree.map(np.shape, inst.sample) == {"left": (1, 4), "right": (1, 2)}


def test_vmapped_layers_share_one_kernel_and_keep_a_site_per_particle():
    """DeepSets: phi is vmapped over the particles of a sample, so its input has one format per particle and feature."""
    params = {"phi": {"w": ones(3, 5)}, "rho": {"w": ones(5, 2)}}

    def forward(p, x):
        h = jax.vmap(jax.vmap(lambda v: jax.nn.relu(v @ p["phi"]["w"])))(x)
        return h.sum(1) @ p["rho"]["w"]

    x = np.random.default_rng(0).normal(size=(7, 4, 3)).astype(np.float32)
    inst = pq.instrument(pq.from_function(forward, params), x)
    shapes = {n: s.shape for n, s in inst.sites.items()}
    assert shapes == {"phi/w": (3, 5), "phi/input": (4, 3), "rho/w": (5, 2), "rho/input": (5,)}
    assert not inst.sites["rho/input"].signed
    y, _ = inst.forward(pq.View(params, {}, {}), {}, inst.encode(x))
    np.testing.assert_allclose(y, forward(params, inst.encode(x)), rtol=1e-6)


def test_reference8_is_64_per_multiplication():
    assert pq.instrument(Mlp(), X).reference8 == 64 * (4 * 5 + 5 * 3)
