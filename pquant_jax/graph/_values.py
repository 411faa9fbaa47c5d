"""What `instrument` knows of a value beside its array: where it comes from and whether it can be negative."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from pquant_jax.graph._interpret import Const, bind, flatten, inner
from pquant_jax.numerics import reduce_axis
from pquant_jax.numerics.oracle import significant_bits

EXACT_BITS = 8  # significant bits up to which a constant is multiplied by as it is; more would be a row of adders
LARGE = 2.0**13  # numbers beyond are infinities by intention: masks
STRUCTURE = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type copy stop_gradient slice rev concatenate "
    "optimization_barrier dynamic_slice gather pad reduce_precision".split()
)


@dataclass(eq=False)
class Value:
    """An array with its provenance.

    batch: its batch axis, None if it is the same for all samples. signed: can it be negative. leaf: (path, axes) if
    it is one parameter up to transposition and axes of size 1. paths: parameters that it was computed from. derived:
    computed from model state or batch statistics. fine: a constant that hardware has to round. affine: (base, scale,
    offset) if it is base * scale + offset with parts that are the same for all samples. on_grid: itself after its
    site. rises: (base, function) if it is a nondecreasing function of base, element by element; function takes arrays
    without the batch axis too. channels: (kernel path, {axis: the kernel's output axis}) if it is a layer's output.
    site: the site whose grid it is on. spread: (value, function) if it is a broadcast of a smaller one. masked:
    (keep, value) if a mask sends the elements outside of keep to minus infinity.
    """

    val: Any
    batch: int | None = None
    signed: bool = True
    leaf: tuple[str, tuple[int | None, ...]] | None = None
    paths: frozenset[str] = frozenset()
    derived: bool = False
    fine: bool = False
    affine: tuple[Value, Value | None, Value | None] | None = field(default=None, repr=False)
    on_grid: Value | None = field(default=None, repr=False)
    rises: tuple[Value, Callable[[Any], Any]] | None = field(default=None, repr=False)
    channels: tuple[str, dict[int, int]] | None = None
    site: str | None = None
    spread: tuple[Value, Callable[[Any], Any]] | None = field(default=None, repr=False)
    masked: tuple[Value, Value] | None = field(default=None, repr=False)


def constant(value: Any, *, reciprocal: bool = False) -> Value:
    """A literal or closed-over constant; fine if hardware has to round it, as it does parameters.

    reciprocal: it divides, so its inverse is what hardware multiplies by.
    """
    array = np.asarray(value)
    return Value(value, signed=bool(np.any(array < 0)), fine=_many_bits(array, reciprocal))


def _many_bits(array: np.ndarray, reciprocal: bool) -> bool:
    """More significant bits than a constant of the model itself may have, but a number that a format can hold."""
    if array.dtype.kind != "f" or not array.size:
        return False
    with np.errstate(divide="ignore"):
        values = 1 / array.astype(np.float64) if reciprocal else array.astype(np.float64)
    number = bool(np.isfinite(values).all() and (np.abs(values) < LARGE).all())
    return number and bool((significant_bits(values) > EXACT_BITS).any())


def is_parameter(v: Value) -> bool:
    """Is it the same for all samples, and trained, stored, a batch statistic or a constant to be rounded?"""
    return v.batch is None and (bool(v.paths) or v.derived or v.fine)


def outputs(eqn: Any, ins: Sequence[Value], arrays: Sequence[Any], batch: int | None) -> list[Value]:
    """The results of a bound equation with their provenance."""
    # a batch statistic belongs to no layer: what it is computed from would name the site of its normalisation
    statistic = batch is None and any(v.batch is not None for v in ins)
    paths = frozenset().union(*(v.paths for v in ins)) if ins and not statistic else frozenset[str]()
    derived = statistic or any(v.derived for v in ins)
    signed = can_be_negative(eqn, [v.signed for v in ins], [v.val for v in ins])
    leaf = _leaf_through(eqn, ins)
    channels = _channels_through(eqn, ins)
    rises = _rises(eqn, ins, batch)
    made = [Value(a, batch, signed, leaf, paths, derived, rises=rises, channels=channels) for a in arrays]
    if eqn.primitive.name in STRUCTURE and len(ins) == 1 and batch is not None:
        _moved(eqn, ins[0], made[0])
    return made


def _moved(eqn: Any, x: Value, y: Value) -> None:
    """What is on a grid stays on it, and what a mask hides stays hidden, when elements only move."""

    def again(v: Any) -> Any:
        return bind(eqn, [v])[0]

    if x.on_grid is x:
        y.on_grid = y
    if eqn.primitive.name == "broadcast_in_dim":
        y.spread = (x, again)
    if x.masked is not None:
        keep, plain = x.masked
        y.masked = (Value(again(keep.val), keep.batch), Value(again(plain.val), y.batch, plain.signed, paths=plain.paths))


def _channels_through(eqn: Any, ins: Sequence[Value]) -> tuple[str, dict[int, int]] | None:
    """A transposed layer output still is one: that of `vmap(lambda x: w @ x + b)` is transposed before its bias."""
    if eqn.primitive.name != "transpose" or ins[0].channels is None:
        return None
    path, places = ins[0].channels
    return path, {eqn.params["permutation"].index(axis): place for axis, place in places.items()}


def _rises(eqn: Any, ins: Sequence[Value], batch: int | None) -> tuple[Value, Callable[[Any], Any]] | None:
    """relu and every other maximum of one value and a scalar."""
    data = [v for v in ins if v.batch is not None]
    if batch is None or len(data) != 1 or data[0].batch != batch:
        return None
    if eqn.primitive.name == "max":
        floor = next(v.val for v in ins if v is not data[0])
    else:
        call = inner(eqn)
        steps = list(flatten(ClosedJaxpr(*call)).steps) if call is not None else []
        consts = [v.value for step in steps for v in step.ins if isinstance(v, Const)]
        if [step.eqn.primitive.name for step in steps] != ["max"] or len(consts) != 1:
            return None
        floor = consts[0]
    return (data[0], lambda v: jnp.maximum(v, floor)) if jnp.ndim(floor) == 0 else None


def bound(v: Value, op: str) -> Any:
    """The "min" or "max" of a value over the batch.

    Taken before functions that only rise: the maximum of relu(a + b) is relu(max(a) + b) to the last bit, and XLA need
    not write relu(a + b) to memory for its sake (a tenth of a training step).
    """
    if v.rises is not None:
        return v.rises[1](bound(v.rises[0], op))
    assert v.batch is not None
    return reduce_axis(v.val, op, v.batch)


def span(v: Value) -> tuple[Any, Any]:
    """(low, high) over the batch; the low of a site that can't be negative is given as 0, which its width does not notice."""
    if v.batch is None:
        return v.val, v.val
    high = bound(v, "max")
    return (bound(v, "min") if v.signed else jnp.zeros_like(high)), high


def can_be_negative(eqn: Any, signed: Sequence[bool], values: Sequence[Any]) -> bool:
    """A sound answer from the signs of the operands; True when in doubt."""
    name = eqn.primitive.name
    if name in ("exp", "exp2", "logistic", "abs", "square", "sqrt", "rsqrt", "erfc", "cosh") or (
        name == "integer_pow" and eqn.params["y"] % 2 == 0
    ):
        return False
    if name == "max":
        return all(signed)
    if name == "select_n":
        return any(signed[1:])
    if name == "clamp":
        return signed[0] and signed[1]
    if name in STRUCTURE or name in ("add", "mul", "div", "min", "mask", "site", "reduce_sum", "reduce_max", "reduce_min"):
        return any(signed)
    call = inner(eqn)
    if call is not None:
        return _signed_call(call, signed)
    return True


def _signed_call(call: tuple[Any, Sequence[Any]], signed: Sequence[bool]) -> bool:
    program = flatten(ClosedJaxpr(call[0], call[1]))
    known = dict(zip(program.inputs, signed, strict=True))
    for step in program.steps:
        flags = [bool(np.any(np.asarray(v.value) < 0)) if isinstance(v, Const) else known[v] for v in step.ins]
        known.update((slot, can_be_negative(step.eqn, flags, ())) for slot in step.outs)
    last = program.outputs[0]
    return True if isinstance(last, Const) else known[last]


def _leaf_through(eqn: Any, ins: Sequence[Value]) -> tuple[str, tuple[int | None, ...]] | None:
    if len(ins) != 1 or ins[0].leaf is None:
        return None
    path, axes = ins[0].leaf
    name, shape, out = eqn.primitive.name, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if name in ("convert_element_type", "copy", "optimization_barrier", "reduce_precision"):
        return path, axes
    if name == "transpose":
        return path, tuple(axes[d] for d in eqn.params["permutation"])
    if name == "broadcast_in_dim":
        placed: list[int | None] = [None] * len(out)
        for d, target in enumerate(eqn.params["broadcast_dimensions"]):
            placed[int(target)] = axes[d]
        return path, tuple(placed)
    if name in ("reshape", "squeeze", "expand_dims"):
        kept = [a for a, n in zip(axes, shape, strict=True) if n != 1]
        if [n for n in shape if n != 1] != [n for n in out if n != 1]:
            return None
        sources = iter(kept)
        return path, tuple(None if n == 1 else next(sources) for n in out)
    return None


def prefix(paths: frozenset[str]) -> str:
    """The module that a set of parameters belongs to: `BatchNorm_0` for its scale and bias, "" if they share none."""
    folders = [p.rsplit("/", 1)[0] + "/" if "/" in p else "" for p in sorted(paths)]
    return os.path.commonprefix(folders).rpartition("/")[0] if folders else ""


def expand(array: Any, batch: int | None, rank: int) -> Any:
    """A per-sample array, broadcastable to the sample, with an axis of size 1 where the batch stands in the rank-`rank` value."""
    array = jnp.asarray(array)
    if batch is None:
        return array
    return jnp.expand_dims(array.reshape(*(1,) * (rank - 1 - array.ndim), *array.shape), batch)
