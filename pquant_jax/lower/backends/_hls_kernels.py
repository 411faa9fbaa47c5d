"""Layers of hls4ml that multiply with constants, or run over windows: dense, convolution, einsum, sum, pool.  numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pquant_jax.lower._indices import Geometry
from pquant_jax.lower.backends._hls_build import Project, add, floats, unique, view
from pquant_jax.lower.backends._hls_types import Fixed, accumulator, array_type, tensor_type
from pquant_jax.lower.structure import Layer

_LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


def _sums(p: Project, layer: Layer, kernel: np.ndarray, bias: np.ndarray | None) -> tuple[Fixed, dict[str, Fixed]]:
    """(result type, types of a sum of products with a constant)."""
    result, weight = tensor_type(p.known[layer.output]), array_type(kernel)
    extra = None if bias is None else array_type(bias)
    source = p.types[p.where[layer.inputs[0]]]
    wide = accumulator(result, [(source, weight)], extra)
    return result, {"accum": wide, "weight": weight, "bias": extra or Fixed(0, 1, 0)}


def emit_dense(p: Project, layer: Layer) -> None:
    kernel, bias = layer.attrs["kernel"], layer.attrs["bias"]
    n_in, n_out = kernel.shape
    result, types = _sums(p, layer, kernel, bias)
    name = unique(p, layer.name, "")
    data = dict(bias_data=None if bias is None else floats(bias), data_format="channels_last", precision=types)
    data |= dict(products=(n_in, n_out), output=layer.output)
    shape = layer.attrs["in_shapes"][0]
    if len(shape) == 1:
        at = dict(n_in=n_in, n_out=n_out, weight_data=floats(kernel))
        add(p, name, "Dense", [view(p, layer.inputs[0], shape)], (n_out,), result, **at, **data)
        return
    at = dict(in_width=shape[0], out_width=shape[0], n_chan=n_in, n_filt=n_out, filt_width=1, stride_width=1)
    at |= dict(pad_left=0, pad_right=0, weight_data=floats(kernel[None]))
    source = view(p, layer.inputs[0], shape)
    add(p, name, "Conv1D", [source], (shape[0], n_out), result, **at, **data)


def channels_last(p: Project, layer: Layer) -> str:
    """The input of a convolution or pool as (*space, channels)."""
    g = layer.attrs["geometry"]
    name = view(p, layer.inputs[0], g.in_shape)
    if g.channels_last:
        return name
    perm = [*range(1, len(g.in_shape)), 0]
    shape = (*g.space, g.channels)
    return add(p, unique(p, name, "_last"), "Transpose", [name], shape, p.types[name], perm=perm)


def _axes(g: Any, kind: str) -> dict[str, int]:
    """hls4ml's names of a geometry; kind: filt or pool."""
    at: dict[str, int] = {}
    names = ("height", "width")[-len(g.space) :]
    edges = (("top", "bottom"), ("left", "right"))[-len(g.space) :]
    for axis, (name, (low, high)) in enumerate(zip(names, edges, strict=True)):
        at |= {f"in_{name}": g.space[axis], f"out_{name}": g.positions[axis], f"stride_{name}": g.strides[axis]}
        at |= {f"{kind}_{name}": g.size[axis], f"pad_{low}": g.padding[axis][0], f"pad_{high}": g.padding[axis][1]}
    return at


def emit_conv(p: Project, layer: Layer) -> None:
    g, bias = layer.attrs["geometry"], layer.attrs["bias"]
    kernel: np.ndarray = _undilated(layer.attrs["kernel"], g.dilation)
    groups, rank = layer.attrs["groups"], len(g.space)
    g = g._replace(size=kernel.shape[:rank], dilation=(1,) * rank)
    name = unique(p, layer.name, "")
    depthwise = groups == g.channels == kernel.shape[-1] and groups > 1 and p.strategy(name) == "latency"
    n_filt = kernel.shape[-1]
    if depthwise:
        kernel = np.swapaxes(kernel, -1, -2)  # (*size, channels, 1)
        own: dict[str, Any] = dict(depthwise_data=floats(kernel), depth_multiplier=1)
    else:
        kernel = _ungrouped(kernel, groups)
        own = dict(weight_data=floats(kernel), products=(int(np.prod(g.size)) * g.channels, n_filt))
    result, types = _sums(p, layer, kernel, bias)
    at = dict(**_axes(g, "filt"), n_chan=g.channels, n_filt=n_filt, data_format="channels_last", precision=types, **own)
    at |= dict(bias_data=None if bias is None else floats(bias), output=layer.output)
    kind = f"{'Depthwise' if depthwise else ''}Conv{rank}D"
    add(p, name, kind, [channels_last(p, layer)], (*g.positions, n_filt), result, **at)


