"""jaxpr -> IR: the finished forward on one sample as a fixed-point graph."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import InputSpec, Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Const, Instrumented, bind, flatten
from pquant_jax.lower._build import Nodes, Op, Operand, add, node, numbers, refusal, take
from pquant_jax.lower._estimate import MAX_SIZE, check_size
from pquant_jax.lower._rules import ADVICE, RANDOM, pick
from pquant_jax.lower.ir import Graph, reached, validate
from pquant_jax.numerics import quantize_p


def trace(inst: Instrumented, view: View, model_state: Tree, *, limit: float = MAX_SIZE) -> Graph:
    """The instrumented inference forward of one sample as a fixed-point `Graph`.

    Parameters and formats are folded into constants, tables that the view lacks are built; every input array becomes one
    port in its declared format, and outputs keep the order of the forward's.
    limit: of products and other elements, see `estimate`; checked before the work starts.
    Raises: LoweringError for an operation without an exact fixed-point form, naming it and its place in the model.
    """

    def forward(x: Any) -> Any:
        return inst.forward(view, model_state, x, train=False)[0]

    missing = sorted(n for n, spec in inst.sites.items() if n not in view.sites)
    if missing:
        raise LoweringError(
            f"site {missing[0]!r} has no fixed-point format: add a quantizer (pq.quantize.hgq or fixed) to the chain"
        )
    check_size(inst, view, model_state, limit)
    view = with_tables(inst, view, model_state)
    program = flatten(jax.make_jaxpr(forward)(inst.sample))
    build: Nodes = []
    env: dict[int, Operand] = {}
    ports: list[int] = []
    samples, specs = jax.tree.leaves(inst.sample), jax.tree.leaves(inst.inputs)
    for slot, sample, port in zip(program.inputs, samples, specs, strict=True):
        ports.append(add(build, "input", (), sample.shape[1:], "input", k=port.k, i=port.i, f=port.f))
        env[slot] = take(build, ports[-1], numbers(sample.shape))

    def read(v: int | Const) -> Operand:
        return np.asarray(v.value) if isinstance(v, Const) else env[v]

    declared = dict(zip(ports, specs, strict=True))
    for step in program.steps:
        op = Op(build, step.eqn, [read(v) for v in step.ins], _shape(step.eqn), step.scope)
        env.update(zip(step.outs, lower_one(op, declared), strict=True))
    results = [_sample(build, read(v)) for v in program.outputs]
    return validate(reached(Graph(tuple(build), tuple(ports), tuple(results))))


def with_tables(inst: Instrumented, view: View, model_state: Tree) -> View:
    """The view with its integer tables, built if it has none."""
    return view if view.tables else view._replace(tables=inst.tables(view, model_state))


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()


def _sample(build: Nodes, value: Operand) -> int:
    """An output without its batch axis of length 1."""
    out = node(build, value)
    return take(build, out, numbers(build[out].shape[1:]))


def lower_one(op: Op, ports: dict[int, InputSpec]) -> list[Operand]:
    """The results of one equation: constants if its operands are, else nodes."""
    if op.name in RANDOM:
        raise refusal(op, repr(op.name), ADVICE[op.name])
    if all(isinstance(v, np.ndarray) for v in op.ins):  # parameters alone: folded in the traced dtype
        arrays = [jnp.asarray(v, var.aval.dtype) for v, var in zip(op.ins, op.eqn.invars, strict=True)]
        return [np.asarray(o) for o in bind(op.eqn, arrays)]
    made = _quantize(op, ports) if op.eqn.primitive is quantize_p else pick(op.eqn)(op)
    return list(made) if isinstance(made, list) else [made]


def _quantize(op: Op, ports: dict[int, InputSpec]) -> int:
    x, formats = node(op.build, op.ins[0]), op.ins[1:]
    if any(not isinstance(v, np.ndarray) for v in formats):
        raise refusal(op, "a quantizer", "its format depends on the data; formats must be constants")
    k, i, f = (np.broadcast_to(np.rint(np.asarray(v, np.float64)).astype(np.int64), op.shape) for v in formats)
    source = op.build[x]
    port = ports.get(source.inputs[0] if source.op == "take" else x)
    if port is not None and all(np.all(a == b) for a, b in zip((k, i, f), (port.k, port.i, port.f), strict=True)):
        return x  # the port's own format: what comes through the port is on its grid already
    at = op.eqn.params
    if not at["wrap"] and at["overflow"] == "WRAP":
        raise LoweringError(f"{op.scope}: traced with wrap=False, which is the training forward; lower the inference forward")
    modes = dict(rounding=at["rounding"], overflow=at["overflow"])
    return add(op.build, "quantize", (x,), op.shape, op.scope, k=k, i=i, f=f, **modes)
