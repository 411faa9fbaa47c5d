"""Handwritten digits, from a file of one's own: MNIST is not ours to ship."""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from pquant_jax._errors import DataError
from pquant_jax.data._arrays import from_arrays
from pquant_jax.data._files import located, read_npz
from pquant_jax.data._types import Dataset

SIZES: Final = (28, 14, 7)
KEYS: Final = ("x_train", "y_train", "x_test", "y_test")
VALIDATION: Final = 1 / 10


def mnist(path: str | os.PathLike[str] | None = None, *, n: int | None = None, size: int = 28) -> Dataset:
    """MNIST: images of the digits 0 to 9, from the .npz that holds x_train, y_train, x_test and y_test.

    x: float32 (n, size, size, 1), pixel / 256, so that 8 fractional bits hold an image exactly.
    y: int32 (n,).  The first 10 % of the training images (54,000 + 6,000) are the validation split.
    path: the file; by default `mnist.npz` in the folder that the environment variable PQUANT_DATA names.
    n: the leading n images of training and validation together, and n / 5 of the test images; None for all.
    size: 28, or 14 or 7 for the means of 2 x 2 or 4 x 4 pixels, rounded down to a pixel value.
    Raises: `DataError` for a file that is missing or holds something else, or a size that isn't one of these.
    """
    if size not in SIZES:
        raise DataError(f"size is {size!r}, expected one of {SIZES}: the images have 28 x 28 pixels")
    file = located(path, "mnist.npz")
    arrays = read_npz(file)
    if any(key not in arrays for key in KEYS) or arrays["x_train"].shape[1:] != (28, 28):
        raise DataError(f"{str(file)!r} holds {sorted(arrays)}, expected {', '.join(KEYS)} with images of 28 x 28 pixels")
    if n is not None and not 50 <= n <= len(arrays["x_train"]):
        raise DataError(f"mnist(n={n!r}): n must be from 50 to {len(arrays['x_train'])}, or None for all of them")
    rest = len(arrays["x_train"]) if n is None else n
    cut = round(VALIDATION * rest)
    rows = {"val": slice(cut), "train": slice(cut, rest), "test": slice(None if n is None else n // 5)}
    parts = {}
    for part, row in rows.items():
        source = "test" if part == "test" else "train"
        parts |= {f"x_{part}": _small(arrays[f"x_{source}"][row], size), f"y_{part}": arrays[f"y_{source}"][row]}
    texts = {"classes": list("0123456789"), "source": "MNIST", "licence": "CC BY-SA 3.0"}
    return from_arrays({**parts, **texts}, name="mnist")


def _small(images: np.ndarray, size: int) -> np.ndarray:
    step = images.shape[1] // size
    blocks = images.reshape(len(images), size, step, size, step).astype(np.int64).sum((2, 4)) // step**2
    return (blocks[..., None] / 256).astype(np.float32)
