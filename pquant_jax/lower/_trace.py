"""jaxpr -> IR: the finished forward on one sample as a fixed-point graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import InputSpec, Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Const, Instrumented, bind, flatten
from pquant_jax.lower.ir import Graph, Node, reached, validate
from pquant_jax.numerics import mask_p, quantize_p

_IDENTITY: Final = frozenset("copy stop_gradient optimization_barrier site sharding_constraint".split())
_REARRANGE: Final = frozenset("reshape transpose squeeze expand_dims broadcast_in_dim slice rev".split())
_BINARY: Final = {n: n for n in ("add", "sub", "mul", "max", "min", "ge", "gt", "le", "lt", "eq", "ne")}
_REDUCE: Final = {"reduce_sum": "sum", "reduce_max": "amax", "reduce_min": "amin"}
_TABLES: Final = frozenset("tanh logistic exp exp2 log log1p expm1 sqrt rsqrt erf sin cos pow".split())


_Nodes = list[Node]  # the growing graph: rules append to it and pass indices around


def _add(build: _Nodes, op: str, inputs: Sequence[int], shape: Sequence[int], name: str = "", **attrs: Any) -> int:
    build.append(Node(op, tuple(inputs), tuple(int(n) for n in shape), attrs, name))
    return len(build) - 1


def _take(build: _Nodes, x: int, index: np.ndarray) -> int:
    """Rearrange; a rearrangement of a rearrangement is one, and of nothing is none."""
    node = build[x]
    if node.op == "take":
        return _take(build, node.inputs[0], np.append(node.attrs["index"].ravel(), -1)[index])
    if node.shape == index.shape and np.array_equal(index.ravel(), np.arange(index.size)):
        return x
    return _add(build, "take", (x,), index.shape, node.name, index=index.astype(np.int64))


def trace(inst: Instrumented, view: View, model_state: Tree) -> Graph:
    """The instrumented inference forward of one sample as a fixed-point `Graph`.

    Parameters and formats are folded into constants; every input array becomes one port in its declared format, and
    outputs keep the order of the forward's.
    Raises: LoweringError for an operation without an exact fixed-point form, naming it and its place in the model.
    """

    def forward(x: Any) -> Any:
        return inst.forward(view, model_state, x, train=False)[0]

    missing = sorted(n for n, spec in inst.sites.items() if n not in view.sites)
    if missing:
        raise LoweringError(
            f"site {missing[0]!r} has no fixed-point format: add a quantizer (pq.quantize.hgq or fixed) to the chain"
        )
    program = flatten(jax.make_jaxpr(forward)(inst.sample))
    build: _Nodes = []
    env: dict[int, int | np.ndarray] = {}
    ports: list[int] = []
    samples, specs = jax.tree.leaves(inst.sample), jax.tree.leaves(inst.inputs)
    for slot, sample, port in zip(program.inputs, samples, specs, strict=True):
        shape = sample.shape[1:]
        ports.append(_add(build, "input", (), shape, "input", k=port.k, i=port.i, f=port.f))
        env[slot] = _take(build, ports[-1], np.arange(sample.size).reshape(sample.shape))

    def read(v: int | Const) -> int | np.ndarray:
        return np.asarray(v.value) if isinstance(v, Const) else env[v]

    declared = dict(zip(ports, specs, strict=True))
    for step in program.steps:
        outs = _lower(build, step.eqn, [read(v) for v in step.ins], step.scope, declared)
        env.update(zip(step.outs, outs, strict=True))
    results = [_sample(build, read(v)) for v in program.outputs]
    return validate(reached(Graph(tuple(build), tuple(ports), tuple(results))))


def _sample(build: _Nodes, value: int | np.ndarray) -> int:
    """An output without its batch axis of length 1."""
    node = _node(build, value)
    shape = build[node].shape
    return _take(build, node, np.arange(int(np.prod(shape))).reshape(shape[1:]))


def _node(build: _Nodes, value: int | np.ndarray) -> int:
    return value if isinstance(value, int) else _add(build, "const", (), value.shape, value=np.asarray(value, np.float64))


def _broadcast(build: _Nodes, value: int | np.ndarray, shape: tuple[int, ...]) -> int:
    if isinstance(value, np.ndarray):
        return _node(build, np.broadcast_to(value, shape))
    own = build[value].shape
    index = np.arange(int(np.prod(own))).reshape(own)
    return _take(build, value, np.broadcast_to(index, shape))


def _lower(
    build: _Nodes, eqn: Any, ins: list[int | np.ndarray], scope: str, ports: dict[int, InputSpec]
) -> list[int | np.ndarray]:
    if all(isinstance(v, np.ndarray) for v in ins):  # parameters alone: folded in the traced dtype
        arrays = [jnp.asarray(v, var.aval.dtype) for v, var in zip(ins, eqn.invars, strict=True)]
        return [np.asarray(o) for o in bind(eqn, arrays)]
    name, shape = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)
    if name in _IDENTITY or _keeps_precision(eqn):
        return [ins[0]]
    if eqn.primitive is quantize_p:
        return [_quantize(build, eqn, ins, shape, scope, ports)]
    if eqn.primitive is mask_p:
        return [_add(build, "mul", [_broadcast(build, v, shape) for v in ins], shape, scope)]
    if name in _REARRANGE:
        return [_rearrange(build, eqn, ins)]
    if name in _BINARY:
        return [_add(build, _BINARY[name], [_broadcast(build, v, shape) for v in ins], shape, scope)]
    rule = _RULES.get(name, _unsupported)
    return [rule(build, eqn, ins, shape, scope)]


def _keeps_precision(eqn: Any) -> bool:
    """Does a conversion keep every value?  An integer that a float rounds is too wide an accumulator, which is checked."""
    if eqn.primitive.name == "reduce_precision":
        kept = jnp.finfo(eqn.invars[0].aval.dtype)
        return eqn.params["exponent_bits"] >= kept.nexp and eqn.params["mantissa_bits"] >= kept.nmant
    if eqn.primitive.name != "convert_element_type":
        return False
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return np.can_cast(old, new) or (jnp.issubdtype(old, jnp.integer) and new == np.float32)


def _refusal(build: _Nodes, ins: Sequence[int | np.ndarray], scope: str, what: str, why: str) -> LoweringError:
    """The error for an operation, near the last thing with a name that its operands came from."""
    pending = {v for v in ins if isinstance(v, int)}
    while pending and not scope:
        latest = max(pending)
        scope = build[latest].name
        pending = (pending - {latest}) | set(build[latest].inputs)
    return LoweringError(f"can't lower {what} (near {scope or 'the input'}): {why}")


def _unsupported(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    name = eqn.primitive.name
    what, why = repr(name), "it has no fixed-point form here; keep it outside the compressed model"
    if name == "convert_element_type":
        what = f"the conversion of {eqn.invars[0].aval.dtype} to {eqn.outvars[0].aval.dtype}"
        why = "it changes values; quantize them to the format that is meant"
    elif name in _TABLES:
        why = "it is transcendental and has no exact fixed-point form without a table; use relu, or piecewise-linear max and min"
    raise _refusal(build, ins, scope, what, why)


def _quantize(
    build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str, ports: dict[int, InputSpec]
) -> int:
    x, formats = _node(build, ins[0]), ins[1:]
    if any(not isinstance(v, np.ndarray) for v in formats):
        raise LoweringError(f"the format of {scope or 'a quantizer'} depends on the data; formats must be constants")
    k, i, f = (np.broadcast_to(np.rint(np.asarray(v, np.float64)).astype(np.int64), shape) for v in formats)
    source = build[x]
    origin = source.inputs[0] if source.op == "take" else x
    port = ports.get(origin)
    if port is not None and all(np.all(a == b) for a, b in zip((k, i, f), (port.k, port.i, port.f), strict=True)):
        return x  # the port's own format: what comes through the port is on its grid already
    if not eqn.params["wrap"] and eqn.params["overflow"] == "WRAP":
        raise LoweringError(f"{scope}: traced with wrap=False, which is the training forward; lower the inference forward")
    modes = dict(rounding=eqn.params["rounding"], overflow=eqn.params["overflow"])
    return _add(build, "quantize", (x,), shape, scope, k=k, i=i, f=f, **modes)


def _rearrange(build: _Nodes, eqn: Any, ins: list[int | np.ndarray]) -> int:
    """Every structural primitive is a gather: bound on the element numbers, it says where each element comes from."""
    (x,) = ins
    own = build[int(x)].shape
    index = jnp.arange(int(np.prod(own)), dtype=jnp.int32).reshape(own)
    return _take(build, int(x), np.asarray(bind(eqn, [index])[0]))


def _dot(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    """dot_general as rearrange, (b,m,k) @ (b,k,n), rearrange."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    lhs_free = [d for d in range(len(shapes[0])) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(len(shapes[1])) if d not in (*rhs_contract, *rhs_batch)]

    def size(side: int, dims: Sequence[int]) -> int:
        return int(np.prod([shapes[side][d] for d in dims], dtype=np.int64))

    b, m, k, n = size(0, lhs_batch), size(0, lhs_free), size(0, lhs_contract), size(1, rhs_free)
    lhs = _arranged(build, ins[0], (*lhs_batch, *lhs_free, *lhs_contract), (b, m, k))
    rhs = _arranged(build, ins[1], (*rhs_batch, *rhs_contract, *rhs_free), (b, k, n))
    out = _add(build, "dot", (lhs, rhs), (b, m, n), scope)
    return _take(build, out, np.arange(b * m * n).reshape(shape))


