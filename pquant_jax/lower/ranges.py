"""Interval and grid of every value of a `Graph`: the proof that a float32 or float64 evaluation of it is exact.

numpy only.  The bounds are exact (each is a value that interval arithmetic can't improve without knowing how operands
are correlated), hence an element with `low == high` is a constant, which the backends fold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.ir import Graph, Node, consumers, entries, label
from pquant_jax.numerics.oracle import least_f, quantize, round_codes

_NO_GRID: Final = -(1 << 20)  # the f of an exact zero, which lies on every grid
Ranges = Sequence[tuple[Any, Any]]
ACCUMULATORS: Final = ("dot", "sum", "add", "sub", "mul")


class Interval(NamedTuple):
    """Bounds of one tensor: `low <= value <= high` and `value * 2^f` an integer, elementwise; f is 0 where it is always 0."""

    low: np.ndarray
    high: np.ndarray
    f: np.ndarray


def intervals(graph: Graph, input_ranges: Ranges | None = None) -> list[Interval]:
    """The `Interval` of every node, arrays of the node's shape.

    Ports may hold any of their codes unless `input_ranges` says what arrives: one (low, high) per input, each broadcast
    to its shape, as real numbers in front of the port; an element whose range leaves the port wraps, so it has all codes.

    A `quantize` that can overflow is clipped (SAT, SAT_SYM) or has its whole range (WRAP, WRAP_SM).  Raises
    `LoweringError` for a constant that isn't finite, for a table whose input can leave the table's format, and for ranges
    that are none.
    """
    known: list[Interval] = []
    arrives = arriving(graph, input_ranges)
    for index, node in enumerate(graph.nodes):
        if node.op == "const" and not np.isfinite(node.attrs["value"]).all():
            raise LoweringError(
                f"{label(graph, index)}: holds NaN or infinity, which is on no fixed-point grid; check the parameters"
            )
        if node.op == "table":
            _check_table(graph, index, known[node.inputs[0]])
        own = _interval(node, [known[j] for j in node.inputs])
        if node.op == "input" and index in arrives:
            low, high = arrives[index]
            fits = (low >= own.low) & (high <= own.high)
            own = _make(np.where(fits, low, own.low), np.where(fits, high, own.high), own.f)
        known.append(Interval(*map(np.asarray, own)))  # numpy makes numbers of arrays without axes
    return known


def arriving(graph: Graph, input_ranges: Ranges | None) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Per input node the range `input_ranges` on its grid (a port truncates); empty without ranges."""
    if input_ranges is None:
        return {}
    if len(input_ranges) != len(graph.inputs):
        raise LoweringError(
            f"the graph has {len(graph.inputs)} inputs, got {len(input_ranges)} ranges; pass one (low, high) per input"
        )
    out = {}
    for index, bounds in zip(graph.inputs, input_ranges, strict=True):
        node = graph.nodes[index]
        try:
            low, high = (np.broadcast_to(np.asarray(v, np.float64), node.shape) for v in bounds)
        except ValueError as error:
            raise LoweringError(f"{label(graph, index)}: its range must broadcast to {node.shape}, {error}") from error
        if not (low <= high).all() or not np.isfinite(low).all() or not np.isfinite(high).all():
            raise LoweringError(f"{label(graph, index)}: its range must be finite, with low <= high everywhere")
        f = np.asarray(node.attrs["f"], np.int64)
        out[index] = tuple(np.ldexp(np.floor(np.ldexp(v, f)), -f) for v in (low, high))
    return out


