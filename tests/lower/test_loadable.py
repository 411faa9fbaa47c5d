"""Weights as inputs: one netlist, several weight sets, each proved against its own JAX forward."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import _tree, lower
from pquant_jax._errors import LoweringError
from pquant_jax.lower import ir, sim
from pquant_jax.lower._estimate import LOADABLE
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import weight_ports
from pquant_jax.lower.loadable import beside, check_weights, loaded, weights_of

from .weight_sets import Sets, two_sets, weight_set

needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


@pytest.fixture(scope="module")
def sets() -> Sets:
    return two_sets()


@pytest.fixture(scope="module")
def comb(sets: Sets) -> Any:
    return da4ml.to_comb(sets.graph)


def test_every_parameter_site_is_a_port_behind_the_data(sets):
    names = [sets.graph.nodes[j].name for j in sets.graph.inputs]
    wanted = {n for n, spec in sets.inst.sites.items() if spec.kind in ("kernel", "bias", "scale", "offset")}
    assert names[0] == "input" and set(names[1:]) == wanted and len(names) == 1 + len(wanted)
    assert {"BatchNorm_0/fused_scale", "BatchNorm_0/fused_offset", "Conv_0/kernel", "Dense_1/bias"} <= wanted
    for j in weight_ports(sets.graph):
        node = sets.graph.nodes[j]
        bits = sum(np.asarray(node.attrs[key]) for key in "kif")
        mask = np.asarray(sets.views[0].masks.get(node.name, np.ones(node.shape)))
        np.testing.assert_array_equal(bits, np.where(mask != 0, 5, 0))
    assert not [n for n in sets.graph.nodes if n.op == "const" and np.size(n.attrs["value"]) and np.any(n.attrs["value"])]


@pytest.mark.parametrize("which", [0, 1])
def test_a_loaded_graph_is_the_ordinary_one(sets, which):
    """Put in as constants, a weight set gives the very program that a trace with constants gives."""
    view, state = sets.views[which], sets.states[which]
    ordinary = lower.trace(sets.inst, view, state)
    assert not weight_ports(ordinary)
    assert lower.difference(loaded(sets.graph, weights_of(sets.graph, sets.inst, view, state)), ordinary) == ""


def test_the_graph_survives_a_file(sets, tmp_path):
    ir.save(sets.graph, tmp_path / "graph.npz")
    again = ir.load(tmp_path / "graph.npz")
    assert weight_ports(again) == weight_ports(sets.graph) and lower.same(again, sets.graph)


def test_both_sets_are_proved_on_one_netlist(sets, comb):
    """JAX forward, emulator and da4ml; the sets differ, so a netlist that ignored its ports could not pass both."""
    x = np.random.default_rng(0).normal(size=(50, 5, 1))
    for view, state in zip(sets.views, sets.states, strict=True):
        found = lower.verify(sets.graph, sets.inst, view, state, x_test=x, vectors=300, comb=comb)
        assert found["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": None, "rtl_pipelined": None}
        assert found["vectors"] == 300
    graph = loaded(sets.graph, weights_of(sets.graph, sets.inst, sets.views[0], sets.states[0]))
    grid = port_grid(graph, 100, np.random.default_rng(0))
    first, second = (lower.forward_outputs(sets.inst, v, s, grid) for v, s in zip(sets.views, sets.states, strict=True))
    assert (first != second).any(1).mean() > 0.9


def test_any_codes_on_the_ports(sets, comb):
    """Weights drawn from all codes of their ports, other ones in every row."""
    inputs = port_grid(sets.graph, 300, np.random.default_rng(3))
    expected = flatten_batch(emulate(sets.graph, inputs))
    np.testing.assert_array_equal(da4ml.predict(comb, flatten_batch(inputs)), expected)
    one = loaded(sets.graph, [v[7] for v in inputs[1:]])
    np.testing.assert_array_equal(flatten_batch(emulate(one, [inputs[0][7:8]])), expected[7:8])
    np.testing.assert_array_equal(beside([inputs[0][7:8]], [v[7] for v in inputs[1:]]), flatten_batch([v[7:8] for v in inputs]))


@needs_simulator
@pytest.mark.parametrize("latency_cutoff", [-1, 4])
def test_one_simulation_proves_both_sets(sets, comb, latency_cutoff, tmp_path_factory):
    """The Verilog is compiled once and run with either set on its ports; a single wrong weight bit is found."""
    work = tmp_path_factory.getbasetemp() / "loadable-sim"
    rtl = da4ml.write_rtl(comb, tmp_path_factory.mktemp("rtl") / "net", name="net", latency_cutoff=latency_cutoff)
    key, programs = "rtl_pipelined" if rtl.stages else "rtl_comb", {}
    programs[key] = sim.build(rtl, work)
    stamp = programs[key].stat().st_mtime_ns
    x = np.random.default_rng(0).normal(size=(50, 5, 1))
    for view, state in zip(sets.views, sets.states, strict=True):
        options: dict[str, Any] = dict(x_test=x, vectors=300, rtls={key: rtl}, programs=programs)
        assert lower.verify(sets.graph, sets.inst, view, state, **options)["mismatches"][key] == 0
    assert programs[key].stat().st_mtime_ns == stamp
    if not rtl.stages:
        weights = weights_of(sets.graph, sets.inst, sets.views[0], sets.states[0])
        grid = [v[:200] for v in port_grid(loaded(sets.graph, weights), 200, np.random.default_rng(0))]
        right = sim.run_built(programs[key], rtl, beside(grid, weights))
        last = [sets.graph.nodes[j].name for j in weight_ports(sets.graph)].index("Dense_2/kernel")
        at = np.unravel_index(np.flatnonzero(weights[last])[0], weights[last].shape)
        weights[last] = weights[last].copy()
        weights[last][at] -= 0.125 * np.sign(weights[last][at])
        assert np.any(sim.run_built(programs[key], rtl, beside(grid, weights)) != right)


def test_what_does_not_fit_is_refused(sets):
    view, state = sets.views[0], sets.states[0]
    kernel = _tree.flatten(view.model)["Dense_0/kernel"]
    pruned = np.argwhere(np.asarray(view.masks["Dense_0/kernel"]) == 0)[0]
    alive = np.argwhere(np.asarray(view.masks["Dense_0/kernel"]) == 1)[0]
    cases = [(pruned, 0.5, "is pruned, so it has no bits"), (alive, 2.0, "holds fixed<k=1, i=1, f=3>"), (alive, 1 / 16, "holds")]
    for at, value, why in cases:
        wrong = view._replace(model=_tree.replace(view.model, {"Dense_0/kernel": kernel.at[tuple(at)].set(value)}))
        with pytest.raises(LoweringError, match=f"'Dense_0/kernel': element .* is {value}, its port {why}"):
            weights_of(sets.graph, sets.inst, wrong, state)
    with pytest.raises(LoweringError, match="nan"):
        check_weights(sets.graph, [np.full(sets.graph.nodes[j].shape, np.nan) for j in weight_ports(sets.graph)])
    with pytest.raises(LoweringError, match="takes .* got"):
        check_weights(sets.graph, [np.zeros(3)] * len(weight_ports(sets.graph)))
    with pytest.raises(LoweringError, match="weight ports, got 0 arrays"):
        check_weights(sets.graph, [])


def test_another_program_is_refused(sets):
    """A format of an activation is no weight; neither is a graph with constants."""
    view, state = sets.views[0], sets.states[0]
    fmt = view.sites["Dense_1/input"]
    coarser = pq.KIF(fmt.k, fmt.i, fmt.f - 1, fmt.rounding, fmt.overflow)
    with pytest.raises(LoweringError, match="another program than the graph, beyond its weights: .*quantize"):
        weights_of(sets.graph, sets.inst, view._replace(sites={**view.sites, "Dense_1/input": coarser}), state)
    with pytest.raises(LoweringError, match="no weight ports"):
        weights_of(lower.trace(sets.inst, view, state), sets.inst, view, state)
    with pytest.raises(LoweringError, match="weights is 'port'; did you mean 'ports'"):
        lower.trace(sets.inst, view, state, weights="port")


def test_narrower_formats_and_more_pruning_fit(sets):
    """Another set needs no equal formats of its weights: its values must fit."""
    view, state = sets.views[1], sets.states[1]
    masks = {p: m * (np.arange(m.size).reshape(m.shape) % 2) for p, m in view.masks.items()}
    model = _tree.replace(view.model, {p: m * _tree.flatten(view.model)[p] for p, m in masks.items()})
    fewer = view._replace(model=model, masks=masks)
    found = loaded(sets.graph, weights_of(sets.graph, sets.inst, fewer, state))
    assert lower.difference(found, lower.trace(sets.inst, fewer, state)) == ""


def test_the_size_guard_knows_multipliers(sets):
    """A product of two inputs counts LOADABLE times: what fits with constants may not fit with ports."""
    view, state = sets.views[0], sets.states[0]
    small = lower.estimate(sets.inst, view, state)
    large = lower.estimate(sets.inst, view, state, loadable=True)
    assert large.luts - small.luts == (LOADABLE - 1) * 12.0 * small.products
    limit = small.products + small.elements
    assert lower.trace(sets.inst, view, state, limit=limit)
    with pytest.raises(LoweringError, match="a product of two inputs counting 5 times"):
        lower.trace(sets.inst, view, state, limit=limit, weights="ports")


def test_tables_stay_and_constants_of_the_model_stay():
    """gelu is a table, 1/sqrt(3) a constant of the model: neither is a port."""

    def forward(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ p["kernel"]) * jnp.float32(1 / np.sqrt(3))

    x = np.zeros((2, 3), np.float32)
    inst = pq.instrument(pq.from_function(forward, {"kernel": jnp.ones((3, 2))}), x, inputs=pq.InputSpec(1, 2, 2))
    view, state = weight_set(inst, {}, 0)
    graph = lower.trace(inst, view, state, weights="ports")
    assert [graph.nodes[j].name for j in weight_ports(graph)] == ["kernel"]
    found = lower.verify(graph, inst, view, state, x_test=np.ones((4, 3)), vectors=200, comb=da4ml.to_comb(graph))
    assert found["mismatches"]["da4ml"] == 0
