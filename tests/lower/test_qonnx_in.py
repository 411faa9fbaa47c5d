"""QONNX files in: the integers of qonnx's own executor, in the graph and in the JAX model, or an error that names the node."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax._errors import LoweringError
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph
from tests.lower import random_graphs

onnx = pytest.importorskip("onnx", reason="no onnx: pip install onnx")
pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install onnxruntime")
qonnx = pytest.importorskip("qonnx", reason="no qonnx: pip install qonnx")
out = importlib.import_module("pquant_jax.lower.backends.onnx")
DATA = Path(str(qonnx.__file__)).parent / "data" / "onnx"


class Writer:
    """Nodes of a file by hand, as exporters write them."""

    def __init__(self, domain: str = "qonnx.custom_op.general") -> None:
        self.domain, self.nodes, self.values = domain, [], {}

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.values)}"
        self.values[name] = np.asarray(value, dtype)
        return name

    def add(self, op: str, *inputs: Any, **attrs: Any) -> str:
        names = [v if isinstance(v, str) else self.const(v) for v in inputs]
        name = f"{op}_{len(self.nodes)}"
        domain = self.domain if "Quant" in op else ""
        self.nodes.append(onnx.helper.make_node(op, names, [f"{name}_out"], name=name, domain=domain, **attrs))
        return f"{name}_out"

    def quant(
        self, x: Any, scale: Any, bits: int, signed: int = 1, narrow: int = 0, mode: str = "ROUND", zero: float = 0.0
    ) -> str:
        return self.add("Quant", x, np.asarray(scale), zero, float(bits), signed=signed, narrow=narrow, rounding_mode=mode)

    def model(self, shape: tuple[int, ...], result: str, out_shape: tuple[int | None, ...], opset: int = 13) -> Any:
        info = onnx.helper.make_tensor_value_info
        tensors = [onnx.numpy_helper.from_array(v, n) for n, v in self.values.items()]
        inputs, outputs = [info("global_in", 1, shape)], [info(result, 1, out_shape)]
        body = onnx.helper.make_graph(self.nodes, "net", inputs, outputs, tensors)
        domains = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(self.domain, 1)]
        return onnx.helper.make_model(body, opset_imports=domains, ir_version=8)


def agrees(model: Any, imported: lower.Imported, traced: bool = True) -> Graph:
    """The graph and, with `traced`, that of the instrumented JAX model give what qonnx's executor gives; returns the former."""
    x = port_grid(imported.graph, 60, np.random.default_rng(0))
    want = out.execute(model, x, engine="qonnx")
    assert len(np.unique(want)) > 5
    np.testing.assert_array_equal(flatten_batch(emulate(imported.graph, x)), want)
    if traced:
        np.testing.assert_array_equal(flatten_batch(emulate(lowered(imported), x)), want)
    return imported.graph


def lowered(imported: lower.Imported) -> Graph:
    inst = pq.instrument(imported.model, imported.sample, inputs=imported.inputs)
    assert {name for name, spec in inst.sites.items() if spec.format is None} == set()
    chain = pq.quantize.fixed(inst.sites)
    params = chain.attach(imported.model.params)
    return lower.trace(inst, chain.apply(params, chain.init(params))[0], imported.model.state)


