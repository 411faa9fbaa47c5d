"""What a search is about: a model, its trained parameters and samples; and what can be measured of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, SiteSpec, Tree, View
from pquant_jax.graph import Instrumented
from pquant_jax.search._traces import Batches, batches

FLOAT = 32  # bits of an unquantized value


class Problem(NamedTuple):
    """inst, params, state: the model.  loss: one value per sample.  data: the samples to measure on, as the ports see them."""

    inst: Instrumented
    params: Tree
    state: Tree
    loss: Callable
    data: Batches


def problem(
    inst: Instrumented, params: Tree | Params, data: Any, loss: Callable, state: Tree | None, samples: int, batch_size: int
) -> Problem:
    """params may be those of a training; state defaults to the model's."""
    model = params.model if isinstance(params, Params) else params
    sampled = batches(data, samples, batch_size)
    sampled = sampled._replace(x=jax.tree.map(jnp.asarray, inst.encode(sampled.x)))
    return Problem(inst, model, inst.model.state if state is None else state, loss, sampled)


def losses(p: Problem, leaves: Mapping[str, jax.Array], x: Tree, y: Tree) -> jax.Array:
    """One loss per sample of the unquantized model with these parameters replaced; any derivative of it exists."""
    predicted, _ = p.inst.model.forward(_tree.replace(p.params, leaves), p.state, x, train=False, rng=None)
    return p.loss(predicted, y)


def ranges(p: Problem) -> dict[str, tuple[float, float]]:
    """{site: (low, high)} of every parameter and, over the samples, of every activation of the unquantized model."""

    def of_batch(batch: Batches) -> Any:
        return p.inst.capture(View(p.params, {}, {}), p.state, batch.x, train=False, wrap=False)[2]["range"]

    seen = jax.device_get(jax.jit(lambda data: jax.lax.map(of_batch, data))(p.data))
    found = {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in seen.items()}
    leaves = {name: np.asarray(w) for name, w in _tree.flatten(p.params).items() if name in p.inst.sites and name not in found}
    return found | {name: (float(w.min()), float(w.max())) for name, w in leaves.items()}


def counter(p: Problem) -> Callable[..., jax.Array]:
    """(width of every site, masks) -> `inst.ebops` of a view with such formats, differentiable in both; compiled once."""

    def kif(spec: SiteSpec, width: Any) -> KIF:
        zero = jnp.zeros((1,) * len(spec.shape), jnp.float32)
        return KIF(zero, zero, zero + jnp.asarray(width, jnp.float32))

    def count(widths: Mapping[str, Any], masks: Mapping[str, Any]) -> jax.Array:
        kifs = {name: kif(spec, widths[name]) for name, spec in p.inst.sites.items()}
        return p.inst.ebops(View(p.params, kifs, dict(masks)))

    return jax.jit(count)
