"""Fixed formats: every site keeps the k, i, f it was given (ap_fixed semantics)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from pquant_jax._base import KIF, Params, SiteSpec, Transform, Tree, View
from pquant_jax.quantize._format import TABLES, Format, Rules, by_kind, check_width, full_kif, resolve, view_of
from pquant_jax.transforms import hyper, keep_params, labelled, no_penalty


class FixedState(NamedTuple):
    """hyper: none.  kifs: {site: KIF}, float32 arrays; replace an entry to set a format by hand."""

    hyper: dict[str, jax.Array]
    kifs: dict[str, KIF]


def fixed(
    sites: Mapping[str, SiteSpec],
    *,
    weights: Format = Format(i=0, f=7, k=1),
    biases: Format | None = None,
    activations: Format = Format(i=2, f=5),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
) -> Transform:
    """Quantize every site to a fixed format in all three stages.

    Args:
      sites: `inst.sites`.
      weights, biases, activations, tables, outputs: defaults by kind of site; weights are kernels and fused scales and
        offsets, biases are as weights and outputs as activations where they are None.
      rules: (path, regular expression, predicate or `of_kind`; Format, or a mapping of some of its fields) in order, the
        first match wins.
    Raises: TransformError for an unknown mode, a rule that matches nothing, or a format wider than the site's `max_bits`.

    >>> import jax.numpy as jnp
    >>> t = fixed({"kernel": SiteSpec((2,), "kernel")}, weights=Format(i=0, f=2, k=1))
    >>> params = t.attach({"kernel": jnp.float32([0.3, 2.0])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.25, 0.75]
    """
    choices = resolve(sites, by_kind(weights, activations, biases, tables, outputs), rules)
    for name, choice in choices.items():
        check_width(name, sites[name], choice)

    def init(params: Params) -> FixedState:
        del params
        return FixedState(hyper(), {name: full_kif(sites[name], choice.format) for name, choice in choices.items()})

    def apply(params: Params, state: FixedState) -> tuple[View, FixedState]:
        return view_of(params.model, state.kifs, sites, wrap=True), state

    def attach(model: Tree) -> Params:
        return Params(model, {})

    labels = labelled("fixed", "bits")
    return Transform("fixed", attach, init, apply, keep_params, keep_params, no_penalty, labels, formats=choices)
