"""Trained tables: every edge of a layer a small network of one input, which hardware looks up.

y_o = sum_i t_io(x_i), t_io(x) = v . tanh(... tanh(w x + b) ...) + c.  The network is trained; what is built is the
table of its values (HGQ-LUT, arXiv:2604.22293), so that its size costs nothing but training time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from pquant_jax._errors import ConfigError
from pquant_jax.numerics import region

Edges = Mapping[str, jax.Array]


def check_sizes(name: str, **sizes: int) -> None:
    """Raises: ConfigError for a size that is no positive whole number."""
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"{name}: {what} is {size!r}, expected a positive whole number")


def init_edges(key: jax.Array, fan_in: int, features: int, hidden: int, depth: int) -> dict[str, jax.Array]:
    """Parameters of fan_in x features edges with `depth` hidden layers of `hidden` tanh each.

    The hidden axes come first: a sum over them is then a sum of whole planes of edges, which XLA fuses into one loop
    over the edges (a training step of 1,024 x 16 x 16 edges takes 10 ms instead of 24 with the hidden axis last).
    Scales are for inputs of variance 1: slopes and offsets spread over the range, sums of variance about 1.
    """
    keys, plane = jax.random.split(key, 2 + 2 * depth), (fan_in, features)
    made = {
        "slope": jax.random.normal(keys[0], (hidden, *plane), jnp.float32),
        "offset": jax.random.uniform(keys[1], (hidden, *plane), jnp.float32, -1.5, 1.5),
    }
    for n in range(1, depth):
        made[f"hidden_{n}"] = jax.random.normal(keys[2 * n], (hidden, hidden, *plane), jnp.float32) * hidden**-0.5
        made[f"offset_{n}"] = jnp.zeros((hidden, *plane), jnp.float32)
    made["out"] = jax.random.normal(keys[-1], (hidden, *plane), jnp.float32) * (hidden * fan_in) ** -0.5
    made["shift"] = jnp.zeros(plane, jnp.float32)
    return made


def edge_values(x: jax.Array, edges: Edges, scale: jax.Array | None = None) -> jax.Array:
    """t_io of x (..., fan_in, features), elementwise, times `scale` (features,) where given.

    >>> edges = init_edges(jax.random.key(0), 3, 2, 4, 2)
    >>> edge_values(jnp.zeros((5, 3, 2)), edges).shape
    (5, 3, 2)
    """
    hidden, depth = edges["slope"].shape[0], sum(name.startswith("hidden_") for name in edges) + 1
    h = [jnp.tanh(x * edges["slope"][j] + edges["offset"][j]) for j in range(hidden)]
    for n in range(1, depth):
        w, b = edges[f"hidden_{n}"], edges[f"offset_{n}"]
        h = [jnp.tanh(sum((h[m] * w[m, j] for m in range(hidden)), b[j])) for j in range(hidden)]
    out = edges["out"] if scale is None else edges["out"] * scale
    shift = edges["shift"] if scale is None else edges["shift"] * scale
    return sum((h[j] * out[j] for j in range(hidden)), shift)


def table_sum(x: jax.Array, edges: Edges, name: str, scale: jax.Array | None = None) -> jax.Array:
    """Sum over i of t_io(x_i): x (..., fan_in) -> (..., features), each edge one table of the region `name`.

    `instrument` puts the sites `NAME/input` and `NAME/table` on the edges, so every edge has formats of its own, and an
    edge whose table has no bits is not built.
    """
    wide = jnp.broadcast_to(x[..., None], (*x.shape, edges["shift"].shape[1]))
    values = region(edge_values, name)(wide, dict(edges), scale)
    return jnp.sum(values, -2)


def normalised_sum(
    x: jax.Array,
    edges: Edges,
    name: str,
    norm: Mapping[str, jax.Array],
    stats: Mapping[str, jax.Array],
    *,
    train: bool,
    momentum: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(BatchNorm of `table_sum`, the new running statistics), with the scale inside of the tables: it costs no multiplier.

    norm: scale and bias (features,).  stats: running mean and var; in training those of this batch of x normalise.
    """
    if train:
        wide = jnp.broadcast_to(x[..., None], (*x.shape, edges["shift"].shape[1]))
        plain = jnp.sum(edge_values(wide, edges), -2)
        axes = tuple(range(plain.ndim - 1))
        mean, var = jnp.mean(plain, axes), jnp.var(plain, axes)
        stats = {n: momentum * stats[n] + (1 - momentum) * jax.lax.stop_gradient(v) for n, v in (("mean", mean), ("var", var))}
    else:
        mean, var = stats["mean"], stats["var"]
    scale = norm["scale"] * jax.lax.rsqrt(var + 1e-5)
    return table_sum(x, edges, name, scale) + (norm["bias"] - mean * scale), dict(stats)


def windows(x: jax.Array, size: Sequence[int], strides: Sequence[int], padding: str) -> jax.Array:
    """What a convolution sees: x (n, *positions, c) -> (n, *windows, prod(size) * c), by slices alone.

    padding: "VALID" or "SAME" (zeros).

    >>> windows(jnp.arange(4.0).reshape(1, 4, 1), (2,), (1,), "VALID").tolist()
    [[[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]]
    """
    if padding not in ("VALID", "SAME"):
        raise ConfigError(f"padding is {padding!r}, expected 'VALID' or 'SAME'")
    if padding == "SAME":
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], size, strides, "SAME")
        x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    counts = [(n - s) // t + 1 for n, s, t in zip(x.shape[1:-1], size, strides, strict=True)]
    parts = []
    for place in _places(size):
        stop = [a + (n - 1) * t + 1 for a, n, t in zip(place, counts, strides, strict=True)]
        parts.append(jax.lax.slice(x, (0, *place, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)))
    return jnp.concatenate(parts, -1)


def _places(size: Sequence[int]) -> list[tuple[int, ...]]:
    places: list[tuple[int, ...]] = [()]
    for n in size:
        places = [(*p, j) for p in places for j in range(n)]
    return places


def pair(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    """One number per position axis.  Raises: ConfigError for another count."""
    made = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(made) != rank:
        raise ConfigError(f"{name} is {value!r}, expected one number or {rank}: the input has {rank} position axes")
    return made
