"""`Graph` -> da4ml netlist -> Verilog or VHDL.  Only this folder and `lower._plugin` import da4ml, in functions.

Every scalar of the graph becomes a da4ml variable or, where `ranges.intervals` proves it constant, a Python float; the
operators on them are in `_scalars`.  All rounding and overflow modes are exact: da4ml offers TRN and RND with WRAP, SAT
and SAT_SYM, the others are written with its adders and multiplexers.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import _netlist as netlist
from pquant_jax.lower.backends._netlist import MAX_FRACTION
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.ranges import Interval
from pquant_jax.lower.rtl import RTLInfo, check_names, describe, whole_folder

if TYPE_CHECKING:
    from da4ml.types import CombLogic, Pipeline

INTERPRETER_BITS: Final = 31
_NARROW_OPCODES: Final = (2, 3, 6)  # relu, wrap, multiplexer: computed in 32 bits, like the ports (-1)
# the modules that da4ml writes beside the top one
RESERVED: Final = frozenset({"binop", "lookup_table", "multiplier", "mux", "negative", "shift_adder"})
HWCONF: Final = (1, -1, -1)  # adders and carry chains of any width: one unit of delay
EXACT_DIGITS: Final = 400  # da4ml computes ranges in Decimal, whose default of 28 digits rounds wide formats


def check_supported(graph: Graph) -> list[Interval]:
    """Raise `LoweringError` for the first node that has no exact da4ml netlist; returns the intervals of all nodes."""
    return netlist.check_supported(graph, "da4ml")


def circuit(hwconf: tuple[float, float, float], solver_options: Mapping[str, Any] | None) -> netlist.Circuit:
    """What the netlist builder takes of da4ml."""
    from da4ml.trace import FixedVariableArray, FixedVariableArrayInput
    from da4ml.trace.fixed_variable import FixedVariable, HWConfig

    package = netlist.Package("da4ml", FixedVariable, FixedVariableArray, FixedVariableArrayInput, lambda array: array._vars)
    return netlist.Circuit(package, HWConfig(*map(int, hwconf[:2]), latency_cutoff=hwconf[2]), solver_options)


def to_comb(
    graph: Graph,
    *,
    hwconf: tuple[float, float, float] = HWCONF,
    solver_options: Mapping[str, Any] | None = None,
    keep_dead: bool = False,
) -> CombLogic:
    """The da4ml netlist of `graph`: all inputs flattened in order -> all outputs flattened in order.

    Unless `keep_dead`, dead channels and constants are removed first (`dead.remove_dead`), then what is there twice or
    does nothing (`passes.simplify`); the outputs are the same.

    `hwconf` = (adder_size, carry_size, latency_cutoff) of da4ml; `solver_options` go to its matrix solver, such as
    `{"hard_dc": 2}`.  Raises `LoweringError` for what `check_supported` refuses, before any expensive work.
    """
    graph, known = netlist.prepare(graph, check_supported, keep_dead)
    with exact("tracing"):
        return trace_exactly(*netlist.ports_and_outputs(graph, known, circuit(hwconf, solver_options)))


def trace_exactly(ports: Sequence[Any], outputs: Sequence[Any]) -> CombLogic:
    """The netlist from the variables `ports` to `outputs`; raises `LoweringError` where da4ml would lose bits."""
    from da4ml.trace import comb_trace

    comb = comb_trace(ports, outputs)
    _check_constants(comb)
    return comb


def _check_constants(comb: CombLogic) -> None:
    """Constants are stored relative to the power of two that their neighbour carries, and may lose bits on either side."""
    rounded = [op.qint.min for op in comb.ops if op.opcode == 5 and op.data * op.qint.step != op.qint.min]
    if rounded:
        raise LoweringError(
            f"da4ml would round {len(rounded)} constants, such as {rounded[0]!r}: it stores {MAX_FRACTION + 1} fractional bits; "
            "use fewer fractional bits in the quantizers whose bounds or kernels these are"
        )
    _check_alignment(comb)


def _check_alignment(comb: CombLogic) -> None:
    """A multiplexer can't shift its operands to the right, and a constant has no step above 2^31 relative to its neighbour."""
    from da4ml.types import minimal_kif

    for op in comb.ops:
        if abs(op.opcode) != 6:
            continue
        shift = (int(op.data) >> 32) & 0xFFFFFFFF
        shift -= (shift >= 1 << 31) << 32
        for operand, moved in ((op.id0, 0), (op.id1, shift)):
            q = comb.ops[operand].qint  # zero may lie anywhere
            if (q.min or q.max) and minimal_kif(op.qint)[2] + moved < minimal_kif(q)[2]:
                raise LoweringError(
                    "da4ml would misalign a multiplexer whose operands' powers of two are more than 31 apart; use narrower "
                    "quantizers (fewer fractional bits where values are large)"
                )


