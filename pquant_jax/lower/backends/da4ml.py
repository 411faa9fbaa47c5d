"""`Graph` -> da4ml netlist -> Verilog or VHDL.  The only module that imports da4ml (inside functions: it is optional).

Every scalar of the graph is a da4ml variable or, where `ranges.intervals` proves it constant, a Python float.  da4ml
offers TRN and RND with WRAP, SAT and SAT_SYM; the other modes are written with its adders and multiplexers, exactly:

=========== ============================================================ (h = 2^(-f-1), e = 2^-fx, fx: grid of x)
RND_MIN_INF TRN(x + h - e)
RND_CONV    TRN(x + h - e + e * b), b: the bit of x of weight 2^-f
TRN_ZERO    TRN(x + (x < 0 ? 2h - e : 0))
RND_ZERO    TRN(x + h - (x < 0 ? 0 : e))
RND_INF     TRN(x + h - (x < 0 ? e : 0))
WRAP_SM     m < P ? low + m : low + 2P - 2h - m, m = (x - low) mod 2P, P: the length of the range
=========== ============================================================
"""

from __future__ import annotations

import decimal
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, did_you_mean
from pquant_jax.lower.ir import Graph, Node, label
from pquant_jax.lower.ranges import Interval, check_exact, intervals, least_f, quantize_acts
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS, quantize

if TYPE_CHECKING:
    from da4ml.types import CombLogic

MAX_FRACTION: Final = 31  # da4ml looks for the grid of a constant no further than 2^-32, and RND adds half a step
MAX_CONSTANT_BITS: Final = 24  # its matrix solver casts kernels to float32
FLAVORS: Final = ("verilog", "vhdl")
EXACT_DIGITS: Final = 400  # da4ml computes ranges in Decimal, whose default of 28 digits rounds wide formats


class RTLInfo(NamedTuple):
    """Written RTL: where it is, its ports and da4ml's estimates.

    `stages` is 0 for a combinational netlist; a vector on the input before clock edge 1 is on the output after edge
    `latency_cycles`; a new vector can enter every `ii` cycles.  `reg_bits`: flip-flops; `cost`: estimated LUTs;
    `latency_units`: length of the longest path in adder delays.  `inp_kifs`, `out_kifs`: int (3, n), rows k, i, f, of
    the port elements as they lie in `model_inp` and `model_out`, first element in the lowest bits, no bit where
    k + i + f = 0 (an input that is never used).
    """

    name: str
    directory: Path
    src: Path
    flavor: str
    stages: int
    latency_cycles: int
    ii: int
    reg_bits: int
    cost: float
    latency_units: float
    inp_kifs: np.ndarray
    out_kifs: np.ndarray


class _Circuit(NamedTuple):
    """What the scalar helpers need to build da4ml variables."""

    hwconf: tuple[float, float, float]
    solver_options: Mapping[str, Any] | None


def check_supported(graph: Graph) -> list[Interval]:
    """Raise `LoweringError` for the first node that has no exact da4ml netlist; returns the intervals of all nodes."""
    check_exact(graph)
    known = intervals(graph)
    for index, (node, own) in enumerate(zip(graph.nodes, known, strict=True)):
        if node.op == "quantize":
            _check_quantize(graph, index, known)
        _check_constants(graph, index, own)
    return known


def _check_quantize(graph: Graph, index: int, known: Sequence[Interval]) -> None:
    node = graph.nodes[index]
    for key, modes in (("rounding", ROUNDINGS), ("overflow", OVERFLOWS)):
        mode = str(node.attrs[key])
        if mode not in modes:
            raise LoweringError(
                f"{label(graph, index)}: {key} mode {mode!r} has no netlist; {did_you_mean(mode, modes)} Change {key} of that quantizer"
            )
    k, i, f = (np.asarray(node.attrs[a]).astype(np.int64) for a in "kif")
    wide = (k + i + f > 0) & (f > MAX_FRACTION) & (known[index].low != known[index].high)
    if wide.any():
        raise LoweringError(
            f"{label(graph, index)}: {int(f[wide].max())} fractional bits, da4ml takes {MAX_FRACTION}; use a coarser quantizer there"
        )


def _check_constants(graph: Graph, index: int, own: Interval) -> None:
    value = np.where(own.low == own.high, own.low, 0.0)
    f = least_f(value)
    bits = np.frexp(np.abs(np.ldexp(value, f)))[1]
    is_kernel = graph.nodes[index].op == "const"
    bad = (f > MAX_FRACTION) | (is_kernel & (bits > MAX_CONSTANT_BITS))
    if bad.any():
        at = tuple(int(j) for j in np.argwhere(bad)[0])
        raise LoweringError(
            f"{label(graph, index)}: the constant {float(value[at])!r} at {at} has {int(bits[at])} significant and {int(f[at])} fractional "
            f"bits, da4ml takes {MAX_CONSTANT_BITS} and {MAX_FRACTION}; quantize that parameter"
        )


