"""Example models, by the names that a configuration uses: `model: mlp`.  What is lower case in `__all__` builds one."""

from pquant_jax.zoo._auto import VAE, AutoEncoder, autoencoder, vae, vae_encoder as vae_encoder, vae_loss as vae_loss
from pquant_jax.zoo._conv import CNN, ResNet, SmartPixels, TwoHeads, cnn, conv1d, resnet20, smart_pixels, two_heads
from pquant_jax.zoo._mlp import MLP, mlp, particle_mlp
from pquant_jax.zoo._sets import DeepSets, InteractionNetwork, JediLinear, deepsets, interaction_network, jedi_linear
from pquant_jax.zoo._symbolic import symbolic
from pquant_jax.zoo._tokens import GRU, Mixer, Transformer, gru, mixer, transformer

__all__ = [
    "CNN",
    "GRU",
    "MLP",
    "VAE",
    "AutoEncoder",
    "DeepSets",
    "InteractionNetwork",
    "JediLinear",
    "Mixer",
    "ResNet",
    "SmartPixels",
    "Transformer",
    "TwoHeads",
    "autoencoder",
    "cnn",
    "conv1d",
    "deepsets",
    "gru",
    "interaction_network",
    "jedi_linear",
    "mixer",
    "mlp",
    "particle_mlp",
    "resnet20",
    "smart_pixels",
    "symbolic",
    "transformer",
    "two_heads",
    "vae",
]
