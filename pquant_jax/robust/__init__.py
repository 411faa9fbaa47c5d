"""Level 6: what flipped bits do to a finished model, and which bits are worth protecting."""

from pquant_jax.robust._flips import Injection, flip, flip_values, inject, injector
from pquant_jax.robust._replay import Format
from pquant_jax.robust._sensitivity import (
    Ranking,
    Sensitivity,
    bit_sensitivity,
    bit_steps,
    by_bit,
    eigenpairs,
    protect,
    random_scores,
    rank,
)

__all__ = [
    "Format",
    "Injection",
    "Ranking",
    "Sensitivity",
    "bit_sensitivity",
    "bit_steps",
    "by_bit",
    "eigenpairs",
    "flip",
    "flip_values",
    "inject",
    "injector",
    "protect",
    "random_scores",
    "rank",
]
