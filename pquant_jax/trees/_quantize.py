"""A forest on fixed-point grids: thresholds without loss, leaves rounded once.  numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from pquant_jax._base import KIF, InputSpec
from pquant_jax._errors import LoweringError
from pquant_jax.numerics import oracle
from pquant_jax.trees._forest import Forest

_CODE_BITS: Final = 53  # a port's codes and the sums of leaves are held in float64


class QuantizedForest(NamedTuple):
    """A forest whose every number is on a grid, so that its `scores` are exact.

    forest: asks x <= threshold, thresholds on the grid of the port or one step below it, leaves and base multiples of
    2^-leaves.f.  inputs: the port, int64 k, i, f (features,).  leaves: the format of the leaves, numbers.
    """

    forest: Forest
    inputs: KIF
    leaves: KIF


def port(inputs: InputSpec | Sequence[InputSpec] | KIF, features: int) -> KIF:
    """One format per feature, int64 arrays.  Raises: LoweringError for another number of formats or over 53 bits."""
    if isinstance(inputs, InputSpec | KIF):
        columns = [np.asarray(v) for v in (inputs.k, inputs.i, inputs.f)]
    else:
        columns = [np.array([getattr(spec, key) for spec in inputs]) for key in "kif"]
    if any(v.shape not in ((), (features,)) for v in columns):
        raise LoweringError(
            f"the forest reads {features} features, got formats of shape {columns[0].shape}; give one or {features}"
        )
    k, i, f = (np.broadcast_to(v, (features,)).astype(np.int64) for v in columns)
    if (k + i + f > _CODE_BITS).any() or (k + i + f < 1).any():
        raise LoweringError(f"a port needs 1 to {_CODE_BITS} bits per feature, got {(k + i + f).tolist()}")
    return KIF(k, i, f)


def quantize(
    forest: Forest,
    inputs: InputSpec | Sequence[InputSpec] | KIF = InputSpec(),
    *,
    leaves: KIF | int = 8,
    rounding: str = "RND",
    shift: bool = True,
) -> QuantizedForest:
    """`forest` on the grid of its inputs: the same decision for every value that the port can hold, leaves rounded.

    inputs: the port's format, or one per feature.  leaves: the format k, i, f of a leaf, or how many bits it has (then i is
    the least that holds them all); what doesn't fit saturates.  rounding: of leaves and base.  shift: a tree's leaves count
    from the smallest of them, which goes into `base`: the same sum, of numbers without sign that use all of their bits.
    Raises: LoweringError for formats that can't be; see `port`.

    >>> from pquant_jax.trees import Tree, join, scores
    >>> stump = join([Tree([0, -1, -1], [0.3, 0, 0], [1, 0, 0], [2, 0, 0], [0, -0.9, 0.63])], [0], [0.0], 1)
    >>> made = quantize(stump, InputSpec(1, 2, 1), leaves=KIF(0, 1, 2))
    >>> made.forest.threshold[0].item(), scores(made.forest, np.array([[0.0], [0.5]])).ravel().tolist()
    (0.0, [-1.0, 0.5])
    """
    kif = port(inputs, forest.features)
    value, base = forest.value, forest.base.copy()
    if shift:
        value, lowest = _shifted(forest)
        np.add.at(base, forest.output, lowest)
    form = leaves if isinstance(leaves, KIF) else _leaf_format(value[forest.feature < 0], leaves, rounding)
    k, i, f = (int(v) for v in (form.k, form.i, form.f))
    if not 0 < k + i + f <= _CODE_BITS:
        raise LoweringError(f"a leaf needs 1 to {_CODE_BITS} bits, got k={k}, i={i}, f={f}")
    value = oracle.quantize(value, k, i, f, rounding=rounding, overflow="SAT")
    base = np.ldexp(oracle.round_codes(np.ldexp(base, f), rounding), -f) + 0.0
    exact = forest._replace(threshold=_thresholds(forest, kif), value=value, base=base, strict=False, dtype="float64")
    most = np.abs(base).max() + np.bincount(forest.output, minlength=len(base)).max(initial=0) * np.abs(value).max(initial=0)
    if np.ldexp(most, f) >= 2.0**_CODE_BITS:
        raise LoweringError(f"the sum of the leaves needs more than {_CODE_BITS} bits; give leaves a coarser format")
    return QuantizedForest(exact, kif, KIF(k, i, f, rounding, "SAT"))


def encode(made: QuantizedForest, x: np.ndarray) -> np.ndarray:
    """`x` (N, features) on the port's grid, as data are put there: to the nearest value, saturating."""
    k, i, f = made.inputs.k, made.inputs.i, made.inputs.f
    return oracle.quantize(x, k, i, f, rounding="RND", overflow="SAT")


def port_codes(made: QuantizedForest) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest code of every feature, int64 (features,): value = code * 2^-f."""
    span = np.left_shift(1, made.inputs.i + made.inputs.f)
    return -made.inputs.k * span, span - 1


def codes(made: QuantizedForest) -> np.ndarray:
    """The threshold of every node as a code of its feature's port, int64 (nodes,); 0 at leaves."""
    f = np.where(made.forest.feature >= 0, made.inputs.f[made.forest.feature], 0)
    return np.ldexp(made.forest.threshold, f).astype(np.int64)


def _thresholds(forest: Forest, kif: KIF) -> np.ndarray:
    """Per node the largest value of the port that the float forest sends to the left, or one step below the lowest.

    By bisection over the codes with the float decision itself, so that rounding to float32 and `<` need no case.
    """
    inner = np.flatnonzero(forest.feature >= 0)
    k, i, f = (v[forest.feature[inner]] for v in (kif.k, kif.i, kif.f))
    limit = forest.threshold[inner]
    span = np.left_shift(np.int64(1), i + f)
    low, high = -k * span - 1, span - 1  # low goes left, or is below the port; what is above high does not
    for _ in range(_CODE_BITS + 2):
        middle = (low + high + 1) >> 1
        x = np.ldexp(middle.astype(np.float64), -f).astype(forest.dtype).astype(np.float64)
        goes = x < limit if forest.strict else x <= limit
        low, high = np.where(goes, middle, low), np.where(goes | (low == high), high, middle - 1)
    out = np.zeros(len(forest.threshold))
    out[inner] = np.ldexp(low.astype(np.float64), -f)
    return out


def _shifted(forest: Forest) -> tuple[np.ndarray, np.ndarray]:
    """(leaves counted from the smallest one of their tree, that one per tree)."""
    ends = np.append(forest.root, len(forest.feature))
    value, lowest = forest.value.copy(), np.zeros(len(forest.root))
    for t, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        leaf = start + np.flatnonzero(forest.feature[start:end] < 0)
        lowest[t] = value[leaf].min()
        value[leaf] -= lowest[t]
    return value, lowest


def _leaf_format(value: np.ndarray, bits: int, rounding: str) -> KIF:
    """The finest format of `bits` bits in which no leaf saturates by more than it is rounded."""
    k = int((value < 0).any())
    if bits < 1 + k:
        raise LoweringError(f"leaves have {bits} bits, expected at least {1 + k}")
    most = float(np.abs(value).max(initial=0))
    i = math.ceil(math.log2(most)) if most > 0 else 0
    f = bits - k - i
    top = oracle.round_codes(np.ldexp(value, f), rounding).max(initial=0)
    return KIF(k, i + int(top >= 2.0 ** (i + f)), f - int(top >= 2.0 ** (i + f)))
