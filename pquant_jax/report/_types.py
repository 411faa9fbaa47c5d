"""What a report is made of: plain numpy, saved beside a run, so that it can be drawn again later."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError

ACTIVATIONS: Final = ("input", "table", "output")
KINDS: Final = ("kernel", "bias", "scale", "offset", *ACTIVATIONS)


class Profile(NamedTuple):
    """One quantize site: its format and what it was seen to hold.

    name: "Dense_0/kernel"; the part before the last slash is the layer.
    kind: one of `KINDS`; all but `ACTIVATIONS` are weights.
    k, i, f: integer arrays: sign bit, integer bits without the sign, fractional bits; one number, or one per element
        of the site (what broadcasts to its shape).
    low, high: the smallest and largest value seen before quantization, scalars or per element.
    quantiles: (5,), the 0, 25, 50, 75 and 100 % points of |value| over all elements.
    values: the final weights, or None for activations.
    """

    name: str
    kind: str
    k: np.ndarray
    i: np.ndarray
    f: np.ndarray
    low: np.ndarray | float
    high: np.ndarray | float
    quantiles: np.ndarray
    values: np.ndarray | None = None


def bits(profile: Profile) -> np.ndarray:
    """The width of each element, max(k + i + f, 0) bits; 0 where the final weight is 0, which costs nothing.

    >>> one = np.array(1)
    >>> bits(Profile("a/kernel", "kernel", one, one, one, -1, 1, np.zeros(5), np.array([0.5, 0.0]))).tolist()
    [3, 0]
    """
    width = np.maximum(np.asarray(profile.k) + profile.i + profile.f, 0)
    if profile.values is None:
        return width
    return np.where(np.asarray(profile.values) != 0, width, 0)


def layer(profile: Profile) -> str:
    """The name without its last part; the whole name if it has one part.

    >>> layer(Profile("a/b/kernel", "kernel", *[np.zeros(())] * 5, np.zeros(5)))
    'a/b'
    """
    return profile.name.rpartition("/")[0] or profile.name


def check_kinds(profiles: Sequence[Profile]) -> None:
    """Raises `DataError` for a profile whose kind is not one of `KINDS`."""
    for profile in profiles:
        if profile.kind not in KINDS:
            raise DataError(f"profile {profile.name!r} has the kind {profile.kind!r}, expected one of {KINDS}")


def save_profiles(path: str | os.PathLike[str], profiles: Sequence[Profile]) -> None:
    """Write `profiles` to an .npz, under a temporary name first; `load_profiles` reads them back."""
    path = Path(path)
    arrays = {
        f"{index}/{field}": np.asarray(value)
        for index, profile in enumerate(profiles)
        for field, value in zip(Profile._fields, profile, strict=True)
        if value is not None
    }
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:  # a file object: given a name, savez would append another .npz to it
        np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
    os.replace(temporary, path)


def load_profiles(path: str | os.PathLike[str]) -> list[Profile]:
    """The profiles in a file of `save_profiles`; `DataError` for a file that is missing or something else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        count = 1 + max((int(name.partition("/")[0]) for name in arrays), default=-1)
        return [_profile({f: arrays.get(f"{index}/{f}") for f in Profile._fields}) for index in range(count)]
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{os.fspath(path)!r} is no file of profiles ({error}); write one with save_profiles") from error


def _profile(fields: dict[str, Any]) -> Profile:
    missing = [name for name, value in fields.items() if value is None and name != "values"]
    if missing:
        raise ValueError(f"a profile lacks {', '.join(missing)}")
    fields.update(name=str(fields["name"]), kind=str(fields["kind"]))
    return Profile(**fields)
