from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import zoo


def _dense(params, n, x):
    return x @ params[f"Dense_{n}"]["kernel"] + params[f"Dense_{n}"].get("bias", 0.0)


def test_forward_is_dense_relu_dense(key):
    model = zoo.mlp([4, 3], 2)
    x = jax.random.normal(key, (5, 6))
    params = model.init(key, x)["params"]
    hidden = jax.nn.relu(_dense(params, 1, jax.nn.relu(_dense(params, 0, x))))
    np.testing.assert_array_equal(model.apply({"params": params}, x), _dense(params, 2, hidden))
    assert [params[f"Dense_{n}"]["kernel"].shape for n in range(3)] == [(6, 4), (4, 3), (3, 2)]


def test_residual_adds_only_where_the_width_stays(key):
    model = zoo.mlp([4, 4], 2, residual=True)
    x = jax.random.normal(key, (5, 6))
    params = model.init(key, x)["params"]
    first = jax.nn.relu(_dense(params, 0, x))
    second = first + jax.nn.relu(_dense(params, 1, first))
    np.testing.assert_array_equal(model.apply({"params": params}, x), _dense(params, 2, second))


def test_batch_norm_follows_the_batch_in_training_only(key):
    model = zoo.mlp([4], 2, batch_norm=True)
    x = 3 + 2 * jax.random.normal(key, (64, 6))
    variables = model.init(key, x)
    assert "bias" not in variables["params"]["Dense_0"], "the normalisation has its own offset"
    _, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert float(jnp.abs(updated["batch_stats"]["BatchNorm_0"]["mean"]).max()) > 0
    _, same = model.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_array_equal(same["batch_stats"]["BatchNorm_0"]["mean"], variables["batch_stats"]["BatchNorm_0"]["mean"])


def test_inputs_with_more_axes_are_flattened(key):
    model = zoo.mlp([4], 2)
    x = jax.random.normal(key, (3, 2, 5))
    variables = model.init(key, x)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x.reshape(3, 10)))


@pytest.mark.parametrize("hidden, outputs", [([0], 2), ([4.0], 2), ("64", 2), (64, 2), ([True], 2), ([4], 0), ([4], "5")])
def test_bad_widths_are_refused(hidden, outputs):
    with pytest.raises(pq.ConfigError, match="positive whole numbers"):
        zoo.mlp(hidden, outputs)
