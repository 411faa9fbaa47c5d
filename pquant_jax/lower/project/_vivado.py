"""Constraints and Tcl scripts for Vivado and xsim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pquant_jax.lower.project._ports import fill


def constraints(name: str, part: str, period: float, uncertainty: float, io_delay: tuple[float, float], *, clocked: bool) -> str:
    """The `.xdc`: a clock of `period` ns, `uncertainty` and `io_delay` (least, most) as fractions of it.

    A design without a clock is timed from port to port against a virtual one.
    """
    clock = f"create_clock -name clk -period {period:g}" + (" [get_ports clk]" if clocked else "")
    return fill(
        "constraints.xdc",
        name=name,
        part=part,
        mhz=f"{1000 / period:g}",
        clock=clock,
        uncertainty=f"{uncertainty * period:g}",
        delay_min=f"{io_delay[0] * period:g}",
        delay_max=f"{io_delay[1] * period:g}",
    )


def scripts(name: str, part: str, vectors: int, sources: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{file: text} of the Tcl scripts; `sources` = {flavor: files below rtl/FLAVOR in the order of compilation}."""
    values = {
        "name": name,
        "part": part,
        "vectors": vectors,
        "flavor": next(iter(sources)),
        "flavors": " ".join(sources),
        "verilog_sources": " ".join(sources.get("verilog", ())),
        "vhdl_sources": " ".join(sources.get("vhdl", ())),
    }
    return {file: fill(file, **values) for file in ("synth.tcl", "simulate.tcl")}
