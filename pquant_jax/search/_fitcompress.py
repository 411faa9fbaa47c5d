"""FITCompress: one search over bit-widths and pruning by the Fisher information (Zandonati et al., arXiv:2302.07612)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import Params, SiteSpec, Tree
from pquant_jax._errors import TransformError
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import Format
from pquant_jax.search._activations import choices, open_widths
from pquant_jax.search._formats import Rules, closest, fitted, on_grid, rules_of
from pquant_jax.search._problem import FLOAT, Problem, counter, losses, problem, ranges
from pquant_jax.search._traces import fisher
from pquant_jax.search._walk import Goal, Node, Steps, Task, Weights, met, sparsity, start, unreachable, walk
from pquant_jax.train import cross_entropy

WIDTHS = (8, 7, 6, 5, 4)
SPARSITIES = tuple(float(s) for s in 1 - np.logspace(0, -2, 40)[1:])


class FITCompressed(NamedTuple):
    """What `fitcompress` found.

    masks: {kernel: 0/1}.  rules: (site, Format) of every site, for `quantize.fixed`.  bits: {site: width, sign included}.
    ratio: bits of the kept weights / 32 bits of all.  ebops: of the compressed model, by `inst.ebops`.
    sparsity: zeros / total of the masks.  path: the nodes from the start to the one found.
    """

    masks: dict[str, jax.Array]
    rules: Rules
    bits: dict[str, int]
    ratio: float
    ebops: float
    sparsity: float
    path: tuple[Node, ...]


def fitcompress(
    inst: Instrumented,
    params: Tree | Params,
    data: Any,
    *,
    ratio: float | None = None,
    ebops: float | None = None,
    loss: Callable = cross_entropy,
    model_state: Tree | None = None,
    where: _tree.Where = ".*",
    widths: Sequence[int] = WIDTHS,
    sparsities: Sequence[float] = SPARSITIES,
    activations: int = 8,
    biases: int = 8,
    limit: float | None = None,
    greedy: bool = True,
    approximate: bool = True,
    strength: float = 1.0,
    samples: int = 4096,
    batch_size: int = 256,
    compat: str | None = None,
) -> FITCompressed:
    """Which weights to drop and how many bits each kernel gets, so that a goal is met with the least loss of information.

    A step takes one kernel to its next width, or prunes to the next sparsity; its length is sqrt(FIT),
    FIT(w -> w') = sum F (w - w')^2 with F = E[g^2].  From the nodes seen, the search goes on at the least
    g + strength * h, where h = max(spent - goal, 0) sqrt(FIT(w' -> 0)), and ends at the first that meets the goal.
    Pruning drops the weights of least F w^2 over all kernels.

    It runs after a pre-training that is unquantized or at a high bit-width; train on with `compression(inst, found)`.

    Args:
      inst: from `pq.instrument`.  params: the pre-trained parameters, `result.state.params`.
      data: training samples with x, y and weight, such as `dataset.train`.
      ratio: goal as bits of the kept weights / 32 bits of all weights searched over (PQuantML's compression_goal).
      ebops: goal as effective bit operations of the whole model.  Exactly one of the two.
      loss: of (prediction, target), one value per sample.  model_state: default the model's.
      where: the kernels that are searched over; the others stay dense, at widths[0].
      widths: bits of a kernel, sign included, falling; () for a search over pruning alone, which leaves 32 bits.
      sparsities: zeros / total over these kernels, rising; () for a search over bits alone.
      activations, biases: widths of all activations, and of biases and BatchNorm's scale and offset; f and i from the data.
      limit: largest |weight|; caps the integer bits, as a pre-training in `Format(i=log2(limit), f=15)` would.
      greedy: forget the siblings of a node once one of them is chosen; False is A* over all.
      approximate: a quantized node keeps the F of the node before it until the search goes on from it.
      samples, batch_size: how many of `data` F is measured on, and how many at a time.
      compat: "pquantml" reproduces that package's search: widths b + 1 for its b, no negative i, F of batches, the first
        node below the goal instead of the nearest, weights below 2^(i + 2 - b) counted as pruned, |spent - goal| in h.
    Raises: SearchError if the goal is out of reach, with the smallest that can be reached: before the search by a bound,
      else at its end.  TransformError for a goal or a schedule that makes no sense, or a rule without a match.

    >>> from types import SimpleNamespace
    >>> import pquant_jax as pq
    >>> model = pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.float32([[0.9, -0.8], [0.05, 0.02]])})
    >>> x, y = np.float32([[1.0, 0.5], [-0.5, 1.0]]), np.int32([0, 1])
    >>> inst = pq.instrument(model, x)
    >>> found = fitcompress(inst, model.params, SimpleNamespace(x=x, y=y, weight=None), ratio=0.07, sparsities=[0.25, 0.5])
    >>> found.masks["w"].tolist(), found.bits["w"], found.ratio
    ([[1.0, 1.0], [0.0, 0.0]], 4, 0.0625)
    """
    widths, sparsities = tuple(widths), tuple(float(s) for s in sparsities)  # an array has no truth value
    p = problem(inst, params, data, loss, model_state, samples, batch_size)
    chosen = _kernels(p, where)
    _check(ratio, ebops, widths, sparsities, compat)
    top, count = widths[0] if widths else FLOAT, counter(p)
    others = {n: spec for n, spec in inst.sites.items() if n not in chosen}
    rest = {n: top if spec.kind == "kernel" else open_widths(spec, (activations,), biases)[0] for n, spec in others.items()}
    goal = _of_weights(chosen, ratio, compat) if ebops is None else _of_products(count, chosen, rest, ebops)
    steps = Steps(widths, sparsities, greedy, approximate, strength)
    task = Task(
        _informed(p, compat), lambda path, w, width: _quantized(inst.sites[path], w, width, limit, compat), goal, steps, compat
    )
    _check_bound(task, chosen)
    end = walk(task, start(task, chosen, limit))
    final = {path: top if width == FLOAT and not compat else width for path, width in end.node.widths.items()}
    formats = {path: task.quantized(path, w, final[path])[0] for path, w in end.latent.items()}
    spans = ranges(p)
    formats |= {n: fitted(inst.sites[n], spans[n], top, limit) for n in rest if inst.sites[n].kind == "kernel"}
    formats |= {n: next(iter(choice.values()))[0] for n, choice in choices(p, (activations,), biases, spans).items()}
    masks, rules = {path: jnp.asarray(m) for path, m in end.masks.items()}, rules_of(formats)
    bits = {name: round(fmt.i + fmt.f + (fmt.k or 0)) for name, fmt in formats.items()}
    kept = _of_weights(chosen, 1.0, compat).spent(end.weights, end.masks, final)
    return FITCompressed(masks, rules, bits, kept, float(count(bits, masks)), sparsity(end.masks), end.path)


def _kernels(p: Problem, where: _tree.Where) -> Weights:
    """The kernels of products that `where` selects."""
    leaves = {path: w for path, w in _tree.flatten(p.params).items() if path in p.inst.roles}
    return {path: np.asarray(w, np.float32) for path, w in _tree.select(leaves, where).items()}


def _check(ratio: Any, ebops: Any, widths: Sequence[int], sparsities: Sequence[float], compat: str | None) -> None:
    if (ratio is None) == (ebops is None):
        raise TransformError(f"fitcompress got ratio={ratio} and ebops={ebops}, expected exactly one goal")
    if compat not in (None, "pquantml") or (compat and ebops is not None):
        raise TransformError(f"compat is {compat!r} with ebops={ebops}, expected None, or 'pquantml' with a ratio")
    if not (ratio if ebops is None else ebops) > 0:
        raise TransformError(f"the goal is ratio={ratio}, ebops={ebops}; expected a positive number")
    if list(widths) != sorted(set(widths), reverse=True) or any(not 1 < w < FLOAT for w in widths):
        raise TransformError(f"widths are {list(widths)}, expected falling numbers of bits from {FLOAT - 1} to 2, sign included")
    if list(sparsities) != sorted(set(sparsities)) or any(not 0 < s < 1 for s in sparsities):
        raise TransformError(f"sparsities are {list(sparsities)}, expected rising fractions between 0 and 1")
    if not widths and not sparsities:
        raise TransformError("both widths and sparsities are empty: there is nothing to search over")


def _informed(p: Problem, compat: str | None) -> Callable[[Weights], Weights]:
    measure = jax.jit(lambda leaves: fisher(partial(losses, p), leaves, p.data, compat=compat))

    def information(weights: Weights) -> Weights:
        found = measure({path: jnp.asarray(w) for path, w in weights.items()})
        return {path: np.asarray(v, np.float64) for path, v in found.items()}

    return information


def _quantized(spec: SiteSpec, w: np.ndarray, width: int, limit: float | None, compat: str | None) -> tuple[Format, np.ndarray]:
    if compat:
        i = max(0, math.ceil(math.log2(np.abs(w).max() + 1e-12)))
        fmt = Format(i=i, f=max(1, width - 1 - i), k=1, granularity="tensor")
        return fmt, on_grid(w, fmt)
    if width == FLOAT:
        return fitted(spec, (float(w.min()), float(w.max())), width, limit), w
    return closest(spec, w, width, limit)[:2]


def _of_weights(chosen: Weights, ratio: float | None, compat: str | None) -> Goal:
    """Bits of the kept weights / 32 bits of all: storage, not operations."""
    total = FLOAT * sum(w.size for w in chosen.values())

    def spent(weights: Weights, masks: Weights, widths: Mapping[str, int]) -> float:
        if compat:
            return sum(_counted_in_pquantml(w, widths[path] - 1) for path, w in weights.items()) / total
        return float(sum(m.sum() * widths[path] for path, m in masks.items()) / total)

    def least(width: int, sparsity: float) -> float:
        count = sum(w.size for w in chosen.values())
        return (count - int(sparsity * count)) * width / total

    return Goal(float(ratio or 0), spent, least, "a ratio", 1.0)


def _counted_in_pquantml(w: np.ndarray, b: int) -> float:
    """Bits of the weights that reach four steps of their format; the others count as pruned."""
    i = max(0, math.ceil(math.log2(np.abs(w).max())))
    return float(b * np.sum(np.abs(w) >= 2.0 ** -max(1, b - i - 2)))


def _of_products(count: Callable[..., jax.Array], chosen: Weights, rest: Mapping[str, int], ebops: float) -> Goal:
    """EBOPs of the whole model relative to those with 32-bit weights and all of them there."""
    ones = {path: np.ones(w.shape, np.float32) for path, w in chosen.items()}
    unit = float(count({**rest, **dict.fromkeys(chosen, FLOAT)}, ones))

    def spent(weights: Weights, masks: Weights, widths: Mapping[str, int]) -> float:
        del weights
        return float(count({**rest, **widths}, masks)) / unit

    def least(width: int, sparsity: float) -> float:
        widths = {**rest, **dict.fromkeys(chosen, width)}
        each = np.concatenate([np.ravel(g) for g in jax.grad(lambda masks: count(widths, masks))(ones).values()])
        dropped = np.sort(each)[::-1][: int(sparsity * each.size)]
        return (float(count(widths, ones)) - float(dropped.sum())) / unit

    return Goal(ebops / unit, spent, least, "EBOPs", unit)


def _check_bound(task: Task, chosen: Weights) -> None:
    """No choice of weights costs less than the dearest of them pruned and the narrowest width; that is known at once."""
    if task.compat:
        return
    widths, sparsities = task.steps.widths, task.steps.sparsities
    least = task.goal.least(widths[-1] if widths else FLOAT, sparsities[-1] if sparsities else 0.0)
    if not met(task.goal, least):
        raise unreachable(task.goal, least, "no choice goes below")
