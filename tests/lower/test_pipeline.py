"""From a clock or a latency to the latency cutoff, for both backends; what is promised is what is written."""

from __future__ import annotations

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.lower.pipeline import cut, pipeline, sweep

from .random_graphs import dense, port, quantized

BACKENDS = {"da4ml": da4ml, "alkaid": alkaid}


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Three dense layers."""
    rng, nodes = np.random.default_rng(0), list[Node]()
    x = y = port(nodes, (6,), rng)
    for _ in range(3):
        y = dense(nodes, quantized(nodes, y, rng, ("RND", "SAT")), 6, rng, ("RND", "SAT"))
    return validate(Graph(tuple(nodes), (x,), (y,)))


@pytest.fixture(scope="module", params=BACKENDS)
def made(request, graph):
    backend = BACKENDS[request.param]
    return backend, backend.to_comb(graph)


def test_a_clock_gives_a_cutoff_and_the_rtl_is_as_promised(made, tmp_path):
    backend, comb = made
    for clock, unit in ((2.0, 1.0), (5.0, 0.5)):
        found = pipeline(comb, backend, clock_ns=clock, unit_ns=unit)
        assert found.cutoff == clock / unit and found.latency_ns == found.latency_cycles * clock
        written = backend.write_rtl(comb, tmp_path / f"{clock}", name="net", latency_cutoff=found.cutoff)
        assert (written.stages, written.latency_cycles, written.ii) == (found.stages, found.latency_cycles, found.ii)
        assert (written.reg_bits, written.cost) == (found.reg_bits, pytest.approx(found.cost))


def test_a_latency_in_cycles_gets_the_fastest_clock(made):
    backend, comb = made
    for cycles in (2, 3, 5, 7):
        found = pipeline(comb, backend, latency_cycles=cycles)
        assert found.latency_cycles <= cycles and found.clock_ns == found.cutoff
        assert cut(comb, 0.9 * found.cutoff, backend).latency_cycles > cycles or found.cutoff < 1.5


def test_a_latency_in_nanoseconds_gets_the_fewest_registers(made):
    backend, comb = made
    rows = sweep_of(comb, backend, np.linspace(0.5, 1.0, 8) * backend.longest(comb))
    limit = 1.6 * backend.longest(comb)
    found = pipeline(comb, backend, latency_ns=limit)
    assert found.latency_ns <= limit
    assert found.reg_bits <= min((row.reg_bits for row in rows if row.latency_ns <= limit), default=np.inf)


def sweep_of(comb, backend, cutoffs):
    return [cut(comb, float(c), backend) for c in cutoffs]


def test_a_sweep_trades_registers_for_latency(graph):
    rows = sweep(graph, [1, 2, 4, 8, 100], da4ml, unit_ns=0.7)
    assert [row.cutoff for row in rows] == [1, 2, 4, 8, 100]
    assert [row.stages for row in rows] == sorted((row.stages for row in rows), reverse=True) and rows[-1].stages == 1
    assert [row.reg_bits for row in rows] == sorted((row.reg_bits for row in rows), reverse=True)
    assert all(row.clock_ns == 0.7 * row.cutoff and row.ii == 1 for row in rows)
    fixed = sweep(graph, [1, 4], da4ml, clock_ns=4)
    assert [row.clock_ns for row in fixed] == [4, 4]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "takes positive clock_ns, latency_cycles or latency_ns"),
        ({"clock_ns": -1}, "'clock_ns': -1"),
        ({"clock_ns": 5, "unit_ns": 0}, "'unit_ns': 0"),
        ({"latency_cycles": 1}, r"needs 2 cycles .* asked for at most 1 cycles; allow more"),
        ({"clock_ns": 1, "latency_ns": 3}, "asked for at most 3 ns"),
        ({"clock_ns": 1, "latency_cycles": 3}, "asked for at most 3 cycles"),
        ({"latency_ns": 0.1}, "asked for at most 0.1 ns"),
    ],
)
def test_what_can_not_be_met_is_said(made, target, words):
    backend, comb = made
    with pytest.raises(LoweringError, match=words):
        pipeline(comb, backend, **target)


def test_a_cutoff_must_be_positive(made):
    backend, comb = made
    with pytest.raises(LoweringError, match="cutoff is -1, expected a positive number"):
        cut(comb, -1, backend)


@pytest.mark.parametrize(("seed", "sizes", "cutoff"), [(3, (4, 4, 4), 4.5), (15, (5, 5), 4.5), (16, (4, 4, 4), 5.5)])
def test_a_fraction_of_an_adder_is_dropped_where_da4ml_would_never_end(seed, sizes, cutoff):
    """da4ml 0.6.0's own retiming bisects these forever; a stage has no longer path than the cutoff."""
    from da4ml.trace import HWConfig
    from da4ml.trace.fixed_variable import FixedVariable

    def longest(part):
        out = part([FixedVariable(*q, hwconf=HWConfig(1, -1, -1)) for q in part.inp_qint])
        return max(getattr(v, "latency", 0) for v in out)

    rng, nodes = np.random.default_rng(seed), list[Node]()
    x = y = port(nodes, (6,), rng)
    for size in sizes:
        y = dense(nodes, quantized(nodes, y, rng, ("RND", "SAT")), size, rng, ("RND", "SAT"))
    comb = da4ml.to_comb(validate(Graph(tuple(nodes), (x,), (y,))))
    assert da4ml.staged(comb, cutoff) == da4ml.staged(comb, int(cutoff))
    assert max(map(longest, da4ml._pipelined(comb, cutoff).solutions)) <= cutoff
