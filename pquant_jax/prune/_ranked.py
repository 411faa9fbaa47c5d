"""What magnitude, random and Wanda share: the mask keeps the highest scores, and the target ramps up over the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import AxisRole, Event, Params, Stage, State, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.numerics import mask
from pquant_jax.prune._groups import Groups, Layout, layout, survivors
from pquant_jax.transforms import entering, hyper, labelled, no_penalty

Targets = float | Mapping[_tree.Where, float]
BUDGETS = ("layer", "global", "fisher")


class RankedState(NamedTuple):
    """hyper: sparsity, begin, end, power.  stage: of the last step.  part: of the target that is in force, fraction.

    share: {path: its own target, fraction}.  seen: {path: what the scores are made of}.  fisher: {path: E[gradient^2]} where
    the budget needs it.  mask: {path: 0/1}.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    part: jax.Array
    share: dict[str, jax.Array]
    seen: Tree
    fisher: dict[str, jax.Array]
    mask: dict[str, jax.Array]


class Method(NamedTuple):
    """How a method scores.

    init    ({path: kernel}) -> seen.
    gather  (seen, stats, training) -> seen, in every step; training: traced bool.
    score   (path, kernel, seen) -> importance of every weight, not negative, the kernel's shape.
    needs   statistics for `gather`.
    """

    init: Callable[[dict[str, jax.Array]], Tree]
    gather: Callable[[Tree, Stats, jax.Array], Tree]
    score: Callable[[str, jax.Array, Tree], jax.Array]
    needs: frozenset[str] = frozenset()


def kernels_of(model: Tree) -> dict[str, jax.Array]:
    """The leaves that pruning is about.  Raises: TransformError if there are none."""
    return _tree.select(model, _tree.is_kernel)


def masked_view(model: Tree, masks: Mapping[str, jax.Array]) -> View:
    """`model` with every mask on its leaf."""
    leaves = _tree.flatten(model)
    return View(_tree.replace(model, {p: mask(leaves[p], m) for p, m in masks.items()}), {}, dict(masks))


def own_targets(targets: Targets, paths: Mapping[str, Any]) -> dict[str, jax.Array]:
    """{path: target of the rule that matches it, nan for the common one}.  Raises: TransformError for a rule without a match."""
    rules = list(targets.items()) if isinstance(targets, Mapping) else []
    for where, value in rules:
        if not any(_tree.matches(where, p, leaf) for p, leaf in paths.items()):
            raise TransformError(
                f"the target {value} is for {where!r}, which matches no kernel; {did_you_mean(str(where), paths)}"
            )
    return {p: jnp.float32(_tree.first_match(rules, p, float("nan"), leaf)) for p, leaf in paths.items()}


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

    def refine(step: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.int32(1) << (30 - step))
        return jnp.where(jnp.sum(jnp.where(codes < candidate, all_sizes, 0)) <= total, candidate, found)

    threshold = jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, refine, jnp.int32(0)), jnp.float32)
    below = {p: jnp.sum(jnp.where(level[p] < threshold, sizes[p], 0)) / jnp.sum(sizes[p]) for p in paths}
    return {**wanted, **{p: jnp.minimum(v, 1 - 1 / cuts[p].sizes.size) for p, v in below.items()}}


def ranked(
    name: str,
    method: Method,
    *,
    sparsity: Targets,
    groups: Groups,
    budget: str,
    begin: float,
    end: float,
    power: float,
    roles: Mapping[str, AxisRole] | None,
) -> Transform:
    """A method that keeps the groups of the highest score; the arguments are those of `magnitude`."""
    if budget not in BUDGETS:
        raise TransformError(f"budget is {budget!r}; {did_you_mean(budget, BUDGETS)}")
    common = sparsity if isinstance(sparsity, (int, float)) else sparsity.get(".*", 0.0)
    needs = method.needs | (frozenset({"gradient"}) if budget == "fisher" else frozenset())

    def cuts_of(kernels: Mapping[str, jax.Array]) -> dict[str, Layout]:
        return {p: layout(p, w.shape, groups, roles) for p, w in kernels.items()}

    def attach(model: Tree) -> Params:
        cuts_of(kernels_of(model))
        return Params(model, {})

    def init(params: Params) -> RankedState:
        kernels = kernels_of(params.model)
        zero = jnp.zeros((), jnp.float32)
        fisher = {p: jnp.zeros(w.shape, jnp.float32) for p, w in kernels.items()} if budget == "fisher" else {}
        return RankedState(
            hyper(sparsity=common, begin=begin, end=end, power=power),
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            zero,
            own_targets(sparsity, kernels),
            method.init(kernels),
            fisher,
            {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels.items()},
        )

    def apply(params: Params, state: RankedState) -> tuple[View, RankedState]:
        return masked_view(params.model, state.mask), state

    def step(params: Params, state: RankedState, *, stage: Any, stats: Stats | None = None, **extra: Any) -> tuple[Params, State]:
        del extra
        stats = stats or {}
        seen = method.gather(state.seen, stats, stage == Stage.TRAIN) if method.needs else state.seen
        fisher = {p: 0.99 * v + 0.01 * jnp.square(stats["gradient"][p]) for p, v in state.fisher.items()}
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), seen=seen, fisher=fisher)

    def boundary(
        params: Params,
        state: RankedState,
        *,
        view: View | None = None,
        event: Any,
        epoch: Any,
        epochs: Any,
        stage: Any,
        **extra: Any,
    ) -> tuple[Params, RankedState]:
        del extra
        h, kernels = state.hyper, kernels_of(entering(params, view).model)
        cuts = cuts_of(kernels)
        scores = {p: cuts[p].scores(method.score(p, w, state.seen)) for p, w in kernels.items()}
        wanted = {p: jnp.where(jnp.isnan(own), h["sparsity"], own) for p, own in state.share.items()}
        shares = wanted if budget == "layer" else distribute(cuts, _levels(cuts, kernels, scores, state.fisher), wanted)
        done = (epoch / jnp.maximum(epochs, 1) - h["begin"]) / jnp.maximum(h["end"] - h["begin"], 1e-6)
        ramp = jnp.where(done < 0, 0, 1 - (1 - jnp.clip(done, 0, 1)) ** h["power"])
        final = event == Event.PRE_FINETUNE
        part = jnp.where(final, 1, jnp.maximum(state.part, ramp)).astype(jnp.float32)
        moves = ((event == Event.PRE_EPOCH) & (stage == Stage.TRAIN)) | final
        fresh = {p: cuts[p].expand(survivors(cuts[p], s, shares[p] * part)) for p, s in scores.items()}
        masks = {p: jnp.where(moves, fresh[p], m) for p, m in state.mask.items()}
        part = jnp.where(moves, part, state.part)
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), part=part, mask=masks)

    return Transform(name, attach, init, apply, step, boundary, no_penalty, labelled(name, "thresholds"), needs)


def _levels(cuts: dict[str, Layout], kernels: dict, scores: dict, fisher: dict) -> dict[str, jax.Array]:
    """What one threshold for all layers compares: the method's scores, or w^2 E[g^2], the loss that a weight's absence costs."""
    if not fisher:
        return scores
    return {p: cuts[p].scores(jnp.abs(w) * jnp.sqrt(fisher[p])) for p, w in kernels.items()}
