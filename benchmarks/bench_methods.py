"""Seconds per epoch of every pruning method and constraint alone, without a quantizer, against the plain float epoch.

    python benchmarks/bench_methods.py [--pairs 15] [--only NAME ...] [--json OUT]

The protocol of `bench_step.py`: 200,000 samples, 16-64-32-32-5, batch 1,024 and 33,200, data shuffled beforehand, float and
method compiled alike and run in turn, the ratio taken pair by pair, on the number of threads at which the float epoch is
faster.  The statistics that a method asks for are part of its step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import bench_step
import jax
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax.constrain import mdmm, metrics, patterns
from pquant_jax.prune import NM, ap, autosparse, cs, dst, magnitude, pdp, random, wanda
from pquant_jax.train import compile_epoch, cross_entropy, init_state, make_step
from pquant_jax.transforms import pnorm_decay
from pquant_jax.zoo import mlp

BAR: Final = 1.3
PDP_BAR: Final = 1.6
Made = tuple[pq.Transform, Any]


def _sparsity(mode: str, **options: Any) -> Callable[[Any], pq.Transform]:
    return lambda roles: mdmm(metrics.sparsity(mode=mode, alpha=20.0, **options), kind="==", target=0.9, prunes=1e-3)


def _groups(roles: Any) -> pq.Transform:
    masks = metrics.group_masks(pq.prune.Reuse(4), roles=roles)
    return mdmm(metrics.dsp_sparsity(reuse=4, roles=roles), kind="==", target=0.5, prunes=masks)


def _patterns(roles: Any) -> pq.Transform:
    few = patterns(block=(2, 4), roles=roles)
    return mdmm(few.metric, kind="==", target=0.0, prunes=few.masks)


METHODS: Final[dict[str, Callable[[Any], pq.Transform]]] = {
    "none": lambda roles: pq.identity(),
    "random": lambda roles: random(sparsity=0.9, roles=roles),
    "magnitude": lambda roles: magnitude(sparsity=0.9, roles=roles),
    "magnitude, fisher": lambda roles: magnitude(sparsity=0.9, budget="fisher", roles=roles),
    "wanda": lambda roles: wanda(sparsity=0.9, roles=roles),
    "wanda, fisher": lambda roles: wanda(sparsity=0.9, budget="fisher", roles=roles),
    "ap": lambda roles: ap(target=0.5, roles=roles),
    "dst": lambda roles: dst(alpha=1e-5, target=0.9, roles=roles),
    "dst, channel": lambda roles: dst(alpha=1e-5, granularity="channel", roles=roles),
    "autosparse": lambda roles: autosparse(target=0.9, roles=roles),
    "autosparse, backward": lambda roles: autosparse(target=0.9, backward_sparsity=0.5, roles=roles),
    "cs": lambda roles: cs(target=0.9),
    "pdp": lambda roles: pdp(sparsity=0.9, roles=roles),
    "pdp, out": lambda roles: pdp(sparsity=0.5, groups="out", roles=roles),
    "pdp, 2:4": lambda roles: pdp(sparsity=0.5, groups=NM(2, 4), roles=roles),
    "pdp, fisher": lambda roles: pdp(sparsity=0.9, budget="fisher", roles=roles),
    "mdmm, coarse": _sparsity("coarse"),
    "mdmm, smooth": _sparsity("smooth"),
    "mdmm, per layer": _sparsity("coarse", per="layer"),
    "mdmm, dsp": _groups,
    "mdmm, patterns": _patterns,
    "p-norm decay": lambda roles: pq.identity(),
}


def bar(name: str) -> float:
    """What the ratio may be."""
    return PDP_BAR if name.startswith("pdp") else BAR


def _optimizer(name: str, compression: pq.Transform) -> Any:
    weights = optax.chain(optax.adam(1e-3), pnorm_decay(1e-3)) if name == "p-norm decay" else optax.adam(1e-3)
    return pq.optimizer(compression, weights=weights)


def _inst() -> pq.Instrumented:
    x = np.zeros((2, 16), np.float32)
    return pq.instrument(pq.from_linen(mlp(), x, rng=jax.random.key(0)), x)


def float_seconds(batch_size: int, epochs: int) -> float:
    """Median of the plain epoch on this process's threads."""
    inst = _inst()
    data = bench_step.batches(inst, batch_size)
    step, state = bench_step.float_step(inst, optax.adam(1e-3))
    plain = compile_epoch(bench_step.scan_of(step))
    return float(np.median([bench_step.seconds(plain, state, data) for _ in range(epochs + 1)][1:]))


