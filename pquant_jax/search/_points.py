"""Many fixed-point formats of one model in one compilation: k, i and f are arrays, so a format is only another input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, InputSpec, Params, SiteSpec, Tree, View
from pquant_jax._errors import DataError, TraceError
from pquant_jax.graph import Instrumented, Model, as_model, from_function, instrument
from pquant_jax.numerics import quantize
from pquant_jax.train import Metric
from pquant_jax.train._losses import average

GROUPS: Final = ("weights", "intermediates", "results")
_KINDS: Final = {"kernel": 0, "bias": 0, "scale": 0, "offset": 0, "output": 2}
FLOAT: Final = (121, 31)  # W, I: float32 rounds nothing there between 2^-67 and 2^30
OUTPUT: Final = "output"  # what the outputs are called where the model has no site for them


class Subject(NamedTuple):
    """inst, params, state: the model.  x: (batches, batch, ...), the last one filled up.  y, weight: of all n samples."""

    inst: Instrumented
    params: Tree
    state: Tree
    x: Tree
    y: Tree
    weight: jax.Array | None
    n: int


def group_of(spec: SiteSpec) -> str:
    """Which of the three groups a site belongs to."""
    return GROUPS[_KINDS.get(spec.kind, 1)]


def as_samples(data: Any) -> Any:
    """A split (x, y, weight) from a split or a pair (x, y)."""
    if isinstance(data, tuple) and not hasattr(data, "x"):
        if len(data) != 2:
            raise DataError(f"data is a tuple of {len(data)}, expected (x, y), or a split with x, y and weight")
        data = SimpleNamespace(x=data[0], y=data[1], weight=None)
    if not hasattr(data, "x") or not hasattr(data, "y"):
        raise DataError(f"data is a {type(data).__name__}, expected (x, y), or a split such as dataset.test")
    return data


def subject(
    model: Any,
    params: Tree | Params | None,
    data: Any,
    *,
    state: Tree | None = None,
    samples: int | None = None,
    batch: int | None,
) -> Subject:
    """What is scanned; a model that is not instrumented is, with ports of 24 bits that hold the data.

    samples: evenly spaced ones of the data; None: all.  batch: how many of them at once; None: all.
    """
    data = as_samples(data)
    total = len(jax.tree.leaves(data.x)[0])
    n = min(total, total if samples is None else samples)
    size = n if batch is None else min(batch, n)
    if min(total, n, size) < 1:
        raise DataError(f"{total} samples, of which {samples} in batches of {batch} are to be used; expected 1 or more of each")
    chosen = np.arange(n) * total // n

    def stacked(v: Any) -> jax.Array:
        taken = np.asarray(v, np.float32)[chosen[np.arange(math.ceil(n / size) * size) % n]]
        return jnp.asarray(taken.reshape(-1, size, *taken.shape[1:]))

    inst = instrumented(model, params, data.x)
    own = inst.model.params if params is None else params.model if isinstance(params, Params) else params
    weight = None if getattr(data, "weight", None) is None else jnp.asarray(np.asarray(data.weight)[chosen], jnp.float32)
    y = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)[chosen]), data.y)
    return Subject(inst, own, inst.model.state if state is None else state, jax.tree.map(stacked, data.x), y, weight, n)


def instrumented(model: Any, params: Tree | Params | None, x: Any) -> Instrumented:
    """`model` as it is if it is instrumented; else a Model, a module, or a function of (params, x) is instrumented here."""
    if isinstance(model, Instrumented):
        return model
    two = jax.tree.map(lambda v: np.asarray(v[:2], np.float32), x)
    try:
        made = as_model(model, two)
    except TraceError:
        if isinstance(model, Model) or not callable(model) or params is None:
            raise
        made = from_function(model, params.model if isinstance(params, Params) else params)
    return instrument(made, two, inputs=jax.tree.map(_port, x))


def _port(v: Any) -> InputSpec:
    """24 bits, as float32 holds them, of which as many are integer bits as the data need."""
    largest = float(np.max(np.abs(np.asarray(v, np.float32)), initial=0.0))
    i = max(math.floor(math.log2(largest)) + 1, 0) if largest > 0 else 0
    return InputSpec(k=1, i=i, f=23 - i)


def outputs_of(s: Subject, view: View, output: KIF | None = None) -> Tree:
    """The inference forward of all samples, on the format `output` if there is one."""
    return _over_batches(s, lambda x: _on(s.inst.forward(view, s.state, x, train=False)[0], output))


def float_outputs(s: Subject) -> Tree:
    """What the model says before anything of it is quantized, its input port included."""
    return _over_batches(s, lambda x: s.inst.model.forward(s.params, s.state, x, train=False, rng=None)[0])


def _over_batches(s: Subject, forward: Callable[[Tree], Tree]) -> Tree:
    batches = len(jax.tree.leaves(s.x)[0])
    if batches == 1:
        return forward(jax.tree.map(lambda v: v[0], s.x))
    y = jax.lax.map(forward, s.x)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[: s.n], y)


def _on(y: Tree, fmt: KIF | None) -> Tree:
    return y if fmt is None else jax.tree.map(lambda v: quantize(v, fmt), y)


def figures(s: Subject, y: Tree, metrics: tuple[Metric, ...]) -> dict[str, jax.Array]:
    """{metric: its value}, means over the samples where it has one value each."""
    return {m.name: average(jnp.asarray(m.function(y, s.y)), s.weight) for m in metrics}


def kif_of(width: Any, integer: Any, rank: int, rounding: str, overflow: str, limit: int = 0) -> KIF:
    """ap_fixed<width, integer> of a site of this rank: k = 1, i = integer - 1, f = width - integer.

    limit: of the width, for the input of a table; the integer bits stay.
    """
    width, integer = jnp.asarray(width, jnp.float32), jnp.asarray(integer, jnp.float32)
    width = jnp.minimum(width, limit) if limit else width
    one = jnp.ones((1,) * rank, jnp.float32)
    return KIF(one, one * (integer - 1), one * (width - integer), rounding, overflow)


def view_at(s: Subject, kifs: Mapping[str, KIF]) -> tuple[View, KIF | None]:
    """The view with these formats, weights out of range wrapped too, and the format of outputs that have no site."""
    leaves = _tree.flatten(s.params)
    rounded = {p: quantize(leaves[p], kifs[p]) for p, spec in s.inst.sites.items() if p in kifs and p in leaves}
    sites = {name: fmt for name, fmt in kifs.items() if name in s.inst.sites}
    return View(_tree.replace(s.params, rounded), sites, {}), kifs.get(OUTPUT) if bare(s.inst) else None


def bare(inst: Instrumented) -> bool:
    """Has the model no site for its outputs?"""
    return all(spec.kind != "output" for spec in inst.sites.values())


def sites_of(inst: Instrumented) -> dict[str, SiteSpec]:
    """All places that get a format: the sites, and the outputs if the model has no site for them."""
    return {**inst.sites, **({OUTPUT: SiteSpec((), "output")} if bare(inst) else {})}


def evaluate(
    s: Subject, kifs_of: Callable[[Tree], Mapping[str, KIF]], points: Tree, metrics: tuple[Metric, ...], chunk: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """({metric: (points,)}, {metric: of the float model}); ONE trace and one compilation whatever the number of points.

    kifs_of: (point) -> formats of the sites of `sites_of`; what is left out stays unquantized.
    points: a tree of arrays (points, ...).  chunk: how many are evaluated side by side; the rest wait, so that memory is
    that of `chunk` forwards.
    """
    count = len(jax.tree.leaves(points)[0])
    size = min(chunk, count)
    filled = np.arange(math.ceil(count / size) * size) % count  # lax.map's own batch_size would trace a remainder again
    stacked = jax.tree.map(lambda v: jnp.asarray(v)[filled].reshape(-1, size, *jnp.shape(v)[1:]), points)

    def at(s: Subject, point: Tree) -> dict[str, jax.Array]:
        view, output = view_at(s, kifs_of(point))
        return figures(s, outputs_of(s, view, output), metrics)

    @jax.jit
    def run(arrays: tuple, stacked: Tree) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        own = Subject(s.inst, *arrays, n=s.n)  # arguments: as constants of the program XLA would fold them for minutes
        return jax.lax.map(jax.vmap(lambda point: at(own, point)), stacked), figures(own, float_outputs(own), metrics)

    found, baseline = jax.device_get(run(s[1:6], stacked))
    return {name: np.ravel(v)[:count] for name, v in found.items()}, {name: float(v) for name, v in baseline.items()}