def _arranged(build: _Nodes, value: int | np.ndarray, order: Sequence[int], shape: tuple[int, ...]) -> int:
    if isinstance(value, np.ndarray):
        return _node(build, value.transpose(order).reshape(shape))
    own = build[value].shape
    return _take(build, value, np.arange(int(np.prod(own))).reshape(own).transpose(order).reshape(shape))


def _reduce(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    axes = tuple(eqn.params["axes"])
    own = build[int(ins[0])].shape
    if not axes:
        return int(ins[0])
    kept = [d for d in range(len(own)) if d not in axes]
    count = int(np.prod([own[d] for d in axes], dtype=np.int64))
    rows = _arranged(build, ins[0], (*kept, *axes), (int(np.prod(shape, dtype=np.int64)), count))
    out = _add(build, _REDUCE[eqn.primitive.name], (rows,), (build[rows].shape[0],), scope)
    return _take(build, out, np.arange(build[out].shape[0]).reshape(shape))


def _concatenate(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    nodes = [_node(build, v) for v in ins]
    starts = np.cumsum([0, *(int(np.prod(build[n].shape)) for n in nodes)])
    parts = [np.arange(a, b).reshape(build[n].shape) for n, a, b in zip(nodes, starts, starts[1:], strict=False)]
    flat = _add(build, "concat", nodes, (int(starts[-1]),), scope)
    return _take(build, flat, np.concatenate(parts, axis=eqn.params["dimension"]))


def _unary(op: str) -> Callable[..., int]:
    def rule(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
        del eqn
        return _add(build, op, [_node(build, ins[0])], shape, scope)

    return rule


def _power(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    y = eqn.params.get("y", 2)
    if y < 1:
        raise _refusal(build, ins, scope, f"x ** {y}", "a negative power needs a table; use a positive one")
    x = _node(build, ins[0])
    out = x
    for _ in range(y - 1):
        out = _add(build, "mul", (out, x), shape, scope)
    return out


def _divide(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    divisor = ins[1]
    if not isinstance(divisor, np.ndarray) or not np.all(np.abs(np.frexp(divisor)[0]) == 0.5):
        what = "a value" if not isinstance(divisor, np.ndarray) else f"{np.ravel(divisor)[0]}"
        raise _refusal(build, ins, scope, f"a division by {what}", "only powers of two are exact; multiply by a constant")
    factor = np.asarray(1.0 / np.asarray(divisor, np.float64))  # a quotient of scalars is no array
    return _add(build, "mul", [_broadcast(build, v, shape) for v in (ins[0], factor)], shape, scope)


def _select(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    if len(ins) != 3:
        raise _refusal(build, ins, scope, f"a choice between {len(ins) - 1} cases", "nest jnp.where with two")
    return _add(build, "select", [_broadcast(build, v, shape) for v in ins], shape, scope)


def _clamp(build: _Nodes, eqn: Any, ins: list[int | np.ndarray], shape: tuple[int, ...], scope: str) -> int:
    low, x, high = (_broadcast(build, v, shape) for v in ins)
    return _add(build, "min", (_add(build, "max", (x, low), shape, scope), high), shape, scope)


_RULES: Final[dict[str, Callable[..., int]]] = {
    "dot_general": _dot,
    **dict.fromkeys(_REDUCE, _reduce),
    "concatenate": _concatenate,
    "neg": _unary("neg"),
    "abs": _unary("abs"),
    "square": _power,
    "integer_pow": _power,
    "div": _divide,
    "select_n": _select,
    "clamp": _clamp,
}
