"""Level 1: the fixed-point grid, its gradients, and the primitives that interpreters read."""

from pquant_jax.numerics._fixed import LN2, ceil_log2, check_modes, integer_bits, kif, power_of_two, round_ste, total_bits
from pquant_jax.numerics._minifloat import minifloat, minifloat_kif
from pquant_jax.numerics._primitive import mask, mask_p, quantize, quantize_p, rebind, site, site_p
from pquant_jax.numerics._reduce import product, reduce_axis, settle, settle_together
from pquant_jax.numerics._table import MAX_TABLE_BITS, build_table, code_grid, lookup, lookup_p, region, region_name
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

__all__ = [
    "LN2",
    "MAX_TABLE_BITS",
    "OVERFLOWS",
    "ROUNDINGS",
    "build_table",
    "ceil_log2",
    "check_modes",
    "code_grid",
    "integer_bits",
    "kif",
    "lookup",
    "lookup_p",
    "mask",
    "mask_p",
    "minifloat",
    "minifloat_kif",
    "power_of_two",
    "product",
    "quantize",
    "quantize_p",
    "rebind",
    "reduce_axis",
    "region",
    "region_name",
    "round_ste",
    "settle",
    "settle_together",
    "site",
    "site_p",
    "total_bits",
]
