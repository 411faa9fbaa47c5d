"""What is written for speed computes the same: settled gradients and products (reductions: test_scalars)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from pquant_jax.numerics import product, settle_together

SMALL = st.integers(1, 4)


def test_settled_together_keeps_every_value_and_shape():
    tree = {"a": jnp.float32([[1.5, jnp.inf]]), "b": jnp.float32(jnp.nan), "none": jnp.zeros((0, 3)), "half": jnp.bfloat16([2.0])}
    for f in (settle_together, jax.jit(settle_together)):
        for name, value in f(tree).items():
            assert value.dtype == tree[name].dtype
            np.testing.assert_array_equal(value, tree[name])
    assert settle_together({}) == {}


@given(SMALL, SMALL, st.lists(SMALL, min_size=1, max_size=2), st.lists(SMALL, min_size=0, max_size=2), st.booleans(), st.data())
def test_a_products_gradients_are_jaxs(rows, columns, batch, kept, data_first, draw):
    """Integers, so that no order of the sums can hide behind rounding; any placement and pairing of the contracted axes."""
    contracted = [rows, columns][: draw.draw(st.integers(1, 2))]
    x_order = draw.draw(st.permutations(range(len(batch) + len(contracted))))
    w_order = draw.draw(st.permutations(range(len(kept) + len(contracted))))
    x_sizes, w_sizes = [*batch, *contracted], [*kept, *contracted]
    rng = np.random.default_rng(rows)
    x = jnp.asarray(rng.integers(-8, 8, [x_sizes[n] for n in x_order]), jnp.float32)
    w = jnp.asarray(rng.integers(-8, 8, [w_sizes[n] for n in w_order]), jnp.float32)
    into = tuple(x_order.index(len(batch) + n) for n in range(len(contracted)))
    facing = tuple(w_order.index(len(kept) + n) for n in range(len(contracted)))
    dims = ((into, facing) if data_first else (facing, into), ((), ()))

    def pulled(dot):
        y, back = jax.vjp(lambda x, w: dot(*((x, w) if data_first else (w, x))), x, w)
        return y, *back(jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape) % 7 - 3)

    ours = pulled(lambda a, b: product(a, b, int(data_first), dimension_numbers=dims))
    for got, expected in zip(ours, pulled(lambda a, b: jax.lax.dot_general(a, b, dims)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("n", "m", "rows"), list(itertools.product((1, 3, 8), (1, 3, 8), (2, 70_000))))
def test_a_products_gradient_at_every_order_and_size(n, m, rows):
    """Narrow data, narrow gradient, equal; below and above the size up to which an operand is transposed first."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.integers(-2, 3, shape), jnp.float32) for shape in ((rows, n), (n, m)))
    dims = (((1,), (0,)), ((), ()))

    def loss(dot):
        return jax.jit(jax.grad(lambda w: jnp.sum(dot(x, w) * (jnp.arange(rows) % 3)[:, None]).astype(jnp.float32)))(w)

    ours = loss(lambda a, b: product(a, b, 1, dimension_numbers=dims))
    np.testing.assert_array_equal(ours, loss(lambda a, b: jax.lax.dot_general(a, b, dims)))
    batched = jax.vmap(lambda w: product(x, w, 1, dimension_numbers=dims))(jnp.stack([w, 2 * w]))
    np.testing.assert_array_equal(batched[1], 2 * (x @ w))
