"""How much of which kernel: one target or one per path rule, and a budget that distributes the total over the kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Event, Stats
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.transforms import Layout, bisect_bits, kth_largest

Targets = float | Mapping[_tree.Where, float]
BUDGETS = ("layer", "global", "fisher")


def own_targets(targets: Targets, paths: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{path: target of the rule that matches it, nan for the common one}.  Raises: TransformError for a rule without a match."""
    rules = list(targets.items()) if isinstance(targets, Mapping) else []
    for where, value in rules:
        if not any(_tree.matches(where, p, leaf) for p, leaf in paths.items()):
            raise TransformError(
                f"the target {value} is for {where!r}, which matches no kernel; {did_you_mean(str(where), paths)}"
            )
    return {p: jnp.float32(_tree.first_match(rules, p, float("nan"), leaf)) for p, leaf in paths.items()}


def common_target(targets: Targets) -> float:
    """The target of kernels without a rule of their own: that of ".*", or 0."""
    return targets.get(".*", 0.0) if isinstance(targets, Mapping) else targets


def resolved(own: Mapping[str, jax.Array], common: jax.Array) -> dict[str, jax.Array]:
    """{path: target}: its own, or the common one where that is nan.

    >>> {p: float(v) for p, v in resolved({"a": jnp.float32(0.25), "b": jnp.float32("nan")}, jnp.float32(0.5)).items()}
    {'a': 0.25, 'b': 0.5}
    """
    return {p: jnp.where(jnp.isnan(v), common, v) for p, v in own.items()}


def check_budget(budget: str) -> None:
    """Raises: TransformError for a name that is none of `BUDGETS`."""
    if budget not in BUDGETS:
        raise TransformError(f"budget is {budget!r}; {did_you_mean(budget, BUDGETS)}")


def needs_of(budget: str) -> frozenset[str]:
    """The statistics that a budget is made of."""
    return frozenset({"gradient"}) if budget == "fisher" else frozenset()


def no_fisher(kernels: Mapping[str, jax.Array], budget: str) -> dict[str, jax.Array]:
    """E[gradient^2] before the first step; empty where the budget doesn't need it."""
    return {p: jnp.zeros(w.shape, jnp.float32) for p, w in kernels.items()} if budget == "fisher" else {}


def next_fisher(fisher: Mapping[str, jax.Array], stats: Stats) -> dict[str, jax.Array]:
    """E[gradient^2] after a step: a running mean over some hundred of them."""
    return {p: 0.99 * v + 0.01 * jnp.square(stats["gradient"][p]) for p, v in fisher.items()}


def shares(
    budget: str,
    cuts: Mapping[str, Layout],
    kernels: Mapping[str, jax.Array],
    scores: Mapping[str, jax.Array],
    fisher: Mapping[str, jax.Array],
    wanted: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """{path: sparsity} under the budget.  "fisher" compares w^2 E[g^2], the loss that a weight's absence costs."""
    if budget == "layer":
        return dict(wanted)
    if budget == "fisher":
        scores = {p: cuts[p].scores(jnp.abs(w) * jnp.sqrt(fisher[p])) for p, w in kernels.items()}
    return distribute(cuts, scores, wanted)


def early_shares(
    own: Mapping[str, jax.Array], kernels: Mapping[str, jax.Array], sparsity: jax.Array, event: jax.Array
) -> dict[str, jax.Array]:
    """{path: its own target}, set once, as pre-training ends: PQuantML's budget, `magnitude_shares`."""
    found = magnitude_shares(kernels, sparsity)
    return {p: jnp.where(event == Event.POST_PRETRAIN, found[p], v) for p, v in own.items()}


def magnitude_shares(kernels: Mapping[str, jax.Array], sparsity: jax.Array) -> dict[str, jax.Array]:
    """{path: sparsity} of one threshold on all |w|, whatever the groups; 1 + trunc((1 - sparsity) * all) weights stay.

    >>> shares = magnitude_shares({"a": jnp.float32([1, 2, 3]), "b": jnp.float32([4, 5])}, jnp.float32(0.5))
    >>> {p: round(float(v), 3) for p, v in shares.items()}
    {'a': 0.667, 'b': 0.0}
    """
    sizes = {p: jnp.abs(w) for p, w in kernels.items()}
    flat = jnp.concatenate([v.ravel() for v in sizes.values()])
    threshold = kth_largest(flat, jnp.minimum(jnp.trunc((1 - sparsity) * flat.size).astype(jnp.int32) + 1, flat.size))
    return {p: jnp.mean((v < threshold).astype(jnp.float32)) for p, v in sizes.items()}


def distribute(
    cuts: Mapping[str, Layout], scores: Mapping[str, jax.Array], wanted: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """{path: sparsity} such that one threshold for all layers prunes as many weights as `wanted` does in all.

    Groups of different sizes compare by the mean square of their weights.  No layer loses its last group.
    """
    paths = [p for p in cuts if cuts[p].keep is None]  # N:M has a sparsity of its own
    if not paths:
        return dict(wanted)
    sizes = {p: jnp.asarray(cuts[p].sizes, jnp.float32).reshape(scores[p].shape) for p in paths}
    level = {p: scores[p] / jnp.float32(cuts[p].sizes.mean() ** 0.5) for p in paths}
    total = sum((jnp.sum(sizes[p]) * wanted[p] for p in paths), jnp.float32(0))
    all_levels, all_sizes = (jnp.concatenate([v[p].ravel() for p in paths]) for v in (level, sizes))
    codes = jax.lax.bitcast_convert_type(all_levels, jnp.int32)  # values that are not negative order like their bits
    found = bisect_bits(lambda candidate: jnp.sum(jnp.where(codes < candidate, all_sizes, 0)) <= total)
    threshold = jax.lax.bitcast_convert_type(found, jnp.float32)
    below = {p: jnp.sum(jnp.where(level[p] < threshold, sizes[p], 0)) / jnp.sum(sizes[p]) for p in paths}
    return {**wanted, **{p: jnp.minimum(v, 1 - 1 / cuts[p].sizes.size) for p, v in below.items()}}