def _undilated(kernel: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """With zeros between the weights: hls4ml has no dilation."""
    sizes: list[int] = list(kernel.shape)
    for axis, step in enumerate(dilation):
        sizes[axis] = (sizes[axis] - 1) * step + 1
    wide = np.zeros(sizes)
    wide[tuple(slice(None, None, step) for step in dilation)] = kernel
    return wide


def _ungrouped(kernel: np.ndarray, groups: int) -> np.ndarray:
    """With zeros between the groups, of which hls4ml has one, or as many as channels."""
    *size, inner, total = kernel.shape
    out = total // groups
    whole = np.zeros((*size, inner * groups, total))
    for j in range(groups):
        part = slice(j * out, (j + 1) * out)
        whole[..., j * inner : (j + 1) * inner, part] = kernel[..., part]
    return whole


def emit_einsum(p: Project, layer: Layer) -> None:
    at, shapes = layer.attrs, layer.attrs["in_shapes"]
    result, name = tensor_type(p.known[layer.output]), unique(p, layer.name, "")
    if at["kernel"] is not None:
        _einsum_dense(p, layer, name, at["equation"], shapes[0], at["kernel"], at["out_shape"])
        return
    sources = [view(p, j, s) for j, s in zip(layer.inputs, shapes, strict=True)]
    wide = accumulator(result, [(p.types[sources[0]], p.types[sources[1]])], None)
    more = dict(equation=at["equation"], inp0_shape=shapes[0], inp1_shape=shapes[1], out_shape=at["out_shape"])
    add(p, name, "Einsum", sources, at["out_shape"], result, output=layer.output, precision={"accum": wide}, **more)


def _einsum_dense(
    p: Project, layer: Layer, name: str, equation: str, shape: Sequence[int], kernel: np.ndarray, out: Sequence[int]
) -> None:
    result, types = _sums(p, layer, kernel, None)
    more: dict[str, Any] = dict(
        equation=equation, inp_shape=tuple(shape), out_shape=tuple(out), weight_data=floats(kernel), bias_data=None
    )
    more["output"] = layer.output
    if p.strategy(name) == "resource":
        more["config"] = {"Strategy": "latency"}  # hls4ml has no other for it
    add(p, name, "EinsumDense", [view(p, layer.inputs[0], shape)], out, result, precision=types, **more)


def emit_reduce(p: Project, layer: Layer) -> None:
    shape, axes = layer.attrs["in_shapes"][0], layer.attrs["axes"]
    name = unique(p, layer.name, f"_{layer.attrs['kind']}")
    if layer.attrs["kind"] == "max":
        space, channels = shape[:-1], shape[-1]
        kind, at = ("GlobalMaxPooling1D", {"n_in": space[0]}) if len(space) == 1 else ("GlobalMaxPooling2D", {})
        if len(space) == 2:
            at = {"in_height": space[0], "in_width": space[1]}
        result = tensor_type(p.known[layer.output])
        more = dict(n_filt=channels, data_format="channels_last", precision={"accum": p.types[p.where[layer.inputs[0]]]})
        add(p, name, kind, [view(p, layer.inputs[0], shape)], (channels,), result, output=layer.output, **at, **more)
        return
    if p.stream:
        _sum_of_positions(p, layer, name, shape)
        return
    kept = [d for d in range(len(shape)) if d not in axes]
    if not kept:
        n = int(np.prod(shape))
        result, types = _sums(p, layer, np.ones((n, 1)), None)
        at = dict(n_in=n, n_out=1, weight_data=np.ones((n, 1)), bias_data=None, data_format="channels_last", products=(n, 1))
        add(p, name, "Dense", [view(p, layer.inputs[0], (n,))], (1,), result, output=layer.output, precision=types, **at)
        return
    letters = _LETTERS[: len(shape)]
    equation = f"{letters},{''.join(letters[d] for d in axes)}->{''.join(letters[d] for d in kept)}"
    _einsum_dense(p, layer, name, equation, shape, np.ones([shape[d] for d in axes]), [shape[d] for d in kept])


def _sum_of_positions(p: Project, layer: Layer, name: str, shape: Sequence[int]) -> None:
    """Of a stream (*space, channels): one window over all of it, with weights 1."""
    space, channels = tuple(shape[:-1]), shape[-1]
    rank = len(space)
    g = Geometry(space, space, (1,) * rank, (1,) * rank, ((0, 0),) * rank, (1,) * rank, channels, True)
    _depthwise(p, layer, name, view(p, layer.inputs[0], shape), g, 1.0)


def _depthwise(p: Project, layer: Layer, name: str, source: str, g: Geometry, weight: float) -> None:
    """A weighted sum of every window, channel by channel."""
    kernel = np.full((*g.size, g.channels, 1), weight)
    result, types = _sums(p, layer, kernel, None)
    at = dict(**_axes(g, "filt"), n_chan=g.channels, n_filt=g.channels, depth_multiplier=1, data_format="channels_last")
    more: dict[str, Any] = dict(bias_data=None, depthwise_data=floats(kernel), precision=types, output=layer.output)
    more["config"] = {"Strategy": "latency"}
    add(p, name, f"DepthwiseConv{len(g.space)}D", [source], (*g.positions, g.channels), result, **at, **more)


def emit_pool(p: Project, layer: Layer) -> None:
    g, kind = layer.attrs["geometry"], layer.attrs["kind"]
    rank, source = len(g.space), channels_last(p, layer)
    result, inner = tensor_type(p.known[layer.output]), p.types[source]
    name = unique(p, layer.name, f"_{kind}_pool")
    shape = (*g.positions, g.channels)
    if kind == "max":
        at = dict(**_axes(g, "pool"), n_chan=g.channels, n_filt=g.channels, data_format="channels_last")
        if rank == 1:
            at |= dict(n_in=g.space[0], n_out=g.positions[0])
        more = dict(precision={"accum": inner}, output=layer.output)
        add(p, name, f"MaxPooling{rank}D", [source], shape, result, **at, **more)
        return
    count = int(np.prod(g.size))
    _depthwise(p, layer, name, source, g, 1.0 / count if kind == "average" else 1.0)
