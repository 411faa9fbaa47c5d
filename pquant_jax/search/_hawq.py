"""HAWQ: bit-widths by the trace of the Hessian and an integer program (arXiv:1911.03852, arXiv:2011.10680)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from pquant_jax._base import Tree
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import Format
from pquant_jax.search._traces import Trace
from pquant_jax.train import cross_entropy


class HAWQFound(NamedTuple):
    """What `hawq` found.

    masks: as given, {kernel: 0/1}.  rules: (site, Format) of every site, for `quantize.fixed`.  bits: {site: width}.
    traces: {kernel: Trace of its Hessian}.  omega: {site: {width: perturbation}}; total: their sum at `bits`.
    ebops, bops, size, cycles: of the result; bops ignore masks, size is in bits of weights.
    """

    masks: dict[str, jax.Array]
    rules: tuple[tuple[str, Format], ...]
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
    params: Tree,
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
    masks: Mapping[str, jax.Array] | None = None,
    cycles: Mapping[str, Mapping[int, float]] | None = None,
    probes: int = 32,
    seed: int = 0,
    samples: int = 4096,
    batch_size: int = 1024,
) -> HAWQFound:
    """The bit-width of every kernel and activation that perturbs the loss least under one limit.

    Args:
      inst: from `pq.instrument`.  params: the trained parameters, `result.state.params`.
      data: samples with x, y and weight, such as `dataset.train`.
      ebops, bops, size, latency: the limit, exactly one: effective bit operations (masks count), bit operations of the
        dense model, bits of all kept weights, or cycles from input to output.
      loss: of (prediction, target), one value per sample.  model_state: default the model's.
      widths: candidates for every kernel, sign included.  activations: for every activation; one value fixes it.
      biases: width of biases and of BatchNorm's scale and offset.
      masks: of a pruned model, {kernel: 0/1}.
      cycles: {kernel: {width: cycles}} for `latency`.
      probes, seed: of the Hutchinson estimate.  samples, batch_size: how much of `data` is used, and at a time.
    Raises: SearchError if no choice meets the limit, with the smallest that can be reached.
    """
    raise NotImplementedError
