"""Convolutions, pools, gathers and scatters: the graph's integers are those of the jitted forward, whatever the window."""

from __future__ import annotations

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
from pquant_jax.lower import Graph
from pquant_jax.lower._build import Op
from pquant_jax.lower._rules import pick
from pquant_jax.lower._windows import windows
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.numerics import build_table, lookup


def traced(function: Callable, shape: tuple[int, ...], w: Any = None) -> tuple[pq.Instrumented, pq.View, Graph]:
    """A function of a batch, and of a kernel if there is one; every site in 6 bits."""
    forward = (lambda p, x: function(x)) if w is None else lambda p, x: function(x, p["w"])
    params = {} if w is None else {"w": w}
    inst = pq.instrument(pq.from_function(forward, params), np.zeros((2, *shape)), inputs=pq.InputSpec(1, 2, 2))
    view = pq.View(params, {n: pq.kif(1, 3, 2, overflow="WRAP") for n in inst.sites}, {})
    return inst, view, lower.trace(inst, view, {})


def equal(function: Callable, shape: tuple[int, ...], w: Any = None, netlist: bool = False) -> np.ndarray:
    """Outputs, after the jitted forward and the graph were found equal on 60 vectors of the whole port."""
    inst, view, graph = traced(function, shape, w)
    inputs = port_grid(graph, 60, np.random.default_rng(0))
    expected = flatten_batch(emulate(graph, inputs))
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, {}, inputs), expected)
    if netlist:
        np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), flatten_batch(inputs)), expected)
    assert len(np.unique(expected)) > 1
    return expected


def kernel(*shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(1).integers(-6, 7, shape) / 4, jnp.float32)


@st.composite
def convolutions(draw: Callable) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(rank))  # noqa: E731
    groups, per_group, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = tuple((draw(st.integers(-1, 2)), draw(st.integers(-1, 2))) for _ in range(rank))
    orders = [draw(st.permutations(range(rank + 2))) for _ in range(3)]
    return dict(
        space=each(2, 4 if rank < 3 else 3), size=each(1, 2), strides=each(1, 2), padding=padding, dilation=each(1, 2),
        base=each(1, 2), groups=groups, channels=groups * per_group, outputs=groups * outputs, orders=orders,
    )  # fmt: skip


@settings(max_examples=20)
@given(convolutions())
def test_any_convolution(c):
    """Any rank, order of axes, stride, padding (negative too), dilation of both operands and number of groups."""
    spec = lax.ConvDimensionNumbers(*(tuple(o) for o in c["orders"]))
    shape = np.empty(len(c["space"]) + 2, int)
    shape[list(spec.lhs_spec)] = (1, c["channels"], *c["space"])
    shape[list(spec.rhs_spec)], x_shape = (c["outputs"], c["channels"] // c["groups"], *c["size"]), tuple(shape)
    w = kernel(*shape)
    at = spec.lhs_spec[0]

    def forward(x, w):
        x = jnp.moveaxis(x, 0, at)
        y = lax.conv_general_dilated(
            x, w, c["strides"], c["padding"], c["base"], c["dilation"], spec, feature_group_count=c["groups"]
        )  # fmt: skip
        return jnp.moveaxis(y, spec.out_spec[0], 0)

    sample = x_shape[:at] + x_shape[at + 1 :]
    out = jax.eval_shape(forward, np.zeros((1, *sample), np.float32), w).shape
    if 0 in out:
        return
    inst, view, graph = traced(forward, sample, w)
    inputs = port_grid(graph, 30, np.random.default_rng(0))
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, {}, inputs), flatten_batch(emulate(graph, inputs)))


@settings(max_examples=15)
@given(
    st.sampled_from([lax.add, lax.max, lax.min]), st.booleans(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 2),
    st.tuples(st.integers(0, 1), st.integers(0, 1)),
)  # fmt: skip
def test_any_pool(reduce, own_start, stride, dilation, base, padding):
    """Sums, maxima and minima with padding, which extremes must not see, and from any starting number."""
    neutral = {lax.add: 0.0, lax.max: -jnp.inf, lax.min: jnp.inf}[reduce]
    start = 0.5 if own_start else neutral

    def forward(x):
        return lax.reduce_window(
            x, jnp.float32(start), reduce, (1, 2, 2), (1, stride, 1), ((0, 0), padding, padding), (1, base, 1), (1, 1, dilation)
        )  # fmt: skip

    equal(forward, (4, 3))


