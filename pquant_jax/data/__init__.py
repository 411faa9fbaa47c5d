"""Data sets as plain numpy arrays: the embedded jets, .npz files, own functions, and the checks they all pass."""

from pquant_jax.data._arrays import digest, from_arrays, take
from pquant_jax.data._check import check
from pquant_jax.data._files import from_npz, read_npz
from pquant_jax.data._jets import jets, openml_jets
from pquant_jax.data._load import load
from pquant_jax.data._types import TASKS, Dataset, Split

__all__ = [
    "TASKS",
    "Dataset",
    "Split",
    "check",
    "digest",
    "from_arrays",
    "from_npz",
    "jets",
    "load",
    "openml_jets",
    "read_npz",
    "take",
]
