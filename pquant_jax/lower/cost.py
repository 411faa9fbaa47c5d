"""LUTs, flip-flops, carry chains and DSPs of a netlist, per layer and in all, before any synthesis.

Every variable of a netlist belongs to the first node of the graph that needs it, and so to a layer: the path of
that node, or of the last named one it reads.  What a variable is (`FEATURES`) is counted in bits of hardware; `Calibration`
holds what a bit costs in cells, fitted to Yosys' counts by `calibrate`.  The shipped one (`shipped`) is for da4ml netlists
on UltraScale+, made by `benchmarks/bench_cost.py` from the models of the zoo; its errors are kept beside the figures.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, LoweringError, did_you_mean
from pquant_jax.lower.backends import _netlist as netlist
from pquant_jax.lower.ir import Graph, consumers
from pquant_jax.lower.passes import subgraph
from pquant_jax.lower.ranges import intervals
from pquant_jax.lower.synth import synth

FEATURES: Final = ("adder", "constant", "relu", "mux", "table", "wide_table", "multiplier", "dsp", "bits", "register", "shift")
CELLS: Final = ("lut", "ff", "carry", "dsp")
# What a bit should cost by the structure of UltraScale+: a LUT and an eighth of a CARRY8 (Yosys: a quarter of a CARRY4) per
# bit of adder, two relus or multiplexers in a LUT, 2^(b - 6) LUTs per bit of a table of b inputs, half of them for a smooth
# function.  Constants are partly absorbed.  The fit starts from here: few models have tables, multipliers or DSPs.
EXPECTED: Final[dict[str, dict[str, float]]] = {
    "lut": {"adder": 0.8, "constant": 0.2, "relu": 0.5, "mux": 0.5, "table": 0.5, "wide_table": 0.5, "multiplier": 1.0,
            "dsp": 2.0, "bits": 0.2, "register": 0.02, "shift": 1.0},
    "ff": {"register": 0.95},
    "carry": {"adder": 0.25, "constant": 0.05, "mux": 0.05},
    "dsp": {"dsp": 1.0},
}  # fmt: skip
_TRUST: Final = (0.05, 0.5)  # relative standard deviations: of a count around the model, of a weight around `EXPECTED`
_FILE: Final = Path(__file__).with_name("calibration.json")
_LUT_INPUTS: Final = 6
_SHIFT: Final = 3  # registers in a row from which Yosys takes a shift register, a LUT per bit
_DSP_OUTPUT: Final = 9  # bits of a product from which Yosys (and Vivado, about) takes a DSP; 27 x 18 bits fit one


class Layer(NamedTuple):
    """A part of a netlist.  features: {name in FEATURES: bits}; cost: the package's own estimate (nan where it has none)."""

    name: str
    features: dict[str, float]
    cost: float


class Calibration(NamedTuple):
    """cells[cell][feature]: what a bit of a feature costs.  left_out: {model: {cell: relative error}} when it was left out."""

    cells: dict[str, dict[str, float]]
    left_out: dict[str, dict[str, float]]


def layers(
    graph: Graph, backend: Any, *, cutoff: float = -1, keep_dead: bool = False, reg_bits: int | None = None
) -> list[Layer]:
    """The netlist of `graph` by layer, in the order of the graph; a layer without hardware is left out.

    backend: `backends.da4ml` or `backends.alkaid`.  cutoff > 0: with the registers of stages of that many units; all of
    them are the backend's count, their places those before the backend balances its stages.  reg_bits: that count where it
    is known, which saves making the netlist (`pipeline.cut`).  Raises: LoweringError as `to_comb` does.
    """
    graph, known = netlist.prepare(graph, backend.check_supported, keep_dead)
    circuit = backend.circuit(backend.HWCONF, None)
    with backend.exact("tracing"):
        values = netlist.variables(graph, known, circuit)
        flat = [[v for v in array.ravel() if not isinstance(v, float)] for array in values]
        live = _below([v for j in graph.outputs for v in flat[j]], set())
        names = layer_names(graph)
        found: dict[str, list[Any]] = {}
        seen: set[Any] = set()
        for name, own in zip(names, flat, strict=True):
            found.setdefault(name, []).extend(v for v in _below(own, seen).values() if v.id in live)
        registers = _registers(live.values(), [v for j in graph.outputs for v in flat[j]], cutoff)
    if registers:
        known_bits = backend.staged(backend.to_comb(graph, keep_dead=True), cutoff)[1] if reg_bits is None else reg_bits
        share = known_bits / max(sum(bits[2] for bits in registers.values()), 1)
        registers = {key: share * bits for key, bits in registers.items()}
    return [_layer(name, variables, registers) for name, variables in found.items() if variables]


