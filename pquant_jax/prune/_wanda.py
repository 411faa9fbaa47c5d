"""Wanda: pruning by weights and activations (Sun et al., arXiv:2306.11695), once and without a gradient.

The importance of a weight is |w| sqrt(E[x^2]), x what it is multiplied by (eq. 1); weights compare within an output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax._base import AxisRole, Params, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.prune._ranked import Method, keep_highest, ranked
from pquant_jax.prune._targets import Targets, common_target, magnitude_shares, own_targets, resolved, shares
from pquant_jax.transforms import NM, Groups, Layout, OfShape, check_compat, kernels_of, layouts, survivors


def importance(w: jax.Array, square: jax.Array) -> jax.Array:
    """|w| sqrt(E[x^2]), eq. 1; square: E[x^2] of the inputs, broadcastable to w.

    >>> importance(jnp.float32([[1.0, -2.0]]), jnp.float32([[9.0]])).tolist()
    [[3.0, 6.0]]
    """
    return jnp.abs(w) * jnp.sqrt(square)


def wanda(
    *,
    sparsity: Targets,
    groups: Groups = "row",
    budget: str = "layer",
    begin: float = 0.0,
    end: float = 1.0,
    roles: Mapping[str, AxisRole] | None = None,
    compat: str | None = None,
) -> Transform:
    """Keep the weights of the largest |w| sqrt(E[x^2]); E over the training stage's epochs from `begin` to `end`.

    The mask is made once, before epoch `end` or when fine-tuning begins, and stands still from then on.  Without a batch
    seen by then, magnitudes decide.  For pruning without training: `wanda_from_data`.

    Args:
      sparsity: zeros / total, a fraction, or one for each rule: {"Dense_0/.*": 0.5, ".*": 0.9}.
      groups: what is pruned together; "row" compares the weights of one output channel with each other, "weight" those of
        the whole kernel, NM(n, m) keeps n of every m.
      budget: "layer", "global" or "fisher", as in `magnitude`.
      begin, end: epochs of the training stage, begin < end.
      roles: `inst.roles`, which says what input and output are; default the last axis is the output.
      compat: "pquantml" compares within the whole kernel if it has two axes, *prunes* n of every m, truncates the count that
        goes and drops weights of 0 on top of it, and makes a global budget once, of the magnitudes as pre-training ends.
    Raises: TransformError for a rule without a match, groups that a kernel can't be cut into, or a kernel of no product.

    >>> t = wanda(sparsity=0.5)
    >>> params = t.attach({"kernel": jnp.float32([[4.0], [3.0]])})
    >>> seen = {"square": {"kernel": jnp.float32([[1.0], [4.0]])}}
    >>> _, state = t.step(params, t.init(params), stage=jnp.int32(1), stats=seen)
    >>> now = dict(event=jnp.int32(4), epoch=jnp.int32(0), epochs=jnp.int32(1), stage=jnp.int32(2))
    >>> t.apply(params, t.boundary(params, state, **now)[1])[0].model["kernel"].tolist()
    [[0.0], [3.0]]
    """
    check_compat(compat)
    if not begin < end:
        raise TransformError(f"Wanda collects from epoch begin={begin} to end={end}, which is no time; expected begin < end")

    def init(kernels: dict[str, jax.Array]) -> Tree:
        return {"batches": jnp.zeros((), jnp.float32), "square": {p: jnp.zeros(w.shape, jnp.float32) for p, w in kernels.items()}}

    def gather(seen: Tree, stats: Stats, is_open: jax.Array) -> Tree:
        batches = seen["batches"] + is_open.astype(jnp.float32)
        part = jnp.where(is_open, 1 / jnp.maximum(batches, 1), 0)
        fresh = {p: square_of(p, stats) for p in seen["square"]}
        return {"batches": batches, "square": {p: v + part * (fresh[p] - v) for p, v in seen["square"].items()}}

    def score(path: str, w: jax.Array, seen: Tree) -> jax.Array:
        return importance(w, jnp.where(seen["batches"] > 0, seen["square"][path], 1))

    choose = keep_as_pquantml if compat else keep_highest
    method = Method(init, gather, score, frozenset({"square"}), once=True, choose=choose, early=bool(compat))
    return ranked(
        "wanda", method, sparsity=sparsity, groups=compared(groups, compat), budget=budget, begin=begin, end=end, roles=roles
    )


def compared(groups: Groups, compat: str | None) -> OfShape:
    """The groups of a kernel of a shape, which PQuantML reads in its own way."""

    def of(shape: tuple[int, ...]) -> Groups:
        if compat and isinstance(groups, NM):
            return NM(groups.m - groups.n, groups.m, across=True)
        return "weight" if compat and groups == "row" and len(shape) == 2 else groups

    return of


def keep_as_pquantml(cut: Layout, w: jax.Array, scores: jax.Array, share: jax.Array) -> jax.Array:
    """PQuantML's mask: the count of those that go truncates, of equals the first go, and weights of 0 go on top of it."""
    size = scores.shape[-1] if cut.inside else scores.size
    whole = share if cut.keep is not None else jnp.trunc(share * size) / size
    return cut.expand(jnp.flip(survivors(cut, jnp.flip(scores), whole))) * (w != 0)


