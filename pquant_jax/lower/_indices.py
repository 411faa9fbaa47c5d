"""What an array of element numbers means: a transpose, a slice, a broadcast, the windows of a convolution.  numpy only.

Every function guesses a description from the array, builds the array that the description implies and gives the
description back only if the two are equal; so a wrong guess costs a prettier name and never a wrong value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Geometry(NamedTuple):
    """Windows over 1 or 2 axes: sizes of the array, of the window, of the result; strides, (low, high) padding, dilation.

    channels_last: whether the array is (*space, channels) or (channels, *space).
    """

    space: tuple[int, ...]
    size: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    channels: int
    channels_last: bool

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of the array that is read."""
        return (*self.space, self.channels) if self.channels_last else (self.channels, *self.space)


def is_reshape(index: np.ndarray, size: int) -> bool:
    """Whether these are the numbers 0, 1, ..., size - 1 in order."""
    return index.size == size and np.array_equal(index.ravel(), np.arange(size))


def loops(flat: np.ndarray) -> tuple[tuple[int, int], ...] | None:
    """(count, step) of the nested loops, outermost first, that write these numbers from flat[0] on; None if none do.

    >>> loops(np.arange(6).reshape(2, 3).T.ravel()), loops(np.array([0, 0, 1, 1])), loops(np.array([0, 2, 1]))
    (((3, 1), (2, 3)), ((2, 1), (2, 0)), None)
    """
    found: list[tuple[int, int]] = []
    flat = np.asarray(flat, np.int64).ravel()
    while len(flat) > 1:
        steps = np.diff(flat)
        step = int(steps[0])
        changes = np.flatnonzero(steps != step)
        count = int(changes[0]) + 1 if len(changes) else len(flat)
        if len(flat) % count:
            return None
        rows = flat.reshape(-1, count)
        if not np.array_equal(rows, rows[:, :1] + step * np.arange(count)):
            return None
        found.insert(0, (count, step))
        flat = rows[:, 0]
    return tuple(found)


