"""The sections of quantizers: formats by kind of site, rules, and what each method has besides.

What a section leaves out is the default of the method's factory in `pquant_jax.quantize`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, cast

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from pquant_jax import quantize
from pquant_jax.config._beta import BetaValue
from pquant_jax.config._fields import Float, NotNegative, Positive, Section, Sign, Where, number, whole

ROUNDINGS = Literal["TRN", "RND", "RND_CONV", "TRN_ZERO", "RND_ZERO", "RND_MIN_INF", "RND_INF"]
OVERFLOWS = Literal["SAT", "SAT_SYM", "WRAP", "WRAP_SM"]
KIND = Literal["input", "kernel", "bias", "scale", "offset", "table", "output"]
TRAINED_OVERFLOWS = ("SAT", "SAT_SYM", "WRAP")
LIKE = {"biases": "weights", "outputs": "activations"}  # what is left out is as there


def _axes(value: Any) -> Any:
    wrong = ValueError("element, channel, tensor or a list of the axes that share a format, such as [0]")
    if not isinstance(value, (list, tuple)):
        if value in quantize.GRANULARITIES:
            return value
        raise wrong
    try:
        return [whole(axis) for axis in value]
    except ValueError:
        raise wrong from None


Axes = Annotated[
    str | list[int], BeforeValidator(_axes, json_schema_input_type=Literal["element", "channel", "tensor"] | list[int])
]


def _nothing_required(schema: dict[str, Any]) -> None:
    schema.pop("required", None)


class Bits(Section):
    """How one kind of site is quantized; what is left out comes from the method's default."""

    model_config = ConfigDict(json_schema_extra=_nothing_required)

    i: Float
    """Integer bits without the sign."""
    f: Float
    """Fractional bits."""
    k: Sign | None
    """Sign bit; null: where the value can be negative."""
    rounding: ROUNDINGS
    overflow: OVERFLOWS
    granularity: Axes
    """One format per element, output channel or tensor; or the axes that share one, such as [0]."""


class MovingBits(Bits):
    """How one kind of site is quantized; what is left out comes from the method's default."""

    trainable: bool
    """false: i and f stay as they are."""


class Rule(Section):
    """Another format for the sites it matches; what is left out is what the site would have without the rule."""

    where: Where | None = None
    """Name of a site, such as 'Dense_0/kernel' or 'Dense_3/input', or a regular expression; null: all names."""
    kind: KIND | None = None
    """Only sites of this kind; null: all kinds."""
    i: Float | None = None
    f: Float | None = None
    k: Sign | None = None
    rounding: ROUNDINGS | None = None
    overflow: OVERFLOWS | None = None
    granularity: Axes | None = None

    @model_validator(mode="after")
    def _selects(self) -> Self:
        if self.where is None and self.kind is None:
            raise ValueError("a rule with 'where', a site's name, or 'kind', such as kernel")
        return self


class MovingRule(Rule):
    """Another format for the sites it matches; what is left out is what the site would have without the rule."""

    trainable: bool | None = None


def formats_of(method: str) -> dict[str, Any]:
    """{section: fields} of a method's default formats; None where it is as another's."""
    found = quantize.defaults_of(getattr(quantize, method))
    return {name: None if fmt is None else quantize.fields_of(fmt) for name, fmt in found.items()}


def _bits(method: str, name: str, section: type[Bits]) -> Any:
    given = formats_of(method)[name]
    return None if given is None else section(**{k: v for k, v in given.items() if k in section.model_fields})


def _completed(method: str, section: type[Bits], data: Any) -> Any:
    """A quantizer's raw section with every format written out."""
    if not isinstance(data, dict):
        return data
    made, defaults = dict(data), formats_of(method)
    for name in sorted(defaults, key=lambda name: name in LIKE):  # biases after weights
        given, base = made.get(name), defaults[name]
        if not isinstance(given, dict):
            continue
        if base is None:
            like = made.get(LIKE.get(name, ""))
            base = like.model_dump() if isinstance(like, Bits) else like if isinstance(like, dict) else defaults[LIKE[name]]
        made[name] = {**{k: v for k, v in base.items() if k in section.model_fields}, **given}
    return made


class Quantizer(Section):
    """What all quantizers' sections have: each format given in part is written out from the method's default."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        fields = cls.model_fields
        return _completed(fields["method"].default, cast(type[Bits], fields["activations"].annotation), data)


class HGQ(Quantizer):
    """Bit-widths trained by gradient, per element, under the pressure of beta x EBOPs."""

    method: Literal["hgq"] = "hgq"
    beta: BetaValue = 1e-5
    """Penalty per EBOP at the start of the training stage; or pieces [[epoch, beta, linear], ...], or {target: EBOPs}."""
    beta_end: NotNegative | None = None
    """Penalty per EBOP at its end, reached geometrically; null: as beta."""
    gamma: NotNegative | None = None
    """Penalty per raw bit; null: none."""
    decay: NotNegative = 0.01
    """Bits per step that a tracked range may shrink (overflow WRAP)."""
    freeze: bool = True
    """Hold bit-widths still in fine-tuning."""
    weights: MovingBits = _bits("hgq", "weights", MovingBits)
    """Starting format of kernels and fused scales."""
    biases: MovingBits | None = None
    """Of biases; null, and what is left out: as weights."""
    activations: MovingBits = _bits("hgq", "activations", MovingBits)
    """Starting format of what enters a layer."""
    tables: MovingBits = _bits("hgq", "tables", MovingBits)
    """Of what a table gives: tanh, gelu, softmax's parts."""
    outputs: MovingBits | None = None
    """Of the model's outputs, where they have one; null, and what is left out: as activations."""
    rules: list[MovingRule] = []
    """Exceptions, the first match wins."""

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        formats = ((name, getattr(self, name)) for name in formats_of("hgq"))
        for name, bits in (*formats, *((rule.where or rule.kind, rule) for rule in self.rules)):
            if bits is not None and bits.overflow == "WRAP_SM" and bits.trainable is not False:
                raise ValueError(f"overflow {' or '.join(TRAINED_OVERFLOWS)} for {name}: WRAP_SM has no trained range")
        return self


