"""PDP: parameter-free differentiable pruning (Cho et al., arXiv:2305.11203).

A soft mask m = sigmoid((w^2 - t^2) / temperature), where t lies half-way between the two magnitudes that straddle the
target sparsity; the target ramps up over the epochs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Event, Params, Stage, Transform, Tree, View
from pquant_jax.numerics import mask
from pquant_jax.transforms import entering, hyper, kth_largest, labelled, no_penalty


class PDPState(NamedTuple):
    """hyper: sparsity, epsilon, temperature.  stage: of the last step.  ratio: current target sparsity, fraction.

    mask: {path: [0, 1]}, in force outside the training stage."""

    hyper: dict[str, jax.Array]
    stage: jax.Array
    ratio: jax.Array
    mask: dict[str, jax.Array]


def soft_mask(w: jax.Array, ratio: jax.Array, temperature: jax.Array) -> jax.Array:
    """m = sigmoid((w^2 - t^2) / temperature), t = (A[n] + A[n+1]) / 2 with A = |w| descending, n = round((1-ratio) size).

    The count is rounded, not truncated: float32 (1 - 0.8) * 100 is just below 20 and the reference keeps 19.  t carries
    a gradient through both order statistics.

    >>> soft_mask(jnp.float32([4, 3, 2, 1]), jnp.float32(0.5), jnp.float32(1e-5)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    a = jnp.abs(w)
    wanted = jnp.round((1 - ratio) * a.size).astype(jnp.int32)
    kept = jnp.clip(wanted, 1, max(a.size - 1, 1))
    t = (kth_largest(a, kept) + kth_largest(a, jnp.minimum(kept + 1, a.size))) / 2
    return jnp.where(wanted >= a.size, jnp.ones_like(w), jax.nn.sigmoid((w * w - t * t) / temperature))


def pdp(*, sparsity: float, epsilon: float = 0.015, temperature: float = 1e-5) -> Transform:
    """Prune the smallest magnitudes of every kernel with a soft mask that needs no trained parameter.

    The target of epoch e of the training stage is min(1, epsilon * (e + 1)) * sparsity; the mask is stored once per
    epoch and rounded to 0/1 when fine-tuning begins.

    Args:
      sparsity: final zeros / total of every kernel, fraction.
      epsilon: ramp, fraction of the target per epoch.
      temperature: softness, in units of w^2.
    Raises: TransformError for a model without kernels.

    >>> t = pdp(sparsity=0.5, epsilon=1.0)
    >>> params = t.attach({"kernel": jnp.float32([[4.0, 3.0], [2.0, 1.0]])})
    >>> state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN), ratio=jnp.float32(0.5))
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[4.0, 3.0], [0.0, 0.0]]
    """

    def attach(model: Tree) -> Params:
        _tree.select(model, _tree.is_kernel)
        return Params(model, {})

    def init(params: Params) -> PDPState:
        ones = {p: jnp.ones(w.shape, jnp.float32) for p, w in _kernels(params.model).items()}
        hypers = hyper(sparsity=sparsity, epsilon=epsilon, temperature=temperature)
        return PDPState(hypers, jnp.asarray(Stage.PRETRAIN, jnp.int32), jnp.zeros((), jnp.float32), ones)

    def soft(model: Tree, state: PDPState) -> dict[str, jax.Array]:
        return {p: soft_mask(w, state.ratio, state.hyper["temperature"]) for p, w in _kernels(model).items()}

    def apply(params: Params, state: PDPState) -> tuple[View, PDPState]:
        training = state.stage == Stage.TRAIN
        masks = {p: jnp.where(training, m, state.mask[p]) for p, m in soft(params.model, state).items()}
        pruned = {p: mask(w, masks[p]) for p, w in _kernels(params.model).items()}
        return View(_tree.replace(params.model, pruned), {}, masks), state

    def step(params: Params, state: PDPState, *, stage: Any, **extra: Any) -> tuple[Params, PDPState]:
        del extra
        return params, state._replace(stage=jnp.asarray(stage, jnp.int32))

    def boundary(
        params: Params, state: PDPState, *, view: View | None = None, event: Any, epoch: Any, stage: Any, **extra: Any
    ) -> tuple[Params, PDPState]:
        del extra
        training = stage == Stage.TRAIN
        ramp = jnp.minimum(1.0, state.hyper["epsilon"] * (epoch + 1).astype(jnp.float32)) * state.hyper["sparsity"]
        ratio = jnp.where((event == Event.PRE_EPOCH) & training, ramp, state.ratio)
        fresh = soft(entering(params, view).model, state)
        masks = {
            p: jnp.where(
                event == Event.PRE_FINETUNE,
                (m >= 0.5).astype(m.dtype),
                jnp.where((event == Event.POST_EPOCH) & training, fresh[p], m),
            )
            for p, m in state.mask.items()
        }
        return params, PDPState(state.hyper, jnp.asarray(stage, jnp.int32), ratio, masks)

    return Transform("pdp", attach, init, apply, step, boundary, no_penalty, labelled("pdp", "thresholds"))


def _kernels(model: Tree) -> dict[str, jax.Array]:
    return {p: w for p, w in _tree.flatten(model).items() if _tree.is_kernel(p, w)}
