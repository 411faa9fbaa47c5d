"""The generator script as a module, and small arrays to make data sets from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="session")
def generate_jets() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "generate_jets.py"
    spec = importlib.util.spec_from_file_location("generate_jets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(3.0, 5.0, (200, 4)), "y": rng.integers(0, 3, 200)}
