"""HLS projects: the C simulation gives the emulator's integers, and what can't be built is refused before it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax._errors import DataError, LoweringError, ToolError
from pquant_jax.lower.backends import hls4ml as hls
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid, trace_values
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS
from tests.lower.random_graphs import KINDS, random_graph

pytest.importorskip("hls4ml")
needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="the C simulation needs g++")


def kernel(*shape: int, seed: int = 1) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).integers(-6, 7, shape) / 4, jnp.float32)


def traced(function: Callable, params: dict[str, jax.Array], *shapes: tuple[int, ...]) -> Graph:
    """A function of kernels and batches with every site in 6 bits; ports of 6 bits."""
    sample = tuple(np.zeros((2, *s)) for s in shapes)
    inputs: Any = tuple(pq.InputSpec(1, 2, 3) for _ in shapes)
    sample, inputs = (sample[0], inputs[0]) if len(shapes) == 1 else (sample, inputs)
    inst = pq.instrument(pq.from_function(function, params), sample, inputs=inputs)
    view = pq.View(params, {n: pq.kif(1, 2, 3, overflow="WRAP") for n in inst.sites}, {})
    return lower.trace(inst, view, {})


def mixed(graph: Graph, seed: int = 0) -> Graph:
    """With a format of its own for every element of every quantizer in front of no table, some without bits."""
    rng = np.random.default_rng(seed)
    tables = {n.inputs[0] for n in graph.nodes if n.op == "table"}
    nodes = []
    for j, node in enumerate(graph.nodes):
        if node.op == "quantize" and j not in tables:
            i, f = rng.integers(0, 3, node.shape), rng.integers(1, 4, node.shape)
            dead = rng.random(node.shape) < 0.1
            at = {"k": np.where(dead, 0, node.attrs["k"]), "i": np.where(dead, 0, i), "f": np.where(dead, 0, f)}
            node = replace(node, attrs={**node.attrs, **at, "overflow": "SAT", "rounding": "RND"})
        nodes.append(node)
    return validate(Graph(tuple(nodes), graph.inputs, graph.outputs))


def check(model: hls.HLSModel, n: int = 200) -> np.ndarray:
    """Outputs for the whole port and for real numbers outside of it, after they were found equal to the emulator's."""
    rng = np.random.default_rng(2)
    inside = port_grid(model.graph, n, rng)
    inputs = [np.concatenate([x, rng.normal(size=x.shape) * 20]) for x in inside]
    expected = flatten_batch(emulate(model.graph, inputs))
    np.testing.assert_array_equal(hls.predict(model, inputs), expected)
    assert len(np.unique(expected)) > 2
    return expected


