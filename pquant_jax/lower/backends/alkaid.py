"""`Graph` -> alkaid netlist -> Verilog or VHDL.  alkaid is da4ml's successor; only this module and `lower._plugin` import it.

The netlist is built by the same functions as da4ml's (`_netlist`, `_scalars`).  What differs is alkaid's: it finds common
subexpressions, bounds values by affine forms (x - x is 0), fuses adders of three operands, writes tables as `case`
statements instead of files, and splits a netlist into stages of equal length.

Three of alkaid 0.8.2's own passes are left out, each seen as a mismatch against the emulator on 1 of 500 random graphs:
`canonicalize_msb_wraps` takes a bit of a shifted value for its top bit; `common_subexpr_elimin` makes the step of an
operation coarser without telling those that read it (`_shared` merges only what is equal); tracing the netlist once more,
which `alkaid.trace.trace` does, loses the scale of a negated bit that turns out constant.  None saved a LUT on our models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import _netlist as netlist
from pquant_jax.lower.backends._scalars import MAX_CONSTANT_BITS
from pquant_jax.lower.ir import Graph, label
from pquant_jax.lower.ranges import Interval, least_f
from pquant_jax.lower.rtl import RTLInfo, check_names, describe, whole_folder
from pquant_jax.numerics.oracle import significant_bits

if TYPE_CHECKING:
    from alkaid.types import CombLogic

HWCONF: Final = (1, 1, -1)  # alkaid's default: delays grow with the length of a carry chain
# the modules that alkaid writes beside the top one, besides logic0, logic1, ... and table_<hash>
RESERVED: Final = frozenset({"binop", "multiplier", "mux", "negative", "shift_adder", "ternary_adder"})


def check_supported(graph: Graph) -> list[Interval]:
    """Raise `LoweringError` for the first node that has no exact alkaid netlist; returns the intervals of all nodes."""
    known = netlist.check_supported(graph, "alkaid")
    for index, node in enumerate(graph.nodes):
        bits = int(significant_bits(np.asarray(node.attrs["codes"], np.float64)).max()) if node.op == "table" else 0
        if bits > MAX_CONSTANT_BITS:
            raise LoweringError(
                f"{label(graph, index)}: its entries have up to {bits} significant bits, alkaid takes {MAX_CONSTANT_BITS}; "
                "use a narrower format behind the table"
            )
    return known


def circuit(hwconf: tuple[float, float, float], solver_options: Mapping[str, Any] | None) -> netlist.Circuit:
    """What the netlist builder takes of alkaid."""
    from alkaid.trace import FVariable, FVArray, FVArrayInput, HWConfig

    package = netlist.Package("alkaid", FVariable, FVArray, FVArrayInput, np.asarray)
    return netlist.Circuit(package, HWConfig(*map(int, hwconf[:2]), latency_cutoff=hwconf[2]), solver_options)


def to_comb(
    graph: Graph,
    *,
    hwconf: tuple[float, float, float] = HWCONF,
    solver_options: Mapping[str, Any] | None = None,
    keep_dead: bool = False,
) -> CombLogic:
    """The alkaid netlist of `graph`: all inputs flattened in order -> all outputs flattened in order.

    Unless `keep_dead`, dead channels and constants are removed first (`dead.remove_dead`), then what is there twice or
    does nothing (`passes.simplify`); the outputs are the same.

    `hwconf` = (adder_size, carry_size, latency_cutoff) of alkaid, `solver_options` go to its matrix solver.  Raises
    `LoweringError` for what `check_supported` refuses, before any expensive work.
    """
    graph, known = netlist.prepare(graph, check_supported, keep_dead)
    with exact("tracing"):
        return optimized(trace_exactly(*netlist.ports_and_outputs(graph, known, circuit(hwconf, solver_options))))


def trace_exactly(ports: Sequence[Any], outputs: Sequence[Any]) -> CombLogic:
    """The netlist from the variables `ports` to `outputs`, as it is; raises `LoweringError` where alkaid would lose bits."""
    from alkaid.trace import trace

    _check_steps(outputs)
    comb = trace(ports, outputs, optimize=False)
    _check_constants(comb)
    return comb


def _check_steps(outputs: Sequence[Any]) -> None:
    """Raise `LoweringError` where a variable below `outputs` has a wrong step: alkaid takes it from a float32.

    A variable is a sum of factor * atom, and its step the largest that divides all factor * (the atom's step).
    """
    found, left = {v.id: v for v in outputs}, list(outputs)
    while left:
        for v in left.pop()._from:
            if v.id not in found:
                found[v.id] = v
                left.append(v)
    forms = [v._affine for v in found.values() if v._affine.coeffs]
    terms = [[factor * atom.qint.step for atom, factor in form.coeffs.items()] + [form.bias] * bool(form.bias) for form in forms]
    starts = np.cumsum([0, *map(len, terms)])[:-1]
    f = np.maximum.reduceat(least_f(np.concatenate(terms)), starts) if terms else np.zeros(0)
    wrong = f > -np.log2([form.qint.step for form in forms])
    if wrong.any():
        raise LoweringError(
            f"alkaid would misread the step of {int(wrong.sum())} sums: factors of one value that add up need more than "
            f"{MAX_CONSTANT_BITS} significant bits; put a quantizer between the products, or use da4ml"
        )


def _check_constants(comb: CombLogic) -> None:
    """Raise `LoweringError` where a constant of a netlist, as traced and not yet optimized, lost bits."""
    for op in comb.ops:
        if op.opcode == 4:  # a constant added
            value, lost = op.qint.min, op.qint.min - comb.ops[op.addr[0]].qint.min != op.data[0] * 2.0 ** -op.data[1]
        else:
            value, lost = op.qint.min, op.opcode == 5 and op.data[0] * op.qint.step != op.qint.min
        if lost:
            raise LoweringError(
                f"alkaid would round a constant near {value!r}: it stores {MAX_CONSTANT_BITS} significant bits; use fewer bits "
                "in the quantizers whose bounds these are"
            )


def optimized(comb: CombLogic) -> CombLogic:
    """The same netlist smaller: constants folded, what is there twice computed once, what nobody reads left out."""
    from alkaid.trace import passes
    from alkaid.trace.passes.canon import canonicalize_outputs, const_propagation

    comb = passes.null_quant_elimin(_shared(canonicalize_outputs(const_propagation(comb))))
    comb = passes.add_surrogate(passes.dead_code_elimin(comb))
    return passes.topo_bandwidth_sort(passes.canonical_sort(comb))


def _shared(comb: CombLogic) -> CombLogic:
    """Operations that are equal, their intervals included, as one."""
    ops, place, seen = [], [], {}
    for op in comb.ops:
        made = op._replace(addr=tuple(place[j] for j in op.addr))
        index = seen.setdefault((made.addr, made.opcode, made.data, made.qint), len(ops))
        if index == len(ops):
            ops.append(made)
        place.append(index)
    return comb._replace(ops=ops, out_idxs=[place[j] if j >= 0 else j for j in comb.out_idxs])


def exact(doing: str) -> AbstractContextManager[None]:
    """alkaid's limits inside are `LoweringError`s."""
    return netlist.explained("alkaid", doing)


def predict(comb: CombLogic, x: np.ndarray) -> np.ndarray:
    """The netlist's outputs, float64 (N, n_out), from alkaid's interpreter for `x` (N, ...) with n_in values per sample.

    Inputs pass the ports: TRN to their grid, then WRAP.  Raises `LoweringError` for a wrong number of values.
    """
    return netlist.run(comb, x)


def staged(comb: CombLogic, latency_cutoff: float) -> tuple[int, int, float]:
    """(stages, flip-flops, estimated LUTs) of the netlist with registers at that cutoff, in alkaid's nanoseconds; II = 1."""
    return _figures(_model(comb, latency_cutoff))


def longest(comb: CombLogic) -> float:
    """The longest path in alkaid's nanoseconds, of what is written: a cutoff from which one stage holds everything."""
    return float(max(block.latency[1] for block in _model(comb, -1).fsm.logic.values()))


def _model(comb: CombLogic, latency_cutoff: float) -> Any:
    """alkaid's model of the RTL, which fuses adders of three operands; nothing is written."""
    from alkaid.codegen import RTLModel

    with exact("pipelining"):
        return RTLModel(comb, "net", "net", latency_cutoff=latency_cutoff, print_latency=False)


def write_rtl(
    comb: CombLogic,
    directory: str | Path,
    *,
    name: str,
    flavor: str = "verilog",
    latency_cutoff: float = -1,
    overwrite: bool = False,
) -> RTLInfo:
    """Write the netlist as an RTL project (top module `name`) into `directory` and return where and what it is.

    `latency_cutoff` > 0 pipelines it (II = 1): ceil(longest path / cutoff) stages between registers at both ports.  The
    unit is alkaid's, about a nanosecond on UltraScale+.  The project is complete or absent.  Raises `LoweringError` for
    a bad name or flavor, an existing directory without `overwrite`, and limits of alkaid.
    """
    check_names(name, flavor, RESERVED)
    if re.fullmatch(r"logic\d+|table_\w+", name):
        raise LoweringError(f"name is {name!r}: alkaid names modules beside it so; use another name")
    with whole_folder(directory, overwrite=overwrite) as partial, exact("writing RTL"):
        from alkaid.codegen import RTLModel

        model = RTLModel(comb, partial, name, flavor=flavor, latency_cutoff=latency_cutoff, print_latency=False)
        model.write()
        stages, reg_bits, cost = _figures(model)
        ports = ([q.kif for q in comb.inp_qint], [q.kif for q in comb.out_qint])
        return describe(
            directory, name, flavor, ports, stages=stages if reg_bits else 0, reg_bits=reg_bits, cost=cost,
            latency_units=comb.latency[1],
        )  # fmt: skip


def _figures(model: Any) -> tuple[int, int, float]:
    """(blocks of logic, flip-flops, estimated LUTs)."""
    blocks = model.fsm.logic.values()
    return len(blocks), int(model.reg_bits), float(sum(block.cost for block in blocks))
