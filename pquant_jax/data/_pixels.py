"""Charge clusters in a pixel sensor, generated: the task of a filter that runs in the sensor's own readout chip."""

from __future__ import annotations

from typing import Final

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.data._arrays import from_arrays
from pquant_jax.data._types import Dataset

ROWS, COLUMNS, SLICES = 13, 21, 2
PITCH_Y, PITCH_X, THICKNESS = 12.5, 50.0, 100.0  # micrometres
RADIUS, FIELD = 30.0, 3.8  # of the layer, mm; tesla
CUT: Final = 0.2  # GeV: below it a track is not kept
LORENTZ: Final = 0.15  # tangent of the angle by which the field turns the drift of the charge
NOISE, THRESHOLD, STEP = 0.02, 0.06, 1 / 8  # of the charge that a straight track leaves in one row


def pixel_clusters(n: int = 6000, seed: int = 0) -> Dataset:
    """Synthetic clusters of a silicon pixel sensor: is the track's transverse momentum above 0.2 GeV, or which sign has it?

    x: float32 (n, 13, 21, 2), charge per pixel of 12.5 x 50 um in an early and a late time slice, multiples of 1/8 below
        8, zero where it stays under the threshold.
    y: int32 (n,): 0 above the cut, 1 and 2 below it with negative and positive charge; a third of the clusters each.
    n: clusters, at least 50, split 72/8/20 %.  seed: of everything random; equal arguments give equal arrays.
    Raises: `DataError` for fewer.

    A track of momentum pT (log-uniform, 0.03 to 0.2 GeV and 0.2 to 5 GeV) crosses a sensor 100 um thick, 30 mm from the
    beam, in a field of 3.8 T, where it leans by 0.3 B R / (2 pT) in the bending plane and by a uniform slope (-1.2 to 1.2)
    along the other; charge drifts with a Lorentz angle and spreads by diffusion, more from deeper in the sensor, from
    where it also arrives later.  Straight-line geometry, no energy straggling beyond a common factor, no magnetic curling: a
    benchmark for compression after the smart pixels of Yoo et al., "Smart pixel sensors: towards on-sensor filtering of
    pixel clusters with deep learning", arXiv:2310.02474, not their simulation.

    >>> data = pixel_clusters(100)
    >>> data.train.x.shape, data.classes, np.bincount(data.train.y, minlength=3).min() > 0
    ((72, 13, 21, 2), ('high', 'low-', 'low+'), np.True_)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 50:
        raise DataError(f"pixel_clusters(n={n!r}): expected a whole number of clusters, at least 50")
    rng = np.random.Generator(np.random.Philox(seed))
    y = rng.permutation(np.arange(n) % 3)
    low, high = np.where(y == 0, CUT, 0.03), np.where(y == 0, 5.0, CUT)
    momentum = np.exp(rng.uniform(np.log(low), np.log(high)))
    charge = np.where(y == 0, rng.choice((-1.0, 1.0), n), np.where(y == 1, -1.0, 1.0))
    lean = charge * np.minimum(0.3 * FIELD * RADIUS * 1e-3 / (2 * momentum), 0.95)
    x = _deposit(rng, np.tan(np.arcsin(lean)) + LORENTZ, rng.uniform(-1.2, 1.2, n))
    texts = {"classes": ["high", "low-", "low+"], "source": "pquant_jax.data.pixel_clusters", "licence": "CC0-1.0"}
    return from_arrays({"x": x, "y": y, **texts}, seed=seed, name="pixel_clusters")


def _deposit(rng: np.random.Generator, slope_y: np.ndarray, slope_x: np.ndarray, steps: int = 24) -> np.ndarray:
    """The digitised charges of tracks with these slopes through points near the middle of the matrix."""
    n = len(slope_y)
    depth = (np.arange(steps) + 0.5) / steps  # 0 at the readout
    start_y, start_x = rng.uniform(-0.5, 0.5, n) * PITCH_Y, rng.uniform(-0.5, 0.5, n) * PITCH_X
    loss = rng.gamma(9.0, 1 / 9.0, n)  # one factor for all of a track
    images = np.zeros((n, ROWS, COLUMNS, SLICES))
    for z in depth:
        spread = 1.5 + 3.0 * np.sqrt(z)  # micrometres
        at_y = start_y + slope_y * (z - 0.5) * THICKNESS
        at_x = start_x + slope_x * (z - 0.5) * THICKNESS
        share = _shares(at_y, ROWS, PITCH_Y, spread)[:, :, None] * _shares(at_x, COLUMNS, PITCH_X, spread)[:, None, :]
        late = z  # charge from deep in the sensor is seen in the second slice alone
        images[..., 0] += share * (1 - late) * 4 / steps
        images[..., 1] += share * 4 / steps
    images = images * loss[:, None, None, None] + rng.normal(0, NOISE, images.shape)
    images[images < THRESHOLD] = 0
    return np.clip(np.rint(images / STEP) * STEP, 0, 8 - STEP).astype(np.float32)


def _shares(at: np.ndarray, count: int, pitch: float, spread: float) -> np.ndarray:
    """The part of a Gaussian at `at` (n,) that falls on each of `count` strips, (n, count)."""
    from scipy.special import ndtr

    edges = (np.arange(count + 1) - count / 2) * pitch
    return np.diff(ndtr((edges - at[:, None]) / spread), axis=1)
