"""What every test shares: the CPU unless told otherwise, hypothesis without randomness, and the golden values."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before the first import of jax, and a GPU run can still override it

import json
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import HealthCheck, settings

_ALWAYS: dict[str, Any] = dict(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", max_examples=30, **_ALWAYS)
settings.register_profile("thorough", max_examples=500, **_ALWAYS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def key() -> jax.Array:
    """A random key; the same one in every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def hgq2() -> dict[str, Any]:
    """What HGQ2 and `quantizers` answered; see golden/README.md."""
    return json.loads((Path(__file__).parent / "golden" / "hgq2.json").read_text())
