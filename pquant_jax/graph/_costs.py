"""What bits cost: the widths of a format, of a table, and the positions at which a layer repeats itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF
from pquant_jax.numerics import ceil_log2, round_ste, total_bits

ADDER: Final = 0.65  # HGQ2's price of a bit of an adder
UNARY: Final = 1e-4  # HGQ2's price of a bit of a table
LUT: Final = 6  # inputs of an FPGA's look-up table
HALF_LUT: Final = 5  # one of them is two of these


@dataclass(eq=False)
class Total:
    """Sums by label and by factor: factors are applied once, at the end, so that sums of integers stay exact."""

    parts: dict[str, dict[float, jax.Array]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def add(self, label: str, amount: jax.Array, factor: float = 1.0) -> None:
        """Add factor * amount to what `label` costs."""
        own = self.parts.setdefault(label, {})
        own[factor] = own[factor] + amount if factor in own else amount

    def sums(self) -> dict[str, jax.Array]:
        """{label: cost}, float32 scalars."""
        zero = jnp.zeros((), jnp.float32)
        return {label: sum((v if k == 1 else v * k for k, v in own.items()), zero) for label, own in self.parts.items()}


def widths(fmt: KIF, shape: tuple[int, ...], compat: str | None) -> dict[str, jax.Array]:
    """{"bits": as the convention counts them, "full": with the sign in every mode}, of `shape`."""
    bits = jnp.broadcast_to(total_bits(fmt, compat=compat), shape)
    if compat is None:
        return {"bits": bits, "full": bits}
    magnitude = jax.nn.relu(round_ste(fmt.i) + round_ste(fmt.f))
    sign = jnp.where(magnitude > 0, fmt.k, 0) if fmt.overflow == "WRAP" else jnp.asarray(fmt.k)
    return {"bits": bits, "full": jnp.broadcast_to(magnitude + sign, shape)}


def code_widths(low: jax.Array, high: jax.Array) -> dict[str, jax.Array]:
    """The widths of integers in [low, high]."""
    top = jnp.maximum(high, -low - 1).astype(jnp.float32)
    bits = ceil_log2(top + 1) + (low < 0)
    return {"bits": bits, "full": bits}


def table(entry: Mapping[str, Any], result: Mapping[str, Any], tag: str, compat: str | None) -> tuple[jax.Array, float]:
    """(amount, factor) of tables with `entry` input bits and `result` output bits.

    n = 2^(b_in - 5) halves of a look-up table of 6 inputs per output bit, b_in / 5 below 5 bits (HGQ2's QDenseT).
    compat="hgq2": 1e-4 * 2^b_in * b_out for a function, and for an edge of a layer of trained tables b_out adders more.
    """
    if compat == "hgq2" and tag != "edge":
        return jnp.sum(2.0 ** entry["entry"] * result["bits"]), UNARY
    kind = "entry_full" if compat == "hgq2" else "entry"
    b_in, b_out = entry[kind], result["full" if compat == "hgq2" else "bits"]
    halves = jnp.where(b_in >= HALF_LUT, 2.0 ** (b_in - HALF_LUT), b_in / HALF_LUT)
    amount = jnp.sum(halves * b_out) * 2.0 ** (HALF_LUT - LUT)
    return (amount + jnp.sum(b_out) if compat == "hgq2" else amount), 1.0


def positions(eqn: Any, data: Sequence[bool]) -> tuple[int, tuple[int, int]]:
    """(positions at which a product repeats itself, (HGQ2's positions of the bias, positions of the output)).

    A dense product repeats itself along the data's axes that are neither contracted nor the batch (axis 0) nor shared
    with the kernel, a convolution at every position of its output.
    """
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        into, out = (v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
        places = math.prod(out[d] for d in numbers.out_spec[2:])
        return places, (math.prod(into[d] for d in numbers.lhs_spec[2:]), places)
    if eqn.primitive.name != "dot_general" or all(data):
        return 1, (1, 1)
    side = 0 if data[0] else 1
    contract, batched = (numbers[side] for numbers in eqn.params["dimension_numbers"])
    shape = eqn.invars[side].aval.shape
    return math.prod(n for d, n in enumerate(shape) if d and d not in (*contract, *batched)), (1, 1)


def window_positions(eqn: Any) -> int:
    """Positions of a pooling's output: the axes along which its window is larger than 1 or moves by more."""
    out, params = eqn.outvars[0].aval.shape, eqn.params
    sizes = zip(out, params["window_dimensions"], params["window_strides"], strict=True)
    return math.prod(n for n, window, stride in sizes if window > 1 or stride > 1)
