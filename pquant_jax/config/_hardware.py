"""The section `hardware`: what is made of a trained model, and how much of it is run."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pquant_jax.config._fields import AtLeastOne, Positive, Section, number, short, whole
from pquant_jax.lower.backends.hls4ml import BACKENDS


class Hls(Section):
    """An hls4ml project of the same integers, in hls/.  Short form: the backend alone."""

    backend: Literal["Vitis", "Vivado", "VivadoAccelerator", "Quartus", "Catapult", "oneAPI", "Libero"] = "Vitis"
    """hls4ml's name of the tool that the project is for."""
    part: str | None = None
    """The FPGA of the project.  null: hardware.part with Vitis, Vivado and Catapult, hls4ml's own default with the others."""
    io_type: Literal["io_parallel", "io_stream"] = "io_parallel"
    """All values of a layer at once, or one position after the other."""
    strategy: Literal["latency", "resource", "distributed_arithmetic"] = "latency"
    """How products are built."""
    reuse_factor: AtLeastOne = 1
    """Products that share a multiplier; a factor that a layer can't have is refused, with those it can."""
    layers: dict[str, dict[str, Any]] = {}
    """Exceptions: {name of a layer: {ReuseFactor: 2, Strategy: resource}}."""
    config: dict[str, dict[str, Any]] = {}
    """An hls_config as hls4ml has it: {Model: {ReuseFactor: 4}, LayerName: {dense_1: {Strategy: resource}}}.  It counts more than
    strategy and reuse_factor, layers count more than it; precisions must be those of the quantizers.  The one of a written
    project, with the names of all layers, is HLSConfig in its hls4ml_config.yml."""
    simulate: bool = True
    """Compile its C simulation with g++, which knows those of Vitis, Vivado, VivadoAccelerator, Quartus and Catapult, and compare
    integers."""

    @model_validator(mode="after")
    def _can_be_simulated(self) -> Self:
        if self.simulate and not BACKENDS[self.backend].simulates:
            tools = " and ".join(BACKENDS[self.backend].tools)
            raise ValueError(f"{{backend: {self.backend}, simulate: false}}: its C simulation needs {tools}, not g++ alone")
        return self


class Hardware(Section):
    """What is made of the trained model.  Needs a quantizer."""

    lower: bool = True
    """Turn the model into a netlist and a project with Verilog, testbench, constraints and scripts."""
    backend: Literal["da4ml", "alkaid"] | None = "da4ml"
    """What turns the graph into logic.  null: no netlist, for models of any size that go through hls (io_stream) or onnx."""
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
    """The longest path between two registers, in the backend's units (da4ml: adders, whose fractions are dropped; alkaid: ns);
    null: clock_period, at 1 ns a unit."""
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
        if self.backend is None and self.weights != "constants":
            raise ValueError("backend: da4ml or alkaid with weights, because ports and registers are made of RTL")
        if self.tmr and self.weights != "registers":
            raise ValueError("weights: registers with tmr, because constants and ports have no flip-flops to triplicate")
        if self.weights != "constants" and (self.hls is not None or self.onnx):
            raise ValueError("weights: constants with hls and onnx, which take the weights with them")
        if self.latency_cutoff is not None and self.latency_ns is not None:
            raise ValueError("latency_cutoff or latency_ns, not both")
        return self

    @property
    def traced(self) -> dict[str, Any]:
        """Arguments of `lower.trace`: weights that are loaded are ports, and without a netlist any size will do."""
        size = {"limit": math.inf} if self.backend is None else {}
        return {"weights": "constants" if self.weights == "constants" else "ports", **size}
