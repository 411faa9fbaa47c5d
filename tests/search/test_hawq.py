"""HAWQ on a trained model: every limit holds where it is measured again, and the choice is the least perturbing one."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.search import hawq

from .conftest import split

FEW = dict(samples=256, batch_size=128, probes=8, widths=(2, 4, 8))


@pytest.mark.parametrize(("limit", "at_most"), [("ebops", 9000), ("bops", 9000), ("size", 1700), ("latency", 4)])
def test_a_limit_holds_where_it_is_measured(jets, view_of, limit, at_most):
    found = hawq(jets.inst, jets.params, jets.data.train, activations=(4, 8), **{limit: at_most}, **FEW)
    assert getattr(found, "cycles" if limit == "latency" else limit) <= at_most
    view = view_of(jets.inst, jets.params, found)
    assert float(jets.inst.ebops(view)) == found.ebops == found.bops
    kernels = {path: w.size for path, w in pq._tree.flatten(jets.params).items() if path.endswith("kernel")}
    assert found.size == sum(n * found.bits[path] for path, n in kernels.items())
    assert found.total == pytest.approx(sum(table[found.bits[name]] for name, table in found.omega.items()))


def test_the_choice_is_the_best_of_all(jets):
    """81 choices of widths; all else has one candidate."""
    import itertools

    found = hawq(jets.inst, jets.params, jets.data.train, size=1700, **FEW)
    kernels = {path: jets.inst.sites[path].shape for path in found.traces}
    choices = [dict(zip(kernels, ws, strict=True)) for ws in itertools.product((2, 4, 8), repeat=len(kernels))]
    within = [c for c in choices if sum(np.prod(kernels[p]) * w for p, w in c.items()) <= 1700]
    best = min(within, key=lambda c: sum(found.omega[p][w] for p, w in c.items()))
    assert {path: found.bits[path] for path in kernels} == best


def test_the_perturbation_is_the_trace_times_the_squared_error(jets):
    found = hawq(jets.inst, jets.params, jets.data.train, size=1e9, **FEW)
    formats, leaves = dict(found.rules), pq._tree.flatten(jets.params)
    for path, trace in found.traces.items():
        fmt, w = formats[path], leaves[path]
        error = jnp.sum(jnp.square(pq.numerics.quantize(w, pq.kif(fmt.k, fmt.i, fmt.f)) - w))
        assert found.bits[path] == 8 and trace.error > 0
        assert found.omega[path][8] == pytest.approx(trace.mean * float(error), rel=1e-4)
        assert found.omega[path][2] > found.omega[path][4] > found.omega[path][8]


def test_wider_limits_never_perturb_more(jets):
    totals = [hawq(jets.inst, jets.params, jets.data.train, size=size, **FEW).total for size in (1000, 1700, 2500, 3400)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]


def test_a_pruned_model_counts_what_it_keeps(jets, view_of):
    masks = {"Dense_0/kernel": np.eye(16, dtype=np.float32)}
    found = hawq(jets.inst, jets.params, jets.data.train, ebops=6000, masks=masks, **FEW)
    view = view_of(jets.inst, jets.params, found)
    assert float(jets.inst.ebops(view)) == found.ebops <= 6000 < found.bops
    assert found.size == 16 * found.bits["Dense_0/kernel"] + sum(
        n * found.bits[f"Dense_{d}/kernel"] for d, n in ((1, 128), (2, 40))
    )


def test_what_two_kernels_read_has_one_width():
    rng = np.random.default_rng(0)
    params = {n: jnp.float32(rng.normal(size=(4, 3))) for n in "ab"}
    x, y = rng.normal(size=(32, 4)), rng.integers(0, 3, 32)
    inst = pq.instrument(pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) + x @ p["b"], params), np.float32(x))
    assert [n for n, spec in inst.sites.items() if spec.kind == "input"] == ["a/input"]
    found = hawq(inst, params, split(x, y), ebops=12 * 4 * 6 + 12 * 8 * 6, activations=(2, 6, 8), probes=4, widths=(2, 4, 8))
    bits = found.bits
    assert found.ebops == 12 * bits["a/input"] * (bits["a"] + bits["b"]) <= 12 * 4 * 6 + 12 * 8 * 6


def test_a_table_of_cycles(jets):
    kernels = [path for path in jets.inst.sites if path.endswith("kernel")]
    cycles = {path: {2: 1.0, 4: 2.0, 8: 5.0} for path in kernels}
    found = hawq(jets.inst, jets.params, jets.data.train, latency=9, cycles=cycles, **FEW)
    assert found.cycles == sum(cycles[path][found.bits[path]] for path in kernels) <= 9
    with pytest.raises(pq.SearchError, match="latency of 2 can't be reached: the cheapest choice needs 3"):
        hawq(jets.inst, jets.params, jets.data.train, latency=2, cycles=cycles, **FEW)
    with pytest.raises(pq.TransformError, match="no entry for 'Dense_1/kernel' at 8 bits"):
        hawq(jets.inst, jets.params, jets.data.train, latency=9, cycles=cycles | {"Dense_1/kernel": {2: 1.0, 4: 2.0}}, **FEW)


def test_an_infeasible_limit_says_the_least(jets):
    least = 2 * 4 * (16 * 16 + 16 * 8 + 8 * 5)
    with pytest.raises(pq.SearchError, match=f"EBOPs of 1000 can't be reached: the cheapest choice needs {least}"):
        hawq(jets.inst, jets.params, jets.data.train, ebops=1000, activations=(4, 8), **FEW)


def test_convolutions_and_batchnorm(signal, view_of):
    options = {**FEW, "samples": 64, "batch_size": 32}
    dense = hawq(signal.inst, signal.params, signal.data.train, ebops=1e9, activations=(4, 8), **options)
    assert {dense.bits[path] for path in dense.traces} == {8}
    half = hawq(signal.inst, signal.params, signal.data.train, ebops=dense.ebops / 2, activations=(4, 8), **options)
    assert float(signal.inst.ebops(view_of(signal.inst, signal.params, half))) == half.ebops <= dense.ebops / 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected one of"),
        ({"ebops": 10, "size": 10}, "expected one of"),
        ({"size": 0}, "above 0"),
        ({"size": 10, "widths": ()}, "widths"),
        ({"size": 10, "activations": (1, 8)}, "activations"),
        ({"size": 10, "masks": {"Dense_9/kernel": np.ones(1)}}, "no kernel"),
    ],
)
def test_questions_without_an_answer(jets, options, said):
    with pytest.raises(pq.TransformError, match=said):
        hawq(jets.inst, jets.params, jets.data.train, **options)


def test_an_infeasible_limit_is_found_before_the_traces(jets, monkeypatch):
    from pquant_jax.search import _hawq

    def never(*args, **options):
        raise AssertionError("measured before the limit was looked at")

    monkeypatch.setattr(_hawq, "hutchinson", never)
    with pytest.raises(pq.SearchError, match="the cheapest choice needs"):
        hawq(jets.inst, jets.params, jets.data.train, size=10, **FEW)


@pytest.mark.slow
def test_better_than_uniform_bits_of_as_many_operations(jets, view_of):
    """The claim of both: at most the operations of 4 bits everywhere, and a lower loss, as found."""
    inst, params, data = jets
    uniform = hawq(inst, params, data.train, bops=1e9, widths=(4,), activations=(4,), probes=2)
    mixed = hawq(inst, params, data.train, bops=uniform.bops, activations=range(3, 9))
    pruned = pq.search.fitcompress(inst, params, data.train, ebops=uniform.ebops, activations=5)

    def loss(found):
        y, _ = inst.forward(view_of(inst, params, found), inst.model.state, jnp.asarray(data.train.x))
        return float(jnp.mean(pq.train.cross_entropy(y, data.train.y)))

    assert mixed.bops <= uniform.bops and pruned.ebops <= uniform.ebops
    assert max(loss(mixed), loss(pruned)) < loss(uniform)


def test_the_input_of_a_table_keeps_what_the_table_allows():
    """Its cost, 2^bits, is no sum of products of widths, which the program would take it for."""
    weights = {"a": jnp.float32([[0.9, -0.7], [0.3, 0.6]]), "b": jnp.float32([[0.02, 0.5], [0.4, -0.3]])}
    model = pq.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], weights)
    x, y = np.float32([[1.0, 0.5], [-0.5, 1.0]]), np.int32([0, 1])
    inst = pq.instrument(model, x)
    data = SimpleNamespace(x=x, y=y, weight=None)
    found = pq.search.hawq(inst, weights, data, ebops=1250, widths=[3, 8], activations=[4, 16])
    assert found.bits["tanh/input"] == 12
    assert found.ebops <= 1250
    compressed = pq.search.compression(inst, found)
    params = compressed.attach(weights)
    view, _ = compressed.apply(params, compressed.init(params))
    assert set(inst.tables(view, {})) == {"tanh"}
