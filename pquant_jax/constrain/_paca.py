"""PACA: kernels that share a few binary patterns, so that a pattern is stored once and a kernel as a number and its weights.

A kernel here is what one input channel and one output channel share: the spatial slice of a convolution, or a block of a
dense kernel.  Its pattern is its support, 1[|w| > epsilon].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import AxisRole
from pquant_jax._errors import TransformError
from pquant_jax.constrain._metric import Metric, check, fraction, near_zero
from pquant_jax.transforms import role_of, through, tiled, turned

DISTANCES: Final = ("hamming", "valued_hamming", "cosine")
_ALL_CODES_UP_TO = 10  # bits: 1,024 patterns can all be counted; beyond, only those that occur are
_WORD = 31


class Dominant(NamedTuple):
    """The patterns that stay, most frequent first.

    patterns: (p, b) of 0 and 1.  valid: (p,), False for places that the layer has no pattern for.  kernels: (p,), how many
    kernels have exactly this pattern, int32.
    """

    patterns: jax.Array
    valid: jax.Array
    kernels: jax.Array


class Patterns(NamedTuple):
    """One choice of patterns, as the three things that are made of it.

    metric: mean distance of the kernels to the dominant pattern next to them, for `mdmm(kind="==", target=0)`; per layer or not.
    masks: ({path: kernel}) -> {path: 0/1}, every kernel on that pattern, for `mdmm(prunes=)`.
    report: ({path: kernel}) -> {path: dict}, see `patterns`.  On the host.
    """

    metric: Metric
    masks: Callable[[Mapping[str, jax.Array]], dict[str, jax.Array]]
    report: Callable[[Mapping[str, jax.Array]], dict[str, dict[str, Any]]]


def slices(
    path: str, shape: tuple[int, ...], role: AxisRole | None, block: tuple[int, int] | None
) -> tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]:
    """(kernel -> (n, b), and back): n kernels of b weights; zeros fill up the last blocks.

    >>> there, back = slices("kernel", (3, 3, 2, 4), None, None)
    >>> there(jnp.zeros((3, 3, 2, 4))).shape, back(jnp.zeros((8, 9))).shape
    ((8, 9), (3, 3, 2, 4))
    """
    role = role or role_of(path, len(shape), None)
    out = role.out_axes
    ins = tuple(a for a in range(len(shape)) if a not in out)
    if block is None:
        spatial = tuple(a for a in ins if a in role.positions)
        if not spatial:
            raise TransformError(
                f"{path}: a kernel of shape {shape} has no positions; say block=(inputs, outputs), such as (2, 4)"
            )
        size = math.prod(shape[a] for a in spatial)
        order = (*(a for a in ins if a not in spatial), *out, *spatial)
        return turned(shape, order, (math.prod(shape) // size, size))
    if min(block) < 1:
        raise TransformError(f"{path}: a block of {block[0]} x {block[1]} weights is empty")
    flat = math.prod(shape[a] for a in ins), math.prod(shape[a] for a in out)
    (there, back), (cut, join) = turned(shape, (*ins, *out), flat), tiled(flat, block)
    counts = math.ceil(flat[0] / block[0]), math.ceil(flat[1] / block[1])

    def rows(w: jax.Array) -> jax.Array:
        return cut(there(w)).swapaxes(1, 2).reshape(-1, block[0] * block[1])

    return rows, lambda v: back(join(v.reshape(*counts, *block).swapaxes(1, 2)))


def dominant(support: jax.Array, num_patterns: int, beta: float) -> Dominant:
    """The most frequent rows of `support`, (n, b) of 0 and 1: at most `num_patterns`, and no more than it takes to cover beta.

    Ties go to the smaller pattern, read as a number with its first weight as the lowest bit, or to the first to occur where
    b > 10.  Counts and ranks by comparison, without a sort.

    >>> found = dominant(jnp.float32([[1, 0], [1, 1], [1, 0]]), num_patterns=4, beta=0.6)
    >>> found.patterns[found.valid].tolist(), found.kernels[found.valid].tolist()
    ([[1.0, 0.0]], [2])
    """
    support = jax.lax.stop_gradient(support)
    n, b = support.shape
    if b <= _ALL_CODES_UP_TO:
        codes = jnp.sum(support.astype(jnp.int32) << jnp.arange(b, dtype=jnp.int32), 1)
        count = jnp.zeros(2**b, jnp.int32).at[codes].add(1)
        every = (np.arange(2**b)[:, None] >> np.arange(b)) & 1
        candidates = jnp.asarray(every, jnp.float32)
    else:
        words = math.ceil(b / _WORD)
        bits = jnp.pad(support.astype(jnp.int32), ((0, 0), (0, words * _WORD - b))).reshape(n, words, _WORD)
        keys = jnp.sum(bits << jnp.arange(_WORD, dtype=jnp.int32), -1)
        same = jnp.all(keys[:, None] == keys[None], -1)
        place = jnp.arange(n)
        first = ~jnp.any(same & (place[None] < place[:, None]), 1)
        count, candidates = jnp.where(first, jnp.sum(same, 1, dtype=jnp.int32), 0), support
    # of equally many the first; float32 counts exactly, and only for it is top_k no sort on the CPU
    top, chosen = jax.lax.top_k(count.astype(jnp.float32), min(num_patterns, count.size))
    in_front = jnp.cumsum(top) - top
    stays = (top > 0) & (in_front < math.ceil(beta * n - 1e-9))  # not one more for the last bit of beta
    return Dominant(candidates[chosen], stays, top.astype(jnp.int32))


def nearest(w: jax.Array, found: Dominant, epsilon: float, alpha: float, distance: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(soft, hard, pattern): distance of every kernel of (n, b) to the pattern next to it, and that pattern.

    With the support s, a pattern p: "hamming" sum |s - p|, "valued_hamming" sum |s - p| |w|, "cosine"
    1 - <w, w p> / (|w| |w p|), which is 1 - |w p| / |w|.  A kernel of zeros has cosine distance 0: nothing is lost.
    """
    size = jnp.abs(w)
    s = (size > epsilon).astype(w.dtype)
    p = found.patterns
    energy = jnp.sum(jnp.square(w), 1)
    present = energy > 0

    def cosine(kept: jax.Array) -> jax.Array:  # the roots are taken of 1 where they would be of 0, for the gradient's sake
        some = present & (kept > 0)
        share = jnp.sqrt(jnp.where(some, kept, 1)) / jnp.sqrt(jnp.where(some, energy, 1))
        return jnp.where(present, 1 - jnp.where(some, share, 0), 0)

    if distance == "cosine":
        table = jax.vmap(cosine, 1, 1)(jnp.square(w) @ p.T)
    elif distance == "hamming":  # as a product: of 0 and 1, |s - p| = s + p - 2 s p, and the sums are exact
        table = jnp.sum(s, 1, keepdims=True) + jnp.sum(p, 1) - 2 * s @ p.T
    else:
        table = jnp.sum(jnp.abs(s[:, None] - p[None]) * size[:, None], -1)
    table = jax.lax.stop_gradient(table)
    at = jnp.argmin(jnp.where(found.valid, table, jnp.inf), 1)
    hard, q = jnp.take_along_axis(table, at[:, None], 1)[:, 0], p[at]
    if distance == "hamming":
        alive = through(s, 1 - near_zero(jnp.square(w), alpha, "coarse"))
        return jnp.sum(jnp.abs(s - q) * jnp.abs(alive - q), 1), hard, q  # the gradient of |0| is not 0
    if distance == "valued_hamming":
        return jnp.sum(jnp.abs(s - q) * size, 1), hard, q
    return cosine(jnp.sum(jnp.square(w) * q, 1)), hard, q


