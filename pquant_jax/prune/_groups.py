"""Groups are shared with the constraints, so they live one level down; pruning methods find them here."""

from pquant_jax.transforms._groups import NM, Block, Cross, Groups, Heads, Layout, Reuse, layout, straddling, survivors

__all__ = ["NM", "Block", "Cross", "Groups", "Heads", "Layout", "Reuse", "layout", "straddling", "survivors"]
