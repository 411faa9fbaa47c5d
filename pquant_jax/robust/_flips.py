"""Bit flips in weights, activations and table entries, and what they do to a figure of merit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import Table, Tree, View
from pquant_jax._errors import DataError, TraceError, did_you_mean
from pquant_jax.graph import Instrumented
from pquant_jax.robust._replay import Format, Replay, replay
from pquant_jax.train import Metric, accuracy

WHERE: Final = ("weights", "activations", "tables")
_TOGETHER: Final = 8  # trials in one vmap


def flip_values(x: Any, fmt: Format, mask: Any) -> Any:
    """`x` with the bits of `mask` (int, of the code of weight 2^b at bit b) inverted in its two's complement code.

    Bits beyond the format's k + i + f are left alone.  A mask of 0 gives x; the same mask twice gives x back.

    >>> fmt = Format(jnp.int32(1), jnp.int32(1), jnp.int32(2))  # -2 to 1.75
    >>> [float(flip_values(jnp.float32(0.5), fmt, m)) for m in (0, 1, 2, 8, 16)]
    [0.5, 0.75, 0.0, -1.5, 0.5]
    """
    k, i, f = (jnp.asarray(v, jnp.int32) for v in fmt)
    bits = jnp.maximum(k + i + f, 0)
    code = jnp.ldexp(jnp.asarray(x, jnp.float32), f).astype(jnp.int32)
    raw = _flipped(code, bits, k, mask)
    return jnp.where(bits > 0, jnp.ldexp(raw.astype(jnp.float32), -f), x)


def _flipped(code: Any, bits: Any, k: Any, mask: Any) -> Any:
    """int32 codes of `bits` bits, of which the highest is a sign where k = 1, XOR mask."""
    full = jnp.where(bits >= 32, -1, jnp.left_shift(1, jnp.minimum(bits, 31)) - 1)
    raw = (code ^ jnp.asarray(mask, jnp.int32)) & full
    sign = (jnp.right_shift(raw, jnp.maximum(bits - 1, 0)) & 1) * k
    return jnp.where((bits > 0) & (bits < 32), raw - jnp.left_shift(sign, jnp.minimum(bits, 31)), raw)


def flip(
    inst: Instrumented, view: View, model_state: Tree, x: Any, masks: Mapping[str, Any], tables: Mapping[str, Any] | None = None
) -> Any:
    """Outputs of the inference forward on `x` with bits inverted: the values of sites by `masks`, table entries by `tables`.

    Args:
      masks: {site: int32 that broadcasts to its value}; of a weight, or of an activation (with the batch axis first).
      tables: {table: int32 that broadcasts to its codes}, of a view that carries its tables.
    Raises: TraceError for a name that is neither.
    """
    found = replay(inst, view, model_state, len(jax.tree.leaves(x)[0]))
    for name in masks:
        if name not in inst.sites:
            raise TraceError(f"no site {name!r} to flip bits of; {did_you_mean(name, inst.sites)}")
    changed = dict(found.tables)
    for name, mask in (tables or {}).items():
        if name not in changed:
            raise TraceError(f"the view has no table {name!r}; {did_you_mean(name, changed)}; build them with inst.tables")
        changed[name] = _flip_table(changed[name], jnp.asarray(mask, jnp.int32))

    def hook(site: str, value: Any, fmt: Format) -> Any:
        return flip_values(value, fmt, masks[site]) if site in masks else value

    return jax.jit(lambda x: found.run(hook, x, changed))(jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), x))


def table_bits(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(k, bits), int32 (tables, 1): the two's complement width that holds every entry of a row, as a ROM has it."""
    codes = np.asarray(table.codes, np.int64)
    k = (codes.min(-1, keepdims=True) < 0).astype(np.int32)
    size = np.maximum(codes.max(-1, keepdims=True), -codes.min(-1, keepdims=True) - 1)
    return k, (np.frexp(size.astype(np.float64))[1] + k).astype(np.int32)


