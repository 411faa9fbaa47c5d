"""The rule of every elementwise, reducing and product equation: which nodes of the graph it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from pquant_jax.graph import TRANSCENDENTAL
from pquant_jax.lower._build import Op, Operand, add, arranged, broadcast, emit, joined, node, numbers, refusal, shape_of, take
from pquant_jax.lower._windows import WINDOW_RULES
from pquant_jax.numerics import lookup_p, mask_p

Rule = Callable[[Op], int | list[int]]

_BINARY: Final = frozenset("add sub mul ge gt le lt eq ne".split())
_REDUCE: Final = {
    "reduce_sum": "sum", "reduce_max": "amax", "reduce_min": "amin", "reduce_and": "amin", "reduce_or": "amax",
}  # fmt: skip
_ROUND: Final = {"floor": "TRN", "round": "RND_CONV"}
_WIDE: Final = 50  # integer bits that no exact value on a grid of whole numbers exceeds: float64 holds 53
TABLES: Final = TRANSCENDENTAL | {"atan2"}
_TABLE: Final = (
    "it is transcendental and has no exact fixed-point form without a table; use relu, or piecewise-linear max and min, "
    "or make it one table with pq.numerics.region"
)
_DRAWN: Final = (
    "random numbers differ between batches; draw them in training alone (rng is None in inference) or make them parameters"
)
RANDOM: Final = frozenset(
    "random_bits random_seed random_wrap random_unwrap random_fold_in random_split threefry2x32 rng_bit_generator".split()
)
ADVICE: Final[dict[str, str]] = {
    **dict.fromkeys(TABLES, _TABLE),
    **dict.fromkeys(("argmax", "argmin"), "hardware gives the values; output the logits and take the index on the host"),
    "sort": "a sorting network is not built; sort on the host, or use max, min and sums, which need no order",
    "top_k": "a sorting network is not built; use max and min, or select on the host",
    "while": "its number of steps depends on the data; use a Python loop or lax.scan with a fixed length",
    "cond": "its branch depends on the data; compute both and choose with jnp.where",
    "scan": "it could not be unrolled; use a Python loop over the steps",
    "fft": "it works on complex numbers; write it as products with the constant cosine and sine matrices",
    "rem": "no exact remainder here; quantize with overflow WRAP, which is one for powers of two",
    **dict.fromkeys(("reduce_prod", "cumprod"), "its width grows with every factor; multiply in pairs with quantizers between"),
    "cumlogsumexp": "write it as a maximum, exp, cumsum and log",
    **dict.fromkeys(RANDOM, _DRAWN),
}  # fmt: skip


def pick(eqn: Any) -> Rule:
    """The rule of an equation; that of an unknown one raises what to do."""
    if eqn.primitive is lookup_p:
        return _lookup
    if eqn.primitive is mask_p:
        return lambda op: emit(op, "mul", *op.ins)
    return RULES.get(eqn.primitive.name, unsupported)


def unsupported(op: Op) -> int:
    """Raises the error of an operation without a rule."""
    what, why = repr(op.name), ADVICE.get(op.name, "it has no fixed-point form here; keep it outside the compressed model")
    raise refusal(op, what, why)


def _lookup(op: Op) -> int:
    x, *rest = op.ins
    if any(not isinstance(v, np.ndarray) for v in rest):
        raise refusal(op, "a table", "its format or entries depend on the data; build it from constants (inst.tables)")
    k, i, f, codes, f_out, which = (np.rint(np.asarray(v, np.float64)).astype(np.int64) for v in rest)
    spread = {name: np.broadcast_to(v, op.shape) for name, v in (("k", k), ("i", i), ("f", f), ("which", which))}
    return add(op.build, "table", (node(op.build, x),), op.shape, op.scope, codes=codes, f_out=f_out, **spread)


def _binary(op: Op) -> int:
    return emit(op, op.name, *op.ins)


def _extreme(op: Op, name: str, *ins: Operand) -> int:
    """max or min; against an infinity it is the other operand."""
    unbounded = -np.inf if name == "max" else np.inf
    for x, c in (ins, ins[::-1]):
        if not isinstance(c, np.ndarray) or not np.any(c == unbounded):
            continue
        bounds = np.broadcast_to(c, op.shape).ravel()
        free = bounds == unbounded
        x = broadcast(op.build, x, op.shape)
        if free.all():
            return x
        own = numbers(op.shape)  # an element without a bound is compared with itself
        other = joined(op.build, [x, np.where(free, 0.0, bounds)], np.where(free.reshape(op.shape), own, own + own.size))
        return add(op.build, name, (x, other), op.shape, op.scope)
    return emit(op, name, *ins)


def _clamp(op: Op) -> int:
    low, x, high = op.ins
    return _extreme(op, "min", _extreme(op, "max", x, low), high)


def _identity(op: Op) -> list[int]:
    return [v if isinstance(v, int) else node(op.build, v) for v in op.ins]


def _convert(op: Op) -> int:
    """A conversion that keeps every value, to bool a comparison with 0, to int32 the whole part."""
    (x,), old, new = op.ins, op.eqn.invars[0].aval.dtype, op.eqn.outvars[0].aval.dtype
    # an integer that a float rounds is too wide an accumulator, which is checked
    if np.can_cast(old, new) or (jnp.issubdtype(old, jnp.integer) and new == np.float32):
        return node(op.build, x)
    if new == np.bool_:
        return emit(op, "ne", x, np.zeros(()))
    if jnp.issubdtype(old, jnp.floating) and new == np.int32:
        return _whole(op, x, "TRN_ZERO")
    why = "it changes values; quantize them to the format that is meant"
    raise refusal(op, f"the conversion of {old} to {new}", why)


def _reduce_precision(op: Op) -> int:
    kept = jnp.finfo(op.eqn.invars[0].aval.dtype)
    if op.eqn.params["exponent_bits"] < kept.nexp or op.eqn.params["mantissa_bits"] < kept.nmant:
        return unsupported(op)
    return node(op.build, op.ins[0])


def _whole(op: Op, x: Operand, rounding: str) -> int:
    """A quantizer to whole numbers that can't overflow."""
    k, i, f = (np.full(op.shape, n, np.int64) for n in (1, _WIDE, 0))
    return emit(op, "quantize", x, k=k, i=i, f=f, rounding=rounding, overflow="WRAP")