def square_of(path: str, stats: Stats) -> jax.Array:
    """E[x^2] of what enters a kernel.  Raises: TransformError if it enters no product."""
    square = stats.get("square", {})
    if path not in square:
        raise TransformError(
            f"Wanda needs the statistic 'square' of {path}, which no product uses; choose the kernels: masked(wanda(...), where)"
        )
    return square[path]


def wanda_from_data(
    inst: Any,
    params: Params | Tree,
    x: Any,
    *,
    sparsity: Targets,
    groups: Groups = "row",
    budget: str = "layer",
    batch_size: int = 1024,
    compat: str | None = None,
) -> dict[str, jax.Array]:
    """The masks of Wanda without training: E[x^2] over the samples x, one pass.  Use them with `frozen`.

    Args:
      inst: the instrumented model; params: its parameters, or the `Params` of a training, whose masks don't count here.
      x: samples, the batch on axis 0.
      sparsity, groups, compat: those of `wanda`.  budget: "layer" or "global"; there is no gradient for "fisher".
      batch_size: samples at a time; the result depends on it only by float32's rounding.
    Returns: {path of a kernel with an input: 0/1}.
    Raises: TransformError for no samples, a rule without a match, or groups that a kernel can't be cut into.

    >>> import pquant_jax as pq
    >>> model = pq.from_function(lambda p, x: x @ p["kernel"], {"kernel": jnp.float32([[4.0], [3.0]])})
    >>> x = jnp.float32([[1.0, 2.0]])
    >>> wanda_from_data(pq.instrument(model, x), model.params, x, sparsity=0.5)["kernel"].tolist()
    [[0.0], [1.0]]
    """
    check_compat(compat)
    if budget not in ("layer", "global"):
        raise TransformError(f"budget is {budget!r}, expected 'layer' or 'global': there is no gradient without training")
    samples = {len(v) for v in jax.tree.leaves(x)}
    if len(samples) != 1 or 0 in samples or batch_size < 1:
        raise TransformError(f"x has {sorted(samples)} samples and batch_size is {batch_size}, expected one number above 0 each")
    model, total = params.model if isinstance(params, Params) else params, samples.pop()

    @jax.jit
    def squares(model: Tree, batch: Any) -> dict[str, jax.Array]:
        return inst.capture(View(model, {}, {}), inst.model.state, batch)[2]["square"]

    mean: dict[str, jax.Array] = {}
    for start in range(0, total, batch_size):
        size = min(batch_size, total - start)
        fresh = squares(model, jax.tree.map(lambda v, start=start, size=size: v[start : start + size], x))
        mean = {p: mean[p] + (v - mean[p]) * (size / (start + size)) if mean else v for p, v in fresh.items()}
    kernels = {p: w for p, w in kernels_of(model).items() if p in mean}
    cuts = layouts(kernels, compared(groups, compat), inst.roles)
    scores = {p: cuts[p].scores(jnp.broadcast_to(importance(w, mean[p]), w.shape)) for p, w in kernels.items()}
    wanted = resolved(own_targets(sparsity, kernels), jnp.float32(common_target(sparsity)))
    share, choose = shares(budget, cuts, kernels, scores, {}, wanted), keep_highest
    if compat:
        share = magnitude_shares(kernels, jnp.float32(common_target(sparsity))) if budget == "global" else share
        choose = keep_as_pquantml
    return {p: choose(cuts[p], kernels[p], s, share[p]) for p, s in scores.items()}
