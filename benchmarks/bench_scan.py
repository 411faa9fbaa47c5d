"""Precision scans: how fast 64 points are, and a study as it is done for a trigger: the mass of a jet by a DeepSets.

    python benchmarks/bench_scan.py speed
    python benchmarks/bench_scan.py study --particles jets_particles.npz --out pictures/

`speed` evaluates the 8 x 8 grid of ap_fixed<W, I> on the embedded jets' MLP in one compiled function, beside one compiled
function per point, which is what a conversion per point is at its cheapest.  `study` trains the regression, scans it,
trains it again at a few widths (QAT) and draws the pictures.

The target of `study` is the mass of a jet over its transverse momentum, of its leading 32 particles as massless ones:
m^2 / pT^2 = sum over i, j of z_i z_j (cosh(eta_i - eta_j) - cos(phi_i - phi_j)), which for a narrow jet is
1/2 sum z_i z_j ((eta_i - eta_j)^2 + (phi_i - phi_j)^2); z = particle pT / jet pT.  It is given in units of pT / 10 (100 GeV
for a jet of 1 TeV).  Jets below 0.3 of them are left out: there the 32 particles' float16 no longer say what the mass is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pquant_jax as pq
from pquant_jax.quantize import Format
from pquant_jax.report import plots
from pquant_jax.zoo import mlp

UNIT, LEAST = 0.1, 0.3
SCALE = np.float32([8, 4, 4])  # powers of two: (z, eta, phi) to the order of 1
WIDTHS, INTEGERS = (6, 8, 10, 12, 14, 16, 18, 20), (2, 3, 4, 5, 6, 7, 8, 9)
QAT_WIDTHS = (8, 10, 12)


def trained_mlp(samples: int) -> tuple[pq.Instrumented, Any, pq.data.Split]:
    data = pq.data.jets()
    inst = pq.instrument(mlp(), data.train.x[:2])
    plan = pq.Plan(pretrain=8, train=0, finetune=0)
    fitted = pq.fit(inst, data, plan=plan, optimizer=optax.adam(3e-3), batch_size=512, seed=1)
    return inst, fitted.state.params.model, data.test._replace(x=data.test.x[:samples], y=data.test.y[:samples])


def speed(samples: int = 8000, points: int = 64) -> dict[str, float]:
    """Seconds with compilation for the same points, and the largest difference of the two answers."""
    inst, params, split = trained_mlp(samples)
    widths, integers = pq.search._scan.WIDTHS, pq.search._scan.INTEGERS
    start = time.perf_counter()
    found = pq.scan(inst, params, split, widths=widths, integers=integers)
    together = time.perf_counter() - start
    x, y = jnp.asarray(split.x), jnp.asarray(split.y)
    pairs = [(w, n) for w in widths for n in integers][:: max(64 // points, 1)][:points]
    apart, largest = 0.0, 0.0
    for w, n in pairs:
        fmt = Format(i=n - 1, f=w - n, k=1, rounding="TRN", overflow="WRAP", granularity="tensor")
        start = time.perf_counter()
        t = pq.quantize.fixed(inst.sites, weights=fmt, activations=fmt)
        attached = t.attach(params)
        view = t.apply(attached, t.init(attached))[0]
        logits = jax.jit(lambda v, view=view: inst.forward(view, inst.model.state, v)[0])(x)
        accuracy = float(jnp.mean(jnp.argmax(logits, -1) == y))
        apart += time.perf_counter() - start
        if n >= 2:  # at I = 1 weights leave the range, and quantize.fixed does not wrap those
            largest = max(largest, abs(accuracy - float(found.metric[widths.index(w), integers.index(n)])))
    apart *= 64 / len(pairs)
    return {"samples": len(split.y), "scan_s": together, "separate_s": apart, "ratio": apart / together, "difference": largest}


class DeepSets(nn.Module):
    """Particles one by one, their mean, and what it says of the set."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (32, 32):
            x = nn.relu(nn.Dense(width)(x))
        x = jnp.mean(x, axis=-2)
        return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))[..., 0]


