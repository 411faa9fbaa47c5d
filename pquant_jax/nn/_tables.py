"""Layers of trained tables in flax.linen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from pquant_jax.nn import _ask, _edges
from pquant_jax.numerics import site

_OPTIONS = ("hidden", "depth", "use_bias", "batch_norm", "momentum", "quantize")


class TableDense(nn.Module):
    """y_o = sum_i t_io(x_i) + b_o, every t_io a trained table of one input (HGQ-LUT, arXiv:2604.22293).

    x (..., n) -> (..., features).  An edge is a network 1 -> hidden -> 1 of tanh with `depth` hidden layers while it is
    trained and one lookup table in hardware.  batch_norm: normalise the sums; the scale goes into the tables.
    quantize: a `Format`, or one per role of input, table: both ends of every edge.

    >>> layer = TableDense(3, batch_norm=True)
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((4, 2)))[0].shape
    (4, 3)
    """

    features: int
    hidden: int = 8
    depth: int = 1
    use_bias: bool = True
    batch_norm: bool = False
    momentum: float = 0.99
    quantize: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """train: with batch_norm, normalise with the statistics of this batch."""
        fan_in, name = x.shape[-1], "/".join(self.path) or type(self).__name__
        _edges.check_sizes(name, features=self.features, hidden=self.hidden, depth=self.depth)
        edges = dict(self.param("edges", _edges.init_edges, fan_in, self.features, self.hidden, self.depth))
        for role, fmt in _ask.formats(self.quantize, ("input", "table"), (), name).items():
            edges["slope"] = site(edges["slope"], f"/{name}/{role}", "format", fmt)
        if not self.batch_norm:
            y = _edges.table_sum(x, edges, name)
            return y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else y
        shape = (self.features,)
        norm = {
            "scale": self.param("scale", nn.initializers.ones, shape, jnp.float32),
            "bias": self.param("bias", nn.initializers.zeros, shape, jnp.float32),
        }
        starts = {"mean": jnp.zeros, "var": jnp.ones}
        stats = {n: self.variable("batch_stats", n, start, shape, jnp.float32) for n, start in starts.items()}
        y, new = _edges.normalised_sum(
            x, edges, name, norm, {n: v.value for n, v in stats.items()}, train=train, momentum=self.momentum
        )
        if train and not self.is_initializing():
            for n, v in new.items():
                stats[n].value = v
        return y


class TableConv(nn.Module):
    """`TableDense` on every window of a convolution, with the same tables at all positions.

    x (n, positions, c) or (n, height, width, c) -> the same with `features` channels.  kernel_size has one number per
    position axis; strides and padding ("VALID", "SAME") as in `flax.linen.Conv`.

    >>> layer = TableConv(4, (3,), hidden=2)
    >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 8, 2)))[0].shape
    (1, 6, 4)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "VALID"
    hidden: int = 8
    depth: int = 1
    use_bias: bool = True
    batch_norm: bool = False
    momentum: float = 0.99
    quantize: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """train: as in `TableDense`."""
        rank = x.ndim - 2
        size, strides = (_edges.pair(v, rank, n) for n, v in (("kernel_size", self.kernel_size), ("strides", self.strides)))
        seen = _edges.windows(x, size, strides, self.padding)
        options: dict[str, Any] = {n: getattr(self, n) for n in _OPTIONS}
        return TableDense(self.features, **options, name="TableDense")(seen, train)