def _interval(node: Node, ins: list[Interval]) -> Interval:
    op = node.op
    if op == "input":
        return port_bounds(node)
    if op == "const":
        value = np.asarray(node.attrs["value"], np.float64)
        return Interval(value, value, least_f(value))
    if op == "quantize":
        return _quantize(node, ins[0])
    if op == "table":
        return _table(node, ins[0])
    if op == "take":
        index = np.asarray(node.attrs["index"])
        return Interval(*(np.append(v.ravel(), 0)[index] for v in ins[0]))
    if op == "concat":
        return Interval(*(np.concatenate([v.ravel() for v in parts]) for parts in zip(*ins, strict=True)))
    if op == "dot":
        return _dot(*ins)
    if op in ("sum", "amax", "amin"):
        reduce = {"sum": np.sum, "amax": np.max, "amin": np.min}[op]
        return _make(reduce(ins[0].low, -1), reduce(ins[0].high, -1), _grid(ins[0]).max(-1, initial=_NO_GRID))
    if op in ("ge", "gt", "le", "lt", "eq", "ne"):
        return _compare(op, *ins)
    if op == "select":
        return _select(*ins)
    if op == "mul":
        return _square(ins[0]) if node.inputs[0] == node.inputs[1] else _mul(*ins)
    return _additive(op, ins)


def _make(low: np.ndarray, high: np.ndarray, f: np.ndarray) -> Interval:
    zero = (low == 0) & (high == 0)
    return Interval(low + 0.0, high + 0.0, np.where(zero, 0, f).astype(np.int64))


def _grid(a: Interval) -> np.ndarray:
    """f with exact zeros on the coarsest grid, so that they never refine the grid of a sum or maximum."""
    return np.where((a.low == 0) & (a.high == 0), _NO_GRID, a.f)


def port_bounds(node: Node) -> Interval:
    """All values that an `input` node holds."""
    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    low, high = format_bounds(k, i, f)
    return _make(low, high, f)


