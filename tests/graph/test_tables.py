"""What becomes a table, what its sites are called, and that a view without formats is the model itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.numerics import MAX_TABLE_BITS, kif, quantize, region

X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


def instrumented(function, x=X, params=None, **options):
    return pq.instrument(pq.from_function(lambda p, v: function(v), params or {}), x, **options)


def tables(inst) -> set[str]:
    return {name.removesuffix("/table") for name, spec in inst.sites.items() if spec.kind == "table"}


def view_of(inst, bits: int = 3, model=None) -> pq.View:
    formats = {n: kif(float(s.signed or s.kind == "kernel"), 2, bits) for n, s in inst.sites.items()}
    leaves = pq._tree.flatten(inst.model.params)
    rounded = {n: quantize(v, formats[n]) for n, v in leaves.items() if n in formats}
    return pq.View(pq._tree.replace(inst.model.params, rounded), formats, {})


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nn.tanh, {"tanh"}),
        (nn.sigmoid, {"sigmoid"}),
        (nn.silu, {"silu"}),  # x * sigmoid(x): one table, no product
        (nn.gelu, {"tanh"}),
        (nn.softplus, {"softplus"}),
        (lambda v: jax.lax.rsqrt(jnp.maximum(v, 0) + 1e-3) * 2, {"rsqrt"}),
        (lambda v: 1 / (1 + v * v), {"reciprocal"}),
        (nn.softmax, {"exp", "exp/reciprocal"}),
        (nn.relu6, set()),
        (lambda v: nn.leaky_relu(v, 0.25), set()),
        (lambda v: jnp.tanh(v) + jnp.exp(v), {"tanh"}),  # both depend on one value: one table
        (lambda v: jnp.tanh(v) * jnp.exp(v[:, ::-1]), {"tanh", "exp"}),
        (lambda v: jnp.tanh(jnp.sin(v)[:, ::-1]), {"sin", "sin/tanh"}),
    ],
)
def test_cones(function, expected):
    assert len(tables(instrumented(function))) == len(expected)
    if expected != {"tanh"}:
        assert tables(instrumented(function)) == expected


def test_a_value_that_others_read_ends_a_cone():
    """1 - z is an adder behind the table of z, which a product reads too."""
    inst = instrumented(lambda v: (lambda z: z * v[:, ::-1] + (1 - z) * v)(nn.sigmoid(v)))
    assert tables(inst) == {"sigmoid"}


def test_an_exact_prefix_that_others_read_is_not_recomputed():
    inst = instrumented(lambda v: (lambda r: jnp.concatenate([jnp.exp(-r), r[:, ::-1]], 1))(nn.relu(v) * 2))
    assert inst.sites["exp/input"].signed is False  # the table begins behind the relu


def test_sites_of_a_layer_are_named_by_it():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(nn.tanh(nn.Dense(4)(x)))
            return nn.Dense(2)(h)

    inst = pq.instrument(Net(), X)
    assert tables(inst) == {"Dense_0/tanh", "LayerNorm_0/rsqrt"}
    assert inst.sites["Dense_0/tanh/input"].max_bits == MAX_TABLE_BITS
    assert inst.sites["Dense_0/tanh/table"].max_bits == 0


def test_a_site_that_a_product_reads_first_is_limited_too():
    params = {"w": jnp.ones((3, 3), jnp.float32)}
    inst = pq.instrument(pq.from_function(lambda p, v: v @ p["w"] + jnp.tanh(v), params), X)
    assert inst.sites["w/input"].max_bits == MAX_TABLE_BITS
    assert "tanh/input" not in inst.sites


FORWARDS = {
    "batchnorm": nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.tanh, nn.Dense(2)]),
    "softmax": nn.Sequential([nn.Dense(4), nn.softmax, nn.Dense(2), nn.hard_sigmoid]),
    "layernorm": nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.gelu, nn.Dense(3, use_bias=False), nn.RMSNorm()]),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_sites_off_is_bitwise_the_original(name):
    inst = pq.instrument(FORWARDS[name], X)
    m = inst.model
    params = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), m.params)

    def ours(x):
        return inst.forward(pq.View(params, {}, {}), m.state, x, train=False)[0]

    def original(x):
        return m.forward(params, m.state, x, train=False, rng=None)[0]

    np.testing.assert_array_equal(jax.jit(ours)(X), jax.jit(original)(X))
    np.testing.assert_array_equal(ours(X), original(X))


def test_a_view_with_tables_reads_them():
    inst = instrumented(nn.silu)
    view = view_of(inst)
    built = view._replace(tables=inst.tables(view, {}))
    computed, looked_up = (inst.forward(v, {}, X)[0] for v in (view, built))
    np.testing.assert_array_equal(computed, looked_up)
    wrong = built.tables["silu"]._replace(codes=built.tables["silu"].codes + 1)
    assert not np.array_equal(inst.forward(view._replace(tables={"silu": wrong}), {}, X)[0], looked_up)


def test_too_wide_a_table_names_its_site():
    inst = instrumented(nn.tanh)
    with pytest.raises(pq.LoweringError, match=r"'tanh' has 13 input bits.*the limit is 12"):
        inst.tables(view_of(inst, bits=10), {})


def test_regions_are_tables_with_parameters_of_their_own():
    params = {"a": jnp.float32([0.5, 1, 2])}

    def forward(p, v):
        return region(lambda u, a: jnp.tanh(a * u), "edge")(v, p["a"])

    inst = pq.instrument(pq.from_function(forward, params), X)
    assert set(inst.sites) == {"edge/input", "edge/table"}
    view = view_of(inst)
    made = inst.tables(view, {})["edge"]
    assert made.codes.shape == (3, 64)
    y = inst.forward(view._replace(tables={"edge": made}), {}, X)[0]
    x = quantize(quantize(X, kif(1, 5, 10)), kif(1, 2, 3))
    np.testing.assert_array_equal(y, quantize(jnp.tanh(params["a"] * x), kif(1, 2, 3)))


def test_a_region_that_mixes_samples_is_refused():
    with pytest.raises(pq.TraceError, match="region 'edge' must map its first argument"):
        instrumented(lambda v: region(lambda u: jnp.tanh(u)[:, :2], "edge")(v))


def test_masked_values_meet_exp_alone():
    with pytest.raises(pq.TraceError, match=r"minus infinity in front of 'tanh'; only exp"):
        instrumented(lambda v: jnp.tanh(jnp.where(jnp.arange(3) < 2, v, -1e30)))


def test_the_scale_of_a_dropout_is_no_site():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(nn.Dropout(0.3)(nn.tanh(nn.Dense(4)(x)), deterministic=not train))

    inst = pq.instrument(Net(), X)
    inst.forward(view_of(inst), inst.model.state, X, train=True, rng=jax.random.key(0))
    assert not any("affine" in name for name in inst.sites)


def test_constants_with_many_bits_are_rounded_by_a_site():
    assert "affine/fused_scale" in instrumented(lambda v: v / 3).sites
    assert not instrumented(lambda v: v / 4 + 0.75).sites


def test_outputs_have_sites_if_wanted():
    inst = instrumented(lambda v: {"a": v, "b": v * 2}, outputs=True)
    assert {n: s.kind for n, s in inst.sites.items()} == {"output/a": "output", "output/b": "output"}
    assert set(instrumented(lambda v: v, outputs="asked").sites) == {"output"}
    assert instrumented(lambda v: v, outputs="asked").sites["output"].format == "asked"


def test_the_model_may_ask_for_formats():
    def forward(p, v):
        return pq.site(v, "w/input", format="narrow") @ pq.site(p["w"], "w", "kernel", "wide")

    inst = pq.instrument(pq.from_function(forward, {"w": jnp.ones((3, 2), jnp.float32)}), X)
    assert {n: s.format for n, s in inst.sites.items()} == {"w/input": "narrow", "w": "wide"}
