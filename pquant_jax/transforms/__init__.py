"""Level 2: combinators on `Transform`, and the bridge to optax."""

from pquant_jax.transforms._chain import chain, identity, named
from pquant_jax.transforms._groups import NM, Block, Cross, Groups, Heads, Layout, Reuse, layout, straddling, survivors
from pquant_jax.transforms._optax import CompressionState, as_optax, boundary, optimizer, state_of, strong, update_state
from pquant_jax.transforms._order import kth_largest
from pquant_jax.transforms._parts import entering, hyper, keep_params, labelled, masked, no_penalty, with_hyper
from pquant_jax.transforms._pnorm import PNormState, pnorm_decay

__all__ = [
    "NM",
    "Block",
    "CompressionState",
    "PNormState",
    "Cross",
    "Groups",
    "Heads",
    "Layout",
    "Reuse",
    "as_optax",
    "boundary",
    "chain",
    "entering",
    "hyper",
    "identity",
    "keep_params",
    "kth_largest",
    "labelled",
    "layout",
    "masked",
    "named",
    "no_penalty",
    "optimizer",
    "pnorm_decay",
    "state_of",
    "straddling",
    "strong",
    "survivors",
    "update_state",
    "with_hyper",
]
