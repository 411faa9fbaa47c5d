"""Layers found in a graph compute its values, whatever the graph, and those that a model was written with are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower.emulate import port_grid, trace_values
from pquant_jax.lower.ir import Graph, Node
from pquant_jax.lower.passes import simplify
from pquant_jax.lower.structure import Layer, structure
from tests.lower.layer_executor import execute
from tests.lower.random_graphs import KINDS, random_graph


def same(graph: Graph, n: int = 20) -> tuple[Layer, ...]:
    """The layers, after every value that they give was found equal to the emulator's."""
    layers = structure(graph)
    inputs = port_grid(graph, n, np.random.default_rng(0))
    expected = trace_values(graph, inputs)
    for j, value in execute(graph, layers, inputs).items():
        np.testing.assert_array_equal(value, np.broadcast_to(expected[j], value.shape), err_msg=str(j))
    assert {*graph.outputs, *graph.inputs} <= {layer.output for layer in layers}
    return layers


def traced(function: Callable, shape: tuple[int, ...], w: Any = None) -> Graph:
    """A function of a batch, and of a kernel if there is one; every site in 6 bits."""
    forward = (lambda p, x: function(x)) if w is None else lambda p, x: function(x, p["w"])
    params = {} if w is None else {"w": w}
    inst = pq.instrument(pq.from_function(forward, params), np.zeros((2, *shape)), inputs=pq.InputSpec(1, 2, 2))
    view = pq.View(params, {n: pq.kif(1, 3, 2, overflow="WRAP") for n in inst.sites}, {})
    return lower.trace(inst, view, {})


def kernel(*shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).integers(-6, 7, shape) / 4, jnp.float32)


def only(layers: tuple[Layer, ...], op: str) -> Layer:
    (found,) = [layer for layer in layers if layer.op == op]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.booleans())
def test_random_graphs(seed, kind, simple):
    graph = random_graph(np.random.default_rng(seed), kind)
    same(simplify(graph) if simple else graph, 8)


@st.composite
def convolutions(draw: Callable) -> dict[str, Any]:
    rank = draw(st.integers(1, 2))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    groups, per_group, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    return dict(
        space=each(3, 6), size=each(1, 3), strides=each(1, 2), padding=padding, dilation=each(1, 2),
        groups=groups, channels=groups * per_group, outputs=groups * outputs, last=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(convolutions())
def test_convolutions(c):
    """Found as `conv` or, where a kernel of one element is nothing else, as `dense`; never another value."""
    space = "HW"[: len(c["space"])]
    names = (f"N{space}C", f"{space}IO", f"N{space}C") if c["last"] else (f"NC{space}", f"OI{space}", f"NC{space}")
    shape = (*c["space"], c["channels"]) if c["last"] else (c["channels"], *c["space"])
    inner = c["channels"] // c["groups"]
    w = (*c["size"], inner, c["outputs"]) if c["last"] else (c["outputs"], inner, *c["size"])

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        options: dict[str, Any] = dict(rhs_dilation=c["dilation"], feature_group_count=c["groups"], dimension_numbers=names)
        return lax.conv_general_dilated(x, w, c["strides"], c["padding"], **options)

    try:
        graph = traced(conv, shape, kernel(*w))
    except pq.PQuantError:
        return  # more window than array
    if not graph.nodes[graph.outputs[0]].shape or 0 in graph.nodes[graph.outputs[0]].shape:
        return
    same(graph)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_geometry_of_a_convolution(groups, padding):
    w = kernel(3, 2, 4 // groups, 8)

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, w, (2, 1), padding, dimension_numbers=numbers, feature_group_count=groups)
        return jax.nn.relu(y + jnp.arange(8.0) / 4)

    layers = same(traced(conv, (7, 5, 4), w))
    found = only(layers, "conv")
    assert Counter(layer.op for layer in layers)["gather"] == 0
    geometry = found.attrs["geometry"]
    assert (geometry.space, geometry.size, geometry.strides, geometry.dilation) == ((7, 5), (3, 2), (2, 1), (1, 1))
    assert geometry.padding == (((1, 1), (0, 1)) if padding == "SAME" else ((0, 0), (0, 0)))
    assert found.attrs["groups"] == groups
    np.testing.assert_array_equal(found.attrs["kernel"], w)
    np.testing.assert_array_equal(found.attrs["bias"], np.arange(8) / 4)


def test_one_dimension_and_channels_first():
    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (1,), "SAME", rhs_dilation=(2,), dimension_numbers=("NCH", "OIH", "NCH"))

    geometry = only(same(traced(conv, (3, 9), kernel(2, 3, 3))), "conv").attrs["geometry"]
    assert (geometry.space, geometry.channels, geometry.channels_last, geometry.dilation) == ((9,), 3, False, (2,))


