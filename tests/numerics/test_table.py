"""`build_table` and `lookup`: the table is the function on every code, and all ways of reading it agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from pquant_jax._errors import LoweringError
from pquant_jax.numerics import build_table, kif, lookup, quantize, region, region_name


def every_code(fmt, shape):
    k, i, f = (np.broadcast_to(np.asarray(v), shape) for v in (fmt.k, fmt.i, fmt.f))
    width = int((k + i + f).max())
    codes = np.arange(1 << width).reshape(-1, *(1,) * len(shape)) - k * 2.0 ** (i + f)
    return np.where(codes < 2.0 ** (i + f), codes, 0) * 2.0**-f


@given(
    st.integers(0, 1), st.lists(st.integers(-2, 3), min_size=3, max_size=3), st.lists(st.integers(-1, 4), min_size=3, max_size=3)
)
def test_lookup_is_the_quantized_function(k, i, f):
    fmt, out = kif(k, np.float32(i), np.float32(f)), kif(1, 1, 6)
    table = build_table(jnp.tanh, fmt, out, (3,), "tanh")
    x = quantize(jnp.float32(every_code(kif(1, 3, 4), (3,))), fmt)
    np.testing.assert_array_equal(lookup(x, fmt, table), quantize(jnp.tanh(x), out))


def test_jit_and_vmap_read_the_same_entries():
    fmt = kif(1, 2, np.float32([1, 2, 3]))
    table = build_table(jnp.exp, fmt, kif(0, 3, np.float32([2, 2, 5])), (3,), "exp")
    x = quantize(jax.random.normal(jax.random.key(0), (20, 3)) * 3, fmt)
    eager = lookup(x, fmt, table)
    np.testing.assert_array_equal(eager, jax.jit(lambda v: lookup(v, fmt, table))(x))
    np.testing.assert_array_equal(eager, jax.vmap(lambda v: lookup(v, fmt, table))(x))


def test_elements_that_agree_share_a_row():
    assert build_table(jnp.tanh, kif(1, 1, 2), kif(1, 0, 4), (5, 2), "tanh").codes.shape == (1, 16)
    assert build_table(jnp.tanh, kif(1, 1, np.float32([2, 2, 1])), kif(1, 0, 4), (3,), "tanh").codes.shape == (2, 16)


def test_nan_is_zero_and_infinity_the_end_of_the_range():
    table = build_table(lambda v: 1 / v, kif(1, 1, 0), kif(1, 2, 1), (), "reciprocal")
    assert table.codes.tolist() == [[-1, -2, 7, 2]]
    assert build_table(jnp.log, kif(1, 1, 0), kif(1, 2, 1), (), "log").codes.tolist() == [[0, 0, -8, 0]]


def test_too_many_input_bits_name_the_site():
    with pytest.raises(LoweringError, match=r"'Dense_0/tanh' has 13 input bits \(element \(1,\)\), the limit is 12"):
        build_table(jnp.tanh, kif(1, np.float32([2, 3]), 9), kif(1, 0, 4), (2,), "Dense_0/tanh")


def test_a_region_is_seen_in_the_jaxpr_and_differentiable():
    edge = region(lambda x, w: jnp.tanh(w * x), "edge")
    eqn = jax.make_jaxpr(edge)(jnp.ones(3), jnp.ones(())).jaxpr.eqns[0]
    assert region_name(eqn) == "edge"
    assert float(jax.grad(edge)(0.0, 2.0)) == 2.0
