"""Precision scans: a metric over a grid of ap_fixed<W, I> for a trained model, all of it in one compilation."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import numpy as np

from pquant_jax._base import KIF, Params, SiteSpec, Tree, View
from pquant_jax._errors import SearchError, TransformError
from pquant_jax.numerics import check_modes
from pquant_jax.quantize import Format
from pquant_jax.search._formats import Rules
from pquant_jax.search._points import Subject, bare, evaluate, figures, group_of, kif_of, outputs_of, sites_of, subject
from pquant_jax.search._response import as_metrics
from pquant_jax.train import Metric
from pquant_jax.train._losses import accuracy

WIDTHS: Final = (4, 6, 8, 10, 12, 14, 16, 18)
INTEGERS: Final = (1, 2, 3, 4, 5, 6, 7, 8)
SCAN: Final = "scan"


@dataclass(frozen=True)
class Grid:
    """Axes of ap_fixed<W, I>: total widths and integer bits, in bits; both count the sign."""

    widths: tuple[int, ...]
    integers: tuple[int, ...]


Group = str | tuple[int, int] | Grid | None


class Scanned(NamedTuple):
    """What `scan` measured.

    widths, integers: the grid's axes, W and I of ap_fixed<W, I> in bits, sign included.
    metric: (widths, integers, then the axes of every group that has its own), of the first metric.
    values: {name: the same} of all metrics.  baseline: {name: value} of the float model, before any quantization.
    name, higher_is_better: of the first metric.
    groups: {"weights" | "intermediates" | "results": "scan", a format (W, I) that was held, a `Grid`, or None for float}.
    rounding, overflow: modes of all formats.  sites: of the model, `inst.sites`.  samples: how many were predicted.
    """

    widths: tuple[int, ...]
    integers: tuple[int, ...]
    metric: np.ndarray
    values: dict[str, np.ndarray]
    baseline: dict[str, float]
    name: str
    higher_is_better: bool
    groups: dict[str, Group]
    rounding: str
    overflow: str
    sites: dict[str, SiteSpec]
    samples: int


class Chosen(NamedTuple):
    """A point of a scan to go on with: `pq.search.compression(inst, chosen)` trains, lowers and verifies it.

    width, integer: of what was scanned.  value, baseline: the metric there and of the float model.
    masks: none.  rules: (site, Format) of every site, for `quantize.fixed`.
    """

    width: int
    integer: int
    value: float
    baseline: float
    masks: dict[str, jax.Array]
    rules: Rules


class Trained(NamedTuple):
    """A model trained at ap_fixed<width, integer>, to be drawn beside a scan.  value: of the scan's first metric."""

    width: int
    integer: int
    value: float


