"""Level 3: pruning methods, one file each."""

from pquant_jax.prune._dst import DSTState, dst
from pquant_jax.prune._pdp import PDPState, pdp

__all__ = ["DSTState", "PDPState", "dst", "pdp"]
