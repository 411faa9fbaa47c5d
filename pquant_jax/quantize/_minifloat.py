"""Minifloat weights: mantissa, exponent and offset of small floating-point numbers, trained by gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, SiteSpec, Stage, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.numerics import minifloat as on_grid, minifloat_kif
from pquant_jax.quantize._codes import OTHERS, coded_choices, coded_view, default_kernels
from pquant_jax.quantize._format import TABLES, Format, Rules, by_kind, format_shape, full_kif, label, resolve
from pquant_jax.transforms import hyper, keep_params, labelled

PARTS: Final = ("m", "e", "e0")
LIMITS: Final = {"m": (-1.0, 22.0), "e": (0.0, 5.0), "e0": (-16.0, 16.0)}


class MinifloatState(NamedTuple):
    """hyper: beta, freeze.  stage: of the last step.  kifs: {site: KIF} of all sites but the kernels."""

    hyper: dict[str, jax.Array]
    stage: jax.Array
    kifs: dict[str, KIF]


def minifloat(
    sites: Mapping[str, SiteSpec],
    *,
    m: float = 3.0,
    e: float = 3.0,
    e0: float = 0.0,
    granularity: str | tuple[int, ...] = "channel",
    beta: float = 0.0,
    cost: Callable[[View], jax.Array] | None = None,
    freeze: bool = True,
    biases: Format = OTHERS,
    activations: Format = Format(i=2, f=5),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
    compat: str | None = None,
) -> Transform:
    """Kernels as floats of m mantissa and e exponent bits with the offset e0; penalty beta * cost(view), none in pre-training.

    The values and gradients are those of `numerics.minifloat`.  A weight is a constant to the hardware, so that it needs no
    float there: its format is fixed point with m + 1 bits at the place of its exponent, which is also what it costs.  Whether
    the sums over kernels of wide exponents stay exact is checked at lowering, as for any format.

    Args:
      sites: `inst.sites`.
      m, e, e0: where the trained bits start; -1..22, 0..5, -16..16.
      granularity: which weights share them.
      beta, cost, freeze: as in `hgq`.
      biases, activations, tables, outputs, rules: as in `binary`.  A rule may also give m, e or e0 of kernels.
      compat: "hgq2" as in `numerics.minifloat`.
    Raises: TransformError for widths out of range, a rule that matches nothing or gives an activation a mantissa, or a
      format wider than the site's `max_bits`.

    >>> t = minifloat({"kernel": SiteSpec((2,), "kernel")}, m=1, e=3)
    >>> params = t.attach({"kernel": jnp.float32([0.8, -5.5])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.75, -6.0]
    """
    if compat not in (None, "hgq2"):
        raise TransformError(f"compat is {compat!r}, expected 'hgq2' or None")
    own, others = _divided(sites, rules)
    choices = resolve(sites, by_kind(biases, activations, biases, tables, outputs), others)
    start = {"m": m, "e": e, "e0": e0}
    shared = Format(i=0, f=m, k=1, granularity=granularity)
    kernels = default_kernels(sites, choices)
    kernels += [site for site, spec in sites.items() if site not in kernels and _is_first(own, rules, site, spec)]
    choices = coded_choices(sites, choices, kernels, shared, "minifloat", "mantissa, exponent, offset")
    starts = {site: start | dict(_tree.first_match(own, site, {}, sites[site])) for site in kernels}
    for site, given in starts.items():
        _check(site, given)

    def attach(model: Tree) -> Params:
        def full(site: str, part: str) -> jax.Array:
            return jnp.full(format_shape(sites[site], choices[site].format), starts[site][part], jnp.float32)

        return Params(model, {"minifloat": {part: {site: full(site, part) for site in kernels} for part in PARTS}})

    def init(params: Params) -> MinifloatState:
        del params
        kifs = {site: full_kif(sites[site], choice.format) for site, choice in choices.items() if site not in kernels}
        return MinifloatState(hyper(beta=beta, freeze=freeze), jnp.asarray(Stage.PRETRAIN, jnp.int32), kifs)

    def apply(params: Params, state: MinifloatState) -> tuple[View, MinifloatState]:
        leaves, made = _tree.flatten(params.model), {}
        for site in kernels:
            if site in leaves:
                bits = [params.extra["minifloat"][part][site] for part in PARTS]
                q = on_grid(leaves[site], *bits, compat=compat)
                made[site] = q, minifloat_kif(q, *bits)
        return coded_view(params.model, state.kifs, made, sites), state

    def step(
        params: Params, state: MinifloatState, *, stage: Any, previous: Params | None = None, **extra: Any
    ) -> tuple[Params, MinifloatState]:
        del extra
        bits = params.extra["minifloat"]
        bits = {part: jax.tree.map(lambda v, part=part: jnp.clip(v, *LIMITS[part]), bits[part]) for part in PARTS}
        if previous is not None:
            still = state.hyper["freeze"] & (stage == Stage.FINETUNE)
            bits = jax.tree.map(lambda new, old: jnp.where(still, old, new), bits, previous.extra["minifloat"])
        moved = Params(params.model, {**params.extra, "minifloat": bits})
        return moved, state._replace(stage=jnp.asarray(stage, jnp.int32))

    def boundary(params: Params, state: MinifloatState, *, stage: Any, **extra: Any) -> tuple[Params, MinifloatState]:
        return keep_params(params, state._replace(stage=jnp.asarray(stage, jnp.int32)), **extra)

    def penalty(params: Params, state: MinifloatState, view: View) -> jax.Array:
        del params
        zero = jnp.zeros((), jnp.float32)
        price = state.hyper["beta"] * cost(view) if cost is not None else zero
        return jnp.where(state.stage == Stage.PRETRAIN, zero, price)

    labels = labelled("minifloat", "bits")
    return Transform("minifloat", attach, init, apply, step, boundary, penalty, labels, formats=choices)


def _divided(sites: Mapping[str, SiteSpec], rules: Rules) -> tuple[list[Any], list[Any]]:
    """(rules of minifloats, the others).  Raises: TransformError for a minifloat rule that is not about kernels alone."""
    own: list[Any] = []
    others: list[Any] = []
    for rule in rules:
        where, changes = rule
        if not isinstance(changes, Mapping) or not set(changes) & set(PARTS):
            others.append(rule)
            continue
        matched = [name for name, spec in sites.items() if _tree.matches(where, name, spec)]
        wrong = next((name for name in matched if sites[name].kind != "kernel"), None)
        if wrong is not None:
            raise TransformError(
                f"the rule {label(where)!r} gives {wrong!r}, of kind {sites[wrong].kind}, a mantissa: minifloats are for "
                f"kernels, which are constants; hardware has no float for what changes. Use of_kind('kernel', where=...)"
            )
        if not matched or set(changes) - set(PARTS):
            known = ", ".join(PARTS)
            what = "matches no site" if not matched else f"mixes {', '.join(sorted(set(changes) - set(PARTS)))} with {known}"
            raise TransformError(f"the rule {label(where)!r} {what}; a minifloat rule gives {known} of kernels")
        own.append(rule)
    return own, others


def _is_first(own: Rules, rules: Rules, site: str, spec: SiteSpec) -> bool:
    """Is the first rule that matches a site one of minifloats?"""
    first = next((rule for rule in rules if _tree.matches(rule[0], site, spec)), None)
    return first is not None and any(first is rule for rule in own)


def _check(site: str, given: Mapping[str, float]) -> None:
    for part, value in given.items():
        low, high = LIMITS[part]
        if not low <= value <= high:
            raise TransformError(f"{site}: {part} is {value:g}, expected {low:g} to {high:g}")