def scan(
    model: Any,
    params: Tree | Params | None,
    data: Any,
    *,
    widths: Iterable[int] = WIDTHS,
    integers: Iterable[int] = INTEGERS,
    metric: Any = accuracy,
    weights: Group = SCAN,
    intermediates: Group = SCAN,
    results: Group = (32, 14),
    rounding: str = "TRN",
    overflow: str = "WRAP",
    model_state: Tree | None = None,
    samples: int | None = None,
    batch: int | None = None,
    chunk: int = 4,
) -> Scanned:
    """Post-training quantization at every ap_fixed<W, I> of a grid: k = 1, i = I - 1, f = W - I at every site of a group.

    k, i and f are arrays to the model, so that all points are one `vmap` of one compiled function.  The groups are weights
    (kernels, biases, BatchNorm's scales and offsets), intermediates (what enters a product or a table, what a table gives)
    and results (the model's outputs).  Sums are exact, as wide as they need be; the input of a table has at most its 12 bits.
    A format that the model itself asks for gives way to the point's.
    Values are float32: a format of more than 24 bits changes nothing but what leaves its range.

    Args:
      model: from `pq.instrument`; or a `Model`, a module or a function of (params, x), which is instrumented here with input
        ports of 24 bits.  params: the trained parameters; None takes the model's.
      data: x, y and weight, such as `dataset.test`, or (x, y).
      widths, integers: W and I of the grid, bits, sign included.  I > W and I <= 0 are formats too.
      metric: a `pq.Metric`, a function of (prediction, target), or several; `pq.search.RESPONSE` for a regression.
      weights, intermediates, results: "scan": the grid; (W, I): held; None: float; `Grid`: axes of its own, behind the grid's.
      rounding, overflow: of all formats; the defaults are ap_fixed's own, AP_TRN and AP_WRAP.
      model_state: default the model's.  samples: how many of the data, evenly spaced; None: all.
      batch: samples predicted at once; None: all.  chunk: points of the grid evaluated side by side.
    Raises: TransformError for an unknown mode, an empty or repeated axis or a format that is none, DataError for data
      without samples, TraceError for a model that can't be instrumented.

    >>> import jax.numpy as jnp, pquant_jax as pq
    >>> model = pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.float32([[0.75], [0.5]])})
    >>> x = np.float32([[1.0, 0.5], [0.25, 1.0]])
    >>> error = pq.Metric("largest error", lambda y, t: jnp.max(jnp.abs(y - t)), higher_is_better=False)
    >>> found = scan(model, None, (x, x @ [[0.75], [0.5]]), widths=(3, 4), integers=(1, 2), metric=error)
    >>> found.metric.tolist(), found.baseline
    ([[1.5, 0.25], [1.5, 0.0]], {'largest error': 0.0})
    """
    groups = groups_of(weights=weights, intermediates=intermediates, results=results)
    grid, metrics = _grid(widths, integers), as_metrics(metric)
    known_modes(rounding, overflow)
    if SCAN not in groups.values():
        raise TransformError(f"weights, intermediates and results are {list(groups.values())}: expected 'scan' for one at least")
    if chunk < 1:
        raise TransformError(f"chunk is {chunk}, expected 1 or more points side by side")
    s = subject(model, params, data, state=model_state, samples=samples, batch=batch)
    sites = sites_of(s.inst)
    own = {name: g for name, g in groups.items() if isinstance(g, Grid)}
    axes = [axis for g in (grid, *own.values()) for axis in (g.widths, g.integers)]
    points = _points(axes, groups, list(own))

    def kifs_of(point: Mapping[str, jax.Array]) -> dict[str, KIF]:
        return kifs_at(sites, {name: (point[name][0], point[name][1]) for name in point}, rounding, overflow)

    found, baseline = evaluate(s, kifs_of, points, metrics, chunk)
    values = {name: v.reshape([len(axis) for axis in axes]) for name, v in found.items()}
    first = metrics[0]
    return Scanned(
        grid.widths, grid.integers, values[first.name], values, baseline, first.name, first.higher_is_better,
        groups, rounding, overflow, dict(s.inst.sites), s.n,
    )  # fmt: skip


def _grid(widths: Iterable[int], integers: Iterable[int]) -> Grid:
    axes = tuple(tuple(int(v) for v in axis) for axis in (widths, integers))
    for name, axis in zip(("widths", "integers"), axes, strict=True):
        if not axis or len(set(axis)) < len(axis):
            raise TransformError(f"{name} are {list(axis)}, expected one number of bits or more, none of them twice")
    if min(axes[0]) < 1:
        raise TransformError(f"widths are {list(axes[0])}, expected 1 or more bits, sign included")
    return Grid(*axes)


def groups_of(**given: Group) -> dict[str, Group]:
    """The groups, checked; the axes of a `Grid` as tuples of int."""
    made: dict[str, Group] = {}
    for name, group in given.items():
        if isinstance(group, Grid):
            made[name] = _grid(group.widths, group.integers)
        elif group is None or group == SCAN:
            made[name] = group
        elif isinstance(group, str) or len(group) != 2 or int(group[0]) < 1:
            raise TransformError(f"{name} is {group!r}, expected 'scan', a format (W, I) with W of 1 or more, a Grid, or None")
        else:
            made[name] = (int(group[0]), int(group[1]))
    return made


def known_modes(rounding: str, overflow: str) -> None:
    try:
        check_modes(rounding, overflow)
    except ValueError as error:
        raise TransformError(str(error)) from None


def _points(axes: Sequence[Sequence[int]], groups: Mapping[str, Group], own: Sequence[str]) -> dict[str, np.ndarray]:
    """{group: (points, 2)} of (W, I), the last axis fastest; groups that stay float are left out."""
    table = np.array(list(itertools.product(*axes)), np.float32)
    columns = {name: table[:, 2 + 2 * n : 4 + 2 * n] for n, name in enumerate(own)}
    made = {}
    for name, group in groups.items():
        if name in columns or group == SCAN:
            made[name] = columns.get(name, table[:, :2])
        elif group is not None:
            made[name] = np.broadcast_to(np.array(group, np.float32), (len(table), 2))
    return made


