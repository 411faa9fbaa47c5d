"""Every model of the zoo, trained under compression and turned into a netlist that is compared bit by bit.

    python benchmarks/zoo.py [NAME ...] [--no-rtl] [--json OUT]

Each takes about a minute on one core: few epochs on few data, so the metrics are those of a smoke test, not of a paper.
JAX forward, emulator, da4ml and (where its netlist is built in minutes) Verilator are compared on test data and random
codes of the whole port.  The CNN reads mnist.npz from the folder that PQUANT_DATA names, and is left out with a reason where
there is none.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from zoo_entries import ENTRIES, Entry

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax._errors import DataError, LoweringError, PQuantError
from pquant_jax.graph import as_model

CHUNK, VECTORS, CUTOFF = 1000, 4000, 5.0


class Trained(NamedTuple):
    """A finished model and what it was trained with."""

    inst: pq.Instrumented
    view: pq.View
    state: Any
    data: pq.data.Dataset


def instrumented(entry: Entry) -> tuple[pq.Instrumented, pq.data.Dataset]:
    """The model of `entry` and its data; outputs that are exported in part have no format."""
    data = entry.data()
    x = jax.tree.map(lambda v: v[:2], data.train.x)
    given = {} if entry.outputs is None or entry.export is not None else {"outputs": entry.outputs}
    return pq.instrument(as_model(entry.build(), x), x, inputs=entry.inputs, **given), data


def train(entry: Entry, *, seed: int = 0, scale: float = 1.0) -> Trained:
    """Train the model of `entry`.  scale: of its epochs, at least one of each stage that has any."""
    inst, data = instrumented(entry)
    compression = entry.compression(inst)
    plan = pq.Plan(*(max(1, round(scale * n)) if n else 0 for n in entry.epochs))
    samples = len(jax.tree.leaves(data.train.y)[0])
    steps = (plan.pretrain + plan.train + plan.finetune) * (samples // entry.batch)
    rate = optax.cosine_decay_schedule(entry.rate, max(steps, 1), alpha=0.03)
    tx = pq.optimizer(compression, weights=optax.adam(rate), bits=optax.adam(3e-3), duals=optax.sgd(1e-2))
    parts = dict(loss=entry.loss, metric=entry.metric, plan=plan, compression=compression, optimizer=tx)
    result = pq.fit(inst, data, batch_size=entry.batch, seed=seed, **parts)
    return Trained(inst, result.view, result.state.model_state, data)


def float_model(name: str, *, seed: int = 0) -> tuple[pq.Instrumented, Any, pq.data.Dataset, Entry]:
    """(inst, parameters, data, entry) of a model trained without compression, for scans."""
    entry = ENTRIES[name]
    inst, data = instrumented(entry)
    result = pq.fit(
        inst, data, batch_size=entry.batch, seed=seed, loss=entry.loss, metric=entry.metric,
        plan=pq.Plan(sum(entry.epochs), 0, 0), optimizer=optax.adam(entry.rate),
    )  # fmt: skip
    return inst, result.state.params.model, data, entry


def exported(entry: Entry, trained: Trained) -> Trained:
    """The part of the model that becomes hardware, with the formats it was trained with."""
    if entry.export is None:
        return trained
    view = trained.view
    part = entry.export(trained.inst.model._replace(params=view.model))
    inst = pq.instrument(part, jax.tree.map(lambda v: v[:2], trained.data.train.x), inputs=entry.inputs)
    sites = {name: view.sites[name] for name in inst.sites}
    masks = {path: m for path, m in view.masks.items() if path in inst.sites}
    return Trained(inst, pq.View(part.params, sites, masks), part.state, trained.data)


def graphs(names: Sequence[str] = (), *, scale: float = 1.0) -> dict[str, lower.Graph]:
    """{name: graph} of the models `names`, trained in `scale` of their epochs; of all that can be lowered and have data."""
    made = {}
    for name in names or ENTRIES:
        entry = ENTRIES[name]
        if entry.refused:
            continue
        try:
            inst, view, state, _ = exported(entry, train(entry, scale=scale))
        except DataError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        made[name] = lower.trace(inst, view, state)
        jax.clear_caches()  # no model comes twice
        gc.collect()
    return made


def outputs(inst: pq.Instrumented, view: pq.View, state: Any, graph: lower.Graph, x: Any) -> Any:
    """The emulator's outputs for all samples of x, in the structure of the model's."""
    ports = [np.asarray(v, np.float64) for v in jax.tree.leaves(inst.encode(x))]
    parts = [lower.emulate(graph, [v[a : a + CHUNK] for v in ports]) for a in range(0, len(ports[0]), CHUNK)]
    shape = jax.eval_shape(lambda v: inst.forward(view, state, v)[0], inst.sample)
    return jax.tree.unflatten(jax.tree.structure(shape), [np.concatenate(v) for v in zip(*parts, strict=True)])


def run(name: str, *, rtl: bool = True, seed: int = 0, scale: float = 1.0, netlist: bool = True) -> dict[str, Any]:
    """Train, lower and compare the model `name` of `ENTRIES`; a dict of figures.

    metric: of the emulator on the test set.  mismatches: {"emulator" (the JAX forward against it), "da4ml", "rtl_comb",
    "rtl_pipelined"}, None where not run.  skipped: why nothing was done, where data are missing.  error: what went wrong,
    or, for a model that must be refused, the refusal.  holds: trained, lowered, nothing differs.
    netlist: without it only JAX and the emulator are compared.
    """
    entry, start, cpu = ENTRIES[name], time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"name": name, "seconds": {}, "holds": False}
    try:
        _measure(entry, found, rtl=rtl and entry.rtl, seed=seed, scale=scale, netlist=netlist)
        found["holds"] = all(n == 0 for n in found["mismatches"].values() if n is not None) and not entry.refused
    except DataError as error:
        found |= {"skipped": str(error), "holds": True}
    except PQuantError as error:
        found |= {"error": f"{type(error).__name__}: {error}", "holds": _refused(entry, error)}
    found["seconds"] |= {"all": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return found


def _measure(entry: Entry, found: dict[str, Any], *, rtl: bool, seed: int, scale: float, netlist: bool) -> None:
    """Every figure goes into `found` as soon as it is known."""
    start = time.perf_counter()
    trained = train(entry, seed=seed, scale=scale)
    found["seconds"]["train"] = time.perf_counter() - start
    found["weights"] = sum(int(np.size(v)) for v in jax.tree.leaves(trained.inst.model.params))
    inst, view, state, data = exported(entry, trained)
    found |= {"products": round(inst.reference8 / 64), "ebops": float(jax.jit(inst.ebops)(view))}
    begin = time.perf_counter()
    graph = lower.trace(inst, view, state)
    found["seconds"]["trace"] = time.perf_counter() - begin
    made = outputs(inst, view, state, graph, data.test.x)
    found["metric"] = _figure(entry, made, data)
    found |= _compared(found["name"], graph, inst, view, state, data, rtl=rtl, netlist=netlist, seconds=found["seconds"])


def _refused(entry: Entry, error: PQuantError) -> bool:
    """Is this the refusal that the entry asks for?"""
    return bool(entry.refused) and isinstance(error, LoweringError) and all(word in str(error) for word in entry.refused)


def _figure(entry: Entry, made: Any, data: pq.data.Dataset) -> dict[str, float]:
    if entry.score is not None:
        return {"auc": entry.score(made, data)}
    return {entry.metric.name: float(np.mean(np.asarray(entry.metric.function(made, data.test.y))))}


def _compared(
    name: str, graph: lower.Graph, inst: pq.Instrumented, view: pq.View, state: Any, data: pq.data.Dataset, *,
    rtl: bool, netlist: bool, seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Mismatches, vectors, cost and latency."""
    from pquant_jax.lower import sim
    from pquant_jax.lower.backends import da4ml

    cost, comb, rtls = {}, None, {}
    x_test = jax.tree.map(lambda v: v[: VECTORS // 2], data.test.x)
    with tempfile.TemporaryDirectory(prefix="pquant-zoo-") as work:
        if netlist:
            begin = time.perf_counter()
            comb = da4ml.to_comb(graph)
            seconds["da4ml"] = time.perf_counter() - begin
            cost["cost"] = float(comb.cost)
            cutoff = CUTOFF if not any(node.op == "mul" for node in graph.nodes) else 2 * CUTOFF  # one multiplier per stage
            made = da4ml.write_rtl(comb, Path(work) / "rtl", name=f"pq_{name}", latency_cutoff=cutoff)
            cost["latency"] = made.latency_cycles
            rtls = {"rtl_pipelined": made} if rtl and not sim.missing_tools() else {}
        begin = time.perf_counter()
        compared = lower.verify(
            graph, inst, view, state, x_test=x_test, vectors=VECTORS, comb=comb, rtls=rtls, work=Path(work) / "sim"
        )
        seconds["verify"] = time.perf_counter() - begin
    return {**cost, **compared}


def text(found: dict[str, Any]) -> str:
    """One line of figures."""
    if "skipped" in found:
        return f"left out: {found['skipped']}"
    parts = [f"{found['weights']:,} weights"] if "weights" in found else []
    parts += [f"{found['products']:,} products, {found['ebops']:,.0f} EBOPs"] if "ebops" in found else []
    parts += [f"{key} {value:.3f}" for key, value in found.get("metric", {}).items()]
    parts += [f"cost {found['cost']:,.0f}, {found['latency']} cycles"] if "cost" in found else []
    if "mismatches" in found:
        wrong = ", ".join(f"{k} {v}" for k, v in found["mismatches"].items() if v is not None)
        parts.append(f"mismatches on {found['vectors']:,} x {found['outputs']}: {wrong}")
    parts.append(" + ".join(f"{k} {v:.0f} s" for k, v in found["seconds"].items()))
    return "; ".join(parts) + (f"; {found['error']}" if "error" in found else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ENTRIES)}; all by default")
    parser.add_argument("--no-rtl", action="store_true", help="leave out the simulation of the Verilog")
    parser.add_argument("--scale", type=float, default=1.0, help="of the epochs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ENTRIES]
    if unknown:
        parser.error(f"no model {unknown[0]!r}, expected some of {', '.join(ENTRIES)}")
    rows = []
    for name in args.names or ENTRIES:
        rows.append(run(name, rtl=not args.no_rtl, scale=args.scale))
        print(f"{'ok  ' if rows[-1]['holds'] else 'FAIL'} {name:<20} {text(rows[-1])}", flush=True)
        jax.clear_caches()
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
