"""HGQ, high granularity quantization: bit-widths trained by gradient (Sun et al., arXiv:2405.00645).

The gradient of a format is that of its rounding error; the pressure on it is beta times a differentiable cost (EBOPs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, Event, Params, SiteSpec, Stage, Stats, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.numerics import integer_bits
from pquant_jax.quantize._beta import Beta, Piece, beta_of
from pquant_jax.quantize._format import (
    PARAMETERS,
    TABLES,
    Choice,
    Format,
    Rules,
    by_kind,
    check_width,
    format_shape,
    full_kif,
    resolve,
    sign_bits,
    view_of,
)
from pquant_jax.quantize._ranges import F_LIMITS, I_LIMITS, limited, needed_bits, rounded, shared_range, site_range
from pquant_jax.transforms import entering, hyper, labelled


class HGQState(NamedTuple):
    """hyper: those of beta's schedule (of a ramp beta, beta_end (nan: as beta), beta_shape), decay, freeze, and gamma
    where it is in use.

    stage: of the last step.  beta: the one in force.
    k: {site: sign bits}.  i: {site: tracked integer bits} of the activations that wrap.  memory: of a controller of beta.
    """

    hyper: dict[str, jax.Array]
    stage: jax.Array
    beta: jax.Array
    k: dict[str, jax.Array]
    i: dict[str, jax.Array]
    memory: Tree = {}  # never written to


def hgq(
    sites: Mapping[str, SiteSpec],
    *,
    beta: float | Beta | Sequence[Piece] = 1e-5,
    beta_end: float | None = None,
    cost: Callable[[View], jax.Array] | None = None,
    gamma: float | None = None,
    decay: float = 0.01,
    freeze: bool = True,
    weights: Format = Format(i=2, f=6, k=1, overflow="SAT_SYM"),
    biases: Format | None = None,
    activations: Format = Format(i=2, f=6, overflow="WRAP"),
    tables: Format = TABLES,
    outputs: Format | None = None,
    rules: Rules = (),
) -> Transform:
    """Quantize every site with trained formats; penalty beta * cost(view) + gamma * sum(raw bits), none in pre-training.

    f is trained everywhere and i where the mode saturates.  Where it wraps, i follows the data: a weight's from its
    own value, an activation's from the range of the batch, i <- max(i - decay, what [low, high] needs), one step
    behind because `step` sees this batch's statistics.  low and high are tracked separately.  At a site with `max_bits`
    (a table's input) the f at use is min(f, max_bits - k - i).

    Args:
      sites: `inst.sites`.
      beta: penalty per EBOP; moves geometrically to `beta_end` over the epochs of the training stage.  Or a schedule:
        `ramp`, `piecewise` (or its pieces, [(epoch, beta, "linear" | "log" | "constant")]), or `pid(target)`, which
        steers it to a number of EBOPs.
      cost: `inst.ebops`; None trains bits by accuracy (and gamma) alone.
      gamma: penalty per raw bit (HGQ's MonoL1, signed); None leaves the sum out of the step.
      decay: bits per step that a tracked i may sink.
      freeze: keep the bits still in fine-tuning.
      weights, biases, activations, tables, outputs, rules: as in `fixed`; WRAP_SM can't be trained, a format that is not
        `trainable` stays as it is.
    Raises: TransformError for a mode that can't be trained, a rule that matches nothing, a `pid` without cost, or a
      format that is not trained and wider than the site's `max_bits`.

    >>> t = hgq({"kernel": SiteSpec((2,), "kernel")}, weights=Format(i=0, f=2, k=1, overflow="SAT_SYM"))
    >>> params = t.attach({"kernel": jnp.float32([0.3, 2.0])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.25, 0.75]
    """
    price = beta_of(beta, beta_end)
    if price.measures and cost is None:
        raise TransformError("this beta is steered by what the model costs: give hgq cost=inst.ebops")
    choices = _choices(sites, resolve(sites, by_kind(weights, activations, biases, tables, outputs), rules))
    still = {name: full_kif(sites[name], c.format) for name, c in choices.items() if not c.moves}
    formats = {name: c.format for name, c in choices.items() if c.moves}
    wraps = {name for name, fmt in formats.items() if fmt.overflow == "WRAP"}
    tracked = {name for name in wraps if sites[name].kind not in PARAMETERS}

    def attach(model: Tree) -> Params:
        def full(name: str, bits: float) -> jax.Array:
            return jnp.full(format_shape(sites[name], formats[name]), bits, jnp.float32)

        trained_i = {name: full(name, fmt.i) for name, fmt in formats.items() if name not in wraps}
        return Params(model, {"hgq": {"f": {name: full(name, fmt.f) for name, fmt in formats.items()}, "i": trained_i}})

    def init(params: Params) -> HGQState:
        del params
        hypers = hyper(**price.hyper, decay=decay, freeze=freeze)
        start, memory = price.init(hypers)
        return HGQState(
            hypers if gamma is None else hypers | hyper(gamma=gamma),
            jnp.asarray(Stage.PRETRAIN, jnp.int32),
            start,
            {name: sign_bits(sites[name], fmt) for name, fmt in formats.items()},
            {name: jnp.full(format_shape(sites[name], formats[name]), formats[name].i, jnp.float32) for name in sorted(tracked)},
            memory,
        )

    def kifs(params: Params, state: HGQState) -> dict[str, KIF]:
        bits, leaves, made = params.extra["hgq"], _tree.flatten(params.model), {}
        for name in choices:
            if sites[name].kind in PARAMETERS and name not in leaves:  # left out by `masked`
                continue
            if name in still:
                made[name] = still[name]
                continue
            fmt, k, f = formats[name], state.k[name], bits["f"][name]
            i = bits["i"].get(name, state.i.get(name))
            if i is None:
                k, i = _own_format(leaves[name], f, fmt.rounding)
            made[name] = KIF(k, i, limited(f, k, i, sites[name].max_bits), fmt.rounding, fmt.overflow)
        return made

    def apply(params: Params, state: HGQState) -> tuple[View, HGQState]:
        return view_of(params.model, kifs(params, state), sites), state

    def track(params: Params, state: HGQState, stats: Stats, decay: jax.Array) -> dict[str, jax.Array]:
        moved = {}
        for name, i in state.i.items():
            f, spec = params.extra["hgq"]["f"][name], sites[name]
            span = site_range(stats, name, f.shape)
            needed = needed_bits(*span, state.k[name], f, formats[name].rounding, spec.max_bits or None)
            moved[name] = jnp.clip(jnp.maximum(i - decay, needed), *I_LIMITS)
        return moved

    def signs(params: Params, i: Mapping[str, jax.Array], stats: Stats) -> dict[str, jax.Array]:
        """k of what was calibrated, on the finest grid that the site can have: without a sign bit."""
        made = {}
        for name, bits in i.items():
            f = limited(params.extra["hgq"]["f"][name], jnp.zeros_like(bits), bits, sites[name].max_bits)
            low, _ = site_range(stats, name, f.shape)
            made[name] = (rounded(low, f, formats[name].rounding) < 0).astype(f.dtype)
        return made

    def step(
        params: Params, state: HGQState, *, stage: Any, stats: Stats, previous: Params | None = None, **extra: Any
    ) -> tuple[Params, HGQState]:
        del extra
        bits = params.extra["hgq"]
        still = state.hyper["freeze"] & (stage == Stage.FINETUNE)
        held = {"f": F_LIMITS, "i": I_LIMITS}
        clipped = {part: jax.tree.map(lambda v, part=part: jnp.clip(v, *held[part]), bits[part]) for part in bits}
        if previous is not None:
            clipped = jax.tree.map(lambda new, old: jnp.where(still, old, new), clipped, previous.extra["hgq"])
        i = track(params, state, stats, state.hyper["decay"]) if tracked else state.i
        new = state._replace(stage=jnp.asarray(stage, jnp.int32), i=i)
        return Params(params.model, {**params.extra, "hgq": clipped}), new

    def boundary(
        params: Params, state: HGQState, *, event: Any, epoch: Any, epochs: Any, stage: Any, stats: Stats, **extra: Any
    ) -> tuple[Params, HGQState]:
        state = state._replace(stage=jnp.asarray(stage, jnp.int32))
        if stats:  # a calibration over a whole data set: exactly what its ranges need, signs included
            now = event == Event.CALIBRATE
            exact = track(params, state, stats, jnp.full((), jnp.inf, jnp.float32))
            k = signs(params, exact, stats)
            i = {name: jnp.where(now, exact[name], old) for name, old in state.i.items()}
            state = state._replace(i=i, k={**state.k, **{n: jnp.where(now, k[n], state.k[n]) for n in k}})
            params = Params(params.model, {**params.extra, "hgq": _set(params.extra["hgq"], stats.get("format", {}), now)})
        measured = costs(params, state, extra.get("view")) if price.measures else None
        new, memory = price.update(state.hyper, state.memory, state.beta, epoch=epoch, epochs=epochs, cost=measured)
        begins = (event == Event.PRE_EPOCH) & (stage == Stage.TRAIN)
        memory = jax.tree.map(lambda new, old: jnp.where(begins, new, old), memory, state.memory)
        return params, state._replace(beta=jnp.where(begins, new, state.beta), memory=memory)

    def costs(params: Params, state: HGQState, view: View | None) -> jax.Array:
        """Of what leaves this method, pruned by those before it."""
        before = entering(params, view)
        after = apply(Params(before.model, params.extra), state)[0]
        assert cost is not None
        return cost(after._replace(sites={**before.sites, **after.sites}, masks={**before.masks, **after.masks}))

    def penalty(params: Params, state: HGQState, view: View) -> jax.Array:
        zero = jnp.zeros((), jnp.float32)
        due = state.beta * cost(view) if cost is not None else zero
        if gamma is not None:
            due += state.hyper["gamma"] * sum((jnp.sum(v) for v in jax.tree.leaves(params.extra["hgq"])), zero)
        return jnp.where(state.stage == Stage.PRETRAIN, zero, due)

    needs = frozenset({"range"}) if tracked else frozenset()
    return Transform("hgq", attach, init, apply, step, boundary, penalty, labelled("hgq", "bits"), needs, choices)


def _choices(sites: Mapping[str, SiteSpec], choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """What moves at every site.  Raises: TransformError for what can't."""
    made = {}
    for name, choice in choices.items():
        fmt = choice.format
        if fmt.overflow == "WRAP_SM" and fmt.trainable:
            raise TransformError(
                f"{name}: overflow WRAP_SM has no trained range; use WRAP, SAT or SAT_SYM, trainable=False, or quantize.fixed"
            )
        if not fmt.trainable:
            check_width(name, sites[name], choice)
            made[name] = choice
            continue
        follows = "its value" if sites[name].kind in PARAMETERS else "the range"
        made[name] = choice._replace(moves="i, f" if fmt.overflow != "WRAP" else f"f; i follows {follows}")
    return made


def _set(bits: Any, formats: Mapping[str, Any], now: jax.Array) -> Any:
    """The trained bits with those of the sites in `formats` that saturate replaced: what a calibration chose for them."""
    made = {part: dict(values) for part, values in bits.items()}
    for name in formats.keys() & made["i"].keys():
        for part, new in zip(("i", "f"), formats[name], strict=True):
            made[part][name] = jnp.where(now, new, made[part][name])
    return made


def _own_format(w: jax.Array, f: jax.Array, rounding: str) -> tuple[jax.Array, jax.Array]:
    """(k, i) of the narrowest two's complement that holds the rounded weights, per element of f's shape; 0 needs no bits."""
    on_grid = jax.lax.stop_gradient(rounded(w, f, rounding))
    low, high = shared_range(on_grid, on_grid, f.shape)
    return (low < 0).astype(f.dtype), integer_bits(low, high, f)
