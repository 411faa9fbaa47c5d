"""ONNX, QONNX and QDQ exports: equal to the emulator in qonnx's executor and in onnxruntime, or refused."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS
from tests.lower import random_graphs

onnx = pytest.importorskip("onnx", reason="no onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install onnxruntime")
pytest.importorskip("qonnx", reason="no qonnx: pip install qonnx")
out = importlib.import_module("pquant_jax.lower.backends.onnx")

MODES = [(r, o) for r in ROUNDINGS for o in OVERFLOWS]
ANY_FLOAT = np.array([1e30, -1e30, 1e-30, -1e-30, -1e-40, 3.4e38, -3.4e38, 123456.7, -0.0, 0.5], np.float32).astype(np.float64)


def quantizers(rounding: str, overflow: str, f: int = 7) -> Graph:
    """A port of 6 + f bits, and on it three quantizers: per element, one for all, one scale per channel with one width."""
    x = Node("input", (), (2, 4), dict(k=1, i=5, f=f), "x")
    modes = dict(rounding=rounding, overflow=overflow)
    forms = [
        ([[1, 0, 1, 0], [1, 1, 0, 1]], [[2, 3, 1, -1], [0, -3, 2, 1]], [[1, 2, -1, 3], [0, 2, -3, 4]]),
        (np.ones((2, 4)), np.full((2, 4), 2), np.full((2, 4), 3)),
        (np.zeros((2, 4)), [[1, 0, 3, 2]] * 2, [[2, 3, 0, 1]] * 2),
    ]
    nodes = [x]
    for name, kif in zip(("q", "Dense_0/input", "c"), forms, strict=True):
        at = dict(zip("kif", (np.asarray(v, np.int64) for v in kif), strict=True))
        nodes.append(Node("quantize", (0,), (2, 4), {**at, **modes}, name))
    return validate(Graph(tuple(nodes), (0,), (1, 2, 3)))


def equal(graph: Graph, xs: list[np.ndarray], engines=("qonnx", "onnxruntime")) -> None:
    want = flatten_batch(emulate(graph, xs))
    for engine in engines:
        model = out.to_qonnx(graph) if engine == "qonnx" else out.to_onnx(graph)
        np.testing.assert_array_equal(out.execute(model, xs, engine=engine), want, err_msg=engine)


@pytest.mark.parametrize(("rounding", "overflow"), MODES)
def test_every_mode_is_that_of_the_emulator(rounding, overflow):
    graph = quantizers(rounding, overflow)
    x = port_grid(graph, 300, np.random.default_rng(0))[0]
    x[:100] = np.round(x[:100] * 8) / 8  # halves of every grid
    wanted = np.abs(ANY_FLOAT) * 2.0**7 < 2.0**52  # beyond, the emulator's own modulo is rounded
    x = np.concatenate([x, np.broadcast_to(ANY_FLOAT[wanted][:, None, None], (int(wanted.sum()), 2, 4))])
    equal(graph, [x])


@pytest.mark.parametrize("rounding", ["RND", "RND_CONV"])
def test_what_needs_more_than_24_bits_is_computed_in_float64(rounding):
    graph = quantizers(rounding, "WRAP", f=30)
    assert out.to_qonnx(graph).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    equal(graph, port_grid(graph, 300, np.random.default_rng(0)))
    with pytest.raises(LoweringError, match=r"%1 quantize 'q': .* 24"):
        out.to_qdq(quantizers("RND_CONV", "SAT", f=30))


def test_a_huge_number_wraps_as_the_port_does():
    """Where the emulator's float64 is exact; 2^70 + 2^47 is a float32 and a multiple of every period."""
    graph = quantizers("TRN", "WRAP")
    x = np.full((1, 2, 4), 2.0**70 + 2.0**47)
    np.testing.assert_array_equal(out.execute(out.to_onnx(graph), x), np.zeros((1, 24)))
    np.testing.assert_array_equal(out.execute(out.to_qonnx(graph), x, engine="qonnx"), np.zeros((1, 24)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(random_graphs.KINDS), st.sampled_from(MODES))
def test_random_graphs_of_every_op(seed, kind, modes):
    rng = np.random.default_rng(seed)
    graph = random_graphs.random_graph(rng, kind, modes)
    xs = [np.concatenate([x, rng.normal(0, 30, x.shape).astype(np.float32)]) for x in port_grid(graph, 32, rng)]
    equal(graph, xs, engines=("onnxruntime",) if seed % 2 else ("qonnx",))


def test_a_saturating_quantizer_to_even_is_one_quant():
    graph = quantizers("RND_CONV", "SAT")
    nodes = [n for n in out.to_qonnx(graph).graph.node if n.name.startswith("Dense_0/input")]
    assert [n.op_type for n in nodes] == ["Quant"] and nodes[0].domain == "qonnx.custom_op.general"
    found = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
    assert found == {"signed": 1, "narrow": 0, "rounding_mode": b"ROUND"}
    assert "Quant" not in out.op_counts(out.to_onnx(graph))


def test_kernels_carry_the_narrowest_quant_that_holds_them():
    from qonnx.core.modelwrapper import ModelWrapper

    graph = random_graphs.random_graph(np.random.default_rng(3), "dense", ("RND_CONV", "SAT"))
    model = ModelWrapper(out.to_qonnx(graph))
    products = model.get_nodes_by_op_type("MatMul")
    assert len(products) == 2
    for product in products:
        producer: Any = model.find_producer(product.input[1])
        assert producer.op_type == "Quant"
        value, scale, bits = (np.asarray(model.get_initializer(producer.input[j])) for j in (0, 1, 3))
        codes = value / scale
        np.testing.assert_array_equal(codes, np.rint(codes))
        assert 2 <= bits <= 7 and np.abs(codes).max() <= 2 ** (bits - 1)


def dense8(overflow: str = "SAT", bits: int = 8) -> Graph:
    """A dense layer with a relu whose sites QuantizeLinear can say."""
    rng = np.random.default_rng(5)
    nodes = [Node("input", (), (1, 1, 6), dict(k=1, i=3, f=4), "x")]

    def quantize(x, shape, k, i, name):
        form = {a: np.full(shape, v, np.int64) for a, v in zip("kif", (k, i, bits - k - i), strict=True)}
        nodes.append(Node("quantize", (x,), shape, {**form, "rounding": "RND_CONV", "overflow": overflow}, name))
        return len(nodes) - 1

    x = quantize(0, (1, 1, 6), 1, 2, "Dense_0/input")
    kernel = rng.integers(-60, 60, (1, 6, 5)) * 2.0 ** rng.integers(-7, -4, (1, 1, 5))
    nodes.append(Node("const", (), (1, 6, 5), {"value": kernel}))
    nodes.append(Node("dot", (x, len(nodes) - 1), (1, 1, 5), {}, "Dense_0/kernel"))
    nodes.append(Node("const", (), (1, 1, 5), {"value": np.zeros((1, 1, 5))}))
    nodes.append(Node("max", (len(nodes) - 2, len(nodes) - 1), (1, 1, 5)))
    last = quantize(len(nodes) - 1, (1, 1, 5), 0, 2, "output")
    return validate(Graph(tuple(nodes), (0,), (last,)))


def test_a_wrong_weight_is_seen():
    """The comparison of these tests fails when one constant is off by one step."""
    graph = dense8()
    model = out.to_onnx(graph)
    (kernel,) = [t for t in model.graph.initializer if list(t.dims) == [6, 5]]
    value = onnx.numpy_helper.to_array(kernel).copy()
    value[2, 3] += 2.0**-5
    kernel.CopyFrom(onnx.numpy_helper.from_array(value, kernel.name))
    x = port_grid(graph, 200, np.random.default_rng(2))
    assert (out.execute(model, x) != flatten_batch(emulate(graph, x))).any()


@pytest.mark.parametrize(("overflow", "bits"), [("SAT", 8), ("SAT", 5), ("SAT_SYM", 8), ("SAT_SYM", 6)])
def test_qdq_runs_in_onnxruntime(overflow, bits):
    graph = dense8(overflow, bits)
    model = out.to_qdq(graph)
    counts = out.op_counts(model)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 4 and "Quant" not in counts  # port, kernel, two sites
    x = port_grid(graph, 500, np.random.default_rng(0))
    np.testing.assert_array_equal(out.execute(model, x), flatten_batch(emulate(graph, x)))


def test_qdq_refuses_what_quantize_linear_can_not_say():
    with pytest.raises(LoweringError, match=r"%1 quantize 'q': RND .* half to even"):
        out.to_qdq(quantizers("RND", "SAT"))
    with pytest.raises(LoweringError, match=r"'Dense_0/input': .* WRAP can't be said"):
        out.to_qdq(dense8("WRAP", 7))
    with pytest.raises(LoweringError, match="several axes"):
        out.to_qdq(quantizers("RND_CONV", "SAT"))
    with pytest.raises(LoweringError, match="10 bits, QuantizeLinear is written for 8"):
        out.to_qdq(dense8("SAT_SYM", 10))


def test_the_file_is_the_model(tmp_path):
    graph = dense8()
    model = out.to_qonnx(graph, tmp_path / "model.onnx", name="demo")
    assert model.graph.name == "demo" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert onnx.load(str(tmp_path / "model.onnx")) == model


def test_qonnx_transformations_take_the_model():
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.transformation.infer_shapes import InferShapes

    graph = quantizers("RND", "SAT")
    model = ModelWrapper(out.to_qonnx(graph)).transform(InferShapes()).transform(InferDataTypes(allow_scaledint_dtypes=True))
    found = [n for n in model.get_nodes_by_op_type("Quant") if n.name.startswith("Dense_0/input")]
    assert str(model.get_tensor_datatype(found[0].output[0])) == "SCALEDINT<6>"
    x = port_grid(graph, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(out.execute(model.model, x, engine="qonnx"), flatten_batch(emulate(graph, x)))


def test_the_benchmark_counts_what_differs():
    path = Path(__file__).parents[2] / "benchmarks" / "hardware_qonnx.py"
    spec = importlib.util.spec_from_file_location("hardware_qonnx", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    (line,) = benchmark.zoo_lines({"dense": dense8()}, 100)
    assert (line["model"], line["holds"], line["vectors"], line["qonnx"], line["onnxruntime"]) == ("dense", True, 112, 0, 0)
    assert line["returns"] is True and line["varying"] == 5 and line["ops"]["MatMul"] == 1


def test_a_constant_output_has_the_batch():
    x = Node("input", (), (3,), dict(k=0, i=2, f=0))
    c = Node("const", (), (2, 1), {"value": np.array([[1.5], [2.0]])})
    graph = validate(Graph((x, c, Node("concat", (1, 0), (5,))), (0,), (1, 2)))
    equal(graph, port_grid(graph, 7, np.random.default_rng(0)))


def test_execute_says_what_does_not_fit():
    model = out.to_onnx(dense8())
    with pytest.raises(LoweringError, match="engine is 'onnxrt'; did you mean"):
        out.execute(model, np.zeros((1, 1, 1, 6)), engine="onnxrt")
    with pytest.raises(DataError, match=r"takes \(N, 1, 1, 6\)"):
        out.execute(model, np.zeros((1, 6)))
    with pytest.raises(DataError, match="1 inputs, got 2"):
        out.execute(model, [np.zeros((1, 1, 1, 6))] * 2)
    with pytest.raises(LoweringError, match="no input"):
        c = Node("const", (), (2,), {"value": np.ones(2)})
        out.to_onnx(Graph((c,), (), (0,)))