def layer_names(graph: Graph) -> list[str]:
    """Per node, the layer it belongs to: its own path without the last part, or else that of the last node it reads.

    >>> from pquant_jax.lower.ir import Node
    >>> at = dict(k=1, i=1, f=1)
    >>> nodes = (Node("input", (), (1,), at, "x"), Node("quantize", (0,), (1,), at, "Dense_0/input"), Node("neg", (1,), (1,)))
    >>> layer_names(Graph(nodes, (0,), (2,)))
    ['x', 'Dense_0', 'Dense_0']
    """
    names: list[str] = []
    for node in graph.nodes:
        inherited = next((names[j] for j in sorted(node.inputs, reverse=True) if graph.nodes[j].op != "const"), "input")
        names.append((node.name.rpartition("/")[0] or node.name) if node.name else inherited)
    return names


def cut_layer(graph: Graph, name: str) -> Graph:
    """The nodes of one layer (`layer_names`) as a graph (`passes.subgraph`): it has ports for what it reads of others.

    Raises: LoweringError for a layer without nodes, with the names of those that are there.
    """
    names, known, readers = layer_names(graph), intervals(graph), consumers(graph)
    inside = [j for j, own in enumerate(names) if own == name and graph.nodes[j].op != "const"]
    if not inside:
        raise LoweringError(f"no layer is called {name!r}; {did_you_mean(name, names)}")
    read = sorted({i for j in inside for i in graph.nodes[j].inputs if names[i] != name and graph.nodes[i].op != "const"})
    given = [j for j in inside if j in graph.outputs or any(names[reader] != name for reader in readers[j])]
    return subgraph(graph, known, read, given)


def synthesize_layers(
    graph: Graph, backend: Any, *, cutoff: float = -1, work: Path | None = None, timeout: float = 600
) -> list[dict[str, Any]]:
    """Rows {"layer", "lut", "ff", "carry", "dsp", "bram", "seconds"} by Yosys, each layer synthesized alone (`cut_layer`).

    With a cutoff every layer has registers at its own ports, so that flip-flops between two layers count twice.  Half a
    minute to minutes per layer.  work keeps the RTL.  Raises: ToolError without Yosys, LoweringError as `to_comb` does.
    """
    graph, _ = netlist.prepare(graph, backend.check_supported, False)
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if work is None else work
        for number, name in enumerate(dict.fromkeys(layer_names(graph))):
            if not any(n == name and node.op != "const" for n, node in zip(layer_names(graph), graph.nodes, strict=True)):
                continue
            comb = backend.to_comb(cut_layer(graph, name))
            if comb.cost:  # a layer of wires is no netlist for Yosys
                rtl = backend.write_rtl(comb, folder / f"layer{number}", name="net", latency_cutoff=cutoff, overwrite=True)
                rows.append({"layer": name, **synth(rtl, timeout=timeout)})
    return rows


def _below(outputs: Iterable[Any], seen: set[Any]) -> dict[Any, Any]:
    """{id: variable} of all that `outputs` read, themselves included, that are not in `seen`, which is extended."""
    found, left = {}, list(outputs)
    while left:
        v = left.pop()
        if v.id not in seen:
            seen.add(v.id)
            found[v.id] = v
            left.extend(v._from)
    return found


def _registers(variables: Iterable[Any], outputs: Sequence[Any], cutoff: float) -> dict[Any, np.ndarray]:
    """Behind each variable (flip-flops, bits of shift registers, bits of both): its bits, a register per stage boundary.

    Between two readers at least `_SHIFT` stages apart the registers are shift registers.
    """
    if cutoff <= 0:
        return {}
    variables = list(variables)
    stage = {v.id: math.floor(v.latency / (cutoff + 1e-9)) for v in variables}
    read: dict[Any, set[int]] = {v.id: {stage[v.id] - (v.opr == "new"), stage[v.id]} for v in variables}
    for v in variables:
        for source in v._from:
            read[source.id].add(stage[v.id])
    for v in outputs:
        read[v.id].add(max(stage.values()) + 1)
    found = {}
    for v in variables:
        apart = np.diff(sorted(read[v.id])) if v.opr != "const" else np.zeros(0, int)
        far = apart >= _SHIFT
        found[v.id] = _width(v) * np.array([apart[~far].sum(), far.sum(), apart.sum()], np.float64)
    return found


def _layer(name: str, variables: Sequence[Any], registers: Mapping[Any, np.ndarray]) -> Layer:
    counted: dict[str, float] = dict.fromkeys(FEATURES, 0.0)
    for v in variables:
        kind, bits = feature(v)
        if kind:
            counted[kind] += bits
        if v.id in registers:
            counted["register"] += float(registers[v.id][0])
            counted["shift"] += float(registers[v.id][1])
    return Layer(name, counted, float(sum(getattr(v, "cost", math.nan) for v in variables)))


