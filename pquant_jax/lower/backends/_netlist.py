"""Scalars of a `Graph` as variables of da4ml or alkaid, op by op; their `to_comb` make netlists of them.

The two packages have one ancestor: their variables have the same methods, so `_scalars` serves both, and what they call
differently is a value, `Package`.  No import of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, did_you_mean
from pquant_jax.lower.backends import _scalars as ops
from pquant_jax.lower.dead import remove_dead
from pquant_jax.lower.ir import Graph, Node, label
from pquant_jax.lower.passes import simplify
from pquant_jax.lower.ranges import Interval, check_exact, intervals, least_f, quantize_acts
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS, quantize, significant_bits

MAX_FRACTION: Final = 31  # both packages store a constant in 32 bits, and RND adds half a step


class Package(NamedTuple):
    """What da4ml and alkaid call differently: their classes, and an array's variables as an object array."""

    name: str
    variable: Any  # from_const(value, hwconf=)
    array: Any  # (variables, solver_options, hwconf=) with `@` and from_kif
    unformatted: Any  # an input array that takes the format of its first quantizer
    scalars: Callable[[Any], np.ndarray]


class Circuit(NamedTuple):
    """What the helpers need to build variables."""

    package: Package
    hwconf: Any
    solver_options: Any


def check_supported(graph: Graph, package: str) -> list[Interval]:
    """Raise `LoweringError` for the first node without an exact netlist of `package`; returns the intervals of all nodes."""
    quantizers = [index for index, node in enumerate(graph.nodes) if node.op == "quantize"]
    for index in quantizers:
        _check_modes(graph, index)
    known = intervals(graph)
    varying = [j for j, own in enumerate(known) if (own.low != own.high).any()]
    read = {j for index in varying for j in graph.nodes[index].inputs} | set(graph.outputs)
    for index in sorted(read):  # before check_exact: a constant with 53 bits is the cause, the product the symptom
        _check_constants(graph, index, known[index], package)
    check_exact(graph)
    for index in quantizers:
        _check_fraction(graph, index, known, package)
    return known


def _check_modes(graph: Graph, index: int) -> None:
    for key, modes in (("rounding", ROUNDINGS), ("overflow", OVERFLOWS)):
        mode = str(graph.nodes[index].attrs[key])
        if mode not in modes:
            raise LoweringError(
                f"{label(graph, index)}: {key} mode {mode!r} has no netlist ({did_you_mean(mode, modes)}); "
                f"change the {key} mode of that quantizer"
            )


def _check_fraction(graph: Graph, index: int, known: Sequence[Interval], package: str) -> None:
    """The quantizer's own constants (bounds, half a step, one step of its input) must lie on the finest grid."""
    node, own = graph.nodes[index], known[index]
    x = known[node.inputs[0]]
    k, i, f = (np.asarray(node.attrs[a]).astype(np.int64) for a in "kif")
    used = f if str(node.attrs["rounding"]) in ("TRN", "RND") else np.where(quantize_acts(node, x)[0], x.f, f)
    fraction = np.where((k + i + f > 0) & (own.low != own.high), used, 0).max(initial=0)
    if fraction > MAX_FRACTION:
        raise LoweringError(
            f"{label(graph, index)}: needs {fraction} fractional bits, {package} takes {MAX_FRACTION}; use a coarser quantizer "
            "there or, with a rounding mode other than TRN and RND, before it"
        )


def _check_constants(graph: Graph, index: int, own: Interval, package: str) -> None:
    """Those that a varying node reads; what is computed from constants alone is folded and may be finer."""
    value = np.where(own.low == own.high, own.low, 0.0)
    f = least_f(value)
    bits = significant_bits(value)
    is_kernel = np.array_equal(own.low, own.high)
    bad = (f > MAX_FRACTION) | (is_kernel & (bits > ops.MAX_CONSTANT_BITS))
    if bad.any():
        at = tuple(int(j) for j in np.argwhere(bad)[0])
        raise LoweringError(
            f"{label(graph, index)}: the constant {float(value[at])!r} at {at} has {int(bits[at])} significant and "
            f"{int(f[at])} fractional bits, {package} takes {ops.MAX_CONSTANT_BITS} and {MAX_FRACTION}; quantize that parameter"
        )