def to_comb(
    graph: Graph,
    *,
    hwconf: tuple[float, float, float] = (1, -1, -1),
    solver_options: Mapping[str, Any] | None = None,
) -> CombLogic:
    """The da4ml netlist of `graph`: all inputs flattened in order -> all outputs flattened in order.

    `hwconf` = (adder_size, carry_size, latency_cutoff) of da4ml; `solver_options` go to its matrix solver, such as
    `{"hard_dc": 2}`.  Raises `LoweringError` for what `check_supported` refuses, before any expensive work.
    """
    known = check_supported(graph)
    from da4ml.trace import comb_trace

    circuit = _Circuit(hwconf, solver_options)
    with _exact_da4ml("tracing"):
        values = _trace(graph, known, circuit)
        ports = [v for j in graph.inputs for v in values[j].ravel()]
        outputs = [_variable(v, circuit) for j in graph.outputs for v in values[j].ravel()]
        return comb_trace([_variable(v, circuit) for v in ports], outputs)


@contextmanager
def _exact_da4ml(doing: str) -> Iterator[None]:
    """da4ml signals every limit with an assertion: say which one it is."""
    try:
        with decimal.localcontext() as context:
            context.prec = EXACT_DIGITS
            yield
    except (AssertionError, NotImplementedError, RecursionError) as error:
        text = str(error)
        hint = "report the graph (`ir.save`) to the authors of pquant_jax"
        if "latency cutoff" in text:
            hint = "one multiplier is slower than a pipeline stage: use a larger latency_cutoff, or narrower operands"
        elif isinstance(error, RecursionError):
            hint = "the netlist is too deep for da4ml; split the model"
        raise LoweringError(f"da4ml failed while {doing} ({type(error).__name__}: {text or 'no message'}): {hint}") from error


def _trace(graph: Graph, known: Sequence[Interval], circuit: _Circuit) -> list[np.ndarray]:
    """Per node an object array of its shape that holds da4ml variables and, for constants, floats."""
    values: list[np.ndarray] = []
    for index, (node, own) in enumerate(zip(graph.nodes, known, strict=True)):
        constant = own.low == own.high
        if constant.all() and node.op != "input":
            values.append(own.low.astype(object))
            continue
        ins = [values[j] for j in node.inputs]
        value = _operation(node, ins, [known[j] for j in node.inputs], circuit)
        if value.shape != node.shape:
            raise LoweringError(f"{label(graph, index)}: netlist of shape {value.shape}, expected {node.shape}")
        values.append(np.where(constant, own.low.astype(object), value) if node.op != "input" else value)
    return values


def _operation(node: Node, ins: list[np.ndarray], ranges: list[Interval], circuit: _Circuit) -> np.ndarray:
    op = node.op
    if op == "input":
        return _port(node, circuit)
    if op == "quantize":
        return _quantize_array(node, ins[0], ranges[0])
    if op == "take":
        return np.append(ins[0].ravel(), 0.0)[np.asarray(node.attrs["index"])]
    if op == "concat":
        return np.concatenate([v.ravel() for v in ins])
    if op == "dot":
        return _dot(ins[0], ins[1], circuit)
    if op in ("sum", "amax", "amin"):
        scalar = {"sum": _add, "amax": _max, "amin": _min}[op]
        return _objects([_reduce(scalar, row) for row in ins[0]], node.shape)
    scalar = _SCALAR[op]
    return _objects([scalar(*operands) for operands in zip(*(v.ravel() for v in ins), strict=True)], node.shape)


