"""AP: pruning of neurons that seldom fire (arXiv:1903.04476).

a = how often an output channel, before its activation, is above 0; the channel stays where a > threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import AxisRole, Event, Params, Stage, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.transforms import (
    Groups,
    Heads,
    check_compat,
    hyper,
    kernels_of,
    labelled,
    layouts,
    masked_view,
    no_penalty,
    survivors,
)


class APState(NamedTuple):
    """hyper: threshold or target, begin, period.  stage: of the last step.

    done: epochs of the training stage since the start.  since: of them, those collected since the last mask.  (compat: done
    since the last period; since is 1 while its mask waits.)
    batches: seen since then.  mean: {path: activity over them, fraction, per group}.
    score: {path: the activity that the mask was made of}.  mask: {path: 0/1}.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    done: jax.Array
    since: jax.Array
    batches: jax.Array
    mean: dict[str, jax.Array]
    score: dict[str, jax.Array]
    mask: dict[str, jax.Array]


def ap(
    *,
    threshold: float | None = None,
    target: float | None = None,
    begin: float = 0.0,
    period: float = 1.0,
    groups: Groups = "out",
    roles: Mapping[str, AxisRole] | None = None,
    compat: str | None = None,
) -> Transform:
    """Prune output channels that are above 0 in at most a fraction `threshold` of samples and positions.

    The activity is averaged over the batches of `period` epochs of the training stage, the first `begin` of which don't
    count; at the end of each period, and when fine-tuning begins with a mean not used yet, the mask is made anew.  The
    activity of a pruned channel says nothing but its bias's sign, so it keeps the one that it was pruned for.  The most active
    channel of a kernel always stays.

    Args:
      threshold: activity, a fraction of samples; give either this or
      target: the fraction of every kernel's channels to prune, exact, the least active ones.
      begin, period: epochs.
      groups: "out", or attention heads, "head" or Heads(n), whose activity is the mean over their channels.
      roles: `inst.roles`, which says what the output channels are; default the last axis.
      compat: "pquantml" counts `period` in batches, waits `begin` epochs again after each (the rest of the present one is
        the first), prunes nothing when fine-tuning begins, lets a pruned channel return once its bias is positive, and can
        prune all channels of a kernel.
    Raises: TransformError for both or none of threshold and target, groups that are not of output channels, or a kernel
      without the statistic "active".

    >>> t = ap(threshold=0.2)
    >>> params = t.attach({"kernel": jnp.ones((1, 2))})
    >>> seen = {"active": {"kernel": jnp.float32([[0.5, 0.1]])}}
    >>> _, state = t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats=seen)
    >>> _, state = t.boundary(params, state, event=Event.POST_EPOCH, stage=jnp.int32(Stage.TRAIN))
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[1.0, 0.0]]
    """
    if (threshold is None) == (target is None):
        raise TransformError(f"threshold is {threshold}, target {target}; expected one of them")
    check_compat(compat)
    if groups not in ("out", "head") and not isinstance(groups, Heads):
        raise TransformError(f"groups is {groups!r}, but an activity is of output channels; expected 'out', 'head' or Heads(n)")
    aim = {name: v for name, v in (("threshold", threshold), ("target", target)) if v is not None}

    def attach(model: Tree) -> Params:
        kernels_of(model)
        return Params(model, {})

    def init(params: Params) -> APState:
        kernels = kernels_of(params.model)
        sizes = {p: cut.sizes.shape for p, cut in layouts(kernels, groups, roles).items()}
        return APState(
            hyper(**aim, begin=begin, period=period),
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.int32),
            jnp.zeros((), jnp.float32),
            {p: jnp.zeros(s, jnp.float32) for p, s in sizes.items()},
            {p: jnp.ones(s, jnp.float32) for p, s in sizes.items()},
            {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels.items()},
        )

    def activities(kernels: dict[str, jax.Array], stats: Stats) -> dict[str, jax.Array]:
        channels = layouts(kernels, "out", roles)
        found = {p: _activity(p, cut.sizes.shape, stats) for p, cut in channels.items()}
        if groups == "out":
            return found
        spread = {p: jnp.sqrt(channels[p].expand(a)) for p, a in found.items()}  # a norm squared is a sum
        cuts = layouts(kernels, groups, roles)
        return {p: jnp.square(cut.scores(spread[p])) / jnp.float32(cut.sizes.mean()) for p, cut in cuts.items()}

    def apply(params: Params, state: APState) -> tuple[View, APState]:
        return masked_view(params.model, state.mask), state

    def step(params: Params, state: APState, *, stage: Any, stats: Stats | None = None, **extra: Any) -> tuple[Params, APState]:
        del extra
        collects = (stage == Stage.TRAIN) & (state.done >= state.hyper["begin"])
        batches = state.batches + collects
        part = jnp.where(collects, 1 / jnp.maximum(batches, 1), 0)
        seen = activities(kernels_of(params.model), stats or {})
        mean = {p: v + part * (seen[p] - v) for p, v in state.mean.items()}
        state = state._replace(stage=jnp.asarray(stage, jnp.int32), batches=batches, mean=mean)
        if compat:  # whose period ends within an epoch, though the mask waits for its end
            full = batches >= state.hyper["period"]
            state = _closed(state, full, mean)
            state = state._replace(done=jnp.where(full, 0, state.done), since=jnp.where(full, 1, state.since))
        return params, state

    def boundary(params: Params, state: APState, *, event: Any, stage: Any, **extra: Any) -> tuple[Params, APState]:
        del extra
        cuts, h = layouts(kernels_of(params.model), groups, roles), state.hyper
        ended = (event == Event.POST_EPOCH) & (stage == Stage.TRAIN)
        if compat:
            renews, since, score = ended & (state.since > 0), state.since, state.score
        else:
            since = state.since + (ended & (state.done >= h["begin"]))
            renews = ((ended & (since >= h["period"])) | (event == Event.PRE_FINETUNE)) & (state.batches > 0)
            lives = {p: cut.scores(state.mask[p]) > 0 for p, cut in cuts.items()}
            score = {p: jnp.where(lives[p], state.mean[p], v) for p, v in state.score.items()}
            state = _closed(state, renews, score)
        masks = {}
        for p, cut in cuts.items():
            stays = survivors(cut, score[p], h["target"]) if threshold is None else _above(score[p], h["threshold"], not compat)
            masks[p] = jnp.where(renews, cut.expand(stays), state.mask[p])
        now = dict(stage=jnp.asarray(stage, jnp.int32), done=state.done + ended, since=jnp.where(renews, 0, since))
        return params, state._replace(**now, mask=masks)

    return Transform("ap", attach, init, apply, step, boundary, no_penalty, labelled("ap", "thresholds"), frozenset({"active"}))


