"""Trained tables against trained multipliers: jets, accuracy over LUTs, one run of each with a rising price of bits.

    python benchmarks/bench_tables.py [--seconds 240] [--seed 0] [--json OUT] [--plot OUT]

Tables: `TableDense(16) -> TableDense(5)`, the sums normalised (HGQ-LUT's jet model, arXiv:2604.22293); every edge a network
1 -> 8 -> 1 with bits of its own at both ends, lowered as one table.  Multipliers: 16-64-32-32-5 with HGQ.  Both train for
about as long on the same data (an epoch of tables costs ten of multipliers); beta rises from epoch to epoch, and the
best epochs by validation accuracy at their EBOPs are kept.  Of these some are lowered: test accuracy, da4ml's cost, and
JAX, emulator and da4ml integer by integer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax import lower, zoo
from pquant_jax.lower.backends import da4ml

F = pq.quantize.Format
PORT = pq.InputSpec(1, 3, 6)  # the few values beyond 8 saturate: a table's input needs no bits for them
BATCH, POINTS, VECTORS = 1024, 5, 10_000
TICKS = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
RESULTS = Path(__file__).with_name("results")


class Tables(nn.Module):
    """16 -> 16 -> 5 trained tables."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = pq.nn.TableDense(16, batch_norm=True, momentum=0.9)(x, train)
        return pq.nn.TableDense(5, batch_norm=True, momentum=0.9)(x, train)


class Kept(NamedTuple):
    """An epoch worth keeping: no other is at least as accurate for fewer EBOPs."""

    accuracy: float
    ebops: float
    state: Any


class Recipe(NamedTuple):
    """How one of the two is trained."""

    label: str
    model: Any
    epochs: int  # of a run of 240 seconds
    rate: float
    beta: tuple[float, float]
    formats: dict[str, Any]


TABLE = F(i=0, f=4, overflow="SAT", granularity="element")  # saturation is a matter of the entries, it needs no logic
RECIPES = {
    "tables": Recipe(
        "LUT-trained 16-16-5", Tables(), 100, 5e-3, (5e-6, 2e-3),
        dict(weights=F(2, 6, 1, overflow="SAT_SYM"), activations=F(2, 3, overflow="WRAP"), rules=((".*/table", TABLE),)),
    ),
    "multipliers": Recipe(
        "HGQ 16-64-32-32-5", zoo.mlp((64, 32, 32), 5), 1000, 3e-3, (5e-7, 1e-4),
        dict(weights=F(0, 6, 1, overflow="SAT_SYM"), activations=F(2, 5, overflow="WRAP")),
    ),
}  # fmt: skip


