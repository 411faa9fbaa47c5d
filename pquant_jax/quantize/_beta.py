"""How the price of an EBOP moves between epochs: ramps, pieces, and a controller that reaches a target.

All numbers are hyperparameters, arrays in the state: new ones recompile nothing and a population carries one set per member.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import Tree
from pquant_jax._errors import TransformError

SHAPES: Final = ("constant", "linear", "log")
Piece = tuple[float, float, str]
Hyper = Mapping[str, jax.Array]


class Beta(NamedTuple):
    """A schedule or controller of beta as a value.

    hyper     its hyperparameters by name; they are copied into the transform's state.
    init      (hypers) -> (beta, memory) before the first epoch.
    update    (hypers, memory, beta, *, epoch, epochs, cost) -> (beta, memory) of the training epoch that begins.
              cost: EBOPs as the epoch before left them, None unless it measures.
    measures  whether `update` reads cost.
    """

    hyper: Mapping[str, Any]
    init: Callable[[Hyper], tuple[jax.Array, Tree]]
    update: Callable[..., tuple[jax.Array, Tree]]
    measures: bool = False


def ramp(start: float, end: float | None = None, *, shape: str = "log") -> Beta:
    """From `start` to `end` over the epochs of the training stage: start * (end / start)^t, or straight ("linear").

    t = epoch / (epochs - 1).  "log" is straight where one end is 0.  end: None is start, "constant".
    Raises: TransformError for an unknown shape.
    """
    _check_shape(shape)

    def update(hypers: Hyper, memory: Tree, beta: jax.Array, *, epoch: Any, epochs: Any, cost: Any) -> tuple[jax.Array, Tree]:
        del beta, cost
        t = epoch.astype(jnp.float32) / jnp.maximum(epochs - 1, 1).astype(jnp.float32)
        first, last = hypers["beta"], hypers["beta_end"]
        return _between(first, jnp.where(jnp.isnan(last), first, last), t, hypers["beta_shape"]), memory

    hypers = dict(beta=start, beta_end=float("nan") if end is None else end, beta_shape=float(SHAPES.index(shape)))
    return Beta(hypers, lambda hypers: (hypers["beta"], {}), update)


def piecewise(pieces: Sequence[Piece]) -> Beta:
    """beta through the points (epoch, beta, shape); a piece has the shape of the point it begins at.

    Between two points b0 + (b1 - b0) t ("linear"), b0 (b1 / b0)^t ("log", straight where one end is 0: HGQ2's is nan
    there) or b0 ("constant"); after the last point its beta.  Epochs count from 0 in the training stage.
    Raises: TransformError for no pieces, epochs that don't rise, a negative beta, or an unknown shape.

    >>> schedule = piecewise([(0, 0.0, "linear"), (10, 1e-5, "log"), (20, 1e-3, "constant")])
    >>> hypers = {name: jnp.asarray(v, jnp.float32) for name, v in schedule.hyper.items()}
    >>> round(float(schedule.update(hypers, {}, None, epoch=jnp.int32(15), epochs=30, cost=None)[0]), 8)
    0.0001
    """
    for piece in pieces:
        if len(piece) != 3:
            raise TransformError(f"a piece of beta is {piece}, expected (epoch, beta, 'constant', 'linear' or 'log')")
        _check_shape(piece[2])
    if not pieces or any(b <= a for (a, *_), (b, *_) in zip(pieces, pieces[1:], strict=False)):
        raise TransformError(f"beta has the pieces {list(pieces)}, expected one or more with rising epochs")
    if any(piece[1] < 0 for piece in pieces):
        raise TransformError(f"beta has the pieces {list(pieces)}, expected beta >= 0")

    def update(hypers: Hyper, memory: Tree, beta: jax.Array, *, epoch: Any, epochs: Any, cost: Any) -> tuple[jax.Array, Tree]:
        del beta, epochs, cost
        now, starts, betas = epoch.astype(jnp.float32), hypers["beta_epochs"], hypers["beta"]
        last = starts.size - 1
        at = jnp.clip(jnp.sum(starts <= now) - 1, 0, last)
        after = jnp.minimum(at + 1, last)
        t = jnp.clip((now - starts[at]) / jnp.maximum(starts[after] - starts[at], 1), 0, 1)
        return _between(betas[at], betas[after], t, hypers["beta_shape"][at]), memory

    starts, betas, shapes = zip(*pieces, strict=True)
    hypers = dict(beta_epochs=starts, beta=betas, beta_shape=[float(SHAPES.index(s)) for s in shapes])
    return Beta({n: np.asarray(v, np.float32) for n, v in hypers.items()}, lambda hypers: (hypers["beta"][..., 0], {}), update)


def pid(
    target: float,
    *,
    beta: float = 1e-6,
    p: float = 1.0,
    i: float = 2e-3,
    d: float = 0.0,
    warmup: int = 10,
    log: bool = True,
    damp: float = 0.0,
    low: float = 0.0,
    high: float = float("inf"),
    compat: str | None = None,
) -> Beta:
    """A controller that moves beta until the model costs `target` EBOPs (HGQ2's BetaPID).

    With e = log10(E / target), E the EBOPs when the epoch before ended,
        log10(beta) = p * e + i * (sum of e) + d * (e - e before)
    (`log=False`: e = E / target - 1 gives beta itself).  The sum starts, at the end of the warm-up, at what keeps beta
    where it is.  While E < target, beta is (1 - damp) times that.

    Args:
      target: EBOPs.
      beta: while it warms up.
      warmup: epochs of the training stage before it takes over.
      low, high: bounds of beta.
      compat: "hgq2" starts the sum with the wrong sign where log is False, so that beta jumps by 2 p e.
    Raises: TransformError unless target > 0 and, with log, beta > 0.
    """
    if compat not in (None, "hgq2"):
        raise TransformError(f"compat is {compat!r}, expected 'hgq2' or None")
    if not _positive(target) or (log and not _positive(beta)):
        raise TransformError(f"target is {target} and beta {beta}, expected both above 0 (beta 0 needs log=False)")
    wrong = -1.0 if compat == "hgq2" and not log else 1.0

    def init(hypers: Hyper) -> tuple[jax.Array, Tree]:
        zero = jnp.zeros_like(hypers["beta"])
        return hypers["beta"], {"rest": zero, "error": zero, "started": zero.astype(jnp.bool_)}

    def update(hypers: Hyper, memory: Tree, beta: jax.Array, *, epoch: Any, epochs: Any, cost: Any) -> tuple[jax.Array, Tree]:
        del epochs
        ratio = jnp.maximum(cost / hypers["target"], 1e-6)  # a model of no bits at all is no infinite error
        error = jnp.log10(ratio) if log else ratio - 1
        start = jnp.where(memory["started"], beta, hypers["beta"])
        now = jnp.log10(jnp.maximum(start, 1e-30)) if log else start
        # rest is i times the sum, so that i = 0 works as well
        rest = jnp.where(memory["started"], memory["rest"] + hypers["i"] * error, now - wrong * hypers["p"] * error)
        change = jnp.where(memory["started"], error - memory["error"], 0)
        wish = hypers["p"] * error + rest + hypers["d"] * change
        wish = 10.0**wish if log else wish
        wish = jnp.where(ratio < 1, wish * (1 - hypers["damp"]), wish)
        wish = jnp.clip(wish, hypers["low"], hypers["high"])
        runs = memory["started"] | (epoch >= hypers["warmup"])
        new = {"rest": rest, "error": error, "started": runs}
        kept = {name: jnp.where(runs, v, memory[name]) for name, v in new.items()}
        return jnp.where(runs, wish, hypers["beta"]), kept

    hypers = dict(target=target, beta=beta, p=p, i=i, d=d, warmup=float(warmup), damp=damp, low=low, high=high)
    return Beta(hypers, init, update, measures=True)


def beta_of(beta: Any, beta_end: Any = None) -> Beta:
    """A `Beta`, pieces of one, or a number with the number it moves to.

    Raises: TransformError for beta_end beside a schedule.
    """
    if not isinstance(beta, (Beta, list, tuple)):
        return ramp(beta, beta_end)
    if beta_end is not None:
        raise TransformError(f"beta_end is {beta_end} and beta a schedule; give beta_end with a number alone")
    return beta if isinstance(beta, Beta) else piecewise(beta)


def _between(first: jax.Array, last: jax.Array, t: jax.Array, shape: jax.Array) -> jax.Array:
    straight = first + (last - first) * t
    power = jnp.where((first > 0) & (last > 0), 1.0, 0.0)
    base = jnp.where(power > 0, first, 1.0)
    geometric = jnp.where(power > 0, base * (jnp.where(power > 0, last, 1.0) / base) ** t, straight)
    return jnp.where(shape == 0, first, jnp.where(shape == 1, straight, geometric))


def _check_shape(shape: Any) -> None:
    if shape not in SHAPES:
        raise TransformError(f"the shape of beta is {shape!r}, expected 'constant', 'linear' or 'log'")


def _positive(value: Any) -> bool:
    """Above 0, or a traced value, of which it can't be said."""
    return not isinstance(value, (int, float)) or 0 < value < float("inf")
