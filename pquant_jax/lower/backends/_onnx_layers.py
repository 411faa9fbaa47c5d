"""Convolutions and pools that `structure` reads back from the graph, as Conv, MaxPool and AveragePool instead of gathers.

ONNX has the channels in front, the graph where the model had them: a Transpose stands on either side.
"""

from __future__ import annotations

import numpy as np

from pquant_jax.lower.backends._onnx_nodes import parameter
from pquant_jax.lower.backends._onnx_writer import Operand, Writer, add, physical, reshaped
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.structure import Layer, structure


def layers(w: Writer, graph: Graph) -> dict[int, Layer]:
    """{node: the layer that computes it} of those that are one ONNX op; none in float64, in which onnxruntime has no Conv."""
    if w.real != np.float32:
        return {}
    return {layer.output: layer for layer in structure(graph) if _is_one_op(layer)}


def _is_one_op(layer: Layer) -> bool:
    if layer.op not in ("conv", "pool"):
        return False
    at = layer.attrs["geometry"]
    if min((n for pair in at.padding for n in pair), default=0) < 0:  # what crops
        return False
    if layer.op == "conv" or layer.attrs["kind"] == "max":
        return True
    count = int(np.prod(at.size))  # a mean of any other number of elements is rounded; opset 17 has none with holes
    return layer.attrs["kind"] == "average" and count & (count - 1) == 0 and set(at.dilation) == {1}


def write_layer(w: Writer, layer: Layer, value: Operand) -> str:
    """The layer's value from that of its input, in the physical shape of its node."""
    assert isinstance(value, str)
    at, name = layer.attrs["geometry"], layer.name
    space = len(at.space)
    x = reshaped(w, value, at.in_shape, name)
    if at.channels_last:
        x = _turned(w, x, (at.channels, *at.space), (0, space + 1, *range(1, space + 1)), name)
    geometry = {
        "kernel_shape": list(at.size), "strides": list(at.strides), "dilations": list(at.dilation),
        "pads": [low for low, _ in at.padding] + [high for _, high in at.padding],
    }  # fmt: skip
    if layer.op == "conv":
        kernel = np.moveaxis(np.moveaxis(layer.attrs["kernel"], -1, 0), -1, 1)  # (out, in / groups, *size)
        names = [x, parameter(w, kernel, name, 0)]
        if layer.attrs["bias"] is not None:
            names.append(parameter(w, layer.attrs["bias"], name, 0))
        channels = len(kernel)
        y = add(w, "Conv", names, (channels, *at.positions), name, group=layer.attrs["groups"], **geometry)
    else:
        channels = at.channels
        if layer.attrs["kind"] == "average":
            geometry = {key: v for key, v in geometry.items() if key != "dilations"} | {"count_include_pad": 1}
        y = add(w, "MaxPool" if layer.attrs["kind"] == "max" else "AveragePool", [x], (channels, *at.positions), name, **geometry)
    if layer.op == "conv" or at.channels_last:
        y = _turned(w, y, (*at.positions, channels), (0, *range(2, space + 2), 1), name)
    return reshaped(w, y, physical(layer.shape), name)


def _turned(w: Writer, x: str, shape: tuple[int, ...], order: tuple[int, ...], name: str) -> str:
    """Transposed to `shape`; a reshape where the longer axes keep their order."""
    old = w.tensors[x][1]
    moved = [a for a in order[1:] if old[a - 1] != 1]
    return reshaped(w, x, shape, name) if moved == sorted(moved) else add(w, "Transpose", [x], shape, name, perm=list(order))
