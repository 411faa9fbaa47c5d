"""Groups: which weights of a kernel live and die together, and how the survivors are chosen.

A kernel is cut into blocks: axis a of size n_a into n_a / b_a pieces of b_a (zeros fill up the last one).  Every kind of
group is a choice of b, after an optional flattening; N:M is the choice of survivors inside a block instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import AxisRole
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.transforms._order import kth_largest, places

NAMES: Final = ("weight", "row", "in", "out", "filter", "head", "layer")


@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every `m` weights in a row along the input, the `n` largest stay.

    across: PQuantML's rows, those of the kernel written out as (out, in, positions), whose blocks reach into the next output.
    """

    n: int
    m: int
    across: bool = False


@dataclass(frozen=True)
class Block:
    """Blocks of `h` inputs by `w` outputs."""

    h: int
    w: int


@dataclass(frozen=True)
class Cross:
    """Tiles of `h` inputs by `w` outputs (None: all); a weight lives where both its row and its column of the tile do."""

    h: int | None = None
    w: int | None = None


@dataclass(frozen=True)
class Reuse:
    """The weights that one multiplier of hls4ml works off: `factor` in a row of the kernel written out as (out, in)."""

    factor: int


@dataclass(frozen=True)
class Heads:
    """Output channels in `heads` equal parts, where the kernel has no axis of its own for them."""

    heads: int


Groups = str | NM | Block | Cross | Reuse | Heads


OfShape = Callable[[tuple[int, ...]], Groups]


@dataclass(frozen=True)
class Layout:
    """One kernel cut into groups.

    scores: (kernel of non-negative values) -> (groups,) or (blocks, m), the L2 norm of each.
    expand: what `scores` gives -> kernel, each weight with the value of its group.
    sizes: weights per group, the same shape, int32: the last block of an axis may be smaller.
    keep: of the last axis, how many stay; None where a fraction of all groups does.
    inside: the fraction is that of every last axis by itself.
    """

    scores: Callable[[jax.Array], jax.Array]
    expand: Callable[[jax.Array], jax.Array]
    sizes: np.ndarray
    keep: int | None = None
    inside: bool = False


def role_of(path: str, rank: int, roles: Mapping[str, AxisRole] | None) -> AxisRole:
    """What a kernel's axes are: by its role, or as linen has them, (*positions, in, out).

    >>> role_of("Conv_0/kernel", 4, None).positions
    (0, 1)
    """
    linen = AxisRole(tuple(range(rank - 1)), (rank - 1,), "", tuple(range(rank - 2)))
    return (roles or {}).get(path, linen)


