"""Dynamic formats: the width is given, how much of it is integer bits follows the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, Event, Params, SiteSpec, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.numerics import ceil_log2
from pquant_jax.quantize._format import (
    PARAMETERS,
    TABLES,
    Choice,
    Format,
    Rules,
    axes_shared,
    by_kind,
    check_width,
    format_shape,
    full_kif,
    resolve,
    sign_bits,
    view_of,
)
from pquant_jax.quantize._ranges import F_LIMITS, I_LIMITS, needed_bits, shared_range, site_range
from pquant_jax.transforms import check_compat, hyper, labelled, no_penalty

_EPSILON = 1e-6  # PQuantML's, so that 1.0 needs an integer bit


class DynamicState(NamedTuple):
    """hyper: decay.  i: {site: integer bits} of what enters layers; a parameter's come from its own values."""

    hyper: dict[str, jax.Array]
    i: dict[str, jax.Array]


def dynamic(
    sites: Mapping[str, SiteSpec],
    *,
    decay: float = 0.01,
    weights: Format = Format(i=0, f=7, k=1, granularity="channel"),
    biases: Format | None = None,
    activations: Format = Format(i=2, f=5, granularity="tensor"),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
    compat: str | None = None,
) -> Transform:
    """Quantize every site to k + i + f bits, of which i are as many as its values need; no gradient to the bits.

    b = k + i + f of the format stays.  Parameters: i is the smallest that holds the values of a group (element, channel,
    tensor), each time they are read; f = b - k - i, and both may be negative.  Activations: i follows the range of the
    batch as in HGQ, i <- max(i - decay, needed), one step behind, and `pq.calibrate` sets it exactly, by range,
    percentile or squared error.  Half of a step beyond the range saturates.

    compat="pquantml": i = clip(ceil(log2(max|x| + 1e-6)), 0, b - k), f = b - k - i; kernels that share one format per
    tensor and all other parameters keep theirs, activations follow the last batch, each site as one tensor.

    Args:
      sites: `inst.sites`.
      decay: bits per step that an activation's i may sink.
      weights, biases, activations, tables, outputs, rules: as in `fixed`; what is not `trainable` stays as it is.
    Raises: TransformError for a rule that matches nothing or a format wider than the site's `max_bits`.

    >>> four_bits = Format(i=0, f=3, k=1, granularity="channel")
    >>> t = dynamic({"kernel": SiteSpec((2, 3), "kernel", channel_axes=(1,))}, weights=four_bits)
    >>> params = t.attach({"kernel": jnp.float32([[0.2, 0.7, 3.0], [-0.1, 0.3, 0.4]])})
    >>> view, _ = t.apply(params, t.init(params))
    >>> view.sites["kernel"].i.tolist(), view.model["kernel"].tolist()
    ([[-2.0, 0.0, 2.0]], [[0.1875, 0.75, 3.0], [-0.09375, 0.25, 0.5]])
    """
    theirs = check_compat(compat)
    choices = resolve(sites, by_kind(weights, activations, biases, tables, outputs), rules)
    choices = {name: _choice(name, sites[name], choice, theirs) for name, choice in choices.items()}
    still = {name: full_kif(sites[name], c.format) for name, c in choices.items() if not c.moves}
    formats = {name: c.format for name, c in choices.items() if c.moves}
    widths = {name: float(round(fmt.i) + round(fmt.f)) for name, fmt in formats.items()}  # without the sign
    followed = sorted(name for name in formats if sites[name].kind not in PARAMETERS)

    def needed(name: str, low: jax.Array, high: jax.Array) -> jax.Array:
        if theirs:
            reach = jnp.maximum(-low, high) + jnp.float32(_EPSILON)
            return jnp.clip(ceil_log2(reach), 0, widths[name])
        k, f = jnp.zeros_like(low), jnp.full_like(low, F_LIMITS[1])
        bits = needed_bits(low, high, k, f, formats[name].rounding, widths[name])
        # a group of zeros has no range; it keeps what it began with
        return jnp.clip(jnp.where((low == 0) & (high == 0), formats[name].i, bits), *I_LIMITS)

    def kif_of(name: str, i: jax.Array) -> KIF:
        fmt = formats[name]
        return KIF(
            sign_bits(sites[name], fmt), i, jnp.minimum(widths[name] - jnp.round(i), F_LIMITS[1]), fmt.rounding, fmt.overflow
        )

    def init(params: Params) -> DynamicState:
        del params
        i = {name: jnp.full(format_shape(sites[name], formats[name]), formats[name].i, jnp.float32) for name in followed}
        return DynamicState(hyper(decay=decay), i)

    def apply(params: Params, state: DynamicState) -> tuple[View, DynamicState]:
        leaves, made = _tree.flatten(params.model), dict(still)
        for name, fmt in formats.items():
            if name in state.i:
                made[name] = kif_of(name, state.i[name])
            elif name in leaves:
                w = jax.lax.stop_gradient(leaves[name])
                made[name] = kif_of(name, needed(name, *shared_range(w, w, format_shape(sites[name], fmt))))
        return view_of(params.model, {name: made[name] for name in choices if name in made}, sites), state

    def from_ranges(state: DynamicState, stats: Stats, decay: jax.Array) -> dict[str, jax.Array]:
        moved = {}
        for name, i in state.i.items():
            now = needed(name, *site_range(stats, name, i.shape))
            moved[name] = now if theirs else jnp.maximum(jnp.clip(i - decay, *I_LIMITS), now)
        return moved

    def step(params: Params, state: DynamicState, *, stats: Stats, **extra: Any) -> tuple[Params, DynamicState]:
        del extra
        return params, state._replace(i=from_ranges(state, stats, state.hyper["decay"])) if followed else state

    def boundary(params: Params, state: DynamicState, *, event: Any, stats: Stats, **extra: Any) -> tuple[Params, DynamicState]:
        del extra
        if not stats or not followed:
            return params, state
        exact = from_ranges(state, stats, jnp.full((), jnp.inf, jnp.float32))
        chosen = {name: fmt[0] for name, fmt in stats.get("format", {}).items()}
        i = {name: jnp.where(event == Event.CALIBRATE, chosen.get(name, exact[name]), old) for name, old in state.i.items()}
        return params, state._replace(i=i)

    def attach(model: Tree) -> Params:
        return Params(model, {})

    needs = frozenset({"range"}) if followed else frozenset()
    labels = labelled("dynamic", "bits")
    return Transform("dynamic", attach, init, apply, step, boundary, no_penalty, labels, needs, choices)


def _choice(name: str, spec: SiteSpec, choice: Choice, theirs: bool) -> Choice:
    """What moves at a site.  Raises: TransformError where a width can't be."""
    fmt = choice.format
    check_width(name, spec, choice)
    if not fmt.trainable:
        return choice
    if not 0 < round(fmt.i) + round(fmt.f) <= F_LIMITS[1]:
        raise TransformError(
            f"{name}: i + f is {fmt.i + fmt.f:g} ({choice.source}), expected 1 to 24 bits to divide, or trainable=False"
        )
    if spec.kind not in PARAMETERS:
        if theirs:
            choice = choice._replace(format=Format(**{**vars(fmt), "granularity": "tensor"}))
        return choice._replace(moves="i follows the range")
    static = theirs and (len(spec.shape) < 2 or len(axes_shared(spec, fmt)) == len(spec.shape))
    return choice if static else choice._replace(moves="i follows its values")