def prepare(graph: Graph, check: Callable[[Graph], list[Interval]], keep_dead: bool) -> tuple[Graph, list[Interval]]:
    """The graph that becomes a netlist, without what is dead or does nothing, and its intervals; `check` it first."""
    known = check(graph)
    if keep_dead:
        return graph, known
    graph = simplify(remove_dead(graph))
    return graph, check(graph)  # sums of constants may be finer than each of them


def ports_and_outputs(graph: Graph, known: Sequence[Interval], circuit: Circuit) -> tuple[list[Any], list[Any]]:
    """The variables of all inputs and of all outputs, flattened in order: what a package's `trace` takes."""
    values = variables(graph, known, circuit)
    flat = ([variable(v, circuit) for j in ends for v in values[j].ravel()] for ends in (graph.inputs, graph.outputs))
    ports, outputs = flat
    return ports, outputs


def run(comb: Any, x: np.ndarray) -> np.ndarray:
    """The package's interpreter on `x` (N, ...): float64 (N, n_out); raises `LoweringError` for a wrong number of values."""
    n_in, n_out = comb.shape
    x = np.asarray(x, np.float64)
    flat = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.shape[1] != n_in:
        raise LoweringError(f"the netlist has {n_in} input values per sample, got {flat.shape[1]} (array {x.shape})")
    return np.asarray(comb.predict(flat, n_threads=1), np.float64).reshape(len(flat), n_out)


@contextmanager
def explained(package: str, doing: str) -> Iterator[None]:
    """Both packages signal a limit with an assertion: a `LoweringError` that says whose it is and what to do."""
    try:
        yield
    except (AssertionError, RuntimeError) as error:  # NotImplementedError and RecursionError are RuntimeErrors
        text = str(error) or "no message"
        hint = "report the graph (`ir.save`) to the authors of pquant_jax"
        if "latency cutoff" in text:
            hint = "one multiplier is slower than a pipeline stage: use a larger latency_cutoff, or narrower operands"
        elif isinstance(error, RecursionError):
            hint = f"the netlist is too deep for {package}; split the model"
        raise LoweringError(f"{package} failed while {doing} ({type(error).__name__}: {text}): {hint}") from error


def variables(
    graph: Graph, known: Sequence[Interval], circuit: Circuit, ports: Mapping[int, np.ndarray] | None = None
) -> list[np.ndarray]:
    """Per node an object array of its shape that holds variables and, for constants, floats.

    `ports` holds the values of input nodes that are there already.
    """
    values: list[np.ndarray] = []
    for index, (node, own) in enumerate(zip(graph.nodes, known, strict=True)):
        if ports and index in ports:
            values.append(ports[index])
            continue
        constant = own.low == own.high
        if constant.all() and node.op != "input":
            values.append(own.low.astype(object))
            continue
        ins = [values[j] for j in node.inputs]
        value = _operation(node, ins, [known[j] for j in node.inputs], circuit)
        if value.shape != node.shape:
            raise LoweringError(f"{label(graph, index)}: netlist of shape {value.shape}, expected {node.shape}")
        values.append(np.where(constant, own.low.astype(object), value) if node.op != "input" else value)
    return values


def _operation(node: Node, ins: list[np.ndarray], ranges: list[Interval], circuit: Circuit) -> np.ndarray:
    op = node.op
    if op == "input":
        return _port(node, circuit)
    if op == "quantize":
        return quantize_array(node, ins[0], ranges[0])
    if op == "table":
        return _table_array(node, ins[0], ranges[0])
    if op == "take":
        index = np.asarray(node.attrs["index"])
        return np.append(ins[0].ravel(), 0.0)[index.ravel()].reshape(index.shape)
    if op == "concat":
        return np.concatenate([v.ravel() for v in ins])
    if op == "dot":
        return _dot(ins[0], ins[1], circuit)
    if op in ("sum", "amax", "amin"):
        scalar = {"sum": ops.add, "amax": ops.maximum, "amin": ops.minimum}[op]
        return objects([ops.reduce_tree(scalar, row) for row in ins[0]], node.shape)
    scalar = ops.SCALAR[op]
    return objects([scalar(*operands) for operands in zip(*(v.ravel() for v in ins), strict=True)], node.shape)


