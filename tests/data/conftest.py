"""The generator script as a module, and small arrays to make data sets from."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="session")
def generate_jets(benchmark_module) -> ModuleType:
    return benchmark_module("generate_jets")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(3.0, 5.0, (200, 4)), "y": rng.integers(0, 3, 200)}