def _above(seen: jax.Array, threshold: jax.Array, spare: bool) -> jax.Array:
    """1 for the channels above the threshold.  spare: the most active one stays, for where none is above it the signal ends."""
    best = (jnp.arange(seen.size) == jnp.argmax(seen)).reshape(seen.shape)
    return ((seen > threshold) | (best & spare)).astype(jnp.float32)


def _closed(state: APState, when: jax.Array, score: Mapping[str, jax.Array]) -> APState:
    """The state with a period ended: its activities are in `score`, and a new one begins."""
    return state._replace(
        batches=jnp.where(when, 0, state.batches),
        mean={p: jnp.where(when, 0, v) for p, v in state.mean.items()},
        score={p: jnp.where(when, score[p], v) for p, v in state.score.items()},
    )


def _activity(path: str, shape: tuple[int, ...], stats: Stats) -> jax.Array:
    """The statistic of one kernel, per output channel."""
    active = stats.get("active", {})
    if path not in active:
        raise TransformError(
            f"AP needs the statistic 'active' of {path}, which makes no output; choose the kernels: masked(ap(...), where)"
        )
    if active[path].shape != shape:
        raise TransformError(
            f"the activity of {path} has the shape {active[path].shape}, expected {shape} of its output channels; "
            "say which axes they are: ap(roles=inst.roles)"
        )
    return active[path]
