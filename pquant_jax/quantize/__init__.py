"""Level 3: quantizers, one file each."""

from pquant_jax.quantize._dynamic import DynamicState, dynamic
from pquant_jax.quantize._explain import TEMPLATES, explain, template
from pquant_jax.quantize._fixed import FixedState, fixed
from pquant_jax.quantize._format import (
    GRANULARITIES,
    KINDS,
    PARAMETERS,
    Choice,
    Format,
    defaults_of,
    fields_of,
    label,
    of_kind,
    resolve,
)
from pquant_jax.quantize._hgq import HGQState, hgq
from pquant_jax.quantize._ranges import F_LIMITS, needed_bits

__all__ = [
    "F_LIMITS",
    "GRANULARITIES",
    "KINDS",
    "PARAMETERS",
    "TEMPLATES",
    "Choice",
    "DynamicState",
    "FixedState",
    "Format",
    "HGQState",
    "defaults_of",
    "dynamic",
    "explain",
    "fields_of",
    "fixed",
    "hgq",
    "label",
    "needed_bits",
    "of_kind",
    "resolve",
    "template",
]
