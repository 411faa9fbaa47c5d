"""Losses and metrics of one sample each, so that sample weights mean the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Metric(NamedTuple):
    """A figure of merit: function(prediction, target) -> (n,) per sample, or a scalar of the whole set."""

    name: str
    function: Callable[[Any, Any], jax.Array]
    higher_is_better: bool = True


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Softmax cross-entropy per sample; logits (n, classes), integer labels (n,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def squared_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Squared error per sample, mean over the outputs."""
    error = jnp.square(prediction.reshape(target.shape) - target)
    return jnp.mean(error.reshape(error.shape[0], -1), axis=-1)


def absolute_error(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Absolute error per sample, mean over the outputs."""
    error = jnp.abs(prediction.reshape(target.shape) - target)
    return jnp.mean(error.reshape(error.shape[0], -1), axis=-1)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, -1) == labels).astype(jnp.float32)


accuracy = Metric("accuracy", _correct)
mse = Metric("mse", squared_error, higher_is_better=False)
mae = Metric("mae", absolute_error, higher_is_better=False)


def average(values: jax.Array, weight: jax.Array | None) -> jax.Array:
    """Mean over samples, weighted if weights are given: sum(w v) / sum(w).  A scalar stays as it is.

    >>> float(average(jnp.float32([1, 3]), jnp.float32([3, 1])))
    1.5
    """
    if weight is None or values.ndim == 0:
        return jnp.mean(values)
    return jnp.sum(values * weight) / jnp.sum(weight)
