"""How large a netlist will be, from the shapes of the program alone: before any index array or matrix is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from pquant_jax._base import Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Const, Instrumented, Program, flatten

MAX_SIZE: Final = 300_000
# da4ml, dense kernels of 6 bits, activations of 8 bits, one core: 12,457 LUTs and 0.5 s for 32x32, 45,232 and 11 s for
# 64x64, 513,792 and 9 s for 256 positions of 9x16; large matrices cost more time per product than many small ones
LOADABLE: Final = 5  # a product of two inputs over one with a constant: 62 LUTs with 6-bit weights, 44 with 4-bit ones
LUTS_PER_PRODUCT, LUTS_PER_ELEMENT = 12.0, 12.0
SECONDS_PER_PRODUCT, SECONDS_PER_ELEMENT = 1e-3, 1e-3
_MOVES: Final = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev split gather dynamic_slice pad concatenate copy site "
    "stop_gradient optimization_barrier convert_element_type reduce_precision dynamic_update_slice scatter".split()
)


class Estimate(NamedTuple):
    """The size of a netlist before it is built.

    products: multiplications by what is not always 0.  elements: of everything else that computes.  luts, minutes: their
    order of magnitude, in look-up tables and in da4ml's time on one core.  layers: the largest, (name, products + elements).
    """

    products: int
    elements: int
    luts: float
    minutes: float
    layers: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        largest = ", ".join(f"{name} {size:,}" for name, size in self.layers)
        return (
            f"{self.products:,} products and {self.elements:,} other elements, about {self.luts:.0e} LUTs and "
            f"{max(self.minutes, 1):,.0f} minutes of da4ml; largest: {largest or 'none'}"
        )


def estimate(inst: Instrumented, view: View | None = None, model_state: Tree = None, *, loadable: bool = False) -> Estimate:
    """The size of the netlist of `inst`: sum over products m * k * n * density, and every element that is computed.

    loadable: the weights are inputs (`trace(..., weights="ports")`), which makes every product `LOADABLE` times as large.
    view: finished parameters and masks; weights that are 0 cost nothing.  None: the model as it came.
    """
    view = View(inst.model.params, {}, {}) if view is None else view
    state = inst.model.state if model_state is None else model_state
    found = of_program(flatten(jax.make_jaxpr(lambda x: inst.forward(view, state, x, train=False)[0])(inst.sample)))
    return found._replace(luts=found.luts + (LOADABLE - 1) * LUTS_PER_PRODUCT * found.products) if loadable else found


def of_program(program: Program) -> Estimate:
    """`estimate` of a flat program of one sample whose inputs are the data."""
    data: set[int] = set(program.inputs)
    density: dict[int, float] = {}
    products: Counter[str] = Counter()
    elements: Counter[str] = Counter()

    def dense(v: int | Const) -> float:
        if isinstance(v, int):
            return density.get(v, 1.0)
        return float(np.count_nonzero(v.value) / max(np.size(v.value), 1))

    for step in program.steps:
        name = step.eqn.primitive.name
        place = step.scope or name
        size = sum(int(np.prod(v.aval.shape, dtype=np.int64)) for v in step.eqn.outvars)
        if not any(v in data for v in step.ins if isinstance(v, int)):
            if name in _MOVES or name in ("quantize", "mask", "mul"):
                density.update(dict.fromkeys(step.outs, min((dense(v) for v in step.ins[:2]), default=1.0)))
            continue
        data.update(step.outs)
        constant = [dense(v) for v in step.ins[:2] if not (isinstance(v, int) and v in data)]
        if name == "dot_general":
            products[place] += int(size * _contracted(step.eqn) * min(constant, default=1.0))
        elif name == "conv_general_dilated":
            kernel, spec = step.eqn.invars[1].aval.shape, step.eqn.params["dimension_numbers"]
            products[place] += int(size * np.prod([kernel[d] for d in spec.rhs_spec[1:]]) * min(constant, default=1.0))
        elif name == "mul" and not constant:
            products[place] += size
        elif name.startswith(("reduce_", "cum", "scatter-")):
            elements[place] += int(np.prod(step.eqn.invars[0].aval.shape, dtype=np.int64)) * _window(step.eqn)
        elif name not in _MOVES:
            elements[place] += size
    total, other = sum(products.values()), sum(elements.values())
    luts = LUTS_PER_PRODUCT * total + LUTS_PER_ELEMENT * other
    minutes = (SECONDS_PER_PRODUCT * total + SECONDS_PER_ELEMENT * other) / 60
    return Estimate(total, other, luts, minutes, tuple((products + elements).most_common(3)))


def _contracted(eqn: Any) -> int:
    (over, _), _ = eqn.params["dimension_numbers"]
    return int(np.prod([eqn.invars[0].aval.shape[d] for d in over], dtype=np.int64))


def _window(eqn: Any) -> int:
    """How often an element is read at most: as often as windows overlap."""
    sizes: Sequence[int] = eqn.params.get("window_dimensions", ())
    strides: Sequence[int] = eqn.params.get("window_strides", ())
    return int(np.prod([-(-n // s) for n, s in zip(sizes, strides, strict=True)], dtype=np.int64))


def check_size(inst: Instrumented, view: View, model_state: Tree, limit: float, *, loadable: bool = False) -> None:
    """Raises: LoweringError where the netlist would have more than `limit` products and elements.

    loadable: the weights are inputs, so that every product is a multiplier and counts `LOADABLE` times.

    What the sites say is looked at first, so that a small model costs no second trace.
    """
    sizes = sum(int(np.prod(s.shape, dtype=np.int64)) for s in inst.sites.values() if s.kind in ("input", "table"))
    weight = LOADABLE if loadable else 1
    if weight * inst.reference8 / 64 + sizes <= limit:
        return
    found = estimate(inst, view._replace(tables={}), model_state, loadable=loadable)
    if weight * found.products + found.elements > limit:
        raise LoweringError(
            f"the fully parallel netlist would have {found}; the limit is {limit:,.0f} in all"
            f"{f', a product of two inputs counting {LOADABLE} times' if loadable else ''}.  Prune more, or make the input "
            "smaller; or go through hls4ml, one position after the other: trace with limit=float('inf') and quantizers of one "
            "format per tensor, then lower.backends.hls4ml.to_hls(graph, directory, io_type='io_stream'); in a configuration "
            "hardware.backend null with hardware.hls.io_type io_stream"
        )
