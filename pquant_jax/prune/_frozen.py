"""Masks found elsewhere, as a method: what one-shot criteria and searches hand over to the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Params, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.transforms import keep_params, labelled, masked_view, no_penalty


class FrozenState(NamedTuple):
    """hyper: none.  mask: {path: 0/1}, in force in every stage."""

    hyper: dict[str, jax.Array]
    mask: dict[str, jax.Array]


def frozen(masks: Mapping[str, Any]) -> Transform:
    """Multiply parameters by given masks, the same in every stage: w * mask.

    Args:
      masks: {path: 0/1 of the parameter's shape}, as `wanda_from_data` gives them; other parameters stay as they are.
    Raises: TransformError at `attach` for a path that the model doesn't have, a mask of another shape, or values outside [0, 1].

    >>> t = frozen({"kernel": [[1, 0], [0, 1]]})
    >>> params = t.attach({"kernel": jnp.float32([[4.0, 3.0], [2.0, 1.0]])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [[4.0, 0.0], [0.0, 1.0]]
    """
    stored = {p: jnp.asarray(m, jnp.float32) for p, m in masks.items()}
    for path, m in stored.items():
        if not bool(jnp.all((m >= 0) & (m <= 1))):
            raise TransformError(f"the mask of {path} has values outside [0, 1], expected 0 (pruned) and 1 (kept)")

    def attach(model: Tree) -> Params:
        leaves = _tree.flatten(model)
        _tree.replace(model, stored)  # names a path that isn't there
        for path, m in stored.items():
            if m.shape != leaves[path].shape:
                raise TransformError(f"the mask of {path} has the shape {m.shape}, expected the parameter's {leaves[path].shape}")
        return Params(model, {})

    def init(params: Params) -> FrozenState:
        del params
        return FrozenState({}, {p: jnp.array(m) for p, m in stored.items()})  # a copy: a step may be given its memory

    def apply(params: Params, state: FrozenState) -> tuple[View, FrozenState]:
        return masked_view(params.model, state.mask), state

    return Transform("frozen", attach, init, apply, keep_params, keep_params, no_penalty, labelled("frozen", "thresholds"))