def layout(path: str, shape: tuple[int, ...], groups: Groups = "weight", roles: Mapping[str, AxisRole] | None = None) -> Layout:
    """How a kernel of this shape is cut.  roles: `inst.roles`; without one the last axis is the output.

    "weight", "row" (weights, as many in every output channel), "in" and "out" channels, "filter" (all positions of a
    convolution's one input and output channel), "head" (an axis of its own in front of another), "layer", or NM, Block,
    Cross, Reuse, Heads.
    Raises: TransformError for an unknown name, or groups that the kernel can't be cut into.

    >>> cut = layout("kernel", (2, 3), "out")
    >>> cut.scores(jnp.float32([[3, 0, 1], [4, 0, 0]])).tolist()
    [[5.0, 0.0, 1.0]]
    >>> cut.expand(jnp.float32([[1, 0, 1]])).tolist()
    [[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]
    """
    role = role_of(path, len(shape), roles)
    order = (*role.out_axes, *(a for a in range(len(shape)) if a not in role.out_axes))  # outputs first, as (out, in)
    out = math.prod(shape[a] for a in role.out_axes)
    flat = (out, math.prod(shape) // max(out, 1))
    match groups:
        case "weight":
            return Layout(lambda w: w, lambda v: v, np.ones(shape, np.int32))
        case "row":
            return replace(_rows_of(shape, order, flat, flat[1], flat[1]), keep=None, inside=True)
        case NM(n, m, across):
            if not 0 < n <= m:
                raise TransformError(f"{path}: NM(n={n}, m={m}) keeps n of every m, expected 0 < n <= m")
            if across:
                positions = order[len(role.out_axes) :]  # in front of the input channel, unless the output is first
                order = order if 0 in role.out_axes else (*role.out_axes, positions[-1], *positions[:-1])
            return _rows_of(shape, order, (1, math.prod(shape)) if across else flat, m, n)
        case Block(h, w):
            return _blocks(path, shape, order, flat, (w, h))
        case Cross(h, w):
            return _cross(path, shape, order, flat, (w or flat[0], h or flat[1]))
        case Reuse(factor):
            return _blocks(path, shape, order, (1, math.prod(shape)), (1, factor))
        case Heads(heads):
            if heads < 1 or out % heads:
                raise TransformError(f"{path}: {out} output channels can't be cut into {heads} equal heads")
            return _blocks(path, shape, order, flat, (out // heads, flat[1]))
        case str():
            return _blocks(path, shape, tuple(range(len(shape))), shape, _named_block(path, shape, groups, role))
    raise TransformError(f"groups is {groups!r}, expected one of {', '.join(NAMES)}, or NM, Block, Cross, Reuse, Heads")


def layouts(
    kernels: Mapping[str, jax.Array], groups: Groups | OfShape = "weight", roles: Mapping[str, AxisRole] | None = None
) -> dict[str, Layout]:
    """{path: `layout`} of all kernels; groups may be a function of a kernel's shape.

    >>> sorted(layouts({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}, "out"))
    ['a', 'b']
    """
    return {p: layout(p, w.shape, groups(w.shape) if callable(groups) else groups, roles) for p, w in kernels.items()}


def _named_block(path: str, shape: tuple[int, ...], name: str, role: AxisRole) -> tuple[int, ...]:
    """The block of a named kind: 1 along the axes that keep groups apart, all of the others."""
    ins = tuple(a for a in range(len(shape)) if a not in role.out_axes)
    channel = tuple(a for a in ins if a not in role.positions)
    if name == "head":
        heads = role.out_axes if len(role.out_axes) > 1 else ins if len(ins) == 2 and len(shape) == 3 else ()
        if not heads:
            raise TransformError(f"{path}: a kernel of shape {shape} has no axis of heads; say how many: Heads(...)")
        apart: tuple[int, ...] = heads[:1]
    elif name in NAMES:
        apart = {"in": channel, "out": role.out_axes, "filter": (*channel, *role.out_axes), "layer": ()}[name]
    else:
        raise TransformError(f"groups is {name!r}; {did_you_mean(name, NAMES)}")
    return tuple(1 if a in apart else n for a, n in enumerate(shape))


def turned(shape: tuple[int, ...], order: tuple[int, ...], flat: tuple[int, ...]) -> tuple[Callable, Callable]:
    """(kernel -> the same with its axes in `order`, of shape `flat`, and back)."""
    axes, back = tuple(shape[a] for a in order), tuple(int(a) for a in np.argsort(order))
    return lambda w: w.transpose(order).reshape(flat), lambda v: v.reshape(axes).transpose(back)


def tiled(flat: tuple[int, ...], block: tuple[int, ...]) -> tuple[Callable, Callable]:
    """(array of shape `flat` -> (c_0, b_0, c_1, b_1, ...), c_a pieces of b_a along axis a, zeros at the end; and back).

    >>> cut, join = tiled((3, 2), (2, 1))
    >>> cut(jnp.ones((3, 2))).shape, join(cut(jnp.ones((3, 2)))).shape
    ((2, 2, 2, 1), (3, 2))
    """
    counts = tuple(math.ceil(n / b) for n, b in zip(flat, block, strict=True))
    whole = tuple(c * b for c, b in zip(counts, block, strict=True))
    apart = tuple(v for pair in zip(counts, block, strict=True) for v in pair)

    def cut(v: jax.Array) -> jax.Array:
        return jnp.pad(v, [(0, w - n) for n, w in zip(flat, whole, strict=True)]).reshape(apart)

    return cut, lambda v: v.reshape(whole)[tuple(slice(n) for n in flat)]


def _blocks(path: str, shape: tuple, order: tuple, flat: tuple, block: tuple) -> Layout:
    if any(b < 1 for b in block):
        raise TransformError(f"{path}: groups of {' x '.join(map(str, block))} weights are empty")
    there, back = turned(shape, order, flat)
    cut, join = tiled(flat, block)
    apart = jax.eval_shape(cut, jax.ShapeDtypeStruct(flat, jnp.float32)).shape
    inner = tuple(range(1, len(apart), 2))
    lengths = [np.minimum(b, n - b * np.arange(c)) for n, b, c in zip(flat, block, apart[::2], strict=True)]
    sizes = functools.reduce(np.multiply.outer, lengths).astype(np.int32)
    even = np.sqrt(sizes.mean() / np.maximum(sizes, 1)).astype(np.float32)  # smaller blocks compare by their mean square

    def scores(w: jax.Array) -> jax.Array:
        square = jnp.sum(jnp.square(cut(there(w))), inner)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0) * even

    def expand(v: jax.Array) -> jax.Array:
        return back(join(jnp.broadcast_to(jnp.expand_dims(v, inner), apart)))

    return Layout(scores, expand, sizes)


def _rows_of(shape: tuple, order: tuple, flat: tuple, m: int, keep: int) -> Layout:
    there, back = turned(shape, order, flat)
    (cut, join), rows = tiled(flat, (1, m)), math.ceil(flat[1] / m)

    def scores(w: jax.Array) -> jax.Array:
        return cut(there(w)).reshape(flat[0], rows, m)

    return Layout(scores, lambda v: back(join(v)), np.ones((flat[0], rows, m), np.int32), keep)


def _cross(path: str, shape: tuple, order: tuple, flat: tuple, tile: tuple) -> Layout:
    """Both partitions one after the other in one vector: the rows of all tiles, then the columns."""
    rows, columns = (_blocks(path, shape, order, flat, b) for b in ((tile[0], 1), (1, tile[1])))
    n, mean = rows.sizes.size, (rows.sizes.mean(), columns.sizes.mean())

    def scores(w: jax.Array) -> jax.Array:
        parts = [part.scores(w).ravel() / np.float32(np.sqrt(size)) for part, size in zip((rows, columns), mean, strict=True)]
        return jnp.concatenate(parts)

    def expand(v: jax.Array) -> jax.Array:
        return rows.expand(v[:n].reshape(rows.sizes.shape)) * columns.expand(v[n:].reshape(columns.sizes.shape))

    return Layout(scores, expand, np.concatenate([rows.sizes.ravel(), columns.sizes.ravel()]))


def survivors(cut: Layout, scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    """1 for the groups that stay, 0 for the others, of the shape of `scores`; float32.

    Exact to one group: as many of the highest scores stay as come closest to (1 - sparsity) of the weights, ties broken
    by place; N:M keeps its n of every m whatever `sparsity` is above 0.  Sorts, so it belongs between epochs.

    >>> cut = layout("kernel", (4,), "weight")
    >>> survivors(cut, jnp.float32([1, 1, 1, 1]), jnp.float32(0.5)).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    if cut.keep is not None:
        rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
        return jnp.where(sparsity > 0, rank < cut.keep, True).astype(jnp.float32)
    if cut.inside:
        rank = jnp.argsort(jnp.argsort(-scores, axis=-1, stable=True), axis=-1)
        return (rank < jnp.round((1 - sparsity) * scores.shape[-1])).astype(jnp.float32)
    rank = jnp.argsort(jnp.argsort(-scores.ravel(), stable=True)).reshape(scores.shape)
    total = math.prod(jax.eval_shape(cut.expand, scores).shape)
    wanted = (1 - sparsity) * total

    def weights(k: jax.Array) -> jax.Array:
        return jnp.sum(cut.expand((rank < k).astype(jnp.float32)))

    def halve(_: int, bounds: tuple) -> tuple:
        low, high = bounds
        middle = (low + high) // 2
        enough = weights(middle) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    span = jnp.int32(0), jnp.int32(scores.size)
    fewer, enough = jax.lax.fori_loop(0, max(scores.size, 2).bit_length(), halve, span)
    k = jnp.where(wanted - weights(fewer) < weights(enough) - wanted, fewer, enough)
    return (rank < k).astype(jnp.float32)


def straddling(cut: Layout, scores: jax.Array, sparsity: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest score that stays and the highest that goes; differentiable, no sort.

    Scalars, or one per block of N:M and per "row", broadcastable to `scores`.
    """
    if cut.keep is not None:
        rank, last = places(scores), scores.shape[-1] - 1
        stays, goes = (jnp.where(rank == r, scores, 0).sum(-1, keepdims=True) for r in (cut.keep - 1, min(cut.keep, last)))
        return stays, goes
    size = scores.shape[-1] if cut.inside else scores.size
    kept = jnp.clip(jnp.round((1 - sparsity) * size).astype(jnp.int32), 1, max(size - 1, 1))
    around = kept, jnp.minimum(kept + 1, size)
    if cut.inside:
        rows = scores.reshape(-1, size)
        stays, goes = (jax.vmap(kth_largest, (0, None))(rows, k).reshape(*scores.shape[:-1], 1) for k in around)
        return stays, goes
    return kth_largest(scores, around[0]), kth_largest(scores, around[1])
