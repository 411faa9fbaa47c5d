"""Level 6: searches over whole models, on the host; they return masks and formats to train on with."""

from pquant_jax.search._fitcompress import FITCompressed, fitcompress
from pquant_jax.search._formats import compression
from pquant_jax.search._hawq import HAWQFound, hawq
from pquant_jax.search._traces import Trace, fisher, hutchinson
from pquant_jax.search._walk import Node

__all__ = ["FITCompressed", "HAWQFound", "Node", "Trace", "compression", "fisher", "fitcompress", "hawq", "hutchinson"]