def patterns(
    *,
    num_patterns: int = 16,
    beta: float = 0.75,
    distance: str = "hamming",
    epsilon: float = 1e-3,
    alpha: float = 100.0,
    block: tuple[int, int] | None = None,
    roles: Mapping[str, AxisRole] | None = None,
    where: _tree.Where | None = None,
    per: str = "model",
    of: str = "params",
) -> Patterns:
    """Kernels on few patterns: a metric for MDMM, the projection for fine-tuning, and a report.

    The dominant patterns of a layer are those of its kernels, by frequency, up to the first with which they cover `beta` of
    the kernels, but at most `num_patterns`; read off anew whenever the metric is.  The report of a layer: "patterns", tuples
    of 0 and 1; "kernels", how many are nearest to each; "counts", how many are exactly on each pattern that occurs, the
    dominant ones first; "covered", the share that are exactly on a dominant one; "table_bits" of the patterns, "index_bits" of
    the numbers of all kernels, and "mask_bits", what a mask of every kernel would take.

    Args:
      num_patterns: at most so many of a layer.  beta: share of the kernels that they cover, a fraction.
      distance: "hamming", "valued_hamming" or "cosine", see `nearest`.
      epsilon: what counts as present.  alpha: of the gradient of "hamming", see `metrics`.
      block: (inputs, outputs) of a block of a dense kernel; default the positions of a convolution.
      roles: `inst.roles`; default the last axis is the output, the one before it the input.
      where: which kernels; default those with positions, or all with `block`.
      per, of: see `metrics`.
    Raises: TransformError for an unknown distance, per or of, a number out of its range, or a kernel without positions.
    Source: PACA as in PQuantML's plan (pull request 46), https://github.com/nroope/PQuant.

    >>> few = patterns(num_patterns=1, block=(1, 2), epsilon=0.1)
    >>> few.masks({"kernel": jnp.float32([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]])})["kernel"].tolist()
    [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    """
    check("distance", distance, DISTANCES)
    if num_patterns < 1:
        raise TransformError(f"num_patterns is {num_patterns}, expected at least 1")
    if not 0 < beta <= 1:
        raise TransformError(f"beta is {beta}, expected a share of the kernels above 0 and up to 1")

    def with_positions(path: str, leaf: Any) -> bool:
        if where is not None:
            return _tree.is_kernel(path, leaf) and _tree.matches(where, path, leaf)
        return _tree.is_kernel(path, leaf) and (block is not None or bool(role_of(path, jnp.ndim(leaf), roles).positions))

    def cut(path: str, w: jax.Array) -> tuple[Callable, jax.Array, Dominant]:
        there, back = slices(path, w.shape, (roles or {}).get(path), block)
        rows = there(w)
        return back, rows, dominant((jnp.abs(rows) > epsilon).astype(w.dtype), num_patterns, beta)

    def count(path: str, w: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        _, rows, found = cut(path, w)
        soft, hard, _ = nearest(rows, found, epsilon, alpha, distance)
        return jnp.sum(soft), jnp.sum(hard), rows.shape[0]

    def masks(kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        made = {}
        for p, w in kernels.items():
            if with_positions(p, w):
                back, rows, found = cut(p, w)
                made[p] = back(nearest(rows, found, epsilon, alpha, distance)[2])
        return made

    def report(kernels: Mapping[str, jax.Array]) -> dict[str, dict[str, Any]]:
        return {p: _described(*cut(p, w)[1:]) for p, w in kernels.items() if with_positions(p, w)}

    def _described(rows: jax.Array, found: Dominant) -> dict[str, Any]:
        q, valid = np.asarray(nearest(rows, found, epsilon, alpha, distance)[2]), np.asarray(found.valid)
        table, (n, b) = np.asarray(found.patterns, int)[valid], rows.shape
        counts = np.unique(np.abs(np.asarray(rows)) > epsilon, axis=0, return_counts=True)[1]
        return {
            "patterns": [tuple(int(v) for v in row) for row in table],
            "kernels": [int((q == row).all(1).sum()) for row in table],
            "counts": sorted(counts.tolist(), reverse=True),
            "covered": int(np.asarray(found.kernels)[valid].sum()) / n,
            "table_bits": len(table) * b,
            "index_bits": n * math.ceil(math.log2(len(table))),
            "mask_bits": n * b,
        }

    return Patterns(fraction(count, with_positions, per, of), masks, report)
