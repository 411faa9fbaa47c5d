"""Everything that a model lacks on its way to hardware, at once: an interpreter that goes on where `trace` stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import InputSpec, Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Const, Instrumented, Model, Program, flatten, model_line
from pquant_jax.lower._build import Gap, Nodes, Op, Operand, Refusal, add, place_of
from pquant_jax.lower._estimate import MAX_SIZE, of_program
from pquant_jax.lower._rules import TABLES
from pquant_jax.lower._trace import lower_one
from pquant_jax.numerics import kif, lookup_p, mask_p, quantize_p, region_name
from pquant_jax.numerics.oracle import significant_bits

MAX_BITS: Final = 18  # significant bits of a constant that meets data: one input of a DSP, and 9 adders where there is none
_HIDDEN: Final = 2.0**30  # a mask's minus infinity
_KEEPS: Final = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev split gather dynamic_slice dynamic_update_slice scatter "
    "pad concatenate copy stop_gradient optimization_barrier site convert_element_type reduce_precision max min clamp neg abs "
    "sign floor ceil round select_n reduce_max reduce_min reduce_window_max reduce_window_min cummax cummin scatter-max "
    "scatter-min ge gt le lt eq ne and or not xor is_finite".split()
)
_MEETS: Final = frozenset("add sub mul max min clamp select_n dot_general conv_general_dilated concatenate".split())
_QUANTIZE: Final = "put a quantizer in front: pq.quantize in the chain, or pq.numerics.quantize(x, format)"


class _Seen(NamedTuple):
    """A value on the way: wide is the slot where its bits became unknown, None if a quantizer bounds them."""

    value: Operand
    wide: int | None = None
    name: str = ""


def check(model: Any, view: View | None = None, *, x: Any = None, inputs: InputSpec | Any = None) -> list[Gap]:
    """All gaps on the way to hardware, in the order of the model; empty if `lower.trace` will take it.

    Named are: sites without a format, operands of products and tables that no quantizer bounds, transcendental functions
    outside of a table, operations that have no fixed-point form, constants of more than 18 significant bits that meet data,
    inputs without a port, and a model that is too large.

    Args:
      model: an `Instrumented`, or a `Model` with quantizers of its own (`numerics.quantize`).
      view: finished parameters and formats; None: the model's parameters and no formats.
      x: a batch, for a `Model`.  inputs: its ports, one `InputSpec` or a tree like x; None: inputs have to be quantized first.

    >>> from pquant_jax.graph import from_function
    >>> double = from_function(lambda p, x: jnp.tanh(x) @ p["w"], {"w": jnp.full((2, 1), 0.1)})
    >>> [(gap.where, gap.op) for gap in check(double, x=jnp.ones((1, 2)))]
    [('input', 'input without a port'), ('input', "'tanh'"), ('w', 'constant of 24 significant bits')]
    """
    if isinstance(model, Instrumented):
        return _of_instrumented(model, view)
    if not isinstance(model, Model) or x is None:
        raise LoweringError(
            f"check takes an Instrumented, or a Model and its input x=, got {type(model).__name__}; use pq.instrument(model, x)"
        )
    params = model.params if view is None else view.model
    sample = jax.tree.map(lambda v: jnp.zeros((1, *np.shape(v)[1:]), jnp.float32), x)

    def forward(params: Tree, x: Any) -> Any:
        return model.forward(params, model.state, x, train=False, rng=None)[0]

    ports = jax.tree.map(lambda _: inputs, x) if inputs is None or isinstance(inputs, InputSpec) else inputs
    leaves = jax.tree.leaves(ports, is_leaf=lambda v: v is None)
    return _walk(_program(forward, params, sample), _tree.flatten(params), sample, leaves)


def _of_instrumented(inst: Instrumented, view: View | None) -> list[Gap]:
    view = View(inst.model.params, {}, {}) if view is None else view
    missing = [n for n in inst.sites if n not in view.sites]
    gaps = [
        Gap(n, f"{inst.sites[n].kind} site without a format", "", "add a quantizer to the chain (pq.quantize.hgq or fixed)")
        for n in missing
    ]
    # what is wrong beside them shows with any format there
    leaves = _tree.flatten(view.model)
    filled = {n: kif(float(inst.sites[n].signed), 4.0, 4.0) for n in missing}
    rounded = {n: jnp.round(leaves[n] * 16) / 16 for n in missing if n in leaves}
    full = View(_tree.replace(view.model, rounded), {**filled, **view.sites}, view.masks, view.tables)

    def forward(params: Tree, x: Any) -> Any:
        return inst.forward(full._replace(model=params), inst.model.state, x, train=False)[0]

    program = _program(forward, full.model, inst.sample)
    return gaps + _walk(program, _tree.flatten(full.model), inst.sample, jax.tree.leaves(inst.inputs))


def _program(forward: Any, params: Tree, sample: Any) -> Program:
    return flatten(jax.make_jaxpr(forward)(params, sample), lambda eqn: region_name(eqn) is not None)


def _walk(program: Program, params: dict[str, Any], sample: Any, ports: Sequence[InputSpec | None]) -> list[Gap]:
    gaps: list[Gap] = []
    build: Nodes = []
    env: dict[int, _Seen] = {}
    told: set[int] = set()
    slots = iter(program.inputs)
    for path, leaf in params.items():
        env[next(slots)] = _Seen(np.asarray(leaf), None, path)
    names = ["input" if not path else f"input/{path}" for path in _tree.flatten(sample)]
    bare: dict[int, str] = {}
    declared: dict[int, InputSpec] = {}
    for slot, name, leaf, port in zip(slots, names, jax.tree.leaves(sample), ports, strict=True):
        node = add(build, "input", (), leaf.shape, name)
        env[slot] = _Seen(node, None, name)
        if port is None:
            bare[slot] = name
        else:
            declared[node] = port
    size = of_program(program._replace(inputs=program.inputs[len(params) :]))
    if size.products + size.elements > MAX_SIZE:
        fix = "prune more, make the input smaller, or go through hls4ml with io_stream (trace(limit=inf); hardware.backend null)"
        return [Gap("the model", str(size), "", fix)]
    for step in program.steps:
        ins = [_Seen(np.asarray(v.value)) if isinstance(v, Const) else env[v] for v in step.ins]
        op = Op(build, step.eqn, [v.value for v in ins], _shape(step.eqn), step.scope)
        for v in step.ins:
            if isinstance(v, int) and v in bare and step.eqn.primitive is not quantize_p:
                fix = "declare its format (inputs=pq.InputSpec(...)), or quantize it before anything else"
                gaps.append(Gap(bare.pop(v), "input without a port", model_line(step.eqn), fix))
        gaps += _operands(op, step.ins, ins, told)
        made, refused = _attempt(op, declared)
        gaps += refused
        wide = _wide(op, ins, step.outs[0] if step.outs else -1)
        named = next((v.name for v in ins if v.name), "")
        name = op.scope or named if any(isinstance(v.value, int) for v in ins) else named
        env.update((s, _Seen(m, wide, name)) for s, m in zip(step.outs, made, strict=True))
    return gaps


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()


def _attempt(op: Op, declared: dict[int, InputSpec]) -> tuple[list[Operand], list[Gap]]:
    """Lower one equation; where that is refused, what follows sees an input instead."""
    if region_name(op.eqn) is not None and not all(isinstance(v, np.ndarray) for v in op.ins):
        return [_stand_in(op, v.aval.shape) for v in op.eqn.outvars], []
    try:
        if all(isinstance(v, np.ndarray) for v in op.ins) and any(v.dtype == object for v in map(np.asarray, op.ins)):
            return [_stand_in(op, v.aval.shape) for v in op.eqn.outvars], []
        return lower_one(op, declared), []
    except Refusal as error:
        return [_stand_in(op, v.aval.shape) for v in op.eqn.outvars], [error.gap]


def _stand_in(op: Op, shape: Sequence[int]) -> int:
    return add(op.build, "input", (), shape, place_of(op.build, op.ins, op.scope))


def _operands(op: Op, slots: Sequence[Any], ins: Sequence[_Seen], told: set[int]) -> list[Gap]:
    """Operands that a product or a table can't take, and constants that hardware would have to round."""
    data = [v for v in ins if isinstance(v.value, int)]
    if not data:
        return []
    gaps = []
    line, name = model_line(op.eqn), op.name
    products = (
        name in ("dot_general", "conv_general_dilated") or name in ("square", "integer_pow") or (name == "mul" and len(data) > 1)
    )
    if products or region_name(op.eqn) is not None or op.eqn.primitive is lookup_p:
        what = f"table {region_name(op.eqn)!r}" if region_name(op.eqn) is not None else repr(name)
        for v in data:
            if v.wide is not None and v.wide not in told:
                told.add(v.wide)
                where = op.scope or v.name or place_of(op.build, op.ins, "")
                gaps.append(Gap(where, f"operand of {what} without a quantizer", line, _QUANTIZE))
    if name in _MEETS:
        for slot, v in zip(slots, ins, strict=True):
            bits = 0 if isinstance(v.value, int) else _significant(v.value)
            if bits > MAX_BITS and not (isinstance(slot, int) and slot in told):
                told.update([slot] if isinstance(slot, int) else [])
                where = v.name or op.scope or place_of(op.build, op.ins, "")
                fix = "quantize it, like every parameter that meets data: fewer fractional bits, or a site of its own"
                gaps.append(Gap(where, f"constant of {bits} significant bits", line, fix))
    return gaps


def _significant(value: np.ndarray) -> int:
    """Most significant bits of any element."""
    if value.dtype.kind != "f" or not value.size:
        return 0
    finite = value[np.isfinite(value) & (np.abs(value) < _HIDDEN)].astype(np.float64)
    return int(significant_bits(finite).max(initial=0))


def _wide(op: Op, ins: Sequence[_Seen], slot: int) -> int | None:
    """Where the bits of the result became unknown: at a sum or product, but not at a quantizer or a table."""
    if op.eqn.primitive in (quantize_p, lookup_p) or region_name(op.eqn) is not None or op.name in TABLES:
        return None
    data = [v for v in ins if isinstance(v.value, int)]
    if not data:
        return None
    scaled = op.name in ("mul", "div") and len(data) == 1 and all(np.size(v.value) == 1 for v in ins if v is not data[0])
    if op.name in _KEEPS or op.eqn.primitive is mask_p or scaled:
        return next((v.wide for v in data if v.wide is not None), None)
    return slot
