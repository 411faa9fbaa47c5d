"""CS, continuous sparsification: a trained soft mask that hardens (Savarese et al., arXiv:1912.04427).

m = sigmoid(beta * s), w' = w * m / sigmoid(s0); beta rises from 1 to final_temperature, the penalty is decay * |m|_1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Event, Params, Stage, Transform, Tree, View
from pquant_jax.numerics import mask
from pquant_jax.prune._control import Control, advance, control, kernels_like, moved, store, target_or_nan
from pquant_jax.transforms import check_compat, hyper, labelled

LOWEST = -1e30  # of s: every round multiplies it by up to final_temperature, and inf * 0 is nan


class CSState(NamedTuple):
    """hyper: decay, threshold_init, final_temperature, target.  stage: of the last step.  beta: of this epoch.

    control: of s, where there is a target.  mask: {path: 0/1}, in force in fine-tuning; ones before.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    beta: jax.Array
    control: Control
    mask: dict[str, jax.Array]


def cs(
    *,
    decay: float = 1e-9,
    threshold_init: float = 0.0,
    final_temperature: float = 200.0,
    target: float | None = None,
    compat: str | None = None,
) -> Transform:
    """Prune by a soft mask that hardens over the epochs: w' = w * sigmoid(beta * s) / sigmoid(s0), in the training stage.

    In epoch e of E beta = final_temperature^(e / (E - 1)).  After a round s = min(beta * s, s0): what was cut stays cut,
    what lives starts the next round at s0, whatever is rewound.  Fine-tuning freezes m = 1[s > 0] and keeps the scaling
    1 / sigmoid(s0), so that a mask that has hardened does not jump.  Dense while pre-training.

    Args:
      decay: weight of |m|_1 / sigmoid(s0); larger prunes more.
      threshold_init: s0, the starting s; lower prunes more.
      final_temperature: beta in the last epoch of a round.
      target: zeros / total over all kernels, or None.  After each epoch all s move by the same amount, so that the sparsity
        lies between a ramp to the target and the target; fine-tuning freezes exactly the highest s.  (A stronger
        penalty can't do that: once beta is high, no gradient reaches s.)
      compat: "pquantml" has no scaling on the hard mask (weights jump by sigmoid(s0), a half where s0 = 0), and multiplies
        beta by final_temperature^(1 / (E - 1)) at the end of every epoch of any stage, pre-training included.
    Raises: TransformError for an unknown compat, a target outside [0, 1), or a model without kernels.

    >>> t = cs()
    >>> params = t.attach({"kernel": jnp.float32([[0.5, 0.25]])})
    >>> params.extra["cs"]["kernel"] = jnp.float32([[50, -50]])
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN), beta=jnp.float32(200))
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[1.0, 0.0]]
    """
    reference, goal = check_compat(compat), target_or_nan(target)

    def attach(model: Tree) -> Params:
        kernels = _tree.select(model, _tree.is_kernel)
        return Params(model, {"cs": {p: jnp.full(w.shape, threshold_init, jnp.float32) for p, w in kernels.items()}})

    def init(params: Params) -> CSState:
        ones = {p: jnp.ones(s.shape, jnp.float32) for p, s in params.extra["cs"].items()}
        hypers = hyper(decay=decay, threshold_init=threshold_init, final_temperature=final_temperature, target=goal)
        return CSState(hypers, jnp.asarray(Stage.PRETRAIN, jnp.int32), jnp.ones((), jnp.float32), control(), ones)

    def scaling(state: CSState) -> jax.Array:
        return 1 / jax.nn.sigmoid(state.hyper["threshold_init"])

    def apply(params: Params, state: CSState) -> tuple[View, CSState]:
        training = state.stage == Stage.TRAIN
        scaled = training if reference else state.stage != Stage.PRETRAIN
        factor = jnp.where(scaled, scaling(state), 1)
        masks = {p: jnp.where(training, jax.nn.sigmoid(state.beta * s), state.mask[p]) for p, s in params.extra["cs"].items()}
        kernels = {p: mask(w * factor, masks[p]) for p, w in kernels_like(params.model, masks).items()}
        return View(_tree.replace(params.model, kernels), {}, masks), state

    def step(params: Params, state: CSState, *, stage: Any, **extra: Any) -> tuple[Params, CSState]:
        del extra
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), control=moved(state.control))

    def hotter(state: CSState, event: Any, epoch: Any, epochs: Any, stage: Any) -> jax.Array:
        """beta after this event."""
        last = jnp.maximum(jnp.asarray(epochs, jnp.float32) - 1, 1)
        if reference:
            grown = jnp.minimum(state.beta * state.hyper["final_temperature"] ** (1 / last), -LOWEST)
            beta = jnp.where(event == Event.POST_EPOCH, grown, state.beta)
        else:
            scheduled = state.hyper["final_temperature"] ** (jnp.asarray(epoch, jnp.float32) / last)
            beta = jnp.where((event == Event.PRE_EPOCH) & (stage == Stage.TRAIN), scheduled, state.beta)
        return jnp.where(event == Event.POST_ROUND, 1, beta).astype(jnp.float32)

    def boundary(
        params: Params, state: CSState, *, view: View | None = None, event: Any, epoch: Any, epochs: Any, stage: Any, **extra: Any
    ) -> tuple[Params, CSState]:
        del extra, view
        training, scores, h = state.stage == Stage.TRAIN, params.extra["cs"], state.hyper
        steered, ends = advance(state.control, event=event, epoch=epoch, epochs=epochs, training=training)
        excess = jnp.where(ends & ~jnp.isnan(h["target"]), _excess(scores, steered.part, h["target"], state.beta), 0)
        scores = {p: s - excess for p, s in scores.items()}
        own = {p: (s > 0).astype(jnp.float32) for p, s in scores.items()}
        steered, masks = store(steered, state.mask, own, scores, h["target"], event=event, training=training)
        rounds = event == Event.POST_ROUND
        again = {p: jnp.clip(state.beta * s, LOWEST, h["threshold_init"]) for p, s in scores.items()}
        trained = {p: jnp.where(rounds, again[p], s) for p, s in scores.items()}
        beta = hotter(state, event, epoch, epochs, stage)
        new = Params(params.model, {**params.extra, "cs": trained})
        return new, CSState(h, jnp.asarray(stage, jnp.int32), beta, steered, masks)

    def penalty(params: Params, state: CSState, view: View) -> jax.Array:
        del view
        soft = (jnp.sum(jax.nn.sigmoid(state.beta * s)) for s in params.extra["cs"].values())
        weight = state.hyper["decay"] * scaling(state)
        total = weight * sum(soft, jnp.zeros((), jnp.float32))
        return jnp.where(state.stage == Stage.TRAIN, total, jnp.zeros((), jnp.float32))

    return Transform("cs", attach, init, apply, step, boundary, penalty, labelled("cs", "thresholds"))


def _excess(scores: dict[str, jax.Array], part: jax.Array, target: jax.Array, beta: jax.Array) -> jax.Array:
    """What to take from every s so that the sparsity is not below part * target and not above the target.

    The lowest that lives ends half-way to the highest that does not, but at most 1/2 above 0 in units of 1 / beta: after
    a round, those that were cut lie far below.
    """
    ranked = jnp.sort(jnp.concatenate([s.ravel() for s in scores.values()]))
    sparsity = jnp.mean((ranked <= 0).astype(jnp.float32))
    wanted = jnp.clip(sparsity, part * target, target)
    cut = jnp.clip(jnp.round(wanted * ranked.size).astype(jnp.int32), 0, ranked.size - 1)
    lowest, highest = ranked[cut], ranked[jnp.maximum(cut - 1, 0)]
    return jnp.where(wanted == sparsity, 0, lowest - jnp.minimum((lowest - highest) / 2, 0.5 / beta))
