"""Curvature of a loss: the empirical Fisher information and Hutchinson's trace of the Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Trace(NamedTuple):
    """Of one kernel's block of the Hessian.  mean: trace / number of weights.  error: its standard error over the probes."""

    mean: float
    error: float


def fisher(losses: Callable, leaves: dict[str, jax.Array], x: Any, y: Any, *, batch_size: int) -> dict[str, jax.Array]:
    """E[g^2] per weight."""
    raise NotImplementedError


def hutchinson(loss: Callable, leaves: dict[str, jax.Array], *, probes: int = 32, seed: int = 0) -> dict[str, Trace]:
    """Trace of the Hessian, per leaf."""
    raise NotImplementedError
