"""What pruning left of every kernel: zeros, nonzero digits, dead rows and columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, AxisRole, Params, State, Tree, View
from pquant_jax._errors import TransformError


class KernelSummary(NamedTuple):
    """One kernel, or the sum over several.

    sparsity = zeros / total, density = 1 - sparsity.  bits: nonzero digits of all weights in canonical signed-digit
    form (7 = 8 - 1 has two), which is what multiplications by constants cost; None without a format.
    rows: input channels, columns: output channels, dead where all weights are 0.
    """

    zeros: int
    total: int
    bits: int | None
    dead_rows: int
    rows: int
    dead_columns: int
    columns: int

    @property
    def sparsity(self) -> float:
        """zeros / total, a fraction."""
        return self.zeros / max(self.total, 1)

    @property
    def density(self) -> float:
        """1 - sparsity."""
        return 1 - self.sparsity


class SparsitySummary(NamedTuple):
    """kernels: by path; total: their sum.  `summary_text` makes a table of it."""

    kernels: dict[str, KernelSummary]
    total: KernelSummary


def sparsity_summary(params: View | Tree, state: State = None, *, roles: Mapping[str, AxisRole] | None = None) -> SparsitySummary:
    """Zeros, nonzero digits, dead rows and columns of every kernel (float arrays of rank two and more).

    Args:
      params: what the forward sees, a `View`, or a plain tree of parameters (then `bits` is None).
      state: what `apply` returns beside the view, so that `sparsity_summary(*compression.apply(params, state))` is
        a call; a summary takes nothing from it.
      roles: `inst.roles`; default the last axis is the output, the one before it the input.
    Raises: TransformError for the latent `Params` that are trained: what is pruned in them shows in their view.

    >>> summary = sparsity_summary({"kernel": np.float32([[0, 1, 0], [0, 2, 3]])})
    >>> k = summary.kernels["kernel"]
    >>> k.zeros, k.total, k.sparsity, k.dead_rows, k.dead_columns
    (3, 6, 0.5, 0, 1)
    """
    del state
    if isinstance(params, Params):
        raise TransformError(
            "sparsity_summary got the latent Params that are trained, expected the view the forward sees: "
            "sparsity_summary(*compression.apply(params, state))"
        )
    view = params if isinstance(params, View) else View(params, {}, {})
    leaves = {p: np.asarray(v) for p, v in _tree.flatten(view.model).items() if _tree.is_kernel(p, v)}
    kernels = {path: _kernel(w, view.sites.get(path), (roles or {}).get(path)) for path, w in leaves.items()}
    return SparsitySummary(kernels, _sum(kernels.values()))


def _kernel(w: np.ndarray, fmt: KIF | None, role: AxisRole | None) -> KernelSummary:
    out = (w.ndim - 1,) if role is None else role.out_axes
    into = (w.ndim - 2,) if role is None else tuple(a for a in role.in_axes if a not in role.positions)
    rows, columns = (np.any(w != 0, tuple(a for a in range(w.ndim) if a not in axes)) for axes in (into, out))
    zeros = w.size - int(np.count_nonzero(w))
    return KernelSummary(zeros, w.size, _digits(w, fmt), *_dead(rows), *_dead(columns))


def _dead(alive: np.ndarray) -> tuple[int, int]:
    return alive.size - int(np.count_nonzero(alive)), alive.size


def _digits(w: np.ndarray, fmt: KIF | None) -> int | None:
    """None off the grid: a soft mask behind the quantizer."""
    if fmt is None:
        return None
    codes = np.ldexp(np.abs(w.astype(np.float64)), np.rint(np.asarray(fmt.f)).astype(np.int64))
    if np.any(codes != np.rint(codes)) or np.any(codes >= 2.0**61):
        return None
    n = codes.astype(np.int64)
    return int(np.bitwise_count(n ^ (3 * n)).sum())  # 2n = 3n - n, digit by digit without a carry


def _sum(parts: Iterable[KernelSummary]) -> KernelSummary:
    columns = list(zip(*parts, strict=True)) or [()] * len(KernelSummary._fields)
    return KernelSummary(*(None if None in column else sum(column) for column in columns))  # pyright: ignore[reportArgumentType]


def summary_text(summary: SparsitySummary) -> str:
    """A table for the terminal, one line per kernel and one for the total.

    >>> print(summary_text(sparsity_summary({"w": np.float32([[0, 1], [0, 2]])})))
    kernel  zeros  total  sparsity  density  bits  dead rows  dead columns
    w           2      4    50.0 %   50.0 %     -      0 / 2         1 / 2
    total       2      4    50.0 %   50.0 %     -      0 / 2         1 / 2
    """
    head = ("kernel", "zeros", "total", "sparsity", "density", "bits", "dead rows", "dead columns")
    cells = [head, *(_cells(name, k) for name, k in (*summary.kernels.items(), ("total", summary.total)))]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(v.ljust(n) if c == 0 else v.rjust(n) for c, (v, n) in enumerate(zip(row, width, strict=True))) for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _cells(name: str, k: KernelSummary) -> tuple[str, ...]:
    bits = "-" if k.bits is None else f"{k.bits:,}"
    shares = (f"{k.sparsity:.1%}".replace("%", " %"), f"{k.density:.1%}".replace("%", " %"))
    return name, f"{k.zeros:,}", f"{k.total:,}", *shares, bits, f"{k.dead_rows} / {k.rows}", f"{k.dead_columns} / {k.columns}"
