"""Statistics of one batch for the kernels' sake: what enters each, and how often what leaves it is positive.

Both have the kernel's rank, with size 1 along the axes they don't know, so that they broadcast against the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp


def mean_square(x: Any, side: int, eqn: Any, axes: Sequence[int | None], shape: tuple[int, ...]) -> Any:
    """E[x^2] of the inputs of a kernel, over the batch and all positions; one value per input channel.

    side: which operand of the product is x.  axes: the kernel's axis behind each axis of the other operand.
    shape: the kernel's.
    """
    square = jnp.square(x)
    if eqn.primitive.name == "conv_general_dilated":
        numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        feature = numbers.lhs_spec[1]
        channels = jnp.mean(square, tuple(d for d in range(x.ndim) if d != feature))
        into, out = axes[numbers.rhs_spec[1]], axes[numbers.rhs_spec[0]]
        if groups == 1:
            return channels.reshape([n if a == into else 1 for a, n in enumerate(shape)])
        # output channel o reads the input channels of its group, o // (outputs / groups)
        spread = jnp.repeat(channels.reshape(groups, -1), shape[out] // groups, 0)  # (out, in of its group)
        turned = spread if out < into else spread.T
        return turned.reshape([n if a in (into, out) else 1 for a, n in enumerate(shape)])
    contract, batched = (numbers[side] for numbers in eqn.params["dimension_numbers"])
    facing, shared = (numbers[1 - side] for numbers in eqn.params["dimension_numbers"])
    kept = sorted((*contract, *batched))
    mean = jnp.mean(square, tuple(d for d in range(x.ndim) if d not in kept))
    place = {d: axes[f] for d, f in zip((*contract, *batched), (*facing, *shared), strict=True)}
    known = [(axis, n) for n, d in enumerate(kept) if (axis := place[d]) is not None]
    mean = mean.reshape([mean.shape[n] for _, n in known])  # what faces no axis of the kernel has size 1
    mean = mean.transpose([n for n, _ in sorted(enumerate(known), key=lambda pair: pair[1][0])])
    there = {axis for axis, _ in known}
    return mean.reshape([n if a in there else 1 for a, n in enumerate(shape)])


def output_axes(side: int, eqn: Any, axes: Sequence[int | None]) -> dict[int, int]:
    """{axis of the product's result: the kernel's axis it comes from}.  side: which operand is the data."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        axis = axes[numbers.rhs_spec[0]]
        return {} if axis is None else {numbers.out_spec[1]: axis}
    contract, batched = (numbers[1 - side] for numbers in eqn.params["dimension_numbers"])
    free = [d for d in range(len(axes)) if d not in (*contract, *batched)]
    rank = len(eqn.outvars[0].aval.shape)
    first = len(batched) if side == 1 else rank - len(free)
    return {first + n: axis for n, d in enumerate(free) if (axis := axes[d]) is not None}


def positive_fraction(y: Any, places: dict[int, int], shape: tuple[int, ...]) -> Any:
    """How often y > 0, over the batch and all positions; one fraction per output channel of a kernel of this shape.

    places: as `output_axes` gives them.
    """
    kept = sorted(places)
    share = jnp.mean((y > 0).astype(jnp.float32), tuple(d for d in range(y.ndim) if d not in kept))
    share = share.transpose([n for n, _ in sorted(enumerate(kept), key=lambda pair: places[pair[1]])])
    there = set(places.values())
    sizes = [n if a in there else 1 for a, n in enumerate(shape)]
    return share.reshape(sizes) if math.prod(sizes) == share.size else None
