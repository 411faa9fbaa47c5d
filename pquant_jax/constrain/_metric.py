"""What a metric is: a pair of pure functions, one to differentiate and one to report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Params, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.transforms import through

Function = Callable[[Params, View], jax.Array]
PER = ("model", "layer")
OF = ("params", "view")
MODES = ("coarse", "smooth")


def _scalar(model: Tree) -> tuple[int, ...]:
    del model
    return ()


class Metric(NamedTuple):
    """A quantity of a model that a constraint can hold.

    soft: (params, view) -> value, differentiable: what the penalty is made of.
    hard: (params, view) -> value, exact: what a report says.
    shape: (model) -> shape of both, () for one number.
    """

    soft: Function
    hard: Function
    shape: Callable[[Tree], tuple[int, ...]] = _scalar


def near_zero(square: jax.Array, alpha: float, mode: str) -> jax.Array:
    """How much a weight or group counts as absent, from its squared size s: 1 at 0.

    "smooth": exp(-alpha s).  "coarse": 1 / (1 + alpha s), the same curvature at 0, but with a tail, as only its gradient is
    used, which must reach the large ones too.

    >>> [round(float(near_zero(jnp.float32(0.01), 100.0, mode)), 3) for mode in MODES]
    [0.5, 0.368]
    """
    return jnp.exp(-alpha * square) if mode == "smooth" else 1 / (1 + alpha * square)


def absent(size: jax.Array, square: jax.Array, epsilon: float, alpha: float, mode: str) -> tuple[jax.Array, jax.Array]:
    """(soft, hard) indicator of size <= epsilon: hard is 1 or 0, soft is hard's value straight-through, or smooth."""
    hard = (size <= epsilon).astype(jnp.float32)
    soft = near_zero(square, alpha, mode)
    return (through(hard, soft) if mode == "coarse" else soft), hard


Count = Callable[[str, jax.Array], tuple[jax.Array, jax.Array, int]]


def fraction(count: Count, where: _tree.Where, per: str, of: str) -> Metric:
    """A metric that is a share: `count(path, kernel)` gives (soft, hard, of how many), added up over kernels or not.

    Raises: TransformError for an unknown `per` or `of`; when it is used, for a rule that matches no kernel.
    """
    check("per", per, PER)
    check("of", of, OF)

    def kernels(model: Tree) -> Mapping[str, jax.Array]:
        chosen = {p: w for p, w in _tree.select(model, where).items() if _tree.is_kernel(p, w)}
        if not chosen:
            raise TransformError(f"the rule {where!r} matches no kernel; {did_you_mean(str(where), _tree.flatten(model))}")
        return chosen

    def summed(which: int) -> Function:
        def value(params: Params, view: View) -> jax.Array:
            found = [count(p, w) for p, w in kernels(params.model if of == "params" else view.model).items()]
            parts, totals = jnp.stack([f[which] for f in found]), [max(f[2], 1) for f in found]
            return parts / jnp.float32(totals) if per == "layer" else jnp.sum(parts) / jnp.float32(sum(totals))

        return value

    return Metric(summed(0), summed(1), lambda model: (len(kernels(model)),) if per == "layer" else ())


def check(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises: TransformError unless `value` is one of `known`."""
    if value not in known:
        raise TransformError(f"{name} is {value!r}; {did_you_mean(str(value), known)}")
