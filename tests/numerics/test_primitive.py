"""The primitives: one readable equation each under every transformation, and a gradient that survives inlining."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pquant_jax.numerics import kif, mask, mask_p, quantize, quantize_p, rebind, site, site_p

X = jnp.linspace(-6, 6, 24, dtype=jnp.float32).reshape(4, 6)
FMT = kif(1, 2, 2, rounding="TRN", overflow="SAT_SYM")


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def names(function, *args) -> Counter:
    return Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(function)(*args).jaxpr))


def loss(x, f):
    return jnp.sum(quantize(x, kif(1, 2, f, rounding="TRN", overflow="SAT_SYM")) ** 2)


TRANSFORMED = {
    "plain": (loss, (X, jnp.float32(2))),
    "jit": (jax.jit(loss), (X, jnp.float32(2))),
    "vmap": (jax.vmap(loss, (0, None)), (X, jnp.float32(2))),
    "vmap over formats": (jax.vmap(loss, (None, 0)), (X, jnp.float32([1, 2]))),
    "vmap of vmap": (jax.vmap(jax.vmap(loss, (0, None)), (None, 0)), (X, jnp.float32([1, 2]))),
    "grad": (jax.grad(loss, (0, 1)), (X, jnp.float32(2))),
    "value_and_grad of jit": (jax.value_and_grad(jax.jit(loss)), (X, jnp.float32(2))),
    "vmap of grad": (jax.vmap(jax.grad(loss, 1), (0, None)), (X, jnp.float32(2))),
    "jit of vmap of grad": (jax.jit(jax.vmap(jax.grad(loss, 1), (0, 0))), (X, jnp.full(4, 2.0))),
}


@pytest.mark.parametrize("case", TRANSFORMED)
def test_quantize_is_one_equation(case):
    function, args = TRANSFORMED[case]
    assert names(function, *args)["quantize"] == 1
    found = [e for e in equations(jax.make_jaxpr(function)(*args).jaxpr) if e.primitive is quantize_p]
    assert found[0].params == {"rounding": "TRN", "overflow": "SAT_SYM", "wrap": True}
    assert len(found[0].invars) == 4


def test_mask_and_site_are_one_equation_each():
    def f(x, m):
        return jnp.sum(mask(site(x, "here", "scale"), m) ** 2)

    for function in (f, jax.jit(f), jax.vmap(f), jax.grad(f)):
        found = names(function, X, X)
        assert found["mask"] == 1 and found["site"] == 1
    (named,) = (e for e in equations(jax.make_jaxpr(jax.vmap(f))(X, X).jaxpr) if e.primitive is site_p)
    assert named.params == {"name": "here", "kind": "scale", "format": None}


def inlined(jaxpr, consts, args, bind):
    """Evaluate a jaxpr with calls and custom gradients inlined, as interpreters of this package do."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        values = [v.val if hasattr(v, "val") else env[v] for v in eqn.invars]
        inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if inner is not None:
            out = inlined(inner.jaxpr, inner.consts, values, bind)
        else:
            out = bind(eqn, values)
            out = out if eqn.primitive.multiple_results else [out]
        env.update(zip(eqn.outvars, out, strict=True))
    return [v.val if hasattr(v, "val") else env[v] for v in jaxpr.outvars]


def through_rebind(eqn, values):
    bound = rebind(eqn.primitive, tuple(values), eqn.params)
    return eqn.primitive.bind(*values, **eqn.params) if bound is None else bound


def both(x, f, m):
    return jnp.sum(mask(quantize(x, kif(1, 2, f, overflow="SAT_SYM")), m) ** 2)


@pytest.mark.parametrize("wrapped", [both, jax.jit(both)], ids=["plain", "jit"])
def test_rebind_keeps_the_gradient(wrapped):
    m = (X > 0).astype(jnp.float32) / 2
    closed = jax.make_jaxpr(wrapped)(X, jnp.float32(1), m)

    def again(x, f, m):
        return inlined(closed.jaxpr, closed.consts, (x, f, m), through_rebind)[0]

    assert float(again(X, 1.0, m)) == float(both(X, 1.0, m))
    want = jax.grad(both, (0, 1, 2))(X, jnp.float32(1), m)
    assert all(np.any(np.asarray(g) != 0) for g in want)
    for ours, direct in zip(jax.grad(again, (0, 1, 2))(X, jnp.float32(1), m), want, strict=True):
        np.testing.assert_array_equal(ours, direct)
    assert names(again, X, jnp.float32(1), m)["quantize"] == 1