def front(recipe: Recipe, data: pq.data.Dataset, seconds: float, seed: int) -> tuple[Any, Any, list[Kept], dict[str, Any]]:
    """(inst, compression, the kept epochs by EBOPs, {epochs, seconds}) of one run; `seconds` scales its epochs."""
    start = time.perf_counter()
    model = pq.from_linen(recipe.model, data.train.x[:1], rng=jax.random.key(seed))
    inst = pq.instrument(model, data.train.x[:1], inputs=PORT)
    low, high = recipe.beta
    compression = pq.quantize.hgq(inst.sites, beta=low, beta_end=high, cost=inst.ebops, **recipe.formats)

    epochs = max(20, round(recipe.epochs * seconds / 240))
    kept: list[Kept] = []

    def keep(record: dict[str, Any], state: Any) -> None:
        new = Kept(record["val_metric"], record["ebops"], jax.device_get(state))
        if record["stage"] == "train" and not any(k.accuracy >= new.accuracy and k.ebops <= new.ebops for k in kept):
            kept[:] = [k for k in kept if k.accuracy > new.accuracy or k.ebops < new.ebops] + [new]

    dense = max(2, epochs // 20)
    rate = optax.cosine_decay_schedule(recipe.rate, epochs * (len(data.train.y) // BATCH), alpha=0.1)
    pq.fit(
        inst, data, plan=pq.Plan(pretrain=dense, train=epochs - dense, finetune=0), compression=compression, batch_size=BATCH,
        optimizer=pq.optimizer(compression, weights=optax.adam(rate), bits=optax.adam(5e-3)), seed=seed, callbacks=[keep],
    )  # fmt: skip
    kept.sort(key=lambda k: k.ebops)
    return inst, compression, kept, {"epochs": epochs, "seconds": time.perf_counter() - start}


def spread(kept: Sequence[Kept], points: int) -> list[Kept]:
    """Some of the kept epochs, evenly over the logarithm of their EBOPs."""
    wanted = np.geomspace(max(kept[0].ebops, 1.0), kept[-1].ebops, points)
    chosen = {int(np.argmin([abs(np.log(max(k.ebops, 1.0) / w)) for k in kept])) for w in wanted}
    return [kept[n] for n in sorted(chosen)]


def measure(inst: Any, compression: Any, point: Kept, data: pq.data.Dataset, seed: int) -> dict[str, Any]:
    """Test accuracy, da4ml's cost and the integers that differ, of one kept epoch with exact ranges."""
    state = jax.tree.map(jax.numpy.asarray, point.state)
    seen = [jax.tree.map(jax.numpy.asarray, inst.encode(split.x)) for split in (data.train, data.val)]
    state = pq.calibrate(inst, compression, state, seen)
    view = compression.apply(state.params, pq.state_of(state.opt_state))[0]
    view = view._replace(tables=inst.tables(view, state.model_state))
    graph = lower.trace(inst, view, state.model_state)
    comb = da4ml.to_comb(graph, solver_options={"hard_dc": 2})
    counts = lower.verify(
        graph, inst, view, state.model_state, x_test=data.test.x, vectors=VECTORS, seed=seed, comb=comb
    )  # raises where one integer differs
    logits = lower.forward_outputs(inst, view, state.model_state, [inst.encode(data.test.x)])
    tables = [n for n in graph.nodes if n.op == "table"]
    wide = [np.maximum(n.attrs["k"] + n.attrs["i"] + n.attrs["f"], 0) for n in tables]
    return {
        "accuracy": float(np.mean(np.argmax(logits, 1) == data.test.y)),
        "ebops": float(inst.ebops(view)),
        "cost": float(comb.cost),
        "latency": float(max(comb.latency)),
        "tables": sum(int(t.num) for t in map(_used, tables)),
        "table_bits": [float(np.mean(w[w > 0])) if (w > 0).any() else 0.0 for w in wide],
        "mismatches": {n: v for n, v in counts["mismatches"].items() if v is not None},
        "vectors": counts["vectors"],
    }


class _Used(NamedTuple):
    num: int


def _used(node: Any) -> _Used:
    """Edges whose table is not one constant."""
    codes = np.asarray(node.attrs["codes"])
    varies = (codes != codes[:, :1]).any(1)
    return _Used(int(varies[np.asarray(node.attrs["which"])].sum()))


def run(seconds: float = 240, seed: int = 0, points: int = POINTS) -> dict[str, Any]:
    """{"rows": per method its points, "holds": no integer differs and tables reach the multipliers' accuracy for fewer LUTs}."""
    data = pq.data.jets()
    rows: dict[str, Any] = {}
    for name, recipe in RECIPES.items():
        inst, compression, kept, figures = front(recipe, data, seconds, seed)
        rows[name] = {
            "label": recipe.label, **figures,
            "points": [measure(inst, compression, point, data, seed) for point in spread(kept, points)],
        }  # fmt: skip
    wrong = sum(n for row in rows.values() for p in row["points"] for n in p["mismatches"].values())
    return {"rows": rows, "mismatches": wrong, "seconds": seconds, "seed": seed, **compared(rows), "holds": wrong == 0}


def compared(rows: dict[str, Any]) -> dict[str, float]:
    """At the accuracy that both reach: the LUTs of the multipliers over those of the tables."""
    fronts = {name: sorted((p["accuracy"], p["cost"]) for p in row["points"]) for name, row in rows.items()}
    level = min(max(a for a, _ in f) for f in fronts.values()) - 0.005
    cheapest = {name: min(c for a, c in f if a >= level) for name, f in fronts.items()}
    return {
        "level": level,
        "ratio": cheapest["multipliers"] / cheapest["tables"],
        **{f"cost_{n}": c for n, c in cheapest.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=RESULTS / "tables.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "tables.png")
    args = parser.parse_args()
    report = run(args.seconds, args.seed)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    picture(report, args.plot)
    for row in report["rows"].values():
        print(f"{row['label']}: {row['epochs']} epochs in {row['seconds']:.0f} s")
        for p in row["points"]:
            print(f"  accuracy {p['accuracy']:.4f}  EBOPs {p['ebops']:8.0f}  cost {p['cost']:7.0f}  mismatches {p['mismatches']}")


def picture(report: dict[str, Any], path: Path) -> None:
    """Test accuracy over da4ml's cost and over EBOPs, one line per method.  Raises: ToolError without matplotlib."""
    import matplotlib

    from pquant_jax.report._style import BLUE, INK, MUTED, STYLE, VERMILION

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.9), constrained_layout=True, sharey=True)
        for axis, key, label in zip(axes, ("cost", "ebops"), ("da4ml cost (LUTs)", "EBOPs, tables counted as LUTs"), strict=True):
            for row, colour, mark in zip(report["rows"].values(), (VERMILION, BLUE), ("o", "s"), strict=True):
                own = sorted(row["points"], key=lambda p: p[key])
                x, y = [p[key] for p in own], [100 * p["accuracy"] for p in own]
                axis.plot(x, y, color=colour, marker=mark, ms=5.5, label=f"{row['label']} ({row['epochs']} epochs)")
            reach = [point[key] for row in report["rows"].values() for point in row["points"]]
            shown = [t for t in TICKS if min(reach) / 1.5 <= t <= 1.5 * max(reach)]
            shown = shown if len(shown) < 8 else [t for t in shown if str(t)[0] == "1"]
            axis.set_xscale("log")
            axis.set_xticks(shown, [f"{t:,}" for t in shown])  # STYLE takes no mathematics, which the default labels are
            axis.set_xticks([], minor=True)
            axis.set_xlim(min(reach) / 1.3, 1.3 * max(reach))
            axis.set_xlabel(f"{label}, log scale", color=MUTED)
        axes[0].set_ylabel("test accuracy, %", color=MUTED)
        axes[0].legend(loc="lower right")
        figure.suptitle(
            "Embedded jets, one run each with a rising price of bits; every point bit-exact in JAX, emulator and da4ml",
            color=INK, x=0.01, ha="left", fontsize=10, fontweight="bold",
        )  # fmt: skip
        figure.savefig(path, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    main()
