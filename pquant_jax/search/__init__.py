"""Level 6: searches over whole models, on the host; they return masks and formats to train on with."""

from pquant_jax.search._fitcompress import FITCompressed, fitcompress
from pquant_jax.search._formats import compression
from pquant_jax.search._hawq import HAWQFound, hawq
from pquant_jax.search._response import (
    RESPONSE,
    percentage_bias,
    percentage_error,
    resolution,
    response,
    response_high,
    response_iqr,
    response_low,
    response_median,
    std_resolution,
)
from pquant_jax.search._scan import Chosen, Grid, Scanned, Trained, chosen, rules_at, scan, trained
from pquant_jax.search._sensitivity import Difference, Sensitivity, differences, sensitivity
from pquant_jax.search._traces import Trace, fisher, hutchinson
from pquant_jax.search._walk import Node

__all__ = [
    "RESPONSE",
    "Chosen",
    "Difference",
    "FITCompressed",
    "Grid",
    "HAWQFound",
    "Node",
    "Scanned",
    "Sensitivity",
    "Trace",
    "Trained",
    "chosen",
    "compression",
    "differences",
    "fisher",
    "fitcompress",
    "hawq",
    "hutchinson",
    "percentage_bias",
    "percentage_error",
    "resolution",
    "response",
    "response_high",
    "response_iqr",
    "response_low",
    "response_median",
    "rules_at",
    "scan",
    "sensitivity",
    "std_resolution",
    "trained",
]
