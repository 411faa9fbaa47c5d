"""x * scale + offset, kept open while what is the same for all samples is added and multiplied: BatchNorm without a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pquant_jax.graph._sites import Run, at_site, home, input_name, joined, parameter, record_active
from pquant_jax.graph._values import Value, is_parameter, prefix


def affine(run: Run, name: str, ins: list[Value], original: Any) -> Value | None:
    """The open term that an addition, subtraction, product or quotient makes; None if it is something else.

    original: what the model's own equation gives, for a view without formats.
    """
    side = 0 if ins[0].batch is not None else 1
    x, c = ins[side], ins[1 - side]
    if not is_parameter(c) or (name == "div" and side == 1) or x.batch is None:
        return None
    shape = tuple(jnp.shape(original))
    if tuple(jnp.shape(x.val)) != shape:
        if jnp.ndim(x.val) != len(shape):
            return None
        x = _broadcast(plain(run, x), shape)
    batch = x.batch
    assert batch is not None  # for the type checker
    c = _of_one_sample(c, batch, shape)
    base, scale, offset = x.affine if x.affine is not None else (x, None, None)
    if name == "add":
        offset = c if offset is None else _combine(jnp.add, offset, c)
    elif name == "sub" and side == 0:
        offset = _combine(jnp.negative, c) if offset is None else _combine(jnp.subtract, offset, c)
    elif name == "sub":
        scale = _combine(jnp.negative, scale) if scale is not None else Value(-jnp.ones_like(c.val), derived=True)
        offset = c if offset is None else _combine(jnp.subtract, c, offset)
    else:
        factor = c if name == "mul" else _combine(lambda v: 1 / v, c)
        scale = factor if scale is None else _combine(jnp.multiply, scale, factor)
        offset = None if offset is None else _combine(jnp.multiply, offset, factor)
    lazy = Value(original, base.batch, True, affine=(base, scale, offset))
    # a bias that is one parameter closes the term: what follows sees a finished layer output
    return plain(run, lazy) if scale is None and offset is not None and offset.leaf is not None else lazy


def _broadcast(x: Value, shape: tuple[int, ...]) -> Value:
    """x with its axes of size 1 repeated; what is on a grid stays on it."""
    made = Value(jnp.broadcast_to(x.val, shape), x.batch, x.signed, paths=x.paths)
    if x.on_grid is not None:
        made.on_grid = made if x.on_grid is x else _broadcast(x.on_grid, shape)
    return made


def _of_one_sample(c: Value, batch: int, shape: tuple[int, ...]) -> Value:
    """What was broadcast to all samples, once: its site has the same shape for every batch."""
    own = tuple(jnp.shape(c.val))
    if c.leaf is not None or len(own) != len(shape) or own[batch] == 1:
        return c
    return Value(
        lax.slice_in_dim(jnp.asarray(c.val), 0, 1, axis=batch), signed=c.signed, paths=c.paths, derived=c.derived, fine=c.fine
    )


def _combine(function: Callable, *parts: Value) -> Value:
    return Value(function(*(v.val for v in parts)), paths=frozenset().union(*(v.paths for v in parts)), derived=True)


def plain(run: Run, v: Value) -> Value:
    """Close an open affine term: y = site(x) * site(scale) + site(offset); the original where none of them has a format."""
    if v.affine is None:
        return v
    if v.on_grid is not None:
        return v.on_grid
    base, scale, offset = v.affine
    own = prefix(frozenset().union(*(p.paths for p in (scale, offset) if p is not None)))
    root = own or joined(home(run, base), "affine")
    y, rises, parts = base.val, None, []
    if scale is not None:
        named = scale.leaf[0] if scale.leaf is not None else f"{root}/fused_scale"
        q = at_site(run, base, input_name(run, named), "input", shared=True)
        parts += [q, parameter(run, scale, "scale", f"{root}/fused_scale")]
        y = q.val * parts[-1].val
    if offset is not None:
        parts.append(parameter(run, offset, "offset", f"{root}/fused_offset"))
        shift = parts[-1].val
        y = y + shift
        rises = (base, lambda v: v + _one_sample(shift, v, base.batch)) if scale is None else None
    if not run.quantizes(*(p.site or (p.leaf[0] if p.leaf else "") for p in parts)):
        y = v.val
    v.on_grid = Value(y, v.batch, True, paths=_home_paths(own), rises=rises, channels=base.channels)
    record_active(run, v.on_grid)
    return v.on_grid


def _home_paths(own: str) -> frozenset[str]:
    """So that a function of a BatchNorm's output is named by it."""
    return frozenset({f"{own}/output"}) if own else frozenset()


def _one_sample(shift: Any, like: Any, batch: int | None) -> Any:
    """What is the same for all samples, without the batch axis if it was broadcast to one."""
    return jnp.take(shift, 0, batch) if jnp.ndim(shift) > jnp.ndim(like) else shift
