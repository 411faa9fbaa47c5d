"""How a quantizer of the IR is said in ONNX: what QONNX's `Quant` can't say stands in front of it.

`Quant(x, scale, 0, bits)` saturates and rounds x / scale to even, down, up, to zero or away from it.  On the exact grid

=========== ==========================================================================================
RND         Add(2^(-f-1)), then Quant(FLOOR): `Quant` has no rounding of halves upwards
RND_MIN_INF Add(-2^(-f-1)), then Quant(CEIL)
WRAP        x - P * Floor((x - low) / P), P = (1 + k) 2^i, low = -k 2^i, of what is rounded already or will be by FLOOR
WRAP_SM     u = (r - low) mod 2P of the rounded r, then min(u, 2P - 2^-f - u) + low
=========== ==========================================================================================

Formats that differ from element to element in more than their scale are limited by Min and Max first; `Quant`, whose bit
width is one number, then has that of the widest.  In plain ONNX a Quant is Mul, Floor (Ceil, Round, ...), Clip, Mul.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends._onnx_writer import QONNX_DOMAIN, Writer, add, collapsed, constant
from pquant_jax.lower.ir import Node
from pquant_jax.lower.ranges import Interval, format_bounds, quantize_acts

MODE: Final = {
    "TRN": "FLOOR", "RND": "FLOOR", "RND_CONV": "ROUND", "TRN_ZERO": "DOWN",
    "RND_ZERO": "HALF_DOWN", "RND_MIN_INF": "CEIL", "RND_INF": "HALF_UP",
}  # fmt: skip
HALF: Final = {"RND": 0.5, "RND_MIN_INF": -0.5}
FLOAT_BITS: Final = {"float32": 24, "float64": 53}


class Spec(NamedTuple):
    """One Quant: scale (collapsed array), width in bits, sign, SAT_SYM or not, rounding mode; does it round, does it clip."""

    scale: np.ndarray
    bits: int
    signed: bool
    narrow: bool
    mode: str
    rounds: bool = True
    clips: bool = True


class Plan(NamedTuple):
    """What a quantizer of the IR needs: arrays of the physical shape and which of its modes can act on its input."""

    k: np.ndarray
    i: np.ndarray
    f: np.ndarray
    alive: np.ndarray
    rounding: str
    overflow: str


def plan(node: Node, x: Interval | None, shape: tuple[int, ...]) -> Plan:
    """x: interval of the input; None for a port, which takes any number (TRN, WRAP)."""
    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    alive = k + i + f > 0
    k, i, f = (np.where(alive, v, 0).reshape(shape) for v in (k, i, f))
    alive = alive.reshape(shape)
    if x is None:
        return Plan(k, i, f, alive, "TRN", "WRAP")
    rounds, overflows = (v.reshape(shape) & alive for v in quantize_acts(node, x))
    rounding = str(node.attrs["rounding"]) if rounds.any() else ""
    overflow = str(node.attrs["overflow"]) if overflows.any() else ""
    return Plan(k, i, f, alive, rounding, overflow)


def bits_needed(node: Node, x: Interval) -> int:
    """Significand bits of everything that is computed between the input of a `quantize` and its output."""
    p = plan(node, x, node.shape)
    grid = np.maximum(x.f, p.f + (p.rounding in HALF))
    reach = np.maximum(np.abs(x.low), np.abs(x.high)) + np.ldexp(0.5, -p.f)
    reach = reach + (np.ldexp(2.0, p.i + p.k) if p.overflow.startswith("WRAP") else 0)
    reach = np.maximum(reach, np.ldexp(1.0, p.i))
    codes = np.where(p.alive, np.ldexp(reach, grid), 0)
    return int(np.ceil(np.log2(np.maximum(codes, 1))).max(initial=0))


def quantizer(w: Writer, x: str, p: Plan, shape: tuple[int, ...], name: str, where: str) -> str:
    """The nodes of one quantizer; `where` names it in errors."""
    if w.dialect == "qdq" and (p.rounding not in ("", "RND_CONV") or p.overflow not in ("", "SAT", "SAT_SYM")):
        raise LoweringError(
            f"{where}: {p.rounding or 'RND_CONV'} with {p.overflow or 'SAT'} can't be said by QuantizeLinear, which rounds half "
            "to even and saturates; train that site with RND_CONV and SAT, or write the model with to_qonnx or to_onnx"
        )
    rounding, mode = p.rounding, MODE.get(p.rounding, "ROUND")
    if rounding in HALF:
        half = np.where(p.alive, np.ldexp(HALF[rounding], -p.f), 0)
        x = add(w, "Add", [x, number(w, half)], shape, name)
    rounds = bool(rounding)
    if p.overflow in ("WRAP", "WRAP_SM"):
        if rounds and (mode != "FLOOR" or p.overflow == "WRAP_SM"):
            x, rounds = _rounded(w, x, p, mode, shape, name), False
        x = (_wrapped if p.overflow == "WRAP" else _reflected)(w, x, p, shape, name)
    spec, whole = _spec(p, mode, rounds)
    if spec.clips and not whole:
        low, high = bounds(p)
        x = add(w, "Min", [add(w, "Max", [x, number(w, low)], shape, name), number(w, high)], shape, name)
        spec = spec._replace(clips=False)
    x = quant(w, x, spec, shape, name, where)
    return x if p.alive.all() else add(w, "Mul", [x, number(w, p.alive)], shape, name)


def number(w: Writer, value: Any) -> str:
    """An initializer that broadcasts to what `value` is for."""
    return constant(w, collapsed(np.asarray(value, np.float64)))


def bounds(p: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest value of every element."""
    low, high = format_bounds(p.k, p.i, p.f)
    return (-high * p.k if p.overflow == "SAT_SYM" else low), high