def brevitas() -> Any:
    """A convolutional net as Brevitas exports it: per-channel weight scales, narrow weights, unsigned activations after Relu."""
    rng, w = np.random.default_rng(0), Writer("onnx.brevitas")
    x = w.quant("global_in", 2.0**-4, 7)
    kernel = w.quant(rng.normal(0, 0.4, (4, 2, 3, 3)), 2.0 ** rng.integers(-4, -1, (4, 1, 1, 1)), 4, narrow=1)
    y = w.add("Conv", x, kernel, dilations=[1, 1], group=1, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    ones = np.ones(4)
    y = w.add(
        "BatchNormalization", y, [0.5, 1.0, 0.75, -0.5], [0.25, -0.125, 0.0, 0.5], 0 * ones, ones, epsilon=0.0, momentum=0.9
    )
    y = w.quant(w.add("Relu", y), 2.0**-3, 4, signed=0)
    y = w.add("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0])
    depthwise = w.quant(rng.normal(0, 0.6, (4, 1, 2, 2)), 0.125, 4, narrow=1)
    y = w.add(
        "Conv", y, depthwise, rng.integers(-8, 8, 4) / 16, group=4, kernel_shape=[2, 2], strides=[1, 1], auto_pad="SAME_UPPER"
    )
    y = w.quant(w.add("Relu", y), 0.25, 3, signed=0)
    y = w.add("GlobalAveragePool", y)
    y = w.add("Flatten", y, axis=1)
    dense = w.quant(rng.normal(0, 0.5, (5, 4)), 2.0 ** rng.integers(-4, -2, (5, 1)), 5, narrow=1)
    bias = w.quant(rng.normal(0, 0.5, 5), 2.0**-6, 8)
    y = w.add("Gemm", y, dense, bias, alpha=1.0, beta=1.0, transB=1)
    return w.model((1, 2, 4, 4), w.quant(y, 2.0**-5, 8), (1, 5))


def qkeras() -> Any:
    """A net as qonnx's Keras converter writes one: channels last between transposes, MatMul and Add, a multiplied average."""
    rng, w = np.random.default_rng(1), Writer()
    x = w.quant("global_in", 2.0**-3, 8)
    y = w.add("Transpose", x, perm=[0, 3, 1, 2])
    kernel = w.quant(rng.normal(0, 0.5, (3, 2, 2, 2)), 0.25, 4, narrow=1)
    y = w.add("Conv", y, kernel, kernel_shape=[2, 2], strides=[2, 2])
    y = w.add("Transpose", y, perm=[0, 2, 3, 1])
    y = w.quant(w.add("Add", y, rng.integers(-4, 4, (1, 1, 1, 3)) / 8), 2.0**-2, 6, signed=0, mode="FLOOR")
    y = w.add("Reshape", y, w.const([-1, 12], np.int64))
    y = w.add("MatMul", y, w.quant(rng.normal(0, 0.5, (12, 4)), 0.25, 3, narrow=1))
    y = w.add("Add", y, w.quant(rng.normal(0, 0.5, 4), 0.25, 3, narrow=1))
    y = w.quant(w.add("Mul", y, 0.5), 0.125, 6, mode="HALF_UP")
    z = w.add("Concat", w.add("Neg", y), w.add("Clip", y, -0.5, 1.0), axis=1)
    return w.model((1, 4, 4, 2), z, (1, 8))


@pytest.mark.parametrize("style", [brevitas, qkeras])
def test_hand_made_files_of_both_styles(style):
    model = style()
    imported = lower.from_qonnx(model)
    graph = agrees(model, imported)
    assert sum(n.op == "dot" for n in graph.nodes) >= 2


def test_convolutions_and_pools_go_out_as_what_they_came_as():
    """File -> graph -> file: Conv with padding, MaxPool, a grouped Conv; the same integers in both engines."""
    graph = lower.from_qonnx(brevitas()).graph
    model = out.to_qonnx(graph)
    counts = out.op_counts(model)
    assert counts["Conv"] == 1 and counts["MaxPool"] == 1  # the grouped one has its channels in front: batched products
    x = port_grid(graph, 100, np.random.default_rng(3))
    want = flatten_batch(emulate(graph, x))
    np.testing.assert_array_equal(out.execute(model, x, engine="qonnx"), want)
    np.testing.assert_array_equal(out.execute(out.to_onnx(graph), x), want)
    np.testing.assert_array_equal(emulate(lower.from_qonnx(model).graph, x)[0], want)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [1, 1], "dilations": [2, 2]}),
        ("AveragePool", {"kernel_shape": [2, 4], "strides": [1, 2]}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("Conv", {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [0, 1, 2, 0], "dilations": [1, 2], "group": 3}),
        ("Conv", {"kernel_shape": [3, 3], "strides": [1, 2], "auto_pad": "SAME_LOWER"}),
    ],
)
def test_geometries(op, attributes):
    """Of windows, in and out again."""
    w = Writer()
    x, rest = w.quant("global_in", 2.0**-3, 6), []
    if op == "Conv":
        group = attributes.get("group", 1)
        values = np.random.default_rng(0).normal(0, 0.5, (6, 3 // group, *attributes["kernel_shape"]))
        rest = [w.quant(values, 0.25, 4)]
    shape = (1, 3, 5, 6)
    if "group" in attributes:  # seen as one only with the channels last, as JAX's own are
        shape = (1, 5, 6, 3)
        x = w.add("Transpose", x, perm=[0, 3, 1, 2])
    y = w.add(op, x, *rest, **attributes)
    y = w.add("Transpose", y, perm=[0, 2, 3, 1]) if "group" in attributes else y
    model = w.model(shape, y, (1, None, None, None))
    graph = agrees(model, lower.from_qonnx(model), traced=False)
    again = out.to_qonnx(graph)
    x = port_grid(graph, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(out.execute(again, x, engine="qonnx"), flatten_batch(emulate(graph, x)))
    assert op in out.op_counts(again)


def test_the_names_and_formats_are_those_of_the_file():
    imported = lower.from_qonnx(brevitas())
    assert imported.inputs == pq.InputSpec(k=1, i=2, f=4) and imported.sample.shape == (1, 2, 4, 4)
    inst = pq.instrument(imported.model, imported.sample, inputs=imported.inputs)
    kinds = {name: spec.kind for name, spec in inst.sites.items()}
    kernels = ["Conv_2/kernel", "BatchNormalization_3/scale", "Conv_8/kernel", "Gemm_15/kernel"]
    assert [n for n, kind in kinds.items() if kind == "kernel"] == kernels
    asked = inst.sites["Quant_5"].format
    assert (asked.k, asked.i, asked.f, asked.rounding, asked.overflow) == (0, 1.0, 3.0, "RND_CONV", "SAT")
    assert inst.roles["Gemm_15/kernel"].out_axes == (1,)


def test_the_model_can_be_compressed_further():
    imported = lower.from_qonnx(dense())
    inst = pq.instrument(imported.model, imported.sample, inputs=imported.inputs)
    chain = pq.chain(pq.prune.magnitude(sparsity=0.5), pq.quantize.fixed(inst.sites))
    params = chain.attach(imported.model.params)
    x = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 3)), jnp.float32)

    def loss(params):
        view, _ = chain.apply(params, chain.init(params))
        return jnp.sum(inst.forward(view, {}, x, train=True)[0] ** 2)

    gradient = jax.jit(jax.grad(lambda model: loss(params._replace(model=model))))(params.model)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("modes", [("RND", "WRAP"), ("RND_CONV", "WRAP_SM"), ("TRN_ZERO", "WRAP"), ("RND_MIN_INF", "SAT_SYM")])
