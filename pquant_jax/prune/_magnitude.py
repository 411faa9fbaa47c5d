"""Magnitude pruning with a ramp (Zhu and Gupta, arXiv:1710.01878, eq. 1): the baseline that is hard to beat."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from pquant_jax._base import AxisRole, Transform
from pquant_jax.prune._ranked import Method, ranked
from pquant_jax.prune._targets import Targets
from pquant_jax.transforms import Groups


def magnitude(
    *,
    sparsity: Targets,
    groups: Groups = "weight",
    budget: str = "layer",
    begin: float = 0.0,
    end: float = 0.75,
    power: float = 3.0,
    roles: Mapping[str, AxisRole] | None = None,
) -> Transform:
    """Keep the groups of the largest L2 norm; the target rises as 1 - (1 - t)^power, t from `begin` to `end` of the training.

    The mask is made between the epochs of the training stage, of the kernels as they were trained, whatever is rewound, and
    stands still in fine-tuning.

    Args:
      sparsity: zeros / total, a fraction, or one for each rule: {"Dense_0/.*": 0.5, ".*": 0.9}.
      groups: what is pruned together: "weight", "in", "out", "filter", "head", "layer", or NM, Block, Cross, Reuse, Heads.
      budget: "layer", every layer its own target; "global", one threshold for all of them; "fisher", the same by
        w^2 E[gradient^2], the loss that a weight's absence costs (needs the statistic "gradient").
      begin, end: fractions of the training stage's epochs.
      roles: `inst.roles`, which says what input and output are; default the last axis is the output.
    Raises: TransformError for a rule without a match, or groups that a kernel can't be cut into.

    >>> import jax.numpy as jnp
    >>> from pquant_jax import Event, Stage
    >>> t = magnitude(sparsity=0.5)
    >>> params = t.attach({"kernel": jnp.float32([[4.0, -3.0], [2.0, 1.0]])})
    >>> now = dict(event=Event.PRE_FINETUNE, epoch=jnp.int32(0), epochs=jnp.int32(1), stage=Stage.FINETUNE)
    >>> _, state = t.boundary(params, t.init(params), **now)
    >>> t.apply(params, state)[0].model["kernel"].tolist()
    [[4.0, -3.0], [0.0, 0.0]]
    """
    method = Method(lambda kernels: {}, lambda seen, stats, training: seen, lambda path, w, seen: jnp.abs(w))
    return ranked(
        "magnitude", method, sparsity=sparsity, groups=groups, budget=budget, begin=begin, end=end, power=power, roles=roles
    )