def format_bounds(k: np.ndarray, i: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of the format; both 0 where k + i + f <= 0."""
    alive = k + i + f > 0
    high = np.where(alive, np.ldexp(1.0, i) - np.ldexp(1.0, -f), 0.0)
    return np.where(alive, -k * np.ldexp(1.0, i), 0.0), high


def narrowest(own: Interval) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, i, f of every element, int64: the format of the fewest bits that holds its interval; all 0 where it is always 0.

    k = low < 0; i is the least with max(-low, high + 2^-f) <= 2^i and k + i + f > 0.

    >>> codes = Interval(np.array([-2.0, 0.0, 0.0]), np.array([1.5, 0.75, 0.0]), np.array([1, 2, 0]))
    >>> [v.tolist() for v in narrowest(codes)]
    [[1, 0, 0], [1, 0, 0], [1, 2, 0]]
    """
    low, high, f = own
    zero = (low == 0) & (high == 0)
    f = np.where(zero, 0, f).astype(np.int64)
    k = (low < 0).astype(np.int64)
    span = np.maximum(-low, np.where(high > 0, high + np.ldexp(1.0, -f), 0.0))
    _, exponent = np.frexp(np.where(zero, 1.0, span))
    i = exponent - (np.ldexp(0.5, exponent) == span)  # least i with span <= 2^i
    return k, np.where(zero, 0, np.maximum(i, 1 - k - f)).astype(np.int64), f


def common_format(own: Interval) -> tuple[int, int, int]:
    """k, i, f of the fewest bits that hold every element; (0, 0, 0) if all are always 0.

    >>> common_format(Interval(np.array([-2.0, 0.0]), np.array([1.5, 0.75]), np.array([1, 2])))
    (1, 1, 2)
    """
    k, i, f = (np.atleast_1d(v).ravel() for v in narrowest(own))
    used = k + i + f > 0
    return (int(k.max()), int(i[used].max()), int(f[used].max())) if used.any() else (0, 0, 0)


def quantize_acts(node: Node, x: Interval) -> tuple[np.ndarray, np.ndarray]:
    """Where the `quantize` node with the input `x` can (round, overflow), bool arrays: elsewhere those modes don't matter.

    A zero-width format does both, unless `x` is always 0.
    """
    at = node.attrs
    k, i, f = (np.asarray(at[a]).astype(np.int64) for a in "kif")
    rounds = _grid(x) > f
    low, high = (np.ldexp(round_codes(np.ldexp(v, f), str(at["rounding"])), -f) for v in x[:2])
    lowest, highest = format_bounds(k, i, f)
    if str(at["overflow"]) == "SAT_SYM":
        lowest = -highest * k
    return rounds, (low < lowest) | (high > highest)


def _quantize(node: Node, x: Interval) -> Interval:
    at = node.attrs
    k, i, f = (np.asarray(at[a]).astype(np.int64) for a in "kif")
    rounding, overflow = str(at["rounding"]), str(at["overflow"])
    low, high = (quantize(v, k, i, f, rounding=rounding, overflow=overflow) for v in x[:2])
    _, overflows = quantize_acts(node, x)
    grid = np.minimum(f, _grid(x))
    if overflow == "WRAP":  # subtracting periods 2^(i+k) leaves a coarse grid coarse
        whole = overflows & (x.low != x.high)
        lowest, highest = format_bounds(k, i, np.maximum(grid, -(i + k)))
        return _make(np.where(whole, lowest, low), np.where(whole, highest, high), grid)
    if overflow == "WRAP_SM":
        whole = overflows & (x.low != x.high)
        lowest, highest = format_bounds(k, i, f)
        low, high = np.where(whole, lowest, low), np.where(whole, highest, high)
    return _make(low, high, np.where(overflows, f, grid))


def _check_table(graph: Graph, index: int, x: Interval) -> None:
    node = graph.nodes[index]
    f = np.asarray(node.attrs["f"], np.int64)
    bad = entries(node, x.low)[1] | entries(node, x.high)[1] | (_grid(x) > f)
    if bad.any():
        at = tuple(int(j) for j in np.argwhere(bad)[0])
        form = ", ".join(f"{key}={int(np.asarray(node.attrs[key])[at])}" for key in "kif")
        raise LoweringError(
            f"{label(graph, index)}: its input, element {at}, is a multiple of 2^{-int(x.f[at])} in "
            f"[{x.low[at]:g}, {x.high[at]:g}], the table is made for ({form}); put a quantizer of that format in front of it"
        )


def _table(node: Node, x: Interval) -> Interval:
    """Bounds and grid of exactly those entries that lie in the interval and on the grid of `x`."""
    f, codes, which, f_out = (np.asarray(node.attrs[key], np.int64) for key in ("f", "codes", "which", "f_out"))
    stride = np.left_shift(1, np.clip(f - x.f, 0, 40))
    reads = np.stack([np.ravel(v) for v in (which, entries(node, x.low)[0], entries(node, x.high)[0], stride)], axis=1)
    kinds, back = np.unique(reads, axis=0, return_inverse=True)  # few: elements of one channel read alike
    found = np.zeros((len(kinds), 3), np.int64)
    for j, (row, first, last, step) in enumerate(kinds):
        met = codes[row, first : last + 1 : step]
        found[j] = met.min(), met.max(), np.bitwise_or.reduce(met)
    low, high, bits = found[back.ravel()].T.reshape(3, *node.shape)
    # codes that share trailing zeros lie on a coarser grid
    trailing = np.where(bits == 0, 0, np.frexp((bits & -bits).astype(np.float64))[1] - 1)
    scale = -f_out[which]
    return _make(np.ldexp(low.astype(np.float64), scale), np.ldexp(high.astype(np.float64), scale), -scale - trailing)


def _products(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of x * y with x in [a, b] and y in [c, d]."""
    corners = (a * c, a * d, b * c, b * d)
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _mul(a: Interval, b: Interval) -> Interval:
    low, high = _products(a.low, a.high, b.low, b.high)
    return _make(low, high, a.f + b.f)


def _square(a: Interval) -> Interval:
    ends = (a.low * a.low, a.high * a.high)
    spans = (a.low < 0) & (a.high > 0)
    return _make(np.where(spans, 0.0, np.minimum(*ends)), np.maximum(*ends), 2 * a.f)


def _dot(a: Interval, c: Interval) -> Interval:
    """Bounds of `a @ c`: one operand is nearly always constant, and then two matrix products give them."""
    f = np.maximum(_dot_grid(_grid(a), _grid(c)), _NO_GRID)
    if np.array_equal(c.low, c.high):
        plus, minus = np.maximum(c.low, 0), np.minimum(c.low, 0)
        return _make(a.low @ plus + a.high @ minus, a.high @ plus + a.low @ minus, f)
    if np.array_equal(a.low, a.high):
        plus, minus = np.maximum(a.low, 0), np.minimum(a.low, 0)
        return _make(plus @ c.low + minus @ c.high, plus @ c.high + minus @ c.low, f)
    low, high = (np.empty(a.low.shape[:2] + c.low.shape[2:]) for _ in range(2))
    for at in np.ndindex(a.low.shape[:2]):  # row by row: the products of all rows at once would be k times the output
        row = _products(a.low[at][:, None], a.high[at][:, None], c.low[at[0]], c.high[at[0]])
        low[at], high[at] = row[0].sum(0), row[1].sum(0)
    return _make(low, high, f)


def _dot_grid(fa: np.ndarray, fc: np.ndarray) -> np.ndarray:
    """max over k of fa[b, m, k] + fc[b, k, n]."""
    out = np.empty(fa.shape[:2] + fc.shape[2:], np.int64)
    for at in np.ndindex(fa.shape[:2]):
        out[at] = (fa[at][:, None] + fc[at[0]]).max(0, initial=_NO_GRID)
    return out


def _additive(op: str, ins: list[Interval]) -> Interval:
    a = ins[0]
    if op == "neg":
        return _make(-a.high, -a.low, a.f)
    if op == "abs":
        ends = (np.abs(a.low), np.abs(a.high))
        spans = (a.low < 0) & (a.high > 0)
        return _make(np.where(spans, 0.0, np.minimum(*ends)), np.maximum(*ends), a.f)
    b = ins[1]
    f = np.maximum(_grid(a), _grid(b))
    if op == "add":
        return _make(a.low + b.low, a.high + b.high, f)
    if op == "sub":
        return _make(a.low - b.high, a.high - b.low, f)
    pick = {"max": np.maximum, "min": np.minimum}[op]
    return _make(pick(a.low, b.low), pick(a.high, b.high), f)


def _compare(op: str, a: Interval, b: Interval) -> Interval:
    if op in ("lt", "le"):
        op, a, b = {"lt": "gt", "le": "ge"}[op], b, a
    if op in ("gt", "ge"):
        hold = np.greater if op == "gt" else np.greater_equal
        always, never = hold(a.low, b.high), ~hold(a.high, b.low)
    else:
        apart = (a.high < b.low) | (b.high < a.low)
        same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
        always, never = (same, apart) if op == "eq" else (apart, same)
    low, high = always.astype(np.float64), (~never).astype(np.float64)
    return _make(low, high, np.zeros(low.shape, np.int64))


def _select(cond: Interval, no: Interval, yes: Interval) -> Interval:
    true, false = (cond.low > 0) | (cond.high < 0), (cond.low == 0) & (cond.high == 0)
    low = np.where(true, yes.low, np.where(false, no.low, np.minimum(no.low, yes.low)))
    high = np.where(true, yes.high, np.where(false, no.high, np.maximum(no.high, yes.high)))
    f = np.where(true, _grid(yes), np.where(false, _grid(no), np.maximum(_grid(no), _grid(yes))))
    return _make(low, high, f)


def accumulator_bits(graph: Graph) -> dict[int, np.ndarray]:
    """Significand bits, int64 of the node's shape, that hold every partial sum of each dot, sum, add, sub and mul node.

    bits = ceil(log2(max |partial sum| * 2^f)); of dot and sum the partial sums are bounded by sum(|term|), so that any
    order of summation is covered.  A float with that many significand bits (24, 53) computes the node exactly.
    """
    bits = _significand_bits(graph, intervals(graph))
    return {index: b for index, b in enumerate(bits) if graph.nodes[index].op in ACCUMULATORS}


def _significand_bits(graph: Graph, known: list[Interval]) -> list[np.ndarray]:
    out = []
    for node, own in zip(graph.nodes, known, strict=True):
        ins = [known[j] for j in node.inputs]
        bound, f = _magnitude(own), own.f
        if node.op == "sum":
            bound, f = _magnitude(ins[0]).sum(-1), _grid(ins[0]).max(-1, initial=_NO_GRID)
        elif node.op == "dot":
            bound, f = _magnitude(ins[0]) @ _magnitude(ins[1]), _dot_grid(*map(_grid, ins))
        elif node.op in ("add", "sub"):  # a sum whose terms cancel to a constant still has to be formed on the finer grid
            f = np.maximum(*map(_grid, ins))
        codes = np.ldexp(bound, np.where(bound == 0, 0, f))
        # float64 can't tell a bound of 2^53 from 2^53 + 1, so that one counts as 54 bits
        out.append(np.ceil(np.log2(np.maximum(codes, 1))).astype(np.int64) + (codes == 1) + (codes == 2.0**53))
    return out


def _magnitude(a: Interval) -> np.ndarray:
    return np.maximum(np.abs(a.low), np.abs(a.high))


def check_float32(graph: Graph) -> None:
    """Raise `LoweringError` when some value or partial sum of `graph` needs more than the 24 bits of a float32.

    The JAX forward in float32 is bit-identical to the netlist exactly when this passes.
    """
    _check_bits(graph, 24, "float32", "the float32 forward would round it, so training and netlist would differ")


def check_exact(graph: Graph) -> None:
    """Raise `LoweringError` when some value or partial sum of `graph` needs more than the 53 bits of the emulator's float64."""
    _check_bits(graph, 53, "float64", "the emulator could not be the reference")


def _check_bits(graph: Graph, limit: int, kind: str, why: str) -> None:
    known = intervals(graph)
    for index, bits in enumerate(_significand_bits(graph, known)):
        if bits.size == 0 or bits.max() <= limit:
            continue
        at = tuple(int(j) for j in np.unravel_index(bits.argmax(), bits.shape))
        node, own = graph.nodes[index], known[index]
        where = f" in layer {layer!r}" if (layer := _layer_names(graph)[index]) else ""
        raise LoweringError(
            f"{label(graph, index)}{where}: element {at} needs {bits.max()} bits, {kind} has {limit}: {why}. "
            f"Its range is [{own.low[at]:g}, {own.high[at]:g}]. {_advice(node, int(bits.max()) - limit)}"
        )


def _advice(node: Node, excess: int) -> str:
    if node.op in ("quantize", "input"):
        return f"Give this {'port' if node.op == 'input' else 'quantizer'} {excess} fewer bits (i + f)"
    if node.op == "const":
        return f"Quantize this parameter with {excess} fewer fractional bits"
    return (
        f"Use {excess} fewer fractional bits at the activation site that feeds it or in its kernel, or prune more of the kernel"
    )


def _layer_names(graph: Graph) -> list[str]:
    """Per node the model layer: its own name without the last part, else that of the nearest named node behind it, else before
    it; "" without any.  `cost.layer_names` looks before it alone, for there a layer pays for what it computes."""
    own = [(0, node.name) if node.name else None for node in graph.nodes]
    behind, before = [*own], [*own]
    readers = consumers(graph)
    for j in reversed(range(len(own))):
        behind[j] = own[j] or _next(behind[m] for m in readers[j])
    for j, node in enumerate(graph.nodes):
        before[j] = own[j] or _next(before[m] for m in node.inputs)
    found = (a or b for a, b in zip(behind, before, strict=True))
    return [f[1].rsplit("/", 1)[0] if f else "" for f in found]


def _next(near: Iterable[tuple[int, str] | None]) -> tuple[int, str] | None:
    """One step further than the nearest of what is there, the first of several."""
    there = [f for f in near if f is not None]
    return min(((steps + 1, name) for steps, name in there), key=lambda f: f[0], default=None)
