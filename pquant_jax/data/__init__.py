"""Data sets as plain numpy arrays: the embedded jets, files, generated sets, own functions, and the checks they all pass."""

from pquant_jax.data._arrays import digest, from_arrays, take
from pquant_jax.data._check import check
from pquant_jax.data._files import from_csv, from_npz, read_npz
from pquant_jax.data._images import mnist
from pquant_jax.data._jets import jets, openml_jets
from pquant_jax.data._load import load
from pquant_jax.data._particles import anomalies, jet_masses, mass, particles
from pquant_jax.data._pixels import pixel_clusters
from pquant_jax.data._types import TASKS, Dataset, Split

__all__ = [
    "TASKS",
    "Dataset",
    "Split",
    "anomalies",
    "check",
    "digest",
    "from_arrays",
    "from_csv",
    "from_npz",
    "jet_masses",
    "jets",
    "load",
    "mass",
    "mnist",
    "openml_jets",
    "particles",
    "pixel_clusters",
    "read_npz",
    "take",
]
