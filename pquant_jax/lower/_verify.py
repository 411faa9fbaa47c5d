"""Bit-exactness: every implementation of a graph against the numpy emulator, integer by integer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import Tree, View
from pquant_jax._errors import VerifyError
from pquant_jax.graph import Instrumented
from pquant_jax.lower._trace import with_tables
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid, to_codes, trace_values
from pquant_jax.lower.ir import Graph, label, weight_ports
from pquant_jax.lower.loadable import beside, loaded, weights_of
from pquant_jax.lower.ranges import check_exact, check_float32, intervals
from pquant_jax.numerics import quantize

_CHUNK = 4096
_LOADED_CHUNK = 1024  # vectors that carry a weight set each


def vectors_of(graph: Graph, inst: Instrumented, x_test: Any, vectors: int, seed: int) -> list[np.ndarray]:
    """Inputs to verify on: the test set on its ports, then random codes of the whole port up to `vectors` or at least half.

    The random ones overflow every range that the data stay within.
    """
    test = [np.asarray(v, np.float64) for v in jax.tree.leaves(inst.encode(x_test))]
    random = port_grid(graph, max(vectors - len(test[0]), vectors // 2), np.random.default_rng(seed))
    return [np.concatenate([a, b.reshape(len(b), *a.shape[1:])]) for a, b in zip(test, random, strict=True)]


def verify(
    graph: Graph,
    inst: Instrumented,
    view: View,
    model_state: Tree,
    *,
    x_test: Any,
    vectors: int = 10_000,
    seed: int = 0,
    comb: Any = None,
    backend: Any = None,
    rtls: Mapping[str, Any] | None = None,
    programs: Mapping[str, Path] | None = None,
    work: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare the jitted JAX forward, the netlist and the simulated RTL with the emulator on the same vectors.

    Of a graph with weight ports, netlist and RTL get the weights of `view` through them: call it once per weight set, on
    the same graph, netlist and programs.

    Args:
      x_test: data of the test set; random vectors over the whole input port are added up to `vectors` in all.
      comb: the netlist, or None.  backend: the module that made it, `backends.da4ml` if None.
      rtls: {"rtl_comb": RTLInfo, "rtl_pipelined": RTLInfo} to simulate.
      programs: {name of an RTL: what `sim.build` made of it}; others are built here.
      work: folder for the simulations' builds.  progress: is told the name of each step.
    Returns: {"mismatches": {"emulator", the backend's name, "rtl_comb", "rtl_pipelined"}, "vectors", "outputs"}; None where
      not run.  "emulator" counts the JAX forward against it.
    Raises: VerifyError at the first implementation that differs, with node, element and both integers; LoweringError
      if an accumulator exceeds what float32 (24 bits) or float64 holds exactly.
    """
    if backend is None:
        from pquant_jax.lower.backends import da4ml as backend
    engine = str(backend.__name__).rpartition(".")[2]
    say = progress or (lambda name: None)
    view = with_tables(inst, view, model_state)
    f, weights = output_f(graph), None
    if weight_ports(graph):
        weights = weights_of(graph, inst, view, model_state)
        graph = loaded(graph, weights)
    check_exact(graph)
    check_float32(graph)
    inputs = vectors_of(graph, inst, x_test, vectors, seed)
    say("emulator")
    expected = flatten_batch(emulate(graph, inputs))
    to_codes(expected, f)  # the oracle's own outputs are integers of their format
    counts: dict[str, int | None] = dict.fromkeys(("emulator", engine, "rtl_comb", "rtl_pipelined"))
    say("JAX forward")
    found = forward_outputs(inst, view, model_state, inputs)
    named = partial(_jax_nodes, inst, view, model_state)
    counts["emulator"] = check_outputs("the JAX forward", found, expected, graph, inputs=inputs, nodes=named)
    if comb is not None:
        say(engine)
        found, named = _fed(partial(backend.predict, comb), inputs, weights), partial(_netlist_nodes, backend)
        counts[engine] = check_outputs(engine, found, expected, graph, inputs=inputs, nodes=named)
    for name, rtl in (rtls or {}).items():
        say(name)
        counts[name] = check_outputs(name, _simulated(name, rtl, inputs, weights, programs, work), expected, graph)
    return {"mismatches": counts, "vectors": len(expected), "outputs": expected.shape[1]}


def _fed(run: Callable, inputs: Sequence[np.ndarray], weights: Sequence[np.ndarray] | None) -> np.ndarray:
    """`run` on the flat inputs; rows that carry a weight set each are too large to make all at once."""
    if weights is None:
        return run(flatten_batch(inputs))
    starts = range(0, len(inputs[0]), _LOADED_CHUNK)
    return np.concatenate([run(beside([v[a : a + _LOADED_CHUNK] for v in inputs], weights)) for a in starts])


def _simulated(
    name: str,
    rtl: Any,
    inputs: Sequence[np.ndarray],
    weights: Sequence[np.ndarray] | None,
    programs: Mapping[str, Path] | None,
    work: Any,
) -> np.ndarray:
    """Outputs of the simulated RTL, built once for all its vectors unless it is among `programs`."""
    from pquant_jax.lower import sim

    program = (programs or {}).get(name)
    if program is not None:
        return _fed(partial(sim.run_built, program, rtl), inputs, weights)
    if weights is None:
        return sim.simulate(rtl, flatten_batch(inputs), work=work)
    with tempfile.TemporaryDirectory(prefix="pquant-sim-") as scratch:
        program = sim.build(rtl, Path(work or scratch).absolute())
        found = _fed(partial(sim.run_built, program, rtl), inputs, weights)
        shutil.rmtree(program.parent)  # kept if it failed, to be looked at
        return found


