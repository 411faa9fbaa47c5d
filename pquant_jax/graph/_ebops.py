"""EBOPs by interpretation: a bits array travels beside every value; every product adds the product of its bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, SiteSpec, Tree, View
from pquant_jax._errors import TraceError
from pquant_jax.graph._interpret import PRODUCTS, Const, bind, flatten
from pquant_jax.graph._values import STRUCTURE
from pquant_jax.numerics import mask_p, quantize_p, region_name, total_bits


@dataclass(eq=False)
class _Bits:
    """A value, its bits per element (None: unknown), whether it depends on the input, and what to call it."""

    val: Any
    bits: Any = None
    data: bool = False
    name: str = ""


def ebops(function: Callable, *args: Any, compat: str | None = None) -> jax.Array:
    """Effective bit operations of `function(*args)`: the sum over all products of bits times bits.

    E = sum over multiplications of b_x * b_w with b = relu(k + i + f), times the mask for pruned weights; bias
    additions are excluded.  Bits are set by `quantize`, cut by `mask`, carried by reshapes, relu and max.
    Differentiable in every i and f.  Arguments count as data, closed-over arrays as constants.

    Args:
      compat: "hgq2" counts bits as that package does (no sign bit in WRAP and SAT_SYM).
    Raises: TraceError for a product in which the bits of an operand are unknown.

    >>> from pquant_jax.numerics import kif, quantize
    >>> w = quantize(jnp.ones((2, 3)), kif(1, 1, 2))
    >>> float(ebops(lambda x, w: quantize(x, kif(1, 2, 1)) @ quantize(w, kif(1, 1, 2)), jnp.ones((1, 2)), w))
    96.0
    """
    values = [_Bits(v, data=True, name=n) for n, v in _tree.flatten(args).items()]
    return sum(_count(function, args, values, compat).values(), jnp.zeros((), jnp.float32))


def of_view(
    forward: Callable, view: View, state: Tree, sample: Any, specs: Mapping[str, SiteSpec], *, compat: str | None
) -> dict[str, jax.Array]:
    """EBOPs of an instrumented forward, by kernel; the bits of a parameter are those of its format times its mask."""

    def bits_of(path: str, leaf: Any) -> Any:
        if path not in view.sites or specs[path].kind not in ("kernel", "bias"):
            return None
        bits = jnp.broadcast_to(total_bits(view.sites[path], compat=compat), jnp.shape(leaf))
        return bits * view.masks[path] if path in view.masks else bits

    leaves = [_Bits(v, bits_of(p, v), name=p) for p, v in _tree.flatten(view.model).items()]
    kifs = [_Bits(v) for v in jax.tree.leaves(view.sites)]
    rest = [_Bits(v) for v in jax.tree.leaves(state)]
    data = [_Bits(v, data=True, name="input") for v in jax.tree.leaves(sample)]

    def run(model: Tree, sites: Mapping[str, KIF], state: Tree, x: Any) -> Any:
        return forward(View(model, dict(sites), view.masks), state, x, train=False)[0]

    return _count(run, (view.model, view.sites, state, sample), [*leaves, *kifs, *rest, *data], compat)


def _count(function: Callable, args: tuple, values: Sequence[_Bits], compat: str | None) -> dict[str, jax.Array]:
    program = flatten(jax.make_jaxpr(function)(*args), lambda eqn: region_name(eqn) is not None)
    total: dict[str, jax.Array] = {}
    env: dict[int, _Bits] = dict(zip(program.inputs, values, strict=True))
    for step in program.steps:
        ins = [_Bits(v.value) if isinstance(v, Const) else env[v] for v in step.ins]
        outs = bind(step.eqn, [v.val for v in ins])
        data = any(v.data for v in ins)
        bits = _rule(step.eqn, ins, outs, data, total, compat)
        name = next((v.name for v in ins if v.name), "")
        env.update((s, _Bits(o, bits, data, name)) for s, o in zip(step.outs, outs, strict=True))
    return total


def _rule(eqn: Any, ins: list[_Bits], outs: list[Any], data: bool, total: dict[str, jax.Array], compat: str | None) -> Any:
    """Bits of the result; adds to `total` where the equation multiplies."""
    name = eqn.primitive.name
    if eqn.primitive is quantize_p:
        x, k, i, f = (v.val for v in ins)
        fmt = KIF(k, i, f, eqn.params["rounding"], eqn.params["overflow"])
        return jnp.broadcast_to(total_bits(fmt, compat=compat), jnp.shape(x))
    if eqn.primitive is mask_p:
        return None if ins[0].bits is None else ins[0].bits * jnp.broadcast_to(ins[1].val, jnp.shape(ins[0].val))
    if name in PRODUCTS and data:
        _add(total, eqn, ins, lambda a, b: bind(eqn, [a, b])[0])
        return None
    if name == "mul" and data:
        scalar = [n for n, v in enumerate(ins) if not v.data and v.bits is None and jnp.ndim(v.val) == 0]
        if scalar:  # a scalar constant: a shift, or one constant multiplier that the lowering lints
            return ins[1 - scalar[0]].bits
        _add(total, eqn, ins, jnp.multiply)
        return None
    if name in ("square", "integer_pow") and data:
        _add(total, eqn, [ins[0], ins[0]], jnp.multiply)
        return None
    if name in STRUCTURE and name != "concatenate" and ins[0].bits is not None:
        return bind(eqn, [ins[0].bits, *(v.val for v in ins[1:])])[0]
    if name == "concatenate" and all(v.bits is not None for v in ins):
        return bind(eqn, [v.bits for v in ins])[0]
    if name == "select_n" and data:  # a mask: what is 0 elsewhere keeps its bits
        known = [v for v in ins[1:] if v.bits is not None]
        return known[0].bits if len(known) == 1 and not any(v.data for v in ins[1:] if v is not known[0]) else None
    if name in ("max", "min", "abs", "neg", "site", "clamp"):
        known = [v for v in ins if v.bits is not None]
        if len(known) == 1 and all(jnp.ndim(v.val) == 0 for v in ins if v is not known[0]):
            return known[0].bits
    return None


def _add(total: dict[str, jax.Array], eqn: Any, ins: Sequence[_Bits], multiply: Callable) -> None:
    unknown = [v for v in ins[:2] if v.bits is None]
    label = next((v.name for v in ins[:2] if not v.data and v.name), None) or next((v.name for v in ins[:2] if v.name), "product")
    if unknown:
        what = f"{unknown[0].name!r} " if unknown[0].name else ""
        raise TraceError(
            f"{eqn.primitive.name} of {label!r}: the bits of operand {what}of shape {np.shape(unknown[0].val)} are unknown; "
            "quantize it (is a quantizer in the chain?)"
        )
    product = jnp.sum(multiply(ins[0].bits, ins[1].bits))
    total[label] = total[label] + product if label in total else product