CONVOLUTIONS: dict[str, tuple[Callable, tuple[int, ...], Any]] = {
    "conv": (lambda x, w: lax.conv(x, w, (1, 1), "SAME"), (2, 3, 3), kernel(3, 2, 2, 2)),
    "depthwise": (lambda x, w: lax.conv_general_dilated(x, w, (1,), "SAME", feature_group_count=2), (2, 5), kernel(4, 1, 2)),
    "transposed": (lambda x, w: lax.conv_transpose(x, w, (2,), "SAME"), (3, 2), kernel(3, 2, 2)),
}  # fmt: skip
FIXED: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "max pool with padding": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), ((0, 0), (1, 1), (1, 1))), (4, 4),
    ),
    "gather": (lambda x: x[:, jnp.asarray([2, 0, 0, -1])], (4,)),
    "gather of pairs": (lambda x: x[:, jnp.asarray([0, 1]), jnp.asarray([1, 2])], (2, 3)),
    "take": (lambda x: jnp.take(x, jnp.asarray([[1, 0], [2, 2]]), axis=1), (3, 2)),
    "take beyond the end": (lambda x: jnp.take(x, jnp.asarray([1, 9]), axis=1, fill_value=0.5, mode="fill"), (3,)),
    "take clipped": (lambda x: jnp.take(x, jnp.asarray([1, 9]), axis=1, mode="clip"), (3,)),
    "gather at both ends": (lambda x: (x[:, jnp.asarray([0, 1])] - x[:, jnp.asarray([1, 2])]) * 0.5, (3, 2)),
    "dynamic slice": (lambda x: lax.dynamic_slice(x, (0, 1), (x.shape[0], 2)), (4,)),
    "dynamic update": (lambda x: lax.dynamic_update_slice(x, 2 * x[:, :2], (0, 1)), (4,)),
    "set": (lambda x: x.at[:, 1].set(2 * x[:, 0]), (3,)),
    "set a constant": (lambda x: x.at[:, jnp.asarray([0, 2])].set(0.25), (3,)),
    "add twice": (lambda x: x.at[:, jnp.asarray([0, 2, 0])].add(x[:, ::-1]), (3,)),
    "add beyond the end": (lambda x: x.at[:, jnp.asarray([0, 7])].add(x[:, :2]), (3,)),
    "maximum at": (lambda x: x.at[:, jnp.asarray([1, 1])].max(-x[:, :2]), (3,)),
    "minimum at": (lambda x: x.at[:, jnp.asarray([0, 1])].min(x[:, ::-1][:, :2]), (3,)),
    "segment_sum": (lambda x: jax.vmap(lambda v: jax.ops.segment_sum(v, jnp.asarray([0, 2, 0, 1]), 3))(x), (4, 2)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2))), (3,)),
    "pad by a number": (lambda x: lax.pad(x, jnp.float32(0.5), [(0, 0, 0), (1, -1, 2)]), (3,)),
    "pad at the edge": (lambda x: jnp.pad(x, ((0, 0), (1, 2)), mode="edge"), (3,)),
    "pad, reflected": (lambda x: jnp.pad(x, ((0, 0), (2, 2)), mode="reflect"), (3,)),
    "constants and data": (lambda x: jnp.concatenate([jnp.ones((len(x), 2)), x], 1), (3,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_exact(name):
    function, shape = FIXED[name]
    equal(function, shape, netlist=name in ("max pool with padding", "take beyond the end", "add twice"))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    function, shape, w = CONVOLUTIONS[name]
    equal(function, shape, w, netlist=name == "depthwise")


def test_cumulative_sum_has_log_depth():
    _, _, graph = traced(lambda x: jnp.cumsum(x, 1), (9,))
    assert [n.op for n in graph.nodes].count("add") == 4


def test_windows_of_an_array_that_is_too_small():
    assert windows((2,), (3,), (1,), [(0, 0)]).shape == (0, 3)
    assert windows((2,), (2,), (1,), [(-1, 0)]).shape == (0, 2)


REFUSED: dict[str, tuple[Callable, str]] = {
    "index from data": (lambda x: jax.vmap(lambda v: v[(v[0] > 0).astype(jnp.int32)])(x), r"index that depends on the data"),
    "start from data": (
        lambda x: jax.vmap(lambda v: lax.dynamic_slice(v, ((v[0] > 0).astype(jnp.int32),), (2,)))(x),
        r"depends on the data.*one-hot",
    ),
    "embedding": (lambda x: kernel(4, 2)[jnp.clip(x[:, 0], 0, 3).astype(jnp.int32)], r"'gather'.*depends on the data"),
    "not a number": (lambda x: jnp.take(x, jnp.asarray([1, 9]), axis=1, mode="fill"), r"out of bounds.*it gives nan"),
    "empty window": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1), (1, 1), ((0, 0), (1, 0))), r"nothing but padding; use less",
    ),
    "other windows": (
        lambda x: lax.reduce_window(x, jnp.float32(1), lax.mul, (1, 2), (1, 1), "VALID"),
        r"window reduced by \['mul'\].*sums, maxima",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, message = REFUSED[name]
    with pytest.raises(pq.LoweringError, match=message):
        traced(function, (4,))


def test_table_node():
    """`lookup` becomes one node that carries the table and the format of its input, spread over the elements."""
    source = pq.kif(1, jnp.asarray([1.0, 2.0]), 1.0)
    table = build_table(jnp.abs, source, pq.kif(0, 2, 1), (2,), "abs")
    eqn = jax.make_jaxpr(lambda x: lookup(x, source, table))(jnp.zeros((1, 2))).eqns[-1]
    assert eqn.primitive.name == "lookup"
    build = [lower.Node("input", (), (1, 2), {"k": 1, "i": 2, "f": 1}, "input")]
    formats = [np.asarray(v, np.float32) for v in (source.k, source.i, source.f)]
    op = Op(build, eqn, [0, *formats, *(np.asarray(v) for v in table)], (1, 2), "x/table")
    node = build[pick(eqn)(op)]
    assert (node.op, node.inputs, node.shape, node.name) == ("table", (0,), (1, 2), "x/table")
    assert set(node.attrs) == {"k", "i", "f", "codes", "which", "f_out"}
    assert all(v.dtype == np.int64 for v in node.attrs.values())
    np.testing.assert_array_equal(node.attrs["i"], [[1, 2]])
    np.testing.assert_array_equal(node.attrs["which"], np.asarray(table.which)[None])
    np.testing.assert_array_equal(node.attrs["codes"], table.codes)
    np.testing.assert_array_equal(node.attrs["f_out"], table.f)
    with pytest.raises(pq.LoweringError, match=r"can't lower a table .*depend on the data"):
        pick(eqn)(op._replace(ins=[0, 0, *op.ins[2:]]))
