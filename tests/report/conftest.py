"""A made-up but realistic run of the jet model: three stages, learned widths, a pruned kernel, one site that clips."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pquant_jax.report import Profile

SIZES = (16, 64, 32, 32, 5)
CLASSES = ("g", "q", "t", "w", "z")


def simulate(plan=(("pretrain", 20), ("train", 60), ("finetune", 20)), ebops=True) -> list[dict]:
    rng = np.random.default_rng(0)
    stages = [stage for stage, epochs in plan for _ in range(epochs)]
    n = max(len(stages), 1)
    rows = []
    for epoch, stage in enumerate(stages):
        u = (epoch + 1) / n
        loss = 0.86 + 0.6 * np.exp(-9 * u) + (0.03 if stage != "pretrain" else 0) + 0.004 * rng.normal()
        rows.append(
            {
                "epoch": epoch,
                "stage": stage,
                "loss": float(loss),
                "val_loss": float(loss + 0.01 + 0.008 * rng.normal()),
                "val_metric": float(0.69 - 0.2 * np.exp(-9 * u) - (0.006 if stage != "pretrain" else 0) + 0.002 * rng.normal()),
                "sparsity": 0.0 if stage == "pretrain" else float(0.82 * min(1.0, (u - 0.2) * 2)),
                "ebops": float(2.2e5 * np.exp(-4.2 * max(u - 0.2, 0))) if ebops else None,
                "seconds": 0.15,
            }
        )
    return rows


def make_profile(name: str, kind: str, values: np.ndarray, k, i, f, keep: bool) -> Profile:
    k, i, f = (np.asarray(v, np.int32) for v in (k, i, f))
    points = np.quantile(np.abs(values), [0, 0.25, 0.5, 0.75, 1])
    low, high = (values, values) if keep else (values.min(axis=0), values.max(axis=0))
    return Profile(name, kind, k, i, f, low, high, points, values if keep else None)


def make_profiles() -> list[Profile]:
    rng = np.random.default_rng(1)
    profiles = []
    for index, (a, b) in enumerate(zip(SIZES[:-1], SIZES[1:], strict=True)):
        name = f"Dense_{index}"
        x = rng.normal(size=(500, a)) * (1 + index)
        x = x if index == 0 else np.maximum(x, 0)
        i = 5 if index == 0 else np.full(a, 2 if index == 2 else 4)
        profiles.append(
            make_profile(
                f"{name}/input", "input", x, 1 if index == 0 else 0, i, 10 if index == 0 else rng.integers(1, 5, a), False
            )
        )
        f = rng.integers(2, 7, (a, b))
        kernel = np.round(rng.normal(size=(a, b)) / np.sqrt(a) * 2.0**f) / 2.0**f
        kernel[rng.random((a, b)) < 0.2 + 0.2 * index] = 0.0
        profiles.append(make_profile(f"{name}/kernel", "kernel", kernel, 1, 0, f, True))
        bias = np.round(rng.normal(size=b) * 16) / 64
        profiles.append(make_profile(f"{name}/bias", "bias", bias, 1, 1, 6, True))
    return profiles


@pytest.fixture(scope="session")
def metrics() -> list[dict]:
    return simulate()


@pytest.fixture(scope="session")
def make_metrics() -> Callable[..., list[dict]]:
    return simulate


@pytest.fixture(scope="session")
def profiles() -> list[Profile]:
    return make_profiles()