def transposition(
    index: np.ndarray, size: int, shape: Sequence[int] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(dims, perm) with index.ravel() = arange(size).reshape(dims).transpose(perm).ravel(), None if there are none.

    shape: of the transposed array; None takes that of the lowest rank.

    >>> turned = np.arange(24).reshape(6, 4).T.ravel()
    >>> transposition(turned, 24), transposition(turned, 24, (4, 2, 3)), transposition(np.array([0, 2, 1]), 3)
    (((6, 4), (1, 0)), ((2, 3, 4), (2, 0, 1)), None)
    """
    nest = loops(index.ravel()) if index.size == size and size else None
    if nest is None:
        return None
    shape = tuple(count for count, _ in nest) if shape is None else shape
    turned = index.reshape(shape)
    steps = [int(turned.take(min(n - 1, 1), axis).ravel()[0]) for axis, n in enumerate(shape)]
    order = sorted(range(len(shape)), key=lambda axis: -steps[axis])  # axes of the array, as those of the transposed one
    dims = tuple(shape[axis] for axis in order)
    perm = tuple(order.index(axis) for axis in range(len(shape)))
    return (dims, perm) if np.array_equal(np.arange(size).reshape(dims).transpose(perm), turned) else None


def broadcasting(index: np.ndarray, size: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(in, out) with index.ravel() = broadcast_to(arange(size).reshape(in), out).ravel(); `in` has ones where it is repeated."""
    nest = loops(index.ravel()) if index.size and size else None
    if nest is None or not any(step == 0 for _, step in nest):
        return None
    out = tuple(count for count, _ in nest)
    shape = tuple(1 if step == 0 else count for count, step in nest)
    if int(np.prod(shape)) != size:
        return None
    same = np.array_equal(np.broadcast_to(np.arange(size).reshape(shape), out).ravel(), index.ravel())
    return (shape, out) if same else None


def slicing(index: np.ndarray, shape: Sequence[int]) -> tuple[tuple[int, int, int], ...] | None:
    """(start, step, count) per axis of the array of that shape, steps of flipped axes negative."""
    flat = index.ravel()
    if not flat.size or flat.min() < 0 or not shape:
        return None
    found, lines = [], []
    for axis in np.unravel_index(flat, shape):
        values, first = np.unique(axis, return_index=True)
        line = values[np.argsort(first)]
        step = int(line[1] - line[0]) if len(line) > 1 else 1
        if not np.array_equal(line, line[0] + step * np.arange(len(line))):
            return None
        lines.append(line)
        found.append((int(line[0]), step, len(line)))
    numbers = np.arange(int(np.prod(shape))).reshape(shape)[np.ix_(*lines)]
    return tuple(found) if np.array_equal(numbers.ravel(), flat) else None


def reduction(rows: np.ndarray, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes whose elements make up a row, for rows of an array of that shape in order."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    for chosen in range(1, 1 << len(shape)):
        axes = tuple(d for d in range(len(shape)) if chosen >> d & 1)
        kept = tuple(d for d in range(len(shape)) if d not in axes)
        count = int(np.prod([shape[d] for d in axes]))
        if count == rows.shape[1] and np.array_equal(numbers.transpose(*kept, *axes).reshape(-1, count), rows):
            return axes
    return None


def concatenation(index: np.ndarray, sizes: Sequence[int]) -> tuple[int, tuple[tuple[int, ...], ...]] | None:
    """(axis, shapes of the parts) if `index` places parts of these sizes one after the other along an axis."""
    starts = np.cumsum([0, *sizes])[:-1]
    if index.size != sum(sizes):
        return None
    for axis in reversed(range(index.ndim)):
        outer, inner = (int(np.prod(s)) for s in (index.shape[:axis], index.shape[axis + 1 :]))
        if any(n % (outer * inner) for n in sizes):
            continue
        shapes = tuple((*index.shape[:axis], n // (outer * inner), *index.shape[axis + 1 :]) for n in sizes)
        parts = [np.arange(n).reshape(s) + a for n, s, a in zip(sizes, shapes, starts, strict=True)]
        if np.array_equal(np.concatenate(parts, axis=axis), index):
            return axis, shapes
    return None


def convolution(rows: np.ndarray, shapes: Sequence[Sequence[int]]) -> tuple[Geometry, bool] | None:
    """(geometry, whether a row is ordered (channels, *window) or (*window, channels)) of windows (groups, positions, taps).

    shapes: in which the array that is read may be seen.
    """
    groups, count, taps = rows.shape
    for space, channels, last in _layouts(shapes):
        if channels % groups or taps % (channels // groups) or int(np.prod(space)) * channels <= rows.max(initial=-1):
            continue
        inner = channels // groups
        for positions, size in _splits(count, taps // inner, len(space)):
            for first in (True, False):
                order = (groups, *positions, inner, *size) if first else (groups, *positions, *size, inner)
                grid = rows.reshape(order) if first else np.moveaxis(rows.reshape(order), -1, 1 + len(positions))
                at = _place(grid, space, channels, last)
                fits = [_fit(c, n, axis, len(space)) for axis, (c, n) in enumerate(zip(at, space, strict=True))]
                geometry = _geometry(space, size, positions, fits, channels, last)
                if geometry is not None and np.array_equal(conv_index(geometry, groups), grid):
                    return geometry, first
    return None


def pooling(rows: np.ndarray, shapes: Sequence[Sequence[int]], repeats: bool) -> Geometry | None:
    """The geometry of windows (outputs, elements of a window) per channel; repeats: padding reads the first valid element."""
    for space, channels, last in _layouts(shapes):
        if len(rows) % channels or int(np.prod(space)) * channels <= rows.max(initial=-1):
            continue
        for positions, size in _splits(len(rows) // channels, rows.shape[1], len(space)):
            order = (*positions, channels, *size) if last else (channels, *positions, *size)
            grid = rows.reshape(order) if last else np.moveaxis(rows.reshape(order), 0, len(positions))
            at = _place(grid[None], space, channels, last)
            per_axis = [_pool_fits(c, n, axis, len(space)) for axis, (c, n) in enumerate(zip(at, space, strict=True))]
            for fits in _combinations(per_axis):
                geometry = _geometry(space, size, positions, fits, channels, last)
                if geometry is not None and np.array_equal(pool_index(geometry, repeats), grid):
                    return geometry
    return None


def conv_index(geometry: Geometry, groups: int) -> np.ndarray:
    """Element numbers (groups, *positions, channels of a group, *size), -1 for padding."""
    inner = geometry.channels // groups
    at = _window_positions(geometry)
    at = np.expand_dims(at, len(geometry.positions))[None]  # (1, *positions, 1, *size)
    channel = np.arange(geometry.channels).reshape(groups, *(1 for _ in geometry.positions), inner, *(1 for _ in geometry.size))
    return _elements(geometry, at, channel)


def pool_index(geometry: Geometry, repeats: bool) -> np.ndarray:
    """Element numbers (*positions, channels, *size); padding is -1 or, with `repeats`, the first valid one of the window."""
    at = np.expand_dims(_window_positions(geometry), len(geometry.positions))
    channel = np.arange(geometry.channels).reshape(-1, *(1 for _ in geometry.size))
    index = _elements(geometry, at, channel)
    if not repeats:
        return index
    flat = index.reshape(-1, int(np.prod(geometry.size)))
    first = np.take_along_axis(flat, (flat >= 0).argmax(1)[:, None], axis=1)
    return np.where(flat >= 0, flat, first).reshape(index.shape)


def _elements(geometry: Geometry, at: np.ndarray, channel: np.ndarray) -> np.ndarray:
    total = int(np.prod(geometry.space))
    return np.where(at < 0, -1, at * geometry.channels + channel if geometry.channels_last else channel * total + at)


def _window_positions(geometry: Geometry) -> np.ndarray:
    """Number of the place in `space` for (*positions, *size), -1 outside."""
    rank = len(geometry.space)
    number, valid = np.zeros((), np.int64), np.ones((), bool)
    for axis in range(rank):
        low = geometry.padding[axis][0]
        place = np.arange(geometry.positions[axis])[:, None] * geometry.strides[axis] - low
        place = place + np.arange(geometry.size[axis]) * geometry.dilation[axis]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = place.shape
        place = place.reshape(shape)
        number = number * geometry.space[axis] + place
        valid = valid & (place >= 0) & (place < geometry.space[axis])
    return np.where(valid, number, -1)


def _layouts(shapes: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], int, bool]]:
    """(space, channels, channels last) in which arrays of these shapes may be seen, without repetition."""
    seen = set()
    for shape in shapes:
        dims: list[int] = [int(n) for n in shape]
        while len(dims) > 1 and dims[0] == 1:
            dims = dims[1:]
        options = []
        if len(dims) in (2, 3):
            options += [(tuple(dims[:-1]), dims[-1], True), (tuple(dims[1:]), dims[0], False)]
        if len(dims) in (1, 2):
            options.append((tuple(dims), 1, True))
        for option in options:
            if option not in seen:
                seen.add(option)
                yield option


def _splits(count: int, taps: int, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(positions, size) with these products."""
    if rank == 1:
        yield (count,), (taps,)
        return
    for rows in (n for n in range(1, count + 1) if count % n == 0):
        for high in (n for n in range(1, taps + 1) if taps % n == 0):
            yield (rows, count // rows), (high, taps // high)


def _place(grid: np.ndarray, space: Sequence[int], channels: int, last: bool) -> list[np.ndarray]:
    """Coordinates (per axis of `space`) of element numbers, -1 for padding."""
    number = grid // channels if last else grid % int(np.prod(space))
    return [np.where(grid < 0, -1, c) for c in np.unravel_index(np.where(grid < 0, 0, number) % int(np.prod(space)), space)]


def _table(at: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """The coordinate of (position, tap) along one axis, from a grid (groups, *positions, channels, *size)."""
    keep = (1 + axis, 2 + rank + axis)
    return at.max(axis=tuple(d for d in range(at.ndim) if d not in keep), initial=-1)


Fit = tuple[int, int, int]  # stride, low padding, dilation


def _fit(at: np.ndarray, n: int, axis: int, rank: int) -> Fit | None:
    table = _table(at, axis, rank)
    valid = table >= 0
    if not valid.any():
        return None
    down, right = valid[1:] & valid[:-1], valid[:, 1:] & valid[:, :-1]
    stride = int((table[1:] - table[:-1])[down][0]) if down.any() else 0
    dilation = int((table[:, 1:] - table[:, :-1])[right][0]) if right.any() else 1
    p, k = (int(v[0]) for v in np.nonzero(valid))
    stride = stride or _lone_stride(table, n)
    return stride, p * stride + k * dilation - int(table[p, k]), dilation


def _lone_stride(table: np.ndarray, n: int) -> int:
    return 1 if len(table) > 1 or table.shape[1] >= n else n


def _pool_fits(at: np.ndarray, n: int, axis: int, rank: int) -> list[Fit]:
    """Every padding that a window may have: repeated elements hide it."""
    table = _table(at, axis, rank)
    size = int(table.shape[1])
    stride = int(table[1, -1] - table[0, -1]) if len(table) > 1 else 0
    middle = table[len(table) // 2]
    steps = {1, *(int(v) for v in np.diff(middle) if v > 0)}
    found = []
    for low in range(size):
        options = {stride, int(table[-1, 0] - table[-2, 0])} if len(table) > 1 else {_lone_stride(table, n)}
        found += [(s, low, d) for s in sorted(options) if s > 0 for d in sorted(steps)]
    return found


def _combinations(per_axis: Sequence[Sequence[Fit]]) -> Iterator[list[Fit]]:
    if len(per_axis) == 1:
        yield from ([fit] for fit in per_axis[0])
        return
    for first in per_axis[0]:
        yield from ([first, second] for second in per_axis[1])


def _geometry(
    space: tuple[int, ...],
    size: tuple[int, ...],
    positions: tuple[int, ...],
    fits: Sequence[Fit | None],
    channels: int,
    last: bool,
) -> Geometry | None:
    """None where a framework would compute another number of positions from these numbers."""
    padding, strides, dilation = [], [], []
    for n, k, m, fit in zip(space, size, positions, fits, strict=True):
        if fit is None or fit[0] < 1 or fit[1] < 0 or fit[2] < 1:
            return None
        stride, low, step = fit
        span = (k - 1) * step + 1
        high = max((m - 1) * stride + span - low - n, 0)
        if n + low + high < span or (n + low + high - span) // stride + 1 != m:
            return None
        padding.append((low, high))
        strides.append(stride)
        dilation.append(step)
    return Geometry(space, size, positions, tuple(strides), tuple(padding), tuple(dilation), channels, last)
