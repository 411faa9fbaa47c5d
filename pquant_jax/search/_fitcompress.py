"""FITCompress: one search over bit-widths and pruning by the Fisher information (Zandonati et al., arXiv:2302.07612)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from pquant_jax import _tree
from pquant_jax._base import Tree
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import Format
from pquant_jax.train import cross_entropy

WIDTHS = (8, 7, 6, 5, 4)


class Node(NamedTuple):
    """A step of the path.  widths: {kernel: bits, sign included}.  sparsity: zeros / total of the masks.

    g: distance from the start, sum of sqrt(FIT).  h: estimated distance to the goal.  ratio: of the goal's quantity to the start's.
    """

    widths: dict[str, int]
    sparsity: float
    g: float
    h: float
    ratio: float


class FITCompressed(NamedTuple):
    """What `fitcompress` found.

    masks: {kernel: 0/1}.  rules: (site, Format) of every site, for `quantize.fixed`.  bits: {site: width, sign included}.
    ratio: bits of the kept weights / 32 bits of all.  ebops: of the compressed model, measured with `inst.ebops`.
    sparsity: zeros / total of the masks.  path: the nodes from the start to the one found.
    """

    masks: dict[str, jax.Array]
    rules: tuple[tuple[str, Format], ...]
    bits: dict[str, int]
    ratio: float
    ebops: float
    sparsity: float
    path: tuple[Node, ...]


def fitcompress(
    inst: Instrumented,
    params: Tree,
    data: Any,
    *,
    ratio: float | None = None,
    ebops: float | None = None,
    loss: Callable = cross_entropy,
    model_state: Tree | None = None,
    where: _tree.Where = ".*",
    widths: Sequence[int] = WIDTHS,
    sparsities: Sequence[float] | None = None,
    activations: int | None = None,
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

    Runs after pre-training, which is then unquantized or at a high bit-width; train on with `compression(inst, found)`.

    Args:
      inst: from `pq.instrument`.  params: the pre-trained parameters, `result.state.params`.
      data: training samples with x, y and weight, such as `dataset.train`.
      ratio: goal as bits of the kept weights / 32 bits of all (what PQuantML calls compression_goal).
      ebops: goal as effective bit operations; give exactly one of the two.
      loss: of (prediction, target), one value per sample.
      model_state: default the model's.
      where: the kernels that are searched over; the others stay dense, at widths[0].
      widths: bits of a kernel to step through, sign included, falling; () keeps 32: search over pruning alone.
      sparsities: fractions to prune to, rising; () searches over bits alone; default 1 - logspace(0, -2, 40).
      activations: width of every activation; default that of the widest kernel that reads it.
      biases: width of biases and of BatchNorm's scale and offset.
      limit: largest weight that is representable without saturation; caps the integer bits.
      greedy: forget the siblings of the chosen node; else A* over all.
      approximate: quantized neighbours take the Fisher information of the node they come from.
      strength: weight of the estimated distance to the goal.
      samples, batch_size: how many of `data` the Fisher information is measured on, and how many at a time.
      compat: "pquantml" reproduces that package's search.
    Raises: SearchError if the goal is out of reach, with the smallest that can be reached, before the search starts.
    """
    raise NotImplementedError
