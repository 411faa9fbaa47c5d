"""Metrics of a regression by its response, prediction / truth, and where a scan's metrics are told apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax._errors import DataError
from pquant_jax.train import Metric


def response(prediction: jax.Array, truth: jax.Array) -> jax.Array:
    """prediction / truth, element by element; NaN where the truth is 0, which the metrics below leave out.

    >>> response(jnp.float32([[3.0], [1.0]]), jnp.float32([2.0, 0.0])).tolist()
    [1.5, nan]
    """
    known = truth != 0
    return jnp.where(known, prediction.reshape(truth.shape) / jnp.where(known, truth, 1), jnp.nan)


def _quantile(q: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda prediction, truth: jnp.nanquantile(response(prediction, truth), q)


def _iqr(prediction: jax.Array, truth: jax.Array) -> jax.Array:
    low, high = jnp.nanquantile(response(prediction, truth), jnp.float32([0.25, 0.75]))
    return high - low


def _resolution(prediction: jax.Array, truth: jax.Array) -> jax.Array:
    low, middle, high = jnp.nanquantile(response(prediction, truth), jnp.float32([0.25, 0.5, 0.75]))
    return jnp.where(middle > 0, (high - low) / (2 * middle), jnp.inf)


def _std_resolution(prediction: jax.Array, truth: jax.Array) -> jax.Array:
    r = response(prediction, truth)
    mean = jnp.nanmean(r)
    return jnp.where(mean > 0, jnp.nanstd(r) / mean, jnp.inf)


percentage_error = Metric(
    "mean percentage error", lambda y, t: 100 * jnp.nanmean(jnp.abs(response(y, t) - 1)), higher_is_better=False
)
"""100 * mean |prediction / truth - 1|, in %."""
percentage_bias = Metric("percentage bias", lambda y, t: 100 * jnp.abs(jnp.nanmean(response(y, t) - 1)), higher_is_better=False)
"""|100 * mean(prediction / truth - 1)|, in %: signs cancel."""
response_low = Metric("response 25 %", _quantile(0.25))
response_median = Metric("response median", _quantile(0.5))
response_high = Metric("response 75 %", _quantile(0.75))
response_iqr = Metric("response IQR", _iqr, higher_is_better=False)
"""Distance of the quartiles of prediction / truth."""
resolution = Metric("resolution", _resolution, higher_is_better=False)
"""IQR / (2 median) of prediction / truth; infinite where the median is not positive, as that of a model that only says 0."""
std_resolution = Metric("resolution (std)", _std_resolution, higher_is_better=False)
"""Standard deviation / mean of prediction / truth: what IQR / (2 median) leaves out is the tails."""

RESPONSE = (resolution, response_low, response_median, response_high, percentage_error, std_resolution)
"""What `scan(metric=RESPONSE)` needs for every picture of a regression; the first is the one that is mapped."""


def as_metrics(metric: Any) -> tuple[Metric, ...]:
    """A metric, a function of (prediction, target), or several of them, as metrics with names of their own.

    >>> [m.name for m in as_metrics([resolution, lambda y, t: y - t])]
    ['resolution', '<lambda>']
    """
    several: Sequence[Any] = list(metric) if isinstance(metric, Sequence) and not isinstance(metric, Metric) else [metric]
    wrong = [m for m in several if not isinstance(m, Metric) and not callable(m)]
    if wrong or not several:
        raise DataError(f"metric is {metric!r}, expected a pq.Metric, a function of (prediction, target), or several of them")
    made = tuple(m if isinstance(m, Metric) else Metric(getattr(m, "__name__", repr(m)), m) for m in several)
    names = [m.name for m in made]
    if len(set(names)) < len(names):
        raise DataError(f"the metrics are called {', '.join(names)}; expected names that differ")
    return made
