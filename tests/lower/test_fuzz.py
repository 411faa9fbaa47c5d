"""Random models through the whole lowering; `benchmarks/fuzz.py` draws and compares them."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.lower import Graph, Node
from pquant_jax.numerics.oracle import quantize


@pytest.fixture(scope="module")
def fuzz(benchmark_module) -> ModuleType:
    return benchmark_module("fuzz")


def test_few_models(fuzz):
    told = []
    counts = fuzz.run(12, 7, vectors=200, progress=lambda n, c: told.append(n))
    assert counts["mismatches"] == {"jax": 0, "da4ml": 0} and counts["failed"] == []
    assert counts["holds"] and told == list(range(12))
    assert counts["vectors"] == 12 * 200 and counts["outputs"] > counts["vectors"]
    assert min(counts["nonzero"], counts["varying"]) >= 0.5 and counts["overflow"] >= 0.2
    assert counts["rarest_pair"] >= 1 and len(counts["pairs"]) == 28


@pytest.mark.slow
def test_two_hundred_models(fuzz):
    counts = fuzz.run(200, 0)
    assert counts["mismatches"] == {"jax": 0, "da4ml": 0}
    assert counts["rarest_pair"] >= 10 and min(counts["nonzero"], counts["varying"]) >= 0.5 and counts["overflow"] >= 0.2
    assert counts["holds"]


@pytest.fixture(scope="module")
def case(fuzz):
    rng = np.random.default_rng([0, 6])
    return fuzz.random_case(rng, fuzz.shuffled(rng))


def test_cases_are_reproducible(fuzz, case):
    rng = np.random.default_rng([0, 6])
    again = fuzz.random_case(rng, fuzz.shuffled(rng))
    assert again.modes == case.modes
    assert [n.op for n in again.graph.nodes] == [n.op for n in case.graph.nodes]
    assert fuzz.compare(again, np.random.default_rng(0), 50) == fuzz.compare(case, np.random.default_rng(0), 50)


def test_formats_have_widths_of_zero_and_below(fuzz):
    rng = np.random.default_rng(0)
    fmt = fuzz.random_format(rng, pq.SiteSpec((2000,), "input"), ("RND", "SAT"))
    bits = fmt.k + fmt.i + fmt.f
    assert bits.min() < 0 and bits.max() == 7
    assert 0.05 < np.mean(bits <= 0) < 0.2 and np.mean(bits == 0) > 0.01
    assert fmt.f.min() < 0 and fmt.i.min() < 0


def test_fault_of_the_forward_is_counted(fuzz, case):
    """One bit less at one activation site of the view that JAX runs."""
    name = next(n for n, spec in case.inst.sites.items() if spec.kind == "input")
    fmt = case.view.sites[name]
    other = case.view._replace(sites={**case.view.sites, name: pq.KIF(fmt.k, fmt.i, fmt.f - 1, fmt.rounding, fmt.overflow)})
    counts = fuzz.compare(case._replace(view=other), np.random.default_rng(0), 200)
    assert counts.jax > 0 and counts.da4ml == 0


def test_fault_of_the_netlist_is_counted(fuzz, case, monkeypatch):
    """da4ml gets every rounding wrong."""
    from pquant_jax.lower.backends import _scalars

    monkeypatch.setattr(_scalars, "round_to", lambda x, f, fx, rounding: x)
    counts = fuzz.compare(case, np.random.default_rng(0), 200)
    assert counts.da4ml > 0 and counts.jax == 0


def test_fault_of_one_model_fails_the_run(fuzz, monkeypatch):
    good = fuzz.Counts(100, 100, 100, 100, 0, 0, 100, 100)
    drawn = iter([good, good._replace(da4ml=1), good])
    monkeypatch.setattr(fuzz, "random_case", lambda rng, deck: fuzz.Case(None, None, None, None, list(fuzz.PAIRS)))
    monkeypatch.setattr(fuzz, "compare", lambda *args: next(drawn))
    counts = fuzz.run(3, 0)
    assert not counts["holds"] and counts["failed"] == [1] and counts["mismatches"] == {"jax": 0, "da4ml": 1}


@pytest.mark.parametrize("change", [{"nonzero": 49}, {"varying": 49}, {"overflows": 19}])
def test_a_run_without_bite_does_not_hold(fuzz, monkeypatch, change):
    """Zeros, constants and formats that nothing overflows would be equal in any implementation."""
    poor = fuzz.Counts(100, 100, 100, 100, 0, 0, 100, 100)._replace(**change)
    monkeypatch.setattr(fuzz, "random_case", lambda rng, deck: fuzz.Case(None, None, None, None, list(fuzz.PAIRS)))
    monkeypatch.setattr(fuzz, "compare", lambda *args: poor)
    assert not fuzz.run(1, 0)["holds"]


def test_every_pair_has_to_come(fuzz, monkeypatch):
    plenty = fuzz.Counts(100, 100, 100, 100, 0, 0, 100, 100)
    monkeypatch.setattr(fuzz, "compare", lambda *args: plenty)
    for modes, holds in ((list(fuzz.PAIRS), True), (list(fuzz.PAIRS[1:]), False)):
        monkeypatch.setattr(fuzz, "random_case", lambda rng, deck, modes=modes: fuzz.Case(None, None, None, None, modes))
        assert fuzz.run(20, 0)["holds"] is holds


@pytest.mark.parametrize(("rounding", "overflow"), [("RND", "SAT"), ("TRN", "WRAP"), ("RND_CONV", "SAT_SYM")])
def test_overflows_are_those_of_the_oracle(fuzz, rounding, overflow):
    """An input overflows where a format with many more integer bits would give another value."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 2, (500, 6))
    k, i, f = np.array([1, 0, 1, 1, 0, 1]), np.array([0, 1, -1, 2, 0, -2]), np.array([2, 1, 3, 0, 0, 1])
    modes = dict(rounding=rounding, overflow=overflow)
    port, node = Node("input", (), (6,), dict(k=1, i=5, f=10)), Node("quantize", (0,), (6,), dict(k=k, i=i, f=f, **modes))
    graph = Graph((port, node), (0,), (1,))
    total, outside = fuzz.overflowing(graph, [x, x])
    wide = quantize(x, 1, 30, f, rounding=rounding, overflow="SAT")
    low, high = -k * np.ldexp(1.0, i), np.ldexp(1.0, i) - np.ldexp(1.0, -f)
    assert total == x.size
    assert outside == int(((k + i + f > 0) & ((wide < low) | (wide > high))).sum()) > 100
