"""AutoSparse: trained thresholds that shrink, with a gradient for what they cut (Kundu et al., arXiv:2304.06941).

w' = sign(w) * relu(|w| - sigmoid(T)); below the threshold the gradient is alpha instead of 0, and alpha decays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import AxisRole, Event, Params, Stage, Transform, Tree, View
from pquant_jax.numerics import mask
from pquant_jax.prune._control import (
    Control,
    check_granularity,
    control,
    kernels_like,
    moved,
    steer,
    store,
    target_or_nan,
    threshold_shape,
)
from pquant_jax.transforms import check_compat, entering, hyper, kth_largest, labelled, no_penalty


class AutoSparseState(NamedTuple):
    """hyper: alpha, alpha_reset_epoch, target, gain and, where asked for, backward_sparsity.  stage: of the last step.

    alpha: of this epoch.  control: of the thresholds, where there is a target.  mask: {path: 0/1} and shift: {path: kernel},
    in force outside the training stage, where w' = mask * (w - shift).
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    alpha: jax.Array
    control: Control
    mask: dict[str, jax.Array]
    shift: dict[str, jax.Array]


@jax.custom_jvp
def soft_threshold(w: jax.Array, level: jax.Array, alpha: jax.Array, floor: jax.Array) -> jax.Array:
    """sign(w) * relu(|w| - level), with the derivative 1 above the level, alpha below it, 0 where |w| - level < floor.

    A weight of exactly 0 has the derivative alpha too, so that it can come back.

    >>> w, none = jnp.float32([0.5, -0.5, 0.1]), jnp.float32(-jnp.inf)
    >>> soft_threshold(w, jnp.float32(0.25), jnp.float32(0.5), none).tolist()
    [0.25, -0.25, 0.0]
    >>> jax.grad(lambda w: jnp.sum(soft_threshold(w, jnp.float32(0.25), jnp.float32(0.5), none)))(w).tolist()
    [1.0, 1.0, 0.5]
    """
    del alpha, floor
    return jnp.where(jnp.abs(w) > level, w - jnp.sign(w) * level, 0)


@soft_threshold.defjvp
def _soft_threshold_jvp(primals, tangents):
    w, level, alpha, floor = primals
    x = jnp.abs(w) - level
    slope = jnp.where(x < floor, 0, jnp.where(x > 0, 1, alpha)).astype(w.dtype)
    return soft_threshold(*primals), slope * (tangents[0] - jnp.sign(w) * tangents[1])


def decay(epoch: jax.Array, epochs: jax.Array) -> jax.Array:
    """max((1 + cos(pi t)) / 2, 1 - sigmoid(12 t - 6)) with t = epoch / epochs: the cosine, then the sigmoid's tail.

    >>> [round(float(decay(jnp.int32(e), jnp.int32(10))), 4) for e in (0, 3, 6, 9)]
    [1.0, 0.9168, 0.3455, 0.0245]
    """
    t = jnp.asarray(epoch, jnp.float32) / jnp.maximum(jnp.asarray(epochs, jnp.float32), 1)
    return jnp.maximum((1 + jnp.cos(jnp.pi * t)) / 2, 1 - jax.nn.sigmoid(12 * t - 6))


