"""What every quantizer shares: static formats, rules by site name, and the view that a set of formats makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, SiteSpec, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.numerics import check_modes, quantize

_GRANULARITIES = ("element", "channel", "tensor")


@dataclass(frozen=True)
class Format:
    """How one kind of site is quantized.

    i, f: integer and fractional bits to start from (fixed: to keep).  k: sign bit; None takes it where the site can be
    negative.  granularity: one format per "element", per "channel" or per "tensor".
    """

    i: float = 2.0
    f: float = 6.0
    k: int | None = None
    rounding: str = "RND"
    overflow: str = "SAT"
    granularity: str = "element"

    def __post_init__(self) -> None:
        """Raise TransformError for an unknown mode or granularity."""
        try:
            check_modes(self.rounding, self.overflow)
        except ValueError as error:
            raise TransformError(str(error)) from None
        if self.granularity not in _GRANULARITIES:
            raise TransformError(f"granularity is {self.granularity!r}, expected one of {', '.join(_GRANULARITIES)}")


Rules = Sequence[tuple[_tree.Where, Format]]


def resolve(sites: Mapping[str, SiteSpec], weights: Format, activations: Format, rules: Rules) -> dict[str, Format]:
    """The format of every site: the first rule that matches its name, else the default of its kind.

    Raises: TransformError for a rule that matches no site, with the closest names.
    """
    for where, _ in rules:
        if not any(_tree.matches(where, name, spec) for name, spec in sites.items()):
            raise TransformError(f"the rule {where!r} matches no site; {did_you_mean(str(where), sites)}")
    return {
        name: _tree.first_match(rules, name, activations if spec.kind == "input" else weights, spec)
        for name, spec in sites.items()
    }


def format_shape(spec: SiteSpec, fmt: Format) -> tuple[int, ...]:
    """Shape of the k, i, f arrays of a site, of the site's rank so that they broadcast."""
    if fmt.granularity == "element":
        return spec.shape
    kept = spec.channel_axes if fmt.granularity == "channel" else ()
    return tuple(n if axis in kept else 1 for axis, n in enumerate(spec.shape))


def sign_bits(spec: SiteSpec, fmt: Format) -> jax.Array:
    """k of a site as float32, of the format's shape."""
    k = (1 if spec.signed else 0) if fmt.k is None else fmt.k
    return jnp.full(format_shape(spec, fmt), k, jnp.float32)


def view_of(model: Tree, kifs: Mapping[str, KIF], sites: Mapping[str, SiteSpec]) -> View:
    """Quantize every parameter that is a site; formats of all sites ride along for the forward and for `ebops`."""
    leaves = _tree.flatten(model)
    chosen = {n: leaves[n] for n, spec in sites.items() if spec.kind in ("kernel", "bias") and n in leaves}
    quantized = {name: quantize(w, kifs[name], wrap=kifs[name].overflow != "WRAP") for name, w in chosen.items()}
    present = {n: fmt for n, fmt in kifs.items() if sites[n].kind not in ("kernel", "bias") or n in leaves}
    return View(_tree.replace(model, quantized), present, {})
