"""Level 3: pruning methods, one file each.

To add one: its file and its line here.  Its section in a configuration and its place in the contract tests follow from the
signature.
"""

from pquant_jax.prune._ap import APState as APState, ap as ap
from pquant_jax.prune._autosparse import AutoSparseState as AutoSparseState, autosparse as autosparse
from pquant_jax.prune._cs import CSState as CSState, cs as cs
from pquant_jax.prune._dst import DSTState as DSTState, dst as dst
from pquant_jax.prune._frozen import FrozenState as FrozenState, frozen as frozen
from pquant_jax.prune._magnitude import magnitude as magnitude
from pquant_jax.prune._pdp import PDPState as PDPState, pdp as pdp
from pquant_jax.prune._random import random as random
from pquant_jax.prune._ranked import RankedState as RankedState
from pquant_jax.prune._wanda import wanda as wanda, wanda_from_data as wanda_from_data
from pquant_jax.transforms import (
    NM as NM,
    Block as Block,
    Cross as Cross,
    Groups as Groups,
    Heads as Heads,
    Layout as Layout,
    Reuse as Reuse,
    layout as layout,
    straddling as straddling,
    survivors as survivors,
)