def kifs_at(
    sites: Mapping[str, SiteSpec], formats: Mapping[str, tuple[Any, Any]], rounding: str, overflow: str
) -> dict[str, KIF]:
    """Formats of all sites whose group has one (W, I)."""
    return {
        name: kif_of(*formats[group_of(spec)], len(spec.shape), rounding, overflow, spec.max_bits)
        for name, spec in sites.items()
        if group_of(spec) in formats
    }


def rules_at(scanned: Scanned, width: int, integer: int) -> Rules:
    """Rules for `quantize.fixed` that give every site its format at this point; groups held float are left out.

    Raises: TransformError if a group had axes of its own: its format has to be named by a scan that holds it.

    >>> import jax.numpy as jnp, pquant_jax as pq
    >>> model = pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((1, 1))})
    >>> found = scan(model, None, (np.ones((2, 1)), np.ones((2, 1))), widths=(6,), integers=(2,), metric=pq.search.resolution)
    >>> [(name, fmt.i, fmt.f) for name, fmt in rules_at(found, 6, 2)]
    [('w', 1.0, 4.0), ('w/input', 1.0, 4.0)]
    """
    formats: dict[str, tuple[int, int]] = {}
    for name, group in scanned.groups.items():
        if isinstance(group, Grid):
            raise TransformError(f"{name} had axes of its own; scan again with {name}=(W, I) or {name}='scan'")
        if group is not None:
            formats[name] = (width, integer) if isinstance(group, str) else (group[0], group[1])
    rules = []
    for name, spec in scanned.sites.items():
        if group_of(spec) not in formats:
            continue
        w, n = formats[group_of(spec)]
        w = min(w, spec.max_bits) if spec.max_bits else w
        rules.append((re.escape(name), Format(float(n - 1), float(w - n), 1, scanned.rounding, scanned.overflow, "tensor")))
    return tuple(rules)


def chosen(scanned: Scanned, drop: float = 0.01) -> Chosen:
    """The narrowest width at which the metric is at most `drop` worse than the float model's, and its best I.

    drop: in units of the metric.  Raises: SearchError if no point is that good, with the best there is.
    """
    if scanned.metric.ndim != 2:
        raise TransformError("a group of the scan had axes of its own; choose its format and scan again with the group held")
    baseline, sign = scanned.baseline[scanned.name], 1 if scanned.higher_is_better else -1
    score = np.where(np.isnan(scanned.metric), -np.inf, sign * scanned.metric)
    good = score >= sign * baseline - drop
    if not good.any():
        w, n = np.unravel_index(np.argmax(score), score.shape)
        raise SearchError(
            f"no format of the scan has a {scanned.name} within {drop:g} of the float model's {baseline:.6g}; the best is "
            f"{scanned.metric[w, n]:.6g} at <{scanned.widths[w]},{scanned.integers[n]}>: scan wider formats, or allow more"
        )
    w = min(np.flatnonzero(good.any(axis=1)), key=lambda row: scanned.widths[row])
    n = int(np.argmax(score[w]))
    width, integer = scanned.widths[w], scanned.integers[n]
    return Chosen(width, integer, float(scanned.metric[w, n]), baseline, {}, rules_at(scanned, width, integer))


def trained(
    model: Any,
    views: Mapping[tuple[int, int], View],
    data: Any,
    *,
    metric: Any = accuracy,
    results: tuple[int, int] | None = (32, 14),
    rounding: str = "TRN",
    overflow: str = "WRAP",
    model_states: Mapping[tuple[int, int], Tree] | None = None,
    samples: int | None = None,
    batch: int | None = None,
) -> tuple[Trained, ...]:
    """The metric of models trained at (W, I), measured as `scan` does, for the same picture: QAT beside PTQ.

    Args:
      views: {(W, I): `result.view`} of `pq.fit` with `pq.search.rules_at(scanned, W, I)` in `quantize.fixed`.
      results, rounding, overflow: as in the scan, for outputs that have no site.  model_states: default the model's.
      The others as in `scan`.
    """
    first: Metric = as_metrics(metric)[0]
    s = subject(model, None, data, samples=samples, batch=batch)
    fmt = None if results is None or not bare(s.inst) else kif_of(*results, 0, rounding, overflow)

    @jax.jit
    def measured(view: View, arrays: tuple) -> jax.Array:
        own = Subject(s.inst, *arrays, n=s.n)
        return figures(own, outputs_of(own, view, fmt), (first,))[first.name]

    states = model_states or {}
    return tuple(
        Trained(*point, float(measured(view, (s.params, states.get(point, s.state), *s[3:6]))))
        for point, view in sorted(views.items())
    )
