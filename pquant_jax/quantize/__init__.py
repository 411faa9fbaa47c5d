"""Level 3: quantizers, one file each."""

from pquant_jax.quantize._beta import Beta, pid, piecewise, ramp
from pquant_jax.quantize._codes import CodesState, binary, ternary
from pquant_jax.quantize._dynamic import DynamicState, dynamic
from pquant_jax.quantize._explain import TEMPLATES, explain, template
from pquant_jax.quantize._fixed import FixedState, fixed, frozen
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
from pquant_jax.quantize._minifloat import MinifloatState, minifloat
from pquant_jax.quantize._ranges import F_LIMITS, needed_bits

__all__ = [
    "Beta",
    "F_LIMITS",
    "GRANULARITIES",
    "KINDS",
    "PARAMETERS",
    "TEMPLATES",
    "Choice",
    "CodesState",
    "DynamicState",
    "FixedState",
    "Format",
    "HGQState",
    "MinifloatState",
    "binary",
    "defaults_of",
    "dynamic",
    "explain",
    "fields_of",
    "fixed",
    "frozen",
    "hgq",
    "label",
    "minifloat",
    "needed_bits",
    "piecewise",
    "pid",
    "ramp",
    "of_kind",
    "resolve",
    "template",
    "ternary",
]