def image(p: dict[str, jax.Array], x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
    """Convolution, pool, dense, table, products of activations, and what hls4ml has no layer for."""
    a, v = x
    y = lax.conv_general_dilated(a, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y + jnp.asarray([0.25, -0.5, 0.0]))
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").reshape(len(a), -1) @ p["dense"]
    square = jnp.einsum("nqd,nkd->nqk", v, v)
    pieces = jnp.concatenate([jnp.tanh(v[:, 0]), jnp.abs(y), v[:, 1, ::-1]], axis=1)
    return jnp.where(y > 0.5, y, -y), square.sum((1,)), pieces, v


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> hls.HLSModel:
    graph = mixed(traced(image, {"conv": kernel(3, 3, 2, 3), "dense": kernel(27, 4)}, (6, 6, 2), (3, 4)))
    return hls.compile(hls.to_hls(graph, tmp_path_factory.mktemp("hls") / "image"), optimize="-O0")


def dense(n_in: int = 4, n_out: int = 2, bits: int = 6) -> Graph:
    """x @ kernel with a quantizer in front."""
    x = Node("input", (), (1, 1, n_in), dict(k=1, i=2, f=bits - 3), "x")
    form = {key: np.full((1, 1, n_in), v) for key, v in (("k", 1), ("i", 1), ("f", 2))}
    q = Node("quantize", (0,), x.shape, dict(**form, rounding="RND", overflow="WRAP"), "Dense_0/input")
    w = Node("const", (), (1, n_in, n_out), dict(value=np.asarray(kernel(1, n_in, n_out), np.float64)))
    return validate(Graph((x, q, w, Node("dot", (1, 2), (1, 1, n_out), name="Dense_0/kernel")), (0,), (3,)))


@needs_gcc
def test_every_kind_of_layer(simulated):
    kinds = {layer.kind for layer in simulated.layers}
    assert {"Conv2D", "MaxPooling2D", "Dense", "Einsum", "FixedPointQuantizer", "Concatenate", "Netlist"} <= kinds
    check(simulated)


@needs_gcc
def test_one_sample_and_wrong_arrays(simulated):
    inputs = port_grid(simulated.graph, 1, np.random.default_rng(5))
    np.testing.assert_array_equal(hls.predict(simulated, inputs), flatten_batch(emulate(simulated.graph, inputs)))
    with pytest.raises(DataError, match="takes"):
        hls.predict(simulated, inputs[:1] * 2)


@needs_gcc
def test_stream_and_its_trace(tmp_path):
    def line(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = lax.conv_general_dilated(x, p["line"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        y = lax.reduce_window(jax.nn.relu(y), -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID")
        return y.reshape(len(x), -1) @ p["dense"]

    graph = traced(line, {"line": kernel(3, 2, 4), "dense": kernel(16, 3)}, (8, 2))
    model = hls.to_hls(graph, tmp_path / "line", backend="Vivado", io_type="io_stream")
    inputs = port_grid(graph, 20, np.random.default_rng(3))
    expected = trace_values(model.graph, inputs)
    values = hls.trace(model, inputs, optimize="-O0")
    assert len(values) > 3
    for node, value in values.values():
        np.testing.assert_array_equal(value, expected[node])
    last = values[model.layers[-1].name][0]
    np.testing.assert_array_equal(expected[last].ravel(), flatten_batch(emulate(graph, inputs)).ravel())


def test_config_goes_in_again(tmp_path):
    model = hls.to_hls(dense(), tmp_path / "a", reuse_factor=2, strategy="resource")
    found = hls.config(model)
    assert found["LayerName"]["dense_0"]["ReuseFactor"] == 2
    assert found["LayerName"]["dense_0"]["Strategy"] == "resource"
    again = hls.to_hls(dense(), tmp_path / "b", config=found)
    assert hls.config(again) == found
    assert again.layers == model.layers
    other = hls.to_hls(dense(), tmp_path / "c", layers={"dense_0": {"ReuseFactor": 4, "Strategy": "resource"}})
    assert hls.config(other)["LayerName"]["dense_0"]["ReuseFactor"] == 4


def test_written_whole_or_not_at_all(tmp_path):
    model = hls.to_hls(dense(), tmp_path / "p", project_name="encoder", part="xc7z020clg400-1", clock_period=4.0)
    assert not model.directory.exists()
    hls.write(model)
    text = (model.directory / "project.tcl").read_text()
    assert "xc7z020clg400-1" in text and 'project_name "encoder"' in text and "set clock_period 4" in text
    assert (model.directory / "firmware" / "encoder.cpp").is_file()
    with pytest.raises(LoweringError, match="exists"):
        hls.write(model)
    hls.write(model, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_types_are_those_of_the_graph(tmp_path):
    precision = hls.config(hls.to_hls(dense(), tmp_path / "p"))["LayerName"]
    assert precision["input_1"]["Precision"]["result"] == "fixed<6,3>"
    assert precision["dense_0_input_q"]["Precision"]["result"] == "fixed<4,2,RND,WRAP>"


def test_every_reuse_factor_is_valid_or_refused(tmp_path):
    graph = dense(6, 4)
    valid = hls.valid_reuse_factors(hls.to_hls(graph, tmp_path / "p"))["dense_0"]
    assert valid == (1, 2, 3, 6, 12, 24)
    for factor in range(1, 25):
        if factor in valid:
            hls.to_hls(graph, tmp_path / "p", reuse_factor=factor)
        else:
            with pytest.raises(LoweringError, match=r"dense_0.*6 x 4.*1, 2, 3, 6, 12, 24"):
                hls.to_hls(graph, tmp_path / "p", reuse_factor=factor)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(backend="Vitiss"), "did you mean 'Vitis"),
        (dict(io_type="stream"), "io_stream"),
        (dict(strategy="fast"), "known: "),
        (dict(project_name="my project"), "letters"),
        (dict(layers={"dense_1": {"ReuseFactor": 2}}), "did you mean 'dense_0"),
        (dict(layers={"dense_0": {"Reuse": 2}}), "did you mean 'ReuseFactor"),
        (dict(layers={"dense_0": {"Precision": {"result": "fixed<8,4>"}}}), "the graph needs"),
        (dict(config={"Models": {}}), "expected Model and LayerName"),
        (dict(config={"Model": {"Reuse": 2}}), "did you mean 'ReuseFactor"),
        (dict(config={"Model": {"BitExact": True}}), "leave it out"),
        (dict(backend="VivadoAccelerator", part="xc7z020clg400-1"), "that of the board.*leave it out"),
        (dict(strategy="distributed_arithmetic", reuse_factor=2), "it can have 1"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(LoweringError, match=message):
        hls.to_hls(dense(), tmp_path / "p", **options)
    assert not list(tmp_path.iterdir())


def test_options_are_refused_without_a_graph():
    hls.check_options(backend="Vivado", strategy="resource", reuse_factor=4, layers={"dense_7": {"ReuseFactor": 3}})
    with pytest.raises(LoweringError, match="did you mean 'ReuseFactor"):
        hls.check_options(layers={"dense_7": {"Reuse": 3}})


def test_streams_take_one_format_per_tensor(tmp_path):
    with pytest.raises(LoweringError, match=r"Dense_0/input.*one per tensor"):
        hls.to_hls(mixed(dense(8, 2)), tmp_path / "p", io_type="io_stream")
    graph = random_graph(np.random.default_rng(0), "select")
    with pytest.raises(LoweringError, match="io_parallel"):
        hls.to_hls(graph, tmp_path / "p", io_type="io_stream")


def test_wide_ports_are_refused(tmp_path):
    with pytest.raises(LoweringError, match="54 bits"):
        hls.to_hls(dense(bits=54), tmp_path / "p")


def test_synthesis_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for backend, tool in (("Vitis", "vitis-run"), ("Vivado", "vivado_hls")):
        with pytest.raises(ToolError, match=tool):
            hls.build(hls.to_hls(dense(), tmp_path / "p", backend=backend))
    with pytest.raises(ToolError, match="not compiled"):
        hls.predict(hls.to_hls(dense(), tmp_path / "p"), np.zeros((1, 1, 1, 4)))
    with pytest.raises(ToolError, match=r"g\+\+ is not on PATH"):
        hls.compile(hls.to_hls(dense(), tmp_path / "p"))


CSYNTH = """<profile>
<UserAssignments><unit>ns</unit><ProductFamily>virtexuplus</ProductFamily><Part>xcvu13p-flga2577-2-e</Part>
<TopModelName>pquant</TopModelName><TargetClockPeriod>5.00</TargetClockPeriod><ClockUncertainty>1.35</ClockUncertainty>
</UserAssignments>
<PerformanceEstimates><PipelineType>yes</PipelineType>
<SummaryOfTimingAnalysis><unit>ns</unit><EstimatedClockPeriod>3.601</EstimatedClockPeriod></SummaryOfTimingAnalysis>
<SummaryOfOverallLatency><unit>clock cycles</unit><Best-caseLatency>12</Best-caseLatency>
<Average-caseLatency>12</Average-caseLatency>
<Worst-caseLatency>12</Worst-caseLatency><PipelineInitiationInterval>1</PipelineInitiationInterval>
<Interval-min>1</Interval-min><Interval-max>1</Interval-max></SummaryOfOverallLatency></PerformanceEstimates>
<AreaEstimates><Resources><BRAM_18K>4</BRAM_18K><DSP>17</DSP><FF>3120</FF><LUT>11276</LUT><URAM>0</URAM></Resources>
<AvailableResources><BRAM_18K>5376</BRAM_18K><DSP>12288</DSP><FF>3456000</FF><LUT>1728000</LUT><URAM>1280</URAM></AvailableResources>
</AreaEstimates>
</profile>
"""
SYNTH = """1. CLB Logic
+----------------------------+------+-------+------------+-----------+-------+
|          Site Type         | Used | Fixed | Prohibited | Available | Util% |
+----------------------------+------+-------+------------+-----------+-------+
| CLB LUTs*                  | 5400 |     0 |          0 |   1728000 |  0.31 |
| CLB Registers              | 2980 |     0 |          0 |   3456000 |  0.09 |
2. BLOCKRAM
| Block RAM Tile |    2 |     0 |          0 |      2688 |  0.07 |
| URAM           |    0 |     0 |          0 |      1280 |  0.00 |
3. ARITHMETIC
| DSPs      |   17 |     0 |          0 |     12288 |  0.14 |
"""


def test_reports_of_the_vendors_tools(tmp_path):
    model = hls.to_hls(dense(), tmp_path / "p")
    hls.write(model)
    with pytest.raises(ToolError, match="no report"):
        hls.report(model.directory)
    solution = model.directory / "pquant_prj" / "solution1" / "syn" / "report"
    solution.mkdir(parents=True)
    (solution / "pquant_csynth.xml").write_text(CSYNTH)
    (model.directory / "vivado_synth.rpt").write_text(SYNTH)
    listing = '<project xmlns="com.autoesl.autopilot.project"><solutions><solution name="solution1"/></solutions></project>'
    (model.directory / "pquant_prj" / "hls.app").write_text(listing)
    found = hls.report(model.directory)
    synthesis = found["CSynthesisReport"]
    wanted = {"WorstLatency": "12", "IntervalMax": "1", "LUT": "11276", "DSP": "17", "EstimatedClockPeriod": "3.601"}
    assert {key: synthesis[key] for key in wanted} == wanted
    assert found["VivadoSynthReport"] == {"LUT": "5400", "FF": "2980", "BRAM_18K": "2", "URAM": "0", "DSP48E": "17"}


def test_build_gives_the_report_of_any_tool(tmp_path, monkeypatch):
    model = hls.to_hls(dense(), tmp_path / "p", backend="Quartus")
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    with pytest.raises(ToolError, match="is not written"):
        hls.build(model)
    hls.write(model)
    monkeypatch.setattr(model.project, "build", lambda **options: {"asked": options})
    assert hls.build(model, synth=False) == {"asked": {"synth": False}}
    monkeypatch.setattr(model.project, "build", lambda **options: None)
    with pytest.raises(ToolError, match="no report"):
        hls.build(model)


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2 * len(KINDS)))
def test_random_graphs(seed, tmp_path):
    modes = ROUNDINGS[seed % len(ROUNDINGS)], OVERFLOWS[seed % len(OVERFLOWS)]
    graph = random_graph(np.random.default_rng(seed), KINDS[seed % len(KINDS)], modes)
    check(hls.compile(hls.to_hls(graph, tmp_path / "p"), optimize="-O0"))


def windows(p: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, ...]:
    """Depthwise, grouped, dilated and strided convolutions, average pools, reductions, BatchNormalization."""
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, p["depthwise"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4)
    z = lax.conv_general_dilated(
        x, p["grouped"], (2, 1), ((1, 0), (0, 1)), rhs_dilation=(1, 2), dimension_numbers=numbers, feature_group_count=2
    )
    pool = lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    padded = lax.reduce_window(z, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return pool, padded, z.sum((1, 2)), y.max((1, 2)), jax.nn.leaky_relu(x.transpose(0, 3, 1, 2), 0.25) @ p["dense"]


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("case", ["Vitis latency", "Vivado resource", "Vitis distributed_arithmetic"])
def test_windows_and_strategies(case, tmp_path):
    backend, strategy = case.split()
    params = {"depthwise": kernel(2, 2, 1, 4), "grouped": kernel(3, 2, 2, 6), "dense": kernel(5, 2)}
    graph = mixed(traced(windows, params, (6, 5, 4)))
    check(hls.compile(hls.to_hls(graph, tmp_path / "p", backend=backend, strategy=strategy), optimize="-O0"))


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("factor", [1, 2, 3, 6, 12, 24])
def test_reuse_does_not_change_values(factor, tmp_path):
    model = hls.to_hls(dense(6, 4), tmp_path / "p", reuse_factor=factor, strategy="resource")
    check(hls.compile(model, optimize="-O0"))


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    model = hls.to_hls(dense(), tmp_path / "p")
    monkeypatch.setattr(model.project, "write", lambda: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(LoweringError, match="disk full"):
        hls.write(model)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("backend", sorted(hls.BACKENDS))
def test_every_backend_is_written_or_says_what_it_needs(backend, tmp_path):
    needs = [tool for tool in hls.BACKENDS[backend].converts if shutil.which(tool) is None]
    if needs:
        with pytest.raises(ToolError, match=needs[0]):
            hls.to_hls(dense(), tmp_path / "p", backend=backend)
        return
    model = hls.to_hls(dense(), tmp_path / "p", backend=backend)
    hls.write(model)
    texts = [p.read_text() for p in model.directory.rglob("*") if p.suffix in (".yml", ".cpp", ".sh", ".tcl", ".h")]
    assert any("dense" in text for text in texts)
    assert not any(f".{model.directory.name}." in text for text in texts), "the temporary folder's name is in the project"
    if not hls.BACKENDS[backend].simulates:
        with pytest.raises(ToolError, match="needs"):
            hls.compile(model, overwrite=True)


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name, b in hls.BACKENDS.items() if b.simulates])
@pytest.mark.parametrize("io_type", hls.IO_TYPES)
def test_every_simulated_backend(backend, io_type, tmp_path):
    check(hls.compile(hls.to_hls(dense(), tmp_path / "p", backend=backend, io_type=io_type), optimize="-O0"))


def test_a_convolution_is_not_reused_beyond_its_inputs(tmp_path):
    def line(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, p["line"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    graph = traced(line, {"line": kernel(3, 2, 4)}, (6, 2))
    ((name, valid),) = hls.valid_reuse_factors(hls.to_hls(graph, tmp_path / "p", strategy="resource")).items()
    assert valid == (1, 2, 3, 6)
    with pytest.raises(LoweringError, match=rf"{name}.*6 x 4.*1, 2, 3, 6$"):
        hls.to_hls(graph, tmp_path / "p", strategy="resource", reuse_factor=12)


def test_a_port_with_a_format_per_element_is_refused(tmp_path):
    port = Node("input", (), (2,), dict(k=np.ones(2, np.int64), i=np.array([1, 2]), f=np.zeros(2, np.int64)), "kernel")
    graph = validate(Graph((port, Node("neg", (0,), (2,))), (0,), (1,)))
    with pytest.raises(LoweringError, match=r"%0 input 'kernel': a port with a format per element; .* weights='constants'"):
        hls.to_hls(graph, tmp_path / "hls")
    assert not (tmp_path / "hls").exists()