@contextmanager
def exact(doing: str) -> Iterator[None]:
    """What da4ml does inside is computed with enough digits, and its limits are `LoweringError`s."""
    with decimal.localcontext() as context, netlist.explained("da4ml", doing):
        context.prec = EXACT_DIGITS
        yield


def predict(comb: CombLogic, x: np.ndarray) -> np.ndarray:
    """The netlist's outputs, float64 (N, n_out), from da4ml's interpreter for `x` (N, ...) with n_in values per sample.

    Inputs pass the ports: TRN to their grid, then WRAP.  Raises `LoweringError` for a wrong number of values, and for
    netlists with ports, quantizers or multiplexers over 31 bits: the interpreter loses their sign, though the RTL is right.
    """
    narrow = [op.qint for op in comb.ops if op.opcode == -1 or abs(op.opcode) in _NARROW_OPCODES]
    width = max(map(sum, _kifs(narrow)), default=0)
    if width > INTERPRETER_BITS:
        raise LoweringError(
            f"da4ml's interpreter handles {INTERPRETER_BITS} bits per value, this netlist has {width}; compare it in RTL "
            "(`sim.simulate`), or narrow the quantizers: beyond 24 bits the float32 forward isn't exact either"
        )
    return netlist.run(comb, x)


def staged(comb: CombLogic, latency_cutoff: float) -> tuple[int, int, float]:
    """(stages, flip-flops, estimated LUTs) of the netlist with registers at that cutoff, in adder delays; II = 1."""
    with exact("pipelining"):
        pipe = _pipelined(comb, latency_cutoff)
    return len(pipe.solutions), int(pipe.reg_bits), float(pipe.cost)


def _pipelined(comb: CombLogic, latency_cutoff: float) -> Pipeline:
    """The netlist in stages, those made as short as they can be without one more of them.

    A path is a whole number of adders, so the fraction of a cutoff is dropped: da4ml would give the stages behind the first
    one adder too many for it.  Stages are balanced here by da4ml's own search over whole cutoffs, because da4ml 0.6.0 never
    ends where the middle of its bounds is not above the lower one.
    """
    from da4ml.trace import HWConfig, comb_trace
    from da4ml.trace.fixed_variable import FixedVariable
    from da4ml.trace.pipeline import to_pipeline

    if all(float(op.latency).is_integer() for op in comb.ops):
        latency_cutoff = max(math.floor(latency_cutoff + 1e-9), 1)
    first = best = to_pipeline(comb, latency_cutoff, retiming=False, verbose=False)
    stages = len(first.solutions)
    low = max(first.out_latencies) / stages  # no cutoff below it has so few stages
    high = max(max(part.out_latency) / n for n, part in enumerate(first.solutions, 1))
    while high - low > 1 and (middle := (high + low) // 2) > low:
        given = HWConfig(comb.adder_size, comb.carry_size, middle)
        ports = [FixedVariable(*q, hwconf=given) for q in first.inp_qint]
        try:
            made = to_pipeline(comb_trace(ports, list(first(ports))), middle, retiming=False, verbose=False)
        except AssertionError:  # an operator that is longer than the cutoff
            made = None
        if made is None or len(made.solutions) > stages:
            low = middle
        else:
            best, high = made, middle
    return best


def longest(comb: CombLogic) -> float:
    """The longest path in adder delays: a cutoff from which one stage holds everything."""
    return float(max(comb.latency))


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

    `latency_cutoff` > 0 pipelines it (II = 1): registers at the ports and wherever a path exceeds that many adder
    delays; a single slower operator gets a stage of its own length.  The project is written beside `directory` and
    renamed, so that it is complete or absent.  Raises `LoweringError` for a bad name or flavor, an existing directory
    without `overwrite`, and limits of da4ml.
    """
    check_names(name, flavor, RESERVED)
    with whole_folder(directory, overwrite=overwrite) as partial, exact("writing RTL"):
        from da4ml.codegen import RTLModel

        pipe = _pipelined(comb, latency_cutoff) if latency_cutoff > 0 else None
        model = RTLModel(pipe or comb, name, partial, flavor=flavor, print_latency=False)
        model.write()
        comb.save(partial / "model" / "comb.json")
        first, last = (comb, comb) if pipe is None else (pipe.solutions[0], pipe.solutions[-1])
        return describe(
            directory, name, flavor, (_kifs(first.inp_qint), _kifs(last.out_qint)),
            stages=0 if pipe is None else len(pipe.solutions), reg_bits=0 if pipe is None else pipe.reg_bits,
            cost=(pipe or comb).cost, latency_units=longest(comb),
        )  # fmt: skip


def _kifs(qints: Sequence[Any]) -> list[tuple[int, ...]]:
    from da4ml.types import minimal_kif

    return [tuple(map(int, minimal_kif(q))) for q in qints]
