"""Seconds per epoch of the compressed step against the plain float step, in one run, as ratios.

    python benchmarks/bench_step.py [--config configs/jets_hgq.yaml] [--pairs 15] [--json OUT]

200,000 samples, 16 features, batch 1,024 and 33,200.  The data are shuffled beforehand, so that both clocks time the
same scan; float and compressed epochs, compiled alike, alternate and the ratio is taken pair by pair.  Each batch size
runs on one thread and on all (XLA reads NPROC once, hence a process each); the row that counts, *, is the one where the
float epoch is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax import config
from pquant_jax._base import Stage
from pquant_jax.train import Batch, compile_epoch, cross_entropy, init_state, make_step

SAMPLES = 200_000
BATCHES = (1024, 33_200)
MEMBERS = 8


def batches(inst: pq.Instrumented, batch_size: int, seed: int = 0) -> Batch:
    """Random data on the input port, as a stack of batches."""
    rng = np.random.default_rng(seed)
    steps = SAMPLES // batch_size
    x = inst.encode(rng.normal(size=(steps * batch_size, 16)).astype(np.float32))
    y = rng.integers(0, 5, steps * batch_size).astype(np.int32)
    return Batch(jnp.asarray(x.reshape(steps, batch_size, 16)), jnp.asarray(y.reshape(steps, batch_size)))


def scan_of(step: Callable) -> Callable:
    """(state, batches) -> state: one epoch in the training stage."""

    def epoch(state: Any, data: Batch) -> Any:
        return jax.lax.scan(lambda s, b: step(s, b, jnp.int32(Stage.TRAIN)), state, data)[0]

    return epoch


def float_step(inst: pq.Instrumented, tx: optax.GradientTransformation) -> tuple[Callable, Any]:
    """What one writes without this package: value_and_grad and optax on the model itself."""

    def step(state: Any, batch: Batch, stage: jax.Array) -> tuple[Any, jax.Array]:
        del stage
        params, opt_state = state

        def objective(p: Any) -> jax.Array:
            y, _ = inst.model.forward(p, inst.model.state, batch.x, train=True, rng=None)
            return jnp.mean(cross_entropy(y, batch.y))

        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return step, (inst.model.params, tx.init(inst.model.params))


def seconds(function: Callable, *args: Any) -> float:
    """Wall-clock of one call, to the end of the computation."""
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def measure(experiment: Any, batch_size: int, pairs: int) -> dict[str, Any]:
    """All figures of one batch size."""
    x = np.zeros((2, 16), np.float32)
    inst = pq.instrument(config.model(experiment, x, 5), x, inputs=config.input_spec(experiment))
    compression = config.compression(experiment, inst)
    total = SAMPLES // batch_size
    tx = config.optimizer(experiment, compression, total)
    data = batches(inst, batch_size)
    plain_step, plain_state = float_step(inst, config.weights_optimizer(experiment, total))
    step = make_step(inst, compression, tx, cross_entropy)
    state = init_state(inst, compression, tx, seed=0)
    plain, compressed = compile_epoch(scan_of(plain_step)), compile_epoch(scan_of(step))
    first = {"float": seconds(plain, plain_state, data), "compressed": seconds(compressed, state, data)}
    both = np.array([(seconds(plain, plain_state, data), seconds(compressed, state, data)) for _ in range(pairs)])
    members = jax.tree.map(lambda *v: jnp.stack(v), *(init_state(inst, compression, tx, seed=s) for s in range(MEMBERS)))
    population = compile_epoch(jax.vmap(scan_of(step), in_axes=(0, None)))
    first["population"] = seconds(population, members, data)
    crowd = np.array([seconds(population, members, data) for _ in range(3)])
    ratios = both[:, 1] / both[:, 0]
    return {
        "batch": batch_size,
        "threads": int(os.environ.get("NPROC", os.cpu_count() or 1)),
        "pairs": pairs,
        "first_epoch_s": first,
        "float_s": float(np.median(both[:, 0])),
        "compressed_s": float(np.median(both[:, 1])),
        "population_s_per_member": float(np.median(crowd)) / MEMBERS,
        "ratio": float(np.median(ratios)),
        "ratio_spread": [float(v) for v in np.quantile(ratios, [0.0, 0.25, 0.75, 1.0])],
        "population_ratio_per_member": float(np.median(crowd)) / MEMBERS / float(np.median(both[:, 0])),
    }


def show(row: dict[str, Any]) -> str:
    """One row as text."""
    low, q1, q3, high = row["ratio_spread"]
    first = ", ".join(f"{name} {s:.1f} s" for name, s in row["first_epoch_s"].items())
    return (
        f"{'*' if row['counts'] else ' '} batch {row['batch']:>6,}, threads {row['threads']}: "
        f"float {row['float_s']:.4f} s/epoch, compressed {row['compressed_s']:.4f} s/epoch, "
        f"ratio {row['ratio']:.3f} (min {low:.3f}, quartiles {q1:.3f}..{q3:.3f}, max {high:.3f}, {row['pairs']} pairs)\n"
        f"                population of {MEMBERS}: {row['population_s_per_member']:.4f} s/epoch per member, "
        f"ratio {row['population_ratio_per_member']:.3f}; first epoch with compile: {first}"
    )


def run(config_path: str, pairs: int) -> list[dict[str, Any]]:
    """Every batch size on one thread and on all; `counts` marks the row of each where the float epoch is faster."""
    rows = []
    for batch in BATCHES:
        tried = []
        for threads in sorted({1, os.cpu_count() or 1}):
            command = [sys.executable, __file__, "--config", config_path, "--pairs", str(pairs), "--batch", str(batch)]
            done = subprocess.run(
                command, env={**os.environ, "NPROC": str(threads)}, stdout=subprocess.PIPE, text=True, check=True
            )
            tried.append(json.loads(done.stdout))
        fastest = min(tried, key=lambda row: row["float_s"])
        rows += [{**row, "counts": row is fastest} for row in tried]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/jets_hgq.yaml")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, help="only this batch size, on NPROC threads, as JSON")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    if args.batch:
        print(json.dumps(measure(config.load(args.config), args.batch, args.pairs)))
        return
    rows = run(args.config, args.pairs)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {SAMPLES:,} samples; *: the float epoch's better thread count")
    for row in rows:
        print(show(row))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
