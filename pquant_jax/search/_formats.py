"""Formats from widths and observed ranges, and the transform that a result stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from pquant_jax._base import SiteSpec, Transform
from pquant_jax.graph import Instrumented
from pquant_jax.numerics import integer_bits, oracle
from pquant_jax.prune import frozen
from pquant_jax.quantize import Format, fixed
from pquant_jax.transforms import chain

_TAIL = 3  # how many integer bits below what the range needs are tried
_FINE = 16.0  # fractional bits to which a range is looked at: 1 + 1e-6 needs no bit more than 1

Rules = tuple[tuple[str, Format], ...]


def compression(inst: Instrumented, found: Any) -> Transform:
    """What `fitcompress` or `hawq` found as a transform to train on with: its masks, then its formats.

    `pq.fit(inst, data, params=pretrained, compression=pq.search.compression(inst, found))` keeps both still, so the
    EBOPs stay what the search says.  found: anything with masks {path: 0/1} and rules for `quantize.fixed`.

    >>> from types import SimpleNamespace
    >>> import pquant_jax as pq
    >>> model = pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.float32([[0.7], [0.3]])})
    >>> inst = pq.instrument(model, jnp.ones((1, 2)))
    >>> found = SimpleNamespace(masks={"w": [[1], [0]]}, rules=(("w", Format(i=0, f=2, k=1)),))
    >>> t = compression(inst, found)
    >>> params = t.attach(model.params)
    >>> t.apply(params, t.init(params))[0].model["w"].tolist()
    [[0.75], [0.0]]
    """
    return chain(frozen(found.masks), fixed(inst.sites, rules=found.rules))


def fitted(spec: SiteSpec, span: tuple[float, float], width: int, limit: float | None = None) -> Format:
    """The format of a site: k where its value can be negative, i as the range needs, f = width - k - i.

    i and f may be negative.  limit: of the absolute value; beyond it the format saturates.

    >>> fitted(SiteSpec((4,), "kernel"), (-0.2, 0.3), 6)
    Format(i=-1.0, f=6.0, k=1, rounding='RND', overflow='SAT', granularity='tensor', trainable=True)
    """
    reach = np.inf if limit is None else limit
    low, high = (np.clip(np.float32(v), -reach, reach) for v in span)
    i = float(integer_bits(jnp.float32(low), jnp.float32(high), jnp.float32(_FINE))) if low < 0 or high > 0 else 0.0
    k = int(spec.signed)
    return Format(i=i, f=width - k - i, k=k, granularity="tensor")


def narrower(widest: Format) -> list[Format]:
    """Formats of the same width: `widest` and those that saturate the tail of its range for a finer step."""
    return [replace(widest, i=widest.i - n, f=widest.f + n) for n in range(_TAIL + 1)]


def closest(spec: SiteSpec, w: np.ndarray, width: int, limit: float | None = None) -> tuple[Format, np.ndarray, float]:
    """(format, its values, sum of squared errors) of the format of this width that loses least of a kernel; 0 counts too."""
    formats = narrower(fitted(spec, (float(w.min()), float(w.max())), width, limit))
    tried = [(fmt, on_grid(w, fmt)) for fmt in formats]
    return min(((fmt, values, float(np.sum(np.square(values - w)))) for fmt, values in tried), key=lambda t: t[2])


def on_grid(w: np.ndarray, fmt: Format) -> np.ndarray:
    """The weights in a format, float32."""
    return oracle.quantize(w, fmt.k, fmt.i, fmt.f, rounding=fmt.rounding, overflow=fmt.overflow).astype(np.float32)


def rules_of(formats: Mapping[str, Format]) -> Rules:
    """Rules that match exactly these sites."""
    return tuple((re.escape(name), fmt) for name, fmt in formats.items())
