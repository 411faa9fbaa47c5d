"""What a constraint can hold: sparsity of weights, groups, multipliers and memories, N:M, bit operations.

Every metric is a `Metric(soft, hard, shape)`.  hard counts exactly.  soft is what the penalty differentiates: "coarse" has
hard's value and the gradient of a smooth indicator, "smooth" is a mean of exp(-alpha s) and goes to hard as the weights
part into zeros and others.  Arguments that all of them share:

  epsilon: a weight or norm of at most this counts as absent.
  alpha: of the smooth indicator, 1 / units of w^2.  "smooth" moves nothing beyond |w| = 3 / sqrt(alpha): where a target is
    not reached though the multiplier grows, lower it.  "coarse" has a tail and reaches every weight.
  where: which kernels: a path, a regular expression, (path, leaf) -> bool.
  per: "model" for one number, "layer" for one per kernel, each with a multiplier of its own.
  of: "params", the latent kernels, or "view", as the forward sees them, pruned and quantized by the rest of the chain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import AxisRole, View
from pquant_jax._errors import TransformError
from pquant_jax.constrain._metric import MODES, Metric, absent, check, fraction
from pquant_jax.transforms import NM, Groups, Reuse, layout, layouts, places

Roles = Mapping[str, AxisRole] | None


def sparsity(
    *,
    epsilon: float = 1e-3,
    mode: str = "coarse",
    alpha: float = 100.0,
    where: _tree.Where = _tree.is_kernel,
    per: str = "model",
    of: str = "params",
) -> Metric:
    """Zeros / total: mean 1[|w| <= epsilon], or mean exp(-alpha w^2).  Shared arguments: see the module.

    Raises: TransformError for an unknown mode, per or of.

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[0.5, 0.0], [0.1, 1.0]])}, {})
    >>> [round(float(sparsity(mode=m).soft(params, View(params.model, {}, {}))), 3) for m in ("coarse", "smooth")]
    [0.25, 0.342]
    """
    check("mode", mode, MODES)

    def count(path: str, w: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        del path
        soft, hard = absent(jnp.abs(w), jnp.square(w), epsilon, alpha, mode)
        return jnp.sum(soft), jnp.sum(hard), w.size

    return fraction(count, where, per, of)


def group_sparsity(
    groups: Groups,
    *,
    epsilon: float = 1e-3,
    mode: str = "coarse",
    alpha: float = 100.0,
    roles: Roles = None,
    where: _tree.Where = _tree.is_kernel,
    per: str = "model",
    of: str = "params",
) -> Metric:
    """Empty groups / groups: mean 1[norm <= epsilon], or mean exp(-alpha norm^2), norm the L2 norm of a group.

    PQuantML's structured metric is the hard value and has no gradient; this one has.

    Args:
      groups: as in `pq.prune.magnitude`: "in", "out", "filter", "head", "layer", Block, Cross, Reuse, Heads.
      roles: `inst.roles`; default the last axis is the output.  The others: see the module.
    Raises: TransformError for an unknown mode, per or of, N:M (`nm_violation`), or groups that a kernel can't be cut into.

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[0.5, 0.0], [0.1, 0.0]])}, {})
    >>> float(group_sparsity("out").hard(params, View(params.model, {}, {})))
    0.5
    """
    check("mode", mode, MODES)
    if isinstance(groups, NM):
        raise TransformError("N:M has no groups that are empty as a whole; use nm_violation(n, m)")

    def count(path: str, w: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        norms = layout(path, w.shape, groups, roles).scores(jnp.abs(w))
        soft, hard = absent(norms, jnp.square(norms), epsilon, alpha, mode)
        return jnp.sum(soft), jnp.sum(hard), norms.size

    return fraction(count, where, per, of)


def dsp_sparsity(*, reuse: int, roles: Roles = None, **shared: Any) -> Metric:
    """Multipliers (DSPs) of hls4ml's resource strategy without work / all: `group_sparsity(Reuse(reuse))`.

    Args:
      reuse: reuse factor: weights that one multiplier works off, one after the other, in the order (out, in).
      shared: epsilon, mode, alpha, where, per, of; see the module.
    Source: PQuantML's plan of an FPGA-aware metric (pull request 46).

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[0.0, 3.0], [0.0, 0.0]])}, {})
    >>> float(dsp_sparsity(reuse=2).hard(params, View(params.model, {}, {})))
    0.5
    """
    return group_sparsity(Reuse(reuse), roles=roles, **shared)


def bram_group(*, precision: int, bram_width: int = 36) -> int:
    """Multipliers whose weights share a word of block RAM: bram_width / precision if that is whole, else those of two words.

    precision, bram_width: in bits.
    Raises: TransformError where not even one weight fits into two words.

    >>> [bram_group(precision=p) for p in (9, 18, 16, 8)]
    [4, 2, 4, 9]
    """
    if not 0 < precision <= 2 * bram_width:
        raise TransformError(f"precision is {precision} bits, expected 1 to {2 * bram_width}: at most two words of the memory")
    return bram_width // precision if bram_width % precision == 0 else 2 * bram_width // precision


def bram_sparsity(*, reuse: int, precision: int, bram_width: int = 36, roles: Roles = None, **shared: Any) -> Metric:
    """Empty block-RAM words / all: the groups of c consecutive multipliers, c = `bram_group(precision, bram_width)`.

    A memory is saved only where all the multipliers that read it have no work.

    Args:
      reuse: as in `dsp_sparsity`.  precision: bits of a weight.  bram_width: bits of a memory's word.
      shared: epsilon, mode, alpha, where, per, of; see the module.
    Raises: TransformError where not even one weight fits into two words.
    Source: PQuantML's plan of an FPGA-aware metric (pull request 46).

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[0.0, 3.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])}, {})
    >>> float(bram_sparsity(reuse=2, precision=18).hard(params, View(params.model, {}, {})))
    0.5
    """
    together = Reuse(reuse * bram_group(precision=precision, bram_width=bram_width))
    return group_sparsity(together, roles=roles, **shared)


def nm_violation(
    n: int,
    m: int,
    *,
    epsilon: float = 1e-3,
    mode: str = "coarse",
    alpha: float = 100.0,
    roles: Roles = None,
    where: _tree.Where = _tree.is_kernel,
    per: str = "model",
    of: str = "params",
) -> Metric:
    """Weights that are not zero though n of their block of m are larger / the most there can be; 0 where N:M holds.

    sum 1[|w| > epsilon] over the weights outside the n largest of each block, ties by place, over (m - n) per block.

    Args:
      n, m: of every m weights in a row along the input, n may stay.  The others: see the module.
    Raises: TransformError unless 0 < n < m, for an unknown mode, per or of.

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[4.0], [3.0], [2.0], [0.0]])}, {})
    >>> float(nm_violation(2, 4).hard(params, View(params.model, {}, {})))
    0.5
    """
    check("mode", mode, MODES)
    if not 0 < n < m:
        raise TransformError(f"nm_violation({n}, {m}): expected 0 < n < m")

    def count(path: str, w: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        cut = layout(path, w.shape, NM(n, m), roles)
        blocks = cut.scores(jnp.abs(w))
        excess = jax.lax.stop_gradient((places(blocks) >= n).astype(jnp.float32))
        soft, hard = absent(blocks, jnp.square(blocks), epsilon, alpha, mode)
        outputs, rows = blocks.shape[:2]  # zeros that fill up the last block of a row are absent and count nowhere
        last = w.size // outputs - (rows - 1) * m
        return jnp.sum(excess * (1 - soft)), jnp.sum(excess * (1 - hard)), outputs * ((rows - 1) * (m - n) + max(last - n, 0))

    return fraction(count, where, per, of)


def ebops(cost: Callable[[View], jax.Array], *, unit: float = 1.0) -> Metric:
    """Effective bit operations of the view, in `unit`s; differentiable in every bit-width, and already exact.

    Args:
      cost: `inst.ebops`.
      unit: what counts as 1, such as `inst.reference8`: a penalty on a number of order 1 has a scale of order 1.

    >>> from pquant_jax import Params, View
    >>> metric = ebops(lambda view: jnp.float32(3000), unit=1000.0)
    >>> float(metric.hard(Params({}, {}), View({}, {}, {})))
    3.0
    """

    def value(params: object, view: View) -> jax.Array:
        del params
        return cost(view) / jnp.float32(unit)

    return Metric(value, value)


def reference_sparsity(
    *,
    target_sparsity: float,
    epsilon: float = 1e-3,
    mode: str = "coarse",
    alpha: float = 100.0,
    reduce: str = "mean",
    where: _tree.Where = _tree.is_kernel,
) -> Metric:
    """PQuantML's metric of one layer, M = (s^2 - z^2) sum|w| (/ n with reduce "mean"): 0 where z reaches s, or the weights 0.

    z is the sparsity, coarse or smooth, s the target; where z is coarse only sum|w| has a gradient.  For its golden values:
    as a target it is weak, because dense small weights fulfil it too.  hard is z.

    Raises: TransformError for an unknown mode or reduce.

    >>> from pquant_jax import Params, View
    >>> params = Params({"kernel": jnp.float32([[0.5, 0.0]])}, {})
    >>> float(reference_sparsity(target_sparsity=0.5).soft(params, View(params.model, {}, {})))
    0.0
    """
    check("mode", mode, MODES)
    check("reduce", reduce, ("mean", "sum"))

    def soft(params, view) -> jax.Array:
        del view
        found = []
        for w in _tree.select(params.model, where).values():
            zeros = (jnp.abs(w) <= epsilon).astype(jnp.float32) if mode == "coarse" else jnp.exp(-alpha * jnp.square(w))
            size = jnp.sum(w * jnp.sign(w)) / jnp.float32(w.size if reduce == "mean" else 1)  # |w|, with the derivative 0 at 0
            found.append((target_sparsity**2 - jnp.square(jnp.mean(zeros))) * size)
        return functools.reduce(jnp.add, found)

    return Metric(soft, sparsity(epsilon=epsilon, where=where).hard)


def group_masks(groups: Groups, *, epsilon: float = 1e-3, roles: Roles = None) -> Callable[[Mapping[str, jax.Array]], dict]:
    """For `mdmm(prunes=)`: {path: kernel} -> {path: 0/1}, the groups with a norm above epsilon stay.

    >>> group_masks("out", epsilon=0.1)({"a/kernel": jnp.float32([[0.5, 0.05], [0.0, 0.0]])})["a/kernel"].tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """

    def masks(kernels: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        cuts = layouts(kernels, groups, roles)
        alive = {p: (cuts[p].scores(jnp.abs(w)) > epsilon).astype(jnp.float32) for p, w in kernels.items()}
        return {p: cuts[p].expand(v) for p, v in alive.items()}

    return masks