@pytest.mark.parametrize("kind", ["dense", "residual"])
def test_round_trip_of_graphs(kind, modes):
    """Every quantizer comes back as the one that went, per element."""
    graph = random_graphs.random_graph(np.random.default_rng(7), kind, modes)
    graph = graph._replace(outputs=graph.outputs[:1])
    imported = lower.from_qonnx(out.to_qonnx(graph), inputs=_ports(graph))
    x = port_grid(graph, 200, np.random.default_rng(0))
    np.testing.assert_array_equal(emulate(imported.graph, x)[0], emulate(graph, x)[0])
    wanted, got = ([n for n in lower.simplify(g).nodes if n.op == "quantize"] for g in (graph, imported.graph))
    assert len(got) == len(wanted)


def _ports(graph: Graph) -> Any:
    return {
        f"x{'' if n == 0 else f'_{n}'}": pq.InputSpec(*(int(graph.nodes[j].attrs[a]) for a in "kif"))
        for n, j in enumerate(graph.inputs)
    }  # fmt: skip


def test_round_trip_of_a_model():
    """A model of ours, written and read: as many nodes, the same integers from the graph and from the JAX model."""

    def forward(params, x):
        return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]

    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (6, 5), "bias": (5,)}, "b": {"kernel": (5, 3)}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(0, 0.5, s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    inst = pq.instrument(pq.from_function(forward, params), jnp.zeros((1, 6)), outputs=True)
    chain = pq.quantize.fixed(inst.sites, activations=pq.quantize.Format(i=2, f=4, overflow="WRAP", granularity="tensor"))
    state = chain.attach(params)
    graph = lower.trace(inst, chain.apply(state, chain.init(state))[0], {})
    imported = lower.from_qonnx(out.to_qonnx(graph))
    assert imported.inputs == pq.InputSpec(1, 5, 10)
    assert set(pq.instrument(imported.model, imported.sample, inputs=imported.inputs).sites) >= set(inst.sites)
    x = port_grid(graph, 300, np.random.default_rng(1))
    for found in (imported.graph, lowered(imported)):
        np.testing.assert_array_equal(emulate(found, x)[0], emulate(graph, x)[0])
    assert len(lower.simplify(imported.graph).nodes) == len(lower.simplify(graph).nodes)


def test_tables_come_back_and_have_a_gradient():
    def forward(params, x):
        return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(0, 0.5, s), jnp.float32) for s in ((4, 3), (3, 2)))
    inst = pq.instrument(pq.from_function(forward, {"a": {"kernel": a}, "b": {"kernel": b}}), jnp.zeros((1, 4)))
    chain = pq.quantize.fixed(inst.sites, activations=pq.quantize.Format(i=1, f=4, k=1, granularity="tensor"))
    state = chain.attach(inst.model.params)
    graph = lower.trace(inst, chain.apply(state, chain.init(state))[0], {})
    assert sum(n.op == "table" for n in graph.nodes) == 1
    imported = lower.from_qonnx(out.to_qonnx(graph))
    x = port_grid(graph, 300, np.random.default_rng(1))
    for found in (imported.graph, lowered(imported)):
        assert sum(n.op == "table" for n in found.nodes) == 1
        np.testing.assert_array_equal(emulate(found, x)[0], emulate(graph, x)[0])
    params, x = imported.model.params, jnp.full((1, 4), 0.3)
    gradient = jax.grad(lambda p: jnp.sum(imported.model.forward(p, {}, x, train=False, rng=None)[0]))(params)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


