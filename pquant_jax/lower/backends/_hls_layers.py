"""Which layer of hls4ml computes a layer of a graph, with its exact types.  numpy only.

hls4ml's own bit-exact pass is not used: every type is known from `ranges.intervals`, so every precision is said in
`LayerName` and what the user reads there is what is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from pquant_jax.lower.backends._hls_build import Project, add, floats, plain, unique, view
from pquant_jax.lower.backends._hls_kernels import emit_conv, emit_dense, emit_einsum, emit_pool, emit_reduce
from pquant_jax.lower.backends._hls_types import Fixed, array_type, tensor_type
from pquant_jax.lower.ir import Node, entries
from pquant_jax.lower.ranges import Interval
from pquant_jax.lower.structure import Layer

MERGES: Final = {"add": "add", "sub": "subtract", "mul": "multiply", "max": "maximum", "min": "minimum"}
_FUSED: Final = frozenset({"Dense", "Conv1D", "Conv2D", "BatchNormalization", "Activation"})
MAX_TABLE_BITS: Final = 14


def emit_input(p: Project, layer: Layer) -> None:
    at = layer.attrs
    shape = plain(layer.shape)
    t = Fixed(int(at["k"]), int(at["i"]), int(at["f"]))
    name = unique(p, "input", f"_{len([m for m in p.made if m.kind == 'InputLayer']) + 1}")
    add(p, name, "InputLayer", [], shape, t, output=layer.output, input_shape=list(shape), data_format="channels_last")


def uniform(layer: Layer) -> Fixed | None:
    """The one format of a quantizer, None if it has several or no bits somewhere."""
    k, i, f = (np.unique(layer.attrs[key]) for key in "kif")
    if max(len(k), len(i), len(f)) > 1 or not layer.attrs["k"].size or k[0] + i[0] + f[0] <= 0:
        return None
    return Fixed(int(k[0]), int(i[0]), int(f[0]), str(layer.attrs["rounding"]), str(layer.attrs["overflow"]))


def emit_quantize(p: Project, layer: Layer) -> None:
    source = layer.inputs[0]
    name, fixed = p.where[source], uniform(layer)
    shape = p.shapes[name]
    if fixed is not None:
        last = next(m for m in p.made if m.name == name)
        if last.kind in _FUSED and last.output == source and p.reads[source] == 1 and p.graph.nodes[source].op != "quantize":
            p.types[name] = fixed  # the cast to the result does it
            p.names[name]["Precision"].update(default=str(fixed), result=str(fixed))
            p.made[p.made.index(last)] = last._replace(output=layer.output)
            p.where[layer.output] = p.where.pop(source)
            return
        new = unique(p, layer.name, "_q")
        n_in = int(np.prod(shape))
        add(p, new, "Activation", [name], shape, fixed, output=layer.output, activation="linear", n_in=n_in)
        return
    k, i, f = (np.broadcast_to(np.asarray(layer.attrs[key], np.int64), layer.shape).reshape(shape) for key in "kif")
    bits = np.where(k + i + f > 0, k + i + f, 0)
    masks = [np.where(bits > 0, v, 0).astype(np.int16)[None] for v in (k, bits, k + i)]
    modes = {"SAT": str(layer.attrs["overflow"]), "RND": str(layer.attrs["rounding"])}
    result = tensor_type(p.known[layer.output])
    new = unique(p, layer.name, "_q")
    at = dict(mask_kbi=tuple(masks), fusible=None, overrides={}, **modes)
    add(p, new, "FixedPointQuantizer", [name], shape, result, output=layer.output, **at)


def emit_table(p: Project, layer: Layer) -> None:
    name = p.where[layer.inputs[0]]
    t, shape, at = p.types[name], p.shapes[name], layer.attrs
    code = np.arange(1 << t.width)
    value = np.ldexp(np.where(code >= 1 << (t.width - t.k), code - (1 << t.width), code).astype(np.float64), -t.f)
    one = {key: np.full(value.shape, np.ravel(at[key])[0], np.int64) for key in "kif"}
    where, bad = entries(Node("table", (0,), value.shape, one), value)
    row = int(np.ravel(at["which"])[0])
    data = np.ldexp(np.asarray(at["codes"], np.float64)[row, where], -int(np.asarray(at["f_out"])[row]))
    data = np.where(bad, 0.0, data)  # never read
    result = tensor_type(p.known[layer.output])
    more = dict(activation="unary_lut", table_data=data, n_in=int(np.prod(shape)), precision={"table": array_type(data)})
    add(p, unique(p, layer.name, "_table"), "UnaryLUT", [name], shape, result, output=layer.output, **more)


def emit_scale(p: Project, layer: Layer) -> None:
    name = p.where[layer.inputs[0]]
    shape = p.shapes[name]
    count = int(np.prod(shape))
    parts = [layer.attrs[key] for key in ("scale", "offset")]
    size = max(v.size for v in parts if v is not None)
    scale, offset = (
        np.full(size, float(n)) if v is None else np.broadcast_to(np.ravel(v) if v.size == size else _spread(v, count), (size,))
        for n, v in zip((1, 0), parts, strict=True)
    )
    result = tensor_type(p.known[layer.output])
    more: dict[str, Any] = dict(n_in=count, n_filt=size, scale_data=floats(scale), bias_data=floats(offset), output=layer.output)
    more["precision"] = {"scale": array_type(scale), "bias": array_type(offset)}
    add(p, unique(p, layer.name, "_scale"), "BatchNormalization", [name], shape, result, **more)


def _spread(value: np.ndarray, count: int) -> np.ndarray:
    """One value per channel as one per element."""
    return np.tile(value.ravel(), count // value.size)


def emit_activation(p: Project, layer: Layer) -> None:
    name = p.where[layer.inputs[0]]
    shape, result = p.shapes[name], tensor_type(p.known[layer.output])
    at: dict[str, Any] = dict(n_in=int(np.prod(shape)), output=layer.output)
    if layer.op == "relu":
        add(p, unique(p, layer.name, "_relu"), "Activation", [name], shape, result, activation="relu", **at)
        return
    slope = layer.attrs["slope"]
    at |= dict(activation="leakyrelu", activ_param=slope, precision={"param": array_type(np.array([slope]))})
    add(p, unique(p, layer.name, "_leaky_relu"), "LeakyReLU", [name], shape, result, **at)


def emit_merge(p: Project, layer: Layer) -> None:
    first = p.where[layer.inputs[0]]
    shape = p.shapes[first]
    inputs = [first, view(p, layer.inputs[1], shape)]
    result = tensor_type(p.known[layer.output])
    add(p, unique(p, layer.name, f"_{layer.op}"), "Merge", inputs, shape, result, output=layer.output, op=MERGES[layer.op])


def emit_transpose(p: Project, layer: Layer) -> None:
    source = view(p, layer.inputs[0], layer.attrs["in_shapes"][0])
    at = dict(perm=[int(d) for d in layer.attrs["perm"]], output=layer.output)
    add(p, unique(p, layer.name, "_t"), "Transpose", [source], layer.attrs["out_shape"], p.types[source], **at)


def emit_reshape(p: Project, layer: Layer) -> None:
    """A mere view: whoever reads it sees the elements in the same order."""
    p.where[layer.output] = p.where[layer.inputs[0]]


def emit_concat(p: Project, layer: Layer) -> None:
    """Two at a time, along the last axis of (outer, rest)."""
    axis, shapes = layer.attrs["axis"], layer.attrs["in_shapes"]
    outer = int(np.prod(shapes[0][:axis], dtype=np.int64))
    widths = [int(np.prod(s)) // outer for s in shapes]
    forms = [(w,) if outer == 1 else (outer, w) for w in widths]
    sources = [view(p, j, s) for j, s in zip(layer.inputs, forms, strict=True)]
    result = tensor_type(p.known[layer.output])
    name, width = sources[0], widths[0]
    for n, (source, more) in enumerate(zip(sources[1:], widths[1:], strict=True), 2):
        width += more
        shape = (width,) if outer == 1 else (outer, width)
        last = layer.output if n == len(sources) else -1
        at = dict(axis=-1, op=f"concatenate{len(shape)}d", output=last)
        name = add(p, unique(p, layer.name, "_concat"), "Concatenate", [name, source], shape, result, **at)


EMIT: Final[dict[str, Callable[[Project, Layer], None]]] = {
    "input": emit_input, "quantize": emit_quantize, "table": emit_table, "dense": emit_dense, "conv": emit_conv,
    "einsum": emit_einsum, "reduce": emit_reduce, "pool": emit_pool, "scale": emit_scale, "relu": emit_activation,
    "leaky_relu": emit_activation, "transpose": emit_transpose, "reshape": emit_reshape, "concat": emit_concat,
    **dict.fromkeys(MERGES, emit_merge),
}  # fmt: skip


def has_layer(layer: Layer, known: Sequence[Interval]) -> bool:
    """Whether hls4ml has a layer, or some, that computes this one exactly; what has none becomes part of a netlist."""
    at = layer.attrs
    if layer.op not in EMIT or 0 in layer.shape:
        return False
    if layer.op == "quantize":
        k, i, f = (np.asarray(at[key]) for key in "kif")
        lone = (k == 1) & (i + f == 0)
        return str(at["overflow"]) in ("WRAP", "SAT") or (str(at["overflow"]) == "SAT_SYM" and not lone.any())
    if layer.op == "table":
        same = all(np.unique(at[key]).size == 1 for key in ("k", "i", "f", "which"))
        return same and tensor_type(known[layer.inputs[0]]).width <= MAX_TABLE_BITS
    if layer.op == "reduce":
        shape, axes = at["in_shapes"][0], at["axes"]
        return at["kind"] == "sum" or (at["kind"] == "max" and len(shape) in (2, 3) and axes == tuple(range(len(shape) - 1)))
    if layer.op == "pool":
        g = at["geometry"]
        unpadded = not any(n for pair in g.padding for n in pair) and set(g.dilation) == {1}
        power = at["kind"] != "average" or np.log2(np.prod(g.size)).is_integer()
        return unpadded and at["kind"] in ("max", "sum", "average") and bool(power) and g.channels_last
    if layer.op == "transpose":
        return len(at["perm"]) <= 3
    if layer.op in MERGES:
        return len(layer.inputs) == 2
    if layer.op == "concat":
        return len(layer.inputs) >= 2
    return True
