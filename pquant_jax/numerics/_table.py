"""Unary functions as integer tables: built once, eagerly, and read by the forward, the emulator and the hardware alike.

XLA's transcendentals differ between an eager and a fused evaluation, so that a forward which computes tanh is equal to
no hardware.  A table is: `build_table` evaluates the function on every code of its input's format and rounds the
results to codes of its output's format; `lookup` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pquant_jax._base import KIF, Table
from pquant_jax._errors import LoweringError
from pquant_jax.numerics import _fixed, oracle

MAX_TABLE_BITS: Final = 12
_LARGE: Final = 2.0**100  # stands for infinity: beyond every format
_REGION: Final = "table:"

lookup_p = Primitive("lookup")


def region(function: Callable[..., jax.Array], name: str) -> Callable[..., jax.Array]:
    """`function(x, *rest)`, elementwise in x, as one table per element: `instrument` keeps it whole and makes it a table.

    What `rest` holds (a small network's weights, say) is the same for all samples; the result has the shape of x.

    >>> float(region(lambda x, w: jnp.tanh(w * x), "edge")(jnp.float32(0.0), jnp.float32(2.0)))
    0.0
    """

    def call(x: jax.Array, *rest: Any) -> jax.Array:
        return function(x, *rest)

    call.__name__ = _REGION + name
    return jax.jit(call)


def region_name(eqn: Any) -> str | None:
    """The name of the `region` that an equation calls, None if it calls none."""
    name = str(eqn.params.get("name", "")) if eqn.primitive.name in ("jit", "pjit") else ""
    return name.removeprefix(_REGION) if name.startswith(_REGION) else None


def lookup(x: jax.Array, fmt: KIF, table: Table) -> jax.Array:
    """Read a table: codes[which, x * 2^f - lowest] * 2^-f_out, with lowest = -k * 2^(i + f).

    x: values on the grid of `fmt`, whose k, i, f broadcast to it; so does `table.which`.  No gradient.

    >>> from pquant_jax.numerics import kif
    >>> fmt = kif(1, 1, 0)
    >>> square = build_table(lambda v: v * v, fmt, kif(0, 3, 0), (), "square")
    >>> lookup(jnp.float32([-2, -1, 0, 1]), fmt, square).tolist()
    [4.0, 1.0, 0.0, 1.0]
    """
    x = jnp.asarray(x)
    k, i, f = (jnp.asarray(v, x.dtype) for v in (fmt.k, fmt.i, fmt.f))
    return lookup_p.bind(x, k, i, f, *(jnp.asarray(v, jnp.int32) for v in table))


def _offset(k: Any, i: Any, f: Any, xp: Any) -> Any:
    """Codes below zero; a format without width has the code 0 alone."""
    return xp.where(k + i + f > 0, k * xp.ldexp(xp.ones_like(f), (i + f).astype(xp.int32)), 0)


def _lookup(x, k, i, f, codes, f_out, which):
    i, f = jnp.round(i), jnp.round(f)
    index = x * _fixed.power_of_two(f, x.dtype) + _offset(k, i, f, jnp)
    index = jnp.clip(index.astype(jnp.int32), 0, codes.shape[-1] - 1)
    which = jnp.broadcast_to(which, x.shape)
    return codes[which, index].astype(x.dtype) * _fixed.power_of_two(-f_out, x.dtype)[which]


def _lookup_batch(args, dims):
    """Batch of x at the front; the tables are the same for all samples."""
    if any(d is not None for d in dims[4:6]):
        return jax.vmap(_lookup, dims)(*args), 0
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    rank = args[0].ndim - (dims[0] is not None)
    moved = []
    for n, (a, d) in enumerate(zip(args, dims, strict=True)):
        if n in (4, 5):
            moved.append(a)
            continue
        if d is not None:
            a = jnp.moveaxis(a, d, 0)
            a = a.reshape(size, *(1,) * (rank - a.ndim + 1), *a.shape[1:])
        moved.append(jnp.broadcast_to(a, (size, *a.shape)) if n == 0 and d is None else a)
    return lookup_p.bind(*moved), 0


lookup_p.def_impl(jax.jit(_lookup))
lookup_p.def_abstract_eval(lambda x, *_: ShapedArray(x.shape, x.dtype))
mlir.register_lowering(lookup_p, mlir.lower_fun(_lookup, multiple_results=False))
batching.primitive_batchers[lookup_p] = _lookup_batch


def code_grid(source: KIF, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Every value of the format of a site of `shape`, float64 (entries, *shape), from the lowest code on; NaN behind the last.

    Raises: LoweringError where `source` has more than MAX_TABLE_BITS bits, naming the table.

    >>> from pquant_jax.numerics import kif
    >>> code_grid(kif(1, 0, 1), (), "tanh").tolist()
    [-1.0, -0.5, 0.0, 0.5]
    """
    k, i, f = _whole(source, shape)
    bits = np.maximum(k + i + f, 0).astype(np.int64)
    if bits.max(initial=0) > MAX_TABLE_BITS:
        at = tuple(int(j) for j in np.argwhere(np.atleast_1d(bits) > MAX_TABLE_BITS)[0])
        raise LoweringError(
            f"the table {name!r} has {int(np.atleast_1d(bits)[at])} input bits (element {at}), the limit is {MAX_TABLE_BITS}: "
            f"a table has 2^bits entries.  Give the site in front of it fewer bits (i + f)"
        )
    number = np.arange(1 << int(bits.max(initial=0)), dtype=np.float64).reshape(-1, *(1,) * len(shape))
    return np.where(number < np.ldexp(1.0, bits), (number - _offset(k, i, f, np)) * np.ldexp(1.0, -f.astype(np.int64)), np.nan)


def _whole(fmt: KIF, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(np.broadcast_to(np.rint(np.asarray(v, np.float64)), shape) for v in (fmt.k, fmt.i, fmt.f))


def build_table(function: Callable[[jax.Array], Any], source: KIF, result: KIF, shape: tuple[int, ...], name: str) -> Table:
    """The table of `function` from the format `source` to the format `result`, for every element of a site of `shape`.

    function: float32 (entries, *shape) -> the same, elementwise; called once, on `code_grid`.  Elements that agree in
    their entries share a row.  NaN becomes 0, infinities the ends of the range.
    Raises: LoweringError where `source` has more than MAX_TABLE_BITS bits, naming the site.
    """
    grid = code_grid(source, shape, name)
    values = np.asarray(function(jnp.asarray(grid, jnp.float32)), np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=_LARGE, neginf=-_LARGE)
    k, i, f = _whole(result, shape)
    codes = oracle.quantize_codes(values, k, i, f, rounding=result.rounding, overflow=result.overflow)
    rows = np.where(np.isnan(grid), 0, codes).reshape(len(grid), -1).T
    rows = np.concatenate([rows, f.reshape(-1, 1)], axis=1).astype(np.int32)
    unique, which = np.unique(rows, axis=0, return_inverse=True)
    return Table(unique[:, :-1], unique[:, -1], which.reshape(shape).astype(np.int32))
