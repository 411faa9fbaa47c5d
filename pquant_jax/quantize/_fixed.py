"""Fixed formats: every site keeps the k, i, f it was given (ap_fixed semantics)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import KIF, Params, SiteSpec, Transform, Tree, View
from pquant_jax.quantize._format import Format, Rules, format_shape, resolve, sign_bits, view_of
from pquant_jax.transforms import hyper, keep_params, labelled, no_penalty


class FixedState(NamedTuple):
    """hyper: none.  kifs: {site: KIF}, float32 arrays; replace an entry to set a format by hand."""

    hyper: dict[str, jax.Array]
    kifs: dict[str, KIF]


def fixed(
    sites: Mapping[str, SiteSpec],
    *,
    weights: Format = Format(i=0, f=7, k=1),
    activations: Format = Format(i=2, f=5),
    rules: Rules = (),
) -> Transform:
    """Quantize every site to a fixed format in all three stages.

    Args:
      sites: `inst.sites`.
      weights, activations: defaults by kind of site.
      rules: (path, regular expression or predicate; Format) in order, the first match wins.
    Raises: TransformError for an unknown mode or a rule that matches nothing.

    >>> t = fixed({"kernel": SiteSpec((2,), "kernel")}, weights=Format(i=0, f=2, k=1))
    >>> params = t.attach({"kernel": jnp.float32([0.3, 2.0])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.25, 0.75]
    """
    formats = resolve(sites, weights, activations, rules)

    def init(params: Params) -> FixedState:
        del params
        kifs = {}
        for name, fmt in formats.items():
            i, f = (jnp.full(format_shape(sites[name], fmt), v, jnp.float32) for v in (fmt.i, fmt.f))
            kifs[name] = KIF(sign_bits(sites[name], fmt), i, f, fmt.rounding, fmt.overflow)
        return FixedState(hyper(), kifs)

    def apply(params: Params, state: FixedState) -> tuple[View, FixedState]:
        return view_of(params.model, state.kifs, sites), state

    def attach(model: Tree) -> Params:
        return Params(model, {})

    return Transform("fixed", attach, init, apply, keep_params, keep_params, no_penalty, labelled("fixed", "bits"))
