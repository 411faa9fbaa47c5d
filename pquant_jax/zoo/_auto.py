"""Auto-encoders for anomaly detection: trained on what is known, they give a score for what isn't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from pquant_jax.graph import Model, from_function
from pquant_jax.zoo._checks import whole


class AutoEncoder(nnx.Module):
    """See `autoencoder`."""

    def __init__(self, features: int, hidden: tuple[int, ...], latent: int, rngs: nnx.Rngs):
        widths = (features, *hidden, latent, *reversed(hidden), features)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, features) -> its reconstruction, of the same shape."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def autoencoder(features: int = 16, hidden: Sequence[int] = (12,), latent: int = 4, seed: int = 0) -> AutoEncoder:
    """x -> dense layers down to `latent` numbers -> dense layers back to x; what it reconstructs badly is an anomaly (flax.nnx).

    Source: Govorkova et al., "Autoencoders on FPGAs for real-time, unsupervised new physics detection at 40 MHz",
    arXiv:2108.03986, without their convolutions.

    features: of x (n, features).  hidden: widths between x and the latent layer, mirrored behind it.  seed: of the weights.
    Raises: ConfigError for a size that is no positive whole number.

    >>> len(autoencoder(hidden=(12, 8)).layers)
    6
    """
    whole("autoencoder", features=features, hidden=hidden, latent=latent)
    return AutoEncoder(features, tuple(hidden), latent, nnx.Rngs(seed))


class VAE(nn.Module):
    """See `vae`."""

    features: int
    hidden: tuple[int, ...]
    latent: int

    def setup(self) -> None:
        """Layers by name: encoder and decoder have sites of their own."""
        self.encoder = [nn.Dense(width) for width in self.hidden]
        self.mean = nn.Dense(self.latent)
        self.log_var = nn.Dense(self.latent)
        self.decoder = [nn.Dense(width) for width in reversed(self.hidden)]
        self.output = nn.Dense(self.features)

    def encode(self, x: jax.Array) -> jax.Array:
        """x (n, features) -> what the two latent layers read."""
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return x

    def score(self, x: jax.Array) -> jax.Array:
        """x (n, features) -> sum of the squared latent means (n, 1): the part of the divergence that needs no logarithm."""
        mean = self.mean(self.encode(x))
        return jnp.sum(mean * mean, axis=-1, keepdims=True)

    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """x (n, features) -> {"reconstruction": (n, features), "divergence": (n, 1)}; z is drawn in training, its mean else."""
        hidden = self.encode(x)
        mean, log_var = self.mean(hidden), self.log_var(hidden)
        divergence = 0.5 * jnp.sum(mean * mean + jnp.exp(log_var) - log_var - 1.0, axis=-1, keepdims=True)
        drawn = jax.random.normal(self.make_rng("dropout"), mean.shape) if train else jnp.zeros(mean.shape)
        # a number per sample in both traces, so that training and inference have the same sites; alone, noise that is drawn
        # for a batch would look like a trained scale, and a constant like none
        noise = jnp.where(mean == mean, drawn, 0.0)
        z = mean + jnp.exp(0.5 * log_var) * noise
        for layer in self.decoder:
            z = nn.relu(layer(z))
        return {"reconstruction": self.output(z), "divergence": divergence}


def vae(features: int = 16, hidden: Sequence[int] = (12,), latent: int = 4) -> VAE:
    """A variational auto-encoder (Kingma and Welling, arXiv:1312.6114, eq. 10); `vae_loss` trains it, `vae_encoder` is exported.

    In hardware only the encoder is needed: the score sum(mean^2) tells what the latent space has no place for, as in the
    anomaly trigger of Govorkova et al., arXiv:2108.03986, eq. 3.

    features: of x (n, features).  hidden: widths between x and the latent layers, mirrored behind them.
    Raises: ConfigError for a size that is no positive whole number.

    >>> vae(latent=3).latent
    3
    """
    whole("vae", features=features, hidden=hidden, latent=latent)
    return VAE(features, tuple(hidden), latent)


def vae_loss(made: dict[str, jax.Array], x: jax.Array, weight: float = 0.01) -> jax.Array:
    """Mean squared error of the reconstruction + `weight` * divergence, per sample (n,).

    >>> vae_loss({"reconstruction": jnp.zeros((1, 2)), "divergence": jnp.ones((1, 1))}, jnp.ones((1, 2)), 0.5).tolist()
    [1.5]
    """
    error = jnp.mean(jnp.square(made["reconstruction"] - x), axis=-1)
    return error + weight * made["divergence"][:, 0]


def vae_encoder(module: VAE, params: Any) -> Model:
    """The anomaly score of `module` as a model of its own: x (n, features) -> (n, 1).

    params: of the whole auto-encoder; the decoder's are left out, the others keep their paths, and so their sites.

    >>> module = vae(4)
    >>> params = module.init({"params": jax.random.key(0)}, jnp.ones((1, 4)))["params"]
    >>> sorted(vae_encoder(module, params).params)
    ['encoder_0', 'mean']
    """
    kept = {name: leaf for name, leaf in params.items() if name == "mean" or name.startswith("encoder_")}
    return from_function(lambda p, x: module.apply({"params": p}, x, method="score"), kept)
