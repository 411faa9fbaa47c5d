"""One folder with everything: `write_project`."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata as packages
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, save
from pquant_jax.lower.project import _docs, _testbench, _vivado
from pquant_jax.lower.project._header import header
from pquant_jax.lower.project._ports import Element, Ports, bits, check_fits, fill, hex_lines, ports_of
from pquant_jax.lower.rtl import FLAVORS, RTLInfo, whole_folder
from pquant_jax.lower.synth import script

_SUFFIX = {"verilog": ".v", "vhdl": ".vhd"}


class ProjectInfo(NamedTuple):
    """A written project: `rtl` = {flavor: RTLInfo} with the sources in `directory`/rtl/FLAVOR, `vectors` their number.

    `metadata` is what `metadata.json` holds.
    """

    name: str
    directory: Path
    rtl: dict[str, RTLInfo]
    vectors: int
    metadata: dict[str, Any]


def write_project(
    graph: Graph,
    comb: Any,
    directory: str | Path,
    *,
    name: str,
    flavors: Sequence[str] = FLAVORS,
    latency_cutoff: float = -1,
    part: str = "xcvu13p-flga2577-2-e",
    clock_period: float = 5.0,
    clock_uncertainty: float = 0.1,
    io_delay: tuple[float, float] = (0.2, 0.4),
    vectors: int | Sequence[np.ndarray] = 1000,
    seed: int = 0,
    backend: Any = None,
    overwrite: bool = False,
    origin: Mapping[str, Any] | None = None,
    source: str = "given by the user",
) -> ProjectInfo:
    """Write `comb`, the netlist of `graph`, as a project that can be moved anywhere: it refers to no file outside.

    Args:
      backend: module whose `write_rtl(comb, directory, name=, flavor=, latency_cutoff=)` made `comb`; da4ml's if None.
      latency_cutoff: > 0 pipelines at that many adder delays per stage; else combinational.
      clock_period: ns; `clock_uncertainty` and `io_delay` (least, most at the ports) are fractions of it.
      vectors: arrays (N, *shape), one per input, or how many to draw over all codes of the ports with `seed`.
      origin: provenance for `metadata.json`; "mismatches" ({implementation: count}) and "vectors" as `verify` gives them
        are quoted in the README.
      source: what `vectors` are if they are arrays, for the README.
    Raises: LoweringError for names, flavors or ports that can't be written and an existing `directory`; DataError for
      wrong vectors; VerifyError if the netlist's outputs can't hold what the graph computes.  Nothing is left then.

    >>> import tempfile
    >>> from pquant_jax.lower.backends import da4ml
    >>> from pquant_jax.lower.ir import Node
    >>> port = Node("input", (), (2,), {"k": 1, "i": 2, "f": 1}, "x")
    >>> graph = Graph((port, Node("abs", (0,), (2,))), (0,), (1,))
    >>> comb, x = da4ml.to_comb(graph), [np.array([[-1.5, 2.0]])]
    >>> with tempfile.TemporaryDirectory() as work:
    ...     made = write_project(graph, comb, Path(work) / "p", name="magnitude", vectors=x)
    ...     (made.directory / "vectors" / "outputs.hex").read_text()
    '43\\n'
    """
    _check_arguments(name, flavors, part, clock_period, (clock_uncertainty, *io_delay))
    if backend is None:
        from pquant_jax.lower.backends import da4ml as backend
    given, source = _vectors(graph, vectors, seed, source)
    expected = flatten_batch(emulate(graph, given))
    asked = {
        "backend": backend.__name__.rpartition(".")[2],
        "part": part,
        "clock_period_ns": clock_period,
        "clock_uncertainty": clock_uncertainty,
        "io_delay": list(io_delay),
        "origin": dict(origin or {}),
    }
    target = Path(directory).absolute()
    with whole_folder(target, overwrite=overwrite) as root:
        rtls = {flavor: _write_rtl(backend, comb, root, target, name, flavor, latency_cutoff) for flavor in flavors}
        ports = ports_of(graph, rtls[flavors[0]])
        digests = _write_vectors(flatten_batch(given), expected, ports, root / "vectors")
        save(graph, root / "model" / "graph.npz")
        about = _metadata(graph, rtls, ports) | asked | {"versions": _versions(asked["backend"])}
        about["vectors"] = {"count": len(given[0]), "source": source, **digests}
        _write_texts(root, about, rtls[flavors[0]], ports, {f: _sources(root / "rtl" / f, f, name) for f in flavors})
        _write_sums(root)
    return ProjectInfo(name, target, rtls, len(given[0]), about)


def quoted(directory: str | Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Add `origin`, such as what `verify` found, to a written project: README.md, metadata.json and SHA256SUMS are replaced.

    RTL, testbenches, vectors and their checksums stay as they are.  Returns what `metadata.json` holds then.
    Raises: LoweringError for a folder that is no written project.
    """
    folder = Path(directory)
    if not (folder / "metadata.json").is_file():
        raise LoweringError(f"{folder} has no metadata.json: it is no written project; make one with write_project")
    about = json.loads((folder / "metadata.json").read_text())
    about["origin"] |= origin
    sources = {f: _sources(folder / "rtl" / f, f, about["name"]) for f in about["flavors"]}
    inputs, outputs = about["model_inp"], about["model_out"]
    ports = Ports(_elements_of(inputs), _elements_of(outputs), _shapes_of(inputs), _shapes_of(outputs))
    texts = {
        "README.md": _docs.readme(ports, about, sources, _contents(folder, about["name"], sources)),
        "metadata.json": _json(about),
    }
    sums = dict(line.split("  ", 1)[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    sums |= {file: hashlib.sha256(text.encode()).hexdigest() for file, text in texts.items()}
    texts["SHA256SUMS"] = "".join(f"{digest}  {file}\n" for file, digest in sums.items())
    for file, text in texts.items():
        (folder / f"{file}.partial").write_text(text, encoding="utf-8")
    for file in texts:
        (folder / f"{file}.partial").replace(folder / file)
    return about


def _write_vectors(given: np.ndarray, expected: np.ndarray, ports: Ports, folder: Path) -> dict[str, str]:
    """Inputs and expected outputs, (N, elements) each, as hexadecimal lines; {file: its SHA-256}."""
    check_fits(expected, ports.outputs)
    folder.mkdir()
    (folder / "inputs.hex").write_text(hex_lines(given, ports.inputs))
    (folder / "outputs.hex").write_text(hex_lines(expected, ports.outputs))
    return {path.stem: _file_digest(path) for path in sorted(folder.iterdir())}


def _check_arguments(name: str, flavors: Sequence[str], part: str, clock_period: float, fractions: Sequence[float]) -> None:
    if not flavors or not set(flavors) <= set(FLAVORS) or len(set(flavors)) != len(flavors):
        raise LoweringError(f"flavors are {tuple(flavors)!r}, expected some of {FLAVORS}, each once")
    if "__" in name or name.endswith("_"):
        raise LoweringError(f"name is {name!r}; VHDL takes no '__' and no '_' at the end")
    for flavor, word in (("verilog", name), ("vhdl", name.lower())):  # VHDL does not tell capitals from small letters
        if word in fill(f"reserved_{flavor}.txt").split():
            raise LoweringError(f"name is {name!r}, a reserved word of {flavor}; use another, such as '{name}_net'")
    if not re.fullmatch(r"[\w-]+", part, re.ASCII):
        raise LoweringError(f"part is {part!r}, expected a name such as 'xcvu13p-flga2577-2-e'")
    if not (math.isfinite(clock_period) and clock_period >= 0.01):
        raise LoweringError(f"clock_period is {clock_period!r}, expected nanoseconds, at least 0.01")
    if not all(0 <= v < 1 for v in fractions) or fractions[1] > fractions[2]:
        raise LoweringError(
            f"clock_uncertainty is {fractions[0]!r}, io_delay {tuple(fractions[1:])!r}; expected fractions of the clock period, "
            "from 0 to below 1, io_delay as (least, most)"
        )


def _vectors(graph: Graph, vectors: int | Sequence[np.ndarray], seed: int, source: str) -> tuple[list[np.ndarray], str]:
    if not isinstance(vectors, int | np.integer):
        given = [np.asarray(v, np.float64) for v in vectors]
        if not given or not len(given[0]):
            raise DataError("vectors holds no sample; pass arrays (N, *shape), one per input, or a number")
        return given, source
    if vectors < 1:
        raise DataError(f"vectors is {vectors}, expected at least 1")
    return port_grid(graph, int(vectors), np.random.default_rng(seed)), f"drawn over all codes of the ports, seed {seed}"


def _write_rtl(backend: Any, comb: Any, root: Path, target: Path, name: str, flavor: str, latency_cutoff: float) -> RTLInfo:
    """The backend's sources in rtl/FLAVOR and its netlist in model/; its scripts for other clocks and parts are left out."""
    made = backend.write_rtl(comb, root / f".{flavor}", name=name, flavor=flavor, latency_cutoff=latency_cutoff)
    if made.ii != 1:
        raise LoweringError(f"the netlist takes a vector every {made.ii} cycles; the testbenches feed one every cycle (ii = 1)")
    source = root / "rtl" / flavor
    source.parent.mkdir(exist_ok=True)
    made.src.rename(source)
    for path in [*source.glob("*.xdc"), *source.glob("*.sdc")]:
        path.unlink()
    if (tables := source / "memfiles").is_dir() and not any(tables.iterdir()):
        tables.rmdir()
    (root / "model").mkdir(exist_ok=True)
    for path in (made.directory / "model").glob("*.json"):
        path.replace(root / "model" / path.name)
    shutil.rmtree(made.directory)
    return made._replace(directory=target, src=target / "rtl" / flavor)


def _sources(folder: Path, flavor: str, name: str) -> list[str]:
    """Sources below `folder` in the order of compilation, entities before those that use them; without the wrapper."""
    suffix = _SUFFIX[flavor]
    found = [p for p in sorted(folder.rglob(f"*{suffix}")) if p.name != f"{name}_wrapper{suffix}"]
    if flavor != "vhdl":
        return [p.relative_to(folder).as_posix() for p in found]
    texts = {p: p.read_text().lower() for p in found}
    where = {unit: p for p, text in texts.items() for unit in re.findall(r"\b(?:entity|package)\s+(\w+)\s+is\b", text)}
    used = {p: {where[unit] for unit in re.findall(r"\bwork\.(\w+)", text) if unit in where} - {p} for p, text in texts.items()}
    ordered: list[Path] = []
    while len(ordered) < len(found):
        ready = [p for p in found if p not in ordered and used[p] <= set(ordered)]
        if not ready:
            raise LoweringError(f"the {flavor} sources of {name} use each other in a circle")
        ordered += ready
    return [p.relative_to(folder).as_posix() for p in ordered]


def _tables(folder: Path) -> dict[str, int]:
    """{file: lines} of the tables that the RTL reads."""
    return {p.name: len(p.read_text().splitlines()) for p in sorted((folder / "memfiles").glob("*"))}


def _versions(backend: str) -> dict[str, str]:
    made = {}
    for package in ("pquant_jax", backend, "jax", "numpy"):
        try:
            made[package] = packages.version(package)
        except packages.PackageNotFoundError:
            made[package] = "not installed"
    return made


def graph_digest(graph: Graph) -> str:
    """SHA-256 of the nodes' contents, whatever compresses the file they are in."""
    digest = hashlib.sha256(json.dumps([graph.inputs, graph.outputs]).encode())
    for node in graph.nodes:
        digest.update(json.dumps([node.op, node.inputs, node.shape, node.name]).encode())
        for key in sorted(node.attrs):
            value = node.attrs[key]
            array = np.asarray(value)
            digest.update(f"{key} {array.shape} ".encode())
            numbers = array.astype(np.float64 if array.dtype.kind == "f" else np.int64) if array.dtype.kind in "biuf" else None
            digest.update(str(value).encode() if numbers is None else np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()


def _metadata(graph: Graph, rtls: Mapping[str, RTLInfo], ports: Ports) -> dict[str, Any]:
    rtl = next(iter(rtls.values()))
    return {
        "format": 1,
        "name": rtl.name,
        "flavors": list(rtls),
        "latency_cycles": rtl.latency_cycles,
        "stages": rtl.stages,
        "ii": rtl.ii,
        "estimates": {"lut": rtl.cost, "ff": rtl.reg_bits, "adder_delays": rtl.latency_units},
        "layers": list(dict.fromkeys(n.name.rpartition("/")[0] for n in graph.nodes if "/" in n.name)),
        "graph_sha256": graph_digest(graph),
        "model_inp": _port(ports.inputs, ports.input_shapes),
        "model_out": _port(ports.outputs, ports.output_shapes),
    }


def _port(elements: Sequence[Element], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rows = [
        {"name": e.label, "tensor": e.tensor, "index": list(e.index), "k": e.k, "i": e.i, "f": e.f, "signed": bool(e.k)}
        | {"width": e.width, "offset": e.offset}
        for e in elements
    ]
    tensors = [{"name": name, "shape": list(shape)} for name, shape in shapes.items()]
    return {"bits": bits(elements), "tensors": tensors, "elements": rows}


def _elements_of(port: Mapping[str, Any]) -> tuple[Element, ...]:
    """What `_port` was made of."""
    rows = port["elements"]
    return tuple(Element(e["tensor"], tuple(e["index"]), *(e[key] for key in ("k", "i", "f", "offset", "width"))) for e in rows)


def _shapes_of(port: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {tensor["name"]: tuple(tensor["shape"]) for tensor in port["tensors"]}


def _json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=1, default=str) + "\n"


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_texts(root: Path, about: Mapping[str, Any], rtl: RTLInfo, ports: Ports, sources: Mapping[str, Sequence[str]]) -> None:
    """Everything that is made of templates."""
    name, period, count = rtl.name, about["clock_period_ns"], about["vectors"]["count"]
    timing = _testbench.Timing(count, rtl.latency_cycles, 2 * round(500 * period))
    texts = {
        f"constraints/{name}.xdc": _vivado.constraints(
            name, about["part"], period, about["clock_uncertainty"], about["io_delay"], clocked=rtl.stages > 0
        ),
        f"{name}_io.h": header(name, ports, rtl),
        "Makefile": _docs.makefile(name, count, sources),
        "metadata.json": _json(about),
    }
    texts |= {f"vivado/{file}": text for file, text in _vivado.scripts(name, about["part"], count, sources).items()}
    if "verilog" in sources:
        texts[f"sim/tb_{name}.sv"] = _testbench.verilog(name, ports, _tables(root / "rtl" / "verilog"), timing)
        texts["synth/yosys.ys"] = "\n".join(script(name, [Path(s).name for s in sources["verilog"]])) + "\n"
    if "vhdl" in sources:
        texts[f"sim/tb_{name}.vhd"] = _testbench.vhdl(name, ports, _tables(root / "rtl" / "vhdl"), timing)
    texts["README.md"] = _docs.readme(ports, about, sources, _contents(root, name, sources))
    for file, text in texts.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)


def _contents(root: Path, name: str, sources: Mapping[str, Sequence[str]]) -> dict[str, str]:
    made = {f"rtl/{flavor}": f"the netlist in {flavor}, top `{name}`" for flavor in sources}
    if next(root.glob(f"rtl/*/{name}_wrapper.*"), None):
        made[f"rtl/*/{name}_wrapper.*"] = "the same with every element padded to one width; not used here"
    if next(root.glob("rtl/*/memfiles"), None):
        made["rtl/*/memfiles"] = "tables of the netlist, read from the working directory by their bare names"
    if "verilog" in sources:
        made[f"sim/tb_{name}.sv"] = "testbench in SystemVerilog"
        made["synth/yosys.ys"] = "script of `make synth`"
    if "vhdl" in sources:
        made[f"sim/tb_{name}.vhd"] = "testbench in VHDL"
    return made | {
        "vectors": "inputs and expected outputs, one vector per line",
        f"constraints/{name}.xdc": "clock and delays at the ports",
        "vivado": "`synth.tcl` and `simulate.tcl`",
        f"{name}_io.h": "formats and packing in C",
        "model": "the graph (`pquant_jax.lower.ir.load`) and the generator's netlist",
        "metadata.json": "every port element, latency, estimates, versions, checksums",
        "SHA256SUMS": "checksums of all files",
    }


def _write_sums(root: Path) -> None:
    rows = [f"{_file_digest(p)}  {p.relative_to(root).as_posix()}\n" for p in sorted(root.rglob("*")) if p.is_file()]
    (root / "SHA256SUMS").write_text("".join(rows))
