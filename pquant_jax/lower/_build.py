"""What every lowering rule works with: the growing graph, one equation, and rearrangements of its operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.graph import model_line
from pquant_jax.lower.ir import Node

Nodes = list[Node]  # the growing graph: rules append to it and pass indices around
Operand = int | np.ndarray  # a node, or a constant


class Op(NamedTuple):
    """One equation to lower: its operands, the shape of its first result and the name of its place in the model."""

    build: Nodes
    eqn: Any
    ins: Sequence[Operand]
    shape: tuple[int, ...]
    scope: str

    @property
    def name(self) -> str:
        return self.eqn.primitive.name


def add(build: Nodes, op: str, inputs: Sequence[int], shape: Sequence[int], name: str = "", **attrs: Any) -> int:
    """Append a node; its index."""
    build.append(Node(op, tuple(inputs), tuple(int(n) for n in shape), attrs, name))
    return len(build) - 1


def emit(op: Op, name: str, *inputs: Operand, **attrs: Any) -> int:
    """A node of the shape of the equation's result, operands broadcast to it."""
    return add(op.build, name, [broadcast(op.build, v, op.shape) for v in inputs], op.shape, op.scope, **attrs)


def take(build: Nodes, x: int, index: np.ndarray) -> int:
    """Rearrange; a rearrangement of a rearrangement is one, and of nothing is none."""
    source = build[x]
    if source.op == "take":
        return take(build, source.inputs[0], np.append(source.attrs["index"].ravel(), -1)[index])
    if source.shape == index.shape and np.array_equal(index.ravel(), np.arange(index.size)):
        return x
    return add(build, "take", (x,), index.shape, source.name, index=index.astype(np.int64))


def node(build: Nodes, value: Operand) -> int:
    """A node for a constant; nodes as they are."""
    if isinstance(value, np.ndarray):
        return add(build, "const", (), value.shape, value=np.asarray(value, np.float64))
    return value


def numbers(shape: Sequence[int]) -> np.ndarray:
    """The number of every element of an array, int64."""
    return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def shape_of(build: Nodes, value: Operand) -> tuple[int, ...]:
    """Of a node or a constant."""
    return value.shape if isinstance(value, np.ndarray) else build[value].shape


def gathered(build: Nodes, value: Operand, index: np.ndarray) -> int:
    """`value.ravel()[index]`, 0 where the index is -1."""
    if isinstance(value, np.ndarray):
        return node(build, np.append(value.ravel(), 0)[index])
    return take(build, value, index)


def broadcast(build: Nodes, value: Operand, shape: tuple[int, ...]) -> int:
    """As numpy broadcasts."""
    if shape_of(build, value) == shape:
        return node(build, value)
    return gathered(build, value, np.broadcast_to(numbers(shape_of(build, value)), shape))


def arranged(build: Nodes, value: Operand, order: Sequence[int], shape: tuple[int, ...]) -> int:
    """Transposed, then reshaped."""
    return gathered(build, value, numbers(shape_of(build, value)).transpose(order).reshape(shape))


def joined(build: Nodes, values: Sequence[Operand], index: np.ndarray) -> int:
    """Elements of several values by their number in all of them, one after the other; 0 where the index is -1."""
    if len(values) == 1:
        return gathered(build, values[0], index)
    nodes = [node(build, v) for v in values]
    total = sum(int(np.prod(build[n].shape, dtype=np.int64)) for n in nodes)
    return take(build, add(build, "concat", nodes, (total,), build[nodes[0]].name), index)


def place_of(build: Nodes, ins: Sequence[Operand], scope: str) -> str:
    """The last thing with a name that the operands of an equation came from."""
    pending = {v for v in ins if isinstance(v, int)}
    while pending and not scope:
        latest = max(pending)
        scope = build[latest].name
        pending = (pending - {latest}) | set(build[latest].inputs)
    return scope or "the input"


class Gap(NamedTuple):
    """One thing that a model lacks on its way to hardware.

    where: the site, parameter or layer.  op: what is there.  line: the model's, `model.py:12`, or "".  fix: what to do.
    """

    where: str
    op: str
    line: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.op}{f' at {self.line}' if self.line else ''}: {self.fix}"


class Refusal(LoweringError):
    """A `LoweringError` of one equation, with its `Gap`."""

    def __init__(self, gap: Gap) -> None:
        super().__init__(f"can't lower {gap.op} (near {gap.where}{f', {gap.line}' if gap.line else ''}): {gap.fix}")
        self.gap = gap


def refusal(op: Op, what: str, why: str) -> Refusal:
    """The error for an equation: what it is, where in the model, why not and what to do."""
    return Refusal(Gap(place_of(op.build, op.ins, op.scope), what, model_line(op.eqn), why))
