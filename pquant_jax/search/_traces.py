"""Curvature of a loss around a point: the empirical Fisher information and Hutchinson's trace of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import Tree
from pquant_jax._errors import DataError

Leaves = Mapping[str, jax.Array]


class Batches(NamedTuple):
    """Samples as (batches, batch size, ...).  weight: their mean is 1; 0 for what only fills the last batch."""

    x: Tree
    y: Tree
    weight: jax.Array


class Trace(NamedTuple):
    """Of one leaf's block of the Hessian.  mean: trace / number of elements.  error: its standard error over the probes."""

    mean: float
    error: float


def batches(data: Any, samples: int, batch_size: int) -> Batches:
    """`samples` of data.x, y and weight, evenly spaced since data may be sorted, as whole batches.

    Raises: DataError if there are none.
    """
    total = len(jax.tree.leaves(data.x)[0])
    if min(total, samples, batch_size) < 1:
        raise DataError(
            f"{total} samples, of which {samples} in batches of {batch_size} are to be used; expected 1 or more of each"
        )
    n = min(total, samples)
    chosen = np.arange(n) * total // n
    size = min(batch_size, n)
    slots = math.ceil(n / size) * size
    filled = chosen[np.arange(slots) % n]
    weight = np.ones(n, np.float64) if data.weight is None else np.asarray(data.weight, np.float64)[chosen]
    weight = np.concatenate([weight, np.zeros(slots - n)]) * slots / weight.sum()

    def stacked(v: Any) -> jax.Array:
        taken = np.asarray(v)[filled]
        return jnp.asarray(taken.reshape(-1, size, *taken.shape[1:]))

    return Batches(jax.tree.map(stacked, data.x), jax.tree.map(stacked, data.y), stacked_weight(weight, size))


def stacked_weight(weight: np.ndarray, size: int) -> jax.Array:
    """float32 (batches, size)."""
    return jnp.asarray(weight.reshape(-1, size), jnp.float32)


def fisher(losses: Callable, leaves: Leaves, data: Batches, *, compat: str | None = None) -> dict[str, jax.Array]:
    """The diagonal of the empirical Fisher information, E[g^2] with g the gradient of one sample's loss; per element.

    Args:
      losses: (leaves, x, y) -> one loss per sample, (n,).
      data: from `batches`; sample weights count.
      compat: "pquantml" takes B g^2 with g the gradient of a batch of B, which adds (B - 1) E[g]^2 where E[g] is not 0.

    >>> from types import SimpleNamespace
    >>> x, y = np.float32([[1.0], [-1.0]]), np.float32([0.0, 0.0])
    >>> two = batches(SimpleNamespace(x=x, y=y, weight=None), samples=2, batch_size=2)
    >>> losses = lambda leaves, x, y: x @ leaves["w"] - y
    >>> float(fisher(losses, {"w": jnp.float32([3.0])}, two)["w"][0])
    1.0
    >>> float(fisher(losses, {"w": jnp.float32([3.0])}, two, compat="pquantml")["w"][0])
    0.0
    """

    def of_sample(x: Tree, y: Tree) -> dict[str, jax.Array]:
        one_x, one_y = (jax.tree.map(lambda v: v[None], tree) for tree in (x, y))
        return jax.grad(lambda ls: jnp.mean(losses(ls, one_x, one_y)))(dict(leaves))

    def of_batch(total: Tree, batch: Batches) -> tuple[Tree, None]:
        size = batch.weight.shape[0]
        if compat:
            gradient = jax.grad(lambda ls: jnp.mean(losses(ls, batch.x, batch.y)))(dict(leaves))
            found = {p: size * jnp.square(g) for p, g in gradient.items()}
        else:
            gradients = jax.vmap(of_sample)(batch.x, batch.y)
            found = {p: jnp.tensordot(batch.weight, jnp.square(g), 1) / size for p, g in gradients.items()}
        return {p: total[p] + v for p, v in found.items()}, None

    count = data.weight.shape[0]
    total, _ = jax.lax.scan(of_batch, {p: jnp.zeros(w.shape, jnp.float32) for p, w in leaves.items()}, data)
    return {p: v / count for p, v in total.items()}


def hutchinson(
    loss: Callable,
    leaves: Leaves,
    data: Tree = None,
    *,
    masks: Leaves | None = None,
    probes: int = 32,
    seed: int = 0,
) -> dict[str, Trace]:
    """The mean eigenvalue of every leaf's block of the Hessian: E[v^T H v] / n, v of random signs (Hutchinson 1990).

    One Hessian-vector product (the derivative of the gradient along v) per probe and batch serves all leaves: what the
    other leaves' signs add has the mean 0 and is part of the standard error.

    Args:
      loss: (leaves, batch) -> scalar, or (leaves) without data.
      data: a tree of arrays (batches, ...); the Hessian is that of the mean over batches.
      masks: {leaf: 0/1}; elements of 0 take no part, and n counts the others.
      probes: how many v; the error falls with their root.  seed: of the signs.

    >>> h = jnp.float32([[2.0, 1.0], [1.0, 4.0]])
    >>> found = hutchinson(lambda leaves: leaves["w"] @ h @ leaves["w"] / 2, {"w": jnp.zeros(2)}, probes=200)["w"]
    >>> abs(found.mean - 3.0) < 4 * found.error < 0.4
    True
    """
    masks, at = masks or {}, dict(leaves)

    def product(v: Leaves) -> dict[str, jax.Array]:
        def of(*batch: Tree) -> dict[str, jax.Array]:
            return jax.jvp(jax.grad(lambda ls: loss(ls, *batch)), (at,), (dict(v),))[1]

        if data is None:
            return of()
        first = jax.tree.map(jnp.zeros_like, at)
        total, _ = jax.lax.scan(lambda sums, batch: (jax.tree.map(jnp.add, sums, of(batch)), None), first, data)
        return jax.tree.map(lambda h: h / len(jax.tree.leaves(data)[0]), total)

    def probe(key: jax.Array) -> dict[str, jax.Array]:
        keys = dict(zip(sorted(at), jax.random.split(key, len(at)), strict=True))
        v = {p: jax.random.rademacher(keys[p], w.shape, w.dtype) * masks.get(p, 1) for p, w in at.items()}
        return {p: jnp.vdot(v[p], h) for p, h in product(v).items()}

    found = jax.jit(lambda keys: jax.lax.map(probe, keys))(jax.random.split(jax.random.key(seed), probes))
    sizes = {p: float(jnp.sum(masks[p])) if p in masks else w.size for p, w in at.items()}
    return {p: _trace(np.asarray(values, np.float64) / max(sizes[p], 1)) for p, values in found.items()}


def _trace(values: np.ndarray) -> Trace:
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Trace(float(values.mean()), float(error))
