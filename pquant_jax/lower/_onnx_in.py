"""ONNX with `Quant` nodes -> `Graph`, and a JAX model that asks for the file's formats.

One interpreter runs the file's steps on JAX arrays, twice.  With quantizers inside it is the file itself; its jaxpr is
lowered like any other, and the ranges in that graph say how wide every value is that no Quant bounds.  With named sites in
their place it is a model to be trained and compressed, which under the formats it asks for lowers to the same integers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import InputSpec, Tree
from pquant_jax._errors import LoweringError, did_you_mean
from pquant_jax.graph import Model, flatten, from_function
from pquant_jax.lower._build import Nodes
from pquant_jax.lower._onnx_ops import MOVES, OPS, PRODUCTS, convolution, interpolated, refused, table_of
from pquant_jax.lower._trace import data_ports, walk
from pquant_jax.lower.backends._onnx_read import Source, Step, read
from pquant_jax.lower.ir import Graph, reached, validate
from pquant_jax.lower.ranges import Interval, common_format, intervals
from pquant_jax.numerics import kif, lookup, quantize, region, site
from pquant_jax.numerics.oracle import least_f
from pquant_jax.quantize import Format

MAX_CONSTANT_BITS: Final = 16  # of a constant that no Quant is about


class Imported(NamedTuple):
    """What a file holds.

    graph: the file's integers, for every backend.  model: (params, x) in JAX, weights as they are in the file, with a site
    for every quantizer; `pq.instrument(model, sample, inputs=inputs)` and then e.g. `pq.quantize.fixed(inst.sites)`.
    inputs: the ports, one `InputSpec` or a tuple.  sample: zeros (1, *shape), one array or a tuple.
    """

    graph: Graph
    model: Model
    inputs: Any
    sample: Any


class _Leaf(NamedTuple):
    """A parameter: its path in two parts, the array that is stored, the shape in which a step reads it."""

    folder: str
    leaf: str
    value: np.ndarray
    shape: tuple[int, ...]


class _Plan(NamedTuple):
    """leaves: {(step, number of its input): parameter}.  names: {step: name of its place}.  formats: {path or place: Format}.

    steps: what is run; scale and offset of a BatchNormalization are inputs 1 and 2 of a `Scale`.
    """

    source: Source
    steps: list[Step]
    leaves: dict[tuple[str, int], _Leaf]
    names: dict[str, str]


def from_qonnx(
    model: Any, *, inputs: InputSpec | Mapping[str, InputSpec] | None = None, constant_bits: int | None = None
) -> Imported:
    """Read a QONNX model (a path or a ModelProto): dense and convolutional graphs with Quant and BipolarQuant.

    Read are Quant (scale per tensor or per channel), Conv with groups, Gemm, MatMul, Add, Mul, BatchNormalization, Relu,
    Clip, MaxPool, AveragePool and GlobalAveragePool of 2^n elements, reductions, Reshape, Transpose, Concat, Pad, Gather.
    Brevitas (`export_qonnx`) and QKeras (`qonnx.converters`) write such files; one with QuantizeLinear becomes one by
    qonnx's `QCDQToQuant`.

    Args:
      inputs: the format of every port, or of the ports of these names; None takes that of the first Quant behind it.
      constant_bits: put constants without a Quant (a bias, the scale and offset of a BatchNormalization) on grids of that
        many bits; None keeps them and refuses those of more than 16 bits, for which no adder is made.
    Raises: LoweringError, naming the node, for scales that are no powers of two, zero points, and ops without a form here.
    """
    source = read(model)
    plan = _planned(source, constant_bits)
    ports = _ports(source, inputs)
    shapes = [(1, *shape[1:]) for shape in source.inputs.values()]
    if any(0 in s for s in shapes):
        raise LoweringError(f"the inputs have the shapes {list(source.inputs.values())}; only the batch, axis 0, may be open")
    sample = tuple(np.zeros(s, np.float32) for s in shapes)
    graph, formats = _lowered(plan, sample, ports)
    params: dict[str, dict[str, Any]] = {}
    for leaf in plan.leaves.values():
        params.setdefault(leaf.folder, {})[leaf.leaf] = jnp.asarray(leaf.value, jnp.float32)

    first = next(iter(plan.leaves.values()), None)
    tables = {f"/{plan.names[s.output]}/table": _entries(s) for s in plan.steps if s.op == "table"}

    def forward(params: Tree, x: Any) -> Any:
        def parameter(leaf: _Leaf) -> Any:
            return _asked(params, leaf, tables if leaf is first else {})

        given = x if isinstance(x, tuple) else (x,)
        out = _run(plan, given, parameter, _sited(plan, formats))
        return out[0] if len(out) == 1 else tuple(out)

    alone = len(sample) == 1
    return Imported(graph, from_function(forward, params), ports[0] if alone else tuple(ports), sample[0] if alone else sample)


def _ports(source: Source, inputs: Any) -> list[InputSpec]:
    named = {} if inputs is None or isinstance(inputs, InputSpec) else dict(inputs)
    for name in named:
        if name not in source.inputs:
            raise LoweringError(f"the model has no input {name!r}; {did_you_mean(name, source.inputs)}")
    ports = []
    for name in source.inputs:
        said = inputs if isinstance(inputs, InputSpec) else named.get(name)
        if said is None and name not in source.ports:
            raise LoweringError(
                f"the input {name!r} has no Quant behind it, so its port has no format; pass inputs=InputSpec(k, i, f), or "
                f"inputs={{{name!r}: ...}}"
            )
        ports.append(said if said is not None else InputSpec(*source.ports[name]))
    return ports


def _planned(source: Source, constant_bits: int | None) -> _Plan:
    """Names and parameters of every step; BatchNormalization becomes a scale and an offset."""
    names: dict[str, str] = {}
    leaves: dict[tuple[str, int], _Leaf] = {}
    steps: list[Step] = []
    folders: dict[str, str] = {}  # tensor: the layer whose output it is, while that has no bias
    for step in source.steps:
        place = _unique(_place(step), names.values())
        names[step.output] = place
        constants = [source.constants.get(n) for n in step.inputs]
        if step.op == "BatchNormalization":
            step, constants = _affine(step, constants)
        elif step.op == "Gemm":
            constants = _gemm(step, constants)
        steps.append(step)
        own = {"Conv": ("kernel", "bias"), "Gemm": ("kernel", "bias"), "Scale": ("scale", "bias")}.get(step.op)
        folder = place
        if own is None and step.op == "Add":
            folder = folders.get(next((n for n, c in zip(step.inputs, constants, strict=True) if c is None), ""), place)
        for number, value in enumerate(constants):
            if value is None or not _is_parameter(step, number):
                continue
            name = (
                own[number - 1] if own is not None else {"MatMul": "kernel", "Add": "bias", "Sub": "bias"}.get(step.op, "scale")
            )
            value = _on_grid(step, np.asarray(value, np.float64), constant_bits)
            shape = value.shape
            stored = value if name == "kernel" else value.reshape([n for n in shape if n != 1] or [1])
            leaves[step.output, number] = _Leaf(folder, name, stored, shape)
        if step.op == "MatMul" or (step.op in ("Conv", "Gemm") and len(leaves) and (step.output, 2) not in leaves):
            folders[step.output] = place
    return _Plan(source, steps, leaves, names)


def _place(step: Step) -> str:
    """A name for a layer or site: that of the node, without the op that the exporter put behind it."""
    name = re.sub(r"[^\w/]+", "_", step.name).strip("_/") or step.op
    for tail in (f"/{step.op}", "/Quant", "/Gather" if step.op == "table" else "/", "/kernel" if step.op in PRODUCTS else "/"):
        name = name.removesuffix(tail)
    return name or step.op


def _unique(name: str, taken: Any) -> str:
    n, base = 1, name
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    return name


def _is_parameter(step: Step, number: int) -> bool:
    """Arrays that are trained: not indices and bounds, and not numbers such as the 0.5 of a shift."""
    if step.op in ("Conv", "Gemm", "Scale"):
        return number > 0
    return step.op in ("MatMul", "Add", "Sub", "Mul")


def _affine(step: Step, constants: Sequence[Any]) -> tuple[Step, list[Any]]:
    """BatchNormalization(x, gamma, beta, mean, variance) as x * scale + offset, in double."""
    gamma, beta, mean, variance = (np.asarray(c, np.float64) for c in constants[1:])
    scale = gamma / np.sqrt(variance + step.attrs.get("epsilon", 1e-5))
    return step._replace(op="Scale", inputs=(step.inputs[0], *step.inputs[1:3])), [None, scale, beta - mean * scale]


def _gemm(step: Step, constants: Sequence[Any]) -> list[Any]:
    """Kernel (in, out) and bias with alpha and beta multiplied in."""
    at = step.attrs
    if at.get("transA", 0) or len(constants) < 2 or constants[1] is None:
        raise refused(step, "its second operand must be constant and its first not transposed; use MatMul")
    kernel = np.asarray(constants[1], np.float64) * at.get("alpha", 1.0)
    bias = None if len(constants) < 3 or constants[2] is None else np.asarray(constants[2], np.float64) * at.get("beta", 1.0)
    return [None, kernel.T if at.get("transB", 0) else kernel, bias]


def _on_grid(step: Step, value: np.ndarray, bits: int | None) -> np.ndarray:
    """The constant, if it has few enough bits; on a grid of `bits` bits otherwise."""
    if not np.isfinite(value).all():
        raise refused(step, "a constant holds NaN or infinity")
    if not value.any():
        return value
    high = int(np.frexp(np.abs(value).max())[1])
    width = high + int(least_f(value)[value != 0].max())
    if width <= MAX_CONSTANT_BITS or (bits is not None and width <= bits):
        return value
    if bits is None:
        raise refused(
            step, f"a constant without a Quant takes {width} bits (up to {np.abs(value).max():g}); quantize it in the model, or "
            "pass constant_bits=12 to put such constants on grids of 12 bits"
        )  # fmt: skip
    return np.ldexp(np.rint(np.ldexp(value, bits - high)), high - bits)


Sites = Callable[[Step, int, Any], Any]


def _run(plan: _Plan, given: Sequence[Any], parameter: Callable[[_Leaf], Any], sited: Sites) -> list[Any]:
    """The outputs; `sited(step, number, x)` is asked about every operand that varies, and about results as number -1."""
    env: dict[str, Any] = dict(zip(plan.source.inputs, given, strict=True))
    for step in plan.steps:
        ins = []
        for number, name in enumerate(step.inputs):
            leaf = plan.leaves.get((step.output, number))
            if leaf is not None:
                ins.append(parameter(leaf))
            elif name in plan.source.constants:
                ins.append(plan.source.constants[name])
            else:
                ins.append(sited(step, number, env[name]) if name else None)
        env[step.output] = sited(step, -1, _applied(step, ins))
    return [env[name] for name in plan.source.outputs]


def _applied(step: Step, ins: Sequence[Any]) -> Any:
    with jax.named_scope(re.sub(r"[^\w/]+", "_", step.name) or step.op):
        if step.op in ("quantize", "table"):
            return ins[0]
        if step.op == "Scale":
            spread = (1, -1, *(1,) * (ins[0].ndim - 2))
            return ins[0] * ins[1].reshape(spread) + ins[2].reshape(spread)
        if step.op == "Conv":
            y = convolution(step, ins[0], ins[1])
            return y if len(ins) < 3 or ins[2] is None else y + ins[2].reshape(1, -1, *(1,) * (y.ndim - 2))
        if step.op == "Gemm":
            y = ins[0] @ ins[1]
            return y if len(ins) < 3 or ins[2] is None else y + ins[2]
        if step.op not in OPS:
            raise refused(step, f"has no form here; {did_you_mean(step.op, OPS)}")
        return OPS[step.op](step, *_typed(step, ins))


def _typed(step: Step, ins: Sequence[Any]) -> list[Any]:
    """Constants of arithmetic in float32, of scalars as numbers, which jnp promotes to nothing wider."""
    if step.op not in ("Add", "Sub", "Mul", "Max", "Min", "Concat", "MatMul"):
        return list(ins)
    return [np.asarray(v, np.float32) if isinstance(v, np.ndarray) else v for v in ins]


def _hard(step: Step, number: int, x: Any) -> Any:
    """Quantizers and tables as they are in the file."""
    if step.op == "table" and number < 0:
        form, table = table_of(step, x.shape[1:])
        return lookup(x, kif(form.k, form.i, form.f), table)
    if step.op != "quantize" or number >= 0:
        return x
    at = step.attrs
    return quantize(x, kif(*(at[key].astype(np.float32) for key in "kif"), rounding=at["rounding"], overflow=at["overflow"]))


def _format_of(step: Step) -> Format | None:
    """The one format of a quantizer; None if elements differ."""
    k, i, f = (np.unique(step.attrs[key]) for key in "kif")
    if max(map(len, (k, i, f))) > 1:
        return None
    modes = {"rounding": step.attrs["rounding"], "overflow": step.attrs["overflow"]}
    return Format(i=float(i[0]), f=float(f[0]), k=int(k[0]), granularity="tensor", **modes)


def _holding(own: Interval) -> Format:
    """The format that changes nothing in that interval; f is 0 at least."""
    k, i, f = common_format(own)
    return Format(i=float(i), f=float(max(f, 0)), k=k, granularity="tensor")


def _sited(plan: _Plan, formats: Mapping[str, Format]) -> Sites:
    """Quantizers of one format are sites of their names, others stay; what none bounds gets a site where it is multiplied."""

    def sited(step: Step, number: int, x: Any) -> Any:
        place = plan.names[step.output]
        if step.op == "quantize":
            own = _format_of(step)
            return x if number >= 0 else _hard(step, number, x) if own is None else site(x, place, "input", own)
        if step.op == "table" and number < 0:
            return region(lambda v: interpolated(step, v), place)(x)
        where = _operand_place(plan, step, number)
        return site(x, where, "input", formats[where]) if number >= 0 and where in formats else x

    return sited


def _operand_place(plan: _Plan, step: Step, number: int) -> str:
    """The site of an operand, unless a quantizer of the file has that name: then what is between them has another one."""
    where = f"{plan.names[step.output]}/input" + (f"_{number}" if number > 0 else "")
    return where if where not in plan.names.values() else f"{plan.names[step.output]}/operand"


def _bare(plan: _Plan) -> list[tuple[Step, int]]:
    """Operands of products and scales that are no site of a quantizer."""
    bounded: set[str] = set()
    found = []
    for step in plan.steps:
        if (step.op == "quantize" and _format_of(step) is not None) or (step.op in MOVES and step.inputs[0] in bounded):
            bounded.add(step.output)
        multiplies = step.op in (*PRODUCTS, "Scale", "Mul", "table")
        for number, name in enumerate(step.inputs):
            varies = name not in plan.source.constants and (step.output, number) not in plan.leaves
            if multiplies and varies and name not in bounded:
                found.append((step, number))
    return found


def _lowered(plan: _Plan, sample: tuple[np.ndarray, ...], ports: Sequence[InputSpec]) -> tuple[Graph, dict[str, Format]]:
    """The graph, and the formats of operands that no quantizer bounds, from their ranges in it."""
    bare = _bare(plan)

    def constant(leaf: _Leaf) -> Any:
        return np.asarray(leaf.value, np.float32).reshape(leaf.shape)

    def forward(*given: Any) -> list[Any]:
        seen: dict[tuple[str, int], Any] = {}

        def sited(step: Step, number: int, x: Any) -> Any:
            seen[step.output, number] = x
            return _hard(step, number, x)

        out = _run(plan, given, constant, sited)
        return [*out, *(seen[step.output, number] for step, number in bare)]

    program = flatten(jax.make_jaxpr(forward)(*sample))
    build: Nodes = []
    declared, env = data_ports(build, program.inputs, sample, tuple(ports))
    outputs = walk(build, program, env, declared)
    whole = validate(reached(Graph(tuple(build), tuple(declared), outputs)))
    count = len(plan.source.outputs)
    known = intervals(whole) if bare else []
    formats = {
        _operand_place(plan, step, number): _holding(known[index])
        for (step, number), index in zip(bare, whole.outputs[count:], strict=True)
    }
    return validate(reached(whole._replace(outputs=whole.outputs[:count]))), formats


def _entries(step: Step) -> Format:
    """The format that holds every entry of a table."""
    codes, scale = np.meshgrid(step.attrs["codes"], np.unique(step.attrs["scale"]))
    value = codes * np.asarray(scale, np.float64)
    return _holding(Interval(np.minimum(value, 0), np.maximum(value, 0), least_f(value)))


def _asked(params: Tree, leaf: _Leaf, others: Mapping[str, Format]) -> Any:
    """The parameter, asking for the narrowest format that holds what the file has; `others`: of places without a parameter."""
    value = leaf.value
    f = least_f(value)
    own = Interval(np.minimum(value, 0), np.maximum(value, 0), f)
    asking = site(params[leaf.folder][leaf.leaf], "", "format", _holding(own))
    for place, fmt in others.items():
        asking = site(asking, place, "format", fmt)
    return asking.reshape(leaf.shape)
