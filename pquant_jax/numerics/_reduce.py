"""What keeps XLA's CPU backend from computing slowly, or twice: sums over the batch, gradients, products."""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

_OPS: Final = {"sum": (jnp.add, jnp.sum), "min": (jnp.minimum, jnp.min), "max": (jnp.maximum, jnp.max)}
_WIDEST: Final = 16  # more slices than this in one fusion spill registers: 32 are three times slower than 16
_WORTH_IT: Final = 64
_CACHED: Final = 2**16  # elements; a transpose pays while it stays in the second-level cache


def reduce_axis(x: jax.Array, op: str, axis: int) -> jax.Array:
    """Sum, minimum or maximum of `x` over one axis; op is "sum", "min" or "max".

    A reduction over the leading axis of a (batch, features) array runs element by element on CPU, 70 us for
    1024 x 64 where folding the batch onto itself 16 rows at a time takes 22 us, the arithmetic before it included.

    >>> reduce_axis(jnp.arange(256, dtype=jnp.float32).reshape(128, 2), "max", 0).tolist()
    [254.0, 255.0]
    """
    combine, reduce = _OPS[op]
    axis %= x.ndim
    while x.shape[axis] >= _WORTH_IT:
        size = x.shape[axis]
        parts = next((n for n in range(_WIDEST, 1, -1) if size % n == 0), 1)
        if parts == 1:
            break
        # slices, not a reshape: XLA would compute and store x twice, in either shape
        rows = size // parts
        slices = [jax.lax.slice_in_dim(x, n * rows, (n + 1) * rows, axis=axis) for n in range(parts)]
        x = functools.reduce(combine, slices)
    return reduce(x, axis)


def settle(g: jax.Array) -> jax.Array:
    """g itself, computed once and kept in memory however many kernels read it.

    XLA fuses cheap arithmetic into every kernel that uses it; the gradient of a weight's format, some sixty operations,
    would be computed three times by Adam alone (a tenth of a training step).  A division is never duplicated, so this
    divides by a one that can't be foreseen.  Infinities and NaN stay what they are.

    >>> settle(jnp.float32([0.5, -jnp.inf, jnp.nan])).tolist()
    [0.5, -inf, nan]
    """
    return g / (g <= jnp.inf).astype(g.dtype)


def settle_together(tree: Any) -> Any:
    """`settle` every array of a tree, and let none be used before all are there.

    What updates a parameter then runs after all that reads the old one, so that XLA writes the new one in its place; it
    copies every parameter in every step of a loop otherwise (5 % of a training step).  The dependence is a product with
    a one that is made of an element of each.

    >>> settle_together({"a": jnp.float32([0.5, -2]), "b": jnp.float32(jnp.nan)})["a"].tolist()
    [0.5, -2.0]
    """
    tree = jax.tree.map(settle, tree)
    firsts = (v.ravel()[0].astype(jnp.float32) for v in jax.tree.leaves(tree) if v.size)
    code = jax.lax.bitcast_convert_type(sum(firsts, jnp.float32(0)), jnp.int32)
    one = settle(((code | 1) != 0).astype(jnp.float32))  # of a NaN as well
    return jax.tree.map(lambda v: v * one.astype(v.dtype), tree)


def product(lhs: jax.Array, rhs: jax.Array, parameter: int, **params: Any) -> jax.Array:
    """`lax.dot_general` of data and a parameter; the parameter's gradient takes on CPU half the time of JAX's own.

    XLA computes x^T g fast where x is the narrower: 122 us for (1024, 64) and (1024, 32) on one core, while g^T x takes
    66 us.  So the narrower comes first, and the barrier keeps XLA from turning the product round again.

    Args:
      parameter: which operand is the parameter, 0 or 1.
      params: of `dot_general`, without batch axes.

    >>> x, w = jnp.float32([[1, 2]]), jnp.float32([[3], [4]])
    >>> jax.grad(lambda w: product(x, w, 1, dimension_numbers=(((1,), (0,)), ((), ())))[0, 0])(w).tolist()
    [[1.0], [2.0]]
    """
    facing, into = (params["dimension_numbers"][0][n] for n in (parameter, 1 - parameter))

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.dot_general(*((x, w) if parameter else (w, x)), **params)

    def parameter_gradient(x: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        kept = [d for d in range(w.ndim) if d not in facing]
        paired = [facing[into.index(d)] for d in sorted(into)]  # w's axes in the order in which x has them
        batch = tuple(d for d in range(x.ndim) if d not in into)
        batch_of_g = tuple(range(len(batch)) if parameter else range(len(kept), g.ndim))
        n, m = (math.prod(w.shape[d] for d in axes) for axes in (paired, kept))
        narrow, wide = ((g, batch_of_g, kept), (x, batch, paired))[:: 1 if m <= n else -1]
        rows, axes = narrow[:2]
        if rows.size <= _CACHED:
            rows = jax.lax.optimization_barrier(jnp.moveaxis(rows, axes, range(-len(axes), 0)))
            axes = tuple(range(rows.ndim - len(axes), rows.ndim))
        dw = jax.lax.dot_general(rows, wide[0], ((axes, wide[1]), ((), ())), params.get("precision"), w.dtype)
        return jax.lax.optimization_barrier(dw).transpose(np.argsort([*narrow[2], *wide[2]]))

    def backward(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, w = residuals
        return jax.vjp(lambda x: dot(x, w), x)[1](g)[0], parameter_gradient(x, w, g)

    run = jax.custom_vjp(dot)
    run.defvjp(lambda x, w: (run(x, w), (x, w)), backward)
    return run(*((lhs, rhs) if parameter else (rhs, lhs)))
