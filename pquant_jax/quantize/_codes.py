"""Kernels of few values: binary and ternary weights with a power of two as scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, SiteSpec, Transform, Tree, View
from pquant_jax.numerics import ceil_log2, power_of_two
from pquant_jax.quantize._format import (
    TABLES,
    Choice,
    Format,
    Rules,
    axes_shared,
    by_kind,
    check_axes,
    check_width,
    full_kif,
    resolve,
    view_of,
)
from pquant_jax.quantize._ranges import I_LIMITS
from pquant_jax.transforms import hyper, keep_params, labelled, no_penalty, through

OTHERS = Format(i=3, f=8, k=1)
"""Of biases and fused scales and offsets beside kernels that are no fixed-point numbers to begin with."""
_ROOT_HALF = 0.5**0.5

Code = Callable[[jax.Array, tuple[int, ...], dict[str, jax.Array]], tuple[jax.Array, KIF]]


class CodesState(NamedTuple):
    """hyper: clip, and threshold of ternary weights.  kifs: {site: KIF} of all sites but the kernels, as in `FixedState`."""

    hyper: dict[str, jax.Array]
    kifs: dict[str, KIF]


def binary(
    sites: Mapping[str, SiteSpec],
    *,
    granularity: str | tuple[int, ...] = "channel",
    clip: float = 3.0,
    biases: Format = OTHERS,
    activations: Format = Format(i=2, f=5),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
) -> Transform:
    """Kernels of two values: w -> s sign(w), s = 2^round(log2(mean |w|)) of all that share a scale.

    Gradient: dw = u where |w| <= clip s, else 0; none through s (Rastegari et al., arXiv:1603.05279, with the scale on a
    power of two, which is a shift).  Bits of a weight: 1, as +s is one bit without a sign and -s the sign bit alone, so
    the format differs by element.  A weight that is exactly 0 was pruned in front of here and stays 0, with no bit.

    Args:
      sites: `inst.sites`.
      granularity: which weights share a scale.
      clip: of the gradient, in units of s.
      biases: format of biases and fused scales and offsets.  activations, tables, outputs: as in `fixed`.
      rules: as in `fixed`; a kernel that one matches is a fixed-point number, such as the first and the last layer's.
    Raises: TransformError for a rule that matches nothing or a format wider than the site's `max_bits`.

    >>> t = binary({"kernel": SiteSpec((2, 2), "kernel", channel_axes=(1,))})
    >>> params = t.attach({"kernel": jnp.float32([[0.3, -3.0], [-0.2, -5.0]])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [[0.25, -4.0], [-0.25, -4.0]]
    """
    defaults = by_kind(biases, activations, biases, tables, outputs)
    return _coded("binary", _binary, sites, granularity, hyper(clip=clip), resolve(sites, defaults, rules))


def ternary(
    sites: Mapping[str, SiteSpec],
    *,
    granularity: str | tuple[int, ...] = "channel",
    threshold: float = 0.7,
    clip: float = 3.0,
    biases: Format = OTHERS,
    activations: Format = Format(i=2, f=5),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
) -> Transform:
    """Kernels of three values: w -> s sign(w) where |w| > threshold * mean |w|, else 0.

    s = 2^round(log2(mean |w|)) over the weights above the threshold, which is the scale of least error (Li et al.,
    arXiv:1605.04711, eq. 4 and 6, on a power of two).  The means leave out weights that are exactly 0, the pruned ones.
    Gradient as in `binary`, also to the weights below the threshold.  Bits of a weight: 2, the format -2s, -s, 0, s of all
    that share a scale.

    threshold: in units of mean |w|.  The other arguments and errors are those of `binary`.

    >>> t = ternary({"kernel": SiteSpec((3, 1), "kernel", channel_axes=(1,))})
    >>> params = t.attach({"kernel": jnp.float32([[0.6], [-0.1], [-0.4]])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [[0.5], [0.0], [-0.5]]
    """
    defaults = by_kind(biases, activations, biases, tables, outputs)
    hypers = hyper(threshold=threshold, clip=clip)
    return _coded("ternary", _ternary, sites, granularity, hypers, resolve(sites, defaults, rules))


def _coded(
    name: str,
    code: Code,
    sites: Mapping[str, SiteSpec],
    granularity: str | tuple[int, ...],
    hypers: dict[str, jax.Array],
    choices: Mapping[str, Choice],
) -> Transform:
    """The transform that gives the kernels which nothing else claims to `code`, and fixed formats to the rest."""
    kernels = default_kernels(sites, choices)
    choices = coded_choices(sites, choices, kernels, Format(i=1, f=0, k=1, granularity=granularity), name, "scale")

    def attach(model: Tree) -> Params:
        return Params(model, {})

    def init(params: Params) -> CodesState:
        del params
        kifs = {site: full_kif(sites[site], choice.format) for site, choice in choices.items() if site not in kernels}
        return CodesState(dict(hypers), kifs)

    def apply(params: Params, state: CodesState) -> tuple[View, CodesState]:
        leaves = _tree.flatten(params.model)
        made = {
            site: code(leaves[site], axes_shared(sites[site], choices[site].format), state.hyper)
            for site in kernels
            if site in leaves
        }
        return coded_view(params.model, state.kifs, made, sites), state

    labels = labelled(name, "bits")
    return Transform(name, attach, init, apply, keep_params, keep_params, no_penalty, labels, formats=choices)


def default_kernels(sites: Mapping[str, SiteSpec], choices: Mapping[str, Choice]) -> list[str]:
    """The kernels that no rule and no wish of the model makes fixed-point numbers."""
    return [site for site, c in choices.items() if sites[site].kind == "kernel" and c.source == "default for kernel"]


def coded_choices(
    sites: Mapping[str, SiteSpec], choices: Mapping[str, Choice], kernels: Sequence[str], fmt: Format, name: str, moves: str
) -> dict[str, Choice]:
    """All choices with those of `kernels` replaced.  Raises: TransformError for axes or widths that can't be."""
    for site, choice in choices.items():
        if site not in kernels:
            check_width(site, sites[site], choice)
    special = {site: Choice(fmt, f"{name} kernel", moves) for site in kernels}
    for site, choice in special.items():
        check_axes(site, sites[site], choice)
    return {**choices, **special}


def coded_view(
    model: Tree, kifs: Mapping[str, KIF], made: Mapping[str, tuple[jax.Array, KIF]], sites: Mapping[str, SiteSpec]
) -> View:
    """`view_of` with kernels that are coded already, and their formats."""
    view = view_of(model, kifs, sites)
    values = _tree.replace(view.model, {site: q for site, (q, _) in made.items()})
    return View(values, {**view.sites, **{site: fmt for site, (_, fmt) in made.items()}}, {})


def _passing(q: jax.Array, w: jax.Array, passes: jax.Array) -> jax.Array:
    """q exactly, with the gradient u * passes to w."""
    return through(q, jnp.where(passes, w, jax.lax.stop_gradient(w)))


def _mean(a: jax.Array, chosen: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Mean over what is chosen of every group; 0 where that is nothing."""
    total = jnp.sum(jnp.where(chosen, a, 0), axes, keepdims=True)
    return total / jnp.maximum(jnp.sum(chosen.astype(a.dtype), axes, keepdims=True), 1)


def _scale_exponent(mean: jax.Array) -> jax.Array:
    """round(log2(mean)), exact: read off the exponent and compared with the root of a half; 0 for the mean 0."""
    above = ceil_log2(mean)
    nearest = above - (mean * power_of_two(-above, mean.dtype) < _ROOT_HALF).astype(above.dtype)
    return jnp.where(mean > 0, jnp.clip(nearest, *I_LIMITS), 0)


def _binary(w: jax.Array, axes: tuple[int, ...], hypers: dict[str, jax.Array]) -> tuple[jax.Array, KIF]:
    a = jax.lax.stop_gradient(jnp.abs(w))
    exponent = jnp.broadcast_to(_scale_exponent(_mean(a, a > 0, axes)), w.shape)
    s = power_of_two(exponent, w.dtype)
    q = _passing(jnp.sign(w) * s, w, a <= hypers["clip"] * s)
    k = (w < 0).astype(w.dtype)
    return q, KIF(k, jnp.where(w == 0, exponent, exponent + 1 - k), -exponent)


def _ternary(w: jax.Array, axes: tuple[int, ...], hypers: dict[str, jax.Array]) -> tuple[jax.Array, KIF]:
    a = jax.lax.stop_gradient(jnp.abs(w))
    chosen = a > hypers["threshold"] * _mean(a, a > 0, axes)
    exponent = _scale_exponent(_mean(a, chosen, axes))
    s = power_of_two(exponent, w.dtype)
    q = _passing(jnp.where(chosen, jnp.sign(w) * s, 0), w, a <= hypers["clip"] * s)
    return q, KIF(jnp.ones_like(exponent), exponent + 1, -exponent)
