"""Jets as their leading particles: classes, masses, and the background of an anomaly search."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.data._arrays import PARTS, digest, from_arrays, leading
from pquant_jax.data._files import read_npz
from pquant_jax.data._jets import CLASSES, MIN_JETS, jets
from pquant_jax.data._types import Dataset, Split

MAX_PARTICLES: Final = 32
UNITS: Final = (1 / 16, 1 / 8, 1 / 8)  # powers of two: a port can undo them by a shift
MASS_UNIT: Final = 1 / 8
FEATURES: Final = ("pt_fraction", "delta_eta", "delta_phi")
BACKGROUND: Final = ("g", "q")


def particles(n: int | None = None, particles: int = MAX_PARTICLES, path: str | os.PathLike[str] | None = None) -> Dataset:
    """Jets as their leading particles: 5 balanced classes g, q, t, w, z; 10,000 are embedded.

    x: float32 (n, particles, 3) = 16 * (share of the jet's pT), 8 * (delta eta), 8 * (delta phi) to the jet's axis, in
        falling pT, zeros behind the last one.  `mean` is 0 and `std` the units, so that x = raw / std.
    y: int32 (n,).  7,200 train, 800 validation and 2,000 test jets.
    n: takes the leading 72 % + 8 % + 20 % of n jets; nearly balanced.
    particles: how many of the leading ones, 1 to 32.
    path: another file with x (n, >= particles, 3) in raw units and y, split 72/8/20 % with a fixed seed.
    Raises: `DataError` for a file that isn't one, or numbers out of range.

    docs/data_card.md says how they were made.

    >>> data = particles(500, 8)
    >>> data.train.x.shape, data.val.x.shape, data.test.x.shape, data.features
    ((360, 8, 3), (40, 8, 3), (100, 8, 3), ('pt_fraction', 'delta_eta', 'delta_phi'))
    """
    return _scaled(_raw(n, particles, path), particles)


def jet_masses(n: int | None = None, particles: int = MAX_PARTICLES, path: str | os.PathLike[str] | None = None) -> Dataset:
    """Regression of a jet's mass from its leading particles; x and the arguments as in `particles`.

    y: float32 (n, 1), 8 * mass / pT with the mass of the 32 leading particles, taken as massless,
        (mass / pT)^2 = sum_ij z_i z_j (cosh(eta_i - eta_j) - cos(phi_i - phi_j)), z the share of pT: see `mass`.
        It does not depend on `particles`: with fewer of them the rest has to be guessed.  W, Z and t peak near 0.65,
        0.75 and 1.2.

    >>> jet_masses(50, 8).train.y.shape
    (36, 1)
    """
    raw = _raw(n, particles, path)
    scaled = _scaled(raw, particles)
    splits = [getattr(scaled, p)._replace(y=mass(getattr(raw, p).x)[:, None] / np.float32(MASS_UNIT)) for p in PARTS]
    return scaled._replace(**dict(zip(PARTS, splits, strict=True)), classes=(), name="jet_masses", digest=digest(splits))


def mass(x: np.ndarray) -> np.ndarray:
    """mass / pT (n,) float32 of massless particles x (n, particles, 3) = (share of pT, delta eta, delta phi).

    m^2 = 2 sum_i<j pT_i pT_j (cosh(eta_i - eta_j) - cos(phi_i - phi_j)).

    >>> mass(np.array([[[0.5, 0.0, 0.0], [0.5, 0.0, np.pi / 3]]])).round(4)
    array([0.5], dtype=float32)
    """
    z, eta, phi = np.moveaxis(np.asarray(x, np.float64), -1, 0)
    # cosh(a - b) - cos(c - d) through sums of single particles: linear in their number
    px, py, pz, e = ((z * f).sum(1) for f in (np.cos(phi), np.sin(phi), np.sinh(eta), np.cosh(eta)))
    return np.sqrt(np.maximum(e**2 - px**2 - py**2 - pz**2, 0)).astype(np.float32)


def anomalies(n: int | None = None) -> Dataset:
    """The 16 features of `jets` for an anomaly search: trained on g and q alone, tested on all five classes.

    x: C^(-1/2) (features of `jets(n)` - mean), within -8..8, mean and covariance C of the training jets g and q (0.01 is
        added to its eigenvalues): no correlation of the background is left, so that what breaks one lies far out.  g and
        q in the training and validation splits, all classes in the test split, where `jets(n).test.y` says which is which.
    y: x itself, the target of an auto-encoder.

    >>> data = anomalies(500)
    >>> data.train.x.shape, data.test.x.shape, np.array_equal(data.train.x, data.train.y)
    ((144, 16), (100, 16), True)
    """
    whole = jets(n)
    known = [CLASSES.index(c) for c in BACKGROUND]
    parts = {p: np.clip(getattr(whole, p).x.astype(np.float64), -8, 8) for p in PARTS}
    parts = {p: x if p == "test" else x[np.isin(getattr(whole, p).y, known)] for p, x in parts.items()}
    mean = parts["train"].mean(0)
    values, vectors = np.linalg.eigh(np.cov((parts["train"] - mean).T))
    whitening = vectors / np.sqrt(values + 0.01) @ vectors.T
    splits = [np.clip((x - mean) @ whitening, -8, 8).astype(np.float32) for x in parts.values()]
    made = {p: Split(x, x) for p, x in zip(parts, splits, strict=True)}
    return whole._replace(**made, classes=(), features=(), name="anomalies", digest=digest(made.values()), mean=None, std=None)


def _raw(n: int | None, particles: int, path: Any) -> Dataset:
    """The chosen jets with all particles of the file."""
    if isinstance(particles, bool) or not isinstance(particles, int) or not 1 <= particles <= MAX_PARTICLES:
        raise DataError(f"particles is {particles!r}, expected a whole number from 1 to {MAX_PARTICLES}")
    file = Path(__file__).with_name("particles.npz") if path is None else Path(path)
    dataset = from_arrays(read_npz(file), name="particles")
    shape = dataset.train.x.shape
    if len(shape) != 3 or shape[1] < particles or shape[2] != len(FEATURES):
        raise DataError(f"{str(file)!r}: x has shape (n, {', '.join(map(str, shape[1:]))}), expected (n, >= {particles}, 3)")
    return dataset if n is None else leading(dataset, n, MIN_JETS)


def _scaled(raw: Dataset, particles: int) -> Dataset:
    std = np.asarray(UNITS)
    splits = [getattr(raw, p)._replace(x=(getattr(raw, p).x[:, :particles] / std).astype(np.float32)) for p in PARTS]
    parts = dict(zip(PARTS, splits, strict=True))
    return raw._replace(**parts, features=FEATURES, digest=digest(splits), mean=np.zeros(3), std=std)
