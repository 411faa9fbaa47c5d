"""A jaxpr as a flat program: what `instrument`, `ebops` and the lowering have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pquant_jax._errors import TraceError
from pquant_jax.numerics import rebind, site_p

INLINE: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
ELEMENTWISE = frozenset(
    "add sub mul div max min neg abs sign square integer_pow pow exp exp2 log log1p expm1 tanh logistic rsqrt sqrt cbrt "
    "erf sin cos floor ceil round select_n clamp ge gt le lt eq ne and or not xor is_finite nextafter rem "
    "quantize mask site copy stop_gradient convert_element_type reduce_precision optimization_barrier custom_jvp_call "
    "custom_vjp_call".split()
)
REDUCE = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin psum".split())


_LOOPS = frozenset({"scan", "while", "cond"})


class Const(NamedTuple):
    """A literal or closed-over constant operand of a step."""

    value: Any


class Step(NamedTuple):
    """One equation of the flat program; operands are slots (int) or `Const`s, results are slots.

    scope: the innermost `jax.named_scope` it was traced under, e.g. the site's name.  calls: the names of the functions
    it was inlined from, outermost first.
    """

    eqn: Any
    ins: tuple[int | Const, ...]
    outs: tuple[int, ...]
    scope: str = ""
    calls: tuple[str, ...] = ()


class Program(NamedTuple):
    """A jaxpr with its calls inlined: every value has a slot."""

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | Const, ...]


def inner(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants of a call-like equation, else None."""
    key = INLINE.get(eqn.primitive.name)
    if key is None:
        return None
    sub = eqn.params[key]
    return (sub.jaxpr, sub.consts) if isinstance(sub, ClosedJaxpr) else (sub, ())


