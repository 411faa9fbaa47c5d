"""What `quantization.beta` may be: a number, pieces, or a target that a controller steers to."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError

from pquant_jax import quantize
from pquant_jax._errors import TransformError
from pquant_jax.config._fields import Count, Fraction, NotNegative, Positive, Section, number

EXPECTED: Final = "a number of 0 or more, pieces [[epoch, beta, constant | linear | log], ...], or {target: EBOPs, ...}"


class Target(Section):
    """beta steered between epochs of the training stage until the model costs `target` EBOPs."""

    target: Positive
    """EBOPs of one sample."""
    beta: Positive = 1e-6
    """While it warms up."""
    p: NotNegative = 1.0
    """Decades of beta per decade of E / target."""
    i: NotNegative = 2e-3
    """The same, of the sum over epochs."""
    d: NotNegative = 0.0
    """The same, of the last change."""
    warmup: Count = 10
    """Epochs before it takes over."""
    log: bool = True
    """Of log10(E / target), and log10(beta); false: of E / target - 1, and beta."""
    damp: Fraction = 0.0
    """Share of beta that is left out while the model is below the target."""
    low: NotNegative = 0.0
    """Least beta."""
    high: Positive = Field(1.0)
    """Largest beta."""


def beta_value(given: Any) -> Any:
    """What a `beta` key stands for, as `quantize.hgq` takes it.  Raises: TransformError for what is no schedule."""
    if isinstance(given, dict):
        return quantize.pid(**given)
    return quantize.piecewise([tuple(piece) for piece in given]) if isinstance(given, (list, tuple)) else given


def _checked(value: Any) -> Any:
    """A float, a list of pieces, or the fields of a `Target`, complete."""
    try:
        if isinstance(value, dict):
            value = Target.model_validate(value).model_dump()
        elif isinstance(value, (list, tuple)):
            value = [[float(number(epoch)), float(number(beta)), shape] for epoch, beta, shape in value]
        else:
            value = float(number(value))
            if not 0 <= value < float("inf"):
                raise ValueError(EXPECTED)
        beta_value(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except TransformError as error:
        raise ValueError(str(error)) from None
    except (TypeError, ValueError):
        raise ValueError(EXPECTED) from None
    return value


Pieces = list[tuple[float, float, Literal["constant", "linear", "log"]]]
BetaValue = Annotated[Any, BeforeValidator(_checked, json_schema_input_type=NotNegative | Pieces | Target)]
