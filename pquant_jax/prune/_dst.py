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
from pquant_jax._errors import TransformError
from pquant_jax.numerics import mask
from pquant_jax.transforms import entering, hyper, labelled


class DSTState(NamedTuple):
    """hyper: alpha, max_sparsity.  stage: of the last step.  mask: {path: 0/1}, in force outside the training stage."""

    hyper: dict[str, jax.Array]
    stage: jax.Array
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


def threshold_shape(path: str, leaf: jax.Array, granularity: str, roles: Mapping[str, AxisRole]) -> tuple[int, ...]:
    """Shape of T: the kernel's ("weight"), its output axes ("channel", the last axis if the role is unknown), or 1 ("layer")."""
    if granularity == "weight":
        return leaf.shape
    out = roles[path].out_axes if path in roles else (leaf.ndim - 1,)
    return tuple(n if granularity == "channel" and a in out else 1 for a, n in enumerate(leaf.shape))


def dst(
    *,
    alpha: float,
    threshold_init: float = 0.0,
    max_sparsity: float = 0.99,
    granularity: str = "weight",
    roles: Mapping[str, AxisRole] | None = None,
) -> Transform:
    """Prune with trained thresholds: m = 1[|w| > T], learned by a surrogate gradient, in the training stage.

    Dense while pre-training.  The mask is stored at every boundary and frozen in fine-tuning, so a loop of your own
    tells the compression when fine-tuning begins: `pq.boundary(..., event=Event.PRE_FINETUNE, stage=Stage.FINETUNE)`.

    Args:
      alpha: weight of sum(exp(-T)); larger prunes more.
      threshold_init: starting T, in units of the weights.
      max_sparsity: fraction; a layer that has reached it when an epoch ends gets T = 0 back.
      granularity: one T per "weight", output "channel", or "layer".
      roles: `inst.roles`, which says what the output channel is; default the last axis.
    Raises: TransformError for an unknown granularity or a model without kernels.

    >>> t = dst(alpha=5e-6)
    >>> params = t.attach({"kernel": jnp.float32([[0.5, 0.2]])})
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    >>> params.extra["dst"]["kernel"] = jnp.float32([[0.3, 0.3]])
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[0.5, 0.0]]
    """
    if granularity not in ("weight", "channel", "layer"):
        raise TransformError(f"granularity is {granularity!r}, expected 'weight', 'channel' or 'layer'")

    def attach(model: Tree) -> Params:
        kernels = _tree.select(model, _tree.is_kernel)
        shapes = {p: threshold_shape(p, w, granularity, roles or {}) for p, w in kernels.items()}
        return Params(model, {"dst": {p: jnp.full(s, threshold_init, jnp.float32) for p, s in shapes.items()}})

    def init(params: Params) -> DSTState:
        kernels = _kernels(params.model, params)
        ones = {p: jnp.ones(w.shape, jnp.float32) for p, w in kernels.items()}
        return DSTState(hyper(alpha=alpha, max_sparsity=max_sparsity), jnp.asarray(Stage.PRETRAIN, jnp.int32), ones)

    def current(params: Params, model: Tree, stored: dict[str, jax.Array], stage: jax.Array) -> dict[str, jax.Array]:
        training, thresholds = stage == Stage.TRAIN, params.extra["dst"]
        kernels = _kernels(model, params)
        return {p: jnp.where(training, binary_step(jnp.abs(w) - thresholds[p]), stored[p]) for p, w in kernels.items()}

    def apply(params: Params, state: DSTState) -> tuple[View, DSTState]:
        masks = current(params, params.model, state.mask, state.stage)
        pruned = {p: mask(w, masks[p]) for p, w in _kernels(params.model, params).items()}
        return View(_tree.replace(params.model, pruned), {}, masks), state

    def step(params: Params, state: DSTState, *, stage: Any, **extra: Any) -> tuple[Params, DSTState]:
        del extra
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32))

    def boundary(
        params: Params, state: DSTState, *, view: View | None = None, event: Any, stage: Any, **extra: Any
    ) -> tuple[Params, DSTState]:
        del extra
        thresholds = params.extra["dst"]
        training, ends = state.stage == Stage.TRAIN, (event == Event.POST_EPOCH) | (event == Event.PRE_FINETUNE)
        model, reset = entering(params, view).model, {}
        masks, kernels = current(params, model, state.mask, state.stage), _kernels(model, params)
        for p, m in list(masks.items()):
            collapsed = training & ends & (jnp.mean(1 - m) >= state.hyper["max_sparsity"])
            reset[p] = jnp.where(collapsed, jnp.zeros_like(thresholds[p]), thresholds[p])
            masks[p] = jnp.where(collapsed, binary_step(jnp.abs(kernels[p])), m)
        new = Params(params.model, {**params.extra, "dst": reset})
        return new, DSTState(state.hyper, jnp.asarray(stage, jnp.int32), masks)

    def penalty(params: Params, state: DSTState, view: View) -> jax.Array:
        del view
        total = sum((jnp.sum(jnp.exp(-t)) for t in params.extra["dst"].values()), jnp.zeros((), jnp.float32))
        return jnp.where(state.stage == Stage.TRAIN, state.hyper["alpha"] * total, jnp.zeros((), jnp.float32))

    return Transform("dst", attach, init, apply, step, boundary, penalty, labelled("dst", "thresholds"))


def _kernels(model: Tree, params: Params) -> dict[str, jax.Array]:
    leaves = _tree.flatten(model)
    return {p: leaves[p] for p in params.extra["dst"]}
