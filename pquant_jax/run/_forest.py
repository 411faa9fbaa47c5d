"""A forest of XGBoost or LightGBM from its file to RTL that is proved."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax import trees
from pquant_jax._base import KIF
from pquant_jax._errors import ConfigError, DataError, SearchError, ToolError, did_you_mean
from pquant_jax.data import read_npz
from pquant_jax.lower import Graph, ir, pipeline, sim
from pquant_jax.lower.emulate import port_grid
from pquant_jax.lower.project import quoted, write_project
from pquant_jax.lower.rtl import RTLInfo, whole_folder
from pquant_jax.run._files import read_json, write_json
from pquant_jax.run._hardware import SOURCE, TESTBENCH, top_module
from pquant_jax.run._log import Log, make_log, phase
from pquant_jax.run._prepare import versions
from pquant_jax.run._signals import stop_at_once

BACKENDS: Final = ("da4ml", "alkaid")
FIGURES: Final = ("latency_cycles", "latency_ns", "clock_ns", "ii", "reg_bits")


class _Design(NamedTuple):
    """What a project is written of; inputs: what its testbenches feed, (n, features)."""

    graph: Graph
    comb: Any
    package: Any
    cut: pipeline.Pipelined
    inputs: np.ndarray
    name: str
    origin: dict[str, Any]


class _Samples(NamedTuple):
    """x (n, features); y labels (n,), values (n, outputs) or None, and how a forest is scored on it."""

    x: np.ndarray
    y: np.ndarray | None
    metric: str
    loss: str


def forest(
    model: str | Path,
    data: str | Path,
    folder: str | Path | None = None,
    *,
    bits: int = 16,
    integer: int | None = None,
    fraction: int | None = None,
    leaves: int = 8,
    luts: float | None = None,
    backend: str = "da4ml",
    clock_period: float = 5.0,
    base_margin: float | Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    vectors: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Quantize a forest, prune it to a budget, write its RTL and prove it; writes `folder`, returns summary.json and `folder`.

    model: a file that `trees.load` reads; base_margin and names are what a dump of XGBoost lacks.
    data: an .npz with `x` (n, features) and, for scores, `y`: labels, or values that a regression is compared with, as the raw
      score.  folder: default runs/<stem of the model>, complete or absent.
    bits: width of a feature; the position of its point follows from its range in x, and it has a sign if x is ever negative.
      integer, fraction: bits before (without the sign) and behind the point, of all features alike.  leaves: bits of a leaf.
    luts: budget of look-up tables by `trees.luts`; every second sample then chooses what goes, and the others give the scores.
    clock_period: ns, of the pipelined netlist.  vectors: inputs to compare, samples and random codes of the whole port.
    Raises: DataError, LoweringError, SearchError or ToolError for what can't be; ConfigError for a folder that exists;
      VerifyError if the emulator, the netlist or the simulated Verilog differs from the forest in one integer.
    """
    log = make_log(quiet=quiet)
    target, package = _target(Path(model), folder, overwrite), _backend(backend)
    with phase(log, "read") as remarks:
        x, y = _arrays(Path(data))
        read = trees.load(model, base_margin=base_margin, features=names or x.shape[1])
        samples = _judged(read, x, y, str(data))
        remarks.append(f"{_size(read)}, {read.features} features, {len(read.base)} outputs")
    made, samples = _quantized(read, samples, _port(x, bits, integer, fraction), leaves, luts, log)
    with phase(log, "netlist") as remarks:
        graph = trees.to_graph(made)
        comb = package.to_comb(graph)
        cut = pipeline.pipeline(comb, package, clock_ns=clock_period)
        remarks.append(f"{backend} cost {cut.cost:,.0f}, latency {cut.latency_cycles} cycles of {cut.clock_ns:g} ns")
    summary = {
        "forest": {"model": Path(model).name, **_figures(read, made, samples)},
        "cost": {"luts": trees.luts(made), backend: cut.cost} | {key: getattr(cut, key) for key in FIGURES},
        "seed": seed,
    }
    with stop_at_once(), whole_folder(target, overwrite=overwrite) as partial:
        ir.save(graph, partial / "graph.npz")
        random = port_grid(graph, TESTBENCH, np.random.default_rng(seed))[0]
        inputs = np.concatenate([trees.encode(made, samples.x[:TESTBENCH]), random])
        design = _Design(graph, comb, package, cut, inputs, top_module(target.name), {"model": Path(model).name})
        summary |= _proved(design, made, samples.x, partial, vectors, seed, log)
        write_json(partial / "summary.json", summary | {"seconds": log.seconds, "versions": versions()})
    return read_json(target / "summary.json") | {"folder": str(target)}


