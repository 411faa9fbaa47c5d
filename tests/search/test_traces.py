"""Fisher information and Hessian traces of losses whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.search import fisher, hutchinson
from pquant_jax.search._traces import batches


def symmetric(n: int, seed: int) -> jax.Array:
    a = np.random.default_rng(seed).normal(size=(n, n))
    return jnp.float32(a + a.T)


def test_the_trace_of_a_quadratic():
    """With a diagonal Hessian every probe gives the trace exactly: v^T D v = sum d v^2."""
    d = {"a": jnp.float32([[1, 2], [3, 4]]), "b": jnp.float32([5, -7])}
    found = hutchinson(lambda w: sum(jnp.sum(d[p] * w[p] ** 2) / 2 for p in d), jax.tree.map(jnp.ones_like, d), probes=3)
    assert (found["a"].mean, found["a"].error) == (2.5, 0)
    assert (found["b"].mean, found["b"].error) == (-1, 0)


def test_the_standard_error_is_the_one_of_the_estimate():
    """Hutchinson's variance is 2 (|H|^2 - |diag H|^2), divided by the number of probes."""
    h, n = symmetric(6, 0), 6
    leaves = {"w": jnp.zeros(n, jnp.float32)}
    few, many = (hutchinson(lambda w: w["w"] @ h @ w["w"] / 2, leaves, probes=k, seed=1)["w"] for k in (100, 1600))
    sigma = np.sqrt(2 * (np.sum(np.square(h)) - np.sum(np.square(np.diag(h))))) / n
    assert few.error == pytest.approx(sigma / 10, rel=0.25)
    assert many.error == pytest.approx(sigma / 40, rel=0.25)
    for found in (few, many):
        assert abs(found.mean - float(jnp.trace(h)) / n) < 4 * found.error


def test_blocks_do_not_see_each_other():
    h = symmetric(8, 2)

    def loss(w):
        v = jnp.concatenate([w["a"], w["b"].reshape(-1)])
        return v @ h @ v / 2

    found = hutchinson(loss, {"a": jnp.zeros(4), "b": jnp.zeros((2, 2))}, probes=4000, seed=3)
    for block, part in (("a", slice(0, 4)), ("b", slice(4, 8))):
        assert abs(found[block].mean - float(jnp.trace(h[part, part])) / 4) < 4 * found[block].error < 1


def test_pruned_weights_take_no_part():
    d = jnp.float32([1, 2, 3, 4])
    found = hutchinson(
        lambda w: jnp.sum(d * w["w"] ** 2) / 2, {"w": jnp.ones(4)}, masks={"w": jnp.float32([1, 0, 0, 1])}, probes=2
    )
    assert found["w"].mean == 2.5


def test_the_mean_over_batches_and_the_seed():
    x = jnp.float32([[1.0, 2.0], [3.0, 4.0]])

    def loss(w, batch):
        return jnp.sum(batch * w["w"] ** 2) / 2

    leaves = {"w": jnp.ones(2, jnp.float32)}
    assert hutchinson(loss, leaves, x, probes=2)["w"].mean == 2.5
    h = symmetric(2, 4)
    once, again, other = (hutchinson(lambda w: w["w"] @ h @ w["w"], leaves, probes=5, seed=s)["w"].mean for s in (1, 1, 2))
    assert once == again != other


def test_the_fisher_information_is_of_single_samples():
    """PQuantML squares the gradient of a batch: opposite samples cancel there, and equal ones count B times."""
    x, y = np.float32([[1.0], [-1.0], [2.0]]), np.float32([0, 0, 0])
    data = batches(SimpleNamespace(x=x, y=y, weight=None), 3, 3)
    weights = {"w": jnp.float32([5.0])}

    def losses(w, x, y):
        return x @ w["w"] - y

    assert float(fisher(losses, weights, data)["w"][0]) == pytest.approx((1 + 1 + 4) / 3)
    assert float(fisher(losses, weights, data, compat="pquantml")["w"][0]) == pytest.approx(3 * (2 / 3) ** 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_batch_size_changes_nothing(batch_size):
    """Also where the last batch is not full, and with sample weights."""
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(5, 3)), np.zeros(5), np.float32([1, 2, 0, 1, 4])
    data = batches(SimpleNamespace(x=np.float32(x), y=np.float32(y), weight=weight), 100, batch_size)
    found = fisher(lambda w, x, y: (x @ w["w"]) - y, {"w": jnp.ones(3, jnp.float32)}, data)["w"]
    np.testing.assert_allclose(found, (weight[:, None] * x**2).sum(0) / weight.sum(), rtol=1e-5)


def test_fewer_samples_are_spread_over_sorted_data():
    data = batches(SimpleNamespace(x=np.arange(10.0), y=np.arange(10), weight=None), 5, 2)
    assert data.x.shape == (3, 2) and data.y.reshape(-1)[:5].tolist() == [0, 2, 4, 6, 8]
    assert data.weight.reshape(-1).tolist() == pytest.approx([1.2] * 5 + [0])


def test_no_samples_are_an_error():
    with pytest.raises(pq.DataError, match="0 samples"):
        batches(SimpleNamespace(x=np.zeros((0, 2)), y=np.zeros(0), weight=None), 4, 2)
