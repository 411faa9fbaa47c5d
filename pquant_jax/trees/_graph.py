"""A quantized forest as a fixed-point graph: comparisons, multiplexers, tables, a sum per output.  numpy only.

A question (feature, threshold) is asked once, however many trees ask it, and what two subtrees compute alike is there
once.  A subtree of at most `table_bits` levels becomes the number of the leaf that is reached, one bit per level, and a
table of its leaves: 4 levels and leaves of 8 bits are 4 multiplexed bits and 8 look-up tables of the FPGA, where
multiplexers of the values themselves are 8 trees of 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.ir import CODE_LIMIT, Graph, validate
from pquant_jax.trees._emit import Emit, less, trailing_zeros
from pquant_jax.trees._forest import Forest, heights
from pquant_jax.trees._quantize import QuantizedForest, codes

TABLE_BITS: Final = 6  # inputs of a look-up table of the FPGA
_MOST_TABLE_BITS: Final = 12


class _Ask(NamedTuple):
    """1 where x[feature] <= code, as codes of the port."""

    feature: int
    code: int


class _Mux(NamedTuple):
    """`on_true` where the condition is 1, else `on_false`: indices of values."""

    cond: int
    on_false: int
    on_true: int


class _Table(NamedTuple):
    """values[sum of bits[j] * 2^j]; bits: indices of values, values: of 2^len(bits) constants."""

    bits: tuple[int, ...]
    values: tuple[float, ...]


@dataclass
class _Values:
    """Every scalar of the netlist once: a constant (float), `_Ask`, `_Mux` or `_Table`, operands first."""

    items: list[Any] = field(default_factory=list)
    place: dict[Any, int] = field(default_factory=dict)

    def add(self, item: Any) -> int:
        key = (type(item), item)
        if key not in self.place:
            self.place[key] = len(self.items)
            self.items.append(item)
        return self.place[key]

    def mux(self, cond: int, on_false: int | None, on_true: int | None) -> int | None:
        """None stands for a value that nobody reads."""
        if on_false is None or on_true is None or on_false == on_true:
            return on_true if on_false is None else on_false
        if (on_false, on_true) == (self.add(0.0), self.add(1.0)):
            return cond
        return self.add(_Mux(cond, on_false, on_true))


def to_graph(made: QuantizedForest, *, table_bits: int = TABLE_BITS, compare: str = "tables") -> Graph:
    """The graph of `made`: input (features,), output (outputs,), the scores; nothing in it rounds.

    table_bits: levels of a tree that become one table, 0 for multiplexers alone.  compare: "tables" (see `_emit.less`), or
    "lt" for one node of comparisons, which RTL computes as differences.
    Raises: LoweringError for more than 12 bits, another `compare`, or for leaves of more than 31 bits with tables.
    """
    if not 0 <= table_bits <= _MOST_TABLE_BITS:
        raise LoweringError(f"table_bits is {table_bits}, expected 0 (multiplexers alone) to {_MOST_TABLE_BITS}")
    if compare not in ("tables", "lt"):
        raise LoweringError(f"compare is {compare!r}, expected 'tables' or 'lt'")
    forest, f = made.forest, int(made.leaves.f)
    if table_bits and np.ldexp(np.abs(forest.value).max(initial=0), f) >= CODE_LIMIT:
        raise LoweringError("tables hold leaves of at most 31 bits; give leaves a coarser format, or table_bits=0")
    values, roots = _values(made, table_bits)
    return _emitted(made, values, roots, f, compare)


def _values(made: QuantizedForest, table_bits: int) -> tuple[_Values, list[int]]:
    """(every scalar, the value of every tree)."""
    forest, limits, values = made.forest, codes(made), _Values()
    height = heights(forest)
    bits: dict[int, list[int | None]] = {}  # of a subtree: which way at each level, the last question first
    found: dict[int, int] = {}
    for j in range(len(forest.feature) - 1, -1, -1):  # children come behind their parents
        left, right = int(forest.left[j]), int(forest.right[j])
        if forest.feature[j] < 0:
            found[j], bits[j] = values.add(float(forest.value[j])), []
            continue
        ask = values.add(_Ask(int(forest.feature[j]), int(limits[j])))
        if height[j] > table_bits:
            found[j] = _known(values.mux(ask, found[right], found[left]))
            continue
        below = [[None] * int(height[j] - 1 - len(b)) + b for b in (bits[right], bits[left])]
        bits[j] = [values.mux(ask, no, yes) for no, yes in zip(*below, strict=True)] + [ask]
        found[j] = _read(values, bits[j], _entries(forest, j, height))
    return values, [found[int(j)] for j in forest.root]


def _known(value: int | None) -> int:
    if value is None:
        raise LoweringError("a tree without a leaf; report the forest to the authors of pquant_jax")
    return value


def _entries(forest: Forest, node: int, height: np.ndarray) -> list[float]:
    """The leaves of the subtree by number: the first question is the highest bit, yes is 1; a leaf repeats below its level."""
    if forest.feature[node] < 0:
        return [float(forest.value[node])]
    half = 1 << int(height[node] - 1)
    out: list[float] = []
    for child in (forest.right[node], forest.left[node]):
        own = _entries(forest, int(child), height)
        out += [v for v in own for _ in range(half // len(own))]
    return out


def _read(values: _Values, bits: Sequence[int | None], entries: list[float]) -> int:
    """The table of `entries` at `bits`, or what it comes to."""
    if len(set(entries)) == 1:
        return values.add(entries[0])
    return values.add(_Table(tuple(_known(b) for b in bits), tuple(entries)))


def _operands(item: Any) -> tuple[int, ...]:
    return item.bits if isinstance(item, _Table) else tuple(item) if isinstance(item, _Mux) else ()


def _levels(values: _Values, roots: Sequence[int]) -> list[list[int]]:
    """What the roots need, by the longest chain of operands; level 0 are constants and questions."""
    needed, height = set(roots), [0] * len(values.items)
    for j in range(len(values.items) - 1, -1, -1):
        if j in needed:
            needed.update(_operands(values.items[j]))
    out: list[list[int]] = [[]]
    for j in sorted(needed):
        height[j] = 1 + max((height[m] for m in _operands(values.items[j])), default=-1)
        out += [[] for _ in range(height[j] + 1 - len(out))]
        out[height[j]].append(j)
    return out


def _emitted(made: QuantizedForest, values: _Values, roots: list[int], f: int, compare: str) -> Graph:
    forest, emit = made.forest, Emit()
    x = emit.node("input", (), (forest.features,), "trees/input", **{key: getattr(made.inputs, key) for key in "kif"})
    first, *later = _levels(values, roots)
    emit.put(_ground(made, values, first, emit, x, compare))
    for number, level in enumerate(later, 1):
        muxes = [j for j in level if isinstance(values.items[j], _Mux)]
        tables = [j for j in level if isinstance(values.items[j], _Table)]
        parts = []
        if muxes:
            sides = [emit.take([values.items[j][side] for j in muxes]) for side in range(3)]
            parts.append((emit.node("select", tuple(sides), (len(muxes),), f"trees/select_{number}"), muxes))
        if tables:
            parts.append((_tables(emit, [values.items[j] for j in tables], f, f"trees/leaves_{number}"), tables))
        emit.put(parts)
    outputs, trees = len(forest.base), [np.array(roots)[forest.output == o] for o in range(len(forest.base))]
    rows = np.full((outputs, max(map(len, trees))), -1)
    for row, own in zip(rows, trees, strict=True):
        row[: len(own)] = own
    total = emit.node("sum", (emit.take(rows),), (outputs,), "trees/sum") if rows.size else emit.const(np.zeros(outputs))
    scores = emit.node("add", (total, emit.const(forest.base)), (outputs,), "trees/scores")
    return validate(Graph(tuple(emit.nodes), (x,), (scores,)))


def _ground(
    made: QuantizedForest, values: _Values, level: list[int], emit: Emit, x: int, compare: str
) -> list[tuple[int, list[int]]]:
    """The questions, as x < threshold + one step (whose trailing zeros cost nothing), and the constants."""
    asks = [j for j in level if isinstance(values.items[j], _Ask)]
    constants = [j for j in level if not isinstance(values.items[j], _Ask)]
    parts = []
    if asks:
        feature = np.array([values.items[j].feature for j in asks], np.int64)
        limit = np.array([values.items[j].code + 1 for j in asks], np.int64)
        if compare == "tables":
            parts.append((less(emit, x, made, feature, limit), asks))
        else:
            seen = emit.node("take", (x,), feature.shape, "trees/feature", index=feature)
            value = emit.const(np.ldexp(limit.astype(np.float64), -made.inputs.f[feature]))
            parts.append((emit.node("lt", (seen, value), feature.shape, "trees/compare"), asks))
    if constants:
        parts.append((emit.const([values.items[j] for j in constants]), constants))
    return parts


def _tables(emit: Emit, tables: list[_Table], f: int, name: str) -> int:
    width = np.array([len(t.bits) for t in tables], np.int64)
    bits = np.full((len(tables), int(width.max())), -1)
    entries = np.zeros((len(tables), 1 << int(width.max())), np.int64)
    for row, own, table in zip(bits, entries, tables, strict=True):
        row[: len(table.bits)] = table.bits
        own[: len(table.values)] = np.ldexp(table.values, f)
    weights = np.broadcast_to(2.0 ** np.arange(bits.shape[1]), bits.shape)
    weighed = emit.node("mul", (emit.take(bits), emit.const(weights)), bits.shape)
    which = emit.node("sum", (weighed,), width.shape, f"{name}/number")
    zero = np.zeros_like(width)
    return emit.node(
        "table", (which,), width.shape, name, k=zero, i=width, f=zero, codes=entries, which=np.arange(len(tables)),
        f_out=np.full(len(tables), f, np.int64),
    )  # fmt: skip


def question_luts(made: QuantizedForest, feature: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Look-up tables of the questions x[feature] <= code: 0.28 per bit of x that the comparison reads, at least one.

    x < code + 1 doesn't read the bits below the lowest 1 of code + 1.  Measured by Yosys on random limits: 4.3 for 16 bits,
    1.6 for 8.
    """
    limit = np.asarray(code, np.int64) + 1
    width = (made.inputs.k + made.inputs.i + made.inputs.f)[feature]
    read = width - np.where(limit == 0, width - 1, np.minimum(trailing_zeros(limit), width - 1))
    return np.maximum(0.28 * read, 1.0)


