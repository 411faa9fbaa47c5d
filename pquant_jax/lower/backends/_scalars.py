"""Exact operators on single variables of da4ml or alkaid: what the packages lack, and what they get wrong at the edges.

A scalar is a variable or, where it is constant, a Python float.  Neither package is imported: only methods of the variables.
These defects of da4ml 0.6.0 and alkaid 0.8.2 are avoided here, each seen as a mismatch against the emulator on random graphs:

* a constant variable is taken for a varying one by `abs` and as the key of a multiplexer: constants are floats;
* a multiplexer whose first branch is constant and whose second is negated negates the wrong one: `select`;
* its interpreter misreads the top bit of an unsigned multi-bit key, and wrapping a negative value into a wider unsigned
  format loses the sign extension: `select`, `wrap`;
* constants added one after the other become one, and factors of one value become one, of which alkaid keeps the 24 bits
  of a float32: `add`, `mul`.

Rounding modes beyond TRN and RND, and WRAP_SM (h = 2^(-f-1); e = 2^-fx with fx the grid of x):

=========== ============================================================
RND_MIN_INF TRN(x + h - e)
RND_CONV    TRN(x + h - e + e * b), b: the bit of x of weight 2^-f
TRN_ZERO    TRN(x + (x < 0 ? 2h - e : 0))
RND_ZERO    TRN(x + h - (x < 0 ? 0 : e))
RND_INF     TRN(x + h - (x < 0 ? e : 0))
WRAP_SM     m < P ? low + m : low + 2P - 2h - m, m = (x - low) mod 2P, P: the length of the range
=========== ============================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from pquant_jax.lower.ranges import least_f
from pquant_jax.numerics.oracle import quantize, significant_bits

MAX_CONSTANT_BITS: Final = 24  # both packages' matrix solvers cast kernels to float32, alkaid every constant
MAX_APART: Final = 12  # binary orders of magnitude between two operands


def add(a: Any, b: Any) -> Any:
    """a + b.

    The result counts in the power of two of the first positive operand.  Where they are far apart that has to be the one
    nearer to 1: constants that meet the result later are stored relative to it, and da4ml has 31 bits on either side.
    """
    if isinstance(a, float) or isinstance(b, float):
        return _offset(b, a) if isinstance(a, float) else _offset(a, b)
    ours, theirs = (abs(math.log2(abs(v._factor))) for v in (a, b))
    if abs(ours - theirs) <= MAX_APART:
        return a + b
    if theirs < ours:
        a, b = b, a
    return neg(neg(a) + neg(b)) if a._factor < 0 < b._factor else a + b


def _offset(v: Any, c: float) -> Any:
    """v + c, where two constants that don't fit one are kept apart."""
    if not isinstance(v, float) and v.opr == "cadd":
        parent, scale = v._from[0], float(v._factor) / float(v._from[0]._factor)
        before = float(v.low) - min(float(parent.low) * scale, float(parent.high) * scale)
        if _significant(before + c) > MAX_CONSTANT_BITS:
            v = _apart(v)
    return v + c


def _apart(v: Any) -> Any:
    """`v` as a value of its own, which the package does not see through: a wrap to the format that it has, which is free."""
    return type(v)(v.low, v.high, v.step, _from=(v,), _factor=1.0, opr="wrap", hwconf=v.hwconf)


def _significant(c: float) -> int:
    return int(significant_bits(np.array(c)))


def mul(a: Any, b: Any) -> Any:
    """a * b."""
    if isinstance(a, float):
        a, b = b, a
    if isinstance(a, float) or not isinstance(b, float):
        return a * b
    if _significant(b) > MAX_CONSTANT_BITS:
        first = float(np.float32(b))
        return add(_apart(a) * first, mul(a, b - first))
    return 0.0 if b == 0 else a * b


def neg(a: Any) -> Any:
    """-a: free in a netlist, the sign is carried along."""
    return -a


def sub(a: Any, b: Any) -> Any:
    """a - b."""
    return add(a, neg(b))


def absolute(a: Any) -> Any:
    """|a|."""
    if isinstance(a, float) or a.low >= 0:
        return abs(a) if isinstance(a, float) else a
    return select(is_negative(a), a, neg(a), (0.0, float(max(-a.low, a.high)), float(a.step)))


def maximum(a: Any, b: Any) -> Any:
    """The larger one; a comparison with 0 is a relu, which needs no adder."""
    if isinstance(a, float):
        a, b = b, a
    if isinstance(b, float) and (isinstance(a, float) or b == 0):
        return max(a, b) if isinstance(a, float) else fold(a.relu())
    (a_low, a_high, a_step), (b_low, b_high, b_step) = _bounds(a), _bounds(b)
    if a_low >= b_high or a_high <= b_low:
        return a if a_low >= b_high else b
    return select(greater(b, a), a, b, (max(a_low, b_low), max(a_high, b_high), min(a_step, b_step)))


