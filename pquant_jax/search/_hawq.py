"""HAWQ: bit-widths by the trace of the Hessian and an integer program (arXiv:1911.03852, arXiv:2011.10680)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import AxisRole, Params, Tree
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import Format
from pquant_jax.search._activations import choices, open_widths
from pquant_jax.search._formats import Rules, closest, rules_of
from pquant_jax.search._problem import Problem, counter, losses, problem, ranges
from pquant_jax.search._program import Cost, Table, check_limit, products, solve, value
from pquant_jax.search._traces import Batches, Trace, hutchinson
from pquant_jax.train import cross_entropy

_ADDERS = 5  # adder delays between two registers, as in hardware.latency_cutoff


class HAWQFound(NamedTuple):
    """What `hawq` found.

    masks: as given, {kernel: 0/1}.  rules: (site, Format) of every site, for `quantize.fixed`.  bits: {site: width}.
    traces: {kernel: Trace of its Hessian}.  omega: {site: {width: perturbation}}; total: their sum at `bits`.
    ebops: by `inst.ebops`.  bops: the same without masks.  size: bits of all kept weights.  cycles: from
    input to output, by the table or the model of `latency`.
    """

    masks: dict[str, jax.Array]
    rules: Rules
    bits: dict[str, int]
    traces: dict[str, Trace]
    omega: dict[str, dict[int, float]]
    total: float
    ebops: float
    bops: float
    size: float
    cycles: float


def hawq(
    inst: Instrumented,
    params: Tree | Params,
    data: Any,
    *,
    ebops: float | None = None,
    bops: float | None = None,
    size: float | None = None,
    latency: float | None = None,
    loss: Callable = cross_entropy,
    model_state: Tree | None = None,
    widths: Sequence[int] = (2, 3, 4, 5, 6, 7, 8),
    activations: Sequence[int] = (8,),
    biases: int = 8,
    masks: Mapping[str, Any] | None = None,
    cycles: Table | None = None,
    probes: int = 32,
    seed: int = 0,
    samples: int = 4096,
    batch_size: int = 1024,
) -> HAWQFound:
    """The bit-width of every kernel and activation that perturbs the loss least under one limit.

    Minimizes the sum of Omega(b): of a kernel, (trace of its Hessian / n) * |Q_b(w) - w|^2, a negative trace as 0
    (HAWQ-V2); of an activation, E[d^T H d], d the change of the output and H the Hessian of the loss there.  i is the
    one of the width that loses least.  An integer program finds the minimum; what several products read has one width.

    Train on with `compression(inst, found)`, which keeps within the limit.

    Args:
      inst: from `pq.instrument`.  params: the trained parameters, `result.state.params`.
      data: samples with x, y and weight, such as `dataset.train`.
      ebops, bops, size, latency: the limit, exactly one: effective bit operations (masks count), those of the dense
        model, bits of all kept weights, or cycles of all kernels one after the other.
      loss: of (prediction, target), one value per sample.  model_state: default the model's.
      widths: candidates of every kernel, sign included.  activations: of every activation; one value fixes it.
      biases: width of biases and of BatchNorm's scale and offset.
      masks: of a pruned model, {kernel: 0/1}, such as `found.masks` of `fitcompress`.
      cycles: {kernel: {width: cycles}} for `latency`.  Default a tree of adders, five delays to a cycle:
        ceil(log2(n ceil(b / 2)) / 5) for n kept weights into an output, ceil(b / 2) digits at most in each.
      probes, seed: of the Hutchinson estimate.  samples, batch_size: how much of `data` is used, and at a time.
    Raises: SearchError if no choice meets the limit, with the smallest that can be reached.  TransformError for not
      exactly one limit, candidates below 2 bits, or an unknown kernel.

    >>> from types import SimpleNamespace
    >>> import pquant_jax as pq
    >>> weights = {"a": jnp.float32([[0.9, -0.7], [0.3, 0.6]]), "b": jnp.float32([[0.02, 0.5], [0.4, -0.3]])}
    >>> model = pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], weights)
    >>> x, y = np.float32([[1.0, 0.5], [-0.5, 1.0]]), np.int32([0, 1])
    >>> found = hawq(pq.instrument(model, x), weights, SimpleNamespace(x=x, y=y, weight=None), size=44, widths=[3, 8])
    >>> sorted(found.bits[name] for name in "ab"), found.size
    ([3, 8], 44.0)
    """
    p = problem(inst, params, data, loss, model_state, samples, batch_size)
    masks = {path: jnp.asarray(m, jnp.float32) for path, m in (masks or {}).items()}
    what, limit = _one_limit({"EBOPs": ebops, "BOPs": bops, "size": size, "latency": latency})
    widths, activations = tuple(widths), tuple(activations)
    _check(p, widths, activations, masks, cycles)
    candidates = {n: widths if s.kind == "kernel" else open_widths(s, activations, biases) for n, s in inst.sites.items()}
    count = counter(p)
    cost = partial(_cost, p, count, candidates, masks, cycles)
    limited = cost(what)
    check_limit(candidates, limited, limit, what)
    found, traces = _candidates(p, widths, activations, biases, masks, probes, seed)
    omega = {name: {w: lost for w, (_, lost) in choice.items()} for name, choice in found.items()}
    bits = solve(omega, limited, limit, what)
    rules = rules_of({name: found[name][width][0] for name, width in bits.items()})
    lost = sum(omega[name][width] for name, width in bits.items())
    operations = [float(count(bits, kept)) for kept in (masks, {})]
    return HAWQFound(masks, rules, bits, traces, omega, lost, *operations, *(value(cost(n), bits) for n in ("size", "latency")))


def _one_limit(limits: Mapping[str, float | None]) -> tuple[str, float]:
    given = [(name, limit) for name, limit in limits.items() if limit is not None]
    if len(given) != 1 or not given[0][1] > 0:
        raise TransformError(f"hawq got the limits {dict(given)}; expected one of ebops, bops, size and latency, and above 0")
    return given[0]


def _check(p: Problem, widths: Sequence[int], activations: Sequence[int], masks: Any, cycles: Table | None) -> None:
    kernels = _kernels(p)
    for name, values in (("widths", widths), ("activations", activations)):
        if not values or len(set(values)) < len(values) or any(not 1 < w < 32 for w in values):
            raise TransformError(f"{name} are {list(values)}, expected different numbers of bits from 2 to 31")
    for what, given in (("mask", masks), ("cycles", cycles or {})):
        unknown = [path for path in given if path not in kernels]
        if unknown:
            raise TransformError(f"{what} of {unknown[0]!r}, which is no kernel; {did_you_mean(unknown[0], kernels)}")
    for path in kernels:
        missing = [w for w in widths if cycles is not None and w not in cycles.get(path, {})]
        if missing:
            raise TransformError(f"cycles has no entry for {path!r} at {missing[0]} bits; give one for every kernel and width")


def _kernels(p: Problem) -> dict[str, jax.Array]:
    leaves = _tree.flatten(p.params)
    return {name: leaves[name] for name, spec in p.inst.sites.items() if spec.kind == "kernel"}


def _candidates(
    p: Problem, widths: tuple[int, ...], activations: tuple[int, ...], biases: int, masks: Any, probes: int, seed: int
) -> tuple[dict[str, dict[int, tuple[Format, float]]], dict[str, Trace]]:
    """({site: {width: (format, Omega)}} of all sites, the traces)."""
    kernels = {path: w * masks.get(path, 1) for path, w in _kernels(p).items()}

    def loss(leaves: Mapping[str, jax.Array], batch: Batches) -> jax.Array:
        return jnp.mean(batch.weight * losses(p, leaves, batch.x, batch.y))

    traces = hutchinson(loss, kernels, p.data, masks=masks, probes=probes, seed=seed)
    found: dict[str, dict[int, tuple[Format, float]]] = {}
    for path, w in kernels.items():
        nearest = {width: closest(p.inst.sites[path], np.asarray(w), width) for width in widths}
        found[path] = {b: (fmt, max(traces[path].mean, 0.0) * error) for b, (fmt, _, error) in nearest.items()}
    pruned = p._replace(params=_tree.replace(p.params, kernels))
    return found | choices(pruned, activations, biases, ranges(pruned)), traces


def _cost(
    p: Problem, count: Callable[..., jax.Array], candidates: Mapping[str, tuple[int, ...]], masks: Mapping[str, jax.Array],
    cycles: Table | None, what: str,
) -> Cost:  # fmt: skip
    """What a limit of this name counts."""
    if what in ("EBOPs", "BOPs"):
        return products(count, masks if what == "EBOPs" else {}, candidates)

    def price(path: str, w: jax.Array, width: int) -> float:
        if what == "size":
            return width * (float(jnp.sum(masks[path])) if path in masks else w.size)
        if cycles is not None:
            return float(cycles[path][width])
        digits = (width + 1) // 2  # that are not 0 in the canonical form of a weight, at most
        terms = _fan_in(w, p.inst.roles.get(path), masks.get(path)) * digits
        return float(math.ceil(math.log2(max(terms, 1)) / _ADDERS))

    return Cost(0.0, {path: {b: price(path, w, b) for b in candidates[path]} for path, w in _kernels(p).items()}, {})


def _fan_in(w: jax.Array, role: AxisRole | None, mask: jax.Array | None) -> int:
    """Weights into one output, the most that are kept."""
    ones = np.ones(w.shape) if mask is None else np.asarray(mask)
    return int(ones.sum(role.in_axes if role is not None else ()).max())
