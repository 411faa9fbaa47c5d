"""The proof that nothing in a `Graph` overflows, for whole ports or for the data that arrives.  numpy only."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from pquant_jax._errors import LoweringError
from pquant_jax.lower.ir import Graph, Node, label
from pquant_jax.lower.ranges import Ranges, arriving, format_bounds, intervals, port_bounds, quantize_acts
from pquant_jax.numerics.oracle import OVERFLOWS


def overflows(graph: Graph, input_ranges: Ranges | None = None) -> dict[int, np.ndarray]:
    """Per `quantize` and `input` node which elements can overflow, bool of the node's shape: a wrap or a clip, SAT_SYM's too.

    An element that is False overflows on no vector (within `input_ranges`, see `intervals`); one that is True may on
    some, since operands that depend on each other are taken for independent.  A format without bits holds nothing, so it
    never counts.

    >>> x = Node("input", (), (2,), dict(k=1, i=3, f=0))
    >>> at = dict(k=np.array([1, 1]), i=np.array([3, 1]), f=np.array([0, 0]), rounding="TRN", overflow="SAT")
    >>> graph = Graph((x, Node("quantize", (0,), (2,), at)), (0,), (1,))
    >>> overflows(graph)[1].tolist(), overflows(graph, [(-2.0, 1.5)])[1].tolist()
    ([False, True], [False, False])
    """
    known, out = intervals(graph, input_ranges), {}
    for index, bounds in arriving(graph, input_ranges).items():
        lowest, highest = port_bounds(graph.nodes[index])[:2]
        out[index] = _alive(graph.nodes[index]) & ((bounds[0] < lowest) | (bounds[1] > highest))
    for index, node in enumerate(graph.nodes):
        if node.op == "quantize":
            out[index] = _alive(node) & quantize_acts(node, known[node.inputs[0]])[1]
        elif node.op == "input":
            out.setdefault(index, np.zeros(node.shape, bool))
    return out


def _alive(node: Node) -> np.ndarray:
    return np.broadcast_to(sum(np.asarray(node.attrs[key]).astype(np.int64) for key in "kif") > 0, node.shape)


def prove_no_overflow(graph: Graph, input_ranges: Ranges | None = None, *, modes: Collection[str] = OVERFLOWS) -> None:
    """Raise `LoweringError` for the first node that can overflow: quantizers of the overflow `modes`, and ports (WRAP).

    `modes=("WRAP", "WRAP_SM")` lets saturation pass.  `input_ranges`: see `intervals`; the proof then holds for such data.
    """
    known = intervals(graph, input_ranges)
    for index, found in sorted(overflows(graph, input_ranges).items()):
        node = graph.nodes[index]
        mode = str(node.attrs.get("overflow", "WRAP"))
        if mode not in modes or not found.any():
            continue
        at = tuple(int(j) for j in np.argwhere(found)[0])
        k, i, f = (int(np.broadcast_to(node.attrs[key], node.shape)[at]) for key in "kif")
        if node.op == "input":
            low, high = (v[at] for v in arriving(graph, input_ranges)[index])
        else:
            low, high = (v[at] for v in known[node.inputs[0]][:2])
        lowest, highest = (v.item() for v in format_bounds(*map(np.asarray, (k, i, f))))
        raise LoweringError(
            f"{label(graph, index)}: element {at} can be in [{low:g}, {high:g}], its format (k={k}, i={i}, f={f}) holds "
            f"[{lowest:g}, {highest:g}], so {mode} would change it ({int(found.sum())} of {found.size} elements); give it "
            f"more integer bits{' and a sign' if low < 0 and not k else ''}, or bound what comes in (input_ranges)"
        )