def luts(made: QuantizedForest, *, table_bits: int = TABLE_BITS) -> float:
    """About how many look-up tables the netlist of `to_graph` has: questions, multiplexers, leaves, adders.

    A question: `question_luts`.  A multiplexer: half a LUT6 per bit.  A table: one per bit of its leaves, twice as many per
    level above 6.  An adder: one per bit.
    """
    forest, f = made.forest, int(made.leaves.f)
    values, roots = _values(made, table_bits)
    needed = [values.items[j] for level in _levels(values, roots) for j in level]
    asks = np.array([item for item in needed if isinstance(item, _Ask)], np.int64).reshape(-1, 2)
    total = float(question_luts(made, asks[:, 0], asks[:, 1]).sum())
    width = _bits(np.ptp(forest.value), f) if table_bits == 0 else 1
    for item in needed:
        if isinstance(item, _Mux):
            total += 0.5 * width
        elif isinstance(item, _Table):
            total += _bits(max(item.values) - min(*item.values, 0.0), f) * 2.0 ** max(len(item.bits) - TABLE_BITS, 0)
    ends = np.append(forest.root, len(forest.feature))
    spans = np.array([np.ptp(forest.value[start:end]) for start, end in zip(ends[:-1], ends[1:], strict=True)])
    for o in range(len(forest.base)):
        own = spans[forest.output == o]
        total += max(len(own) - 1, 0) * _bits(own.sum(), f)
    return total


def _bits(span: float, f: int) -> int:
    """Bits that hold 0 to span on the grid 2^-f."""
    return int(np.ldexp(span, f)).bit_length()