def _flip_table(table: Table, mask: Any) -> Table:
    k, bits = table_bits(table)
    return table._replace(codes=_flipped(jnp.asarray(table.codes, jnp.int32), bits, k, mask))


def random_mask(key: Any, shape: tuple[int, ...], rate: Any, top: int) -> Any:
    """int32 of `shape`: each of the `top` lowest bits is 1 with the probability `rate`, independently."""
    drawn = jax.random.bernoulli(key, rate, (top, *shape)).astype(jnp.int32)
    return jnp.sum(drawn << jnp.arange(top, dtype=jnp.int32).reshape(-1, *([1] * len(shape))), 0, dtype=jnp.int32)


class Injection(NamedTuple):
    """figure: float64 (levels, trials), the figure of merit under flips.  levels: rates, or numbers of flips.

    clean: without any.  bits: how many can be flipped: stored bits, or (activations) those of one sample.
    """

    levels: np.ndarray
    figure: np.ndarray
    clean: float
    bits: int

    @property
    def mean(self) -> np.ndarray:
        """(levels,), over the trials."""
        return self.figure.mean(1)

    def quantile(self, q: float) -> np.ndarray:
        """(levels,), over the trials."""
        return np.quantile(self.figure, q, axis=1)


def inject(
    inst: Instrumented,
    view: View,
    model_state: Tree,
    x: Any,
    y: Any,
    *,
    rates: Sequence[float] = (),
    flips: Sequence[int] = (),
    where: str = "weights",
    trials: int = 32,
    seed: int = 0,
    metric: Metric = accuracy,
    protected: Mapping[str, np.ndarray] | None = None,
) -> Injection:
    """The figure of merit under random bit flips, `trials` times per level, in one jitted function that is vmapped over trials.

    Args:
      x, y: samples (encoded with inst.encode here) and their targets.
      rates: probabilities with which each bit is inverted; or flips: exact numbers of inverted bits (1 is a single upset),
        of weights alone.  One of the two.
      where: "weights" (one draw per trial, the same for all samples), "activations" (at every site, for every sample anew)
        or "tables" (entries of `view.tables`, built if it has none).
      protected: {site: int32 mask} of bits that are never flipped, see `protect`.
    Raises: DataError for levels that are none; TraceError for `tables` of a model without.
    """
    levels = _levels(rates, flips, where)
    run = injector(inst, view, model_state, x, y, where=where, exact=bool(len(flips)), metric=metric)
    return run(levels, trials=trials, seed=seed, protected=protected)


def injector(
    inst: Instrumented,
    view: View,
    model_state: Tree,
    x: Any,
    y: Any,
    *,
    where: str = "weights",
    exact: bool = False,
    metric: Metric = accuracy,
) -> Callable[..., Injection]:
    """(levels, *, trials, seed, protected) -> `Injection`, compiled once for all of them; arguments as `inject` has them.

    exact: levels are numbers of flips.
    """
    if where == "tables" and not view.tables:
        view = view._replace(tables=inst.tables(view, model_state))
    found = replay(inst, view, model_state, len(jax.tree.leaves(y)[0]))
    if where == "tables" and not found.tables:
        raise TraceError("the model has no tables whose entries could be flipped")
    ports, target = (jax.tree.map(jnp.asarray, v) for v in (inst.encode(x), y))
    words = _words(found, where)

    @jax.jit
    def all_trials(keys: Any, level: Any, free: Any) -> Any:
        def one(key: Any) -> Any:
            masks = _exact_masks(key, words, level, free) if exact else _masks(key, words, level, free)

            def hook(site: str, value: Any, fmt: Format) -> Any:
                own = found.activations[site][1] if where == "activations" and site in masks else fmt
                return flip_values(value, own, masks[site]) if site in masks and where != "tables" else value

            tables = {n: _flip_table(t, masks[n]) for n, t in found.tables.items()} if where == "tables" else found.tables
            return jnp.mean(metric.function(found.run(hook, ports, tables), target))

        return jax.lax.map(one, keys, batch_size=_TOGETHER)

    clean = float(jnp.mean(metric.function(jax.jit(lambda x: found.run(lambda site, v, _: v, x))(ports), target)))
    bits = sum(int(v.sum()) for v in words.values()) // (len(jax.tree.leaves(y)[0]) if where == "activations" else 1)

    def run(levels: Any, *, trials: int = 32, seed: int = 0, protected: Mapping[str, np.ndarray] | None = None) -> Injection:
        kept = protected or {}
        free = {n: np.broadcast_to(~np.asarray(kept.get(n, 0), np.int32), v.shape) for n, v in words.items()}
        keys = jax.random.split(jax.random.key(seed), trials)
        figure = np.stack([np.asarray(all_trials(keys, jnp.float32(level), free), np.float64) for level in levels])
        return Injection(np.asarray(levels, np.float64), figure, clean, bits)

    return run


