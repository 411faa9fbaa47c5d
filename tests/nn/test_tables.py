"""Layers of trained tables: shapes, what they can learn, and one table per edge in hardware."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
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


def finished(layer, x, rules=()):
    """(inst, view with its tables, graph) at fixed formats."""
    inst = pq.instrument(layer, x, inputs=pq.InputSpec(1, 1, 2))
    F = pq.quantize.Format
    compression = pq.quantize.fixed(inst.sites, weights=F(1, 5, 1), activations=F(1, 2, 1), rules=rules, tables=F(0, 5, 1))
    params = compression.attach(inst.model.params)
    view = compression.apply(params, compression.init(params))[0]
    view = view._replace(tables=inst.tables(view, inst.model.state))
    return inst, view, lower.trace(inst, view, inst.model.state)


@pytest.mark.parametrize("kind", ["dense", "dense batch norm", "conv", "nnx"])
def test_every_edge_is_one_table_in_hardware(kind):
    """JAX, emulator and da4ml on every code of the port, or many of them; the tables hold what the layer computes."""
    x = np.zeros((1, 5, 2), np.float32) if kind == "conv" else np.zeros((1, 3), np.float32)
    layer = {
        "dense": pq.nn.TableDense(2, hidden=2),
        "dense batch norm": pq.nn.TableDense(2, hidden=2, batch_norm=True),
        "conv": pq.nn.TableConv(2, (2,), hidden=2),
        "nnx": pq.nn.nnx.TableDense(3, 2, name="tables", hidden=2, rngs=nnx.Rngs(0)),
    }[kind]
    inst, view, graph = finished(layer, x)
    sizes = {n: s.shape for n, s in inst.sites.items() if s.kind == "table"}
    home = {"conv": "TableDense", "nnx": "tables"}.get(kind, "TableDense")
    assert sizes == {f"{home}/table": (4, 4, 2) if kind == "conv" else (3, 2)}
    assert sum(n.op == "table" for n in graph.nodes) == 1
    inputs = port_grid(graph, 400, np.random.default_rng(0))
    expected = flatten_batch(emulate(graph, inputs))
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, inst.model.state, inputs), expected)
    np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), flatten_batch(inputs)), expected)
    exact = inst.model.forward(inst.model.params, inst.model.state, jnp.asarray(inputs[0], jnp.float32), train=False, rng=None)[0]
    steps = 4 if kind == "conv" else 3
    np.testing.assert_allclose(expected, flatten_batch([np.asarray(exact)]), atol=2.0**-6 * steps + 2.0**-5)


def test_an_edge_without_bits_is_not_built():
    F = pq.quantize.Format
    whole = finished(pq.nn.TableDense(2, hidden=2), np.zeros((1, 3), np.float32))
    none = finished(pq.nn.TableDense(2, hidden=2), np.zeros((1, 3), np.float32), rules=[(".*/table", F(0, 0, 0))])
    assert float(whole[0].ebops(whole[1])) > 0 and float(none[0].ebops(none[1])) == 0
    assert da4ml.to_comb(none[2]).cost == 0


def test_the_ends_of_the_edges_can_be_asked_for():
    F = pq.quantize.Format
    wishes = {"input": F(1, 2, 1), "table": F(0, 4, 1, granularity="element")}
    sites = pq.instrument(pq.nn.TableConv(2, (2,), hidden=2, quantize=wishes), np.zeros((1, 4, 2), np.float32)).sites
    assert {n: s.format for n, s in sites.items() if s.format} == {f"TableDense/{r}": fmt for r, fmt in wishes.items()}
