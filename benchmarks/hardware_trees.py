"""A forest of 50 trees of depth 4 on the jets: scikit-learn, quantized, as a netlist, pruned to a quarter of its cost.

    python benchmarks/hardware_trees.py [--plot]

10 rounds of gradient boosting with 5 classes.  The oracle is scikit-learn's own object with the quantized thresholds and
leaves written into its arrays; emulator, da4ml and both simulated RTL are compared with the quantized forest on the test
set and on random codes of the whole port.  `--plot` writes results/trees.png: accuracy over look-up tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pquant_jax as pq
from pquant_jax import trees
from pquant_jax.lower import synth
from pquant_jax.lower.backends import da4ml

PORT, LEAF_BITS, PRUNE_TO, CUTOFF, VECTORS = pq.InputSpec(1, 5, 10), 8, 0.25, 5.0, 12_000
LOWEST = 0.1  # of the accuracy that the plot follows a forest down to
RESULTS = Path(__file__).with_name("results")


def trained(data: pq.data.Dataset) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier

    model = GradientBoostingClassifier(n_estimators=10, max_depth=4, learning_rate=0.4, random_state=0)
    return model.fit(data.train.x, data.train.y)


def rewritten(model: Any, made: trees.QuantizedForest) -> Any:
    """scikit-learn's boosted model with the numbers of the unpruned `made` in it, without rate and prior: scores less base."""
    other = copy.deepcopy(model)
    other.learning_rate, other.init_ = 1.0, "zero"
    for start, estimator in zip(made.forest.root, other.estimators_.ravel(), strict=True):
        own = slice(start, start + estimator.tree_.node_count)
        estimator.tree_.threshold[:] = made.forest.threshold[own]
        estimator.tree_.value[:, 0, 0] = made.forest.value[own]
    return other


def accuracy(made: trees.QuantizedForest, split: pq.data.Split) -> float:
    return float(np.mean(trees.scores(made.forest, trees.encode(made, split.x)).argmax(1) == split.y))


def hardware(made: trees.QuantizedForest, data: pq.data.Dataset, others: dict[str, Any]) -> dict[str, Any]:
    """Cost, latency and LUTs of the netlist, and its mismatches."""
    graph = trees.to_graph(made)
    comb = da4ml.to_comb(graph)
    with tempfile.TemporaryDirectory() as folder:
        rtls = {
            name: da4ml.write_rtl(comb, Path(folder) / name, name="forest", latency_cutoff=cutoff)
            for name, cutoff in (("rtl_comb", -1.0), ("rtl_pipelined", CUTOFF))
        }
        found = trees.prove(made, data.test.x, graph=graph, comb=comb, rtls=rtls, others=others, vectors=VECTORS, work=folder)
        cells = synth.synth(rtls["rtl_pipelined"])
    return {
        "accuracy": accuracy(made, data.test),
        "trees": len(made.forest.root),
        "splits": int((made.forest.feature >= 0).sum()),
        "comparisons": next((n.shape[0] for n in graph.nodes if n.name == "trees/compare"), 0),
        "estimate": trees.luts(made),
        "da4ml_cost": float(comb.cost),
        "latency_units": float(max(comb.latency)),
        "cycles": rtls["rtl_pipelined"].latency_cycles,
        "yosys": {key: cells[key] for key in ("lut", "ff", "carry", "dsp", "bram")},
        **found,
    }