def feature(v: Any) -> tuple[str, float]:
    """What a variable of either package is, and how many bits of it there are; ("", 0) for what is only wires."""
    width, sources = _width(v), v._from
    if v.opr == "vadd":  # below the coarser operand's last bit a sum is a copy
        return "adder", _above(v, max(float(s.step) for s in sources))
    if v.opr == "cadd":
        return "constant", _above(v, float(sources[0].step))
    if v.opr == "relu":
        return "relu", width if sources[0].low < 0 or sources[0]._factor < 0 else 0
    if v.opr == "msb_mux":
        return "mux", width / (2 if any(s.opr == "const" for s in sources[1:]) else 1)
    if v.opr == "vmul":
        a, b = (_width(s) for s in sources)
        return ("dsp", math.ceil(max(a, b) / 27) * math.ceil(min(a, b) / 18)) if a + b >= _DSP_OUTPUT else ("multiplier", a * b)
    if v.opr == "lookup":
        inputs = _width(sources[0])
        return ("table", width) if inputs <= _LUT_INPUTS else ("wide_table", width * 2.0 ** (inputs - _LUT_INPUTS))
    if v.opr in ("bit_unary", "bit_binary"):
        return "bits", sum(_width(s) for s in sources) if v._data or v.opr == "bit_binary" else 0
    return "", 0


def _width(v: Any) -> int:
    return max(int(sum(v.kif)), 0) if v.low != v.high else 0


def _above(v: Any, step: float) -> float:
    k, i, f = v.kif
    return max(int(k) + int(i) + min(int(f), round(-math.log2(step))), 1)


def total(parts: Sequence[Layer]) -> Layer:
    """All layers as one."""
    summed = {key: sum(part.features[key] for part in parts) for key in FEATURES}
    return Layer("total", summed, float(sum(part.cost for part in parts)))


def cells(features: Mapping[str, float], calibration: Calibration) -> dict[str, float]:
    """{"lut", "ff", "carry", "dsp"} by `calibration`.

    >>> adders = Calibration({"lut": {"adder": 0.9}}, {})
    >>> cells({"adder": 100.0}, adders)
    {'lut': 90.0}
    """
    return {cell: sum(w * features.get(key, 0.0) for key, w in weights.items()) for cell, weights in calibration.cells.items()}


def table(
    graph: Graph, backend: Any, *, cutoff: float = -1, calibration: Calibration | None = None, reg_bits: int | None = None
) -> list[dict[str, Any]]:
    """Rows {"layer", "lut", "ff", "carry", "dsp", "cost"}, one per layer and the total last.

    calibration: by default the shipped one, of da4ml netlists.  A sum over layers is less than exact where synthesis works
    across them.  cutoff and reg_bits as for `layers`, which says what is raised.
    """
    calibration = shipped() if calibration is None else calibration
    parts = layers(graph, backend, cutoff=cutoff, reg_bits=reg_bits)
    return [{"layer": part.name, **cells(part.features, calibration), "cost": part.cost} for part in [*parts, total(parts)]]


def calibrate(rows: Sequence[Mapping[str, Any]]) -> Calibration:
    """Non-negative weights of the features: least squares of relative errors over `rows`, and the errors on rows left out.

    rows: {"name", "features": {feature: bits}, "lut", "ff", "carry", "dsp"}, cells by a synthesis tool, three rows at least.
    Minimized is sum(((estimate / count - 1) / 0.05)^2) + sum(((weight / EXPECTED - 1) / 0.5)^2) with scipy's `nnls`.  A row
    whose count is 0 says nothing of relative errors and is left out of that cell.  Raises: DataError for fewer rows.
    """
    if len(rows) < 3:
        raise DataError(f"calibrate got {len(rows)} rows, expected 3 at least: features and cells of netlists")
    fitted = {cell: _fit(rows, cell) for cell in CELLS}
    left_out = {}
    for row in rows:
        others = [other for other in rows if other["name"] != row["name"]]
        estimate = cells(row["features"], Calibration({cell: _fit(others, cell) for cell in CELLS}, {}))
        left_out[str(row["name"])] = {cell: estimate[cell] / row[cell] - 1 for cell in CELLS if row[cell]}
    return Calibration(fitted, left_out)


def _fit(rows: Sequence[Mapping[str, Any]], cell: str) -> dict[str, float]:
    from scipy.optimize import nnls

    expected = np.array(list(EXPECTED[cell].values()))
    used = [row for row in rows if row[cell]]
    design = np.array([[row["features"][key] / row[cell] for key in EXPECTED[cell]] for row in used]).reshape(-1, len(expected))
    near, free = (1 / deviation for deviation in _TRUST)  # in units of EXPECTED, so that all weights are near 1
    system = np.concatenate([near * design * expected, free * np.eye(len(expected))])
    weights = nnls(system, np.concatenate([np.full(len(used), near), np.full(len(expected), free)]))[0] * expected
    return dict(zip(EXPECTED[cell], weights.tolist(), strict=True))


def shipped() -> Calibration:
    """The calibration that comes with the package; raises `LoweringError` if its file is missing."""
    if not _FILE.exists():
        raise LoweringError(f"{_FILE} is missing; reinstall pquant_jax, or make it with benchmarks/bench_cost.py --ship")
    found = json.loads(_FILE.read_text(encoding="utf-8"))
    return Calibration(found["cells"], found["left_out"])


def ship(calibration: Calibration, path: Path = _FILE) -> None:
    """Write `calibration` as the shipped one, through a temporary name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(calibration._asdict(), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
