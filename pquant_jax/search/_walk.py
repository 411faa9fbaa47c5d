"""The way from the unquantized model to one that meets a goal, step by step, along the Fisher information (FITCompress, A*)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from pquant_jax._errors import SearchError
from pquant_jax.quantize import Format
from pquant_jax.search._problem import FLOAT

Weights = dict[str, np.ndarray]

_EXPANSIONS = 1000  # nodes; a full A* over five layers has more than anyone waits for


class Node(NamedTuple):
    """A step of the path.  widths: {kernel: bits, sign included}.  sparsity: zeros / total of the masks.

    g: distance from the start, the sum of sqrt(FIT).  h: estimated distance to the goal.
    ratio: what the goal counts, relative to the unquantized dense model.
    """

    widths: dict[str, int]
    sparsity: float
    g: float
    h: float
    ratio: float


class Point(NamedTuple):
    """A node with what is needed to go on from it.

    latent: weights, pruned but not quantized.  weights: quantized too.  level: steps taken, per kernel and in pruning.
    information: E[g^2] here, None if it is still that of the point before.
    """

    latent: Weights
    weights: Weights
    masks: Weights
    level: tuple[int, ...]
    information: Weights | None
    node: Node
    path: tuple[Node, ...]


class Goal(NamedTuple):
    """What is limited, relative to the unquantized dense model.

    spent: (weights, masks, widths) -> the same.  least: (width, sparsity) -> a bound from below.  unit: what 1 stands for.
    """

    target: float
    spent: Callable[[Weights, Weights, Mapping[str, int]], float]
    least: Callable[[int, float], float]
    name: str
    unit: float


class Steps(NamedTuple):
    """The schedules and how they are walked through."""

    widths: tuple[int, ...]
    sparsities: tuple[float, ...]
    greedy: bool
    approximate: bool
    strength: float


class Task(NamedTuple):
    """What stays the same in a search.

    information: (weights) -> E[g^2].  quantized: (kernel, latent, width) -> (format, values).
    """

    information: Callable[[Weights], Weights]
    quantized: Callable[[str, np.ndarray, int], tuple[Format, np.ndarray]]
    goal: Goal
    steps: Steps
    compat: str | None


def met(goal: Goal, spent: float) -> bool:
    """Is the goal met, up to the rounding of float32?"""
    return spent <= goal.target * (1 + 1e-6)


def start(task: Task, chosen: Weights, limit: float | None) -> Point:
    """The unquantized model; weights beyond the limit saturate."""
    latent = {path: w if limit is None else np.clip(w, -limit, limit) for path, w in chosen.items()}
    node = Node(dict.fromkeys(chosen, FLOAT), 0.0, 0.0, math.inf, 1.0)
    masks = {path: np.ones(w.shape, np.float32) for path, w in chosen.items()}
    return Point(latent, latent, masks, (0,) * (len(chosen) + 1), None, node, (node,))


def walk(task: Task, start: Point) -> Point:
    """The search itself: expand the nearest node until one meets the goal."""
    frontier, closed, least = [start], set[tuple[int, ...]](), start.node.ratio
    for _ in range(_EXPANSIONS):
        nearest = min(frontier, key=lambda point: _distance(task, point), default=None)
        if nearest is None:
            break
        if task.compat:
            hit = next((point for point in frontier if point.node.ratio < task.goal.target), None)
        else:
            hit = nearest if met(task.goal, nearest.node.ratio) else None
        if hit is not None:
            return hit
        least = min(least, nearest.node.ratio)
        closed.add(nearest.level)
        siblings = [] if task.steps.greedy else [p for p in frontier if p is not nearest]
        # many orders of the same steps lead to one node; the first to be reached is the nearest
        frontier = [p for p in [*siblings, *_neighbours(task, nearest)] if task.compat or p.level not in closed]
    raise unreachable(task.goal, least, "the search came down to")


def _distance(task: Task, point: Point) -> float:
    return point.node.g + task.steps.strength * point.node.h


def _neighbours(task: Task, point: Point) -> list[Point]:
    """One step further: every kernel at its next width, and all of them at the next sparsity."""
    information = point.information if point.information is not None else task.information(point.weights)
    here, found, paths = point._replace(information=information), [], list(point.latent)
    for n, path in enumerate(paths):
        if point.level[n] < len(task.steps.widths):
            widths = {**point.node.widths, path: task.steps.widths[point.level[n]]}
            weights = {q: task.quantized(q, w, widths[q])[1] for q, w in point.latent.items()}
            fresh = None if task.steps.approximate else task.information(weights)
            there = here._replace(weights=weights, information=fresh, node=point.node._replace(widths=widths))
            found.append(_arrived(task, here, n, there))
    if point.level[-1] < len(task.steps.sparsities):
        masks = _pruned(task, here, task.steps.sparsities[point.level[-1]])
        latent, weights = ({q: w * masks[q] for q, w in tree.items()} for tree in (point.latent, point.weights))
        there = here._replace(latent=latent, weights=weights, masks=masks, information=task.information(weights))
        found.append(_arrived(task, here, len(paths), there))
    return found


def _pruned(task: Task, point: Point, sparsity: float) -> Weights:
    """The masks without the int(sparsity * all) weights of least F w^2; what is pruned stays pruned and counts first.

    Weights that are 0 on their grid are equal in F w^2; among them the unquantized ones decide.
    """
    information, masks = point.information or {}, point.masks
    loss, unquantized = (
        np.concatenate([np.ravel(information[q] * np.square(w, dtype=np.float64)) for q, w in weights.items()])
        for weights in (point.weights, point.latent)
    )
    kept = np.concatenate([np.ravel(m) for m in masks.values()])
    order = np.argsort(loss, kind="stable") if task.compat else np.lexsort((unquantized, loss, kept))
    kept[order[: int(sparsity * kept.size)]] = 0
    ends = np.cumsum([m.size for m in masks.values()])[:-1]
    return {q: part.reshape(m.shape) for (q, m), part in zip(masks.items(), np.split(kept, ends), strict=True)}


def _arrived(task: Task, origin: Point, step: int, there: Point) -> Point:
    """The node that a step leads to.  step: index of what moves.  there: what it moved to, still with the origin's distances."""
    before = origin.information or {}
    moved = {q: origin.weights[q].astype(np.float64) - w for q, w in there.weights.items()}
    g = origin.node.g + math.sqrt(fit(before, moved))
    if task.compat and step == len(origin.latent) and not any(origin.level):
        g = 0.0  # there the start's weights are the network's own, which hold the pruned ones by then
    ratio = task.goal.spent(there.weights, there.masks, there.node.widths)
    over = abs(ratio - task.goal.target) if task.compat else max(ratio - task.goal.target, 0.0)
    h = over * math.sqrt(fit(before if there.information is None else there.information, there.weights))
    node = Node(there.node.widths, sparsity(there.masks), g, h, ratio)
    level = tuple(taken + (n == step) for n, taken in enumerate(origin.level))
    return there._replace(level=level, node=node, path=(*origin.path, node))


def fit(information: Mapping[str, Any], change: Mapping[str, Any]) -> float:
    """FIT = sum F d^2 over all weights, float64.

    >>> fit({"w": np.array([2.0, 1.0])}, {"w": np.array([3.0, -1.0])})
    19.0
    """
    return float(sum(np.sum(information[q] * np.square(v, dtype=np.float64)) for q, v in change.items()))


def sparsity(masks: Weights) -> float:
    """zeros / total over all masks."""
    return 1 - sum(float(m.sum()) for m in masks.values()) / sum(m.size for m in masks.values())


def unreachable(goal: Goal, least: float, what: str) -> SearchError:
    """The error for a goal below `least`."""
    wanted, smallest = (f"{v * goal.unit:.6g}" for v in (goal.target, least))
    return SearchError(
        f"{goal.name} of {wanted} can't be reached: {what} {smallest}; "
        "raise the goal, or give narrower widths or larger sparsities"
    )
