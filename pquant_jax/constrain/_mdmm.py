"""MDMM, the modified differential method of multipliers (Platt and Barr, NIPS 1987): training under a constraint.

The weights descend and the multiplier ascends the same Lagrangian, task + scale (lambda g + damping g^2 / 2); the damping
term turns the saddle, around which the two would circle, into a point at which they settle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import Event, Params, Stage, Transform, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.constrain._metric import Function, Metric
from pquant_jax.numerics import settle
from pquant_jax.transforms import check_compat, entering, hyper, kernels_of, labelled, masked_view

KINDS = ("<=", ">=", "==")
Masks = dict[str, jax.Array]
Prunes = float | Callable[[Mapping[str, jax.Array]], Masks]


class MDMMState(NamedTuple):
    """hyper: target, scale, damping, epsilon; with compat also rate.  stage: of the last step.

    seen: compat only, the infeasibility of the last step's parameters, of the multiplier's shape.
    mask: {path: 0/1} of what `prunes` selects, 1 before fine-tuning.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    seen: jax.Array
    mask: Masks


def infeasibility(value: jax.Array, multiplier: jax.Array, target: jax.Array, damping: jax.Array, kind: str) -> jax.Array:
    """h of the Lagrangian scale (lambda h + damping h^2 / 2); it is also what the multiplier ascends by.

    "==": h = g = value - target, signed, so that the multiplier comes back once the constraint is overfulfilled.
    "<=": h = max(g, -lambda / damping), ">=" the same of -g: the slack variable of an inequality, eliminated (Platt and
    Barr; Rockafellar 1973).  With lambda = 0 this is max(g, 0): a constraint that holds costs nothing.

    >>> one, zero = jnp.float32(1), jnp.float32(0)
    >>> [float(infeasibility(jnp.float32(0.5), lam, one, one, kind)) for lam, kind in ((zero, "=="), (zero, "<="), (one, "<="))]
    [-0.5, 0.0, -0.5]
    """
    g = target - value if kind == ">=" else value - target
    if kind == "==":
        return g
    damped = damping > 0
    slack = jnp.where(damped, (0 - multiplier) / jnp.where(damped, damping, 1), -jnp.inf)
    # the Lagrangian does not change with h where h is the slack, so nothing is lost by holding it
    return jnp.maximum(g, jax.lax.stop_gradient(slack))


