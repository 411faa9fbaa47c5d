"""A design folder that an FPGA engineer can pick up: RTL, testbenches with vectors, constraints, scripts, C header, README."""

from pquant_jax.lower.project._run import BenchResult, missing_tools, run_testbench
from pquant_jax.lower.project._write import ProjectInfo, quoted, write_project

__all__ = ["ProjectInfo", "BenchResult", "missing_tools", "quoted", "run_testbench", "write_project"]
