"""The size of a netlist is known from shapes alone, and what is too large is refused before anything is built."""

from __future__ import annotations

import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pquant_jax as pq
from pquant_jax import lower


def instrumented(forward, params, *shape: int) -> pq.Instrumented:
    return pq.instrument(pq.from_function(forward, params), np.zeros((1, *shape), np.float32))


def test_products_of_a_dense_layer():
    found = lower.estimate(instrumented(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 5))}, 8))
    assert (found.products, found.elements) == (40, 0)
    assert found.luts == 40 * 12 and "40 products" in str(found)


def test_zeros_cost_nothing():
    w = jnp.asarray(np.arange(40).reshape(8, 5) % 4 == 0, jnp.float32)
    assert lower.estimate(instrumented(lambda p, x: x @ p["w"], {"w": w}, 8)).products == 10


def test_products_of_a_convolution():
    def forward(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    found = lower.estimate(instrumented(forward, {"w": jnp.ones((3, 3, 2, 5))}, 6, 6, 2))
    assert found.products == 4 * 4 * 5 * 3 * 3 * 2


def test_elements_and_layers():
    def forward(p, x):
        h = jnp.maximum(x @ p["a"], 0)
        return (h * h).sum(1) + x[:, 0]

    found = lower.estimate(instrumented(forward, {"a": jnp.ones((4, 6))}, 4))
    assert (found.products, found.elements) == (24 + 6, 6 + 6 + 1)
    assert found.layers[0] == ("a", 24)


class Residual(nn.Module):
    """ResNet-20 of 32 x 32 x 3 images without its normalisation: 40.6 million products."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(3):
                stride = 2 if stage and not block else 1
                h = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
                h = nn.Conv(width, (3, 3))(h)
                x = nn.relu(h + (x if stride == 1 and x.shape[-1] == width else nn.Conv(width, (1, 1), strides=stride)(x)))
        return nn.Dense(10)(x.mean((1, 2)))


def test_large_convolution_is_refused():
    """Before an index array or a matrix is built; the density of its kernel counts."""
    w = jnp.ones((3, 3, 3, 64))

    def forward(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    inst = instrumented(forward, {"w": w}, 32, 32, 3)
    view = pq.View({"w": w}, {n: pq.kif(1, 2, 5) for n in inst.sites}, {})
    start = time.process_time()
    with pytest.raises(pq.LoweringError, match=r"1,769,472 products .*2e\+07 LUTs and 30 minutes.*largest: w 1,769,472"):
        lower.trace(inst, view, {})
    assert time.process_time() - start < 5
    sparse = view._replace(model={"w": w * (np.arange(64) < 8)})
    assert lower.estimate(inst, sparse).products == 1_769_472 // 8


@pytest.mark.slow
def test_resnet_is_refused_within_seconds():
    x = np.zeros((1, 32, 32, 3), np.float32)
    inst = pq.instrument(pq.from_linen(Residual(), x), x)
    view = pq.View(inst.model.params, {n: pq.kif(1, 2, 5) for n in inst.sites}, {})
    start = time.process_time()
    with pytest.raises(
        pq.LoweringError, match=r"netlist would have 4\d,\d{3},\d{3} products .*LUTs and .* minutes.*io_stream"
    ) as error:
        lower.trace(inst, view, {})
    assert time.process_time() - start < 30
    assert "largest: Conv_" in str(error.value) and "limit is 300,000" in str(error.value)


def test_limit_is_an_argument():
    inst = instrumented(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 5))}, 8)
    view = pq.View(inst.model.params, {n: pq.kif(1, 2, 5) for n in inst.sites}, {})
    with pytest.raises(pq.LoweringError, match=r"40 products"):
        lower.trace(inst, view, {}, limit=39)
    assert lower.trace(inst, view, {}, limit=48).nodes