def mdmm(
    metric: Metric | Function,
    *,
    kind: str,
    target: float | jax.Array,
    scale: float = 10.0,
    damping: float = 1.0,
    initial: float | None = None,
    prunes: Prunes | None = None,
    compat: str | None = None,
    rate: float | None = 1e-3,
) -> Transform:
    """Hold `metric` to a target while training: penalty scale (lambda h + damping h^2 / 2), lambda trained by ascent.

    lambda is in `params.extra["mdmm"]`, labelled "duals": `pq.optimizer(..., duals=...)` ascends it by scale h.  That of an
    inequality stays >= 0.  Before and after the training stage there is no penalty and lambda stands still.

    Args:
      metric: pure function (params, view) -> scalar, or a `Metric`; one value per layer has one multiplier each.
      kind: "<=", ">=" or "==" target.
      target: in the metric's units; an array gives every value its own.
      scale: of the whole penalty, against the loss.  damping: 0 lets weights and multiplier circle.
      initial: lambda at the start, default 0 (compat: 1).
      prunes: masks that fine-tuning freezes: epsilon, the weights with |w| > epsilon stay; or {path: kernel} -> {path: 0/1},
        such as `group_masks(...)` or `patterns(...).masks`.
      compat: "pquantml" for |g| or max(g, 0), a lambda that advances by rate * scale * (h of the step before) in
        pre-training too, and masks of |w| > epsilon made anew in every step of fine-tuning.
      rate: of that advance, None for the optimizer's ascent instead; compat only.
    Raises: TransformError for an unknown kind or compat, a metric that gives no number, or paths that are no kernels.

    >>> from pquant_jax.constrain import metrics
    >>> t = mdmm(metrics.sparsity(epsilon=0.1), kind=">=", target=0.75, prunes=0.1)
    >>> params = t.attach({"kernel": jnp.float32([[0.5, 0.05]])})
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    >>> float(t.penalty(params, state, t.apply(params, state)[0]))  # 10 * (0.75 - 0.5)^2 / 2
    0.3125
    """
    if kind not in KINDS:
        raise TransformError(f"kind is {kind!r}; {did_you_mean(str(kind), KINDS)}")
    measured = metric if isinstance(metric, Metric) else Metric(metric, metric)
    reference = check_compat(compat)
    by_rate = reference and rate is not None
    first = float(reference) if initial is None else initial

    def attach(model: Tree) -> Params:
        _masks_of(prunes, model, jnp.zeros((), jnp.float32))
        return Params(model, {"mdmm": {"multiplier": jnp.full(measured.shape(model), first, jnp.float32)}})

    def init(params: Params) -> MDMMState:
        epsilon = prunes if isinstance(prunes, (int, float)) else 0.0
        advance = {"rate": rate} if reference and rate is not None else {}
        hypers = hyper(target=target, scale=scale, damping=damping, epsilon=epsilon, **advance)
        ones = jax.tree.map(jnp.ones_like, _masks_of(prunes, params.model, hypers["epsilon"]))
        stage = jnp.asarray(Stage.PRETRAIN, jnp.int32)
        return MDMMState(hypers, stage, jnp.zeros(measured.shape(params.model), jnp.float32), ones)

    def distance(params: Params, state: MDMMState, view: View, multiplier: jax.Array) -> jax.Array:
        value, h = measured.soft(*_settled((params, view))), state.hyper
        if jnp.shape(value) != jnp.shape(multiplier):
            raise TransformError(
                f"the metric gave an array of shape {jnp.shape(value)}, expected {jnp.shape(multiplier)}: one number, or a "
                "Metric whose `shape` says how many"
            )
        if not reference:
            return infeasibility(value, multiplier, h["target"], h["damping"], kind)
        g = h["target"] - value if kind == ">=" else value - h["target"]
        return jnp.abs(g) if kind == "==" else jnp.maximum(g, 0)

    def advanced(params: Params, state: MDMMState) -> jax.Array:
        """The multiplier of this step; one with a rate has no gradient."""
        if not by_rate:
            return params.extra["mdmm"]["multiplier"]
        move = jnp.where(state.stage == Stage.FINETUNE, 0, state.hyper["rate"] * state.hyper["scale"] * state.seen)
        return jax.lax.stop_gradient(params.extra["mdmm"]["multiplier"] + move)

    def apply(params: Params, state: MDMMState) -> tuple[View, MDMMState]:
        masks = state.mask
        if reference and masks:
            now = _masks_of(prunes, params.model, state.hyper["epsilon"])
            masks = {p: jnp.where(state.stage == Stage.FINETUNE, now[p], m) for p, m in masks.items()}
        return masked_view(params.model, masks), state

    def step(
        params: Params, state: MDMMState, *, stage: Any, previous: Params | None = None, **extra: Any
    ) -> tuple[Params, MDMMState]:
        del extra
        before, stage = params if previous is None else previous, jnp.asarray(stage, jnp.int32)
        state, multiplier = state._replace(stage=stage), params.extra["mdmm"]["multiplier"]
        if by_rate:
            multiplier, told = advanced(before, state), View(before.model, {}, {})
            found = jax.lax.stop_gradient(distance(before, state, told, multiplier))
            state = state._replace(seen=jnp.where(stage == Stage.FINETUNE, state.seen, found))
        elif not reference:
            moved = multiplier if kind == "==" else jnp.maximum(multiplier, 0)
            # an optimizer with momentum moves what has no gradient, so outside the training stage it is put back
            multiplier = jnp.where(stage == Stage.TRAIN, moved, before.extra["mdmm"]["multiplier"])
        return _with(params, multiplier), state

    def boundary(
        params: Params, state: MDMMState, *, view: View | None = None, event: Any, stage: Any, **extra: Any
    ) -> tuple[Params, MDMMState]:
        del extra
        ends = event == Event.PRE_FINETUNE
        fresh = _masks_of(prunes, entering(params, view).model, state.hyper["epsilon"])
        masks = {p: jnp.where(ends, fresh[p], m) for p, m in state.mask.items()}
        if reference:
            params = _with(params, jnp.where(ends, 0, params.extra["mdmm"]["multiplier"]))
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32), mask=masks)

    def penalty(params: Params, state: MDMMState, view: View) -> jax.Array:
        h, training = state.hyper, state.stage == Stage.TRAIN
        multiplier = advanced(params, state)
        # zero before it is multiplied: then the gradient to lambda is exactly 0 whatever the metric is
        g = jnp.where(training, distance(params, state, view, multiplier), 0)
        return jnp.sum(_lagrangian(g, multiplier, h["scale"], h["damping"]))

    return Transform("mdmm", attach, init, apply, step, boundary, penalty, labelled("mdmm", "duals"))


@jax.custom_vjp
def _lagrangian(h: jax.Array, multiplier: jax.Array, scale: jax.Array, damping: jax.Array) -> jax.Array:
    """scale (lambda h + damping h^2 / 2); the gradient to h with every product rounded, see `_settled`."""
    return scale * (multiplier * h + damping * jnp.square(h) / 2)


def _lagrangian_gradients(residuals: tuple, u: jax.Array) -> tuple:
    h, multiplier, scale, damping = residuals
    force = settle(scale * multiplier) + settle(settle(scale * damping) * h)
    return u * settle(force), u * settle(scale * h), jnp.zeros_like(scale), jnp.zeros_like(damping)


_lagrangian.defvjp(lambda *args: (_lagrangian(*args), args), _lagrangian_gradients)


@jax.custom_vjp
def _settled(tree: Tree) -> Tree:
    """The identity; a gradient that comes back through it is rounded before it is added to that of the loss.

    A product and a sum in one kernel become one operation with one rounding, or don't, as XLA happens to cut its kernels.
    """
    return tree


_settled.defvjp(
    lambda tree: (tree, None),
    lambda _, g: (jax.tree.map(lambda v: settle(v) if jnp.issubdtype(v.dtype, jnp.floating) else v, g),),
)


def _with(params: Params, multiplier: jax.Array) -> Params:
    return Params(params.model, {**params.extra, "mdmm": {"multiplier": multiplier}})


def _masks_of(prunes: Prunes | None, model: Tree, epsilon: jax.Array) -> Masks:
    if prunes is None:
        return {}
    kernels = kernels_of(model)
    if not callable(prunes):
        return {p: (jnp.abs(w) > epsilon).astype(jnp.float32) for p, w in kernels.items()}
    masks = prunes(kernels)
    for p, m in masks.items():
        if p not in kernels or jnp.shape(m) != jnp.shape(kernels[p]):
            raise TransformError(f"prunes gave a mask of shape {jnp.shape(m)} for {p!r}; {did_you_mean(p, kernels)}")
    return {p: m.astype(jnp.float32) for p, m in masks.items()}
