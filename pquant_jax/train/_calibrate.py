"""Formats from a data set: exact ranges for what wraps, and a choice of integer bits for what saturates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import KIF, Event, Stage, Transform, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.graph import Instrumented
from pquant_jax.numerics import oracle
from pquant_jax.quantize import F_LIMITS, PARAMETERS, needed_bits
from pquant_jax.train._step import TrainState
from pquant_jax.transforms import boundary, state_of

METHODS: Final = ("minmax", "percentile", "mse")
_TAIL: Final = 8  # integer bits below what the range needs that "mse" tries
_CHUNK: Final = 256  # samples at a time


class _How(NamedTuple):
    """method, percentile and keep as in `calibrate`."""

    method: str
    percentile: float
    keep: str


def calibrate(
    inst: Instrumented,
    compression: Transform,
    state: TrainState,
    inputs: Sequence[Any],
    *,
    method: str = "minmax",
    percentile: float = 99.9,
    keep: str = "width",
    samples: int = 4096,
) -> TrainState:
    """Give every tracked range exactly the integer bits and sign that `inputs` need, in inference mode.

    A site without any bit passes 0 on, so waking it changes what later sites see: the ranges are measured until they
    stay, which takes at most as many passes as there are sites, and usually two.

    "percentile" and "mse" also choose the bits of the sites that saturate and move (`quantize.dynamic`; `quantize.hgq`
    with overflow SAT or SAT_SYM), whose tail may be cut for a finer step: i that holds the values between the
    percentiles 100 - p and p of all that share a format, or the i with the least sum of (q(x) - x)^2.  What wraps keeps
    its exact range, as its tail would come back at the other end.

    Args:
      inputs: arrays (or trees) of samples on the input ports; what lies outside their ranges wraps.
      method: "minmax", "percentile" or "mse".
      percentile: p, 50 to 100; 100 is the whole range.
      keep: "width" moves f against i; "f" changes the width.
      samples: so many of each input are looked at one by one for "percentile" and "mse".
    Raises: TransformError for an unknown method, or where no site's format may be chosen.
    """
    how = _checked(_How(method, percentile, keep))
    chosen = [] if method == "minmax" else _saturating(inst, compression)
    if method == "minmax" and "range" not in compression.needs:
        return state

    @jax.jit
    def ranges(state: TrainState, x: Any) -> Any:
        return inst.capture(view_of(compression, state), state.model_state, x, train=False, wrap=False)[2]["range"]

    @jax.jit
    def told(state: TrainState, stats: dict[str, Any]) -> TrainState:
        params, opt_state = boundary(
            compression, state.params, state.opt_state, event=Event.CALIBRATE, stage=Stage.FINETUNE, stats=stats
        )
        return state._replace(params=params, opt_state=opt_state)

    values, formats = _reader(inst, compression, chosen, inputs, samples), view_of(compression, state).sites
    before = None
    for _ in inst.sites:
        found = jax.device_get([ranges(state, x) for x in inputs])
        stats: dict[str, Any] = {"range": {name: _union([r[name] for r in found]) for name in found[0]}}
        if chosen:
            seen = values(state)
            stats["format"] = {name: _choose(seen[name], formats[name], how) for name in chosen}
        if before is not None and all(map(np.array_equal, jax.tree.leaves(stats), jax.tree.leaves(before))):
            break
        state, before = told(state, stats), stats
    if chosen and before is not None:
        _check_taken(view_of(compression, state), before["format"], keep)
    return state


def view_of(compression: Transform, state: TrainState) -> View:
    """What the forward of a training state sees."""
    return compression.apply(state.params, state_of(state.opt_state))[0]


def _checked(how: _How) -> _How:
    if how.method not in METHODS:
        raise TransformError(f"method is {how.method!r}; {did_you_mean(how.method, METHODS)}")
    if how.keep not in ("width", "f"):
        raise TransformError(f"keep is {how.keep!r}, expected 'width' or 'f'")
    if not 50 <= how.percentile <= 100:
        raise TransformError(f"percentile is {how.percentile:g}, expected 50 to 100")
    return how


def _saturating(inst: Instrumented, compression: Transform) -> list[str]:
    """The sites whose bits may be chosen."""
    found = [
        name
        for name, choice in compression.formats.items()
        if choice.moves and choice.format.overflow in ("SAT", "SAT_SYM") and inst.sites[name].kind not in PARAMETERS
    ]
    if not found:
        raise TransformError(
            "no site has a format that may be chosen: percentile and mse need quantize.dynamic, or quantize.hgq with "
            "activations that saturate (overflow='SAT'); what wraps has its exact range by method='minmax'"
        )
    return found


def _reader(inst: Instrumented, compression: Transform, names: Sequence[str], inputs: Sequence[Any], samples: int) -> Any:
    """(state) -> {site: values (n, ...)} of these sites: the range of a batch of one sample is that sample's value."""

    @jax.jit
    def read(state: TrainState, x: Any) -> dict[str, jax.Array]:
        view = view_of(compression, state)

        def one(sample: Any) -> dict[str, jax.Array]:
            batch = jax.tree.map(lambda v: v[None], sample)
            stats = inst.capture(view, state.model_state, batch, train=False, wrap=False)[2]["range"]
            return {name: stats[name][1] for name in names}

        return jax.vmap(one)(x)

    def values(state: TrainState) -> dict[str, np.ndarray]:
        parts = []
        for x in inputs:
            n = min(samples, len(jax.tree.leaves(x)[0]))
            parts += [read(state, jax.tree.map(lambda v, a=a, n=n: v[a : min(a + _CHUNK, n)], x)) for a in range(0, n, _CHUNK)]
        return {name: np.concatenate([np.asarray(p[name], np.float64) for p in parts]) for name in names}

    return values


