"""An ONNX file with `Quant` nodes as a list of steps: constants folded, quantizers with their k, i, f.

Scales are powers of two here, or the model is refused: k + i + f = bits, f = -log2(scale), k = signed, SAT_SYM = narrow.
Quantizers that `to_qonnx` had to write in several nodes (halves upwards, wrapping, a format per element) are recognised, so
that a model comes back with the formats it went with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, ToolError
from pquant_jax.lower.backends._onnx_quant import MODE
from pquant_jax.numerics.oracle import quantize

QUANTS: Final = ("Quant", "IntQuant")
_ROUNDING: Final = {
    "ROUND": "RND_CONV", "HALF_EVEN": "RND_CONV", "FLOOR": "TRN", "DOWN": "TRN_ZERO", "HALF_UP": "RND_INF",
    "HALF_DOWN": "RND_ZERO",
}  # fmt: skip
_EXPLICIT: Final = {"Floor": "TRN", "Round": "RND_CONV", "Ceil": "CEIL"}


class Step(NamedTuple):
    """One operation: `quantize` (attributes k, i, f, rounding, overflow) or an ONNX op.  inputs: names, "" for none."""

    op: str
    name: str
    inputs: tuple[str, ...]
    output: str
    attrs: dict[str, Any]


class Source(NamedTuple):
    """A file that is read.  inputs: {name: shape with the batch}.  ports: {input: (k, i, f)} where a quantizer says it."""

    inputs: dict[str, tuple[int, ...]]
    ports: dict[str, tuple[int, int, int]]
    constants: dict[str, np.ndarray]
    steps: list[Step]
    outputs: list[str]


class _Found(NamedTuple):
    """What the nodes of the file are looked up in."""

    producers: dict[str, Any]
    readers: dict[str, int]
    constants: dict[str, np.ndarray]


def attributes(node: Any) -> dict[str, Any]:
    """{name: value} of a NodeProto, bytes as text."""
    from onnx import helper

    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in found.items()}


def label(node: Any) -> str:
    """`Quant 'conv1/Quant'`: how an error names a node of the file."""
    return f"{node.op_type} {node.name or node.output[0]!r}"


def read(model: Any) -> Source:
    """The steps that the outputs of `model` (a ModelProto or a path) need.

    Raises: LoweringError, naming the node, for a scale that is no power of two, a zero point and what no format says.
    """
    try:
        import onnx
    except ImportError as error:
        raise ToolError("no onnx: `pip install onnx`") from error
    model = onnx.load(str(model)) if isinstance(model, str | Path) else model
    body = model.graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in body.initializer}
    inputs = {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in body.input if v.name not in constants
    }  # fmt: skip
    readers: dict[str, int] = {}
    for name in (*(n for node in body.node for n in node.input), *(o.name for o in body.output)):
        readers[name] = readers.get(name, 0) + 1
    found = _Found({o: node for node in body.node for o in node.output}, readers, constants)
    alias: dict[str, str] = {}
    steps: list[Step] = []
    for node in body.node:
        if _folded(onnx, model, node, found):
            continue
        step = quantizer(node, found) if node.op_type in QUANTS else None
        if step is None:
            step = Step(node.op_type, node.name or node.output[0], tuple(node.input), node.output[0], attributes(node))
        step = step._replace(inputs=tuple(alias.get(n, n) for n in step.inputs))
        if step.op in ("Identity", "Cast", "Dropout") or _is_port_modulo(step, inputs, found):
            alias[step.output] = step.inputs[0]
            continue
        steps.append(step)
    outputs = [str(alias.get(o.name, o.name)) for o in body.output]
    steps = _without_dead(_tables(_masked(steps, found), found), outputs)
    return Source(inputs, _ports(steps, inputs), constants, steps, outputs)


def _folded(onnx: Any, model: Any, node: Any, found: _Found) -> bool:
    """Compute a node whose inputs are constants; True if it was one."""
    if not all(n in found.constants for n in node.input if n):
        return False
    if node.op_type in QUANTS or node.op_type == "BipolarQuant":
        x = np.asarray(found.constants[node.input[0]], np.float64)
        if node.op_type == "BipolarQuant" or _bipolar(node, found):
            value = np.where(x >= 0, 1.0, -1.0) * np.asarray(found.constants[node.input[1]], np.float64)
            _fraction(node, found)
        else:
            at = _format(node, found)
            value = quantize(x, at["k"], at["i"], at["f"], rounding=at["rounding"], overflow=at["overflow"])
        found.constants[node.output[0]] = value
        return True
    if node.domain not in ("", "ai.onnx"):
        raise LoweringError(
            f"{label(node)}: op of the domain {node.domain!r} on constants; known: {', '.join(QUANTS)}, BipolarQuant"
        )
    # a scalar in double where the file has float keeps every value, and Quant folded above gives double
    from onnx.reference import ReferenceEvaluator

    feeds = {n: found.constants[n] for n in node.input if n}
    made = onnx.helper.make_graph(
        [node], "one",
        [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info(o) for o in node.output],
    )  # fmt: skip
    values = ReferenceEvaluator(onnx.helper.make_model(made, opset_imports=model.opset_import)).run(None, feeds)
    found.constants.update(zip(node.output, map(np.asarray, values), strict=True))
    return True


def _bipolar(node: Any, found: _Found) -> bool:
    """A signed format of one bit is -1 and 1 in QONNX."""
    bits = found.constants.get(node.input[3])
    return bits is not None and bool((np.asarray(bits) == 1).all()) and bool(attributes(node).get("signed", 1))


def _fraction(node: Any, found: _Found) -> np.ndarray:
    """f = -log2(scale), int64."""
    scale = found.constants.get(node.input[1])
    if scale is None:
        raise LoweringError(f"{label(node)}: its scale {node.input[1]!r} is computed; export the model with constant scales")
    scale = np.asarray(scale, np.float64)
    mantissa, exponent = np.frexp(scale)
    if not (mantissa == 0.5).all():
        worst = float(scale[mantissa != 0.5].ravel()[0] if scale.ndim else scale)
        raise LoweringError(
            f"{label(node)}: its scale {worst:g} is no power of two, so its values lie on no fixed-point grid; train with "
            "power-of-two scales (Brevitas: restrict_scaling_type=RestrictValueType.POWER_OF_TWO; QKeras: quantized_bits with "
            "alpha=1 or 'auto_po2')"
        )
    return (1 - exponent).astype(np.int64)


def _format(node: Any, found: _Found) -> dict[str, Any]:
    """k, i, f, rounding and overflow of a Quant by itself; rounding is "CEIL" where only a node in front makes sense of it."""
    at = attributes(node)
    f = _fraction(node, found)
    zero, bits = (found.constants.get(node.input[j]) for j in (2, 3))
    if zero is None or np.any(zero):
        raise LoweringError(f"{label(node)}: its zero point is not 0; export the model with symmetric quantizers")
    if bits is None or np.any(np.asarray(bits) != np.rint(bits)) or np.any(np.asarray(bits) < 1):
        raise LoweringError(f"{label(node)}: its bit width must be a constant of whole numbers above 0, got {bits}")
    signed, mode = bool(at.get("signed", 1)), str(at.get("rounding_mode", "ROUND")).upper()
    narrow = bool(at.get("narrow", 1))
    if narrow and not signed:
        raise LoweringError(f"{label(node)}: unsigned and narrow (without its largest value) is no format; set narrow to 0")
    if mode not in _ROUNDING and mode != "CEIL":
        raise LoweringError(
            f"{label(node)}: rounding mode {mode!r} has no fixed-point form; use one of {', '.join(sorted(_ROUNDING))}"
        )
    k = np.full(f.shape, int(signed), np.int64)
    return {
        "k": k, "i": np.asarray(bits, np.int64) - k - f, "f": f,
        "rounding": _ROUNDING.get(mode, mode), "overflow": "SAT_SYM" if narrow else "SAT",
    }  # fmt: skip


def quantizer(node: Any, found: _Found) -> Step | None:
    """The `quantize` that a Quant and the nodes in front of it are; None for a bipolar one."""
    if _bipolar(node, found):
        return None
    at, x, uses = _format(node, found), node.input[0], 1
    for limited in (_clipped, _wrapped, _reflected):
        if (inner := limited(x, at, found)) is not None:
            x, at = inner
            if at["overflow"].startswith("WRAP"):  # what wraps is read by both sides of a difference
                uses = 2
                x, at["rounding"] = _rounded(x, at["f"], found) or (x, at["rounding"])
            break
    half = {"TRN": 0.5, "CEIL": -0.5}.get(at["rounding"])
    if half is not None and (moved := _constant_of(x, "Add", found, uses)) is not None:
        inner, c = moved
        wanted = np.ldexp(half, -at["f"])
        if np.all((c == wanted) | (c == 0)) and np.any(c):
            x, at["rounding"] = inner, "RND" if half > 0 else "RND_MIN_INF"
    if at["rounding"] == "CEIL":
        raise LoweringError(f"{label(node)}: rounding mode 'CEIL' has no fixed-point form; use ROUND or FLOOR")
    assert at["rounding"] in MODE
    return Step("quantize", node.name or node.output[0], (x,), node.output[0], at)


def _producer(name: str, op: str, found: _Found, uses: int = 1) -> Any:
    """The node of that op which makes `name` for at most `uses` readers."""
    node = found.producers.get(name)
    return node if node is not None and node.op_type == op and found.readers.get(name, 0) <= uses else None


def _constant_of(name: str, op: str, found: _Found, uses: int = 1) -> tuple[str, np.ndarray] | None:
    """(x, c) of the node `op(x, c)` that makes `name`."""
    node = _producer(name, op, found, uses)
    if node is None:
        return None
    for x, c in (node.input, node.input[::-1]) if op != "Sub" else (node.input,):
        if c in found.constants and x not in found.constants:
            return x, np.asarray(found.constants[c], np.float64)
    return None


def _through(name: str, op: str, found: _Found) -> tuple[str, np.ndarray]:
    """(x, c) of `op(x, c)`, or (name, nothing) where that node was left out because it does nothing."""
    return _constant_of(name, op, found) or (name, np.asarray(1.0 if op == "Mul" else 0.0))


def _clipped(x: str, at: dict[str, Any], found: _Found) -> tuple[str, dict[str, Any]] | None:
    """Min(Max(x, low), high) with the bounds of formats."""
    outer = _constant_of(x, "Min", found)
    inner = _constant_of(outer[0], "Max", found) if outer is not None else None
    if outer is None or inner is None:
        return None
    (_, high), (x, low) = outer, inner
    low, high, f = np.broadcast_arrays(low, high, at["f"])
    i = np.rint(np.log2(high + np.ldexp(1.0, -f)))
    dead = (low == 0) & (high == 0)
    k = (low < 0).astype(np.int64)
    fits = (high == np.ldexp(1.0, i.astype(np.int64)) - np.ldexp(1.0, -f)) | dead
    symmetric = bool(np.all(low == -high * k))
    if not fits.all() or not (symmetric or np.all((low == -np.ldexp(1.0, i.astype(np.int64)) * k) | dead)):
        return None
    form = {name: np.where(dead, 0, v).astype(np.int64) for name, v in zip("kif", (k, i, f), strict=True)}
    return x, {**at, **form, "overflow": "SAT_SYM" if symmetric and k.any() else "SAT"}


def _modulo(x: str, found: _Found) -> tuple[str, np.ndarray, np.ndarray] | None:
    """(x, low, P) of x - P * Floor((x - low) / P)."""
    node = _producer(x, "Sub", found, 2)
    if node is None or node.input[0] in found.constants or node.input[1] in found.constants:
        return None
    scaled, period = _through(node.input[1], "Mul", found)
    floor = _producer(scaled, "Floor", found)
    if floor is None:
        return None
    shifted, inverse = _through(floor.input[0], "Mul", found)
    start, low = (shifted, np.asarray(0.0)) if shifted == node.input[0] else _through(shifted, "Sub", found)
    if start != node.input[0] or not np.all(period * inverse == 1) or not np.all(np.frexp(period)[0] == 0.5):
        return None
    return node.input[0], low, period


def _wrapped(x: str, at: dict[str, Any], found: _Found) -> tuple[str, dict[str, Any]] | None:
    inner = _modulo(x, found)
    return None if inner is None else (inner[0], _wrapping(at, *inner[1:], "WRAP"))


def _wrapping(at: dict[str, Any], low: np.ndarray, period: np.ndarray, overflow: str) -> dict[str, Any]:
    low, period, f = np.broadcast_arrays(low, period, at["f"])
    k = (low < 0).astype(np.int64)
    i = np.frexp(period)[1].astype(np.int64) - 1 - k
    return {**at, "k": k, "i": i, "f": f, "overflow": overflow}


def _reflected(x: str, at: dict[str, Any], found: _Found) -> tuple[str, dict[str, Any]] | None:
    """WRAP_SM: Min(u, c - u)."""
    node = _producer(x, "Min", found)
    turned = _producer(node.input[1], "Sub", found) if node is not None else None
    if node is None or turned is None or turned.input[1] != node.input[0] or turned.input[0] not in found.constants:
        return None
    inner = _modulo(node.input[0], found)
    return None if inner is None else (inner[0], _wrapping(at, inner[1], inner[2] / 2, "WRAP_SM"))


def _rounded(x: str, f: np.ndarray, found: _Found) -> tuple[str, str] | None:
    """(x, rounding) of a rounding to the grid 2^-f in standard ops."""
    y, down = _constant_of(x, "Mul", found, 2) or (x, np.asarray(1.0))
    node = found.producers.get(y)
    if node is None or not np.all(down == np.ldexp(1.0, -f)):
        return None
    if node.op_type in _EXPLICIT:
        source, rounding = node.input[0], _EXPLICIT[node.op_type]
    elif node.op_type == "Mul" and (sign := _producer(node.input[0], "Sign", found)) is not None:
        size = found.producers[node.input[1]]
        inner, half = _through(size.input[0], "Add", found)
        absolute = _producer(inner, "Abs", found)
        names = {("Floor", 0.0): "TRN_ZERO", ("Floor", 0.5): "RND_INF", ("Ceil", -0.5): "RND_ZERO"}
        rounding = names.get((size.op_type, float(np.ravel(half)[0])))
        if absolute is None or rounding is None or absolute.input[0] != sign.input[0]:
            return None
        source = sign.input[0]
    else:
        return None
    start, up = _constant_of(source, "Mul", found, 2) or (source, np.asarray(1.0))
    return (start, rounding) if np.all(up == np.ldexp(1.0, f)) else None


def _is_port_modulo(step: Step, inputs: Any, found: _Found) -> bool:
    """Mod of an input by the period of its port, which changes no value that a port holds."""
    if step.op != "Mod":
        return False
    source = step.inputs[0]
    while source not in inputs and (node := found.producers.get(source)) is not None and node.op_type in ("Reshape", "Identity"):
        source = node.input[0]
    if source not in inputs or not step.attrs.get("fmod"):
        raise LoweringError(f"Mod {step.name!r}: only that of a port is known here; quantize with a wrapping format instead")
    return True


def _masked(steps: Sequence[Step], found: _Found) -> list[Step]:
    """With zeros and ones behind a quantizer as formats without bits."""
    out: list[Step] = []
    place: dict[str, int] = {}
    for step in steps:
        side = next((n for n in step.inputs if n in found.constants), None) if step.op == "Mul" else None
        other = next((n for n in step.inputs if n != side), "")
        mask = found.constants.get(side) if side is not None else None
        if mask is not None and np.isin(mask, (0, 1)).all() and other in place and found.readers.get(other) == 1:
            at = out[place[other]].attrs
            form = {name: np.where(mask == 1, at[name], 0) for name in "kif"}
            out[place[other]] = out[place[other]]._replace(output=step.output, attrs={**at, **form})
            place[step.output] = place[other]
            continue
        if step.op == "quantize":
            place[step.output] = len(out)
        out.append(step)
    return out


def _tables(steps: Sequence[Step], found: _Found) -> list[Step]:
    """With `table` steps (first, codes, scale, and k, i, f of the quantizer in front) where `to_qonnx` wrote a table."""
    made = {s.output: s for s in steps}
    return [_table(step, made, found) or step for step in steps]


def _table(step: Step, made: dict[str, Step], found: _Found) -> Step | None:
    """codes[x * 2^f + first] * scale, where x comes from a quantizer of that f."""
    result = _scaled_step(step, "Mul", found)
    gather = made.get(result[0]) if result is not None else None
    codes = found.constants.get(gather.inputs[0]) if gather is not None and gather.op == "Gather" else None
    if result is None or gather is None or codes is None or codes.ndim != 1:
        return None
    entry, first = made.get(gather.inputs[1]), np.zeros((), np.int64)
    if entry is not None and (shifted := _scaled_step(entry, "Add", found)) is not None:
        entry, first = made.get(shifted[0]), shifted[1]
    read_at = _scaled_step(entry, "Mul", found) if entry is not None else None
    x = made.get(read_at[0]) if read_at is not None else None
    if read_at is None or x is None or x.op != "quantize":
        return None
    k, i, f = (x.attrs[key] for key in "kif")
    if not np.all(read_at[1] == np.ldexp(1.0, np.where(k + i + f > 0, f, 0))):
        return None
    return Step("table", gather.name, (x.output,), step.output, dict(first=first, codes=codes, scale=result[1], k=k, i=i, f=f))


def _scaled_step(step: Step, op: str, found: _Found) -> tuple[str, np.ndarray] | None:
    """(x, c) of a step `op(x, c)`."""
    if step.op == op:
        for x, c in (step.inputs, step.inputs[::-1]):
            if c in found.constants and x not in found.constants:
                return x, found.constants[c]
    return None


def _without_dead(steps: Sequence[Step], outputs: Sequence[str]) -> list[Step]:
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if step.output in needed:
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _ports(steps: Sequence[Step], inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int, int]]:
    """The format of every input that is read by one quantizer alone, behind a reshape or not; the widest of its elements."""
    ports = {}
    for name in inputs:
        reading = [s for s in steps if name in s.inputs]
        while len(reading) == 1 and reading[0].op in ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"):
            reading = [s for s in steps if reading[0].output in s.inputs]
        if len(reading) == 1 and reading[0].op == "quantize":
            at = reading[0].attrs
            ports[name] = tuple(int(np.max(at[key])) for key in "kif")
    return ports
