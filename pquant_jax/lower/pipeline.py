"""From a clock or a latency to registers: which latency cutoff, how many stages, how many flip-flops.  No synthesis.

A backend counts the length of a path in units: da4ml in adders (an adder of any width is 1), alkaid in nanoseconds of
logic on UltraScale+ (1.1 for an adder, more for a wide one).  What a unit takes on a device is `unit_ns`, an assumption
until it is calibrated: 1 ns, which gives 200 MHz for da4ml's usual cutoff of 5 adders.  It must cover routing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from pquant_jax._errors import LoweringError
from pquant_jax.lower.ir import Graph

UNIT_NS: Final = 1.0
_STEPS: Final = 24  # of the bisection over the cutoff


class Pipelined(NamedTuple):
    """A netlist cut into stages.

    cutoff: the longest path between registers, in the backend's units.  stages: blocks of logic; latency_cycles: clock
    edges from input to output, one more, because both ports have registers.  ii: cycles between two inputs.  reg_bits:
    flip-flops.  cost: LUTs by the backend's estimate.  clock_ns: the period, latency_ns = latency_cycles * clock_ns.
    """

    cutoff: float
    stages: int
    latency_cycles: int
    ii: int
    reg_bits: int
    cost: float
    clock_ns: float
    latency_ns: float


def cut(comb: Any, cutoff: float, backend: Any, *, clock_ns: float | None = None, unit_ns: float = UNIT_NS) -> Pipelined:
    """The netlist `comb` of `backend` (`backends.da4ml` or `backends.alkaid`) at a latency `cutoff` > 0, in its units.

    clock_ns: the period, by default cutoff * unit_ns.  Raises: LoweringError for a cutoff that isn't positive.
    """
    if not cutoff > 0:
        raise LoweringError(f"cutoff is {cutoff}, expected a positive number of units ({_package(backend)}'s) per stage")
    stages, reg_bits, cost = backend.staged(comb, cutoff)
    clock = cutoff * unit_ns if clock_ns is None else clock_ns
    return Pipelined(cutoff, stages, stages + 1, 1, reg_bits, cost, clock, (stages + 1) * clock)


def pipeline(
    comb: Any,
    backend: Any,
    *,
    clock_ns: float | None = None,
    latency_cycles: int | None = None,
    latency_ns: float | None = None,
    unit_ns: float = UNIT_NS,
) -> Pipelined:
    """The latency cutoff for a target, and what it costs.  Give `write_rtl` its `cutoff`.

    clock_ns alone: the cutoff is clock_ns / unit_ns.  With latency_cycles or latency_ns too, that is checked as a limit.
    latency_cycles alone: the shortest stage (the fastest clock) whose pipeline is that short.
    latency_ns alone: the longest stage (the fewest registers) that isn't later; the first and the last register are a
    cycle, so one stage takes two.
    Raises: LoweringError if nothing is asked for, if a number isn't positive, or if a limit can't be met (with what can).
    """
    given = {"clock_ns": clock_ns, "latency_cycles": latency_cycles, "latency_ns": latency_ns, "unit_ns": unit_ns}
    wrong = {key: value for key, value in given.items() if value is not None and not 0 < value < math.inf}
    if wrong or (clock_ns is latency_cycles is latency_ns is None):
        raise LoweringError(f"pipeline takes positive clock_ns, latency_cycles or latency_ns, and unit_ns; got {wrong or given}")

    def at(cutoff: float) -> Pipelined:
        return cut(comb, cutoff, backend, clock_ns=clock_ns, unit_ns=unit_ns)

    def fits(made: Pipelined) -> bool:
        slack = 1 + 1e-9
        return made.latency_cycles <= (latency_cycles or math.inf) and made.latency_ns <= (latency_ns or math.inf) * slack

    longest = max(backend.longest(comb), 1e-6)
    if clock_ns is not None:
        found = at(clock_ns / unit_ns)
    elif latency_cycles is not None:
        found = _shortest(at, fits, longest)
    else:
        equal = [longest / n for n in range(1, 65)]  # n stages of equal length; more than 64 are no faster
        cutoffs = sorted({*equal, *map(math.ceil, equal)}, reverse=True)  # whole ones too: a package may count whole adders
        found = next((made for made in map(at, cutoffs) if fits(made)), at(cutoffs[-1]))
    if not fits(found):
        raise LoweringError(
            f"the netlist needs {found.latency_cycles} cycles of {found.clock_ns:g} ns ({found.latency_ns:g} ns), asked for "
            f"{_asked(latency_cycles, latency_ns)}; allow more, use a slower clock, or make the model shallower"
        )
    return found


def _shortest(at: Any, fits: Any, longest: float) -> Pipelined:
    """The smallest cutoff that fits, by bisection: stages fall, up to rounding, with the cutoff."""
    low, best = 0.0, at(longest)
    if not fits(best):
        return best
    for _ in range(_STEPS):
        middle = (low + best.cutoff) / 2
        made = at(middle)
        if fits(made):
            best = made
        else:
            low = middle
        if best.cutoff - low < 0.01 * best.cutoff:
            break
    return best


def _asked(cycles: int | None, ns: float | None) -> str:
    parts = [f"{value:g} {unit}" for value, unit in ((cycles, "cycles"), (ns, "ns")) if value is not None]
    return "at most " + " and ".join(parts)


def _package(backend: Any) -> str:
    return str(backend.__name__).rpartition(".")[2]


def sweep(
    graph: Graph, cutoffs: Sequence[float], backend: Any, *, unit_ns: float = UNIT_NS, clock_ns: float | None = None
) -> list[Pipelined]:
    """One row per latency cutoff, the netlist traced once: stages, latency, registers and cost.

    The clock of a row is its cutoff * unit_ns, or clock_ns.  `report.plots` draws rows.  Raises as `cut` does.
    """
    comb = backend.to_comb(graph)
    return [cut(comb, float(cutoff), backend, clock_ns=clock_ns, unit_ns=unit_ns) for cutoff in cutoffs]
