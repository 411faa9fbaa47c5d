"""Self-checking testbenches in SystemVerilog and VHDL; vectors are driven at the falling edge and checked before the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pquant_jax.lower.project._ports import Element, Ports, bits, fill


class Timing(NamedTuple):
    """How many vectors, clock edges until a result (0: no clock) and the clock period in ps."""

    vectors: int
    latency: int
    period_ps: int


def verilog(name: str, ports: Ports, tables: Mapping[str, int], timing: Timing) -> str:
    """The testbench `tb_NAME`; `tables` = {file: lines} of the netlist."""
    clocked = timing.latency > 0
    rows = [f'          check("{e.label}", {_wide("model_out", e)}, {_wide("expected", e)});' for e in ports.outputs if e.width]
    return fill(
        "testbench.sv",
        **_common(name, ports, tables, timing),
        half=timing.period_ps / 2000,
        clock_declaration="  reg clk = 1'b0;" if clocked else "",
        clock_port=".clk(clk), " if clocked else "",
        clock_cycle="      #HALF clk = 1'b1;\n      #HALF clk = 1'b0;" if clocked else "      #(2 * HALF);",
        checks="\n".join(rows),
    )


def _wide(word: str, e: Element) -> str:
    """The element as 64 bits, its sign extended."""
    high = e.offset + e.width - 1
    sign = f"{word}[{high}]" if e.k else "1'b0"
    return f"{{{{{64 - e.width}{{{sign}}}}}, {word}[{high}:{e.offset}]}}"


def vhdl(name: str, ports: Ports, tables: Mapping[str, int], timing: Timing) -> str:
    """The same in VHDL."""
    alive = [e for e in ports.outputs if e.width]
    edges = ["wait for HALF;", "clk <= '1';", "wait for HALF;", "clk <= '0';"] if timing.latency else ["wait for 2 * HALF;"]
    rows = [f'check("{e.label}", {e.offset + e.width - 1}, {e.offset}, {str(bool(e.k)).lower()});' for e in alive]
    return fill(
        "testbench.vhd",
        **_common(name, ports, tables, timing),
        half_ps=timing.period_ps // 2,
        in_digits=-(-bits(ports.inputs) // 4),
        out_digits=-(-bits(ports.outputs) // 4),
        clock_declaration="  signal clk : std_logic := '0';" if timing.latency else "",
        clock_port="clk => clk, " if timing.latency else "",
        clock_cycle="\n".join(f"      {edge}" for edge in edges),
        checks="\n".join(f"          {row}" for row in rows),
    )


def _common(name: str, ports: Ports, tables: Mapping[str, int], timing: Timing) -> dict[str, object]:
    return {
        "name": name,
        "vectors": timing.vectors,
        "latency": timing.latency,
        "delay": max(timing.latency - 1, 0),
        "in_high": bits(ports.inputs) - 1,
        "out_high": bits(ports.outputs) - 1,
        "table_checks": "\n".join(f'    check_table("{file}", {lines});' for file, lines in tables.items()),
    }
