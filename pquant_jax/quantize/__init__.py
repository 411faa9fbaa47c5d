"""Level 3: quantizers, one file each."""

from pquant_jax.quantize._beta import Beta, pid, piecewise, ramp
from pquant_jax.quantize._fixed import FixedState, fixed
from pquant_jax.quantize._format import Format
from pquant_jax.quantize._hgq import HGQState, hgq

__all__ = ["Beta", "FixedState", "Format", "HGQState", "fixed", "hgq", "piecewise", "pid", "ramp"]
