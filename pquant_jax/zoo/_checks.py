"""Checks that all factories share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pquant_jax._errors import ConfigError


def whole(model: str, **sizes: Any) -> None:
    """Every size is a positive whole number, or a list of such.  Raises: ConfigError naming the model and the argument.

    >>> whole("cnn", filters=[4, 0])
    Traceback (most recent call last):
    pquant_jax._errors.ConfigError: cnn: filters is [4, 0], expected positive whole numbers
    """
    for name, value in sizes.items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        items = list(value) if several else [value]
        if not items or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in items):
            wanted = "positive whole numbers" if several else "a positive whole number"
            raise ConfigError(f"{model}: {name} is {value!r}, expected {wanted}")


def divides(model: str, whole_name: str, whole_value: int, part_name: str, part_value: int) -> None:
    """`part_value` divides `whole_value`.  Raises: ConfigError naming both.

    >>> divides("transformer", "width", 8, "heads", 3)
    Traceback (most recent call last):
    pquant_jax._errors.ConfigError: transformer: width is 8, expected a multiple of heads = 3
    """
    if whole_value % part_value:
        raise ConfigError(f"{model}: {whole_name} is {whole_value!r}, expected a multiple of {part_name} = {part_value!r}")