def test_without_rebind_the_gradient_is_lost():
    closed = jax.make_jaxpr(both)(X, jnp.float32(1), X)

    def again(x):
        return inlined(closed.jaxpr, closed.consts, (x, 1.0, X), lambda e, values: e.primitive.bind(*values, **e.params))[0]

    with pytest.raises(NotImplementedError, match="quantize|mask"):
        jax.grad(again)(X)


def test_rebind_leaves_other_primitives_alone():
    assert rebind(lax.add_p, (1.0, 2.0), {}) is None
    assert rebind(site_p, (1.0,), {"name": "a", "kind": "input"}) is None
    np.testing.assert_array_equal(rebind(mask_p, (X, X), {}), X * X)


def test_mask_is_the_product_and_so_is_its_gradient(key):
    m = jax.random.uniform(key, X.shape)
    np.testing.assert_array_equal(mask(X, m), X * m)
    dx, dm = jax.grad(lambda x, m: jnp.sum(mask(x, m) * 3), (0, 1))(X, m)
    np.testing.assert_array_equal(dx, 3 * m)
    np.testing.assert_array_equal(dm, 3 * X)


def test_mask_broadcasts_and_sums_back():
    m = jnp.float32([1, 0, 1, 0, 1, 1])
    np.testing.assert_array_equal(mask(X, m), X * m)
    np.testing.assert_array_equal(jax.grad(lambda m: jnp.sum(mask(X, m)))(m), jnp.sum(X, 0))
    np.testing.assert_array_equal(jax.vmap(mask, (0, None))(X, m), X * m)
    np.testing.assert_array_equal(jax.vmap(mask, (None, 0))(X[0], jnp.stack([m, 1 - m])), jnp.stack([X[0] * m, X[0] * (1 - m)]))


def test_site_is_the_identity():
    np.testing.assert_array_equal(site(X, "a"), X)
    np.testing.assert_array_equal(jax.jit(lambda x: site(x, "a"))(X), X)
    np.testing.assert_array_equal(jax.vmap(lambda x: site(x, "a"), 1, 1)(X), X)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(site(x, "a") ** 2))(X), 2 * X)
    value, tangent = jax.jvp(lambda x: site(x, "a"), (X,), (2 * X,))
    np.testing.assert_array_equal(tangent, 2 * X)
    np.testing.assert_array_equal(value, X)


@pytest.mark.parametrize("shape", [(4,), (3, 6), (2, 4, 6), (4, 6, 1)])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_format_that_does_not_broadcast_to_x_is_an_error(shape, transform):
    with pytest.raises(TypeError):
        transform(quantize)(X, kif(1, 2, jnp.ones(shape)))


def test_unknown_modes_are_errors_that_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'ROUND'.*RND_CONV"):
        kif(1, 2, 2, rounding="ROUND")
    with pytest.raises(ValueError, match=r"'CLIP'.*SAT_SYM"):
        kif(1, 2, 2, overflow="CLIP")


def test_integers_are_quantized_alike_eagerly_and_under_jit():
    x = jnp.int32([-9, 0, 3])
    np.testing.assert_array_equal(quantize(x, kif(1, 2, 2)), [-4, 0, 3])
    np.testing.assert_array_equal(jax.jit(quantize)(x, kif(1, 2, 2)), [-4, 0, 3])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_the_dtype_stays(dtype):
    q = jax.jit(quantize)(jnp.asarray([-5, 0.1, 0.375, 4], dtype), kif(1, 2, 2))
    assert q.dtype == dtype
    np.testing.assert_array_equal(q.astype(jnp.float32), [-4, 0, 0.5, 3.75])


def test_quantize_under_scan_and_cond():
    def body(carry, x):
        q = lax.cond(x.sum() > 0, lambda v: quantize(v, FMT), lambda v: quantize(-v, FMT), x)
        return carry + q.sum(), q

    total, rows = jax.jit(lambda x: lax.scan(body, jnp.float32(0), x))(X)
    want = np.stack([np.asarray(quantize(r if r.sum() > 0 else -r, FMT)) for r in X])
    np.testing.assert_array_equal(rows, want)
    assert float(total) == want.sum()
