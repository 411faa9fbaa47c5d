"""The kernel and the upstream gradient for which PQuantML's values were printed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pquant_jax._base import Event, Stage


@pytest.fixture
def w():
    """(out, in), as torch has it."""
    return jnp.float32([[0.5, -0.2, 0.05, -0.9], [0.3, 0.1, -0.7, 0.02]])


@pytest.fixture
def upstream():
    return jnp.float32([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(scope="session")
def tell():
    """Announce an event to a method and get its parameters and state back."""

    def boundary(t, params, state, event, stage=Stage.TRAIN, epoch=0, epochs=10, **extra):
        numbers = dict(event=event, stage=stage, epoch=epoch, epochs=epochs)
        return t.boundary(params, state, stats={}, **{k: jnp.int32(v) for k, v in numbers.items()}, **extra)

    return boundary


@pytest.fixture
def train(tell):
    """The state of a method at the start of an epoch of the training stage."""
    return lambda t, params, **extra: tell(t, params, t.init(params), Event.PRE_EPOCH, **extra)[1]


@pytest.fixture(scope="session")
def pquantml():
    """golden/pquantml_player.py: what PQuantML answered, and how our methods are asked the same."""
    path = Path(__file__).parents[1] / "golden" / "pquantml_player.py"
    spec = importlib.util.spec_from_file_location("pquantml_player", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