def jets_with_mass(path: Path, count: int) -> pq.data.Dataset:
    """70 % to train on, 10 % to validate, 20 % to test."""
    with np.load(path) as file:
        particles = file["x"][:count]
    target = pq.data.mass(particles) / np.float32(UNIT)  # for a jet of 1 TeV
    keep = target >= LEAST
    x, y = particles[keep].astype(np.float32) * SCALE, target[keep]
    ends = [0, int(0.7 * len(y)), int(0.8 * len(y)), len(y)]
    splits = [pq.data.Split(x[a:b], y[a:b]) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return pq.data.Dataset(*splits, name="jet mass")


def relative_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.square(prediction / target - 1)


def rate(epochs: int, samples: int, batch: int, start: float) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(start, epochs * (samples // batch)))


def study(path: Path, out: Path | None, *, count: int, epochs: int, qat_epochs: int) -> dict[str, Any]:
    data = jets_with_mass(path, count)
    inst = pq.instrument(DeepSets(), data.train.x[:2], inputs=pq.InputSpec(k=1, i=5, f=18))
    metric, n = pq.Metric("relative error", relative_error, higher_is_better=False), len(data.train.y)
    common: dict[str, Any] = dict(loss=relative_error, metric=metric, batch_size=128, seed=1)
    start = time.perf_counter()
    plan = pq.Plan(pretrain=epochs, train=0, finetune=0)
    fitted = pq.fit(inst, data, plan=plan, optimizer=rate(epochs, n, 128, 4e-3), **common)
    params, fit_s = fitted.state.params.model, time.perf_counter() - start
    start = time.perf_counter()
    given: dict[str, Any] = dict(batch=1000, samples=4000)
    found = pq.scan(inst, params, data.test, widths=WIDTHS, integers=INTEGERS, metric=pq.search.RESPONSE, **given)
    scan_s = time.perf_counter() - start
    sensitive = pq.search.sensitivity(inst, params, data.test, low=8, by="site", metric=pq.search.resolution, **given)
    point = pq.search.chosen(found, drop=0.1 * found.baseline[found.name])
    fmt = (point.width, point.integer)
    differences = pq.search.differences(inst, params, data.test, weights=fmt, intermediates=fmt)
    views = {}
    for w in QAT_WIDTHS if qat_epochs else ():
        integer = found.integers[int(np.argmin(found.metric[found.widths.index(w)]))]
        compression = pq.quantize.fixed(inst.sites, rules=pq.search.rules_at(found, w, integer))
        tx = pq.optimizer(compression, weights=rate(qat_epochs, n, 128, 1e-3))
        plan = pq.Plan(pretrain=0, train=0, finetune=qat_epochs)
        views[w, integer] = pq.fit(inst, data, plan=plan, compression=compression, optimizer=tx, params=params, **common).view
    qat = pq.search.trained(inst, views, data.test, metric=found_metric(found), **given) if views else ()
    if out is not None:
        draw(out, found, sensitive, differences, fmt, qat)
    return {
        "jets": count, "fit_s": fit_s, "scan_s": scan_s, "points": found.metric.size, "samples": found.samples,
        "baseline": found.baseline, "widths": found.widths, "integers": found.integers, "resolution": found.metric.tolist(),
        "chosen": fmt, "chosen_resolution": point.value, "qat": [list(p) for p in qat],
        "sensitivity": dict(zip(sensitive.names, sensitive.drop.tolist(), strict=True)),
    }  # fmt: skip


def found_metric(found: pq.search.Scanned) -> pq.Metric:
    return next(m for m in pq.search.RESPONSE if m.name == found.name)


def draw(out: Path, found: Any, sensitive: Any, differences: Any, fmt: tuple[int, int], qat: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "scan_map": plots.scan_map(found, drop=0.1 * found.baseline[found.name]),
        "scan_lines": plots.scan_lines(found, compared=qat, log=True),
        "scan_response": plots.scan_response(found, quantity="mass / true mass"),
        "scan_layers": plots.scan_layers(sensitive),
        "scan_differences": plots.scan_differences(
            differences, title=f"Difference between ap_fixed<{fmt[0]},{fmt[1]}> and float"
        ),
    }
    for name, svg in pictures.items():
        (out / f"{name}.svg").write_text(svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "study"))
    parser.add_argument("--samples", type=int, default=8000, help="speed: jets that every point predicts")
    parser.add_argument("--points", type=int, default=64, help="speed: points compiled one by one; the time is scaled to 64")
    parser.add_argument("--particles", type=Path, help="study: npz with x (n, 32, 3) of (z, eta, phi)")
    parser.add_argument("--jets", type=int, default=30_000, help="study: how many of them")
    parser.add_argument("--epochs", type=int, default=20, help="study: of the float model")
    parser.add_argument("--qat-epochs", type=int, default=5, help="study: of every model trained at its width; 0: none")
    parser.add_argument("--out", type=Path, help="study: folder of the pictures")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    if args.what == "study" and (args.particles is None or not args.particles.is_file()):
        sys.exit(f"skipped: --particles is {args.particles}, expected a file of jets' particles")
    if args.what == "speed":
        row = speed(args.samples, args.points)
    else:
        row = study(args.particles, args.out, count=args.jets, epochs=args.epochs, qat_epochs=args.qat_epochs)
    print(json.dumps(row, indent=1))
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
