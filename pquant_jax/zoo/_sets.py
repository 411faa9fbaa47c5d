"""Models of a set of particles: what they give does not depend on the order of the particles."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pquant_jax.zoo._checks import whole


class _Layers(nn.Module):
    """Dense layers, each with a relu behind it."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., features) -> (..., widths[-1])."""
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x


class DeepSets(nn.Module):
    """See `deepsets`."""

    phi: tuple[int, ...]
    rho: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, particles, features) -> (n, outputs)."""
        x = _Layers(self.phi, name="phi")(x)
        x = jnp.sum(x, axis=1) * _inverse_power_of_two(x.shape[1])
        return nn.Dense(self.outputs, name="output")(_Layers(self.rho, name="rho")(x))


def deepsets(phi: Sequence[int] = (16, 8), rho: Sequence[int] = (16,), outputs: int = 5) -> DeepSets:
    """rho(2^-c sum_p phi(x_p)): the same dense layers for every particle, a sum, dense layers.

    Source: Zaheer et al., "Deep Sets", arXiv:1703.06114, eq. 4.

    phi, rho: widths of the layers before and behind the sum, relu behind each.  outputs: of the linear layer at the end.
    2^-c is the power of two nearest below 1 / particles: a shift, where a mean would be a multiplier.
    Takes x (n, particles, features).  Raises: ConfigError for a width that is no positive whole number.

    >>> deepsets((8, 8), (8,), 1).outputs
    1
    """
    whole("deepsets", phi=phi, rho=rho, outputs=outputs)
    return DeepSets(tuple(phi), tuple(rho), outputs)


class InteractionNetwork(nn.Module):
    """See `interaction_network`."""

    edge: tuple[int, ...]
    node: tuple[int, ...]
    head: tuple[int, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, particles, features) -> (n, outputs)."""
        count = x.shape[1]
        pairs = [(r, s) for r in range(count) for s in range(count) if r != s]
        receivers, senders = (np.asarray(side) for side in zip(*pairs, strict=True))
        edges = jnp.concatenate([x[:, receivers], x[:, senders]], axis=-1)
        effects = _Layers(self.edge, name="edge")(edges)
        received = effects.reshape(len(x), count, count - 1, effects.shape[-1]).sum(axis=2)
        nodes = _Layers(self.node, name="node")(jnp.concatenate([x, received], axis=-1))
        pooled = jnp.sum(nodes, axis=1) * _inverse_power_of_two(count)
        return nn.Dense(self.outputs, name="output")(_Layers(self.head, name="head")(pooled))


def interaction_network(
    edge: Sequence[int] = (6, 4), node: Sequence[int] = (8, 8), head: Sequence[int] = (16,), outputs: int = 5
) -> InteractionNetwork:
    """Particles exchange messages along all ordered pairs: e_rs = f_R(x_r, x_s), o_r = f_O(x_r, sum_s e_rs), y = f_C(sum_r o_r).

    The edges are fixed by the number of particles, so that the graph is a static one: P (P - 1) of them.
    Source: Moreno et al., "JEDI-net", arXiv:1908.05318, eq. 1-4.

    edge, node, head: widths of f_R, f_O and f_C, relu behind each layer.  outputs: of the linear layer at the end.
    Takes x (n, particles >= 2, features).  Raises: ConfigError for a width that is no positive whole number.

    >>> interaction_network(outputs=3).edge
    (6, 4)
    """
    whole("interaction_network", edge=edge, node=node, head=head, outputs=outputs)
    return InteractionNetwork(tuple(edge), tuple(node), tuple(head), outputs)


class JediLinear(nnx.Module):
    """See `jedi_linear`."""

    def __init__(self, features: int, edge: int, node: tuple[int, ...], head: tuple[int, ...], outputs: int, rngs: nnx.Rngs):
        self.own = nnx.Linear(features, edge, rngs=rngs)
        self.others = nnx.Linear(features, edge, use_bias=False, rngs=rngs)
        self.node = _chain(edge, node, rngs)
        self.head = _chain(node[-1], head, rngs)
        self.output = nnx.Linear(head[-1], outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, particles, features) -> (n, outputs)."""
        scale = _inverse_power_of_two(x.shape[1])
        everyone = self.others(jnp.sum(x, axis=1, keepdims=True) * scale)
        x = nnx.relu(self.own(x) + everyone)
        for layer in self.node:
            x = nnx.relu(layer(x))
        x = jnp.sum(x, axis=1) * scale
        for layer in self.head:
            x = nnx.relu(layer(x))
        return self.output(x)


def _chain(features: int, widths: tuple[int, ...], rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip((features, *widths), widths, strict=False)])


def jedi_linear(
    features: int = 3, edge: int = 16, node: Sequence[int] = (8,), head: Sequence[int] = (16,), outputs: int = 5, seed: int = 0
) -> JediLinear:
    """The interaction network with linear messages, so that its size grows with P instead of P^2 (flax.nnx).

    h_r = relu(W_1 x_r + W_2 sum_s x_s / P + b): as messages are linear, summing them over s is one product with the sum of
    all particles.  Then dense layers per particle, a sum over particles, dense layers.
    Source: Que et al., "JEDI-linear", arXiv:2508.15468, sec. III.

    features: per particle.  edge: width of h.  node, head: widths before and behind the sum, relu behind each layer.
    1 / P is the power of two nearest below it.  seed: of the initial weights.
    Takes x (n, particles, features).  Raises: ConfigError for a size that is no positive whole number.

    >>> jedi_linear(outputs=3).output.out_features
    3
    """
    whole("jedi_linear", features=features, edge=edge, node=node, head=head, outputs=outputs)
    return JediLinear(features, edge, tuple(node), tuple(head), outputs, nnx.Rngs(seed))


def _inverse_power_of_two(count: int) -> float:
    """The power of two nearest below 1 / count (1 / count itself where it is one).

    >>> _inverse_power_of_two(8), _inverse_power_of_two(6)
    (0.125, 0.125)
    """
    return 1.0 / (1 << (count - 1).bit_length())