def lines() -> Iterator[dict[str, Any]]:
    """{"name", "figure", "holds", and the figures} for the whole forest and for the one pruned to a quarter."""
    data = pq.data.jets()
    model = trained(data)
    forest = trees.from_sklearn(model)
    float_accuracy = float(np.mean(model.predict(data.test.x) == data.test.y))
    margins = float(np.abs(trees.scores(forest, data.test.x) - model.decision_function(data.test.x)).max())
    made = trees.quantize(forest, PORT, leaves=LEAF_BITS)
    oracle = rewritten(model, made)
    row = hardware(made, data, {"scikit-learn": lambda x: oracle.decision_function(x) + made.forest.base})
    row |= {"float_accuracy": float_accuracy, "float_margin_error": margins}
    whole = (len(forest.root), trees.depth(forest)) == (50, 4)
    exact = not any(row["mismatches"].values()) and margins < 1e-12
    yield {
        "name": f"forest of {len(forest.root)} trees of depth {trees.depth(forest)} on the jets: 0 mismatches",
        "figure": _figure(row, float_accuracy),
        "holds": whole and exact and row["accuracy"] > float_accuracy - 0.01,
        **row,
    }
    budget = PRUNE_TO * trees.luts(trees.simplify(made))
    pruned = trees.prune(made, data.train.x, data.train.y, budget=budget, loss="softmax").made
    less = hardware(pruned, data, {})
    small = less["accuracy"] > float_accuracy - 0.01 and less["da4ml_cost"] < row["da4ml_cost"] / 2
    yield {
        "name": f"the same forest pruned to {PRUNE_TO:.0%} of the estimated LUTs: 0 mismatches, less than 1 point lost",
        "figure": _figure(less, float_accuracy),
        "holds": not any(less["mismatches"].values()) and small,
        **less,
    }


def _figure(row: dict[str, Any], float_accuracy: float) -> str:
    cells = row["yosys"]
    return (
        f"{sum(row['mismatches'].values())} mismatches of {', '.join(row['mismatches'])} in {row['vectors']:,} vectors; "
        f"accuracy {row['accuracy']:.4f} (float {float_accuracy:.4f}); {row['splits']} splits, {row['comparisons']} comparisons; "
        f"da4ml {row['da4ml_cost']:,.0f}, latency {row['latency_units']:g}, {row['cycles']} cycles; "
        f"Yosys {cells['lut']:,} LUT, {cells['ff']:,} FF, {cells['carry']:,} CARRY4"
    )


def plot(path: Path) -> list[dict[str, float]]:
    """Test accuracy over da4ml's cost along `prune_path`, for three ports, down to 10 points less; returns the points."""
    import matplotlib

    from pquant_jax.report._style import CYCLE, MUTED, STYLE, log_axis

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = pq.data.jets()
    model = trained(data)
    forest = trees.from_sklearn(model)
    points, level = [], float(np.mean(model.predict(data.test.x) == data.test.y))
    for port in (PORT, pq.InputSpec(1, 4, 6), pq.InputSpec(1, 3, 4)):
        name = f"fixed<{port.k + port.i + port.f},{port.k + port.i}> inputs"
        path_of = trees.prune_path(
            trees.quantize(forest, port, leaves=LEAF_BITS), data.train.x, data.train.y, loss="softmax", step=0.1
        )
        for point in path_of:
            reached = accuracy(point.made, data.test)
            if reached < level - LOWEST:
                break
            cost = float(da4ml.to_comb(trees.to_graph(point.made)).cost)
            points.append({"port": name, "cost": cost, "accuracy": reached})
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4.6), constrained_layout=True)
        axis.axhline(100 * level, color=MUTED, lw=1, ls="--")
        axis.annotate(f"scikit-learn, float: {level:.1%}", (0.01, 100 * level), (0, -12), xycoords=("axes fraction", "data"),
                      textcoords="offset points", color=MUTED)  # fmt: skip
        for name, colour, mark in zip(dict.fromkeys(p["port"] for p in points), CYCLE, "os^", strict=False):
            own = [p for p in points if p["port"] == name]
            axis.plot([p["cost"] for p in own], [100 * p["accuracy"] for p in own], marker=mark, ms=4, color=colour, label=name)
        axis.set_xscale("log")
        costs = [p["cost"] for p in points]
        log_axis(axis.xaxis, 1, 99)  # ticks at 1, 2, 5 over these two decades and a half
        axis.set_xlim(0.8 * min(costs), 1.25 * max(costs))
        axis.set(
            xlabel="da4ml cost (LUTs)", ylabel="test accuracy, %", title="50 trees of depth 4 on the jets, pruned by loss per LUT"
        )
        axis.legend(loc="lower right")
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return points


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true")
    if parser.parse_args().plot:
        plot(RESULTS / "trees.png")
    else:
        for line in lines():
            print(json.dumps(line))
