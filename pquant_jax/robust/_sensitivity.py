"""How much the loss changes when one stored bit flips, from its gradient and its Hessian; which bits to protect.

A flip of the bit of weight 2^b moves a weight by dw = +-2^b 2^-f (the sign bit by -+2^(k+i)), so that to second order

    dL = g dw + h dw^2 / 2,   g: gradient, h: diagonal of the Hessian, both at the quantized weights.

After Weng et al., "FKeras: A Sensitivity Analysis Tool for Edge Neural Networks", ACM J. Auton. Transport. Syst. 1 (2024),
which scores a weight w by sum_j lambda_j v_jw^2 over the top eigenpairs of the Hessian: `method="eigen"`.  The gradient
term, which it leaves out, decides about models that were not trained to the very minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pquant_jax._base import Tree, View
from pquant_jax._errors import DataError, did_you_mean
from pquant_jax.graph import Instrumented
from pquant_jax.robust._replay import Format, replay
from pquant_jax.train import cross_entropy

METHODS: Final = ("hutchinson", "exact", "eigen")
_TOGETHER: Final = 16  # Hessian-vector products in one vmap


class Sensitivity(NamedTuple):
    """Per site of parameters arrays of (*shape, bits), bits up to the widest element; -inf where an element has no such bit.

    score: |g dw| + |h| dw^2 / 2, the change of the loss.  step: dw.  bits: int32 (*shape,), of each element.
    gradient, curvature: g and h, (*shape,).
    """

    score: dict[str, np.ndarray]
    step: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    curvature: dict[str, np.ndarray]


def bit_sensitivity(
    inst: Instrumented,
    view: View,
    model_state: Tree,
    x: Any,
    y: Any,
    *,
    loss: Callable[[Any, Any], jax.Array] = cross_entropy,
    method: str = "hutchinson",
    probes: int = 64,
    eigenpairs: int = 8,
    gradient: bool = True,
    seed: int = 0,
) -> Sensitivity:
    """The score of every bit of every quantized parameter of `view`, on the samples x, y.

    Activations are taken as they would be without rounding (a quantizer's own derivative is 0 almost everywhere).

    Args:
      loss: (outputs, y) -> one loss per sample.
      method: how h is found: "hutchinson" (E[v * Hv] over `probes` random signs, Bekas et al. 2007), "exact" (one
        Hessian-vector product per weight) or "eigen" (sum of lambda v^2 over `eigenpairs`, FKeras).
      gradient: with the term g dw.
    Raises: DataError for an unknown method; TraceError for sites without format.
    """
    if method not in METHODS:
        raise DataError(f"method is {method!r}; {did_you_mean(method, METHODS)}")
    found = replay(inst, view._replace(tables={}), model_state, len(jax.tree.leaves(y)[0]))
    ports, target = (jax.tree.map(jnp.asarray, v) for v in (inst.encode(x), y))

    def moved(delta: Mapping[str, Any]) -> Any:
        def hook(site: str, value: Any, _: Format) -> Any:
            return value + delta[site] if site in delta else value

        return jnp.mean(loss(found.run(hook, ports, smooth=True), target))

    zero = {name: jnp.zeros(np.shape(v), jnp.float32) for name, v in found.values.items()}
    flat, unravel = ravel_pytree(zero)
    alive = np.concatenate([np.ravel(found.stored[name].bits > 0) for name in sorted(zero)])
    slope = jax.grad(lambda v: moved(unravel(v)))

    def product(v: Any) -> Any:
        return jax.jvp(slope, (flat,), (v * alive,))[1] * alive

    h = _diagonal(product, alive, method, probes, eigenpairs, seed)
    g = np.asarray(jax.jit(slope)(flat)) if gradient else np.zeros(flat.shape)
    parts = [{n: np.asarray(v, np.float64) for n, v in unravel(jnp.asarray(a, jnp.float32)).items()} for a in (g, h)]
    step = {n: bit_steps(found.values[n], found.stored[n]) for n in zero}
    score = {n: _score(step[n], parts[0][n], parts[1][n], np.asarray(found.stored[n].bits)) for n in zero}
    return Sensitivity(score, step, {n: np.asarray(found.stored[n].bits) for n in zero}, *parts)


def _score(dw: np.ndarray, g: np.ndarray, h: np.ndarray, bits: np.ndarray) -> np.ndarray:
    value = np.abs(g[..., None] * dw) + np.abs(h[..., None]) * dw**2 / 2
    return np.where(np.arange(dw.shape[-1]) < bits[..., None], value, -np.inf)


def bit_steps(value: np.ndarray, fmt: Format) -> np.ndarray:
    """What flipping each bit adds to `value`, float64 (*shape, bits): +2^b 2^-f where the bit is 0, - where it is 1.

    The sign bit counts -2^b.  0 beyond the element's bits.

    >>> fmt = Format(np.int32([1]), np.int32([1]), np.int32([1]))
    >>> bit_steps(np.float32([-0.5]), fmt).tolist()  # code 111
    [[-0.5, -1.0, 2.0]]
    """
    bits = np.asarray(fmt.bits)
    place = np.arange(max(int(bits.max(initial=0)), 1))
    code = np.rint(np.ldexp(np.asarray(value, np.float64), fmt.f)).astype(np.int64)[..., None]
    weight = np.where((place == bits[..., None] - 1) & (np.asarray(fmt.k)[..., None] == 1), -1.0, 1.0)
    move = np.ldexp(np.where(code >> place & 1, -weight, weight), place - np.asarray(fmt.f)[..., None])
    return np.where(place < bits[..., None], move, 0.0)


def _diagonal(product: Callable, alive: np.ndarray, method: str, probes: int, pairs: int, seed: int) -> np.ndarray:
    n = len(alive)
    if method == "exact":

        def entry(j: Any) -> Any:
            return product(jnp.zeros(n).at[j].set(1.0))[j]

        h = np.zeros(n)
        h[alive] = np.asarray(jax.jit(lambda js: jax.lax.map(entry, js, batch_size=_TOGETHER))(jnp.flatnonzero(alive)))
        return h
    if method == "eigen":
        values, vectors = eigenpairs(product, n, pairs, seed=seed)
        return np.asarray((vectors**2 * values).sum(1)) * alive

    def probe(key: Any) -> Any:
        v = jax.random.rademacher(key, (n,), jnp.float32)
        return v * product(v)

    keys = jax.random.split(jax.random.key(seed), probes)
    return np.asarray(jnp.mean(jax.jit(lambda k: jax.lax.map(probe, k, batch_size=_TOGETHER))(keys), 0))


def eigenpairs(
    product: Callable[[Any], Any], n: int, count: int, *, steps: int = 0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(eigenvalues (count,), eigenvectors (n, count)) of largest magnitude of the symmetric matrix v -> product(v).

    Lanczos with full reorthogonalization on the host, `steps` products (4 count + 20 by default).

    >>> h = jnp.diag(jnp.float32([1.0, 5.0, 3.0, 0.5]))
    >>> values, vectors = eigenpairs(lambda v: h @ v, 4, 2)
    >>> np.round(values, 4).tolist(), np.round(np.abs(vectors[:, 0]), 4).tolist()
    ([5.0, 3.0], [0.0, 1.0, 0.0, 0.0])
    """
    compiled, count = jax.jit(product), min(count, n)
    steps = min(n, steps or 4 * count + 20)
    v = np.random.default_rng(seed).normal(size=n)
    basis, image = np.zeros((n, 0)), np.zeros((n, 0))
    for _ in range(steps):
        for _ in range(2):  # once loses orthogonality when the remainder is small
            v = v - basis @ (basis.T @ v)
        size = np.linalg.norm(v)
        if size < 1e-6:
            break
        basis = np.column_stack([basis, v / size])
        v = np.asarray(compiled(jnp.asarray(basis[:, -1], jnp.float32)), np.float64)
        image = np.column_stack([image, v])
    small = basis.T @ image
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    order = np.argsort(-np.abs(values))[:count]
    return values[order], basis @ vectors[:, order]


class Ranking(NamedTuple):
    """Stored bits, the one to protect first at the front: site (number in `sites`), flat element, bit, score."""

    sites: tuple[str, ...]
    site: np.ndarray
    element: np.ndarray
    bit: np.ndarray
    score: np.ndarray


def rank(score: Mapping[str, np.ndarray]) -> Ranking:
    """All bits of `Sensitivity.score` in falling order; ties by site, element and bit.

    >>> ranking = rank({"w": np.array([[1.0, 3.0], [2.0, -np.inf]])})
    >>> list(zip(ranking.element.tolist(), ranking.bit.tolist()))
    [(0, 1), (1, 0), (0, 0)]
    """
    names = tuple(score)
    rows = []
    for n, name in enumerate(names):
        table = score[name].reshape(-1, score[name].shape[-1])
        element, bit = np.nonzero(table > -np.inf)
        rows.append((np.full(len(element), n), element, bit, table[element, bit]))
    site, element, bit, value = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    order = np.argsort(-value, kind="stable")
    return Ranking(names, site[order], element[order], bit[order], value[order])


def protect(score: Mapping[str, np.ndarray], percent: float) -> dict[str, np.ndarray]:
    """{site: int32 mask} of the `percent` % of the bits with the highest scores, round(n percent / 100) of n: for `inject`.

    Raises: DataError for a percentage outside of 0 to 100.

    >>> protect({"w": np.array([[1.0, 3.0], [2.0, -np.inf]])}, 67)["w"].tolist()
    [2, 1]
    """
    if not 0 <= percent <= 100:
        raise DataError(f"percent is {percent!r}, expected 0 to 100")
    ranking = rank(score)
    masks = {name: np.zeros(int(np.prod(v.shape[:-1])), np.int64) for name, v in score.items()}
    count = round(len(ranking.score) * percent / 100)
    for n, name in enumerate(ranking.sites):
        mine = ranking.site[:count] == n
        np.bitwise_or.at(masks[name], ranking.element[:count][mine], 1 << ranking.bit[:count][mine])
    return {name: m.astype(np.int32).reshape(score[name].shape[:-1]) for name, m in masks.items()}


def random_scores(score: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """Scores of the same bits without any knowledge: `protect` then chooses at random, to compare with."""
    rng = np.random.default_rng(seed)
    return {name: np.where(v > -np.inf, rng.uniform(size=v.shape), -np.inf) for name, v in score.items()}


def by_bit(found: Sensitivity) -> dict[str, np.ndarray]:
    """{site: float64 (bits,)}: the mean score of the bits of each position over the elements that have it; nan for none.

    Positions count from the lowest bit.
    """
    out = {}
    for name, score in found.score.items():
        flat = score.reshape(-1, score.shape[-1])
        there = flat > -np.inf
        total = np.where(there, flat, 0.0).sum(0)
        out[name] = np.divide(total, there.sum(0), out=np.full(flat.shape[-1], np.nan), where=there.sum(0) > 0)
    return out
