"""Initialised models without the cost of an eager initialisation, and files that may be missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest


@pytest.fixture(scope="package", autouse=True)
def quick_to_compile():
    """What is tested runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def drawn() -> Callable[..., Any]:
    """(linen module, x) -> its variables with random parameters; variances are positive."""

    def draw(module: Any, x: Any, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))

        def leaf(path: Any, s: Any) -> np.ndarray:
            v = rng.normal(0, 1 / np.sqrt(max(np.prod(s.shape[:-1]), 4)), s.shape)
            return np.asarray(np.abs(v) + 0.5 if "var" in jax.tree_util.keystr(path) else v, np.float32)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope="session")
def outside() -> Callable[[str], Path]:
    """(file) -> its path in the folder PQUANT_DATA; the test is skipped where it is not there."""

    def find(name: str) -> Path:
        folder = os.environ.get("PQUANT_DATA", "")
        if not folder or not (Path(folder) / name).is_file():
            pytest.skip(f"{name} is not shipped; set PQUANT_DATA to the folder that holds it")
        return Path(folder) / name

    return find
