"""`capture`: what enters every kernel and how often what leaves it is positive, in every framework and layout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import _tree
from pquant_jax._base import View


def stats_of(model, x):
    inst = pq.instrument(model, x)
    return inst.capture(View(inst.model.params, {}, {}), inst.model.state, x)[2]


def data(*shape):
    return jnp.round(jax.random.normal(jax.random.key(0), shape) * 64) / 64  # on the port's grid


def test_dense_of_any_rank_against_numpy():
    x = data(8, 3, 4)
    params = {"a": {"kernel": data(4, 5), "bias": data(5)}}
    got = stats_of(pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]), params), x)
    np.testing.assert_allclose(got["square"]["a/kernel"], jnp.mean(x**2, (0, 1))[:, None], rtol=1e-6)
    y = x @ params["a"]["kernel"] + params["a"]["bias"]
    np.testing.assert_allclose(got["active"]["a/kernel"], jnp.mean(y > 0, (0, 1))[None], rtol=1e-6)


def test_output_first_kernels_broadcast_alike():
    x, w, b = data(8, 4), data(5, 4), data(5)
    got = stats_of(pq.from_function(lambda p, x: jax.vmap(lambda v: p["w"] @ v + p["b"])(x), {"w": w, "b": b}), x)
    np.testing.assert_allclose(got["square"]["w"], jnp.mean(x**2, 0)[None], rtol=1e-6)
    np.testing.assert_allclose(got["active"]["w"], jnp.mean(x @ w.T + b > 0, 0)[:, None], rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups):
    x = data(2, 6, 6, 4)
    module = nn.Conv(8, (3, 3), feature_group_count=groups)
    got = stats_of(pq.from_linen(module, x), x)
    kernel = pq.from_linen(module, x).params["kernel"]
    square = np.asarray(jnp.mean(x**2, (0, 1, 2)))
    expected = np.zeros((1, 1, 4 // groups, 8), np.float32)
    for o in range(8):
        for i in range(4 // groups):
            expected[0, 0, i, o] = square[(o // (8 // groups)) * (4 // groups) + i]
    assert kernel.shape[2:] == expected.shape[2:]
    np.testing.assert_allclose(jnp.broadcast_to(got["square"]["kernel"], expected.shape), expected, rtol=1e-6)
    y = module.apply({"params": pq.from_linen(module, x).params}, x)
    np.testing.assert_allclose(got["active"]["kernel"], jnp.mean(y > 0, (0, 1, 2)).reshape(1, 1, 1, 8), atol=1e-6)


def test_kernels_with_several_axes_on_a_side():
    x = data(5, 7, 6)
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    model = pq.from_linen(nn.Sequential([module]), x)
    got = stats_of(model, x)
    leaves = _tree.flatten(model.params)
    shapes = {path: leaves[path].shape for path in pq.instrument(model, x).roles}
    assert len(shapes) == 4
    for path, shape in shapes.items():
        out = path.endswith("out/kernel")
        ones = (1,) * len(shape)
        assert got["square"][path].shape == ((*shape[:2], 1) if out else (shape[0], 1, 1))
        assert got["active"][path].shape == ((1, 1, shape[2]) if out else (1, *shape[1:]))
        assert np.broadcast_shapes(got["square"][path].shape, shape, ones) == shape


def test_batchnorm_counts_as_part_of_its_layer():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x)))

    x = data(16, 4)
    model = pq.from_linen(Net(), x)
    params = {**model.params, "BatchNorm_0": {"scale": jnp.ones(3), "bias": jnp.float32([-9, 0, 9])}}
    got = stats_of(model._replace(params=params), x)
    assert got["active"]["Dense_0/kernel"][0, 0] == 0
    assert got["active"]["Dense_0/kernel"][0, 2] == 1


def test_a_kernel_of_two_products_sees_both_inputs():
    x, w = data(8, 4), data(4, 4)
    got = stats_of(pq.from_function(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}), x)
    np.testing.assert_allclose(got["square"]["w"], (jnp.mean(x**2, 0) + jnp.mean(jnp.tanh(x @ w) ** 2, 0))[:, None], rtol=1e-5)


def test_the_forward_holds_no_statistics():
    """Squares of the inputs would count as the model's products, in EBOPs and in hardware."""
    x, params = data(8, 4), {"w": data(4, 3)}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], params), x)
    view = View(params, {}, {})
    assert inst.reference8 == 64 * 4 * 3
    forward = jax.make_jaxpr(lambda v, x: inst.forward(v, {}, x, train=True)[0])(view, x)
    capture = jax.make_jaxpr(lambda v, x: inst.capture(v, {}, x, train=True))(view, x)
    assert "square" not in str(forward) and "square" in str(capture)