def flatten(closed: ClosedJaxpr, opaque: Callable[[Any], bool] = lambda eqn: False) -> Program:
    """Inline every call except those that `opaque(eqn)` wants to keep whole; products keep the axes that operands share."""
    steps: list[Step] = []
    count = 0

    def fresh() -> int:
        nonlocal count
        count += 1
        return count - 1

    def walk(
        jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[int | Const], outer: str, calls: tuple[str, ...] = ()
    ) -> list[int | Const]:
        env: dict[Any, int | Const] = dict(zip(jaxpr.constvars, map(Const, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> int | Const:
            return Const(v.val) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            ins = tuple(read(v) for v in eqn.invars)
            call, scope = inner(eqn), str(eqn.source_info.name_stack) or outer
            only = _only_part(eqn)
            if only is not None:
                outs: Sequence[int | Const] = [ins[only]]
            elif call is not None and not opaque(eqn):
                name = eqn.params.get("name")
                outs = walk(call[0], call[1], ins, scope, (*calls, str(name)) if name else calls)
            else:
                slots = tuple(fresh() for _ in eqn.outvars)
                steps.append(Step(eqn, ins, slots, scope, calls))
                outs = slots
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(fresh() for _ in closed.jaxpr.invars)
    outputs = walk(closed.jaxpr, closed.consts, inputs, "")
    return Program(_keep_shared_axes(_read(steps, outputs), outputs, fresh), inputs, tuple(outputs))


def _only_part(eqn: Any) -> int | None:
    """Which operand a concatenation with nothing is: `jnp.pad` puts edges of width 0 at every axis, the batch too."""
    if eqn.primitive.name != "concatenate":
        return None
    parts = [n for n, v in enumerate(eqn.invars) if np.prod(v.aval.shape) > 0]
    return parts[0] if len(parts) == 1 else None


def _read(steps: Sequence[Step], outputs: Sequence[int | Const]) -> list[Step]:
    """The steps that an output needs, those with effects, and the names that a model gives."""
    needed = {v for v in outputs if isinstance(v, int)}
    kept = []
    for step in reversed(steps):
        if step.eqn.effects or step.eqn.primitive is site_p or needed.intersection(step.outs):
            needed.update(v for v in step.ins if isinstance(v, int))
            kept.append(step)
    return kept[::-1]


def _keep_shared_axes(steps: Sequence[Step], outputs: Sequence[int | Const], fresh: Callable[[], int]) -> tuple[Step, ...]:
    """`jnp.matmul` with axes of size 1 that both operands share kept in the product, as it keeps larger ones.

    It squeezes them away and puts them back behind the product.  The batch of one sample is such an axis: in between it
    would have no place, and the product would read other values than in a larger batch.
    """
    made = {slot: step for step in steps for slot in step.outs}
    reads = Counter(v for v in (*(v for step in steps for v in step.ins), *outputs) if isinstance(v, int))

    def source(v: int | Const, name: str) -> Step | None:
        """The step `name` that gives v, if v is read once."""
        step = made.get(v) if isinstance(v, int) and reads[v] == 1 else None
        return step if step is not None and step.eqn.primitive.name == name else None

    kept: list[Step] = []
    gone: set[int] = set()
    for step in steps:
        kept.append(step)
        if step.eqn.primitive.name != "broadcast_in_dim":
            continue
        turn = source(step.ins[0], "transpose")
        dot = source(step.ins[0] if turn is None else turn.ins[0], "dot_general")
        squeezes = [] if dot is None else [s for v in dot.ins if (s := source(v, "squeeze")) is not None]
        product = None if dot is None or len(squeezes) < 2 else _whole_product(dot, squeezes, turn, step)
        if dot is None or product is None:
            continue
        kept.pop()
        gone.update(s.outs[0] for s in (dot, turn, *squeezes) if s is not None)
        place = dict(zip(product.inputs, (s.ins[0] for s in squeezes), strict=True))
        for part in product.steps:
            outs = tuple(step.outs[0] if v in product.outputs else fresh() for v in part.outs)
            kept.append(Step(part.eqn, tuple(place[v] if isinstance(v, int) else v for v in part.ins), outs, dot.scope))
            place.update(zip(part.outs, outs, strict=True))
    return tuple(s for s in kept if not gone.intersection(s.outs))


def _whole_product(dot: Step, squeezes: Sequence[Step], turn: Step | None, back: Step) -> Program | None:
    """The program of both operands for squeeze, dot_general, transpose and `back`; None if `back` does not undo a squeeze.

    An axis that `back` adds is that of both operands which is as far from the end; JAX's batching gives the product.
    """
    small, whole, placed = back.eqn.invars[0].aval.shape, back.eqn.outvars[0].aval.shape, back.eqn.params["broadcast_dimensions"]
    added = [d for d in range(len(whole)) if d not in placed]
    operands = [s.eqn.invars[0].aval for s in squeezes]
    shared = [[d - len(whole) + len(v.shape) for d in added] for v in operands]
    squeezed = [s.eqn.params["dimensions"] for s in squeezes]
    if not added or tuple(whole[d] for d in placed) != small or any(whole[d] != 1 for d in added):
        return None
    if any(not set(axes) <= set(dims) for axes, dims in zip(shared, squeezed, strict=True)):
        return None
    rest = [[d - sum(a < d for a in axes) for d in dims if d not in axes] for axes, dims in zip(shared, squeezed, strict=True)]

    def product(*values: Any) -> Any:
        y = bind(dot.eqn, [lax.squeeze(v, dims) for v, dims in zip(values, rest, strict=True)])[0]
        return y if turn is None else lax.transpose(y, turn.eqn.params["permutation"])

    for *axes, d in zip(*shared, added, strict=True):
        product = jax.vmap(product, tuple(axes), d)
    return flatten(jax.make_jaxpr(product)(*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in operands)))


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Bind the equation's primitive on concrete or traced values; our own primitives get their gradient rule back."""
    ours = rebind(eqn.primitive, tuple(values), eqn.params)
    if ours is not None:
        return [ours]
    # a custom_jvp_call keeps its rule this way; the functions come apart from the parameters before jax 0.10
    made = eqn.primitive.get_bind_params(eqn.params)
    functions, params = made if isinstance(made, tuple) else ((), made)
    out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def contains_product(jaxpr: Jaxpr) -> bool:
    """Does the jaxpr, or one nested in it, hold a product or a named site?"""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS or eqn.primitive is site_p:
            return True
        if any(contains_product(sub) for sub in nested(eqn)):
            return True
    return False


def nested(eqn: Any) -> list[Jaxpr]:
    """Every jaxpr among an equation's parameters: calls, loop bodies, branches."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                found.append(item.jaxpr if isinstance(item, ClosedJaxpr) else item)
    return found


def batch_axes(program: Program, inputs: Sequence[int | None]) -> dict[int, int | None]:
    """Which axis of every value is the batch; None for values that are the same for all samples.

    A value that lost its batch axis to a reduction is a batch statistic.
    """
    axes: dict[int, int | None] = dict(zip(program.inputs, inputs, strict=True))

    def axis(operand: int | Const) -> int | None:
        return None if isinstance(operand, Const) else axes[operand]

    for step in program.steps:
        batch = [axis(v) for v in step.ins]
        axes.update((slot, _batch_of(step.eqn, batch, n)) for n, slot in enumerate(step.outs))
    return axes


def _batch_of(eqn: Any, batch: list[int | None], result: int) -> int | None:
    found = next(((n, b) for n, b in enumerate(batch) if b is not None), None)
    if found is None:
        return None
    where, b = found
    name, params = eqn.primitive.name, eqn.params
    shape, out = eqn.invars[where].aval.shape, eqn.outvars[result].aval.shape
    if name == "dot_general":
        return _batch_of_dot(eqn, batch)
    if name == "conv_general_dilated":
        return params["dimension_numbers"].out_spec[0]
    if name in REDUCE:
        axes = tuple(params.get("axes", ()))
        return None if b in axes else b if name == "psum" else b - sum(a < b for a in axes)
    if name == "transpose":
        return tuple(params["permutation"]).index(b)
    if name == "broadcast_in_dim":
        return int(params["broadcast_dimensions"][b])
    if name == "squeeze":
        if b in params["dimensions"]:
            raise TraceError(f"squeeze {shape} -> {out} drops the batch of one sample (axis {b}); name the axes to squeeze")
        return b - sum(a < b for a in params["dimensions"])
    if name == "reshape":
        before = int(np.prod(shape[:b]))
        # several places fit a batch of one alone: it stays where it is, if it can
        for a in sorted(range(len(out)), key=lambda a: a != b):
            if int(np.prod(out[:a])) == before and out[a] == shape[b]:
                return a
        raise TraceError(f"reshape {shape} -> {out} mixes the batch (axis {b}) with other axes; keep samples apart")
    if b in _along(name, params):
        raise TraceError(f"{name!r} runs along the batch (axis {b}), which mixes samples; keep samples apart")
    if name in ELEMENTWISE or (len(out) > b and out[b] == shape[b]):
        return b
    if name in _LOOPS:  # a counter or another value that is the same for all samples
        return None
    raise TraceError(f"can't follow the batch through {name!r} ({shape} -> {out}); move it out of the compressed model")


def _along(name: str, params: Mapping[str, Any]) -> tuple[int, ...]:
    """The axes along which an operation combines or moves elements."""
    if name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        return (params["axis"],)
    if name in ("sort", "concatenate"):
        return (params["dimension"],)
    return tuple(params["dimensions"]) if name == "rev" else ()


def _batch_of_dot(eqn: Any, batch: list[int | None]) -> int | None:
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    side, b = next((n, b) for n, b in enumerate(batch) if b is not None)
    contract, batched = ((lhs_contract, lhs_batch), (rhs_contract, rhs_batch))[side]
    if b in contract:
        return None
    if b in batched:
        return tuple(batched).index(b)
    ranks = [len(v.aval.shape) for v in eqn.invars]
    taken = ((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch))
    free = [[d for d in range(rank) if d not in used] for rank, used in zip(ranks, taken, strict=True)]
    before = len(lhs_batch) + (len(free[0]) if side else 0)
    return before + free[side].index(b)


def live(program: Program, axes: Mapping[int, int | None], outputs: Sequence[int | Const]) -> set[int]:
    """Slots from which `outputs` are reached through batched values alone.

    What leads only to batch statistics (the squares in a training BatchNorm) is not hardware and gets no site.
    """
    reached = {slot for slot in outputs if not isinstance(slot, Const)}
    for step in reversed(program.steps):
        if any(slot in reached and axes[slot] is not None for slot in step.outs):
            reached.update(v for v in step.ins if not isinstance(v, Const))
    return reached