def objects(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Variables, those that can hold one value only as floats, in an object array."""
    out = np.empty(len(items), object)
    out[:] = [ops.fold(v) for v in items]
    return out.reshape(shape)


def _port(node: Node, circuit: Circuit) -> np.ndarray:
    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    return circuit.package.scalars(circuit.package.array.from_kif(k, i, f, hwconf=circuit.hwconf)).reshape(node.shape)


def variable(value: Any, circuit: Circuit) -> Any:
    """`value` as a variable, which a constant is not yet."""
    return value if not isinstance(value, float) else circuit.package.variable.from_const(value, hwconf=circuit.hwconf)


def _dot(a: np.ndarray, c: np.ndarray, circuit: Circuit) -> np.ndarray:
    """Batched product (b,m,k) x (b,k,n): constant operands go through the package's matrix solver, row by row."""
    out = np.empty((a.shape[0], a.shape[1], c.shape[2]), object)
    for b in range(a.shape[0]):
        if not _varies(c[b]).any():
            out[b] = [_row(left, c[b].astype(np.float64), circuit) for left in a[b]]
        elif not _varies(a[b]).any():
            out[b] = np.array([_row(left, a[b].T.astype(np.float64), circuit) for left in c[b].T], object).T
        else:
            for m, n in np.ndindex(out.shape[1:]):
                out[b, m, n] = ops.reduce_tree(ops.add, [ops.mul(x, y) for x, y in zip(a[b, m], c[b, :, n], strict=True)])
    return out


def _varies(values: np.ndarray) -> np.ndarray:
    return np.array([not isinstance(v, float) for v in values.ravel()], bool).reshape(values.shape)


def _row(left: np.ndarray, matrix: np.ndarray, circuit: Circuit) -> np.ndarray:
    """left (k,) @ matrix (k, n); its constants are added behind the solver, which would spend adders on them."""
    varies = _varies(left)
    bias = left[~varies].astype(np.float64) @ matrix[~varies]
    if not matrix[varies].any():
        return bias.astype(object)
    array = circuit.package.array(left[varies], circuit.solver_options, hwconf=circuit.hwconf)
    made = circuit.package.scalars(array @ matrix[varies])
    return objects([ops.add(ops.fold(v), b) for v, b in zip(made, bias.tolist(), strict=True)], made.shape)


def quantize_array(node: Node, x: np.ndarray, known: Interval) -> np.ndarray:
    """Per element; a mode that can't act on the element's interval is replaced by the cheapest (TRN, WRAP)."""
    rounds, overflows = quantize_acts(node, known)
    k, i, f = (np.asarray(node.attrs[a]).astype(np.int64).ravel().tolist() for a in "kif")
    rounding, overflow = str(node.attrs["rounding"]), str(node.attrs["overflow"])
    out: list[Any] = []
    for j, v in enumerate(x.ravel()):
        if isinstance(v, float) or k[j] + i[j] + f[j] <= 0:
            out.append(
                float(quantize(v, k[j], i[j], f[j], rounding=rounding, overflow=overflow)) if isinstance(v, float) else 0.0
            )
            continue
        if rounds.ravel()[j]:
            v = ops.round_to(v, f[j], int(known.f.ravel()[j]), rounding)
        out.append(ops.clip(v, k[j], i[j], f[j], overflow if overflows.ravel()[j] else "WRAP"))
    return objects(out, node.shape)


def _table_array(node: Node, x: np.ndarray, known: Interval) -> np.ndarray:
    """Per element, a table of the entries that its input can reach."""
    k, i, f = (np.asarray(node.attrs[key]).astype(np.int64).ravel().tolist() for key in "kif")
    codes, which, f_out = np.asarray(node.attrs["codes"]), np.ravel(node.attrs["which"]), np.asarray(node.attrs["f_out"])
    low, high, fx = (v.ravel().tolist() for v in known)
    out: list[Any] = []
    for j, v in enumerate(x.ravel()):
        row, zero = codes[which[j]], k[j] << max(i[j] + f[j], 0) if k[j] + i[j] + f[j] > 0 else 0
        grid, scale = f[j], -int(f_out[which[j]])

        def read(points: np.ndarray, row=row, zero=zero, grid=grid, scale=scale) -> np.ndarray:
            return np.ldexp(row[np.ldexp(points, grid).astype(np.int64) + zero].astype(np.float64), scale)

        out.append(ops.lookup(v, read, low[j], high[j], fx[j]))
    return objects(out, node.shape)
