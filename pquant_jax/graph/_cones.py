"""Which parts of a flat program become tables: maximal elementwise cones with something transcendental in them.

A cone depends on one value through scalar constants, so that hardware can look its result up: gelu, silu, softplus, or
`rsqrt(max(var, 0) + eps)`.  A value that anything outside reads ends a cone, and is where another one may begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from pquant_jax.graph._batch import ELEMENTWISE, TRANSCENDENTAL
from pquant_jax.graph._calls import evaluate
from pquant_jax.graph._interpret import PRODUCTS, Const, Program, Step, bind, flatten, inner

_CLOSED: Final = frozenset({"quantize", "mask", "site", "lookup"})
_UNARY: Final = (ELEMENTWISE | TRANSCENDENTAL) - _CLOSED
_WITHIN: Final = frozenset({"broadcast_in_dim", "shift_left", "bitcast_convert_type"})  # in calls; the last two: powers of two
_ZERO_AT_ZERO: Final = PRODUCTS | {"mul"}  # the state that a recurrence starts from
_FOLDABLE: Final = 1 << 22  # elements; a larger constant stays an equation


class Cone(NamedTuple):
    """One table: out = label(root), by these steps of the program."""

    root: int
    out: int
    steps: tuple[int, ...]
    label: str


class Plan(NamedTuple):
    """What is known of a program before it runs.

    known: {slot: value} of what depends on constants alone.  cones: {step: Cone that ends there}.  interior: steps that
    only lead to tables.  dropout: random choices and what they alone read, which is there in training only.
    """

    known: Mapping[int, np.ndarray]
    cones: Mapping[int, Cone]
    interior: frozenset[int]
    dropout: frozenset[int]


def elementwise_call(eqn: Any) -> bool:
    """Is it a call with a gradient rule of its own and nothing but elementwise operations inside (relu, not softmax)?"""
    call = inner(eqn)
    if call is None or not eqn.primitive.name.startswith("custom_"):
        return False
    return all(s.eqn.primitive.name in _UNARY | _WITHIN for s in _body(call).steps)


def _body(call: tuple[Any, Sequence[Any]]) -> Program:
    return flatten(ClosedJaxpr(*call))


def plan(program: Program, axes: Mapping[int, int | None], alive: set[int], random: Sequence[int]) -> Plan:
    """Constants, cones and dropout of a flat program.

    axes: where the batch is in every value.  alive: slots that reach an output through data.  random: slots of the keys.
    """
    known = folded(program)
    readers = _readers(program, axes, alive)
    cuts: set[int] = set()
    while True:
        root, smooth = _roots(program, axes, alive, known, cuts)
        active = {root[s] for s in smooth}

        def outside(slot: int, n: int, root: Mapping[int, int] = root) -> bool:
            return n < 0 or root.get(program.steps[n].outs[0]) != root[slot]

        # a value inside a cone that something outside reads too is where the cone has to begin or end
        both = {s for s, n in readers.items() if root.get(s) in active and len({outside(s, m) for m in n}) == 2}
        if not both - cuts:
            break
        cuts |= both
    cones = dict(_cones(program, root, smooth, readers, cuts))
    inside = {n for cone in cones.values() for n in cone.steps}
    return Plan(known, cones, frozenset(inside), _dropout(program, random))


def _readers(program: Program, axes: Mapping[int, int | None], alive: set[int]) -> dict[int, list[int]]:
    """For every slot the steps that read it on the way to an output; -1 stands for the outputs."""
    found: dict[int, list[int]] = {}
    for n, step in enumerate(program.steps):
        if any(s in alive and axes[s] is not None for s in step.outs):
            for v in step.ins:
                if isinstance(v, int):
                    found.setdefault(v, []).append(n)
    for v in program.outputs:
        if isinstance(v, int):
            found.setdefault(v, []).append(-1)
    return found


def _roots(
    program: Program, axes: Mapping[int, int | None], alive: set[int], known: Mapping[int, np.ndarray], cuts: set[int]
) -> tuple[dict[int, int], set[int]]:
    """({slot: the value it is an elementwise function of}, slots that something transcendental leads to)."""
    root: dict[int, int] = {}
    smooth: set[int] = set()

    def source(v: int) -> int:
        return v if v in cuts else root.get(v, v)

    for step in program.steps:
        out = step.outs[0] if len(step.outs) == 1 else None
        if out is None or out not in alive or axes[out] is None or not _unary(step.eqn):
            continue
        data = [v for v in step.ins if isinstance(v, int) and axes[v] is not None]
        shape = step.eqn.outvars[0].aval.shape
        rest = [v for v in step.ins if not (isinstance(v, int) and axes[v] is not None)]
        if not all(_scalar(v, known) for v in rest) or len({source(v) for v in data}) != 1:
            continue
        sizes = [var.aval.shape for v, var in zip(step.ins, step.eqn.invars, strict=True) if v in data]
        if any(s != shape for s in sizes):
            continue
        root[out] = source(data[0])
        if any(v in smooth and v not in cuts for v in data) or _transcendental(step, data):
            smooth.add(out)
    return root, smooth


def _unary(eqn: Any) -> bool:
    return elementwise_call(eqn) if inner(eqn) is not None else eqn.primitive.name in _UNARY


def _scalar(v: int | Const, known: Mapping[int, np.ndarray]) -> bool:
    value = known.get(v) if isinstance(v, int) else np.asarray(v.value)
    return value is not None and bool(value.size) and bool(np.all(value == value.flat[0]))


def _transcendental(step: Step, data: Sequence[int]) -> bool:
    call = inner(step.eqn)
    if call is not None:
        return any(s.eqn.primitive.name in TRANSCENDENTAL for s in _body(call).steps)
    name = step.eqn.primitive.name
    divides = name == "div" and step.ins[1] in data
    return name in TRANSCENDENTAL or divides or (name == "integer_pow" and step.eqn.params["y"] < 0)


def _cones(
    program: Program, root: Mapping[int, int], smooth: set[int], readers: Mapping[int, list[int]], cuts: set[int]
) -> Iterator[tuple[int, Cone]]:
    made = {s: n for n, step in enumerate(program.steps) for s in step.outs}
    for out in sorted(smooth):
        inside = out not in cuts and all(n >= 0 and root.get(program.steps[n].outs[0]) == root[out] for n in readers.get(out, ()))
        if inside:
            continue
        needed, todo = set(), [out]
        while todo:
            n = made[todo.pop()]
            if n not in needed:
                needed.add(n)
                todo += [v for v in program.steps[n].ins if isinstance(v, int) and v in root and v != root[out]]
        steps = tuple(sorted(needed))
        yield steps[-1], Cone(root[out], out, steps, _label(program, steps))


def _label(program: Program, steps: Sequence[int]) -> str:
    """What to call a function: the call that all of it is in, else its last transcendental operation."""
    if len(steps) == 1:
        return _short(program.steps[steps[0]])
    calls = [program.steps[n].calls for n in steps]
    common = [c for c in calls[0] if all(c in other for other in calls) and not c.startswith("_")]
    if common:
        return common[-1]
    last = [n for n in steps if _transcendental(program.steps[n], [v for v in program.steps[n].ins if isinstance(v, int)])]
    return _short(program.steps[last[-1]])


def _short(step: Step) -> str:
    name = step.eqn.primitive.name
    if inner(step.eqn) is not None:
        return step.calls[-1] if step.calls else "function"
    return str({"logistic": "sigmoid", "div": "reciprocal", "integer_pow": "reciprocal"}.get(name, name))


def folded(program: Program) -> dict[int, np.ndarray]:
    """Values of everything that is made of constants alone, computed at once, and of products with nothing but zeros."""
    known: dict[int, np.ndarray] = {}
    for step in program.steps:
        eqn, name = step.eqn, step.eqn.primitive.name
        sizes = [int(np.prod(v.aval.shape)) for v in eqn.outvars if hasattr(v.aval, "shape")]
        if max(sizes, default=0) > _FOLDABLE or name in _CLOSED:  # a format says more than a value
            continue
        if name in _ZERO_AT_ZERO and any(_zeros(v, known) for v in step.ins):
            known[step.outs[0]] = np.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
            continue
        if not all(isinstance(v, Const) or v in known for v in step.ins):
            continue
        plain = all(isinstance(v.aval.dtype, np.dtype) for v in (*eqn.invars, *eqn.outvars))
        if not plain or eqn.effects or inner(eqn) is not None or name.startswith("threefry"):
            continue
        values = [v.value if isinstance(v, Const) else known[v] for v in step.ins]
        if any(isinstance(v, Tracer) for v in values):
            continue
        arrays = [np.asarray(v, var.aval.dtype) for v, var in zip(values, eqn.invars, strict=True)]
        known.update(zip(step.outs, map(np.asarray, evaluate(eqn, arrays)), strict=True))
    return known


def _zeros(v: int | Const, known: Mapping[int, np.ndarray]) -> bool:
    value = v.value if isinstance(v, Const) else known.get(v)
    if value is None or isinstance(value, Tracer) or not np.size(value):
        return False
    return np.asarray(value).dtype.kind == "f" and not np.any(value)


def _dropout(program: Program, random: Sequence[int]) -> frozenset[int]:
    """Random choices and the steps whose results they alone read: the x / keep_prob of a dropout."""
    drawn = set(random)
    readers: dict[int, list[tuple[int, int]]] = {}
    for n, step in enumerate(program.steps):
        if any(v in drawn for v in step.ins if isinstance(v, int)) and step.eqn.primitive.name != "select_n":
            drawn.update(step.outs)
        for place, v in enumerate(step.ins):
            if isinstance(v, int):
                readers.setdefault(v, []).append((n, place))
    for v in program.outputs:
        if isinstance(v, int):
            readers.setdefault(v, []).append((-1, 0))

    def chooses(step: Step) -> bool:
        return step.eqn.primitive.name == "select_n" and isinstance(step.ins[0], int) and step.ins[0] in drawn

    def only_chosen(slot: int) -> bool:
        read = readers.get(slot, [])
        steps = [(program.steps[n], place) for n, place in read if n >= 0]
        return bool(read) and len(steps) == len(read) and all(chooses(s) and place > 0 for s, place in steps)

    chosen = [n for n, step in enumerate(program.steps) if step.outs and all(only_chosen(s) for s in step.outs)]
    choices = [n for n, step in enumerate(program.steps) if chooses(step)]
    return frozenset((*chosen, *choices))


def apply_steps(program: Program, cone: Cone, known: Mapping[int, Any]) -> Any:
    """The function of a cone: root -> out, on any array that broadcasts like the root."""

    def function(x: Any) -> Any:
        env: dict[int, Any] = {cone.root: x}

        def read(v: int | Const) -> Any:
            return v.value if isinstance(v, Const) else env[v] if v in env else known[v]

        for n in cone.steps:
            step = program.steps[n]
            values = [jnp.asarray(read(v), var.aval.dtype) for v, var in zip(step.ins, step.eqn.invars, strict=True)]
            env.update(zip(step.outs, bind(step.eqn, values), strict=True))
        return env[cone.out]

    return function
