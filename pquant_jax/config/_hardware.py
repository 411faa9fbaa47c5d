"""The section `hardware`: what is made of a trained model, and how much of it is run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pquant_jax.config._fields import AtLeastOne, Positive, Section, short


class Hls(Section):
    """An hls4ml project of the same integers, in hls/.  Short form: the backend alone."""

    backend: Literal["Vitis", "Vivado", "VivadoAccelerator"] = "Vitis"
    """hls4ml's name of the tool that the project is for."""
    io_type: Literal["io_parallel", "io_stream"] = "io_parallel"
    """All values of a layer at once, or one position after the other."""
    strategy: Literal["latency", "resource", "distributed_arithmetic"] = "latency"
    """How products are built."""
    reuse_factor: AtLeastOne = 1
    """Products that share a multiplier; a factor that a layer can't have is refused, with those it can."""
    layers: dict[str, dict[str, Any]] = {}
    """Exceptions: {name of a layer: {ReuseFactor: 2, Strategy: resource}}."""
    simulate: bool = True
    """Compile its C simulation with g++ and compare integers."""


class Hardware(Section):
    """What is made of the trained model.  Needs a quantizer."""

    lower: bool = True
    """Turn the model into a netlist and a project with Verilog, testbench, constraints and scripts."""
    part: str = "xcvu13p-flga2577-2-e"
    """The FPGA that scripts and projects name."""
    clock_period: Positive = 5.0
    """Nanoseconds, for constraints, scripts and hls4ml."""
    latency_cutoff: Positive = 5.0
    """Adder delays between two registers of the pipelined netlist."""
    vhdl: bool = True
    """Write VHDL beside the Verilog."""
    simulate: bool = True
    """Run the Verilog on every test vector and compare integers."""
    synthesize: bool = True
    """Count LUTs, flip-flops and DSPs of the pipelined netlist."""
    vectors: AtLeastOne = 10_000
    """How many inputs are compared: the test set and random codes of the whole port."""
    hls: Annotated[Hls | None, short(lambda name: name and {"backend": name}, Hls | str | None)] = None
    """null: no hls4ml project."""
    onnx: list[Literal["qonnx", "onnx", "qdq"]] = []
    """Files to write besides: with QONNX's Quant, in standard ops alone, with QuantizeLinear (formats of at most 8 bits)."""