class Fixed(Quantizer):
    """The same formats throughout, as ap_fixed."""

    method: Literal["fixed"] = "fixed"
    weights: Bits = _bits("fixed", "weights", Bits)
    """Format of kernels and fused scales."""
    biases: Bits | None = None
    """Of biases; null, and what is left out: as weights."""
    activations: Bits = _bits("fixed", "activations", Bits)
    """Format of what enters a layer."""
    tables: Bits = _bits("fixed", "tables", Bits)
    """Of what a table gives: tanh, gelu, softmax's parts."""
    outputs: Bits | None = None
    """Of the model's outputs, where they have one; null, and what is left out: as activations."""
    rules: list[Rule] = []
    """Exceptions, the first match wins."""


class Dynamic(Quantizer):
    """Widths of k + i + f bits, divided as the values need; i and f only say where that begins."""

    method: Literal["dynamic"] = "dynamic"
    decay: NotNegative = 0.01
    """Bits per step that an activation's range may shrink."""
    weights: MovingBits = _bits("dynamic", "weights", MovingBits)
    """Format of kernels and fused scales."""
    biases: MovingBits | None = None
    """Of biases; null, and what is left out: as weights."""
    activations: MovingBits = _bits("dynamic", "activations", MovingBits)
    """Format of what enters a layer."""
    tables: MovingBits = _bits("dynamic", "tables", MovingBits)
    """Of what a table gives: tanh, gelu, softmax's parts."""
    outputs: MovingBits | None = None
    """Of the model's outputs, where they have one; null, and what is left out: as activations."""
    rules: list[MovingRule] = []
    """Exceptions, the first match wins."""
    compat: Literal["pquantml"] | None = None
    """Do as PQuantML does where that differs, to compare with it."""


class Binary(Quantizer):
    """Kernels of two values, +s and -s, with a power of two s; the rest in fixed formats."""

    method: Literal["binary"] = "binary"
    granularity: Axes = "channel"
    """Which weights share s: element, channel, tensor, or the axes that share one, such as [0]."""
    clip: Positive = 3.0
    """The gradient passes to weights up to clip * s."""
    biases: Bits = _bits("binary", "biases", Bits)
    """Format of biases and fused scales."""
    activations: Bits = _bits("binary", "activations", Bits)
    """Format of what enters a layer."""
    tables: Bits = _bits("binary", "tables", Bits)
    """Of what a table gives: tanh, gelu, softmax's parts."""
    outputs: Bits | None = None
    """Of the model's outputs, where they have one; null, and what is left out: as activations."""
    rules: list[Rule] = []
    """Exceptions, the first match wins; a kernel that one matches is a fixed-point number."""


class Ternary(Binary):
    """Kernels of three values, +s, 0 and -s, with a power of two s; the rest in fixed formats."""

    method: Literal["ternary"] = "ternary"  # pyright: ignore[reportIncompatibleVariableOverride]
    threshold: NotNegative = 0.7
    """Weights up to threshold * mean |w| are 0."""


class Minifloat(Quantizer):
    """Kernels as small floating-point numbers whose bits are trained; the rest in fixed formats."""

    method: Literal["minifloat"] = "minifloat"
    m: Annotated[float, Field(ge=-1, le=22, allow_inf_nan=False), BeforeValidator(number)] = 3.0
    """Mantissa bits to start from, without the leading one."""
    e: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False), BeforeValidator(number)] = 3.0
    """Exponent bits to start from."""
    e0: Annotated[float, Field(ge=-16, le=16, allow_inf_nan=False), BeforeValidator(number)] = 0.0
    """Exponent offset to start from."""
    granularity: Axes = "channel"
    """Which weights share them: element, channel, tensor, or the axes that share one, such as [0]."""
    beta: NotNegative = 0.0
    """Penalty per EBOP."""
    freeze: bool = True
    """Hold the bits still in fine-tuning."""
    biases: Bits = _bits("minifloat", "biases", Bits)
    """Format of biases and fused scales."""
    activations: Bits = _bits("minifloat", "activations", Bits)
    """Format of what enters a layer."""
    tables: Bits = _bits("minifloat", "tables", Bits)
    """Of what a table gives: tanh, gelu, softmax's parts."""
    outputs: Bits | None = None
    """Of the model's outputs, where they have one; null, and what is left out: as activations."""
    rules: list[Rule] = []
    """Exceptions, the first match wins; a kernel that one matches is a fixed-point number."""
    compat: Literal["hgq2"] | None = None
    """Do as HGQ2 does where that differs, to compare with it."""


class Frozen(Section):
    """The formats and masks of a finished run, held still: what is trained fits the weight ports of its netlist."""

    method: Literal["frozen"]
    of: str
    """A run of the same model, or its final.npz.  Start from its weights, training.init: few weights from nothing may all die."""


Quantization = Annotated[HGQ | Fixed | Frozen | Dynamic | Binary | Ternary | Minifloat, Field(discriminator="method")]
