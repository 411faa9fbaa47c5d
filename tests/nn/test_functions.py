"""Activations: values, gradients, and what `instrument` and the lowering make of them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

F = pq.quantize.Format


def finished(model, x, **options):
    """(inst, view) at fixed formats."""
    inst = pq.instrument(model, x, inputs=pq.InputSpec(1, 2, 3), **options)
    compression = pq.quantize.fixed(inst.sites, weights=F(0, 4, 1), activations=F(2, 3))
    params = compression.attach(inst.model.params)
    return inst, compression.apply(params, compression.init(params))[0]


def exact_everywhere(inst, view) -> lower.Graph:
    """JAX, emulator and da4ml agree on vectors from the whole port."""
    graph = lower.trace(inst, view, inst.model.state)
    inputs = port_grid(graph, 300, np.random.default_rng(0))
    expected = flatten_batch(emulate(graph, inputs))
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, inst.model.state, inputs), expected)
    np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), flatten_batch(inputs)), expected)
    return graph


def test_the_multiplier_of_relu_is_a_power_of_two_and_learns():
    x = jnp.float32([-2.0, 0.5, 3.0])
    for m in (-1.4, -0.6, 0.2, 2.5):
        np.testing.assert_array_equal(pq.nn.relu_po2(x, jnp.float32(m)), np.maximum(x, 0) * 2.0 ** np.rint(m))
    dx, dm = jax.grad(lambda x, m: jnp.sum(pq.nn.relu_po2(x, m)), (0, 1))(x, jnp.float32(-1.4))
    np.testing.assert_array_equal(dx, [0.0, 0.5, 0.5])
    np.testing.assert_allclose(dm, np.log(2) * 1.75, rtol=1e-6)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_multiplier_is_a_shift(framework):
    """No site, no EBOPs beyond those of plain relu, no multiplier in the netlist, and still unsigned."""

    class Linen(nn.Module):
        start: float | None = None

        @nn.compact
        def __call__(self, x):
            h = nn.Dense(5)(x)
            h = nn.relu(h) if self.start is None else pq.nn.ReluPo2(self.start)(h)
            return nn.Dense(2)(h)

    class Nnx(nnx.Module):
        def __init__(self, start=None):
            self.Dense_0, self.Dense_1 = nnx.Linear(4, 5, rngs=nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1))
            self.act = nnx.relu if start is None else pq.nn.nnx.ReluPo2(start)

        def __call__(self, x):
            return self.Dense_1(self.act(self.Dense_0(x)))

    build = Linen if framework == "linen" else Nnx
    x = np.zeros((1, 4), np.float32)
    plain, plain_view = finished(build(), x)
    inst, view = finished(build(start=-2.3), x)
    assert inst.sites == plain.sites and not inst.sites["Dense_1/input"].signed
    assert float(inst.ebops(view)) == float(plain.ebops(plain_view))
    shifted, unshifted = exact_everywhere(inst, view), exact_everywhere(plain, plain_view)
    assert sum(n.op == "mul" for n in shifted.nodes) == 1 + sum(n.op == "mul" for n in unshifted.nodes)
    factor = next(shifted.nodes[j] for n in shifted.nodes if n.op == "mul" for j in n.inputs if shifted.nodes[j].op == "const")
    np.testing.assert_array_equal(factor.attrs["value"], 0.25)
    path = "ReluPo2_0" if framework == "linen" else "act"
    step = jax.jit(jax.grad(lambda p: jnp.sum(inst.forward(pq.View(p, {}, {}), inst.model.state, jnp.ones((3, 4)))[0])))
    assert float(abs(step(inst.model.params)[path]["m"])) > 0  # through `instrument` the gradient rule is kept


def test_hard_functions_are_exact():
    x = jnp.linspace(-5, 5, 101)
    np.testing.assert_array_equal(pq.nn.hard_tanh(x), jax.nn.hard_tanh(x))
    np.testing.assert_allclose(pq.nn.hard_sigmoid(x, 1 / 6), jax.nn.hard_sigmoid(x), atol=1e-6)
    np.testing.assert_array_equal(pq.nn.hard_sigmoid(x), np.clip(np.asarray(x) / 4 + 0.5, 0, 1).astype(np.float32))

    def forward(p, x):
        return jnp.concatenate([pq.nn.hard_tanh(x @ p["w"]), pq.nn.hard_sigmoid(x @ p["w"])], -1)

    w = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 3)), jnp.float32)
    exact_everywhere(*finished(pq.from_function(forward, {"w": w}), np.zeros((1, 4), np.float32)))


def test_an_activation_layer_says_what_it_knows():
    with pytest.raises(pq.ConfigError, match="activation 'rely'.*relu"):
        pq.nn.Activation("rely").apply({}, jnp.ones(3))
    np.testing.assert_array_equal(pq.nn.Activation(jnp.abs).apply({}, jnp.float32([-1.0])), [1.0])
