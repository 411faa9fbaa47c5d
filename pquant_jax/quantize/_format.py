"""What every quantizer shares: static formats, defaults by kind of site, rules, and the view that a set of formats makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, SiteSpec, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.numerics import check_modes, quantize

GRANULARITIES: Final = ("element", "channel", "tensor")
KINDS: Final = ("input", "kernel", "bias", "scale", "offset", "table", "output")
PARAMETERS: Final = ("kernel", "bias")  # the sites that are leaves of the model: the view holds them quantized


@dataclass(frozen=True)
class Format:
    """How one kind of site is quantized.

    i, f: integer and fractional bits to start from (fixed: to keep).  k: sign bit; None takes it where the site can be
    negative.  granularity: one format per "element", per "channel" or per "tensor", or the axes that share one, such as
    (0,) for all rows of a kernel or of a sample; () is per element.  trainable: False keeps i and f still where the
    quantizer would move them.
    """

    i: float = 2.0
    f: float = 6.0
    k: int | None = None
    rounding: str = "RND"
    overflow: str = "SAT"
    granularity: str | tuple[int, ...] = "element"
    trainable: bool = True

    def __post_init__(self) -> None:
        """Raise TransformError for an unknown mode or granularity."""
        try:
            check_modes(self.rounding, self.overflow)
        except ValueError as error:
            raise TransformError(str(error)) from None
        if isinstance(self.granularity, list):  # a file has no tuples
            object.__setattr__(self, "granularity", tuple(self.granularity))
        axes = isinstance(self.granularity, tuple) and all(isinstance(a, int) for a in self.granularity)
        if not axes and self.granularity not in GRANULARITIES:
            raise TransformError(
                f"granularity is {self.granularity!r}, expected one of {', '.join(GRANULARITIES)} or the axes that share one"
            )


class Choice(NamedTuple):
    """What a quantizer does at a site.  source: where the format comes from.  moves: what of it changes; "" nothing."""

    format: Format
    source: str
    moves: str = ""


Rules = Sequence[tuple[_tree.Where, Format | Mapping[str, Any]]]
Defaults = Mapping[str, Format]

TABLES: Final = Format(i=1, f=6, granularity="tensor")


def by_kind(
    weights: Format, activations: Format, biases: Format | None = None, tables: Format = TABLES, outputs: Format | None = None
) -> Defaults:
    """The default format of every kind of site; biases are as weights, outputs as activations where they are left out."""
    biases, outputs = weights if biases is None else biases, activations if outputs is None else outputs
    derived = {"scale": weights, "offset": weights}
    return {"kernel": weights, "bias": biases, **derived, "input": activations, "table": tables, "output": outputs}


def of_kind(*kinds: str, where: _tree.Where = ".*") -> Callable[[str, Any], bool]:
    """The `where` of a rule for all sites of these kinds, and of these names.

    Raises: TransformError for an unknown kind.

    >>> spec = SiteSpec((3,), "bias")
    >>> of_kind("bias")("Dense_0/bias", spec), of_kind("bias", where="Dense_1/.*")("Dense_0/bias", spec)
    (True, False)
    """
    for kind in kinds:
        if kind not in KINDS:
            raise TransformError(f"{kind!r} is no kind of site; {did_you_mean(kind, KINDS)}; expected one of {', '.join(KINDS)}")

    def matches(name: str, spec: Any) -> bool:
        return spec.kind in kinds and _tree.matches(where, name, spec)

    matches.__name__ = f"kind {' or '.join(kinds)}" + (f", {label(where)}" if where != ".*" else "")
    return matches


def label(where: _tree.Where) -> str:
    """What a rule is called in a table and in an error."""
    return where if isinstance(where, str) else getattr(where, "__name__", repr(where))


def resolve(sites: Mapping[str, SiteSpec], defaults: Defaults, rules: Rules) -> dict[str, Choice]:
    """The format of every site: the first rule that matches it, else what the model asks for, else the default of its kind.

    A rule may give some fields of a format; the others are what the site would have without it.
    Raises: TransformError for a rule that matches no site, with the closest names, for an unknown field, and for axes that
      a site does not have.

    >>> sites = {"a/kernel": SiteSpec((4, 3), "kernel"), "a/input": SiteSpec((4,), "input")}
    >>> made = resolve(sites, by_kind(Format(i=0, f=7), Format(i=2, f=5)), [("a/kernel", {"f": 3})])
    >>> [(c.format.i, c.format.f, c.source) for c in made.values()]
    [(0, 3, "rule 'a/kernel'"), (2, 5, 'default for input')]
    """
    for where, changes in rules:
        if not any(_tree.matches(where, name, spec) for name, spec in sites.items()):
            raise TransformError(f"the rule {label(where)!r} matches no site; {did_you_mean(label(where), sites)}")
        known = [f.name for f in fields(Format)]
        for key in changes if isinstance(changes, Mapping) else ():
            if key not in known:
                raise TransformError(f"the rule {label(where)!r} sets {key!r}; {did_you_mean(key, known)}")
    made = {name: _chosen(name, spec, defaults, rules) for name, spec in sites.items()}
    for name, choice in made.items():
        check_axes(name, sites[name], choice)
    return made


def _chosen(name: str, spec: SiteSpec, defaults: Defaults, rules: Rules) -> Choice:
    base = Choice(defaults[spec.kind], f"default for {spec.kind}")
    if spec.format is not None:
        if not isinstance(spec.format, Format):
            kind = type(spec.format).__name__
            raise TransformError(f"site {name!r}: the model asks for a {kind} as format, expected a pq.quantize.Format")
        base = Choice(spec.format, "the model's own format")
    found = next(((where, fmt) for where, fmt in rules if _tree.matches(where, name, spec)), None)
    if found is None:
        return base
    where, changes = found
    made = changes if isinstance(changes, Format) else replace(base.format, **changes)
    return Choice(made, f"rule {label(where)!r}")


def check_axes(name: str, spec: SiteSpec, choice: Choice) -> None:
    """Raise TransformError for axes that share a format which a site does not have."""
    axes, rank = choice.format.granularity, len(spec.shape)
    if isinstance(axes, tuple) and any(not -rank <= a < rank for a in axes):
        raise TransformError(
            f"site {name!r} of shape {spec.shape} has no axes {axes} to share a format along ({choice.source}); "
            f"give it a rule with a granularity of its own, such as 'tensor'"
        )


def check_width(name: str, spec: SiteSpec, choice: Choice) -> None:
    """Raise TransformError where a format that stays as it is has more bits than the hardware takes at this site."""
    fmt = choice.format
    width = int(sign_bit(spec, fmt) + np.rint(fmt.i) + np.rint(fmt.f))
    if spec.max_bits and width > spec.max_bits:
        raise TransformError(
            f"site {name!r} has {width} bits ({choice.source}), the limit is {spec.max_bits}: a table has 2^bits entries; "
            f"add a rule such as ({name!r}, {{'f': {np.rint(fmt.f) - width + spec.max_bits:g}}})"
        )


def axes_shared(spec: SiteSpec, fmt: Format) -> tuple[int, ...]:
    """The axes of a site along which one format serves all elements."""
    rank = len(spec.shape)
    if isinstance(fmt.granularity, tuple):
        return tuple(sorted({a % rank for a in fmt.granularity}))
    kept = {"element": tuple(range(rank)), "channel": spec.channel_axes, "tensor": ()}[fmt.granularity]
    return tuple(a for a in range(rank) if a not in kept)


def format_shape(spec: SiteSpec, fmt: Format) -> tuple[int, ...]:
    """Shape of the k, i, f arrays of a site, of the site's rank so that they broadcast."""
    shared = axes_shared(spec, fmt)
    return tuple(1 if axis in shared else n for axis, n in enumerate(spec.shape))


