"""Layers of trained tables: shapes, what they can learn, and one table per edge in hardware."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax.nn import _edges


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize(("size", "strides"), [((3,), (1,)), ((2,), (2,)), ((3, 2), (1, 2)), ((2, 2), (2, 1))])
def test_windows_are_those_of_a_convolution(size, strides, padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-8, 8, (2, *(7,) * len(size), 3)), jnp.float32)
    kernel = jnp.asarray(rng.integers(-8, 8, (*size, 3, 4)), jnp.float32)
    numbers = ("NHC", "HIO", "NHC") if len(size) == 1 else ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)
    np.testing.assert_array_equal(_edges.windows(x, size, strides, padding) @ kernel.reshape(-1, 4), expected)


@pytest.mark.parametrize("depth", [1, 2])
def test_edges_are_small_networks(depth):
    """Against the plain formula, one edge at a time."""
    edges = _edges.init_edges(jax.random.key(1), 3, 2, 4, depth)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (5, 3)), jnp.float32)
    y = np.asarray(jax.jit(_edges.edge_values)(jnp.broadcast_to(x[..., None], (5, 3, 2)), edges, jnp.float32([2.0, -1.0])))
    e = {n: np.asarray(v, np.float64) for n, v in edges.items()}
    for i in range(3):
        for o in range(2):
            h = np.tanh(np.outer(x[:, i], e["slope"][:, i, o]) + e["offset"][:, i, o])
            for n in range(1, depth):
                h = np.tanh(h @ e[f"hidden_{n}"][:, :, i, o] + e[f"offset_{n}"][:, i, o])
            expected = (h @ e["out"][:, i, o] + e["shift"][i, o]) * (2.0, -1.0)[o]
            np.testing.assert_allclose(y[:, i, o], expected, rtol=2e-5, atol=2e-6)


def test_the_layers_give_what_they_say():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (64, 5)), jnp.float32)
    layer = pq.nn.TableDense(3, batch_norm=True, momentum=0.0)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    y, new = jax.jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(np.asarray(y).mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(y).std(0), 1, atol=1e-2)
    stored = jax.jit(layer.apply)({**variables, **new}, x)  # inference with the statistics of this batch
    np.testing.assert_allclose(stored, y, atol=1e-5)
    conv = pq.nn.TableConv(4, (3, 3), strides=2, padding="SAME", hidden=2)
    image = jnp.ones((2, 9, 9, 2))
    assert jax.eval_shape(conv.init_with_output, jax.random.key(0), image)[0].shape == (2, 5, 5, 4)
    own = pq.nn.nnx.TableDense(5, 3, name="tables", rngs=nnx.Rngs(0))
    assert jax.eval_shape(own, x).shape == (64, 3) and len(jax.tree.leaves(nnx.state(own, nnx.Param))) == 5


def test_sizes_are_checked():
    with pytest.raises(pq.ConfigError, match="hidden is 0"):
        pq.nn.TableDense(3, hidden=0).init(jax.random.key(0), jnp.ones((1, 2)))
    with pytest.raises(pq.ConfigError, match="kernel_size is .3, 3., expected one number or 1"):
        pq.nn.TableConv(3, (3, 3)).init(jax.random.key(0), jnp.ones((1, 8, 2)))
    with pytest.raises(pq.ConfigError, match="padding is 'CAUSAL'"):
        pq.nn.TableConv(3, (3,), padding="CAUSAL").init(jax.random.key(0), jnp.ones((1, 8, 2)))


def test_one_layer_learns_what_no_linear_layer_can():
    """Sums of |x_i| and of sin(2 x_i): additive functions are what a layer of tables spans."""
    x = jnp.asarray(np.random.default_rng(0).uniform(-2, 2, (512, 3)), jnp.float32)
    y = jnp.stack([jnp.abs(x).sum(-1), jnp.sin(2 * x).sum(-1)], -1)
    layer = pq.nn.TableDense(2)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    tx = optax.adam(2e-2)

    def loss(p):
        return jnp.mean((layer.apply(p, x) - y) ** 2)

    @jax.jit
    def train(p):
        def step(carry, _):
            p, s = carry
            updates, s = tx.update(jax.grad(loss)(p), s, p)
            return (optax.apply_updates(p, updates), s), None

        return jax.lax.scan(step, (p, tx.init(p)), length=400)[0][0]

    assert float(loss(train(params))) < 0.02 * float(jnp.var(y))
