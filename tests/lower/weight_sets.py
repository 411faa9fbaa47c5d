"""A small model with every kind of parameter site and two weight sets of the same formats and masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pquant_jax as pq
from pquant_jax import _tree, lower

F = pq.quantize.Format


class Net(nn.Module):
    """A convolution, a BatchNorm, dense layers with a residual: every kind of parameter site."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(2, (3,))(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4, use_bias=False)(x)))
        x = x + nn.relu(nn.Dense(4)(x))
        return nn.Dense(2)(x)


class Sets(NamedTuple):
    """One model with two weight sets of the same formats and masks."""

    inst: pq.Instrumented
    views: tuple[pq.View, pq.View]
    states: tuple[Any, Any]
    graph: lower.Graph


def weight_set(inst: pq.Instrumented, masks: dict[str, Any], seed: int) -> tuple[pq.View, Any]:
    """Random parameters and batch statistics on fixed formats, pruned by `masks`."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda v: jnp.asarray(rng.normal(0, 0.7, v.shape), jnp.float32), inst.model.params)
    state = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), jnp.float32), inst.model.state)
    params = _tree.replace(params, {p: m * _tree.flatten(params)[p] for p, m in masks.items()})
    chain = pq.quantize.fixed(inst.sites, weights=F(1, 3, 1), activations=F(2, 2, overflow="WRAP"))
    attached = chain.attach(params)
    view, _ = chain.apply(attached, chain.init(attached))
    return view._replace(masks=masks), state


def two_sets() -> Sets:
    """The model with two weight sets."""
    x = np.zeros((2, 5, 1), np.float32)
    inst = pq.instrument(pq.from_linen(Net(), x), x, inputs=pq.InputSpec(1, 2, 2))
    rng = np.random.default_rng(5)
    kernels = [p for p, spec in inst.sites.items() if spec.kind == "kernel"]
    masks = {p: jnp.asarray(rng.uniform(size=inst.sites[p].shape) > 0.4, jnp.float32) for p in kernels}
    (a, a_state), (b, b_state) = (weight_set(inst, masks, seed) for seed in (1, 2))
    return Sets(inst, (a, b), (a_state, b_state), lower.trace(inst, a, a_state, weights="ports"))
