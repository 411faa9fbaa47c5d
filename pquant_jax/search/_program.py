"""One width per site under one limit: an integer program (HAWQ-V3, arXiv:2011.10680, eq. 7)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._errors import SearchError

Table = Mapping[str, Mapping[int, float]]  # {site: {width: number}}


class Cost(NamedTuple):
    """constant + the sum of `own[site][width]` + the sum of `pairs[a, b]` * width_a * width_b; nothing is negative."""

    constant: float
    own: dict[str, dict[int, float]]
    pairs: dict[tuple[str, str], float]


def value(cost: Cost, bits: Mapping[str, int]) -> float:
    """The cost of one choice.

    >>> value(Cost(1.0, {"w": {4: 2.0}}, {("w", "x"): 0.5}), {"w": 4, "x": 6})
    15.0
    """
    own = sum(table[bits[name]] for name, table in cost.own.items())
    return cost.constant + own + sum(c * bits[a] * bits[b] for (a, b), c in cost.pairs.items())


def products(count: Callable, masks: Mapping[str, jax.Array], candidates: Mapping[str, tuple[int, ...]]) -> Cost:
    """EBOPs as a cost: every product is bilinear in the widths of its operands, so that gradients one bit apart differ by its
    coefficients, exactly.

    count: from `counter`.  Whatever shares a site, reads a kernel twice or multiplies two activations is in there.  Sites
    with one candidate have that width; what they cost alone is in the constant.
    """
    names = sorted(n for n, widths in candidates.items() if len(widths) > 1)
    fixed = {n: float(widths[0]) for n, widths in candidates.items() if len(widths) == 1}  # in front of a table 2^width counts

    def of(widths: jax.Array) -> jax.Array:
        return count(fixed | dict(zip(names, widths, strict=True)), masks)

    ones = jnp.ones(len(names), jnp.float32)
    gradient = jax.jit(jax.grad(of))
    total, slope = (np.asarray(f(ones), np.float64) for f in (of, gradient))
    steps = [np.asarray(gradient(ones.at[n].add(1)), np.float64) - slope for n in range(len(names))]
    bend = np.stack(steps) if steps else np.zeros((0, 0))
    linear = slope - bend.sum(1)
    own = {n: {w: linear[a] * w + bend[a, a] / 2 * w * w for w in candidates[n]} for a, n in enumerate(names)}
    own |= {n: {candidates[n][0]: 0.0} for n in fixed}
    pairs = {(names[a], names[b]): float(bend[a, b]) for a, b in itertools.combinations(range(len(names)), 2) if bend[a, b] != 0}
    return Cost(float(total - linear.sum() - bend.sum() / 2), own, pairs)


class _Linear(NamedTuple):
    """The program over the variables (site, width), one of which is 1 per site, and (site, width, site, width).

    place: {variable: column}.  spent: what each costs.  rows x = sides.  whole: the first of them are whole numbers.
    """

    place: dict[tuple, int]
    spent: np.ndarray
    rows: Any
    sides: np.ndarray
    whole: int


def check_limit(candidates: Mapping[str, Collection[int]], cost: Cost, limit: float, what: str) -> None:
    """Raise SearchError if even the cheapest choice exceeds the limit, saying what that costs; needs no perturbations."""
    linear = _linear(candidates, cost)
    cheapest = _minimum(linear, candidates, linear.spent, np.inf)
    least = value(cost, cheapest) if cheapest else np.inf
    if least > limit * (1 + 1e-6):
        raise SearchError(
            f"{what} of {limit:.6g} can't be reached: the cheapest choice needs {least:.6g}; raise the limit, "
            "or allow narrower widths"
        )


def solve(omega: Table, cost: Cost, limit: float, what: str) -> dict[str, int]:
    """The width of every site that makes the sum of omega least while the cost is at most `limit`.

    A product of two widths that are both open is made linear by a variable for each pair of candidates, whose sums over
    either width are the other's choice.
    Raises: SearchError as `check_limit`.

    >>> omega = {"a": {2: 9.0, 8: 0.0}, "b": {2: 1.0, 8: 0.0}}
    >>> solve(omega, Cost(0.0, {n: {2: 2.0, 8: 8.0} for n in omega}, {}), 10.0, "size")
    {'a': 8, 'b': 2}
    """
    check_limit(omega, cost, limit, what)
    linear = _linear(omega, cost)
    lost = np.zeros(len(linear.place))
    for name, table in omega.items():
        for width, perturbation in table.items():
            lost[linear.place[name, width]] = perturbation
    found = _minimum(linear, omega, lost, limit - cost.constant)
    if found is None:
        raise SearchError(f"the integer program for {what} of {limit:.6g} found no answer; raise the limit a little")
    return found


def _linear(omega: Mapping[str, Collection[int]], cost: Cost) -> _Linear:
    from scipy.sparse import csr_array

    chosen = [(n, w) for n, table in omega.items() for w in table]
    open_pairs = [pair for pair in cost.pairs if all(len(omega[n]) > 1 for n in pair)]
    paired = [(a, v, b, w) for a, b in open_pairs for v in omega[a] for w in omega[b]]
    place = {key: n for n, key in enumerate([*chosen, *paired])}
    spent = np.zeros(len(place))
    for n, w in chosen:
        spent[place[n, w]] += cost.own.get(n, {}).get(w, 0.0)
    for (a, b), c in cost.pairs.items():
        for v, w in itertools.product(omega[a], omega[b]):
            variable = (a, v, b, w) if (a, b) in open_pairs else (a, v) if len(omega[b]) == 1 else (b, w)
            spent[place[variable]] += c * v * w
    rows, sides = [{place[n, w]: 1.0 for w in table} for n, table in omega.items()], [1.0] * len(omega)
    for a, b in open_pairs:
        rows += [{place[a, v]: -1.0} | {place[a, v, b, w]: 1.0 for w in omega[b]} for v in omega[a]]
        rows += [{place[b, w]: -1.0} | {place[a, v, b, w]: 1.0 for v in omega[a]} for w in omega[b]]
    sides += [0.0] * (len(rows) - len(sides))
    at = [(r, c, v) for r, row in enumerate(rows) for c, v in row.items()]
    matrix = csr_array(([v for _, _, v in at], ([r for r, _, _ in at], [c for _, c, _ in at])), (len(rows), len(place)))
    return _Linear(place, spent, matrix, np.array(sides), len(chosen))


def _minimum(
    linear: _Linear, omega: Mapping[str, Collection[int]], objective: np.ndarray, budget: float
) -> dict[str, int] | None:
    """The choice of least objective, None if none keeps within the budget."""
    from scipy.optimize import Bounds, milp

    # both are scaled, since the solver's tolerances are absolute
    worst, dearest = (max(float(v.max(initial=0.0)), 1e-30) for v in (objective, linear.spent))
    within = (linear.spent[None] / dearest, -np.inf, np.array([budget / dearest]))
    integrality = (np.arange(len(linear.place)) < linear.whole).astype(int)
    done: Any = milp(
        objective / worst,
        integrality=integrality,
        bounds=Bounds(0, 1),
        constraints=[(linear.rows, linear.sides, linear.sides), within],
    )
    if done.x is None:
        return None
    return {n: max(table, key=lambda w, n=n: done.x[linear.place[n, w]]) for n, table in omega.items()}