def _bounds(v: Any) -> tuple[float, float, float]:
    """(low, high, step)."""
    if isinstance(v, float):
        return v, v, 2.0 ** -int(least_f(np.array(v)))
    return float(v.low), float(v.high), float(v.step)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one."""
    return neg(maximum(neg(a), neg(b)))


def fold(v: Any) -> Any:
    """A variable that can hold one value only, as a float."""
    return float(v.low) if not isinstance(v, float) and v.low == v.high else v


def is_negative(a: Any) -> Any:
    """1 where a < 0, else 0."""
    return float(a < 0) if isinstance(a, float) else fold(a.is_negative())


def greater(a: Any, b: Any) -> Any:
    """1 where a > b, else 0."""
    return is_negative(sub(b, a))


def invert(a: Any) -> Any:
    """1 - a for a in {0, 1}."""
    return 1.0 - a if isinstance(a, float) else ~a


def differ(a: Any, b: Any) -> Any:
    """1 where a != b, else 0."""
    difference = sub(a, b)
    return float(difference != 0) if isinstance(difference, float) else difference.unary_bit_op("any")


def select(cond: Any, on_false: Any, on_true: Any, bounds: tuple[float, float, float] | None = None) -> Any:
    """`on_true` where `cond` is not 0; `bounds`: (low, high, step) if known better than the package sees."""
    if isinstance(cond, float):
        return on_true if cond else on_false
    if cond.low < 0 or cond.high > 1 or cond.step < 1:  # a multiplexer looks at the most significant bit alone
        cond = differ(cond, 0.0)
    if isinstance(on_true, float) and isinstance(on_false, float):
        return add(mul(cond, on_true - on_false), on_false)
    if cond.opr == "wrap":  # da4ml would look through it at a wider key, whose sign its interpreter misreads
        cond, on_false, on_true = ~cond, on_true, on_false
    if isinstance(on_true, float) and on_false._factor < 0:  # da4ml would negate the wrong operand
        bounds = None if bounds is None else (-bounds[1], -bounds[0], bounds[2])
        return neg(fold(cond.msb_mux(-on_true, neg(on_false), bounds)))
    return fold(cond.msb_mux(on_true, on_false, bounds))


def reduce_tree(scalar: Callable[[Any, Any], Any], row: Sequence[Any]) -> Any:
    """Apply `scalar` pairwise, earliest operands first, so that the tree is as shallow as the arrival times allow."""
    items = list(row)
    while len(items) > 1:
        items.sort(key=_arrival)
        items = [*items[2:], scalar(items[0], items[1])]
    return items[0]


def _arrival(v: Any) -> tuple[float, int]:
    return (-1.0, 0) if isinstance(v, float) else (v.latency, sum(v.kif[:2]))


SCALAR: Final[dict[str, Callable[..., Any]]] = {
    "add": add, "sub": sub, "mul": mul, "neg": neg, "abs": absolute, "max": maximum, "min": minimum, "select": select,
    "gt": greater, "lt": lambda a, b: greater(b, a),
    "ge": lambda a, b: invert(greater(b, a)), "le": lambda a, b: invert(greater(a, b)),
    "ne": differ, "eq": lambda a, b: invert(differ(a, b)),
}  # fmt: skip


def round_to(x: Any, f: int, fx: int, rounding: str) -> Any:
    """`y` with floor(y * 2^f) = the code of `x` (on the grid 2^-fx, fx > f) under `rounding`; formulas: see the module."""
    half, lsb = 2.0 ** (-f - 1), 2.0**-fx
    if rounding == "TRN":
        return x
    if rounding == "RND":
        return add(x, half)
    if rounding == "RND_MIN_INF":
        return add(x, half - lsb)
    if rounding == "RND_CONV":
        return add(add(x, half - lsb), mul(wrap(x, 0, 1 - f, f), 2.0 ** (f - fx)))
    negative = is_negative(x)
    if rounding == "TRN_ZERO":
        return add(x, mul(negative, 2 * half - lsb))
    if rounding == "RND_ZERO":
        return add(add(x, half - lsb), mul(negative, lsb))
    return sub(add(x, half), mul(negative, lsb))


def clip(x: Any, k: int, i: int, f: int, overflow: str) -> Any:
    """Truncate `x` to the format; (k, i, f) has at least one bit."""
    low, high, period = -k * 2.0**i, 2.0**i - 2.0**-f, (1 + k) * 2.0**i
    if overflow == "WRAP_SM":
        m = wrap(sub(x, low), 0, i + k + 1, f)
        x = select(greater(period, m), sub(low + 2 * period - 2.0**-f, m), add(m, low))
    elif overflow != "WRAP":
        x = minimum(maximum(truncate(x, f), low if overflow == "SAT" else -high * k), high)
    return wrap(x, k, i, f)


def truncate(x: Any, f: int) -> Any:
    """TRN without overflow."""
    k, i, fx = x.kif
    return x if f >= fx else wrap(x, k, max(i, 1 - k - f), f)


def lookup(x: Any, read: Callable[[np.ndarray], np.ndarray], low: float, high: float, f: int) -> Any:
    """`read(x)` as a table; x is known to be a multiple of 2^-f in [low, high], which da4ml may not see.

    Bits of x that are known are dropped (free), so that the table is no larger than it must be.  Entries outside of
    [low, high] are never read: they repeat the nearest one that is, which keeps the result as narrow as can be.
    """
    if isinstance(x, float):
        return float(read(np.array(x)))
    k, step = int(low < 0), 2.0**-f
    x = x.quantize(k, math.ceil(math.log2(max(-low, high + step))), f, "WRAP", "TRN")
    n = round((x.high - x.low) / x.step) + 1
    values = read(np.clip(float(x.low) + float(x.step) * np.arange(n), low, high))
    return float(values[0]) if (values == values[0]).all() else x.lookup(values)


def wrap(x: Any, k: int, i: int, f: int) -> Any:
    """TRN and WRAP; da4ml drops the sign extension when a negative value becomes a wider unsigned one, so it is added."""
    if isinstance(x, float):
        return float(quantize(x, k, i, f, rounding="TRN", overflow="WRAP"))
    if k == 0 and x.low < 0 and 2.0**i > -x.low:
        x = add(x, 2.0**i)
    return fold(x.quantize(k, i, f, "WRAP", "TRN"))