@pytest.mark.parametrize(
    ("kind", "init", "function"), [("max", -np.inf, lax.max), ("sum", 0.0, lax.add), ("min", np.inf, lax.min)]
)
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (0, 1))])
def test_geometry_of_a_pool(kind, init, function, padding):
    def pool(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, init, function, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), *padding, (0, 0)))

    layers = same(traced(pool, (7, 5, 2)))
    found = only(layers, "pool")
    assert (found.attrs["kind"], found.attrs["geometry"].strides) == (kind, (2, 2))
    assert "gather" not in {layer.op for layer in layers}


def test_average_and_reductions():
    def f(x: jax.Array) -> jax.Array:
        y = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        return y.sum((1, 2)) + y.max((1, 2))

    layers = same(traced(f, (4, 6, 3)))
    assert only(layers, "pool").attrs["kind"] == "average"
    kept = [
        (a.attrs["kind"], tuple(n for d, n in enumerate(a.attrs["in_shapes"][0]) if d not in a.attrs["axes"]))
        for a in layers
        if a.op == "reduce"
    ]
    assert sorted((kind, int(np.prod(shape))) for kind, shape in kept) == [("max", 3), ("sum", 3)]


def test_rearrangements_and_products():
    def f(x: jax.Array) -> tuple[jax.Array, ...]:
        a = jnp.einsum("nqd,nkd->nqk", x, x)
        b = jnp.concatenate([x.transpose(0, 2, 1), x[:, :3, :]], axis=2)
        return a, b, x[:, ::-1], jnp.broadcast_to(x[:, :, None, :], (len(x), 4, 2, 3)) * 2.0, jax.nn.leaky_relu(x, 0.25)

    ops = Counter(layer.op for layer in same(traced(f, (4, 3))))
    assert ops["einsum"] == ops["concat"] == ops["flip"] == ops["slice"] == ops["broadcast"] == ops["leaky_relu"] == 1
    assert ops["gather"] == 0


def test_scale_and_offset_of_a_channel():
    scale, offset = np.array([0.5, 2.0, 1.0]), np.array([0.25, 0.0, -1.0])
    x = Node("input", (), (4, 3), dict(k=1, i=2, f=1))
    c, d = (Node("const", (), (4, 3), dict(value=np.tile(v, (4, 1)))) for v in (scale, offset))
    graph = Graph((x, c, d, Node("mul", (0, 1), (4, 3)), Node("add", (2, 3), (4, 3))), (0,), (4,))
    layer = only(same(graph), "scale")
    np.testing.assert_array_equal(layer.attrs["scale"], scale)
    np.testing.assert_array_equal(layer.attrs["offset"], offset)


def test_what_is_read_elsewhere_is_not_swallowed():
    x = Node("input", (), (1, 1, 2), dict(k=1, i=2, f=0))
    w = Node("const", (), (1, 2, 3), dict(value=np.arange(6.0).reshape(1, 2, 3)))
    b = Node("const", (), (1, 1, 3), dict(value=np.ones((1, 1, 3))))
    graph = Graph((x, w, Node("dot", (0, 1), (1, 1, 3)), b, Node("add", (2, 3), (1, 1, 3))), (0,), (4, 2))
    assert [(a.op, a.output) for a in same(graph)] == [("input", 0), ("dense", 2), ("scale", 4)]


def test_a_window_that_is_off_by_one_element_is_a_gather():
    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))

    graph = traced(conv, (6, 2), kernel(3, 2, 2))
    at = next(j for j, n in enumerate(graph.nodes) if n.op == "take" and np.shape(n.attrs["index"]) == (1, 6, 6))
    index = np.array(graph.nodes[at].attrs["index"])
    index[0, 2, 1], index[0, 2, 2] = index[0, 2, 2], index[0, 2, 1]
    nodes = [*graph.nodes]
    nodes[at] = Node("take", nodes[at].inputs, nodes[at].shape, {"index": index}, nodes[at].name)
    ops = {a.op for a in same(Graph(tuple(nodes), graph.inputs, graph.outputs))}
    assert "conv" not in ops and {"gather", "dense"} <= ops