def _target(model: Path, folder: str | Path | None, overwrite: bool) -> Path:
    """Where to write; what is there and is no forest of ours stays."""
    target = Path("runs") / model.stem if folder is None else Path(folder)
    if target.exists():
        if not overwrite:
            raise ConfigError(f"{target} exists; replace it with --overwrite, or choose another folder with -o")
        if not target.is_dir() or (any(target.iterdir()) and "forest" not in read_json(target / "summary.json")):
            raise ConfigError(f"{target} was not written by this command, so --overwrite leaves it alone; choose another with -o")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} can't be written: {error.strerror}; choose another folder with -o") from error
    return target


def _backend(name: str) -> Any:
    if name not in BACKENDS:
        raise ConfigError(f"backend is {name!r}; {did_you_mean(name, BACKENDS)}")
    if importlib.util.find_spec(name) is None:
        raise ToolError(f"the backend {name} is missing: `pip install {name}`")
    return importlib.import_module(f"pquant_jax.lower.backends.{name}")


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = read_npz(path)
    if "x" not in arrays:
        raise DataError(f"{path} has no array 'x'; {did_you_mean('x', arrays)}")
    x, y = arrays["x"], arrays.get("y")
    if x.ndim != 2 or x.dtype.kind not in "fiub" or len(x) < 2:
        raise DataError(f"{path}: x has shape {x.shape} and dtype {x.dtype}, expected numbers (n, features), two samples or more")
    for name, v in (("x", x), ("y", y)):
        if v is not None and (v.dtype.kind not in "fiub" or not np.isfinite(v).all()):
            raise DataError(f"{path}: {name} holds what is no finite number; drop those rows, or encode labels as 0, 1 ...")
    if y is not None and len(y) != len(x):
        raise DataError(f"{path}: x has {len(x)} rows, y {len(y)}; expected equally many")
    return x.astype(np.float64), y


def _judged(read: trees.Forest, x: np.ndarray, y: np.ndarray | None, where: str) -> _Samples:
    """Labels are compared by accuracy, other numbers by their root mean squared error."""
    outputs = len(read.base)
    if read.features != x.shape[1]:
        raise DataError(
            f"the forest reads {read.features} features, x of {where} has {x.shape[1]} columns; give those that it was trained on"
        )
    if y is None:
        return _Samples(x, None, "", "squared")
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    whole = y.ndim == 1 and np.isin(y, np.arange(max(outputs, 2))).all()
    if whole:
        return _Samples(x, y.astype(np.int64), "accuracy", "logistic" if outputs == 1 else "softmax")
    if y.shape != (len(x), outputs)[: 1 if outputs == 1 else 2]:
        raise DataError(
            f"{where}: y has shape {y.shape}, expected labels 0 to {max(outputs, 2) - 1}, or {outputs} values per sample"
        )
    return _Samples(x, y.astype(np.float64), "rmse", "squared")


def _quantized(
    read: trees.Forest, samples: _Samples, port: KIF, leaves: int, luts: float | None, log: Log
) -> tuple[trees.QuantizedForest, _Samples]:
    """The forest that is built, and the samples that had no part in pruning it."""
    with phase(log, "quantize") as remarks:
        made = trees.simplify(trees.quantize(read, port, leaves=leaves))
        remarks.append(f"{_size(made.forest)}, about {trees.luts(made):,.0f} LUTs")
    if luts is not None:
        with phase(log, "prune") as remarks:
            chosen, samples = _half(samples, 0), _half(samples, 1)
            made = trees.prune(made, chosen.x, chosen.y, budget=luts, loss=samples.loss).made
            remarks.append(f"{_size(made.forest)}, about {trees.luts(made):,.0f} LUTs")
    if not len(made.forest.root):
        asked = "" if luts is None else f" or within {luts:g} LUTs"
        raise SearchError(f"no split of the forest is left on this port{asked}: there is nothing to build; allow more")
    return made, samples


def _half(samples: _Samples, start: int) -> _Samples:
    return samples._replace(x=samples.x[start::2], y=None if samples.y is None else samples.y[start::2])


