"""Jets: the embedded 40,000, and the public data set on OpenML."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError, ToolError
from pquant_jax.data._arrays import from_arrays, leading
from pquant_jax.data._files import read_npz
from pquant_jax.data._types import Dataset

CLASSES: Final = ("g", "q", "t", "w", "z")
OPENML_NAME: Final = "hls4ml_lhc_jets_hlf"
MIN_JETS: Final = 50  # below it a validation split is too small to hold every class


def jets(n: int | None = None) -> Dataset:
    """The embedded jets: 16 high-level features, 5 balanced classes g, q, t, w, z; no download.

    x: float32 (n, 16), standardised with the mean and standard deviation of the 32,000 training and validation jets.
        Within -8.2..10.3, but for the heavy tail of d2_b2, which reaches 70.  9 of the 40,000 jets exceed 32, where an
        input port with 5 integer bits saturates; nothing is clipped here.
    y: int32 (n,).  28,800 train, 3,200 validation and 8,000 test jets, each split with equally many of every class.
    n: takes the leading 72 % + 8 % + 20 % of n jets, standardised as the whole; nearly balanced.  `DataError` unless
        50 <= n <= 40000.

    docs/data_card.md says how they were made.

    >>> data = jets(500)
    >>> data.train.x.shape, data.val.x.shape, data.test.x.shape, data.classes
    ((360, 16), (40, 16), (100, 16), ('g', 'q', 't', 'w', 'z'))
    """
    dataset = from_arrays(read_npz(Path(__file__).with_name("jets.npz")), standardise=True, name="jets")
    return dataset if n is None else leading(dataset, n, MIN_JETS)


def openml_jets() -> Dataset:
    """The LHC jet-substructure data set of OpenML, 830,000 jets with the same 16 features and 5 classes as `jets`.

    Split as in the published recipes, so that test accuracies compare: 20 % test drawn by
    `train_test_split(test_size=0.2, random_state=42)`, then the last 10 % of the rest for validation; standardised
    over train and validation.  scikit-learn caches the download.

    Raises `ToolError` without scikit-learn, `DataError` without a network or when OpenML does not deliver.
    """
    fetch = _fetch_openml()
    # scikit-learn's default parser needs pandas; its own pure Python one does not, but takes minutes
    parser = "pandas" if importlib.util.find_spec("pandas") else "liac-arff"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of every retry; the error below says it once
            bunch = fetch(OPENML_NAME, as_frame=False, parser=parser)
    except OSError as error:
        raise DataError(
            f"could not download {OPENML_NAME!r} from OpenML ({error}); check the network, or use the embedded data 'jets'"
        ) from error
    except ValueError as error:  # what scikit-learn raises for an answer that is not a data set
        raise DataError(f"OpenML did not deliver {OPENML_NAME!r}: {error}; use the embedded data 'jets'") from error
    return _from_openml(bunch)


def _from_openml(bunch: Mapping[str, Any]) -> Dataset:
    x, letters = np.asarray(bunch["data"], np.float32), np.asarray(bunch["target"]).astype(str)
    unknown = sorted(set(letters.tolist()) - set(CLASSES))
    if unknown:
        raise DataError(f"{OPENML_NAME} has the classes {unknown}, expected {CLASSES}")
    labels = np.searchsorted(CLASSES, letters).astype(np.int32)
    n, n_test = len(x), math.ceil(0.2 * len(x))
    order = np.random.RandomState(42).permutation(n)  # what train_test_split(random_state=42) draws
    test, rest = order[:n_test], order[n_test:]
    n_train = int(0.9 * len(rest))
    index = {"train": rest[:n_train], "val": rest[n_train:], "test": test}
    arrays = {f"{key}_{part}": a[rows] for part, rows in index.items() for key, a in (("x", x), ("y", labels))}
    texts = {
        "classes": CLASSES,
        "features": bunch.get("feature_names", ()),
        "source": f"OpenML, {OPENML_NAME}",
        "licence": bunch.get("details", {}).get("licence", ""),
    }
    return from_arrays({**arrays, **texts}, standardise=True, name="openml:jets")


def _fetch_openml() -> Callable[..., Any]:
    try:
        from sklearn.datasets import fetch_openml
    except ImportError as error:
        raise ToolError(f"openml_jets needs scikit-learn ({error}); pip install 'pquant-jax[data]'") from error
    return fetch_openml