def autosparse(
    *,
    alpha: float = 0.5,
    threshold_init: float = -5.0,
    granularity: str = "channel",
    alpha_reset_epoch: float = 90.0,
    backward_sparsity: float | None = None,
    target: float | None = None,
    gain: float = 4.0,
    roles: Mapping[str, AxisRole] | None = None,
    compat: str | None = None,
) -> Transform:
    """Prune by a trained soft threshold: w' = sign(w) * relu(|w| - sigmoid(T)), in the training stage.

    Dense while pre-training.  When fine-tuning begins the mask and the thresholds freeze and the weights stay shrunk:
    w' = mask * (w - sign(w) * sigmoid(T)), the second term a constant, so that nothing jumps and a kept weight may pass 0.

    Args:
      alpha: gradient of a weight below the threshold in the first epoch, a fraction; epoch e has alpha * `decay`.
      threshold_init: starting T; the threshold is sigmoid(T), in units of the weights.
      granularity: one T per "weight", output "channel", or "layer".
      alpha_reset_epoch: from this epoch of the training stage on alpha is 0.
      backward_sparsity: fraction of every kernel's weights, those furthest below the threshold, that get no gradient.
        None: all get one, and nothing is computed for it.
      target: zeros / total over all kernels, or None.  After each epoch T += gain * (wanted - sparsity), wanted ramping to
        the target; fine-tuning freezes exactly the highest |w| - sigmoid(T).  A weight that the target needs though its
        threshold has cut it comes back with the little that it was cut by.
      gain: of that controller, per epoch.
      roles: `inst.roles`, which says what the output channel is; default the last axis.
      compat: "pquantml" fine-tunes the mask times the weights that were not shrunk, a jump, lets alpha decay at the end
        of every epoch of any stage: one epoch late, and nearly 0 already where there was pre-training, and gives a weight
        of 0 no gradient.
    Raises: TransformError for an unknown granularity or compat, a target outside [0, 1), or a model without kernels.

    >>> t = autosparse(threshold_init=-1.0986123)
    >>> params = t.attach({"kernel": jnp.float32([[0.5], [-0.2]])})
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    >>> t.apply(params, state)[0].model["kernel"].round(6).tolist()
    [[0.25], [0.0]]
    """
    check_granularity(granularity)
    reference, goal = check_compat(compat), target_or_nan(target)

    def attach(model: Tree) -> Params:
        kernels = _tree.select(model, _tree.is_kernel)
        shapes = {p: threshold_shape(p, w, granularity, roles or {}) for p, w in kernels.items()}
        return Params(model, {"autosparse": {p: jnp.full(s, threshold_init, jnp.float32) for p, s in shapes.items()}})

    def init(params: Params) -> AutoSparseState:
        kernels = kernels_like(params.model, params.extra["autosparse"])
        ones, zeros = ({p: jnp.full(w.shape, v, jnp.float32) for p, w in kernels.items()} for v in (1, 0))
        optional = {} if backward_sparsity is None else {"backward_sparsity": backward_sparsity}
        hypers = hyper(alpha=alpha, alpha_reset_epoch=alpha_reset_epoch, target=goal, gain=gain, **optional)
        first = jnp.array(hypers["alpha"])  # a copy: no buffer twice in one state
        return AutoSparseState(hypers, jnp.asarray(Stage.PRETRAIN, jnp.int32), first, control(), ones, zeros)

    def apply(params: Params, state: AutoSparseState) -> tuple[View, AutoSparseState]:
        training, thresholds = state.stage == Stage.TRAIN, params.extra["autosparse"]
        kernels, masks = {}, {}
        for p, w in kernels_like(params.model, thresholds).items():
            level = jax.nn.sigmoid(thresholds[p])
            felt = jnp.where(w == 0, 0, w) if reference else w
            shrunk = soft_threshold(felt, level, state.alpha, _floor(jnp.abs(w) - level, state.hyper))
            kernels[p] = jnp.where(training, shrunk, mask(w - state.shift[p], state.mask[p]))
            masks[p] = jnp.where(training, (jnp.abs(w) > level).astype(w.dtype), state.mask[p])
        return View(_tree.replace(params.model, kernels), {}, masks), state

    def step(params: Params, state: AutoSparseState, *, stage: Any, **extra: Any) -> tuple[Params, AutoSparseState]:
        del extra
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), control=moved(state.control))

    def boundary(
        params: Params,
        state: AutoSparseState,
        *,
        view: View | None = None,
        event: Any,
        epoch: Any,
        epochs: Any,
        stage: Any,
        **extra: Any,
    ) -> tuple[Params, AutoSparseState]:
        del extra
        training, thresholds, h = state.stage == Stage.TRAIN, params.extra["autosparse"], state.hyper
        kernels = kernels_like(entering(params, view).model, thresholds)
        own = {p: (jnp.abs(w) > jax.nn.sigmoid(thresholds[p])).astype(jnp.float32) for p, w in kernels.items()}
        steered, move = steer(state.control, h, own, event=event, epoch=epoch, epochs=epochs, training=training)
        thresholds = {p: t + move for p, t in thresholds.items()}
        levels = {p: jax.nn.sigmoid(t) for p, t in thresholds.items()}
        scores = {p: jnp.abs(w) - levels[p] for p, w in kernels.items()}
        own = {p: (s > 0).astype(jnp.float32) for p, s in scores.items()}
        steered, masks = store(steered, state.mask, own, scores, h["target"], event=event, training=training)
        freezes = (event == Event.PRE_FINETUNE) & training & (not reference)
        shift = {p: jnp.where(freezes, _shift(w, levels[p]), state.shift[p]) for p, w in kernels.items()}
        when = (event == Event.POST_EPOCH) if reference else (event == Event.PRE_EPOCH) & (stage == Stage.TRAIN)
        scheduled = jnp.where(epoch >= h["alpha_reset_epoch"], 0, h["alpha"] * decay(epoch, epochs)).astype(jnp.float32)
        current = jnp.where(when, scheduled, state.alpha)
        params = Params(params.model, {**params.extra, "autosparse": thresholds})
        return params, AutoSparseState(h, jnp.asarray(stage, jnp.int32), current, steered, masks, shift)

    return Transform("autosparse", attach, init, apply, step, boundary, no_penalty, labelled("autosparse", "thresholds"))


def _floor(x: jax.Array, hypers: dict[str, jax.Array]) -> jax.Array:
    """The k-th largest x, k = (1 - backward_sparsity) of them and at least 1: what lies below gets no gradient."""
    if "backward_sparsity" not in hypers:
        return jnp.full((), -jnp.inf, x.dtype)
    x = jax.lax.stop_gradient(x)
    k = jnp.floor((1 - hypers["backward_sparsity"]) * x.size + 1e-3)  # float32 has 1 - 0.8 just below 0.2
    rank = jnp.clip(k.astype(jnp.int32), 1, x.size)
    below = kth_largest(jnp.maximum(-x, 0), x.size + 1 - rank)  # the bisection wants values that are not negative
    return jnp.where(jnp.sum(x >= 0) >= rank, kth_largest(jnp.maximum(x, 0), rank), -below)


def _shift(w: jax.Array, level: jax.Array) -> jax.Array:
    """What makes w - shift exactly what training saw; below the level, where that was 0, sign(w) * (level - |w|)."""
    signed = jnp.sign(w) * level
    return jnp.where(jnp.abs(w) > level, signed, 2 * w - signed)
