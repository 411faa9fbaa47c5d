"""Weights that are loaded into a finished netlist: what a view holds for its weight ports, and the graph with them in.

`trace(..., weights="ports")` fixes widths, masks, activations and tables; the values of the weights are inputs.  Here they
are read off a view (`weights_of`), put into the graph as constants (`loaded`) or beside the data (`beside`).  A register
file in front of the ports is made by `lower.registers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pquant_jax._base import Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Instrumented
from pquant_jax.lower._trace import traced
from pquant_jax.lower.canonical import difference
from pquant_jax.lower.emulate import flatten_batch
from pquant_jax.lower.ir import Graph, Node, label, validate, weight_ports
from pquant_jax.numerics.oracle import quantize_codes


def weights_of(graph: Graph, inst: Instrumented, view: View, model_state: Tree) -> list[np.ndarray]:
    """What `view` holds for each weight port of `graph`, float64 of the port's shape: a weight set.

    `graph` may come from another training of the same model.  Everything else (formats of activations, tables, constants
    of the model) is held to be the same by tracing `view` as well and comparing the two programs.
    Raises: LoweringError for a graph without weight ports, another program, and a value that its port can't hold: off the
      grid, out of range, or not 0 where the weight is pruned.
    """
    if not weight_ports(graph):
        raise LoweringError('the graph has no weight ports: trace it with weights="ports"')
    other, values = traced(inst, view, model_state, limit=float("inf"), weights="ports")
    pairs = list(zip(weight_ports(graph), weight_ports(other), strict=False))
    ours, theirs = ([g.nodes[j].name for j in weight_ports(g)] for g in (graph, other))
    if ours != theirs:
        raise LoweringError(f"the graph has the weight ports {ours}, this model {theirs}; trace this model instead")
    nodes = list(other.nodes)
    for mine, its in pairs:
        nodes[its] = replace(nodes[its], attrs=graph.nodes[mine].attrs)
    if where := difference(graph, other._replace(nodes=tuple(nodes))):
        raise LoweringError(
            f"this view is another program than the graph, beyond its weights: {where}.  Formats of activations, tables and "
            "constants are fixed when the graph is traced; train with those formats frozen, or trace again"
        )
    check_weights(graph, values)
    return values


def check_weights(graph: Graph, weights: Sequence[np.ndarray]) -> None:
    """Raise `LoweringError` for the first value that its weight port can't hold, and for wrong numbers or shapes."""
    ports = weight_ports(graph)
    if len(weights) != len(ports):
        raise LoweringError(f"the graph has {len(ports)} weight ports, got {len(weights)} arrays")
    for index, value in zip(ports, weights, strict=True):
        node = graph.nodes[index]
        if np.shape(value) != node.shape:
            raise LoweringError(f"{label(graph, index)} takes {node.shape}, got {np.shape(value)}")
        held = _held(node, value)
        bad = ~(held == value)  # nan equals nothing
        if bad.any():
            at = tuple(int(j) for j in np.argwhere(bad)[0])
            k, i, f = (int(np.broadcast_to(node.attrs[key], node.shape)[at]) for key in "kif")
            why = "is pruned, so it has no bits" if k + i + f <= 0 else f"holds fixed<k={k}, i={i}, f={f}>"
            raise LoweringError(
                f"{label(graph, index)}: element {at} is {float(np.asarray(value)[at])!r}, its port {why} "
                f"({int(bad.sum())} of {bad.size} elements don't fit); train this weight set with the formats and masks of the "
                "netlist, or trace a netlist that is wide enough for both"
            )


def _held(node: Node, value: np.ndarray) -> np.ndarray:
    """`value` as the port `node` keeps it: TRN, then WRAP; unchanged exactly where it fits."""
    at = node.attrs
    finite = np.where(np.isfinite(value), value, 0.0)
    codes = quantize_codes(finite, at["k"], at["i"], at["f"], rounding="TRN", overflow="WRAP")
    return np.where(np.isfinite(value), np.ldexp(codes, -np.asarray(at["f"], np.int64)), np.nan)


def loaded(graph: Graph, weights: Sequence[np.ndarray]) -> Graph:
    """`graph` with a weight set as constants: the inputs of the data are left.  Same outputs as with the set on its ports.

    Raises: LoweringError for a set that doesn't fit.

    >>> x = Node("input", (), (1,), dict(k=1, i=2, f=0), "x")
    >>> w = Node("input", (), (1,), dict(k=np.array([1]), i=np.array([1]), f=np.array([1]), weight=np.array(True)), "w")
    >>> graph = Graph((x, w, Node("mul", (0, 1), (1,))), (0, 1), (2,))
    >>> from pquant_jax.lower.emulate import emulate
    >>> [emulate(loaded(graph, [np.array([v])]), [np.array([[3.0]])])[0].item() for v in (0.5, -2.0)]
    [1.5, -6.0]
    """
    check_weights(graph, weights)
    nodes, ports = list(graph.nodes), weight_ports(graph)
    for index, value in zip(ports, weights, strict=True):
        node = nodes[index]
        nodes[index] = Node("const", (), node.shape, {"value": np.asarray(value, np.float64)}, node.name)
    inputs = tuple(j for j in graph.inputs if j not in ports)
    return validate(Graph(tuple(nodes), inputs, graph.outputs))


def beside(inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> np.ndarray:
    """Data (N, *shape) and one weight set as the rows of the netlist's ports, float64 (N, total)."""
    n = len(inputs[0])
    return flatten_batch([*inputs, *(np.broadcast_to(w, (n, *np.shape(w))) for w in weights)])