def compiled(inst: pq.Instrumented, name: str) -> tuple[Callable, Any]:
    """(epoch, state) of a method."""
    compression = pq.chain(METHODS[name](inst.roles))
    tx = _optimizer(name, compression)
    step = make_step(inst, compression, tx, cross_entropy)
    return compile_epoch(bench_step.scan_of(step)), init_state(inst, compression, tx, seed=0)


def measure(batch_size: int, pairs: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """All figures of one batch size on this process's threads."""
    inst = _inst()
    data = bench_step.batches(inst, batch_size)
    step, plain_state = bench_step.float_step(inst, optax.adam(1e-3))
    plain, rows = compile_epoch(bench_step.scan_of(step)), []
    bench_step.seconds(plain, plain_state, data)
    for name in names:
        epoch, state = compiled(inst, name)
        first = bench_step.seconds(epoch, state, data)
        clock = bench_step.seconds
        both = np.array([(clock(plain, plain_state, data), clock(epoch, state, data)) for _ in range(pairs)])
        ratios = both[:, 1] / both[:, 0]
        row = {"method": name, "batch": batch_size, "threads": int(os.environ["NPROC"]), "pairs": pairs, "bar": bar(name)}
        row |= {"float_s": float(np.median(both[:, 0])), "method_s": float(np.median(both[:, 1])), "first_s": first}
        rows.append(row | {"ratio": float(np.median(ratios)), "quartiles": [float(v) for v in np.quantile(ratios, [0.25, 0.75])]})
        print(show(rows[-1]), file=sys.stderr, flush=True)
    return rows


def show(row: dict[str, Any]) -> str:
    """One row as text."""
    low, high = row["quartiles"]
    return (
        f"{'ok  ' if row['ratio'] <= row['bar'] else 'OVER'} {row['method']:<22} batch {row['batch']:>6,}, threads "
        f"{row['threads']}: {row['ratio']:.3f} (quartiles {low:.3f}..{high:.3f}, {row['pairs']} pairs), "
        f"{row['method_s']:.4f} s/epoch, float {row['float_s']:.4f}, first epoch {row['first_s']:.1f}"
    )


def _child(threads: int, *arguments: object) -> Any:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "NPROC": str(threads)}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def run(pairs: int, names: Sequence[str] = tuple(METHODS)) -> list[dict[str, Any]]:
    """Every method at both batch sizes, on the threads at which the float epoch is faster."""
    rows = []
    for batch in bench_step.BATCHES:
        counts = sorted({1, os.cpu_count() or 1})
        threads = min(counts, key=lambda n: _child(n, "--batch", batch, "--pairs", 7, "--float"))
        rows += _child(threads, "--batch", batch, "--pairs", pairs, "--only", *names)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batch", type=int, help="only this batch size, on NPROC threads, as JSON")
    parser.add_argument("--float", action="store_true", help="only the float epoch of --batch")
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    if args.batch:
        os.environ.setdefault("NPROC", str(os.cpu_count() or 1))
        figures = float_seconds(args.batch, args.pairs) if args.float else measure(args.batch, args.pairs, args.only)
        print(json.dumps(figures))
        return
    rows = run(args.pairs, args.only)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {bench_step.SAMPLES:,} samples")
    for row in rows:
        print(show(row))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