def _spec(p: Plan, mode: str, rounds: bool) -> tuple[Spec, bool]:
    """The Quant of a plan, and whether its own limits are those of every element."""
    live = p.alive
    if not live.any():
        return Spec(np.array(1.0), 2, True, False, mode, False, False), True
    k, width = int(p.k[live].max()), (p.i + p.f)[live]
    bits = k + int(width.max())
    whole = bool((p.k[live] == k).all() and (width + k == bits).all() and not (k and bits == 1))
    clips = p.overflow in ("SAT", "SAT_SYM")
    narrow = p.overflow == "SAT_SYM" and bool(k) and whole
    bits = max(bits, 1 + k)  # one bit with a sign is bipolar in QONNX
    return Spec(collapsed(np.ldexp(1.0, -p.f)), bits, bool(k), narrow, mode, rounds, clips), whole


def _rounded(w: Writer, x: str, p: Plan, mode: str, shape: tuple[int, ...], name: str) -> str:
    y = _scaled(w, x, np.ldexp(1.0, p.f), shape, name)
    return _scaled(w, round_nodes(w, y, mode, shape, name), np.ldexp(1.0, -p.f), shape, name)


def _scaled(w: Writer, x: str, scale: np.ndarray, shape: tuple[int, ...], name: str) -> str:
    return x if (np.asarray(scale) == 1).all() else add(w, "Mul", [x, number(w, scale)], shape, name)


def round_nodes(w: Writer, y: str, mode: str, shape: tuple[int, ...], name: str) -> str:
    """QONNX's rounding modes in standard ops."""
    if mode in ("FLOOR", "CEIL", "ROUND"):
        return add(w, mode.capitalize(), [y], shape, name)
    sign, size = add(w, "Sign", [y], shape, name), add(w, "Abs", [y], shape, name)
    if mode != "DOWN":
        size = add(w, "Add", [size, number(w, 0.5 if mode == "HALF_UP" else -0.5)], shape, name)
    size = add(w, "Ceil" if mode == "HALF_DOWN" else "Floor", [size], shape, name)
    return add(w, "Mul", [sign, size], shape, name)


def _modulo(w: Writer, x: str, low: np.ndarray, period: np.ndarray, shape: tuple[int, ...], name: str) -> str:
    """P * floor((x - low) / P)."""
    y = add(w, "Sub", [x, number(w, low)], shape, name) if low.any() else x
    y = add(w, "Floor", [_scaled(w, y, 1 / period, shape, name)], shape, name)
    return _scaled(w, y, period, shape, name)


def _wrapped(w: Writer, x: str, p: Plan, shape: tuple[int, ...], name: str) -> str:
    low, period = -p.k * np.ldexp(1.0, p.i), np.ldexp(1.0, p.i + p.k)
    return add(w, "Sub", [x, _modulo(w, x, low, period, shape, name)], shape, name)


