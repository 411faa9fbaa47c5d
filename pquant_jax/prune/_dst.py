"""DST, dynamic sparse training: trained thresholds (Liu et al., arXiv:2005.06870).

m = 1[|w| - T > 0], masked weight w * m, penalty alpha * sum(exp(-T)).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import AxisRole, Event, Params, Stage, Transform, Tree, View
from pquant_jax.prune._control import (
    Control,
    check_granularity,
    control,
    kernels_like,
    moved,
    steer,
    store,
    strength,
    target_or_nan,
    threshold_shape,
)
from pquant_jax.transforms import check_compat, entering, hyper, labelled, masked_view


class DSTState(NamedTuple):
    """hyper: alpha, max_sparsity, target, gain.  stage: of the last step.  control: of alpha, where there is a target.

    mask: {path: 0/1}, in force outside the training stage.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    control: Control
    mask: dict[str, jax.Array]


@jax.custom_jvp
def binary_step(x: jax.Array) -> jax.Array:
    """1[x > 0] with the surrogate derivative 2 - 4|x| for |x| <= 0.4, 0.4 for 0.4 < |x| <= 1, else 0 (eq. 4).

    >>> [round(float(jax.grad(binary_step)(v)), 2) for v in jnp.float32([0.1, 0.7, 2.0])]
    [1.6, 0.4, 0.0]
    """
    return (x > 0).astype(x.dtype)


@binary_step.defjvp
def _binary_step_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    a = jnp.abs(x)
    return binary_step(x), t * jnp.where(a <= 0.4, 2 - 4 * a, jnp.where(a <= 1, 0.4, 0.0)).astype(x.dtype)


def dst(
    *,
    alpha: float,
    threshold_init: float = 0.0,
    max_sparsity: float = 0.99,
    granularity: str = "weight",
    target: float | None = None,
    gain: float = 10.0,
    roles: Mapping[str, AxisRole] | None = None,
    compat: str | None = None,
) -> Transform:
    """Prune with trained thresholds: m = 1[|w| > T], learned by a surrogate gradient, in the training stage.

    Dense while pre-training.  The mask is stored when an epoch ends and frozen in fine-tuning, so a loop of your own
    tells the compression when fine-tuning begins: `pq.boundary(..., event=Event.PRE_FINETUNE, stage=Stage.FINETUNE)`.

    Args:
      alpha: weight of sum(exp(-T)); larger prunes more.
      threshold_init: starting T, in units of the weights.
      max_sparsity: fraction; a layer that has reached it when an epoch ends gets T = 0 back.
      granularity: one T per "weight", output "channel", or "layer".
      target: zeros / total over all kernels, or None.  After each epoch alpha *= exp(gain * (wanted - sparsity)), wanted
        ramping to the target; fine-tuning freezes exactly the highest |w| - T.
      gain: of that controller, per epoch.
      roles: `inst.roles`, which says what the output channel is; default the last axis.
      compat: "pquantml" ignores threshold_init (T starts at 0) and resets a layer in any forward, not at an epoch's end.
    Raises: TransformError for an unknown granularity or compat, a target outside [0, 1), or a model without kernels.

    >>> t = dst(alpha=5e-6)
    >>> params = t.attach({"kernel": jnp.float32([[0.5, 0.2]])})
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    >>> params.extra["dst"]["kernel"] = jnp.float32([[0.3, 0.3]])
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[0.5, 0.0]]
    """
    check_granularity(granularity)
    reference, goal = check_compat(compat), target_or_nan(target)

    def attach(model: Tree) -> Params:
        kernels = _tree.select(model, _tree.is_kernel)
        shapes = {p: threshold_shape(p, w, granularity, roles or {}) for p, w in kernels.items()}
        return Params(
            model, {"dst": {p: jnp.full(s, 0 if reference else threshold_init, jnp.float32) for p, s in shapes.items()}}
        )

    def init(params: Params) -> DSTState:
        ones = {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels_like(params.model, params.extra["dst"]).items()}
        hypers = hyper(alpha=alpha, max_sparsity=max_sparsity, target=goal, gain=gain)
        return DSTState(hypers, jnp.asarray(Stage.PRETRAIN, jnp.int32), control(), ones)

    def in_force(params: Params, state: DSTState, stage: Any) -> Params:
        """What the forward uses: compat resets a layer there and then, and trains on from 0."""
        return _reset(params, params.model, state.hyper["max_sparsity"], stage == Stage.TRAIN) if reference else params

    def apply(params: Params, state: DSTState) -> tuple[View, DSTState]:
        training = state.stage == Stage.TRAIN
        own = _masks(params.model, in_force(params, state, state.stage).extra["dst"])
        return masked_view(params.model, {p: jnp.where(training, m, state.mask[p]) for p, m in own.items()}), state

    def step(
        params: Params, state: DSTState, *, stage: Any, previous: Params | None = None, **extra: Any
    ) -> tuple[Params, DSTState]:
        del extra
        if reference:
            before = params if previous is None else previous
            fallen = jax.tree.map(jnp.subtract, before.extra["dst"], in_force(before, state, stage).extra["dst"])
            params = Params(params.model, {**params.extra, "dst": jax.tree.map(jnp.subtract, params.extra["dst"], fallen)})
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), control=moved(state.control))

    def boundary(
        params: Params,
        state: DSTState,
        *,
        view: View | None = None,
        event: Any,
        epoch: Any,
        epochs: Any,
        stage: Any,
        **extra: Any,
    ) -> tuple[Params, DSTState]:
        del extra
        training, model, h = state.stage == Stage.TRAIN, entering(params, view).model, state.hyper
        ends = (event == Event.POST_EPOCH) | ((event == Event.PRE_FINETUNE) & ~state.control.settled)
        before = _masks(model, params.extra["dst"])
        params = _reset(params, model, h["max_sparsity"], training & ends)
        thresholds, own = params.extra["dst"], _masks(model, params.extra["dst"])
        scores = {p: jnp.abs(w) - thresholds[p] for p, w in kernels_like(model, thresholds).items()}
        steered, _ = steer(state.control, h, before, event=event, epoch=epoch, epochs=epochs, training=training)
        steered, masks = store(steered, state.mask, own, scores, h["target"], event=event, training=training)
        return params, DSTState(h, jnp.asarray(stage, jnp.int32), steered, masks)

    def penalty(params: Params, state: DSTState, view: View) -> jax.Array:
        del view
        thresholds = in_force(params, state, state.stage).extra["dst"]
        total = sum((jnp.sum(jnp.exp(-t)) for t in thresholds.values()), jnp.zeros((), jnp.float32))
        weight = strength(state.hyper["alpha"], state.control)
        return jnp.where(state.stage == Stage.TRAIN, weight * total, jnp.zeros((), jnp.float32))

    return Transform("dst", attach, init, apply, step, boundary, penalty, labelled("dst", "thresholds"))


def _masks(model: Tree, thresholds: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {p: binary_step(jnp.abs(w) - thresholds[p]) for p, w in kernels_like(model, thresholds).items()}


def _reset(params: Params, model: Tree, max_sparsity: jax.Array, when: jax.Array) -> Params:
    """T = 0 for every layer whose sparsity has reached the maximum."""
    thresholds = params.extra["dst"]
    collapsed = {p: when & (jnp.mean(1 - m) >= max_sparsity) for p, m in _masks(model, thresholds).items()}
    # its gradient is that of T = 0, not none
    reset = {p: t - jax.lax.stop_gradient(jnp.where(collapsed[p], t, 0)) for p, t in thresholds.items()}
    return Params(params.model, {**params.extra, "dst": reset})
