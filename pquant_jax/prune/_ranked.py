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
from pquant_jax.transforms import Groups, Layout, entering, hyper, labelled, layout, no_penalty, survivors

Targets = float | Mapping[_tree.Where, float]
BUDGETS = ("layer", "global", "fisher")


class RankedState(NamedTuple):
    """hyper: sparsity, begin, end, power.  stage: of the last step.  part: of the target that is in force, fraction.

    open: does `seen` take in statistics now, bool.  share: {path: its own target, fraction}.  seen: {path: what the scores are
    made of}.  fisher: {path: E[gradient^2]} where the budget needs it.  mask: {path: 0/1}.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    part: jax.Array
    open: jax.Array
    share: dict[str, jax.Array]
    seen: Tree
    fisher: dict[str, jax.Array]
    mask: dict[str, jax.Array]


class Method(NamedTuple):
    """How a method scores.

    init    ({path: kernel}) -> seen.
    gather  (seen, stats, open) -> seen, in every step; open: traced bool, the training stage; with `once` from `begin` on.
    score   (path, kernel, seen) -> importance of every weight, not negative, the kernel's shape.
    needs   statistics for `gather`.
    once    the mask is made once and then stands still; begin and end count epochs, and nothing ramps.
    finish  (kernel, mask) -> mask, the last word on it.
    """

    init: Callable[[dict[str, jax.Array]], Tree]
    gather: Callable[[Tree, Stats, jax.Array], Tree]
    score: Callable[[str, jax.Array, Tree], jax.Array]
    needs: frozenset[str] = frozenset()
    once: bool = False
    finish: Callable[[jax.Array, jax.Array], jax.Array] = lambda kernel, mask: mask


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


def common_target(targets: Targets) -> float:
    """The target of kernels without a rule of their own: that of ".*", or 0."""
    return targets.get(".*", 0.0) if isinstance(targets, Mapping) else targets


def check_budget(budget: str) -> None:
    """Raises: TransformError for a name that is none of `BUDGETS`."""
    if budget not in BUDGETS:
        raise TransformError(f"budget is {budget!r}; {did_you_mean(budget, BUDGETS)}")


def check_compat(compat: str | None) -> None:
    """Raises: TransformError for a reference that there is none of."""
    if compat not in (None, "pquantml"):
        raise TransformError(f"compat is {compat!r}, expected 'pquantml' or None")


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
    groups: Groups | Callable[[tuple[int, ...]], Groups],
    budget: str,
    begin: float,
    end: float,
    power: float = 1.0,
    roles: Mapping[str, AxisRole] | None,
) -> Transform:
    """A method that keeps the groups of the highest score; the arguments are those of `magnitude`.

    groups: also a function of the kernel's shape.
    """
    check_budget(budget)
    ramps = {} if method.once else {"power": power}
    needs = method.needs | (frozenset({"gradient"}) if budget == "fisher" else frozenset())

    def cuts_of(kernels: Mapping[str, jax.Array]) -> dict[str, Layout]:
        return {p: layout(p, w.shape, groups(w.shape) if callable(groups) else groups, roles) for p, w in kernels.items()}

    def attach(model: Tree) -> Params:
        cuts_of(kernels_of(model))
        return Params(model, {})

    def init(params: Params) -> RankedState:
        kernels = kernels_of(params.model)
        hypers = hyper(sparsity=common_target(sparsity), begin=begin, end=end, **ramps)
        return RankedState(
            hypers,
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            jnp.zeros((), jnp.float32),
            (hypers["begin"] <= 0) | (not method.once),  # a loop that announces no epochs collects as well
            own_targets(sparsity, kernels),
            method.init(kernels),
            no_fisher(kernels, budget),
            {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels.items()},
        )

    def apply(params: Params, state: RankedState) -> tuple[View, RankedState]:
        return masked_view(params.model, state.mask), state

    def step(params: Params, state: RankedState, *, stage: Any, stats: Stats | None = None, **extra: Any) -> tuple[Params, State]:
        del extra
        stats = stats or {}
        seen = method.gather(state.seen, stats, (stage == Stage.TRAIN) & state.open) if method.needs else state.seen
        fisher = next_fisher(state.fisher, stats)
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
        share = shares(budget, cuts, kernels, scores, state.fisher, wanted)
        starts, final = (event == Event.PRE_EPOCH) & (stage == Stage.TRAIN), event == Event.PRE_FINETUNE
        ramp = epoch >= h["end"] if method.once else _ramp(h, epoch / jnp.maximum(epochs, 1))
        part = jnp.where(final, 1, jnp.maximum(state.part, ramp)).astype(jnp.float32)
        moves = (starts | final) & (state.part == 0) if method.once else starts | final
        fresh = {p: cuts[p].expand(survivors(cuts[p], s, share[p] * part)) for p, s in scores.items()}
        masks = {p: jnp.where(moves & (part > 0), method.finish(kernels[p], fresh[p]), m) for p, m in state.mask.items()}
        part = jnp.where(moves, part, state.part)
        begun = jnp.where(event == Event.PRE_EPOCH, starts & (epoch >= h["begin"]), state.open)
        is_open = begun & (part == 0) if method.once else state.open
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), part=part, open=is_open, mask=masks)

    return Transform(name, attach, init, apply, step, boundary, no_penalty, labelled(name, "thresholds"), needs)


def _ramp(h: dict[str, jax.Array], time: jax.Array) -> jax.Array:
    """How much of the target is in force at `time`, a fraction of the training stage's epochs."""
    done = (time - h["begin"]) / jnp.maximum(h["end"] - h["begin"], 1e-6)
    return jnp.where(done < 0, 0, 1 - (1 - jnp.clip(done, 0, 1)) ** h["power"])
