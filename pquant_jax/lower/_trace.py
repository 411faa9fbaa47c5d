"""jaxpr -> IR: the finished forward on one sample as a fixed-point graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import InputSpec, Tree, View
from pquant_jax._errors import LoweringError, did_you_mean
from pquant_jax.graph import Const, Instrumented, Program, Step, bind, flatten
from pquant_jax.lower._build import Nodes, Op, Operand, add, node, numbers, refusal, take
from pquant_jax.lower._estimate import MAX_SIZE, check_size
from pquant_jax.lower._rules import ADVICE, RANDOM, pick
from pquant_jax.lower.ir import Graph, reached, validate
from pquant_jax.numerics import quantize_p
from pquant_jax.numerics.oracle import quantize

WEIGHTS: Final = ("constants", "ports")
_PARAMETERS: Final = ("kernel", "bias", "scale", "offset")  # kinds of sites whose values are the same for all samples


def trace(inst: Instrumented, view: View, model_state: Tree, *, limit: float = MAX_SIZE, weights: str = "constants") -> Graph:
    """The instrumented inference forward of one sample as a fixed-point `Graph`.

    Parameters and formats are folded into constants, tables that the view lacks are built; every input array becomes one
    port in its declared format, and outputs keep the order of the forward's.

    Args:
      limit: of products and other elements, see `estimate`; checked before the work starts.
      weights: "constants", or "ports": every parameter with a format becomes an input behind those of the data, named by
        its site, with k, i, f per element (no bits where the mask is 0), so that one netlist serves every weight set of
        these formats (`lower.loadable`).  Tables, thresholds and the constants of the model itself stay constant.
    Raises: LoweringError for an operation without an exact fixed-point form, naming it and its place in the model.
    """
    return traced(inst, view, model_state, limit=limit, weights=weights)[0]


def traced(
    inst: Instrumented, view: View, model_state: Tree, *, limit: float = MAX_SIZE, weights: str = "constants"
) -> tuple[Graph, list[np.ndarray]]:
    """(`trace`, what the view holds for each of the weight ports, float64 of the port's shape)."""
    if weights not in WEIGHTS:
        raise LoweringError(f"weights is {weights!r}; {did_you_mean(weights, WEIGHTS)}")
    missing = sorted(n for n, spec in inst.sites.items() if n not in view.sites)
    if missing:
        raise LoweringError(
            f"site {missing[0]!r} has no fixed-point format: add a quantizer (pq.quantize.hgq or fixed) to the chain"
        )
    check_size(inst, view, model_state, limit, loadable=weights == "ports")
    view = with_tables(inst, view, model_state)
    held = (view.model, model_state) if weights == "ports" else ((), ())

    def forward(held: Any, x: Any) -> Any:
        params, state = held if weights == "ports" else (view.model, model_state)
        return inst.forward(view._replace(model=params), state, x, train=False)[0]

    program = flatten(jax.make_jaxpr(forward)(held, inst.sample))
    build: Nodes = []
    leaves = jax.tree.leaves(held)
    declared, env = data_ports(build, program.inputs[len(leaves) :], inst.sample, inst.inputs)
    loads = _Loads({}, set(program.inputs[: len(leaves)]))
    paths = [*_tree.flatten(held[0]), *([""] * len(jax.tree.leaves(held[1])))]
    for slot, path, leaf in zip(program.inputs, paths, leaves, strict=False):
        own = path in inst.sites and inst.sites[path].kind in _PARAMETERS
        env[slot] = _weight_port(build, loads, path, np.asarray(leaf), view) if own else np.asarray(leaf)

    outputs = walk(build, program, env, declared, lambda op, step: _derived(op, step, loads, inst, view))
    graph = reached(Graph(tuple(build), (*declared, *loads.values), outputs))
    return validate(graph), list(loads.values.values())


def data_ports(build: Nodes, slots: Sequence[int], sample: Tree, specs: Tree) -> tuple[dict[int, InputSpec], dict[int, Operand]]:
    """Append an input node for every array of the sample, one of a batch; ({node: its format}, {slot: its value})."""
    declared, env = dict[int, InputSpec](), dict[int, Operand]()
    for slot, one, port in zip(slots, jax.tree.leaves(sample), jax.tree.leaves(specs), strict=True):
        index = add(build, "input", (), one.shape[1:], "input", k=port.k, i=port.i, f=port.f)
        declared[index] = port
        env[slot] = take(build, index, numbers(one.shape))
    return declared, env


def walk(
    build: Nodes,
    program: Program,
    env: dict[int, Operand],
    declared: dict[int, InputSpec],
    instead: Callable[[Op, Step], int | None] = lambda op, step: None,
) -> tuple[int, ...]:
    """Append the nodes of every step, or take the one that `instead(op, step)` gives; the outputs, without their batch axis.

    env: the values of the program's inputs by slot, which those of the steps join.
    """

    def read(v: int | Const) -> Operand:
        return np.asarray(v.value) if isinstance(v, Const) else env[v]

    for step in program.steps:
        shape = tuple(step.eqn.outvars[0].aval.shape) if step.eqn.outvars else ()
        op = Op(build, step.eqn, [read(v) for v in step.ins], shape, step.scope)
        made = instead(op, step)
        env.update(zip(step.outs, lower_one(op, declared) if made is None else [made], strict=True))
    outputs = [node(build, read(v)) for v in program.outputs]
    return tuple(take(build, out, numbers(build[out].shape[1:])) for out in outputs)


class _Loads(NamedTuple):
    """{port: what the view holds for it}; the slots whose values come from parameters alone, while they are constants."""

    values: dict[int, np.ndarray]
    trained: set[int]


def _weight_port(build: Nodes, loads: _Loads, site: str, value: np.ndarray, view: View) -> int:
    """An input in the format of `site`, without bits where the mask is 0."""
    fmt, mask = view.sites[site], np.asarray(view.masks.get(site, 1.0))
    k, i, f = (np.broadcast_to(np.rint(np.asarray(v, np.float64)).astype(np.int64), value.shape) for v in (fmt.k, fmt.i, fmt.f))
    alive = np.broadcast_to(mask != 0, value.shape) & (k + i + f > 0)
    form = {key: np.where(alive, v, 0) for key, v in zip("kif", (k, i, f), strict=True)}
    port = add(build, "input", (), value.shape, site, **form, weight=np.asarray(True))
    loads.values[port] = value.astype(np.float64)
    return port


def _derived(op: Op, step: Step, loads: _Loads, inst: Instrumented, view: View) -> int | None:
    """A port for a site whose value is computed from parameters, such as the scale of a BatchNorm; None for other steps."""
    if not loads.trained or not all(isinstance(v, np.ndarray) for v in op.ins):
        return None
    if not any(v in loads.trained for v in step.ins if isinstance(v, int)):
        return None
    site = op.scope
    if op.eqn.primitive is quantize_p and site in inst.sites and inst.sites[site].kind in _PARAMETERS:
        x, k, i, f = (np.asarray(v, np.float64) for v in op.ins)
        at = op.eqn.params
        value = quantize(x, k, i, f, rounding=at["rounding"], overflow=at["overflow"])
        return _weight_port(build=op.build, loads=loads, site=site, value=np.asarray(value), view=view)
    loads.trained.update(step.outs)
    return None


def with_tables(inst: Instrumented, view: View, model_state: Tree) -> View:
    """The view with its integer tables, built if it has none."""
    return view if view.tables else view._replace(tables=inst.tables(view, model_state))


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