def _objects(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(len(items), object)
    out[:] = [_fold(v) for v in items]
    return out.reshape(shape)


def _port(node: Node, circuit: _Circuit) -> np.ndarray:
    from da4ml.trace import FixedVariableArray

    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    return FixedVariableArray.from_kif(k, i, f, hwconf=circuit.hwconf)._vars.reshape(node.shape)


def _variable(value: Any, circuit: _Circuit) -> Any:
    from da4ml.trace.fixed_variable import FixedVariable, HWConfig

    return value if not isinstance(value, float) else FixedVariable.from_const(value, hwconf=HWConfig(*circuit.hwconf))


def _dot(a: np.ndarray, c: np.ndarray, circuit: _Circuit) -> np.ndarray:
    """Batched product (b,m,k) x (b,k,n): constant operands go through da4ml's matrix solver, row by row."""
    from da4ml.trace import FixedVariableArray

    def plain(m: np.ndarray) -> bool:
        return all(isinstance(v, float) for v in m.ravel())

    def rows(left: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        array = FixedVariableArray(np.ascontiguousarray(left), circuit.solver_options, hwconf=circuit.hwconf)
        return (array @ matrix.astype(np.float64))._vars

    out = np.empty((a.shape[0], a.shape[1], c.shape[2]), object)
    for b in range(a.shape[0]):
        if plain(a[b]) and plain(c[b]):
            out[b] = a[b].astype(np.float64) @ c[b].astype(np.float64)
        elif plain(c[b]):
            out[b] = rows(a[b], c[b])
        elif plain(a[b]):
            out[b] = rows(c[b].T, a[b].T).T
        else:
            for m, n in np.ndindex(out.shape[1:]):
                out[b, m, n] = _reduce(_add, [_mul(x, y) for x, y in zip(a[b, m], c[b, :, n], strict=True)])
    return out


def _reduce(scalar: Callable[[Any, Any], Any], row: Sequence[Any]) -> Any:
    """Pairwise, earliest operands first, so that the tree is as shallow as the arrival times allow."""
    items = list(row)
    while len(items) > 1:
        items.sort(key=_arrival)
        items = [*items[2:], scalar(items[0], items[1])]
    return items[0]


def _arrival(v: Any) -> tuple[float, int]:
    return (-1.0, 0) if isinstance(v, float) else (v.latency, sum(v.kif[:2]))


# Scalars: a da4ml variable or a float.  da4ml mistakes a constant variable for a varying one in `abs` and in the key of
# a multiplexer, which is why constants stay floats here.


def _add(a: Any, b: Any) -> Any:
    return b + a if isinstance(a, float) else a + b


def _mul(a: Any, b: Any) -> Any:
    if isinstance(a, float) and not isinstance(b, float):
        a, b = b, a
    return 0.0 if isinstance(b, float) and b == 0 else a * b


def _neg(a: Any) -> Any:
    return -a


def _sub(a: Any, b: Any) -> Any:
    return _add(a, _neg(b))


def _abs(a: Any) -> Any:
    if isinstance(a, float) or a.low >= 0:
        return abs(a) if isinstance(a, float) else a
    return _select(_negative(a), a, _neg(a), (0.0, float(max(-a.low, a.high)), float(a.step)))


def _max(a: Any, b: Any) -> Any:
    if isinstance(a, float):
        a, b = b, a
    if isinstance(b, float):
        return max(a, b) if isinstance(a, float) else a.relu() if b == 0 else _larger(a, b, float(a.low), float(a.high), b, b)
    return _larger(a, b, float(a.low), float(a.high), float(b.low), float(b.high))


def _larger(a: Any, b: Any, a_low: float, a_high: float, b_low: float, b_high: float) -> Any:
    if a_low >= b_high or a_high <= b_low:
        return a if a_low >= b_high else b
    step = min(float(v.step) for v in (a, b) if not isinstance(v, float))
    step = min(step, 2.0 ** -int(least_f(np.array(b)))) if isinstance(b, float) else step
    return _select(_gt(b, a), a, b, (max(a_low, b_low), max(a_high, b_high), step))


def _min(a: Any, b: Any) -> Any:
    return _neg(_max(_neg(a), _neg(b)))


def _fold(v: Any) -> Any:
    """A da4ml variable that can hold one value only, as a float."""
    return float(v.low) if not isinstance(v, float) and v.low == v.high else v


def _negative(a: Any) -> Any:
    """1 where a < 0, else 0."""
    return float(a < 0) if isinstance(a, float) else _fold(a.is_negative())


def _gt(a: Any, b: Any) -> Any:
    return _negative(_sub(b, a))


def _not(a: Any) -> Any:
    return 1.0 - a if isinstance(a, float) else ~a


def _ne(a: Any, b: Any) -> Any:
    difference = _sub(a, b)
    return float(difference != 0) if isinstance(difference, float) else difference.unary_bit_op("any")


def _select(cond: Any, on_false: Any, on_true: Any, bounds: tuple[float, float, float] | None = None) -> Any:
    """`cond` is 0 or 1, hence its most significant bit is its only one; `bounds`: (low, high, step) if known better."""
    if isinstance(cond, float):
        return on_true if cond else on_false
    if isinstance(on_true, float) and isinstance(on_false, float):
        return _add(_mul(cond, on_true - on_false), on_false)
    if cond.opr == "wrap":  # da4ml would look through it at a wider key, whose sign its interpreter misreads
        cond, on_false, on_true = ~cond, on_true, on_false
    if isinstance(on_true, float) and on_false._factor < 0:  # da4ml would negate the wrong operand
        bounds = None if bounds is None else (-bounds[1], -bounds[0], bounds[2])
        return _neg(cond.msb_mux(-on_true, _neg(on_false), bounds))
    return cond.msb_mux(on_true, on_false, bounds)


_SCALAR: Final[dict[str, Callable[..., Any]]] = {
    "add": _add, "sub": _sub, "mul": _mul, "neg": _neg, "abs": _abs, "max": _max, "min": _min, "select": _select,
    "gt": _gt, "lt": lambda a, b: _gt(b, a), "ge": lambda a, b: _not(_gt(b, a)), "le": lambda a, b: _not(_gt(a, b)),
    "ne": _ne, "eq": lambda a, b: _not(_ne(a, b)),
}  # fmt: skip


def _quantize_array(node: Node, x: np.ndarray, known: Interval) -> np.ndarray:
    """Per element; a mode that can't act on the element's interval is replaced by the cheapest (TRN, WRAP)."""
    rounds, overflows = quantize_acts(node, known)
    k, i, f = (np.asarray(node.attrs[a]).astype(np.int64).ravel().tolist() for a in "kif")
    rounding, overflow = str(node.attrs["rounding"]), str(node.attrs["overflow"])
    out: list[Any] = []
    for j, v in enumerate(x.ravel()):
        if isinstance(v, float) or k[j] + i[j] + f[j] <= 0:
            out.append(float(quantize(v, k[j], i[j], f[j], rounding=rounding, overflow=overflow)) if isinstance(v, float) else 0.0)
            continue
        if rounds.ravel()[j]:
            v = _round(v, f[j], int(known.f.ravel()[j]), rounding)
        out.append(_clip(v, k[j], i[j], f[j], overflow if overflows.ravel()[j] else "WRAP"))
    return _objects(out, node.shape)


def _round(x: Any, f: int, fx: int, rounding: str) -> Any:
    """`y` with floor(y * 2^f) = the code of `x` (on the grid 2^-fx, fx > f) under `rounding`; formulas: see the module."""
    half, lsb = 2.0 ** (-f - 1), 2.0**-fx
    if rounding == "TRN":
        return x
    if rounding == "RND":
        return _add(x, half)
    if rounding == "RND_MIN_INF":
        return _add(x, half - lsb)
    if rounding == "RND_CONV":
        return _add(_add(x, half - lsb), _mul(_wrap(x, 0, 1 - f, f), 2.0 ** (f - fx)))
    negative = _negative(x)
    if rounding == "TRN_ZERO":
        return _add(x, _mul(negative, 2 * half - lsb))
    if rounding == "RND_ZERO":
        return _add(_add(x, half - lsb), _mul(negative, lsb))
    return _sub(_add(x, half), _mul(negative, lsb))


def _clip(x: Any, k: int, i: int, f: int, overflow: str) -> Any:
    """Truncate `x` to the format; (k, i, f) has at least one bit."""
    low, high, period = -k * 2.0**i, 2.0**i - 2.0**-f, (1 + k) * 2.0**i
    if overflow == "WRAP_SM":
        m = _wrap(_sub(x, low), 0, i + k + 1, f)
        x = _select(_gt(period, m), _sub(low + 2 * period - 2.0**-f, m), _add(m, low))
    elif overflow != "WRAP":
        x = _min(_max(_truncate(x, f), low if overflow == "SAT" else -high * k), high)
    return _wrap(x, k, i, f)


def _truncate(x: Any, f: int) -> Any:
    """TRN without overflow."""
    k, i, fx = x.kif
    return x if f >= fx else _wrap(x, k, max(i, 1 - k - f), f)


def _wrap(x: Any, k: int, i: int, f: int) -> Any:
    """TRN and WRAP; da4ml drops the sign extension when a negative value becomes a wider unsigned one, so it is added."""
    if isinstance(x, float):
        return float(quantize(x, k, i, f, rounding="TRN", overflow="WRAP"))
    if k == 0 and x.low < 0 and 2.0**i > -x.low:
        x = _add(x, 2.0**i)
    return _fold(x.quantize(k, i, f, "WRAP", "TRN"))


def predict(comb: CombLogic, x: np.ndarray) -> np.ndarray:
    """The netlist's outputs, float64 (N, n_out), from da4ml's interpreter for `x` (N, ...) with n_in values per sample.

    Inputs pass the ports: TRN to their grid, then WRAP.  Raises `LoweringError` for a wrong number of values.
    """
    x = np.asarray(x, np.float64)
    flat = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.shape[1] != comb.shape[0]:
        raise LoweringError(f"the netlist has {comb.shape[0]} input values per sample, got {flat.shape[1]} (array {x.shape})")
    return np.asarray(comb.predict(flat, n_threads=1), np.float64).reshape(len(x), comb.shape[1])
