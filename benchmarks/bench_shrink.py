"""Outputs identical, LUTs lower: a structured-pruned jet classifier with and without its dead channels.

    python benchmarks/bench_shrink.py [--seed 0] [--epochs 30] [--json OUT]

16-64-32-32-5, 6-bit weights, half of the neurons of every hidden layer pruned (magnitude, groups="out"; the bias of a
pruned neuron stays, so that it is a constant).  Measured on one trained model: the netlist of the graph as it was traced
(`keep_dead=True`) against the one that is written by default, da4ml cost and, where Yosys is installed, LUTs; and the
parameters of `pq.shrink`.  All outputs are compared with the emulator of the untouched graph, and that with the JAX forward.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax import lower, zoo
from pquant_jax.lower import synth
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.dead import channels
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

HIDDEN = (64, 32, 32)
VECTORS = 10_000


def trained(seed: int, epochs: int) -> tuple[pq.Instrumented, pq.Result, pq.data.Dataset]:
    """The pruned and quantized classifier."""
    data = pq.data.jets()
    x = data.train.x[:1]
    model = pq.from_linen(zoo.mlp(HIDDEN, 5), x, rng=jax.random.key(seed))
    inst = pq.instrument(model, x)
    half = pq.prune.magnitude(sparsity=0.5, groups="out", roles=inst.roles)
    weights, activations = pq.quantize.Format(1, 4, overflow="SAT_SYM"), pq.quantize.Format(3, 4)
    compression = pq.chain(
        pq.masked(half, "Dense_[0-2]/.*"), pq.quantize.fixed(inst.sites, weights=weights, activations=activations)
    )
    plan = pq.Plan(pretrain=epochs // 3, train=epochs // 3, finetune=epochs - 2 * (epochs // 3))
    result = pq.fit(
        inst, data, plan=plan, compression=compression, seed=seed, optimizer=pq.optimizer(compression, weights=optax.adam(3e-3))
    )
    return inst, result, data


def run(seed: int = 0, epochs: int = 30) -> dict[str, Any]:
    """The figures, with and without dead channels: cost, lut (None without Yosys), channels, parameters; wrong outputs.

    holds: no output differs, and every figure is lower without them.
    """
    inst, result, data = trained(seed, epochs)
    state = result.state.model_state
    graph = lower.trace(inst, result.view, state)
    inputs = port_grid(graph, VECTORS, np.random.default_rng(seed))
    inputs = [np.concatenate([inst.encode(data.test.x)[:VECTORS].astype(np.float64), v]) for v in inputs]
    expected = flatten_batch(emulate(graph, inputs))
    found: dict[str, Any] = {"seed": seed, "epochs": epochs, "vectors": len(expected), "accuracy": result.best["val_metric"]}
    wrong = {"jax": lower.forward_outputs(inst, result.view, state, inputs)}
    with tempfile.TemporaryDirectory(prefix="pquant-shrink-") as folder:
        for name, keep_dead in (("with", True), ("without", False)):
            comb = da4ml.to_comb(graph, keep_dead=keep_dead)
            wrong[f"da4ml {name}"] = da4ml.predict(comb, flatten_batch(inputs))
            rtl = da4ml.write_rtl(comb, Path(folder) / name, name="jets", latency_cutoff=5)
            found[name] = {"cost": float(comb.cost), "lut": None if synth.missing_tools() else synth.synth(rtl)["lut"]}
    small = pq.shrink(inst, result.view, state)
    again = pq.instrument(small.model, data.train.x[:1])
    wrong["shrink"] = lower.forward_outputs(again, small.view, small.model.state, inputs)
    for name, kept_graph, tree in (("with", graph, result.view.model), ("without", lower.remove_dead(graph), small.model.params)):
        found[name]["channels"] = channels(kept_graph)
        found[name]["parameters"] = sum(int(np.size(v)) for v in jax.tree.leaves(tree))
    found["wrong"] = {name: int((v != expected).sum()) for name, v in wrong.items()}
    lower_figures = (found["without"][k] < v for k, v in found["with"].items() if v is not None)
    return {**found, "holds": not any(found["wrong"].values()) and all(lower_figures)}


def shrink_line(figures: dict[str, Any]) -> tuple[str, str, bool]:
    """(what is promised, its figure, whether it holds) for the acceptance table."""
    a, b = figures["with"], figures["without"]
    luts = "no Yosys" if a["lut"] is None else f"{a['lut']:,} -> {b['lut']:,} LUT"
    text = (
        f"{sum(figures['wrong'].values())} of {figures['vectors']:,} x 5 outputs differ; {luts}, da4ml cost {a['cost']:,.0f} -> "
        f"{b['cost']:,.0f}, channels {a['channels']} -> {b['channels']}, pq.shrink {a['parameters']:,} -> {b['parameters']:,} "
        "parameters"
    )
    return "shrink and dead-channel removal: outputs identical, LUTs lower", text, bool(figures["holds"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = run(args.seed, args.epochs)
    print(": ".join(shrink_line(figures)[:2]))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
