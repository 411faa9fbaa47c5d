"""Example models, by the names that a configuration uses: `model: mlp`."""

from pquant_jax.zoo._mlp import MLP, mlp

__all__ = ["MLP", "mlp"]
