"""A jaxpr as a flat program: what `instrument`, `ebops` and the lowering have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from pquant_jax.graph._batch import ELEMENTWISE as ELEMENTWISE, batch_of
from pquant_jax.graph._calls import (
    PRODUCTS as PRODUCTS,
    bind,
    contains_product as contains_product,
    evaluate,
    inner,
    nested as nested,
    unroll,
)
from pquant_jax.numerics import site_p


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
    """A jaxpr with its calls inlined and its loops unrolled: every value has a slot.

    carries: (before, after the first step) of every unrolled loop's carry; the batch is on the same axis of both.
    """

    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | Const, ...]
    carries: tuple[tuple[int, int], ...] = ()


def flatten(closed: ClosedJaxpr, opaque: Callable[[Any], bool] = lambda eqn: False) -> Program:
    """Inline every call except those that `opaque(eqn)` wants to keep whole; products keep the axes that operands share.

    Loops of a known length are unrolled and known branches taken; those that depend on the data stay as they are.
    """
    steps: list[Step] = []
    made: dict[int, Step] = {}
    values: dict[int, Any] = {}
    carries: list[tuple[int, int]] = []
    count = 0

    def fresh() -> int:
        nonlocal count
        count += 1
        return count - 1

    def known(v: int | Const) -> Any:
        """The value of a slot that no input of the program reaches, else None."""
        if isinstance(v, Const):
            return v.value
        if v in made and v not in values:
            step = made[v]
            results = [None] * len(step.outs) if step.eqn.effects else evaluate(step.eqn, [known(u) for u in step.ins])
            values.update(zip(step.outs, results, strict=True))
        return values.get(v)

    def call(eqn: Any, ins: Sequence[int | Const], scope: str, calls: tuple[str, ...]) -> list[int | Const] | None:
        """The results of an equation that holds a jaxpr to be walked."""
        found = None if opaque(eqn) else inner(eqn)
        if found is not None:
            name = eqn.params.get("name")
            return walk(*found, ins, scope, (*calls, str(name)) if name else calls)
        straight = unroll(eqn, lambda n: known(ins[n]))
        if straight is None:
            return None
        outs = walk(straight.closed.jaxpr, straight.closed.consts, [ins[n] for n in straight.operands], scope, calls)
        pairs = ((ins[before], outs[after]) for before, after in straight.carries)
        carries.extend((a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int))
        return outs[: len(eqn.outvars)]

    def walk(
        jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[int | Const], outer: str, calls: tuple[str, ...] = ()
    ) -> list[int | Const]:
        env: dict[Any, int | Const] = dict(zip(jaxpr.constvars, map(Const, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> int | Const:
            return Const(v.val) if isinstance(v, Literal) else env[v]

        for eqn in jaxpr.eqns:
            ins = tuple(read(v) for v in eqn.invars)
            scope, only = str(eqn.source_info.name_stack) or outer, _only_part(eqn)
            outs: Sequence[int | Const] | None = call(eqn, ins, scope, calls) if only is None else [ins[only]]
            if outs is None:
                outs = slots = tuple(fresh() for _ in eqn.outvars)
                steps.append(Step(eqn, ins, slots, scope, calls))
                made.update(dict.fromkeys(slots, steps[-1]))
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    inputs = tuple(fresh() for _ in closed.jaxpr.invars)
    outputs = walk(closed.jaxpr, closed.consts, inputs, "")
    kept = _keep_shared_axes(_reached(steps, outputs), outputs, fresh)
    return Program(kept, inputs, tuple(outputs), tuple(carries))


def _only_part(eqn: Any) -> int | None:
    """Which operand a concatenation with nothing is: `jnp.pad` puts edges of width 0 at every axis, the batch too."""
    if eqn.primitive.name != "concatenate":
        return None
    parts = [n for n, v in enumerate(eqn.invars) if np.prod(v.aval.shape) > 0]
    return parts[0] if len(parts) == 1 else None


def _reached(steps: Sequence[Step], outputs: Sequence[int | Const]) -> tuple[Step, ...]:
    """The steps that the outputs depend on: `instrument` leaves both forms of what it fuses, and one of them is dead.

    What a model says about a parameter (`site`) is kept: nothing reads it in nnx.
    """
    needed = {v for v in outputs if isinstance(v, int)}
    kept: list[Step] = []
    for step in reversed(steps):
        if needed.intersection(step.outs) or step.eqn.effects or step.eqn.primitive is site_p:
            kept.append(step)
            needed.update(v for v in step.ins if isinstance(v, int))
    return tuple(reversed(kept))


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


def batch_axes(program: Program, inputs: Sequence[int | None]) -> dict[int, int | None]:
    """Which axis of every value is the batch; None for values that are the same for all samples.

    A value that lost its batch axis to a reduction is a batch statistic.  What a loop starts from (zeros, say) is the
    batch's where its carry is.
    """
    starts: dict[int, int] = {}
    while True:
        axes = _axes_of(program, inputs, starts)
        pairs = [(a, axes.get(b)) for a, b in program.carries if axes.get(a, 0) is None and a not in program.inputs]
        more = {slot: axis for slot, axis in pairs if axis is not None}
        if not more:
            return axes
        starts.update(more)


def _axes_of(program: Program, inputs: Sequence[int | None], starts: Mapping[int, int]) -> dict[int, int | None]:
    axes: dict[int, int | None] = dict(zip(program.inputs, inputs, strict=True))

    def axis(operand: int | Const) -> int | None:
        return None if isinstance(operand, Const) else axes[operand]

    for step in program.steps:
        batch = [axis(v) for v in step.ins]
        axes.update((slot, starts.get(slot, batch_of(step.eqn, batch, n))) for n, slot in enumerate(step.outs))
    return axes


def live(program: Program, axes: Mapping[int, int | None], outputs: Sequence[int | Const]) -> set[int]:
    """Slots from which `outputs` are reached through batched values alone.

    What leads only to batch statistics (the squares in a training BatchNorm) is not hardware and gets no site.
    """
    reached = {slot for slot in outputs if not isinstance(slot, Const)}
    for step in reversed(program.steps):
        if any(slot in reached and axes[slot] is not None for slot in step.outs):
            reached.update(v for v in step.ins if not isinstance(v, Const))
    return reached
