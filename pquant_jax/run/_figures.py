"""The numbers of a summary: predictions and their metric, parameters, sparsity, EBOPs and BOPs."""

from __future__ import annotations

import math
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree, train
from pquant_jax._base import Tree, View
from pquant_jax.data import Split
from pquant_jax.graph import Instrumented, sparsity_summary
from pquant_jax.numerics import kif
from pquant_jax.report import ACTIVATIONS, Profile

CHUNK: Final = 4096  # samples per call: bounds the memory of intermediate values
QUANTILES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)


def outputs(inst: Instrumented, view: View, model_state: Tree, x: Tree) -> Tree:
    """The jitted inference forward on all samples of x, which are put on the input ports; numpy float32."""

    @jax.jit
    def forward(x: Tree) -> Tree:
        return inst.forward(view, model_state, x)[0]

    encoded = inst.encode(x)
    n = len(jax.tree.leaves(encoded)[0])
    parts = [forward(jax.tree.map(lambda v, a=a: jnp.asarray(v[a : a + CHUNK]), encoded)) for a in range(0, n, CHUNK)]
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(v) for v in leaves]), *parts)


def score(metric: train.Metric, prediction: Tree, split: Split) -> float:
    """The metric of predictions for a split, weighted as the split is."""
    y = jax.tree.map(jnp.asarray, split.y)
    weight = None if split.weight is None else jnp.asarray(split.weight)
    return float(train.average(metric.function(jax.tree.map(jnp.asarray, prediction), y), weight))


def model_figures(inst: Instrumented, view: View) -> dict[str, Any]:
    """sparsity, params.{total, nonzero}, kernels, ebops.{reference8, final}, bops and layers of a finished model.

    Parameters are the kernels and biases as the forward sees them.  Without formats at every site, ebops.final, bops and
    layers are None.
    """
    leaves = _tree.flatten(view.model)
    counted = [np.asarray(leaves[n]) for n, spec in inst.sites.items() if spec.kind in ("kernel", "bias") and n in leaves]
    figures: dict[str, Any] = {
        "sparsity": float(train.kernel_sparsity(view)),
        "params": {"total": sum(v.size for v in counted), "nonzero": sum(int(np.count_nonzero(v)) for v in counted)},
        "kernels": {path: k._asdict() for path, k in sparsity_summary(view, roles=inst.roles).kernels.items()},
        "ebops": {"reference8": inst.reference8, "final": None},
        "bops": None,
        "layers": {},
    }
    if set(inst.sites) <= set(view.sites):
        layers = {name: float(v) for name, v in jax.jit(inst.products)(view).items()}
        figures["ebops"]["final"] = sum(layers.values())
        figures |= {"layers": layers, "bops": bops(inst, view)}
    return figures


def bops(inst: Instrumented, view: View) -> float:
    """Bit operations of one sample by mean widths (Baskin et al., arXiv:1804.10969, with the density of pruned kernels).

    Per kernel of n inputs and m outputs, used at p places: p m n (d b_w b_a + b_a + b_w + log2 n) with the density
    d = nonzero / total, b_w the mean bits of its nonzero weights and b_a of its input.
    """
    eight = {n: kif(1, jnp.zeros(s.shape), jnp.full(s.shape, 7.0)) for n, s in inst.sites.items()}
    macs = {name: float(v) / 64 for name, v in jax.jit(inst.products)(View(inst.model.params, eight, {})).items()}
    leaves, total = _tree.flatten(view.model), 0.0
    for path, role in inst.roles.items():
        kernel = np.asarray(leaves[path])
        nonzero = kernel != 0
        widths, inputs = bits_of(view, path, kernel.shape), bits_of(view, role.input_site, inst.sites[role.input_site].shape)
        b_w = float(widths[nonzero].mean()) if nonzero.any() else 0.0
        b_a, n = float(inputs.mean()), math.prod(kernel.shape[a] for a in role.in_axes)
        total += macs.get(path, kernel.size) * (nonzero.mean() * b_w * b_a + b_a + b_w + math.log2(n))
    return total


def bits_of(view: View, site: str, shape: tuple[int, ...]) -> np.ndarray:
    """max(k + i + f, 0) of every element of a site."""
    fmt = view.sites[site]
    width = sum(np.rint(np.asarray(part, np.float64)) for part in (fmt.k, fmt.i, fmt.f))
    return np.broadcast_to(np.maximum(width, 0), shape)


def profiles(inst: Instrumented, view: View, latent: Tree, model_state: Tree, x: Tree) -> list[Profile]:
    """One `Profile` per site that has a format: ranges over all of x, quantiles over at most `CHUNK` samples of it.

    latent: the model's parameters before pruning and quantization.  Nothing wraps here, so that a range shows what the
    format would have to hold.
    """
    encoded, before = inst.encode(x), _tree.flatten(latent)
    ranges = _ranges(inst, view, model_state, encoded)
    single = _single_values(inst, view, model_state, jax.tree.map(lambda v: jnp.asarray(v[:CHUNK]), encoded))
    after, made = _tree.flatten(view.model), []
    for name, spec in inst.sites.items():
        if name not in view.sites:
            continue
        fmt = view.sites[name]
        k, i, f = (np.rint(np.asarray(part)).astype(np.int64) for part in (fmt.k, fmt.i, fmt.f))
        if name in before:  # masks act before the format does
            seen = np.asarray(before[name]) * np.asarray(view.masks.get(name, 1.0))
            low, high, values, sample = seen, seen, np.asarray(after[name]), seen
        else:
            low, high = (np.asarray(v) for v in ranges[name])
            values, sample = (None, single[name]) if spec.kind in ACTIVATIONS else (_quantized(high, k, i, f, fmt), high)
        made.append(Profile(name, spec.kind, k, i, f, low, high, np.quantile(np.abs(sample), QUANTILES), values))
    return made


def _quantized(value: np.ndarray, k: np.ndarray, i: np.ndarray, f: np.ndarray, fmt: Any) -> np.ndarray:
    from pquant_jax.numerics import oracle

    return oracle.quantize(value.astype(np.float64), k, i, f, rounding=fmt.rounding, overflow=fmt.overflow)


def _ranges(inst: Instrumented, view: View, model_state: Tree, encoded: Tree) -> dict[str, tuple[Any, Any]]:
    @jax.jit
    def capture(x: Tree) -> Any:
        return inst.capture(view, model_state, x, train=False, wrap=False)[2]["range"]

    n, found = len(jax.tree.leaves(encoded)[0]), {}
    for start in range(0, n, CHUNK):
        part = capture(jax.tree.map(lambda v, a=start: jnp.asarray(v[a : a + CHUNK]), encoded))
        for name, (low, high) in part.items():
            old = found.get(name, (low, high))
            found[name] = (np.minimum(old[0], low), np.maximum(old[1], high))
    return found


def _single_values(inst: Instrumented, view: View, model_state: Tree, x: Tree) -> dict[str, np.ndarray]:
    """The values at every site, (n, ...): the range of a batch of one sample is that sample's value."""

    def one(sample: Tree) -> dict[str, Any]:
        batch = jax.tree.map(lambda v: v[None], sample)
        stats = inst.capture(view, model_state, batch, train=False, wrap=False)[2]["range"]
        return {name: high for name, (_, high) in stats.items()}

    return {name: np.asarray(v) for name, v in jax.jit(jax.vmap(one))(x).items()}
