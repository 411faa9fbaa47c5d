"""Whether every implementation of a quantized forest gives its integers.  numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pquant_jax._errors import VerifyError
from pquant_jax.lower.emulate import emulate, port_grid, port_value, to_codes
from pquant_jax.lower.ir import Graph
from pquant_jax.trees._forest import scores
from pquant_jax.trees._graph import to_graph
from pquant_jax.trees._quantize import QuantizedForest, encode


def prove(
    made: QuantizedForest,
    x_test: np.ndarray,
    *,
    graph: Graph | None = None,
    comb: Any = None,
    backend: Any = None,
    rtls: Mapping[str, Any] | None = None,
    others: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    vectors: int = 10_000,
    seed: int = 0,
    work: Any = None,
) -> dict[str, Any]:
    """Compare the emulator, the netlist and the simulated RTL with the forest's own walk, integer by integer.

    x_test: (N, features), put on the port; random codes of the whole port are added up to `vectors`, at least half as many.
    graph: `to_graph(made)` if not given.  comb: its netlist by the module `backend` (da4ml's if None).  rtls: {name: RTLInfo}
    to simulate; work: folder for that.  others: {name: f}, f(x on the port (N, features)) -> (N, outputs), such as the
    library that trained it.
    Returns: {"mismatches": {"emulator": 0, ...}, "vectors", "outputs"}, a name for each that was compared.
    Raises: VerifyError at the first that differs, with the sample, the output and both integers.
    """
    graph = to_graph(made) if graph is None else graph
    test = encode(made, x_test)
    random = port_grid(graph, max(vectors - len(test), vectors // 2), np.random.default_rng(seed))[0]
    x = port_value(graph.nodes[graph.inputs[0]], np.concatenate([test, random]))
    expected = to_codes(scores(made.forest, x), int(made.leaves.f))
    implementations: dict[str, Callable[[np.ndarray], np.ndarray]] = {"emulator": lambda v: emulate(graph, [v])[0]}
    if comb is not None:
        if backend is None:
            from pquant_jax.lower.backends import da4ml as backend
        implementations[backend.__name__.rpartition(".")[2]] = lambda v: backend.predict(comb, v)
    for name, rtl in (rtls or {}).items():
        from pquant_jax.lower import sim

        implementations[name] = lambda v, rtl=rtl: sim.simulate(rtl, v, work=work)
    counts = {}
    for name, values in {**implementations, **(others or {})}.items():
        counts[name] = _compare(name, np.ldexp(values(x), int(made.leaves.f)), expected)
    return {"mismatches": counts, "vectors": len(x), "outputs": expected.shape[1]}


def _compare(name: str, codes: np.ndarray, expected: np.ndarray) -> int:
    if np.shape(codes) != expected.shape:
        raise VerifyError(f"{name} gives an array of shape {np.shape(codes)}, the forest {expected.shape}")
    wrong = codes != expected
    if wrong.any():
        n, o = (int(v) for v in np.argwhere(wrong)[0])
        raise VerifyError(
            f"{name} differs from the forest in {int(wrong.sum())} of {expected.size} integers; first at vector {n}, "
            f"output {o}: {codes[n, o]:g}, the forest has {expected[n, o]}"
        )
    return 0