def _reflected(w: Writer, x: str, p: Plan, shape: tuple[int, ...], name: str) -> str:
    """WRAP_SM; `u + low` is computed as one number, so that nothing is wider than the period."""
    low, period, lsb = -p.k * np.ldexp(1.0, p.i), np.ldexp(1.0, p.i + p.k), np.ldexp(1.0, -p.f)
    u = add(w, "Sub", [x, _modulo(w, x, low, 2 * period, shape, name)], shape, name)
    turned = add(w, "Sub", [number(w, 2 * period - lsb + 2 * low), u], shape, name)
    return add(w, "Min", [u, turned], shape, name)


def port(w: Writer, x: str, p: Plan, shape: tuple[int, ...], name: str) -> str:
    """TRN and WRAP of any number: what it is modulo 2P (exact in floats) is rounded down to the grid, and that is wrapped."""
    period = np.ldexp(1.0, p.i + p.k)
    x = add(w, "Mod", [x, number(w, period)], shape, name, fmod=1)
    x = _wrapped(w, _rounded(w, x, p, "FLOOR", shape, name), p, shape, name)
    spec = _spec(p, "ROUND", False)[0]._replace(clips=False)
    if w.dialect != "qdq" or (spec.bits <= 8 and spec.scale.ndim == 0):
        x = quant(w, x, spec, shape, name, name)
    return x if p.alive.all() else add(w, "Mul", [x, number(w, p.alive)], shape, name)


def quant(w: Writer, x: str, s: Spec, shape: tuple[int, ...], name: str, where: str, weight: bool = False) -> str:
    """One `Quant`, in the writer's dialect; a `weight` has no batch axis."""
    if w.dialect == "qonnx" and s.bits <= FLOAT_BITS["float32"]:  # the executor's Quant gives float32
        inputs = [constant(w, v, np.float32, "scale" if v is s.scale else "bits") for v in (s.scale, 0.0, float(s.bits))]
        inputs = [x, *inputs]
        flags: dict[str, Any] = dict(signed=int(s.signed), narrow=int(s.narrow), rounding_mode=s.mode, domain=QONNX_DOMAIN)
        out = add(w, "Quant", inputs, shape, name, np.float32, **flags)
        return out if w.real == np.float32 else add(w, "Cast", [out], shape, name, to=11)
    if w.dialect == "qdq" and s.bits <= 8:
        return _qdq(w, x, s, shape, name, where, weight)
    if w.dialect == "qdq" and (s.rounds or s.clips):
        raise LoweringError(
            f"{where}: {s.bits} bits, QuantizeLinear is written for 8 at most; give that site at most 8 bits "
            "in one width, or write the model with to_qonnx or to_onnx"
        )
    if not (s.rounds or s.clips):
        return x
    y = _scaled(w, x, 1 / s.scale, shape, name)
    y = round_nodes(w, y, s.mode, shape, name) if s.rounds else y
    if s.clips:
        low, high = _codes(s)
        y = add(w, "Clip", [y, number(w, low), number(w, high)], shape, name)
    return _scaled(w, y, s.scale, shape, name)


def _codes(s: Spec) -> tuple[int, int]:
    high = 2 ** (s.bits - s.signed) - 1
    return (-high - (not s.narrow)) * s.signed, high


def _qdq(w: Writer, x: str, s: Spec, shape: tuple[int, ...], name: str, where: str, weight: bool) -> str:
    """QuantizeLinear, Clip where the format is narrower than its integers, DequantizeLinear."""
    scale, attrs = np.asarray(s.scale), {}
    if scale.ndim:
        axes = [a for a, n in enumerate(scale.shape) if n > 1]
        if len(axes) != 1:
            raise LoweringError(
                f"{where}: its scales differ along several axes, QuantizeLinear has one per tensor or per element of one axis; "
                'use granularity "tensor" or "channel" at that site'
            )
        attrs = {"axis": axes[0] - scale.ndim + len(shape) + (not weight)}
    kind = np.dtype(np.int8 if s.signed else np.uint8)
    ends = [constant(w, np.ravel(scale) if scale.ndim else scale, name="scale")]
    ends.append(constant(w, np.zeros(scale.size if scale.ndim else (), kind), kind, "zero"))
    y = add(w, "QuantizeLinear", [x, *ends], shape, name, kind, **attrs)
    low, high = _codes(s)
    if s.bits < 8 or s.narrow:
        y = add(w, "Clip", [y, constant(w, low, kind), constant(w, high, kind)], shape, name, kind)
    return add(w, "DequantizeLinear", [y, *ends], shape, name, **attrs)
