"""Level 3: pruning methods, one file each."""

from pquant_jax.prune._ap import APState, ap
from pquant_jax.prune._autosparse import AutoSparseState, autosparse
from pquant_jax.prune._cs import CSState, cs
from pquant_jax.prune._dst import DSTState, dst
from pquant_jax.prune._frozen import FrozenState, frozen
from pquant_jax.prune._magnitude import magnitude
from pquant_jax.prune._pdp import PDPState, pdp
from pquant_jax.prune._random import random
from pquant_jax.prune._ranked import RankedState
from pquant_jax.prune._wanda import wanda, wanda_from_data
from pquant_jax.transforms import NM, Block, Cross, Groups, Heads, Layout, Reuse, layout, straddling, survivors

__all__ = [
    "NM",
    "APState",
    "AutoSparseState",
    "Block",
    "CSState",
    "Cross",
    "DSTState",
    "FrozenState",
    "Groups",
    "Heads",
    "Layout",
    "PDPState",
    "RankedState",
    "Reuse",
    "ap",
    "autosparse",
    "cs",
    "dst",
    "frozen",
    "layout",
    "magnitude",
    "pdp",
    "random",
    "straddling",
    "survivors",
    "wanda",
    "wanda_from_data",
]
