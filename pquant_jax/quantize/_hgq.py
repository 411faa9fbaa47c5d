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
from pquant_jax.numerics import integer_bits, quantize
from pquant_jax.quantize._beta import Beta, Piece, beta_of
from pquant_jax.quantize._format import Format, Rules, format_shape, resolve, sign_bits, view_of
from pquant_jax.transforms import entering, hyper, labelled

F_LIMITS = (-24.0, 24.0)  # bits; beyond them 2^f leaves what float32 products can hold
I_LIMITS = (-23.0, 23.0)


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
    activations: Format = Format(i=2, f=6, overflow="WRAP"),
    rules: Rules = (),
) -> Transform:
    """Quantize every site with trained formats; penalty beta * cost(view) + gamma * sum(raw bits), none in pre-training.

    f is trained everywhere and i where the mode saturates.  Where it wraps, i follows the data: a weight's from its
    own value, an activation's from the range of the batch, i <- max(i - decay, what [low, high] needs), one step
    behind because `step` sees this batch's statistics.  low and high are tracked separately.

    Args:
      sites: `inst.sites`.
      beta: penalty per EBOP; moves geometrically to `beta_end` over the epochs of the training stage.  Or a schedule:
        `ramp`, `piecewise` (or its pieces, [(epoch, beta, "linear" | "log" | "constant")]), or `pid(target)`, which
        steers it to a number of EBOPs.
      cost: `inst.ebops`; None trains bits by accuracy (and gamma) alone.
      gamma: penalty per raw bit (HGQ's MonoL1, signed); None leaves the sum out of the step.
      decay: bits per step that a tracked i may sink.
      freeze: keep the bits still in fine-tuning.
      weights, activations, rules: as in `fixed`; WRAP_SM can't be trained.
    Raises: TransformError for a mode that can't be trained, a rule that matches nothing or a `pid` without cost.

    >>> t = hgq({"kernel": SiteSpec((2,), "kernel")}, weights=Format(i=0, f=2, k=1, overflow="SAT_SYM"))
    >>> params = t.attach({"kernel": jnp.float32([0.3, 2.0])})
    >>> t.apply(params, t.init(params))[0].model["kernel"].tolist()
    [0.25, 0.75]
    """
    price = beta_of(beta, beta_end)
    if price.measures and cost is None:
        raise TransformError("this beta is steered by what the model costs: give hgq cost=inst.ebops")
    formats = resolve(sites, weights, activations, rules)
    bad = [name for name, fmt in formats.items() if fmt.overflow == "WRAP_SM"]
    if bad:
        raise TransformError(f"{bad[0]}: overflow WRAP_SM has no trained range; use WRAP, SAT or SAT_SYM, or quantize.fixed")
    wraps = {name for name, fmt in formats.items() if fmt.overflow == "WRAP"}
    tracked = {name for name in wraps if sites[name].kind not in ("kernel", "bias")}

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
        for name, fmt in formats.items():
            if sites[name].kind in ("kernel", "bias") and name not in leaves:  # left out by `masked`
                continue
            k, f = state.k[name], bits["f"][name]
            i = bits["i"].get(name, state.i.get(name))
            if i is None:
                k, i = _own_format(leaves[name], f, fmt.rounding)
            made[name] = KIF(k, i, f, fmt.rounding, fmt.overflow)
        return made

    def apply(params: Params, state: HGQState) -> tuple[View, HGQState]:
        return view_of(params.model, kifs(params, state), sites), state

    def track(params: Params, state: HGQState, stats: Stats, decay: jax.Array) -> dict[str, jax.Array]:
        moved = {}
        for name, i in state.i.items():
            needed = _range_bits(stats, name, params.extra["hgq"]["f"][name], formats[name].rounding)
            moved[name] = jnp.clip(jnp.maximum(i - decay, needed), *I_LIMITS)
        return moved

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
            f, now = params.extra["hgq"]["f"], event == Event.CALIBRATE
            exact = track(params, state, stats, jnp.full((), jnp.inf, jnp.float32))
            i = {name: jnp.where(now, exact[name], old) for name, old in state.i.items()}
            signs = {n: jnp.where(now, _range_sign(stats, n, f[n], formats[n].rounding), state.k[n]) for n in i}
            state = state._replace(i=i, k={**state.k, **signs})
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
    return Transform("hgq", attach, init, apply, step, boundary, penalty, labelled("hgq", "bits"), needs)


def _own_format(w: jax.Array, f: jax.Array, rounding: str) -> tuple[jax.Array, jax.Array]:
    """(k, i) of the narrowest two's complement that holds the rounded weights, per element of f's shape; 0 needs no bits."""
    rounded = jax.lax.stop_gradient(_rounded(w, f, rounding))
    low, high = _shared_range(rounded, rounded, f.shape)
    return (low < 0).astype(f.dtype), integer_bits(low, high, f)


def _shared_range(low: jax.Array, high: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The range of everything that shares one format, of the format's shape."""
    shared = tuple(a for a, (n, m) in enumerate(zip(low.shape, shape, strict=True)) if m == 1 and n != 1)
    return (jnp.min(low, shared, keepdims=True), jnp.max(high, shared, keepdims=True)) if shared else (low, high)


def _site_range(stats: Stats, name: str, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    ranges = stats.get("range", {})
    if name not in ranges:
        raise TransformError(f"no range of site {name!r} in the statistics; pass stats= from inst.capture of the same model")
    low, high = ranges[name]
    return _shared_range(low, high, shape)


def _range_bits(stats: Stats, name: str, f: jax.Array, rounding: str) -> jax.Array:
    low, high = _site_range(stats, name, f.shape)
    return integer_bits(_rounded(low, f, rounding), _rounded(high, f, rounding), f)


def _rounded(v: jax.Array, f: jax.Array, rounding: str) -> jax.Array:
    # i = 64: wide enough for any value, so that the zero-width rule does not act on a range
    return quantize(v, KIF(jnp.ones_like(f), jnp.full_like(f, 64.0), f, rounding, "WRAP"), wrap=False)


def _range_sign(stats: Stats, name: str, f: jax.Array, rounding: str) -> jax.Array:
    low, _ = _site_range(stats, name, f.shape)
    return (_rounded(low, f, rounding) < 0).astype(f.dtype)
