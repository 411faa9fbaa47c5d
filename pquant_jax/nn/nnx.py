"""flax.nnx's layers with `quantize=` and `prune=`, and the trained tables."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pquant_jax.nn import _ask, _edges, _functions


def asking(base: Any, roles: Sequence[str], home: str) -> Any:
    """The nnx layer `base` that can ask.  home: its parameter that stands for the layer."""

    def init(self: Any, *args: Any, quantize: _ask.Quantize = None, prune: Any = None, **options: Any) -> None:
        base.__init__(self, *args, **options)
        self.quantize = nnx.static(tuple(_ask.formats(quantize, roles, (), base.__name__).items()))
        self.prune = nnx.static(_ask.check_target(prune, base.__name__))

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        for name in ("kernel", "scale", "bias"):
            parameter = getattr(self, name, None)
            if parameter is not None:  # the declaration stays in the jaxpr, though nothing reads its result
                _ask.declare(parameter[...], name, dict(self.quantize), self.prune, name == home)
        return base.__call__(self, *args, **options)

    doc = f"""`flax.nnx.{base.__name__}` with `quantize` and `prune`.

    quantize: a `Format`, or one per role of {", ".join(roles)}.  prune: False, or the fraction of zeros in `{home}`.
    """
    body = {"__init__": init, "__call__": call, "__doc__": doc, "__module__": __name__}
    return types.new_class(base.__name__, (base,), {}, lambda namespace: namespace.update(body))


Linear: Any = asking(nnx.Linear, _ask.PRODUCT, "kernel")
LinearGeneral: Any = asking(nnx.LinearGeneral, _ask.PRODUCT, "kernel")
Einsum: Any = asking(nnx.Einsum, _ask.PRODUCT, "kernel")
Conv: Any = asking(nnx.Conv, _ask.PRODUCT, "kernel")
ConvTranspose: Any = asking(nnx.ConvTranspose, _ask.PRODUCT, "kernel")
BatchNorm: Any = asking(nnx.BatchNorm, _ask.FUSED, "scale")
LayerNorm: Any = asking(nnx.LayerNorm, _ask.SCALED, "scale")
RMSNorm: Any = asking(nnx.RMSNorm, ("scale",), "scale")


class ReluPo2(nnx.Module):
    """relu(x) * 2^round(m) with a trained m: see `pq.nn.relu_po2`."""

    def __init__(self, start: float = 0.0) -> None:
        self.m = nnx.Param(jnp.full((), start, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape."""
        return _functions.relu_po2(x, self.m[...])


class TableDense(nnx.Module):
    """`pq.nn.TableDense` for nnx, whose modules don't know their path: `name` is that of the sites.

    >>> TableDense(2, 3, name="tables", rngs=nnx.Rngs(0))(jnp.ones((4, 2))).shape
    (4, 3)
    """

    def __init__(
        self, in_features: int, out_features: int, *, name: str, rngs: nnx.Rngs, hidden: int = 8, depth: int = 1
    ) -> None:
        _edges.check_sizes(name, in_features=in_features, out_features=out_features, hidden=hidden, depth=depth)
        edges = _edges.init_edges(rngs.params(), in_features, out_features, hidden, depth)
        self.edges = nnx.Dict({n: nnx.Param(v) for n, v in edges.items()})
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.float32))
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., in_features) -> (..., out_features)."""
        return _edges.table_sum(x, {n: v[...] for n, v in self.edges.items()}, self.name) + self.bias[...]
