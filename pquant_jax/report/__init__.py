"""What a run looked like: pictures and one self-contained page, made from plain data that can be kept and redrawn."""

from pquant_jax.report import html, plots
from pquant_jax.report._types import ACTIVATIONS, KINDS, Profile, bits, load_profiles, save_profiles

__all__ = ["ACTIVATIONS", "KINDS", "Profile", "bits", "html", "load_profiles", "plots", "save_profiles"]
