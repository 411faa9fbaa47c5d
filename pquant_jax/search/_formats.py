"""Formats from widths and ranges, and the transform that a result stands for."""

from __future__ import annotations

from typing import Any

from pquant_jax._base import Transform
from pquant_jax.graph import Instrumented
from pquant_jax.prune import frozen
from pquant_jax.quantize import fixed
from pquant_jax.transforms import chain


def compression(inst: Instrumented, found: Any) -> Transform:
    """What `fitcompress` or `hawq` found as a transform to train on with: its masks, then its formats.

    `pq.fit(inst, data, params=pretrained, compression=pq.search.compression(inst, found), ...)` keeps both still; the
    EBOPs stay what the search says.
    """
    quantizer = fixed(inst.sites, rules=found.rules)
    return chain(frozen(found.masks), quantizer) if found.masks else chain(quantizer)
