"""The multilayer perceptron of the jet benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax

from pquant_jax._errors import ConfigError


class MLP(nn.Module):
    """Dense layers with relu between them; see `mlp`, which checks the arguments."""

    hidden: tuple[int, ...]
    outputs: int
    batch_norm: bool = False
    residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """x (n, ...) -> logits (n, outputs); everything behind the batch axis is flattened."""
        x = x.reshape(x.shape[0], -1)
        for width in self.hidden:
            y = nn.Dense(width, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                y = nn.BatchNorm(use_running_average=not train)(y)
            y = nn.relu(y)
            x = x + y if self.residual and x.shape[-1] == width else y
        return nn.Dense(self.outputs)(x)


def mlp(hidden: Sequence[int] = (64, 32, 32), outputs: int = 5, *, batch_norm: bool = False, residual: bool = False) -> MLP:
    """A dense network: for each width h of `hidden`, x <- relu(W x + b), then a linear layer without activation.

    hidden: widths of the hidden layers.  outputs: number of classes or targets.
    batch_norm: normalise before each relu; the layer's bias is left out, the normalisation has its own.
    residual: x <- x + relu(W x + b) where a layer keeps the width.
    Raises: ConfigError for a width that is no positive whole number.

    >>> mlp([16, 16], 3, residual=True).hidden
    (16, 16)
    """
    widths = [*hidden, outputs] if isinstance(hidden, Sequence) and not isinstance(hidden, str) else [None]
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
        raise ConfigError(
            f"mlp: hidden is {hidden!r} and outputs {outputs!r}, expected a list of positive whole numbers, and one"
        )
    return MLP(tuple(hidden), outputs, batch_norm, residual)


def particle_mlp(outputs: int = 5, hidden: Sequence[int] = (64, 64, 64, 64)) -> MLP:
    """The dense network on flattened particles, 96-64-64-64-64-5 for 32 particles of 3 features.

    Its task is that of Duarte et al., arXiv:1804.06913, on constituents instead of features; ports and outputs of 16 bits.
    Takes x (n, particles, features).  Raises: ConfigError for a width that is no positive whole number.

    >>> particle_mlp().hidden
    (64, 64, 64, 64)
    """
    return mlp(hidden, outputs)