def _choose(values: np.ndarray, fmt: KIF, how: _How) -> tuple[np.ndarray, np.ndarray]:
    """(i, f) of one site, float32 of its format's shape.  values: (n, *site shape)."""
    k, i, f = (np.rint(np.asarray(v, np.float64)) for v in (fmt.k, fmt.i, fmt.f))
    pooled = (0, *(a + 1 for a, (n, m) in enumerate(zip(values.shape[1:], i.shape, strict=True)) if m == 1 and n != 1))

    def divided(i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return i, np.minimum(width - i, F_LIMITS[1]) if how.keep == "width" else f

    width = i + f
    share = how.percentile if how.method == "percentile" else 100.0
    low, high = (np.percentile(values, p, axis=pooled, keepdims=True)[0] for p in (100 - share, share))
    needed = np.where((low == 0) & (high == 0), i, _needed(low, high, k, f, width, fmt.rounding, how.keep))
    best = divided(needed)
    if how.method == "mse":
        tried = [divided(needed - n) for n in range(_TAIL + 1)]
        modes = dict(rounding=fmt.rounding, overflow=fmt.overflow)
        lost = [
            np.sum(np.square(oracle.quantize(values, k, *bits, **modes) - values), pooled, keepdims=True)[0] for bits in tried
        ]
        which = np.argmin(np.stack(lost), 0)  # the widest of equals
        best = tuple(np.choose(which, parts) for parts in zip(*tried, strict=True))
    return best[0].astype(np.float32), best[1].astype(np.float32)


def _needed(low: Any, high: Any, k: Any, f: Any, width: np.ndarray, rounding: str, keep: str) -> np.ndarray:
    low, high, k, f = (jnp.asarray(np.broadcast_to(v, width.shape), jnp.float32) for v in (low, high, k, f))
    if keep == "f":
        return np.asarray(needed_bits(low, high, k, f, rounding), np.float64)
    finest, unsigned = jnp.full_like(low, F_LIMITS[1]), jnp.zeros_like(low)
    return np.asarray(needed_bits(low, high, unsigned, finest, rounding, jnp.asarray(width, jnp.float32)), np.float64)


def _check_taken(view: View, formats: Mapping[str, tuple[np.ndarray, np.ndarray]], keep: str) -> None:
    for name, wanted in formats.items():
        fmt = view.sites[name]
        for part, want in zip(("i", "f"), wanted, strict=True):
            got = np.rint(np.asarray(getattr(fmt, part)))
            if not np.array_equal(got, want):
                raise TransformError(
                    f"site {name!r} does not take the {part} that was chosen, {want.ravel()[0]:g}, but {got.ravel()[0]:g}"
                    + ("; quantize.dynamic divides a constant width: use keep='width'" if keep == "f" else "")
                )


def _union(ranges: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    lows, highs = zip(*ranges, strict=True)
    return functools.reduce(np.minimum, lows), functools.reduce(np.maximum, highs)
