"""PDP: parameter-free differentiable pruning (Cho et al., arXiv:2305.11203).

A soft mask m = sigmoid((s^2 - t^2) / temperature) on the score s of every group, its L2 norm; t lies half-way between the
two scores that straddle the target, which ramps up over the epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import AxisRole, Event, Params, Stage, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError
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
    NM,
    Groups,
    Layout,
    check_compat,
    entering,
    hyper,
    kernels_of,
    labelled,
    layouts,
    masked_view,
    no_penalty,
    straddling,
    survivors,
)


class PDPState(NamedTuple):
    """hyper: sparsity, epsilon, temperature.  stage: of the last step.  part: of the target that is in force, fraction.

    ratio: {path: fraction of its groups that go now}.  share: {path: its own target, fraction}.  fisher: {path: E[gradient^2]}
    where the budget needs it.  mask: {path: [0, 1]}, in force outside the training stage.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    part: jax.Array
    ratio: dict[str, jax.Array]
    share: dict[str, jax.Array]
    fisher: dict[str, jax.Array]
    mask: dict[str, jax.Array]


def soft_mask(cut: Layout, w: jax.Array, ratio: jax.Array, temperature: jax.Array) -> jax.Array:
    """m = sigmoid((s^2 - t^2) / temperature), t = (s_stays + s_goes) / 2, the scores of groups around the target (eq. 4).

    1 where no group goes.  t carries a gradient through both order statistics.

    >>> from pquant_jax.transforms import layout
    >>> w = jnp.float32([4, 3, 2, 1])
    >>> soft_mask(layout("kernel", (4,), "weight"), w, jnp.float32(0.5), jnp.float32(1e-5)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    s = cut.scores(jnp.abs(w))
    stays, goes = straddling(cut, s, ratio)
    t = (stays + goes) / 2
    size = s.shape[-1] if cut.inside else s.size
    whole = ratio <= 0 if cut.keep is not None else jnp.round((1 - ratio) * size) >= size
    if cut.keep == s.shape[-1]:
        return jnp.ones_like(w)
    # as a product, since s^2 and t^2 agree in most of their bits where it matters
    return cut.expand(jnp.where(whole, jnp.ones_like(s), jax.nn.sigmoid((s - t) * (s + t) / temperature)))


def going(cut: Layout, shape: tuple[int, ...], scores: jax.Array, target: jax.Array, compat: str | None) -> jax.Array:
    """The fraction of groups that has to go so that the fraction `target` of the weights does.

    Counts round; under "pquantml" they truncate what float32 makes of (1 - target) * groups, and one group goes at least.

    >>> from pquant_jax.transforms import layout
    >>> float(going(layout("kernel", (4,), "weight"), (4,), jnp.ones(4), jnp.float32(0.5), None))
    0.5
    """
    size = scores.shape[-1] if cut.inside else scores.size
    if compat:
        kept = jnp.clip(jnp.trunc((1 - target) * size), 1, max(size - 1, 1))
        return 1 - kept / size
    alike = cut.sizes.min() == cut.sizes.max() and cut.sizes.sum() == np.prod(shape)
    if alike or cut.inside or cut.keep is not None:
        return target
    return 1 - jnp.mean(survivors(cut, scores, target))


def pdp(
    *,
    sparsity: Targets,
    epsilon: float = 0.015,
    temperature: float = 1e-5,
    groups: Groups = "weight",
    budget: str = "layer",
    roles: Mapping[str, AxisRole] | None = None,
    compat: str | None = None,
) -> Transform:
    """Prune the groups of the smallest L2 norm with a soft mask that needs no trained parameter.

    The target of epoch e of E of the training stage is min(1, (e + 1) * max(epsilon, 1 / E)) * sparsity.  The soft mask is
    stored once per epoch; when fine-tuning begins, the mask becomes 0/1 and exact: within one weight or group of the
    target, N:M in every block.  N:M is in force from the first epoch on.

    Args:
      sparsity: zeros / total, a fraction, or one for each rule: {"Dense_0/.*": 0.5, ".*": 0.9}.
      epsilon: ramp, fraction of the target per epoch; where E epochs of it fall short of the target, 1 / E takes its place.
      temperature: softness, in units of w^2.
      groups: what is pruned together: "weight", "row", "in", "out", "filter", "head", "layer", NM, Block, Cross, Reuse, Heads.
      budget: "layer", "global" or "fisher", as in `magnitude`; distributed anew before every epoch.
      roles: `inst.roles`, which says what input and output are; default the last axis is the output.
      compat: "pquantml" truncates the count that stays in float32 (19 of 100 at 0.8), fine-tunes with the stored soft mask
        rounded at 0.5, ends below the target where the ramp is too short, and makes a global budget once, of the magnitudes
        as pre-training ends.
    Raises: TransformError for a model without kernels, a rule without a match, groups that a kernel can't be cut into, or
      N:M under "pquantml", which has none.

    >>> t = pdp(sparsity=0.5, epsilon=1.0)
    >>> params = t.attach({"kernel": jnp.float32([[4.0, 3.0], [2.0, 1.0]])})
    >>> now = dict(event=jnp.int32(Event.PRE_EPOCH), epoch=jnp.int32(0), epochs=jnp.int32(9), stage=jnp.int32(Stage.TRAIN))
    >>> _, state = t.boundary(params, t.init(params), **now)
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[4.0, 3.0], [0.0, 0.0]]
    """
    check_budget(budget)
    check_compat(compat)
    early = bool(compat) and budget == "global"
    if compat and isinstance(groups, NM):
        raise TransformError(f"groups is {groups}, but PQuantML has no N:M in PDP; leave out compat='pquantml'")

    def attach(model: Tree) -> Params:
        layouts(kernels_of(model), groups, roles)
        return Params(model, {})

    def init(params: Params) -> PDPState:
        kernels = kernels_of(params.model)
        return PDPState(
            hyper(sparsity=common_target(sparsity), epsilon=epsilon, temperature=temperature),
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            jnp.zeros((), jnp.float32),
            {p: jnp.zeros((), jnp.float32) for p in kernels},
            own_targets(sparsity, kernels),
            no_fisher(kernels, budget),
            {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels.items()},
        )

    def soft(kernels: dict[str, jax.Array], state: PDPState) -> dict[str, jax.Array]:
        temperature = state.hyper["temperature"]
        return {p: soft_mask(cut, kernels[p], state.ratio[p], temperature) for p, cut in layouts(kernels, groups, roles).items()}

    def apply(params: Params, state: PDPState) -> tuple[View, PDPState]:
        fresh, training = soft(kernels_of(params.model), state), state.stage == Stage.TRAIN
        return masked_view(params.model, {p: jnp.where(training, m, state.mask[p]) for p, m in fresh.items()}), state

    def step(params: Params, state: PDPState, *, stage: Any, stats: Stats | None = None, **extra: Any) -> tuple[Params, PDPState]:
        del extra
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), fisher=next_fisher(state.fisher, stats or {}))

    def boundary(
        params: Params,
        state: PDPState,
        *,
        view: View | None = None,
        event: Any,
        epoch: Any,
        stage: Any,
        epochs: Any,
        **extra: Any,
    ) -> tuple[Params, PDPState]:
        del extra
        training, final = stage == Stage.TRAIN, event == Event.PRE_FINETUNE
        starts, ends = (event == Event.PRE_EPOCH) & training, (event == Event.POST_EPOCH) & training
        kernels, h = kernels_of(entering(params, view).model), state.hyper
        cuts = layouts(kernels, groups, roles)
        scores = {p: cut.scores(jnp.abs(kernels[p])) for p, cut in cuts.items()}
        pace = h["epsilon"] if compat else jnp.maximum(h["epsilon"], 1 / jnp.maximum(epochs, 1).astype(jnp.float32))
        part = jnp.where(starts, jnp.minimum(1.0, pace * (epoch + 1).astype(jnp.float32)), state.part)
        own = early_shares(state.share, kernels, h["sparsity"], event) if early else state.share
        share = shares("layer" if early else budget, cuts, kernels, scores, state.fisher, resolved(own, h["sparsity"]))
        now = {p: part * v for p, v in share.items()}
        ratio, masks, fresh = {}, {}, soft(kernels, state)
        for p, cut in cuts.items():
            gone = going(cut, kernels[p].shape, scores[p], now[p], compat)
            ratio[p] = jnp.where(starts, gone, state.ratio[p])
            stored = state.mask[p]
            exact = (stored >= 0.5).astype(stored.dtype) if compat else cut.expand(survivors(cut, scores[p], now[p]))
            masks[p] = jnp.where(final, exact, jnp.where(ends, fresh[p], stored))
        return params, PDPState(h, jnp.asarray(stage, jnp.int32), part, ratio, own, state.fisher, masks)

    return Transform("pdp", attach, init, apply, step, boundary, no_penalty, labelled("pdp", "thresholds"), needs_of(budget))
