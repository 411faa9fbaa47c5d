"""The section `hardware`: what is made of a trained model, and how much of it is run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pquant_jax.config._fields import AtLeastOne, Positive, Section, number, short, whole


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
    backend: Literal["da4ml", "alkaid"] = "da4ml"
    """What turns the graph into logic."""
    weights: Literal["constants", "ports", "registers"] = "constants"
    """Fixed in the logic; inputs of the netlist; or a register file that is written over a bus.  The last two serve every
    weight set of these formats."""
    word: Annotated[int, Field(ge=1, le=64), BeforeValidator(whole)] | None = 8
    """Bits of the register file's bus; null: one weight per address."""
    tmr: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), BeforeValidator(number)] = 0.0
    """Percent of the register file's bits, the most sensitive ones, that are triplicated with a vote."""
    part: str = "xcvu13p-flga2577-2-e"
    """The FPGA that scripts and projects name."""
    clock_period: Positive = 5.0
    """Nanoseconds: of the pipelined netlist's stages, of constraints, scripts and hls4ml."""
    latency_ns: Positive | None = None
    """The latest that an output may come, with as few registers as that takes; the clock that follows replaces clock_period.
    null: as the clock gives."""
    latency_cutoff: Positive | None = None
    """The longest path between two registers, in the backend's units (da4ml: adders, alkaid: ns); null: clock_period, at 1 ns
    a unit."""
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

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.tmr and self.weights != "registers":
            raise ValueError("weights: registers with tmr, because constants and ports have no flip-flops to triplicate")
        if self.weights != "constants" and (self.hls is not None or self.onnx):
            raise ValueError("weights: constants with hls and onnx, which take the weights with them")
        if self.latency_cutoff is not None and self.latency_ns is not None:
            raise ValueError("latency_cutoff or latency_ns, not both")
        return self