def _port(x: np.ndarray, bits: int, integer: int | None, fraction: int | None) -> KIF:
    """The format of every feature, int64 (features,): the least integer bits that hold its range, unless they are given.

    >>> made = _port(np.array([[0.5, -4.0], [100.0, 3.9]]), 8, None, None)
    >>> made.k.tolist(), made.i.tolist(), made.f.tolist()
    ([0, 1], [7, 2], [1, 5])
    """
    low, high = x.min(0), x.max(0)
    k = (low < 0).astype(np.int64)
    (below, i_low), (_, i_high) = np.frexp(-low), np.frexp(high)
    i_low = i_low - (below == 0.5)  # -2^i itself is in range
    least = np.minimum(i_low, i_high)
    i = np.maximum(np.where(low < 0, i_low, least), np.where(high > 0, i_high, least)).astype(np.int64)
    i = np.where((low >= 0) & (high <= 0), 0, i)
    if integer is not None or fraction is not None:
        k = np.full_like(k, k.max())
        i = np.full_like(i, bits - k.max() - fraction if integer is None and fraction is not None else integer)
    f = bits - k - i if fraction is None else np.full_like(i, fraction)
    return KIF(k, i, f)


def _figures(read: trees.Forest, made: trees.QuantizedForest, samples: _Samples) -> dict[str, Any]:
    exact, ours = trees.scores(read, samples.x), trees.scores(made.forest, trees.encode(made, samples.x))
    error = np.abs(exact - ours)
    found: dict[str, Any] = {
        "features": read.features,
        "outputs": len(read.base),
        "trees": {"float": len(read.root), "quantized": len(made.forest.root)},
        "splits": {"float": int((read.feature >= 0).sum()), "quantized": int((made.forest.feature >= 0).sum())},
        "depth": {"float": trees.depth(read), "quantized": trees.depth(made.forest)},
        "port": {key: getattr(made.inputs, key).tolist() for key in "kif"},
        "leaves": {key: int(getattr(made.leaves, key)) for key in "kif"},
        "samples": len(samples.x),
        "score_error": {"mean": float(error.mean()), "largest": float(error.max())},
    }
    if samples.y is not None:
        found["metric"] = samples.metric
        found |= {name: _score(s, samples) for name, s in (("float", exact), ("quantized", ours))}
    return found


def _score(s: np.ndarray, samples: _Samples) -> float:
    if samples.metric == "accuracy":
        return float(np.mean((s.argmax(1) if s.shape[1] > 1 else s[:, 0] > 0) == samples.y))
    return float(np.sqrt(np.mean((s - np.reshape(np.asarray(samples.y), s.shape)) ** 2)))


def _size(forest: trees.Forest) -> str:
    return f"{len(forest.root)} trees of depth {trees.depth(forest)}, {int((forest.feature >= 0).sum())} splits"


def _proved(
    design: _Design, made: trees.QuantizedForest, x: np.ndarray, folder: Path, vectors: int, seed: int, log: Log
) -> dict[str, Any]:
    """rtl/comb and rtl/pipelined, compared with the forest; {"mismatches", "vectors", "outputs", "skipped"}."""
    missing = "; ".join(sim.missing_tools())
    rtls = _write(design, folder)
    with phase(log, "verify") as remarks, tempfile.TemporaryDirectory(prefix="pquant-sim-") as work:
        found = trees.prove(
            made, x[:vectors], graph=design.graph, comb=design.comb, backend=design.package, rtls={} if missing else rtls,
            vectors=vectors, seed=seed, work=work,
        )  # fmt: skip
        compared = ", ".join(found["mismatches"])
        remarks.append(f"0 of {found['vectors']:,} vectors x {found['outputs']} outputs differ ({compared})")
        if missing:
            remarks.append(f"no simulation: {missing}")
    found["mismatches"] |= {name: None for name in rtls if name not in found["mismatches"]}
    for project in (folder / "rtl").iterdir():
        quoted(project, {key: found[key] for key in ("mismatches", "vectors")})
    return found | {"skipped": {"simulation": missing} if missing else {}}


def _write(design: _Design, folder: Path) -> dict[str, RTLInfo]:
    made = {}
    for kind, cutoff in (("comb", -1.0), ("pipelined", design.cut.cutoff)):
        project = write_project(
            design.graph, design.comb, folder / "rtl" / kind, name=design.name, backend=design.package, latency_cutoff=cutoff,
            clock_period=design.cut.clock_ns, vectors=[design.inputs], origin=design.origin, source=SOURCE,
        )  # fmt: skip
        made[f"rtl_{kind}"] = project.rtl["verilog"]
    return made
