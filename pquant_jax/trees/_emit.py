"""Nodes of a graph as they are made, and comparisons with constants as look-up tables.  numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pquant_jax.lower.ir import Node
from pquant_jax.trees._quantize import QuantizedForest

_FIRST: Final = 6  # bits of x in the first table of a comparison; the answer of the one before takes one of the next


@dataclass
class Emit:
    """Nodes so far; the values that are there, side by side in the node `pool`, and where."""

    nodes: list[Node] = field(default_factory=list)
    pool: int = -1
    place: dict[int, int] = field(default_factory=dict)

    def node(self, op: str, inputs: tuple[int, ...], shape: tuple[int, ...], name: str = "", **attrs: Any) -> int:
        self.nodes.append(Node(op, inputs, shape, attrs, name))
        return len(self.nodes) - 1

    def const(self, value: Any) -> int:
        value = np.asarray(value, np.float64)
        return self.node("const", (), value.shape, value=value)

    def take(self, values: Any, name: str = "") -> int:
        """Values of the pool by their numbers, an array in which -1 is 0."""
        index = np.array([self.place[v] if v >= 0 else -1 for v in np.ravel(values)], np.int64).reshape(np.shape(values))
        return self.node("take", (self.pool,), index.shape, name, index=index)

    def put(self, made: list[tuple[int, list[int]]]) -> None:
        """More values into the pool: (node, the numbers of what it holds)."""
        parts = ([self.pool] if self.pool >= 0 else []) + [node for node, _ in made]
        if not parts:
            return
        for number in (v for _, numbers in made for v in numbers):
            self.place[number] = len(self.place)
        self.pool = self.node("concat", tuple(parts), (len(self.place),))


def less(emit: Emit, x: int, made: QuantizedForest, feature: np.ndarray, limit: np.ndarray) -> int:
    """x[feature] < limit (codes of the port) as a node (n,): x is cut into digits, from the lowest bit that matters.

    A digit below that of the limit decides, a higher one too, an equal one leaves it to the digits behind.  16 bits are three
    tables one after the other, 4.3 LUTs of Yosys; as a difference they are a carry chain of 13 bits (4.6 CARRY4).
    """
    k, i, f = (v[feature] for v in (made.inputs.k, made.inputs.i, made.inputs.f))
    width = k + i + f
    low = np.where(limit == 0, width - 1, np.minimum(trailing_zeros(limit), width - 1))
    active, before, behind = np.arange(len(feature)), -1, np.zeros(0, np.int64)
    parts: list[int] = []
    order: list[np.ndarray] = []
    while len(active):
        high = np.minimum(low + (_FIRST if before < 0 else _FIRST - 1), width[active])
        top = high == width[active]
        form: dict[str, Any] = {
            "k": np.where(top, k[active], 0), "i": np.where(top, i[active], high - f[active]), "f": f[active] - low,
        }  # fmt: skip
        seen = emit.node("take", (x,), active.shape, "trees/feature", index=feature[active])
        digit = emit.node("quantize", (seen,), active.shape, "trees/digit", **form, rounding="TRN", overflow="WRAP")
        own = limit[active] >> low
        own = np.where(top, own, own & (np.left_shift(1, high - low) - 1))
        below = _digits(emit, digit, form, own)
        if before >= 0:
            rest = emit.node("take", (before,), active.shape, index=behind)
            below = emit.node("select", (rest, below, _digits(emit, digit, form, own + 1)), active.shape, "trees/compare")
        if top.any():
            parts.append(emit.node("take", (below,), (int(top.sum()),), index=np.flatnonzero(top)))
            order.append(active[top])
        before, behind, active, low = below, np.flatnonzero(~top), active[~top], high[~top]
    joined = emit.node("concat", tuple(parts), feature.shape)
    return emit.node("take", (joined,), feature.shape, "trees/compare", index=np.argsort(np.concatenate(order)))


def trailing_zeros(v: np.ndarray) -> np.ndarray:
    """Zeros below the lowest 1 of the integers `v`, int64; -1 for 0."""
    return np.frexp((v & -v).astype(np.float64))[1].astype(np.int64) - 1


def _digits(emit: Emit, digit: int, form: dict[str, Any], limit: np.ndarray) -> int:
    """digit < limit, as tables of one bit."""
    bits = form["k"] + form["i"] + form["f"]
    number = np.arange(1 << int(bits.max()))
    value = number - np.where(form["k"] > 0, np.left_shift(1, bits - 1), 0)[:, None]
    entries = (value < limit[:, None]).astype(np.int64)
    where = np.arange(len(limit))
    return emit.node("table", (digit,), limit.shape, codes=entries, which=where, f_out=np.zeros_like(where), **form)
