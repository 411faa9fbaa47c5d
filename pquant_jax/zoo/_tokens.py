"""Models that mix the particles of a sequence: MLP-mixer, transformer, GRU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pquant_jax.zoo._checks import divides, whole
from pquant_jax.zoo._sets import _inverse_power_of_two


class Mixer(nn.Module):
    """See `mixer`."""

    width: int
    tokens: int
    channels: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x (n, particles, features) -> (n, outputs)."""
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(self.width, use_bias=False)(x)))
        for _ in range(self.blocks):
            y = jnp.swapaxes(x, 1, 2)
            y = nn.Dense(x.shape[1])(nn.relu(nn.Dense(self.tokens)(y)))
            x = x + jnp.swapaxes(y, 1, 2)
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.channels)(x)))
        return nn.Dense(self.outputs)(jnp.sum(nn.relu(x), axis=1) * _inverse_power_of_two(x.shape[1]))


def mixer(width: int = 8, tokens: int = 8, channels: int = 8, blocks: int = 1, outputs: int = 5) -> Mixer:
    """Dense layers along the particles, then along the features, in turn, each with a residual sum.

    X <- X + W_2 relu(W_1 X), then X <- X + relu(X W_3) W_4, `blocks` times; an embedding with a BatchNorm in front, a sum
    over particles behind.  Source: Tolstikhin et al., "MLP-Mixer", arXiv:2105.01601, eq. 1, without their LayerNorm and
    with relu for gelu, as in Sun et al., "Fast jet tagging with MLP-Mixers on FPGAs", arXiv:2503.03103.

    width: features per particle inside.  tokens, channels: hidden widths along particles and features.
    Takes x (n, particles, features).  Raises: ConfigError for a size that is no positive whole number.

    >>> mixer(blocks=2).blocks
    2
    """
    whole("mixer", width=width, tokens=tokens, channels=channels, blocks=blocks, outputs=outputs)
    return Mixer(width, tokens, channels, blocks, outputs)


class Transformer(nn.Module):
    """See `transformer`."""

    width: int
    heads: int
    hidden: int
    blocks: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, particles, features) -> (n, outputs)."""
        x = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))
        return nn.Dense(self.outputs)(jnp.sum(x, axis=1) * _inverse_power_of_two(x.shape[1]))


def transformer(width: int = 8, heads: int = 2, hidden: int = 8, blocks: int = 1, outputs: int = 5) -> Transformer:
    """A transformer encoder on particles, made of flax's own layers: LayerNorm, attention, gelu.

    X <- X + Attention(LayerNorm(X)), then X <- X + W_2 gelu(W_1 LayerNorm(X)), `blocks` times, then a sum over particles
    and a linear layer; no positions, so that the order of particles does not matter.
    Source: Vaswani et al., arXiv:1706.03762, eq. 1; normalisation in front of the blocks as in Xiong et al., arXiv:2002.04745.

    width: features per particle, a multiple of `heads`.  hidden: width between W_1 and W_2.
    Takes x (n, particles, features).  Raises: ConfigError for a size that is no positive whole number or no multiple.

    >>> transformer(heads=3)
    Traceback (most recent call last):
    pquant_jax._errors.ConfigError: transformer: width is 8, expected a multiple of heads = 3
    """
    whole("transformer", width=width, heads=heads, hidden=hidden, blocks=blocks, outputs=outputs)
    divides("transformer", "width", width, "heads", heads)
    return Transformer(width, heads, hidden, blocks, outputs)


class GRU(nn.Module):
    """See `gru`."""

    width: int
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, steps, features) -> (n, outputs)."""
        last, _ = nn.RNN(nn.GRUCell(self.width))(x, return_carry=True)
        return nn.Dense(self.outputs)(jnp.asarray(last))


def gru(width: int = 8, outputs: int = 5) -> GRU:
    """A gated recurrent unit that reads the particles one by one; its last state enters a linear layer.

    r = sigmoid(W_r x + U_r h), z = sigmoid(W_z x + U_z h), n = tanh(W_n x + r (U_n h)), h <- (1 - z) n + z h.
    Source: Cho et al., arXiv:1406.1078, eq. 5-8, in the form of flax.linen.GRUCell.

    width: of the state h.  Takes x (n, steps, features); the loop over steps is unrolled in hardware.
    Raises: ConfigError for a size that is no positive whole number.

    >>> gru(4).width
    4
    """
    whole("gru", width=width, outputs=outputs)
    return GRU(width, outputs)