def _words(found: Replay, where: str) -> dict[str, np.ndarray]:
    """How many bits every word has that can be flipped, int32 of the shape of what it stands for."""
    if where == "weights":
        return {n: np.asarray(f.bits) for n, f in found.stored.items()}
    if where == "tables":
        return {n: np.broadcast_to(table_bits(t)[1], np.shape(t.codes)) for n, t in found.tables.items()}
    return {n: np.broadcast_to(np.asarray(f.bits), shape) for n, (shape, f) in found.activations.items()}


def _split(flat: Any, words: Mapping[str, np.ndarray], free: Mapping[str, Any]) -> dict[str, Any]:
    """The masks of all words, one after the other in `flat`, without the bits that are not free."""
    ends = np.cumsum([v.size for v in words.values()])[:-1]
    return {n: part.reshape(v.shape) & free[n] for (n, v), part in zip(words.items(), jnp.split(flat, ends), strict=True)}


def _masks(key: Any, words: Mapping[str, np.ndarray], rate: Any, free: Mapping[str, Any]) -> dict[str, Any]:
    """Each bit with the probability `rate`; bits beyond a word's own are cut by the flip."""
    total, top = sum(v.size for v in words.values()), max(int(v.max(initial=0)) for v in words.values())
    return _split(random_mask(key, (total,), rate, top), words, free)


def _levels(rates: Sequence[float], flips: Sequence[int], where: str) -> np.ndarray:
    if where not in WHERE:
        raise DataError(f"where is {where!r}; {did_you_mean(where, WHERE)}")
    if bool(len(rates)) == bool(len(flips)) or (len(flips) and where != "weights"):
        raise DataError("give rates, or (of weights) flips, numbers of inverted bits; got neither, both, or flips of " + where)
    levels = np.asarray(rates if len(rates) else flips, np.float64)
    if not ((levels >= 0) & (levels <= 1)).all() if len(rates) else (levels < 0).any():
        raise DataError(f"levels are {levels.tolist()}, expected rates from 0 to 1 or numbers of flips")
    return levels


def _exact_masks(key: Any, words: Mapping[str, np.ndarray], count: Any, free: Mapping[str, Any]) -> dict[str, Any]:
    """`count` different ones of all bits that are free, uniformly: those of the smallest random numbers."""
    top = max(int(v.max(initial=0)) for v in words.values())
    place = jnp.arange(top, dtype=jnp.int32)
    there = np.concatenate([np.ravel(v) for v in words.values()])[:, None] > np.arange(top)
    open_ = jnp.concatenate([jnp.ravel(jnp.broadcast_to(free[n], v.shape)) for n, v in words.items()])
    drawn = jnp.where(there & ((open_[:, None] >> place) & 1 == 1), jax.random.uniform(key, there.shape), 2.0)
    ordered = jnp.sort(jnp.ravel(drawn))
    limit = ordered[jnp.clip(count.astype(jnp.int32), 0, ordered.size - 1)]
    hit = ((drawn < limit) & (drawn < 1.5)).astype(jnp.int32)
    return _split(jnp.sum(hit << place, -1, dtype=jnp.int32), words, free)