def forward_outputs(inst: Instrumented, view: View, model_state: Tree, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Outputs of the jitted JAX forward, float64 (N, outputs), in the order of the graph's.

    Tables that the view lacks are built.
    """
    view = with_tables(inst, view, model_state)

    @jax.jit
    def forward(x: Any) -> Any:
        return inst.forward(view, model_state, x, train=False)[0]

    structure, parts = jax.tree.structure(inst.sample), []
    for start in range(0, len(inputs[0]), _CHUNK):
        x = jax.tree.unflatten(structure, [jnp.asarray(v[start : start + _CHUNK], jnp.float32) for v in inputs])
        parts.append(flatten_batch([np.asarray(y, np.float64) for y in jax.tree.leaves(forward(x))]))
    return np.concatenate(parts)


def check_outputs(
    name: str,
    values: np.ndarray,
    expected: np.ndarray,
    graph: Graph,
    *,
    inputs: Sequence[np.ndarray] = (),
    nodes: Callable | None = None,
) -> int:
    """0 if the outputs `values` of the implementation `name` are the emulator's, `expected`; float64 (N, outputs) both.

    nodes(graph, inputs, values of the emulator), of an implementation that can be read at its quantizers: (node, what, its
    value, the emulator's) of each.  inputs: what was fed, arrays (N, *shape), for `nodes`.
    Raises: VerifyError with the first vector that differs, node and element, and both as integers of the output's format.

    >>> from pquant_jax.lower.ir import Node
    >>> x = Node("input", (), (2,), dict(k=1, i=2, f=1), "x")
    >>> graph = Graph((x, Node("neg", (0,), (2,))), (0,), (1,))
    >>> check_outputs("mine", np.array([[0.5, 1.0]]), np.array([[0.5, 1.0]]), graph)
    0
    >>> try:
    ...     check_outputs("mine", np.array([[0.5, 1.0]]), np.array([[0.5, 1.5]]), graph)
    ... except VerifyError as error:
    ...     print(str(error).partition("; ")[2])
    first at vector 0, node %1 neg, element 1: output 1 is 2 * 2^-1, the emulator has 3
    """
    if values.shape != expected.shape:
        raise VerifyError(f"{name} gives outputs of shape {values.shape}, the emulator {expected.shape}")
    wrong = np.argwhere(values != expected)
    if not len(wrong):
        return 0
    n, element = (int(v) for v in wrong[0])
    f = int(output_f(graph)[element])
    theirs, ours = (np.ldexp(float(v[n, element]), f) for v in (values, expected))
    place = _first_node(graph, inputs, n, nodes) or _output_place(graph, element)
    raise VerifyError(
        f"{name} differs from the emulator in {len(wrong)} of {expected.size} integers; first at vector {n}, {place}: "
        f"output {element} is {theirs:g} * 2^{-f}, the emulator has {ours:g}"
    )


def output_f(graph: Graph) -> np.ndarray:
    """Fractional bits of every output in the order of the flattened ones, int64 (outputs,)."""
    known = intervals(graph)
    return np.concatenate([np.ravel(known[j].f) for j in graph.outputs]).astype(np.int64)


def _output_place(graph: Graph, element: int) -> str:
    """The output that holds an element of the flattened outputs."""
    ends = np.cumsum([int(np.prod(graph.nodes[j].shape)) for j in graph.outputs])
    output = int(np.searchsorted(ends, element, side="right"))
    start = ends[output] - int(np.prod(graph.nodes[graph.outputs[output]].shape))
    return f"node {label(graph, graph.outputs[output])}, element {element - start}"


def _first_node(graph: Graph, inputs: Sequence[np.ndarray], n: int, nodes: Callable | None) -> str | None:
    """The first quantizer that differs on vector `n`, for an implementation that can be read at its quantizers."""
    if nodes is None:
        return None
    one = [v[n : n + 1] for v in inputs]
    for index, what, theirs, ours in nodes(graph, one, trace_values(graph, one)):
        wrong = np.argwhere(np.ravel(theirs) != np.ravel(ours))
        if len(wrong):
            at = int(wrong[0][0])
            values = f"{what}{np.ravel(theirs)[at]:g}, emulator {np.ravel(ours)[at]:g}"
            return f"node {label(graph, index)}, element {at} ({values})"
    return None


def _jax_nodes(
    inst: Instrumented, view: View, model_state: Tree, graph: Graph, one: Sequence[np.ndarray], ours: Sequence[np.ndarray]
) -> Any:
    """(node, what, JAX's value, the emulator's) of what enters and what leaves every site; one sample is its own range."""
    x = jax.tree.unflatten(jax.tree.structure(inst.sample), [jnp.asarray(v, jnp.float32) for v in one])
    ranges = inst.capture(view, model_state, x, train=False)[2]["range"]
    for index, node in enumerate(graph.nodes):
        if node.op == "quantize" and node.name in ranges:
            entering = ranges[node.name][1]
            yield index, "it reads ", entering, ours[node.inputs[0]]
            yield index, "", quantize(entering, view.sites[node.name]), ours[index]


def _netlist_nodes(backend: Any, graph: Graph, one: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> Any:
    """(node, what, the backend's value, the emulator's) of every quantizer, from netlists that end there."""
    for index, node in enumerate(graph.nodes):
        if node.op == "quantize":
            comb = backend.to_comb(graph._replace(outputs=(index,)))
            yield index, "", backend.predict(comb, flatten_batch(one))[0], ours[index][0]
