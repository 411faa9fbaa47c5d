"""Layers of `lower.structure` computed by numpy alone: windows as nested loops over offsets, no index arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pquant_jax.lower.emulate import apply_op, port_value
from pquant_jax.lower.ir import Graph, Node
from pquant_jax.lower.structure import Layer

_REDUCE = {"max": np.max, "min": np.min, "sum": np.sum}


def execute(graph: Graph, layers: Sequence[Layer], inputs: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
    """The value of every layer's output node, (N, *shape)."""
    ports = dict(zip(graph.inputs, inputs, strict=True))
    n = len(inputs[0])
    values: dict[int, np.ndarray] = {}
    for layer in layers:
        ins = [values[j].reshape(n, *s) for j, s in zip(layer.inputs, layer.attrs["in_shapes"], strict=True)]
        if layer.op == "input":
            out = port_value(graph.nodes[layer.output], ports[layer.output])
        else:
            out = _value(layer, ins, n)
        assert layer.op in ("input", "const") or out.shape[1:] == tuple(layer.attrs["out_shape"]), layer
        values[layer.output] = out.reshape(n, *layer.shape)
    return values


def _value(layer: Layer, ins: list[np.ndarray], n: int) -> np.ndarray:
    at, op = layer.attrs, layer.op
    if op == "const":
        return np.broadcast_to(at["value"], (n, *layer.shape))
    if op == "dense":
        return ins[0] @ at["kernel"] + (0 if at["bias"] is None else at["bias"])
    if op == "conv":
        return _conv(ins[0], at)
    if op == "einsum":
        terms, out = at["equation"].split("->")
        names = terms.split(",")
        batched = [f"z{t}" for t in names[: len(ins)]] + names[len(ins) :]
        operands = ins if at["kernel"] is None else [*ins, at["kernel"]]
        return np.einsum(f"{','.join(batched)}->z{out}", *operands)
    if op == "pool":
        return _pool(ins[0], at)
    if op == "reduce":
        return _REDUCE[at["kind"]](ins[0], axis=tuple(d + 1 for d in at["axes"]))
    if op == "scale":
        return ins[0] * (1 if at["scale"] is None else at["scale"]) + (0 if at["offset"] is None else at["offset"])
    if op in ("relu", "leaky_relu"):
        return np.where(ins[0] > 0, ins[0], ins[0] * at.get("slope", 0.0)) + 0.0
    if op == "transpose":
        return ins[0].transpose(0, *(d + 1 for d in at["perm"]))
    if op == "broadcast":
        return np.broadcast_to(ins[0], (n, *at["out_shape"]))
    if op in ("slice", "flip"):
        out = ins[0]
        for axis, (start, step, count) in enumerate(at["slices"]):
            out = np.stack([np.take(out, start + step * j, axis + 1) for j in range(count)], axis + 1)
        return out
    if op == "reshape":
        return ins[0].reshape(n, *layer.shape)
    if op == "concat":
        return np.concatenate(ins, at["axis"] + 1)
    op, at = ("take", {"index": at["index"]}) if op == "gather" else (op, at)
    return apply_op(Node(op, layer.inputs, layer.shape, at), ins)


def _windows(x: np.ndarray, g, fill: float) -> list[np.ndarray]:
    """x (N, *space, channels) -> for every offset in the window, (N, *positions, channels)."""
    x = np.pad(x, [(0, 0), *g.padding, (0, 0)], constant_values=fill)
    out = []
    for offset in np.ndindex(*g.size):
        part = x
        for axis, o in enumerate(offset):
            places = o * g.dilation[axis] + g.strides[axis] * np.arange(g.positions[axis])
            part = np.take(part, places, axis + 1)
        out.append(part)
    return out


def _conv(x: np.ndarray, at) -> np.ndarray:
    g, kernel = at["geometry"], at["kernel"]
    x = x if g.channels_last else np.moveaxis(x, 1, -1)
    inner, out = kernel.shape[-2:]
    total = np.zeros(())
    for offset, part in zip(np.ndindex(*g.size), _windows(x, g, 0.0), strict=True):
        blocks = np.split(part, at["groups"], -1)
        columns = np.split(kernel[offset].reshape(inner, out), at["groups"], -1)
        total = total + np.concatenate([b @ c for b, c in zip(blocks, columns, strict=True)], -1)
    return total + (0 if at["bias"] is None else at["bias"])


def _pool(x: np.ndarray, at) -> np.ndarray:
    g, kind = at["geometry"], at["kind"]
    x = x if g.channels_last else np.moveaxis(x, 1, -1)
    fill = {"max": -np.inf, "min": np.inf}.get(kind, 0.0)
    stack = np.stack(_windows(x, g, fill))
    out = stack.mean(0) if kind == "average" else _REDUCE[kind](stack, 0)
    return out if g.channels_last else np.moveaxis(out, -1, 1)
