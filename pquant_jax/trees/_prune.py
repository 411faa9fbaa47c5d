"""Smaller forests: what no input code can tell apart goes without loss, then the splits that lose least per look-up table.

numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, SearchError
from pquant_jax.numerics import oracle
from pquant_jax.trees._forest import join, leaves, scores, unnested
from pquant_jax.trees._graph import luts, question_luts
from pquant_jax.trees._quantize import QuantizedForest, codes, encode, port_codes

LOSSES: Final = ("squared", "logistic", "softmax")
Cost = Callable[[QuantizedForest], float]


class _Split(NamedTuple):
    feature: int
    code: int
    left: Any
    right: Any


class Pruned(NamedTuple):
    """One point of `prune_path`: the forest, its cost (look-up tables) and its mean loss on the data that chose the splits."""

    made: QuantizedForest
    cost: float
    loss: float


def simplify(made: QuantizedForest) -> QuantizedForest:
    """`made` without what changes no score of any input code.

    Gone are splits that only one answer reaches (by the codes that the questions above leave, and those of the port),
    splits with equal subtrees on both sides, and trees that are one leaf, which go into the base.

    >>> from pquant_jax import InputSpec
    >>> from pquant_jax.trees import Tree, quantize
    >>> twice = Tree([0, 0, -1, -1, -1], [1.0, 2.0, 0, 0, 0], [1, 3, 0, 0, 0], [2, 4, 0, 0, 0], [0, 0, 1.0, 2.0, 3.0])
    >>> small = simplify(quantize(join([twice], [0], [0.0], 1), InputSpec(1, 3, 0)))
    >>> small.forest.feature.tolist(), small.forest.threshold.tolist()
    ([0, -1, -1], [1.0, 0.0, 0.0])
    """
    forest, limits = made.forest, codes(made)
    lowest, highest = port_codes(made)

    def smaller(j: int, low: dict[int, int], high: dict[int, int]) -> Any:
        feature, code = int(forest.feature[j]), int(limits[j])
        if feature < 0:
            return float(forest.value[j])
        bottom, top = low.get(feature, int(lowest[feature])), high.get(feature, int(highest[feature]))
        if code >= top:
            return smaller(int(forest.left[j]), low, high)
        if code < bottom:
            return smaller(int(forest.right[j]), low, high)
        left = smaller(int(forest.left[j]), low, {**high, feature: code})
        right = smaller(int(forest.right[j]), {**low, feature: code + 1}, high)
        return left if left == right else _Split(feature, code, left, right)

    def read(item: Any) -> Any:
        if isinstance(item, float):
            return item
        return item.feature, float(np.ldexp(float(item.code), -int(made.inputs.f[item.feature]))), item.left, item.right

    base, trees, output = forest.base.copy(), [], []
    for root, o in zip(forest.root, forest.output, strict=True):
        tree = smaller(int(root), {}, {})
        if isinstance(tree, float):
            base[o] += tree
        else:
            trees.append(unnested(tree, read))
            output.append(int(o))
    return made._replace(forest=join(trees, output, base, forest.features))


def prune(
    made: QuantizedForest,
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    budget: float,
    loss: str = "squared",
    cost: Cost = luts,
    step: float = 0.04,
) -> Pruned:
    """The forest of at most `budget` look-up tables: the first point of `prune_path` that fits.

    Raises: SearchError if no forest fits, which can only be a negative budget; else as `prune_path`.
    """
    point = None
    for point in prune_path(made, x, y, loss=loss, cost=cost, step=step):
        if point.cost <= budget:
            return point
    raise SearchError(f"the budget is {budget:g} LUTs, the forest without a split has {point.cost if point else 0:g}; raise it")


def prune_path(
    made: QuantizedForest,
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    loss: str = "squared",
    cost: Cost = luts,
    step: float = 0.04,
) -> Iterator[Pruned]:
    """From `simplify(made)` to a forest without a split: each point costs about `step` of the last one's cost less.

    A split above two leaves becomes one leaf; which ones is decided by the loss it adds on (x, y) per look-up table it frees
    (a question that n splits ask counts 1/n for each).  The loss is taken to second order in the scores, with gradient g
    and curvature h: sum(g d + h d^2 / 2), d the change of the leaf; the new leaf is the mean of both, weighted with h.

    x: (N, features), put on the port here.  y: None measures by the squared change of the scores; else the targets: labels
    0 and 1 for "logistic" (one output), labels for "softmax", values (N,) or (N, outputs) or labels for "squared".
    cost: what limits, of a forest; the default is an estimate (`luts`), `to_comb(to_graph(made)).cost` is da4ml's.
    Raises: DataError for unknown losses and targets that don't fit.
    """
    made, x = simplify(made), encode(made, x)
    target = _target(made, x, y, loss)
    while True:
        s = scores(made.forest, x)
        yield Pruned(made, float(cost(made)), _loss(s, target, loss))
        if not len(made.forest.root):
            return
        made = _fewer(made, x, *_slopes(s, target, loss), step)


def _target(made: QuantizedForest, x: np.ndarray, y: np.ndarray | None, loss: str) -> np.ndarray:
    outputs = len(made.forest.base)
    if loss not in LOSSES:
        raise DataError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    if y is None:
        if loss != "squared":
            raise DataError(f"loss {loss!r} needs the labels y")
        return scores(made.forest, x)
    y = np.asarray(y)
    if len(y) != len(x) or not len(x):
        raise DataError(f"x has {len(x)} samples, y {len(y)}; expected as many, and at least one")
    if (loss == "logistic") != (outputs == 1) and loss != "squared":
        raise DataError(f"the forest has {outputs} outputs; 'logistic' is for one, 'softmax' for one per class")
    if y.ndim == 2 and y.shape[1] == outputs:
        return y.astype(np.float64)
    if y.ndim != 1:
        raise DataError(f"y has shape {y.shape}, expected ({len(x)},) or ({len(x)}, {outputs})")
    if outputs == 1:
        return y.astype(np.float64)[:, None]
    if not (np.isin(y, np.arange(outputs))).all():
        raise DataError(f"labels are {y.min()} to {y.max()}, expected 0 to {outputs - 1}, one per output")
    return np.eye(outputs)[y.astype(int)]


def _probabilities(s: np.ndarray, loss: str) -> np.ndarray:
    if loss == "logistic":
        return 1 / (1 + np.exp(-s))
    e = np.exp(s - s.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _loss(s: np.ndarray, target: np.ndarray, loss: str) -> float:
    if loss == "squared":
        return float(np.mean(np.sum((s - target) ** 2, 1)) / 2)
    if loss == "logistic":
        return float(np.mean(np.logaddexp(0, s) - target * s))
    high = s.max(1, keepdims=True)
    return float(np.mean(np.log(np.exp(s - high).sum(1)) + high[:, 0] - (target * s).sum(1)))


def _slopes(s: np.ndarray, target: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and curvature of the loss in every score, (N, outputs)."""
    if loss == "squared":
        return s - target, np.ones_like(s)
    p = _probabilities(s, loss)
    return p - target, p * (1 - p)


