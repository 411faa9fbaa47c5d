"""Random graphs of all ops; `benchmarks/fuzz_graphs.py` draws, compares and shrinks them."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower import sim
from pquant_jax.lower.backends import _scalars

needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


@pytest.fixture(scope="module")
def fuzz(benchmark_module) -> ModuleType:
    return benchmark_module("fuzz_graphs")


@pytest.mark.parametrize("backend", ["da4ml", "alkaid"])
def test_thirty_graphs(fuzz, backend):
    told = []
    counts = fuzz.run(30, 1, backend=backend, report=told.append)
    assert counts["mismatches"] == {backend: 0, "passes": 0, "rtl": 0} and counts["failed"] == counts["refused"] == told == []
    assert counts["holds"] and counts["outputs"] > 10_000 and counts["overflow"] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["da4ml", "alkaid"])
def test_three_hundred_graphs(fuzz, backend):
    told = []
    counts = fuzz.run(300, 2, backend=backend, report=told.append)
    assert set(counts["mismatches"].values()) == {0} and not counts["failed"]
    assert len(counts["refused"]) <= (3 if backend == "alkaid" else 0) and all("24 significant bits" in line for line in told)
    assert min(counts["pairs"].values()) >= 3 and min(counts["ops"].values()) >= 10


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("backend", ["da4ml", "alkaid"])
def test_a_few_in_verilator(fuzz, backend):
    counts = fuzz.run(3, 3, rtl=3, backend=backend)
    assert counts["holds"] and counts["simulated"] == 3


def draw(fuzz, n, seed=0):
    rng = np.random.default_rng([seed, n])
    graph = fuzz.random_graph(rng, fuzz.shuffled(rng))
    return graph, fuzz.vectors(graph, 60, rng)


def test_graphs_are_functions_of_seed_and_number(fuzz):
    assert fuzz.text(draw(fuzz, 5)[0]) == fuzz.text(draw(fuzz, 5)[0]) != fuzz.text(draw(fuzz, 6)[0])


@pytest.mark.parametrize("fault", ["lookup", "round_to", "absolute"])
def test_a_fault_of_the_netlist_is_found_and_shrunk_to_its_op(fuzz, monkeypatch, fault):
    """The operator does nothing, or reads the wrong entries; the graph that is printed holds little else."""
    wrong = {
        "lookup": lambda x, read, low, high, f: x,
        "round_to": lambda x, f, fx, rounding: x,
        "absolute": lambda x: x,
    }[fault]
    monkeypatch.setattr(_scalars, fault, wrong)
    monkeypatch.setitem(_scalars.SCALAR, "abs", _scalars.absolute)
    op = {"lookup": "table", "round_to": "quantize", "absolute": "abs"}[fault]
    graph, inputs = next(found for found in (draw(fuzz, n) for n in itertools.count()) if fuzz.fails(*found))
    small = fuzz.shrunk(graph, inputs)
    left = [n.op for n in small.nodes if n.op not in ("input", "const", "take")]
    assert fuzz.fails(small, inputs) and op in left and len(left) <= 3 and len(small.outputs) == 1
    assert f"= {op}(" in fuzz.text(small)


def test_a_run_with_a_fault_does_not_hold(fuzz, monkeypatch):
    monkeypatch.setattr(_scalars, "lookup", lambda x, read, low, high, f: x)
    told = []
    counts = fuzz.run(12, 0, report=told.append)
    assert not counts["holds"] and counts["failed"] and len(told) == len(counts["failed"])
    assert "of seed 0 fails" in told[0] and "= table(" in told[0]


@pytest.mark.parametrize("error", [LoweringError("no"), RuntimeError("broken")])
def test_refusals_and_crashes_count(fuzz, monkeypatch, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(fuzz, "compare", broken)
    told = []
    counts = fuzz.run(1, 0, report=told.append)
    assert not counts["holds"] and told
    assert (counts["refused"], counts["failed"]) == (([0], []) if isinstance(error, LoweringError) else ([], [0]))
