"""What the fields of a section are made of: numbers, paths and short forms, with errors that say what is expected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def number(value: Any) -> Any:
    """A number that YAML 1.1 took for a text, such as 1e-5; a bool is none."""
    if isinstance(value, bool):
        raise ValueError("a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number") from None
    return value


def whole(value: Any) -> Any:
    """A whole number, however it is written."""
    try:
        found = number(value)
    except ValueError:
        raise ValueError("a whole number") from None
    if not isinstance(found, (int, float)) or found != found or found in (float("inf"), -float("inf")) or found % 1:
        raise ValueError("a whole number")
    return int(found)


def _pattern(value: Any) -> Any:
    try:
        re.compile(value)
    except (re.error, TypeError):
        raise ValueError("a path such as 'Dense_0/kernel' or a regular expression") from None
    return value


def short(expand: Callable[[Any], Any], also: Any) -> BeforeValidator:
    """Accept the short form of a section; `also` is its type, for the JSON schema."""
    return BeforeValidator(lambda v: v if isinstance(v, (dict, BaseModel)) else expand(v), json_schema_input_type=also)


Float = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(number)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(number)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False), BeforeValidator(number)]
Count = Annotated[int, Field(ge=0), BeforeValidator(whole)]
AtLeastOne = Annotated[int, Field(ge=1), BeforeValidator(whole)]
Sign = Annotated[int, Field(ge=0, le=1), BeforeValidator(whole)]
Where = Annotated[str, BeforeValidator(_pattern)]


class Section(BaseModel):
    """Strict, frozen, and every key described."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