def sign_bit(spec: SiteSpec, fmt: Format) -> int:
    """k of a site: the format's, or 1 where the value can be negative."""
    return int(spec.signed) if fmt.k is None else fmt.k


def sign_bits(spec: SiteSpec, fmt: Format) -> jax.Array:
    """k of a site as float32, of the format's shape."""
    return jnp.full(format_shape(spec, fmt), sign_bit(spec, fmt), jnp.float32)


def full_kif(spec: SiteSpec, fmt: Format) -> KIF:
    """The format of a site as float32 arrays."""
    i, f = (jnp.full(format_shape(spec, fmt), v, jnp.float32) for v in (fmt.i, fmt.f))
    return KIF(sign_bits(spec, fmt), i, f, fmt.rounding, fmt.overflow)


def view_of(model: Tree, kifs: Mapping[str, KIF], sites: Mapping[str, SiteSpec], *, wrap: bool = False) -> View:
    """Quantize every parameter that is a site; formats of all sites ride along for the forward and for `ebops`.

    wrap: parameters may be out of the range of a format that wraps; where i follows the values they never are.
    """
    leaves = _tree.flatten(model)
    chosen = {n: leaves[n] for n, spec in sites.items() if spec.kind in PARAMETERS and n in leaves and n in kifs}
    quantized = {name: quantize(w, kifs[name], wrap=wrap or kifs[name].overflow != "WRAP") for name, w in chosen.items()}
    present = {n: fmt for n, fmt in kifs.items() if sites[n].kind not in PARAMETERS or n in leaves}
    return View(_tree.replace(model, quantized), present, {})


def defaults_of(factory: Callable) -> dict[str, Format | None]:
    """{argument: format} of what a quantizer's factory does where nothing is said.

    >>> from pquant_jax.quantize import fixed
    >>> defaults_of(fixed)["weights"].f
    7
    """
    parameters = inspect.signature(factory).parameters
    names = ("weights", "biases", "activations", "tables", "outputs")
    return {name: parameters[name].default for name in names if name in parameters}


def fields_of(fmt: Format) -> dict[str, Any]:
    """A format as plain values, for a file."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(fmt).items()}
