"""Where a model feels its precision: layers narrowed one at a time, and the difference that a format makes at every site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, Params, SiteSpec, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.numerics import quantize
from pquant_jax.search._formats import fitted
from pquant_jax.search._points import (
    FLOAT,
    OUTPUT,
    Subject,
    bare,
    evaluate,
    float_outputs,
    kif_of,
    outputs_of,
    sites_of,
    subject,
    view_at,
)
from pquant_jax.search._response import as_metrics
from pquant_jax.search._scan import groups_of, kifs_at, known_modes
from pquant_jax.train._losses import accuracy


class Sensitivity(NamedTuple):
    """What narrowing one part at a time costs, the most sensitive first.

    names: layers or sites.  metric: with that part alone narrow.  drop: how much worse than `reference`, in its units.
    reference: with all parts wide.  baseline: of the float model.  name, higher_is_better: of the metric.
    low, wide: the formats, (W, I); I is None where every site has what its range needs.
    """

    names: tuple[str, ...]
    metric: np.ndarray
    drop: np.ndarray
    reference: float
    baseline: float
    name: str
    higher_is_better: bool
    low: tuple[int, int | None]
    wide: tuple[int, int] | None


class Difference(NamedTuple):
    """fixed - float at one site, over all samples and elements.

    largest: max |d|.  rms: sqrt(mean d^2).  size: sqrt(mean v^2) of the float values v, to compare with.
    kind: as in `SiteSpec`.  name: the site; "output" for outputs without one.
    """

    name: str
    kind: str
    largest: float
    rms: float
    size: float


def sensitivity(
    model: Any,
    params: Tree | Params | None,
    data: Any,
    *,
    low: int | tuple[int, int] = 6,
    wide: tuple[int, int] | None = None,
    by: str = "layer",
    metric: Any = accuracy,
    rounding: str = "TRN",
    overflow: str = "WRAP",
    model_state: Tree | None = None,
    samples: int | None = None,
    batch: int | None = None,
    chunk: int = 4,
) -> Sensitivity:
    """The metric with one layer (or site) at a low width and all others wide, for every one of them; one compilation.

    Args:
      low: W, with the integer bits that the range of each site needs; or (W, I) for all.
      wide: (W, I) of the others; None leaves them float.
      by: "layer": the sites of a layer are narrowed together; "site": one by one.
      The others as in `scan`.
    Raises: TransformError for an unknown mode or `by`, or a format that is none.
    """
    known_modes(rounding, overflow)
    if by not in ("layer", "site"):
        raise TransformError(f"by is {by!r}, expected 'layer' or 'site'")
    fits = isinstance(low, int)
    groups_of(weights=(low, 1) if fits else low, intermediates=wide)  # only the check
    first = as_metrics(metric)[0]
    s = subject(model, params, data, state=model_state, samples=samples, batch=batch)
    sites = sites_of(s.inst)
    narrow = _fitted(s, sites, low) if isinstance(low, int) else {name: low for name in sites}
    parts = {name: _layer(name, spec) if by == "layer" else name for name, spec in sites.items()}
    names = tuple(dict.fromkeys(parts.values()))
    others = FLOAT if wide is None else wide
    points = {
        site: np.array([narrow[site] if part == parts[site] else others for part in (*names, "")], np.float32) for site in sites
    }

    def kifs_of(point: Mapping[str, jax.Array]) -> dict[str, KIF]:
        return {name: kif_of(point[name][0], point[name][1], len(spec.shape), rounding, overflow) for name, spec in sites.items()}

    found, baseline = evaluate(s, kifs_of, points, (first,), chunk)
    values, reference = found[first.name][:-1], float(found[first.name][-1])
    drop = (reference - values) * (1 if first.higher_is_better else -1)
    order = np.argsort(-drop, kind="stable")
    return Sensitivity(
        tuple(names[n] for n in order), values[order], drop[order], reference, baseline[first.name], first.name,
        first.higher_is_better, (low, None) if isinstance(low, int) else low, wide,
    )  # fmt: skip


def _layer(name: str, spec: SiteSpec) -> str:
    """The layer of a site: its folder; a parameter without one is a layer, to which its input belongs."""
    folder = name.rpartition("/")[0]
    return folder or (name if spec.kind != "output" else OUTPUT)


def _fitted(s: Subject, sites: Mapping[str, SiteSpec], width: int) -> dict[str, tuple[int, int]]:
    """{site: (W, I)} with the integer bits that its range over the samples needs, sign included."""
    leaves = _tree.flatten(s.params)

    @jax.jit
    def spans(arrays: tuple) -> tuple[Any, Any]:
        own = Subject(s.inst, *arrays, n=s.n)

        def of_batch(x: Tree) -> Any:
            return s.inst.capture(View(own.params, {}, {}), own.state, x, train=False, wrap=False)[2]["range"]

        y = _joined(float_outputs(own))
        return jax.lax.map(of_batch, own.x), (jnp.min(y), jnp.max(y))

    seen, ends = jax.device_get(spans(s[1:6]))
    ranges = {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in seen.items()}
    ranges |= {p: (float(np.min(leaves[p])), float(np.max(leaves[p]))) for p in sites if p in leaves}
    ranges = {OUTPUT: (float(ends[0]), float(ends[1]))} | ranges
    signed = {name: SiteSpec(spec.shape, spec.kind) for name, spec in sites.items()}  # ap_fixed has a sign everywhere
    return {name: (width, int(fitted(signed[name], ranges[name], width).i) + 1) for name in sites}


def differences(
    model: Any,
    params: Tree | Params | None,
    data: Any,
    *,
    weights: tuple[int, int] | None,
    intermediates: tuple[int, int] | None,
    results: tuple[int, int] | None = (32, 14),
    rounding: str = "TRN",
    overflow: str = "WRAP",
    model_state: Tree | None = None,
    samples: int | None = 1024,
) -> tuple[Difference, ...]:
    """What one point of a scan changes at every site, in the order of the model: the value there minus the float one.

    Args:
      weights, intermediates, results: (W, I) of each group, None for float.
      samples: evenly spaced ones of the data; None: all.  All sites of all of them are in memory.
      The others as in `scan`.
    """
    known_modes(rounding, overflow)
    groups = groups_of(weights=weights, intermediates=intermediates, results=results)
    formats = {name: (int(g[0]), int(g[1])) for name, g in groups.items() if isinstance(g, tuple)}
    s = subject(model, params, data, state=model_state, samples=samples, batch=None)
    sites = sites_of(s.inst)
    kifs = kifs_at(sites, formats, rounding, overflow)

    @jax.jit
    def measured(arrays: tuple) -> dict[str, tuple[jax.Array, ...]]:
        own = Subject(s.inst, *arrays, n=s.n)
        view, output = view_at(own, kifs)
        exact, fixed = _values(own, View(own.params, {}, {})), _values(own, view)
        pairs = {n: (v, fixed[n] if n not in kifs else quantize(fixed[n], kifs[n])) for n, v in exact.items()}
        pairs |= {p: pair for p, pair in _parameters(own, view).items() if p in sites}
        if bare(own.inst):
            pairs[OUTPUT] = _joined(float_outputs(own)), _joined(outputs_of(own, view, output))
        return {name: _compared(*pair) for name, pair in pairs.items()}

    found = jax.device_get(measured(s[1:6]))
    return tuple(Difference(n, spec.kind, *(float(v) for v in found[n])) for n, spec in sites.items() if n in found)


def _values(s: Subject, view: View) -> dict[str, jax.Array]:
    """{site: what enters it, (samples, ...)}: one sample is its own range."""

    def of_sample(x: Tree) -> dict[str, jax.Array]:
        one = jax.tree.map(lambda v: v[None], x)
        seen = s.inst.capture(view, s.state, one, train=False)[2]["range"]
        return {name: high for name, (_, high) in seen.items()}

    return jax.vmap(of_sample)(jax.tree.map(lambda v: v[0], s.x))


def _parameters(s: Subject, view: View) -> dict[str, tuple[jax.Array, jax.Array]]:
    before, after = _tree.flatten(s.params), _tree.flatten(view.model)
    return {p: (before[p], after[p]) for p in before}


def _joined(y: Tree) -> jax.Array:
    return jnp.concatenate([jnp.ravel(v) for v in jax.tree.leaves(y)])


def _compared(exact: jax.Array, fixed: jax.Array) -> tuple[jax.Array, ...]:
    d = fixed - exact
    return jnp.max(jnp.abs(d)), jnp.sqrt(jnp.mean(jnp.square(d))), jnp.sqrt(jnp.mean(jnp.square(exact)))
