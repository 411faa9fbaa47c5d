"""What the tests of both RTL backends share: the comparison with the emulator, and a model to write."""

from __future__ import annotations

from typing import Any

import numpy as np

from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate

from .random_graphs import dense, node, port, quantized


def compare(backend: Any, graph: Graph, rng: np.random.Generator, n: int = 300) -> None:
    """Emulator and the backend's interpreter on all codes of the ports, and on reals that are off the grid and outside."""
    comb = backend.to_comb(graph)
    for x in (port_grid(graph, n, rng), [3.3 * v + 0.01 for v in port_grid(graph, n, rng)]):
        np.testing.assert_array_equal(backend.predict(comb, flatten_batch(x)), flatten_batch(emulate(graph, x)))


def model(rng: np.random.Generator) -> Graph:
    """A dense layer with a residual connection and a table."""
    nodes: list[Node] = []
    x = port(nodes, (6,), rng)
    a = quantized(nodes, x, rng, ("RND", "SAT"))
    b = dense(nodes, a, 6, rng, ("RND", "SAT"))
    at = {"k": np.ones(6, int), "i": np.full(6, 2), "f": np.full(6, 3)}
    q = node(nodes, "quantize", (node(nodes, "add", (a, b)),), rounding="TRN", overflow="WRAP", **at)
    codes = rng.integers(-40, 40, (1, 64))
    y = node(nodes, "table", (q,), codes=codes, which=np.zeros(6, int), f_out=np.full(1, 3), **at)
    return validate(Graph(tuple(nodes), (x,), (y, b)))
