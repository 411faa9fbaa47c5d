"""kth_largest against a sort."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax.transforms import kth_largest

RNG = np.random.default_rng(0)
ARRAYS = {
    "one": np.float32([0.5]),
    "zeros": np.zeros(7, np.float32),
    "normal": np.abs(RNG.normal(size=(8, 5))).astype(np.float32),
    "ties": RNG.integers(0, 4, 40).astype(np.float32) / 4,
    "half zeros": np.where(RNG.random(31) < 0.5, 0, RNG.random(31)).astype(np.float32),
    "wide": np.exp(RNG.uniform(-80, 80, 50)).astype(np.float32),
    "neighbours": np.nextafter(np.float32(1), np.float32(2)) * np.ones(5, np.float32) - np.float32([0, 1, 0, 1, 0]) * 2**-23,
    "many ties": np.repeat(np.float32([0.1, 0.3, 0.7]), 13),
    "extremes": np.float32([np.finfo(np.float32).max, np.finfo(np.float32).tiny, 0, 1, np.inf]),
}
every_rank = jax.jit(jax.vmap(kth_largest, (None, 0)))


@pytest.mark.parametrize("name", ARRAYS)
def test_every_rank_equals_the_sort(name):
    a = ARRAYS[name]
    ours = every_rank(a, jnp.arange(1, a.size + 1))
    np.testing.assert_array_equal(ours, np.sort(a, axis=None)[::-1])


def test_the_rank_may_be_traced():
    a = jnp.asarray(ARRAYS["normal"])
    traced = jax.jit(chex.assert_max_traces(kth_largest, n=1))
    descending = np.sort(a, axis=None)[::-1]
    for k in (1, 17, 40):
        assert float(traced(a, jnp.int32(k))) == descending[k - 1]


def test_gradient_goes_to_the_element_of_that_rank():
    a = jnp.float32([[3, 1], [4, 2]])
    np.testing.assert_array_equal(jax.grad(kth_largest)(a, jnp.int32(2)), [[1, 0], [0, 0]])
    np.testing.assert_array_equal(jax.grad(kth_largest)(a, jnp.int32(4)), [[0, 1], [0, 0]])


def test_gradient_is_shared_between_ties():
    a = jnp.float32([0.5, 2, 0.5, 1, 0.5, 0.5])
    for k in (3, 4, 5, 6):
        np.testing.assert_array_equal(jax.grad(kth_largest)(a, jnp.int32(k)), [0.25, 0, 0.25, 0, 0.25, 0.25])
    np.testing.assert_array_equal(jax.grad(kth_largest)(jnp.zeros(4), jnp.int32(2)), np.full(4, 0.25))


def test_vmap_over_arrays():
    rows = np.abs(RNG.normal(size=(6, 9))).astype(np.float32)
    ks = np.array([1, 3, 9, 2, 5, 7])
    ours = jax.vmap(kth_largest)(rows, jnp.asarray(ks))
    np.testing.assert_array_equal(ours, [np.sort(r)[::-1][k - 1] for r, k in zip(rows, ks, strict=True)])
