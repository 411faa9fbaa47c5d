"""The packages' own `trace_model` find our plugins by their entry points and give the netlists that the emulator predicts."""

from __future__ import annotations

import importlib
import sys
import tomllib
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest
from alkaid import converter as alkaid_converter
from alkaid.trace import FVArray, trace as alkaid_trace
from da4ml.converter import trace_model
from da4ml.trace import FixedVariableArray, HWConfig, comb_trace

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

PORT = pq.InputSpec(1, 2, 3)
F = pq.quantize.Format


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        return nn.Dense(3)(h + nn.relu(nn.Dense(6)(h)))


def port(size: int, hwconf: HWConfig) -> FixedVariableArray:
    k, i, f = (np.full(size, v) for v in (1, 2, 3))
    return FixedVariableArray.from_kif(k, i, f, hwconf=hwconf)


@pytest.fixture(scope="module")
def model() -> lower.Finished:
    inst = pq.instrument(Net(), np.zeros((1, 5), np.float32), inputs=PORT)
    compression = pq.quantize.fixed(inst.sites, weights=F(0, 4, 1), activations=F(2, 3))
    params = compression.attach(inst.model.params)
    return lower.Finished(inst, compression.apply(params, compression.init(params))[0], inst.model.state)


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """The entry points of pyproject.toml, as an installation writes them, before an older installation's."""
    root = Path(pq.__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(root.read_text())["project"]
    folder = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{g}]\n" + "\n".join(f"{k} = {v}" for k, v in eps.items()) for g, eps in project["entry-points"].items()]
    (folder / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    alkaid_converter.get_available_plugins.cache_clear()
    yield
    alkaid_converter.get_available_plugins.cache_clear()


def test_the_netlist_predicts_what_the_emulator_says(model):
    graph = lower.trace(*model)
    inputs = port_grid(graph, 500, np.random.default_rng(0))
    expected = flatten_batch(emulate(graph, inputs))
    for given in (model, graph):  # a Graph is a model too
        comb = comb_trace(*trace_model(given))
        np.testing.assert_array_equal(da4ml.predict(comb, flatten_batch(inputs)), expected)
        overflowing = [4 * v + 0.03 for v in inputs]  # the port wraps, as the graph's does
        np.testing.assert_array_equal(da4ml.predict(comb, flatten_batch(overflowing)), flatten_batch(emulate(graph, overflowing)))
    assert comb.cost == pytest.approx(da4ml.to_comb(graph).cost, rel=0.05)


@pytest.mark.parametrize("kif", [(1, 4, 6), (0, 1, 2), (1, 2, 3)])
def test_inputs_in_another_format_are_encoded_in_hardware(model, kif):
    graph = lower.trace(*model)
    comb = comb_trace(*trace_model(model, HWConfig(1, -1, -1), {"hard_dc": 2}, inputs_kif=kif))
    k, i, f = kif
    codes = np.random.default_rng(1).integers(-k * 2 ** (i + f), 2 ** (i + f), (400, 5))
    x = np.ldexp(codes.astype(float), -f)
    expected = flatten_batch(emulate(graph, [model.inst.encode(x)]))
    np.testing.assert_array_equal(da4ml.predict(comb, x), expected)
    np.testing.assert_array_equal(lower.forward_outputs(model.inst, model.view, model.model_state, [x]), expected)


def test_given_inputs_and_a_dump_of_every_site(model):
    own = port(5, HWConfig(2, 4, -1))
    dump = trace_model(model, HWConfig(2, 4, -1), inputs=own, dump=True)
    assert {"Dense_1/input", "Dense_2/input", "output/0"} <= set(dump)
    assert all(isinstance(v, FixedVariableArray) for v in dump.values()) and dump["Dense_2/input"].size == 6
    graph = lower.trace(*model)
    site = next(j for j, node in enumerate(graph.nodes) if node.op == "quantize" and node.name == "Dense_2/input")
    inputs = port_grid(graph, 100, np.random.default_rng(2))
    expected = flatten_batch(emulate(graph._replace(outputs=(site,)), inputs))
    comb = comb_trace(own.ravel(), dump["Dense_2/input"].ravel())
    np.testing.assert_array_equal(da4ml.predict(comb, flatten_batch(inputs)), expected)


def test_what_it_can_not_trace_is_said(model):
    with pytest.raises(pq.LoweringError, match=r"Finished\(inst, view, model_state\).*got Instrumented"):
        trace_model(model.inst)
    with pytest.raises(pq.LoweringError, match="unknown options of trace_model: period"):
        trace_model(model, period=5)
    wrong = port(4, HWConfig(1, -1, -1))
    with pytest.raises(pq.LoweringError, match=r"input ports of shape \[\(5,\)\], got \[\(4,\)\]"):
        trace_model(model, inputs=wrong)


@pytest.mark.parametrize("kif", [None, (1, 4, 6), (0, 1, 2)])
def test_alkaid_traces_the_same_models(model, kif):
    """Formats given are encoded in hardware; without, ports have the graph's formats."""
    graph = lower.trace(*model)
    options = {} if kif is None else {"inputs_kif": kif}
    ports, outputs = alkaid_converter.trace_model(model, (1, 1, -1), **options)
    comb = alkaid_trace(ports, outputs, optimize=False)
    k, i, f = kif or (1, 2, 3)
    x = np.ldexp(np.random.default_rng(3).integers(-k * 2 ** (i + f), 2 ** (i + f), (300, 5)).astype(float), -f)
    expected = flatten_batch(emulate(graph, [model.inst.encode(x)]))
    np.testing.assert_array_equal(alkaid.predict(comb, x), expected)
    np.testing.assert_array_equal(alkaid.predict(alkaid.optimized(comb), x), expected)


def test_alkaid_dumps_every_site_and_says_what_it_can_not_trace(model):
    dump = alkaid_converter.trace_model(model, dump=True)
    assert {"Dense_1/input", "Dense_2/input", "output/0"} <= set(dump)
    assert all(isinstance(v, FVArray) for v in dump.values()) and dump["Dense_2/input"].size == 6
    with pytest.raises(pq.LoweringError, match=r"alkaid traces a lower.Finished\(inst, view, model_state\).*got Instrumented"):
        alkaid_converter.trace_model(model.inst)
