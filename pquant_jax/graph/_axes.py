"""Which axes of a program's values are one: those that can only be cut together.

Axes are one where an equation pairs their elements: the columns of a kernel, its bias, the activation behind it, the
rows of the next kernel.  Such a class ends in products and sums over it; where anything else reads an axis, as a
concatenation reads positions, the class is pinned and keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from pquant_jax.graph._interpret import ELEMENTWISE, Const, Program

POOLS: Final = frozenset({"reduce_window_max", "reduce_window_sum"})

Axis = tuple[Any, int]  # (a value, its axis): a value of a program, or the name of an input
Local = tuple[int, int]  # (number of an operand of an equation, or -1 for its result; its axis)


class Sink(NamedTuple):
    """Products summed over an axis (of one factor: a plain sum): a term may go where a factor is always 0.

    factors: slots or constants.  axes: all axes of each factor.  over: the axis of each that is summed, one class.
    """

    factors: tuple[int | Const, ...]
    axes: tuple[tuple[Axis, ...], ...]
    over: tuple[Axis, ...]


class Linked(NamedTuple):
    """A program with its classes of axes.

    axes: per step, the `Axis`es of every operand and of the first result.  sinks: its products and sums.
    """

    program: Program
    axes: tuple[tuple[tuple[Axis, ...], ...], ...]
    sinks: tuple[Sink, ...]


@dataclass
class Links:
    """Classes of axes over several programs (union-find).

    pins: axes of which something reads the positions.  born: axes that something makes at its own size, such as random
    bits or two axes reshaped to one; to cut them costs a gather.
    """

    above: dict[Axis, Axis] = field(default_factory=dict)
    pins: set[Axis] = field(default_factory=set)
    born: set[Axis] = field(default_factory=set)

    def find(self, axis: Axis) -> Axis:
        """The representative of a class."""
        while axis in self.above:
            axis = self.above[axis]
        return axis

    def join(self, a: Axis, b: Axis) -> None:
        """Make one class of two."""
        a, b = self.find(a), self.find(b)
        if a != b:
            self.above[a] = b

    def classes(self, axes: Iterable[Axis]) -> set[Axis]:
        """The representatives of the classes of these axes."""
        return {self.find(axis) for axis in axes}


def link(links: Links, program: Program, names: Sequence[Any], fixed: int) -> Linked:
    """Add the axes of a program to `links`; those of its first `fixed` outputs are pinned.

    names: of the program's inputs; inputs of one name are one value in all programs.
    """
    known = dict(zip(program.inputs, names, strict=True))

    def axes_of(v: int | Const, shape: Sequence[int]) -> tuple[Axis, ...]:
        value = known.get(v, (id(program), v)) if isinstance(v, int) else (id(program), "constant", id(v))
        return tuple((value, d) for d in range(len(shape)))

    rows: list[tuple[tuple[Axis, ...], ...]] = []
    sinks: list[Sink] = []
    made: dict[int, tuple[Axis, ...]] = {}
    for step in program.steps:
        values = ((v, var.aval.shape) for v, var in zip(step.ins, step.eqn.invars, strict=True))
        made[step.outs[0]] = axes_of(step.outs[0], step.eqn.outvars[0].aval.shape)
        rows.append((*(axes_of(v, shape) for v, shape in values), made[step.outs[0]]))
        pairs, sums = joins(step.eqn)
        for (n, d), (m, e) in pairs:
            links.join(rows[-1][n][d], rows[-1][m][e])
        for group in sums:
            own = tuple(rows[-1][n][d] for n, d in group)
            for axis in own[1:]:
                links.join(own[0], axis)
            sinks.append(Sink(step.ins, tuple(rows[-1][:-1]), own))
        seen = {local for pair in pairs for local in pair} | {local for group in sums for local in group}
        for n, axes in enumerate(rows[-1][:-1]):
            links.pins.update(axis for d, axis in enumerate(axes) if (n, d) not in seen)
        if step.eqn.primitive.name != "broadcast_in_dim":
            links.born.update(axis for d, axis in enumerate(rows[-1][-1]) if (-1, d) not in seen)
    for v in program.outputs[:fixed]:
        links.pins.update(made.get(v, ()) if isinstance(v, int) else ())
    return Linked(program, tuple(rows), tuple(sinks))


def joins(eqn: Any) -> tuple[list[tuple[Local, Local]], list[tuple[Local, ...]]]:
    """(pairs of axes that an equation makes one, groups of operand axes over which it sums products).

    An operand axis that is in neither is pinned.
    """
    name, params = eqn.primitive.name, eqn.params
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    out = tuple(eqn.outvars[0].aval.shape)
    if name in ELEMENTWISE:
        return [p for n, s in enumerate(shapes) for p in _from_the_right(n, s, out)], []
    if name == "dot_general":
        return _dot(params["dimension_numbers"], shapes)
    if name == "conv_general_dilated" and params["feature_group_count"] == params["batch_group_count"] == 1:
        lhs, rhs, result = params["dimension_numbers"]
        return [((0, lhs[0]), (-1, result[0])), ((1, rhs[0]), (-1, result[1]))], [((0, lhs[1]), (1, rhs[1]))]
    if name in ("reduce_sum", "reduce_max", "reduce_min"):
        kept = [d for d in range(len(shapes[0])) if d not in params["axes"]]
        over = [((0, d),) for d in params["axes"]] if name == "reduce_sum" else []
        return [((0, d), (-1, n)) for n, d in enumerate(kept)], over
    if name == "concatenate":
        free = [d for d in range(len(out)) if d != params["dimension"]]
        return [((n, d), (-1, d)) for n in range(len(shapes)) for d in free], []
    return [((0, a), (-1, b)) for a, b in _moves(name, params, shapes[0] if shapes else (), out)], []


def _from_the_right(n: int, shape: tuple[int, ...], out: tuple[int, ...]) -> Iterator[tuple[Local, Local]]:
    """Formats broadcast against what they quantize."""
    rank = len(out) - len(shape)
    return (((n, d), (-1, d + rank)) for d, size in enumerate(shape) if size == out[d + rank])


def _dot(numbers: Any, shapes: Sequence[tuple[int, ...]]) -> tuple[list[tuple[Local, Local]], list[tuple[Local, ...]]]:
    contract, batch = numbers
    pairs = [((side, d), (-1, n)) for side in (0, 1) for n, d in enumerate(batch[side])]
    place = len(batch[0])
    for side, shape in enumerate(shapes):
        for d in range(len(shape)):
            if d not in (*contract[side], *batch[side]):
                pairs.append(((side, d), (-1, place)))
                place += 1
    return pairs, [((0, a), (1, b)) for a, b in zip(*contract, strict=True)]


def _moves(name: str, params: Mapping[str, Any], shape: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[int, int]]:
    """(axis of the operand, axis of the result) for what only moves elements; nothing for an unknown operation."""
    if name == "transpose":
        return [(d, n) for n, d in enumerate(params["permutation"])]
    if name == "broadcast_in_dim":
        return [(d, int(n)) for d, n in enumerate(params["broadcast_dimensions"]) if shape[d] == out[int(n)]]
    if name == "squeeze" or (name == "reshape" and params["dimensions"] is None):
        return list(_regrouped(shape, out))
    if name == "slice":
        return [d for d in enumerate(range(len(shape))) if shape[d[0]] == out[d[0]]]
    if name in POOLS:
        still = zip(params["window_dimensions"], params["window_strides"], shape, out, strict=True)
        return [(d, d) for d, (window, stride, n, m) in enumerate(still) if window == stride == 1 and n == m]
    if name == "rev":
        return [(d, d) for d in range(len(shape)) if d not in params["dimensions"]]
    return []


def _regrouped(shape: tuple[int, ...], out: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The axes that a reshape leaves alone: of equal size, with as many elements behind them on both sides."""
    behind = {(n, math.prod(out[d + 1 :])): d for d, n in enumerate(out) if n > 1}
    for d, n in enumerate(shape):
        if n > 1 and (n, math.prod(shape[d + 1 :])) in behind:
            yield d, behind[n, math.prod(shape[d + 1 :])]
