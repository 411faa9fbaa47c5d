"""Random pruning: what every learned method has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax

from pquant_jax._base import AxisRole, Transform
from pquant_jax.prune._ranked import Method, ranked
from pquant_jax.prune._targets import Targets
from pquant_jax.transforms import Groups


def random(
    *,
    sparsity: Targets,
    seed: int = 0,
    groups: Groups = "weight",
    begin: float = 0.0,
    end: float = 0.75,
    power: float = 3.0,
    roles: Mapping[str, AxisRole] | None = None,
) -> Transform:
    """Keep groups by lot, drawn once from `seed`; the other arguments are those of `magnitude`.

    >>> import jax.numpy as jnp
    >>> from pquant_jax import Event, Stage
    >>> t = random(sparsity=0.75)
    >>> params = t.attach({"kernel": jnp.ones((2, 2))})
    >>> now = dict(event=Event.PRE_FINETUNE, epoch=jnp.int32(0), epochs=jnp.int32(1), stage=Stage.FINETUNE)
    >>> _, state = t.boundary(params, t.init(params), **now)
    >>> float(t.apply(params, state)[0].model["kernel"].sum())
    1.0
    """

    def draw(kernels: dict[str, jax.Array]) -> dict[str, jax.Array]:
        keys = {p: jax.random.fold_in(jax.random.key(seed), zlib.crc32(p.encode())) for p in kernels}
        return {p: jax.random.uniform(keys[p], w.shape) for p, w in kernels.items()}

    method = Method(draw, lambda seen, stats, training: seen, lambda path, w, seen: seen[path])
    return ranked(
        "random", method, sparsity=sparsity, groups=groups, budget="layer", begin=begin, end=end, power=power, roles=roles
    )
