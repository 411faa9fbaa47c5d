"""FITCompress and HAWQ against uniform bits of at least the same operations, and FITCompress at PQuantML's goal.

    python benchmarks/bench_search.py [--seeds 0 1 2] [--json OUT]

The embedded jets, 16-64-32-32-5.  Each seed: a float model; then, from its weights, uniform bits (all kernels and
activations b bits wide), HAWQ with that many BOPs, FITCompress with that many EBOPs (its pruned weights cost nothing),
and FITCompress at ratio 0.0075, which counts the bits of the kept weights relative to 32 bits of all, beside the
unpruned model at 8 bits: once in one search, once in two with a fine-tuning between them.  All are measured as found and
after fine-tuning, of equally many epochs in what is compared; formats come from the same search.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import jax
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax.lower import trace
from pquant_jax.lower.backends import da4ml
from pquant_jax.train import accuracy, average, cross_entropy
from pquant_jax.zoo import mlp

SEEDS = (0, 1, 2)
BITS = (4, 5)  # of the uniform models
HALFWAY, GOAL = 0.03, 0.0075  # GOAL: compression_goal of PQuantML's table
PRETRAIN, FINETUNE, BETWEEN, LONG = 40, 10, 40, 150  # epochs; the table's models get BETWEEN + LONG
BATCH = 256


def rate(epochs: int, samples: int, start: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(start, epochs * (samples // BATCH), 0.03))


def pretrained(inst: pq.Instrumented, data: pq.data.Dataset, seed: int) -> Any:
    """Weights of a float model, from an initialisation of this seed."""
    model = pq.from_linen(mlp(), data.train.x[:2], rng=jax.random.key(seed))
    plan = pq.Plan(pretrain=PRETRAIN, train=0, finetune=0)
    tx = rate(PRETRAIN, len(data.train.y), 3e-3)
    fitted = pq.fit(inst, data, plan=plan, optimizer=tx, batch_size=BATCH, seed=seed, params=model.params)
    return fitted.state.params.model


def measured(inst: pq.Instrumented, view: pq.View, split: Any) -> tuple[float, float]:
    """(loss, accuracy) of the inference forward."""
    y, _ = jax.jit(lambda v, x: inst.forward(v, inst.model.state, x))(view, split.x)
    return float(average(cross_entropy(y, split.y), None)), float(average(accuracy.function(y, split.y), None))


def tuned(inst: pq.Instrumented, data: pq.data.Dataset, found: Any, params: Any, epochs: int, seed: int) -> pq.View:
    """The view after fine-tuning with the found masks and formats held still."""
    compression = pq.search.compression(inst, found)
    tx = pq.optimizer(compression, weights=rate(epochs, len(data.train.y), 5e-3))
    plan = pq.Plan(pretrain=0, train=0, finetune=epochs)
    return pq.fit(inst, data, plan=plan, compression=compression, optimizer=tx, batch_size=BATCH, seed=seed, params=params).view


def row(
    method: str, inst: pq.Instrumented, data: pq.data.Dataset, found: Any, params: Any, *, seed: int, limit: float, epochs: int
) -> dict[str, Any]:
    """One line of the table.  limit: what the EBOPs, measured again after fine-tuning, must not exceed."""
    compression = pq.search.compression(inst, found)
    attached = compression.attach(params)
    loss, _ = measured(inst, compression.apply(attached, compression.init(attached))[0], data.val)
    view = tuned(inst, data, found, params, epochs, seed)
    tuned_loss, tuned_accuracy = measured(inst, view, data.val)
    ebops = float(inst.ebops(view))
    return {
        "method": method, "seed": seed, "limit": limit, "ebops": ebops, "within": ebops <= limit,
        "loss": loss, "tuned_loss": tuned_loss, "tuned_accuracy": tuned_accuracy,
        "test_accuracy": measured(inst, view, data.test)[1],
        "bits": {name: width for name, width in found.bits.items() if not name.endswith("bias")},
        "view": view,
    }  # fmt: skip


def uniform_rows(inst: pq.Instrumented, data: pq.data.Dataset, params: Any, bits: int, seed: int) -> list[dict[str, Any]]:
    """Uniform bits, HAWQ with as many BOPs, FITCompress with as many EBOPs."""
    uniform = pq.search.hawq(inst, params, data.train, bops=1e30, widths=[bits], activations=[bits], probes=2)
    limit = uniform.bops
    hawq = pq.search.hawq(inst, params, data.train, bops=limit, activations=range(3, 9), seed=seed)
    fit = pq.search.fitcompress(inst, params, data.train, ebops=limit, activations=bits + 1)
    arguments = dict(seed=seed, limit=limit, epochs=FINETUNE)
    named = {f"uniform {bits} bits": uniform, f"HAWQ, BOPs of {bits} bits": hawq, f"FITCompress, EBOPs of {bits} bits": fit}
    return [row(name, inst, data, found, params, **arguments) for name, found in named.items()]


def table_rows(inst: pq.Instrumented, data: pq.data.Dataset, params: Any, seed: int) -> list[dict[str, Any]]:
    """FITCompress at PQuantML's goal beside the unpruned model at 8 bits, with da4ml's cost of both netlists."""
    eight = pq.search.hawq(inst, params, data.train, bops=1e30, widths=[8], activations=[8], probes=2)
    once = pq.search.fitcompress(inst, params, data.train, ratio=GOAL)
    half = pq.search.fitcompress(inst, params, data.train, ratio=HALFWAY)
    settled = tuned(inst, data, half, params, BETWEEN, seed).model
    twice = pq.search.fitcompress(inst, settled, data.train, ratio=GOAL)
    models = {
        "unpruned, 8 bits": (eight, params, BETWEEN + LONG),
        f"FITCompress, ratio {GOAL}": (once, params, BETWEEN + LONG),
        f"FITCompress, ratio {HALFWAY}, {GOAL}": (twice, settled, LONG),
    }
    rows = []
    for name, (found, start, epochs) in models.items():
        made = row(name, inst, data, found, start, seed=seed, limit=found.ebops, epochs=epochs)
        cost = float(da4ml.to_comb(trace(inst, made["view"], inst.model.state)).cost)
        rows.append({**made, "cost": cost, "ratio": getattr(found, "ratio", 8 / 32)})
    return rows


def run(seeds: tuple[int, ...] = SEEDS, *, bits: tuple[int, ...] = BITS, table: bool = True) -> list[dict[str, Any]]:
    """Every row; "loss" is the validation loss as found, "tuned_*" after fine-tuning, "cost" da4ml's."""
    data = pq.data.jets()
    inst = pq.instrument(mlp(), data.train.x[:2])
    rows = []
    for seed in seeds:
        params = pretrained(inst, data, seed)
        for width in bits:
            rows += uniform_rows(inst, data, params, width, seed)
        rows += table_rows(inst, data, params, seed) if table else []
    return [{key: v for key, v in r.items() if key != "view"} for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--json", help="write the rows here as well")
    args = parser.parse_args()
    start = time.perf_counter()
    rows = run(tuple(args.seeds))
    print(f"{'method':34} seeds    EBOPs   limit  loss found  tuned   val acc  test acc  da4ml cost")
    for method in dict.fromkeys(r["method"] for r in rows):
        same = [r for r in rows if r["method"] == method]
        mean = {key: np.mean([r.get(key, np.nan) for r in same]) for key in same[0] if key not in ("method", "bits")}
        print(
            f"{method:34} {len(same):5} {mean['ebops']:8.0f} {mean['limit']:7.0f} {mean['loss']:11.4f} {mean['tuned_loss']:.4f}"
            f" {mean['tuned_accuracy']:9.4f} {mean['test_accuracy']:9.4f} {mean.get('cost', np.nan):11.0f}"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
