"""Constants that enter a product, moved into the bias behind it: neurons that pruning turned into a constant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, Tree, View
from pquant_jax.graph._constants import constants
from pquant_jax.graph._interpret import Program, Step, bind
from pquant_jax.numerics.oracle import least_f

_MOVES: Final = frozenset("reshape transpose squeeze broadcast_in_dim".split())
_FLOAT32_BITS: Final = 24


class _Layer(NamedTuple):
    """x @ kernel + bias in a program.

    side: which operand of `product` is the kernel.  moves, spread: what happens to the product and to the bias before
    they are added.
    """

    product: Step
    side: int
    kernel: str
    bias: str
    moves: tuple[Step, ...]
    spread: tuple[Step, ...]


def folded(program: Program, view: View, state: Tree, sample: Any) -> View:
    """The view with c w added to the bias and w = 0, where an input of a layer is a constant c other than 0.

    Only where the outputs stay the same bit for bit: kernel and bias are used once, c is the same at all positions, and
    no sum needs more than float32's 24 bits.  The bias's format grows to hold the sum.

    program: the instrumented forward of ({"params": view.model, "state": state}, view.sites, sample).
    """
    leaves = {"params": view.model, "state": state}
    paths = dict(zip(program.inputs, _tree.flatten(leaves), strict=False))
    layers = _layers(program, {slot: path for slot, path in paths.items() if path.startswith("params/")})
    data = [layer.product.ins[1 - layer.side] for layer in layers]
    arrays = {path: np.asarray(v) for path, v in _tree.flatten(leaves).items()}
    sites = dict(view.sites)
    for layer, (value, varies) in zip(layers, constants(program, (leaves, view.sites), sample, data), strict=True):
        made = _moved(layer, value, varies, arrays[layer.kernel], arrays[layer.bias])
        if made is not None:
            arrays[layer.kernel], arrays[layer.bias] = made
            name = layer.bias.removeprefix("params/")
            if name in sites:
                sites[name] = _holding(sites[name], arrays[layer.bias])
    changed = {p.removeprefix("params/"): arrays[p] for layer in layers for p in (layer.kernel, layer.bias)}
    return view._replace(model=_tree.replace(view.model, changed), sites=sites)


def _layers(program: Program, leaves: dict[int, str]) -> list[_Layer]:
    operands = [v for step in program.steps for v in step.ins] + list(program.outputs)
    reads: Counter[Any] = Counter(v for v in operands if isinstance(v, int))
    maker = {v: step for step in program.steps for v in step.outs}
    reader = {v: step for step in program.steps for v in step.ins if isinstance(v, int) and reads[v] == 1}
    found = []
    for step in program.steps:
        if step.eqn.primitive.name != "dot_general":
            continue
        contract, batch = step.eqn.params["dimension_numbers"]
        sides = [n for n in (0, 1) if step.ins[n] in leaves and reads[step.ins[n]] == 1]
        if len(sides) != 1 or batch[0] or len(contract[0]) != 1:
            continue
        moves, last = [], step
        while (after := reader.get(last.outs[0])) is not None and after.eqn.primitive.name in _MOVES:
            moves.append(after)
            last = after
        if after is None or after.eqn.primitive.name != "add":
            continue
        spread, v = [], after.ins[1] if after.ins[0] == last.outs[0] else after.ins[0]
        while isinstance(v, int) and v in maker and maker[v].eqn.primitive.name in _MOVES and reads[v] == 1:
            spread.insert(0, maker[v])
            v = maker[v].ins[0]
        kernel = step.ins[sides[0]]
        if isinstance(v, int) and isinstance(kernel, int) and v in leaves and reads[v] == 1:
            found.append(_Layer(step, sides[0], leaves[kernel], leaves[v], tuple(moves), tuple(spread)))
    return found


def _moved(
    layer: _Layer, value: np.ndarray, varies: np.ndarray, kernel: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """(kernel, bias) afterwards; None if nothing changes, or not exactly."""
    contract = layer.product.eqn.params["dimension_numbers"][0]
    own, facing = contract[1 - layer.side][0], contract[layer.side][0]
    rest = tuple(d for d in range(value.ndim) if d != own)
    goes = ~varies.any(rest) & (value != 0).any(rest)
    if not goes.any():
        return None
    c = np.where(goes.reshape([-1 if d == own else 1 for d in range(value.ndim)]), value, 0).astype(np.float32)
    rows = goes.reshape([-1 if d == facing else 1 for d in range(kernel.ndim)])
    w = np.where(rows, kernel, 0).astype(np.float32)
    parts = (c, w) if layer.side == 1 else (w, c)
    delta, bound = (_along(layer.moves, bind(layer.product.eqn, v)[0]) for v in (parts, [np.abs(v) for v in parts]))
    index = _along(layer.spread, np.arange(bias.size, dtype=np.int32).reshape(bias.shape))
    if delta.shape != index.shape:
        return None
    added = np.zeros(bias.size, np.float64)
    added[index.ravel()] = delta.ravel()
    grid = max(int(least_f(c).max()) + int(least_f(w).max()), int(least_f(bias).max()))
    exact = (float(bound.max()) + float(np.abs(bias).max())) * 2.0**grid <= 2.0**_FLOAT32_BITS
    if not exact or not np.array_equal(added[index], delta):
        return None
    return np.where(rows, 0, kernel).astype(kernel.dtype), (bias + added.reshape(bias.shape)).astype(bias.dtype)


def _along(steps: Sequence[Step], value: Any) -> np.ndarray:
    for step in steps:
        value = bind(step.eqn, [value])[0]
    return np.asarray(value)


def _holding(fmt: KIF, value: np.ndarray) -> KIF:
    """The format, with the bits that the new values need."""
    k, i, f = (np.broadcast_to(np.asarray(v, np.float32), value.shape) for v in (fmt.k, fmt.i, fmt.f))
    whole = np.floor(np.log2(np.maximum(np.abs(value), 2.0**-100))) + 1  # 2^(i-1) <= |value| < 2^i
    inside = value == 0
    i = np.where(inside, i, np.maximum(i, whole)).astype(np.float32)
    f = np.where(inside, f, np.maximum(f, least_f(value))).astype(np.float32)
    return KIF(np.maximum(k, value < 0).astype(np.float32), i, f, fmt.rounding, fmt.overflow)
