"""One text names any data set."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, Final

from pquant_jax._errors import ConfigError, DataError, did_you_mean
from pquant_jax.data._arrays import from_arrays
from pquant_jax.data._check import check
from pquant_jax.data._files import from_csv, from_npz
from pquant_jax.data._images import mnist
from pquant_jax.data._jets import jets, openml_jets
from pquant_jax.data._particles import anomalies, jet_masses, particles
from pquant_jax.data._pixels import pixel_clusters
from pquant_jax.data._types import Dataset

NAMED: Final = {
    "jets": jets, "openml:jets": openml_jets, "particles": particles, "jet_masses": jet_masses, "anomalies": anomalies,
    "mnist": mnist, "pixel_clusters": pixel_clusters,
}  # fmt: skip
COUNTED: Final = {"particles": particles, "jet_masses": jet_masses}
KNOWN: Final = ", ".join(map(repr, NAMED)) + ", a path that ends in .npz or .csv, or 'package.module:function'"
FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load(spec: str, *, task: str = "classification", standardise: bool = False) -> Dataset:
    """The checked `Dataset` that `spec` names.

    spec: the name of a data set: "jets", "openml:jets", "particles", "jet_masses" (both with a number behind them:
        "particles:8" has the 8 leading ones), "anomalies", "mnist", "pixel_clusters"; a path that ends in .npz or .csv;
        or "package.module:function", which is imported and called without arguments and returns a `Dataset` or the
        mapping that `from_arrays` takes.
    standardise: for files and mappings; named sets are as their functions say.

    Raises `ConfigError` for a text that names nothing, `DataError` for data that is missing or can't be trained on.

    >>> load("jest")
    Traceback (most recent call last):
    pquant_jax._errors.ConfigError: data is 'jest', expected 'jets', 'openml:jets', 'particles', 'jet_masses', \
'anomalies', 'mnist', 'pixel_clusters', a path that ends in .npz or .csv, or 'package.module:function'; did you mean 'jets'?
    """
    if spec in NAMED:
        return check(NAMED[spec](), task)
    name, _, count = spec.partition(":")
    if name in COUNTED and count.isdecimal():
        return check(COUNTED[name](particles=int(count)), task)
    if spec.endswith((".npz", ".csv")):
        return (from_npz if spec.endswith(".npz") else from_csv)(spec, task=task, standardise=standardise)
    if FUNCTION.fullmatch(spec) and not spec.startswith("openml:"):
        return _from_function(spec, task, standardise)
    raise ConfigError(f"data is {spec!r}, expected {KNOWN}; {did_you_mean(spec, NAMED)}")


def _from_function(spec: str, task: str, standardise: bool) -> Dataset:
    made = _function(spec)()
    if isinstance(made, Dataset):
        return check(made, task)
    if isinstance(made, Mapping):
        return from_arrays(made, task=task, standardise=standardise, name=spec)
    raise DataError(f"{spec} returned a {type(made).__name__}, expected a pquant_jax.data.Dataset or a dict of arrays")


def _function(spec: str) -> Any:
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"data is {spec!r}, but {module_name!r} can't be imported: {error}; install it or add its folder to PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"data is {spec!r}, but {module_name!r} has no function {name!r}; {did_you_mean(name, known)}")
    return function