def _round(op: Op) -> int:
    to_even = op.eqn.params.get("rounding_method") is None or int(op.eqn.params["rounding_method"]) == 1
    return _whole(op, op.ins[0], _ROUND[op.name] if op.name == "floor" or to_even else "RND_INF")


def _ceil(op: Op) -> int:
    return emit(op, "neg", _whole(op, emit(op, "neg", op.ins[0]), "TRN"))


def _sign(op: Op) -> int:
    zero = np.zeros(())
    return emit(op, "sub", emit(op, "gt", op.ins[0], zero), emit(op, "lt", op.ins[0], zero))


def _logical(op: Op) -> int:
    """On booleans, which are 0 and 1; on integers the same names work bit by bit."""
    dtype = op.eqn.invars[0].aval.dtype
    if dtype != np.bool_:
        raise refusal(op, f"{op.name!r} of {dtype}", "it works on bits; use comparisons, which give booleans")
    if op.name == "not":
        return emit(op, "eq", op.ins[0], np.zeros(()))
    return emit(op, {"and": "min", "or": "max", "xor": "ne"}[op.name], *op.ins)


def _dot(op: Op) -> int:
    """dot_general as rearrange, (b,m,k) @ (b,k,n), rearrange."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = op.eqn.params["dimension_numbers"]
    shapes = [tuple(v.aval.shape) for v in op.eqn.invars]
    lhs_free = [d for d in range(len(shapes[0])) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(len(shapes[1])) if d not in (*rhs_contract, *rhs_batch)]

    def size(side: int, dims: Sequence[int]) -> int:
        return int(np.prod([shapes[side][d] for d in dims], dtype=np.int64))

    b, m, k, n = size(0, lhs_batch), size(0, lhs_free), size(0, lhs_contract), size(1, rhs_free)
    lhs = arranged(op.build, op.ins[0], (*lhs_batch, *lhs_free, *lhs_contract), (b, m, k))
    rhs = arranged(op.build, op.ins[1], (*rhs_batch, *rhs_contract, *rhs_free), (b, k, n))
    out = add(op.build, "dot", (lhs, rhs), (b, m, n), op.scope)
    return take(op.build, out, numbers(op.shape))


def _reduce(op: Op) -> int:
    axes = tuple(op.eqn.params["axes"])
    own = shape_of(op.build, op.ins[0])
    if not axes:
        return node(op.build, op.ins[0])
    kept = [d for d in range(len(own)) if d not in axes]
    count = int(np.prod([own[d] for d in axes], dtype=np.int64))
    rows = arranged(op.build, op.ins[0], (*kept, *axes), (int(np.prod(op.shape, dtype=np.int64)), count))
    out = add(op.build, _REDUCE[op.name], (rows,), (op.build[rows].shape[0],), op.scope)
    return take(op.build, out, numbers(op.shape))


def _power(op: Op) -> int:
    y = op.eqn.params.get("y", 2)
    if y < 1:
        raise refusal(op, f"x ** {y}", "a negative power needs a table; use a positive one")
    out = x = node(op.build, op.ins[0])
    for _ in range(y - 1):
        out = emit(op, "mul", out, x)
    return out


def _divide(op: Op) -> int:
    x, divisor = op.ins
    if not isinstance(divisor, np.ndarray) or not np.all(np.abs(np.frexp(divisor)[0]) == 0.5):
        what = "a value" if not isinstance(divisor, np.ndarray) else f"{np.ravel(divisor)[0]}"
        raise refusal(op, f"a division by {what}", "only powers of two are exact; multiply by a constant")
    return emit(op, "mul", x, np.asarray(1.0 / np.asarray(divisor, np.float64)))  # a quotient of scalars is no array


def _select(op: Op) -> int:
    which, *cases = op.ins
    if op.eqn.invars[0].aval.dtype == np.bool_:
        return emit(op, "select", which, *cases)
    out: Operand = cases[0]
    for number, case in enumerate(cases[1:], 1):
        out = emit(op, "select", emit(op, "eq", which, np.asarray(float(number))), out, case)
    return node(op.build, out)


RULES: Final[dict[str, Rule]] = {
    **WINDOW_RULES,
    **dict.fromkeys("copy stop_gradient optimization_barrier site sharding_constraint pvary".split(), _identity),
    "convert_element_type": _convert,
    "reduce_precision": _reduce_precision,
    **dict.fromkeys(_BINARY, _binary),
    "max": lambda op: _extreme(op, "max", *op.ins),
    "min": lambda op: _extreme(op, "min", *op.ins),
    "clamp": _clamp,
    "dot_general": _dot,
    **dict.fromkeys(_REDUCE, _reduce),
    "neg": lambda op: emit(op, "neg", *op.ins),
    "abs": lambda op: emit(op, "abs", *op.ins),
    "sign": _sign,
    **dict.fromkeys(_ROUND, _round),
    "ceil": _ceil,
    **dict.fromkeys(("and", "or", "xor", "not"), _logical),
    "is_finite": lambda op: node(op.build, np.ones(op.shape)),
    "square": _power,
    "integer_pow": _power,
    "div": _divide,
    "select_n": _select,
}
