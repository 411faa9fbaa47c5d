"""Level 3: training under constraints, and what they can hold."""

from pquant_jax.constrain import metrics
from pquant_jax.constrain._mdmm import MDMMState, mdmm
from pquant_jax.constrain._metric import Metric
from pquant_jax.constrain._paca import Dominant, Patterns, dominant, patterns

__all__ = ["Dominant", "MDMMState", "Metric", "Patterns", "dominant", "mdmm", "metrics", "patterns"]