def test_bipolar_weights():
    rng, w = np.random.default_rng(0), Writer()
    y = w.add("MatMul", w.quant("global_in", 0.25, 5), w.add("BipolarQuant", rng.normal(0, 1, (6, 4)), 0.5))
    y = w.add("MatMul", w.quant(y, 0.5, 5), w.quant(rng.normal(0, 1, (4, 3)), 1.0, 1))
    model = w.model((1, 6), y, (1, 3))
    agrees(model, lower.from_qonnx(model), traced=False)


def test_a_bipolar_activation():
    w = Writer()
    y = w.add("BipolarQuant", w.quant("global_in", 0.25, 5), 0.5)
    model = w.model((1, 3), w.add("MatMul", y, w.quant(np.random.default_rng(0).normal(0, 1, (3, 4)), 0.25, 4)), (1, 4))
    imported = lower.from_qonnx(model)
    x = port_grid(imported.graph, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(flatten_batch(emulate(imported.graph, x)), out.execute(model, x, engine="qonnx"))


def dense(x: str = "global_in", w: Writer | None = None, **quant: Any) -> Any:
    w = Writer() if w is None else w
    at: dict[str, Any] = {"scale": 0.25, "bits": 4, **quant}
    return w.model((1, 3), w.quant(w.add("MatMul", w.quant(x, 0.5, 6), np.eye(3)), **at), (1, 3))


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"scale": 0.3}, r"Quant 'Quant_2': its scale 0.3 is no power of two.*POWER_OF_TWO"),
        ({"zero": 1.0}, r"Quant 'Quant_2': its zero point is not 0"),
        ({"mode": "CEIL"}, r"Quant 'Quant_2': rounding mode 'CEIL' has no fixed-point form"),
        ({"mode": "UP"}, r"Quant 'Quant_2': rounding mode 'UP'"),
        ({"signed": 0, "narrow": 1}, r"Quant 'Quant_2': unsigned and narrow"),
        ({"bits": 3.5}, r"Quant 'Quant_2': its bit width must be a constant"),
    ],
)
def test_what_no_format_says_is_refused(quant, message):
    with pytest.raises(LoweringError, match=message):
        lower.from_qonnx(dense(**quant))


