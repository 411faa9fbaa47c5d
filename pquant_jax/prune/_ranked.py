"""What magnitude, random and Wanda share: the mask keeps the highest scores, and the target ramps up over the epochs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import AxisRole, Event, Params, Stage, State, Stats, Transform, Tree, View
from pquant_jax.prune._targets import (
    Targets,
    check_budget,
    common_target,
    early_shares,
    needs_of,
    next_fisher,
    no_fisher,
    own_targets,
    resolved,
    shares,
)
from pquant_jax.transforms import (
    Groups,
    Layout,
    OfShape,
    entering,
    hyper,
    kernels_of,
    labelled,
    layouts,
    masked_view,
    no_penalty,
    survivors,
)


class RankedState(NamedTuple):
    """hyper: sparsity, begin, end, power.  stage: of the last step.  part: of the target that is in force, fraction.

    open: does `seen` take in statistics now, bool.  settled: no step was taken since the mask was made when an epoch ended, so
    that a rewind of the kernels leaves it alone.  share: {path: its own target, fraction}.  seen: {path: what the scores are
    made of}.  fisher: {path: E[gradient^2]} where the budget needs it.  mask: {path: 0/1}.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    part: jax.Array
    open: jax.Array
    settled: jax.Array
    share: dict[str, jax.Array]
    seen: Tree
    fisher: dict[str, jax.Array]
    mask: dict[str, jax.Array]


def keep_highest(cut: Layout, w: jax.Array, scores: jax.Array, share: jax.Array) -> jax.Array:
    """The mask of a kernel that lacks the fraction `share` of its groups, those of the lowest scores."""
    del w
    return cut.expand(survivors(cut, scores, share))


class Method(NamedTuple):
    """How a method scores.

    init    ({path: kernel}) -> seen.
    gather  (seen, stats, open) -> seen, in every step; open: traced bool, the training stage; with `once` from `begin` on.
    score   (path, kernel, seen) -> importance of every weight, not negative, the kernel's shape.
    needs   statistics for `gather`.
    once    the mask is made once and then stands still; begin and end count epochs, and nothing ramps.
    choose  (layout, kernel, scores, share) -> mask.
    early   the budget is that of the magnitudes as pre-training ends, for good.
    """

    init: Callable[[dict[str, jax.Array]], Tree]
    gather: Callable[[Tree, Stats, jax.Array], Tree]
    score: Callable[[str, jax.Array, Tree], jax.Array]
    needs: frozenset[str] = frozenset()
    once: bool = False
    choose: Callable[[Layout, jax.Array, jax.Array, jax.Array], jax.Array] = keep_highest
    early: bool = False


def ranked(
    name: str,
    method: Method,
    *,
    sparsity: Targets,
    groups: Groups | OfShape,
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
    ramps, early = {} if method.once else {"power": power}, method.early and budget == "global"

    def attach(model: Tree) -> Params:
        layouts(kernels_of(model), groups, roles)
        return Params(model, {})

    def init(params: Params) -> RankedState:
        kernels = kernels_of(params.model)
        hypers = hyper(sparsity=common_target(sparsity), begin=begin, end=end, **ramps)
        return RankedState(
            hypers,
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            jnp.zeros((), jnp.float32),
            (hypers["begin"] <= 0) | (not method.once),  # a loop that announces no epochs collects as well
            jnp.zeros((), jnp.bool_),
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
        settled = jnp.zeros_like(state.settled)
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), settled=settled, seen=seen, fisher=fisher)

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
        cuts = layouts(kernels, groups, roles)
        scores = {p: cuts[p].scores(method.score(p, w, state.seen)) for p, w in kernels.items()}
        own = early_shares(state.share, kernels, h["sparsity"], event) if early else state.share
        share = shares("layer" if early else budget, cuts, kernels, scores, state.fisher, resolved(own, h["sparsity"]))
        training, final = stage == Stage.TRAIN, event == Event.PRE_FINETUNE
        starts, ends = (event == Event.PRE_EPOCH) & training, (event == Event.POST_EPOCH) & training
        ramp = epoch >= h["end"] if method.once else _ramp(h, (epoch + ends) / jnp.maximum(epochs, 1))
        part = jnp.where(final, 1, jnp.maximum(state.part, ramp)).astype(jnp.float32)
        anew = ends | ((starts | final) & ~(state.settled & (part == state.part)))
        moves = (starts | final) & (state.part == 0) if method.once else anew
        fresh = {p: method.choose(cuts[p], kernels[p], s, share[p] * part) for p, s in scores.items()}
        masks = {p: jnp.where(moves & (part > 0), fresh[p], m) for p, m in state.mask.items()}
        part = jnp.where(moves, part, state.part)
        begun = jnp.where(event == Event.PRE_EPOCH, starts & (epoch >= h["begin"]), state.open)
        is_open = begun & (part == 0) if method.once else state.open
        now = dict(stage=jnp.asarray(stage, jnp.int32), part=part, open=is_open, settled=ends | state.settled)
        return params, state._replace(**now, share=own, mask=masks)

    needs = method.needs | needs_of(budget)
    return Transform(name, attach, init, apply, step, boundary, no_penalty, labelled(name, "thresholds"), needs)


def _ramp(h: dict[str, jax.Array], time: jax.Array) -> jax.Array:
    """How much of the target is in force at `time`, a fraction of the training stage's epochs."""
    done = (time - h["begin"]) / jnp.maximum(h["end"] - h["begin"], 1e-6)
    return jnp.where(done < 0, 0, 1 - (1 - jnp.clip(done, 0, 1)) ** h["power"])
