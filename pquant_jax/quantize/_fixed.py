"""Formats that stay as they are: one of ap_fixed for every site (`fixed`), or those of another model (`frozen`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import KIF, Params, SiteSpec, Transform, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.quantize._format import (
    PARAMETERS,
    TABLES,
    Choice,
    Format,
    Rules,
    by_kind,
    check_width,
    full_kif,
    resolve,
    view_of,
)
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
    return _still("fixed", sites, {name: full_kif(sites[name], choice.format) for name, choice in choices.items()}, choices)


def frozen(sites: Mapping[str, SiteSpec], kifs: Mapping[str, KIF]) -> Transform:
    """Quantize sites to formats found elsewhere, per element, in all three stages: for another weight set of a finished model.

    With `prune.frozen(view.masks)` in front of it what is trained has the formats and masks of the finished `view`, and so fits
    the weight ports of its netlist (`lower.weights_of`).  Parameters saturate even where the format wraps: a weight out of the
    range that others needed would come back with another sign, and what is in range is the same.

    Args:
      kifs: {site: KIF that broadcasts to it}, `view.sites` of a finished model.
    Raises: TransformError for a site that isn't there, or a format of another shape.

    >>> import jax.numpy as jnp
    >>> t = frozen({"kernel": SiteSpec((2,), "kernel")}, {"kernel": KIF(jnp.ones(2), jnp.zeros(2), jnp.float32([2, 0]))})
    >>> params = t.attach({"kernel": jnp.float32([0.3, 0.7])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.25, 0.0]
    """
    for name, kif in kifs.items():
        if name not in sites:
            raise TransformError(f"no site {name!r} for a format; {did_you_mean(name, sites)}")
        try:
            shape = np.broadcast_shapes(*(np.shape(v) for v in (kif.k, kif.i, kif.f)), sites[name].shape)
        except ValueError:
            shape = None
        if shape != sites[name].shape:
            raise TransformError(f"the format of {name} has the shape {np.shape(kif.f)}, expected the site's {sites[name].shape}")
    kept = {n: replace(kif, overflow="SAT") if _wraps(sites[n], kif) else kif for n, kif in kifs.items()}
    return _still("frozen_formats", sites, kept, {name: _widest(kif) for name, kif in kept.items()})


def _wraps(spec: SiteSpec, kif: KIF) -> bool:
    return spec.kind in PARAMETERS and kif.overflow.startswith("WRAP")


def _widest(kif: KIF) -> Choice:
    """What `explain` says of a format per element."""
    k, i, f = (float(np.max(np.asarray(v))) for v in (kif.k, kif.i, kif.f))
    return Choice(Format(k=int(k), i=i, f=f, rounding=kif.rounding, overflow=kif.overflow), "found elsewhere, the widest of it")


def _still(name: str, sites: Mapping[str, SiteSpec], kifs: Mapping[str, KIF], choices: Mapping[str, Choice]) -> Transform:
    given = {site: jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), kif) for site, kif in kifs.items()}

    def init(params: Params) -> FixedState:
        del params
        return FixedState(hyper(), jax.tree.map(jnp.array, given))  # a copy: a step may be given its memory

    def apply(params: Params, state: FixedState) -> tuple[View, FixedState]:
        return view_of(params.model, state.kifs, sites, wrap=True), state

    def attach(model: Tree) -> Params:
        return Params(model, {})

    return Transform(name, attach, init, apply, keep_params, keep_params, no_penalty, labelled(name, "bits"), formats=choices)