def test_errors_name_the_node():
    w = Writer()
    with pytest.raises(LoweringError, match=r"Softmax 'Softmax_1': has no form here"):
        lower.from_qonnx(w.model((1, 3), w.add("Softmax", w.quant("global_in", 0.5, 6)), (1, 3)))
    w = Writer()
    with pytest.raises(LoweringError, match=r"the input 'global_in' has no Quant behind it"):
        lower.from_qonnx(w.model((1, 3), w.add("Relu", "global_in"), (1, 3)))
    with pytest.raises(LoweringError, match=r"no input 'globl_in'; did you mean 'global_in'"):
        lower.from_qonnx(dense(), inputs={"globl_in": pq.InputSpec()})
    w = Writer()
    with pytest.raises(LoweringError, match=r"MatMul 'MatMul_1': a constant without a Quant takes 2\d bits .*constant_bits"):
        lower.from_qonnx(w.model((1, 1), w.add("MatMul", w.quant("global_in", 0.5, 6), [[0.1]]), (1, 1)))
    w = Writer()
    with pytest.raises(LoweringError, match=r"AveragePool 'AveragePool_1': a mean of 9 elements"):
        pooled = w.add("AveragePool", w.quant("global_in", 0.5, 6), kernel_shape=[3, 3])
        lower.from_qonnx(w.model((1, 1, 3, 3), pooled, (1, 1, 1, 1)))
    w = Writer()
    with pytest.raises(LoweringError, match=r"Transpose 'Transpose_1': perm \(1, 0\) moves the batch"):
        lower.from_qonnx(w.model((1, 3), w.add("Transpose", w.quant("global_in", 0.5, 6), perm=[1, 0]), (3, 1)))


def test_a_wider_port_keeps_the_first_quantizer():
    imported = lower.from_qonnx(dense(), inputs=pq.InputSpec(1, 6, 4))
    assert imported.graph.nodes[0].attrs["f"] == 4
    agrees(dense(), imported, traced=False)


def test_constants_without_a_quant_are_put_on_a_grid():
    w = Writer()
    y = w.add("MatMul", w.quant("global_in", 0.5, 6), w.quant([[0.5], [-0.25]], 0.25, 3))
    model = w.model((1, 2), w.quant(w.add("Add", y, [0.3]), 0.125, 8), (1, 1))
    imported = lower.from_qonnx(model, constant_bits=8)
    assert imported.model.params["MatMul_2"]["bias"].tolist() == [round(0.3 * 512) / 512]
    agrees(model, imported, traced=False)  # far finer than the quantizer behind it


def spread(values: np.ndarray, step: float) -> np.ndarray:
    return (np.rint(values / step) * step).astype(np.float32)


def on_power_of_two_scales(model: Any, size: int) -> Any:
    """A file of qonnx's own test data with its scales rounded to powers of two, fused BatchNorms on a grid, and a small input."""
    values = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Quant":
            scale = np.maximum(values[node.input[1]], 2.0**-12)
            values[node.input[1]] = np.exp2(np.rint(np.log2(scale))).astype(np.float32)
        elif node.op_type == "BatchNormalization":
            gamma, beta, mean, variance = (values[n] for n in node.input[1:])
            values[node.input[1]] = spread(gamma / np.sqrt(variance + 1e-5), 2.0**-5)
            values[node.input[2]], values[node.input[3]] = (
                spread(beta - mean * gamma / np.sqrt(variance + 1e-5), 2.0**-8),
                0 * mean,
            )
            values[node.input[4]] = np.ones_like(mean)
            next(a for a in node.attribute if a.name == "epsilon").f = 0.0
        elif node.op_type == "Conv" and len(node.input) == 3:
            values[node.input[2]] = spread(values[node.input[2]], 2.0**-8)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    for info in (*model.graph.input, *model.graph.output):
        dims = info.type.tensor_type.shape.dim
        if info.name not in values:
            dims[2].dim_value = dims[3].dim_value = size * (2 if info in model.graph.output else 1)
    while model.graph.value_info:
        model.graph.value_info.pop()
    return model


@pytest.mark.parametrize("variant", ["subpixel", "nn_resize"])
def test_a_brevitas_file_of_qonnx(variant):
    path = DATA / "bsd300x3-espcn" / variant / "quant_model.onnx"
    if not path.exists():
        pytest.skip("this qonnx comes without its test data")
    with pytest.raises(LoweringError, match=r"Quant '.*': its scale .* is no power of two"):
        lower.from_qonnx(path, inputs=pq.InputSpec(0, 0, 8))
    model = on_power_of_two_scales(onnx.load(str(path)), 2)
    imported = lower.from_qonnx(model, inputs=pq.InputSpec(0, 0, 8))
    assert sum(n.op == "dot" for n in imported.graph.nodes) == 4
    x = port_grid(imported.graph, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(flatten_batch(emulate(imported.graph, x)), out.execute(model, x, engine="qonnx"))