def _fewer(made: QuantizedForest, x: np.ndarray, g: np.ndarray, h: np.ndarray, step: float) -> QuantizedForest:
    """With the cheapest splits above two leaves turned into leaves, about `step` of the estimated cost in all."""
    forest = made.forest
    reached, n = leaves(forest, x), len(forest.feature)
    slope, bend = (np.bincount(reached.ravel(), weights=v[:, forest.output].ravel(), minlength=n)[:n] for v in (g, h))
    inner = np.flatnonzero(forest.feature >= 0)
    inner = inner[(forest.feature[forest.left[inner]] < 0) & (forest.feature[forest.right[inner]] < 0)]
    sides = forest.left[inner], forest.right[inner]
    a, b = (forest.value[v] for v in sides)
    (ga, gb), (ha, hb) = ([v[side] for side in sides] for v in (slope, bend))
    bent = ha + hb
    # their mean; the minimum of the expansion would add a step down the gradient, and dozens of those at once overshoot
    best = np.where(bent > 0, (ha * a + hb * b) / np.where(bent > 0, bent, 1), a)
    best = oracle.quantize(best, made.leaves.k, made.leaves.i, made.leaves.f)
    adds = sum(gs * (best - v) + hs * (best - v) ** 2 / 2 for gs, hs, v in ((ga, ha, a), (gb, hb, b)))
    frees = _freed(made, inner)
    order = np.argsort(adds / frees, kind="stable")
    enough = int(np.searchsorted(np.cumsum(frees[order]), step * luts(made))) + 1
    gone = order[:enough]
    feature, value = forest.feature.copy(), forest.value.copy()
    left, right = forest.left.copy(), forest.right.copy()
    at = inner[gone]
    feature[at], value[at], left[at], right[at] = -1, best[gone], at, at
    return simplify(made._replace(forest=forest._replace(feature=feature, value=value, left=left, right=right)))


def _freed(made: QuantizedForest, nodes: np.ndarray) -> np.ndarray:
    """Look-up tables that each of `nodes` stands for: its share of its question, and about one to choose."""
    forest, limits = made.forest, codes(made)
    inner = np.flatnonzero(forest.feature >= 0)
    asked = forest.feature[inner].astype(np.int64), limits[inner]
    _, back, times = np.unique(np.stack(asked, 1), axis=0, return_inverse=True, return_counts=True)
    share = np.zeros(len(forest.feature))
    share[inner] = question_luts(made, *asked) / times[back.ravel()]
    return share[nodes] + 1.0
