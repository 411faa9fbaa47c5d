"""jaxpr -> graph: every operation that is lowered gives JAX's integers, every other one says why not and what to do.

Whatever is lowered here is compared three ways on vectors from the whole input port: jitted JAX forward, numpy
emulator, da4ml's netlist.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower import ir
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ranges import check_float32
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

PORT = pq.InputSpec(1, 2, 2)
F = pq.quantize.Format
WEIGHTS, ACTIVATIONS = F(1, 2, 1), F(2, 2, overflow="WRAP")


def compressed(model: pq.Model, x: Any, *, port: Any = PORT, weights: F = WEIGHTS, activations: F = ACTIVATIONS):
    """(inst, view) of a model with every site at a fixed format."""
    inst = pq.instrument(model, x, inputs=port)
    compression = pq.quantize.fixed(inst.sites, weights=weights, activations=activations)
    params = compression.attach(inst.model.params)
    return inst, jax.jit(lambda p: compression.apply(p, compression.init(p))[0])(params)


def three_ways(inst: pq.Instrumented, view: pq.View, state: Any = None, vectors: int = 400) -> tuple[ir.Graph, np.ndarray]:
    """(graph, outputs) after JAX, emulator and da4ml were found equal on `vectors` from the whole port."""
    state = inst.model.state if state is None else state
    graph = lower.trace(inst, view, state)
    inputs = port_grid(graph, vectors, np.random.default_rng(0))
    expected = flatten_batch(emulate(graph, inputs))
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, state, inputs), expected)
    np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), flatten_batch(inputs)), expected)
    return graph, expected


def graph_of(function: Callable, shape: tuple[int, ...] = (4,), params: Any = None, **options: Any) -> ir.Graph:
    inst, view = compressed(pq.from_function(function, params or {}), np.zeros((2, *shape), np.float32), **options)
    return lower.trace(inst, view, {})


def ops(graph: ir.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


SUPPORTED: dict[str, Callable] = {
    "add": lambda x: x + x[:, ::-1],
    "add constant": lambda x: x + 0.75,
    "sub": lambda x: 1.5 - x,
    "multiply by a constant": lambda x: -3.0 * x,
    "mul": lambda x: x * x[:, ::-1],
    "neg": lambda x: -x,
    "abs": lambda x: jnp.abs(x),
    "square": lambda x: jnp.square(x),
    "cube": lambda x: x**3,
    "first power": lambda x: x**1,
    "divide by a power of two": lambda x: x / 4,
    "divide by powers of two": lambda x: x / jnp.asarray([2.0, -0.5, 8.0, 1.0]),
    "max": lambda x: jnp.maximum(x, x[:, ::-1]),
    "min": lambda x: jnp.minimum(x, 0.5),
    "relu": lambda x: jax.nn.relu(x),
    "relu6": lambda x: jax.nn.relu6(4 * x),
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.25),
    "hard_tanh": lambda x: jax.nn.hard_tanh(x),
    "clip": lambda x: jnp.clip(x, -1.25, 2),
    "where": lambda x: jnp.where(x > x[:, ::-1], x, 2 * x),
    "where, scalar condition": lambda x: jnp.where(x.sum(1, keepdims=True) <= 0, x, -x),
    "greater": lambda x: (x > 0.25).astype(jnp.float32),
    "greater or equal": lambda x: (x >= x[:, ::-1]).astype(jnp.float32),
    "less": lambda x: (x < 0.25).astype(jnp.float32),
    "less or equal": lambda x: jnp.where(x <= 0.25, x, 0),
    "equal": lambda x: jnp.where(x == x[:, ::-1], x, 0),
    "not equal": lambda x: (x != 0.25).astype(jnp.float32),
    "bool": lambda x: x > 0,
    "count": lambda x: (x > 0).sum(1).astype(jnp.float32),
    "all bits": lambda x: jax.lax.reduce_precision(x, 8, 23),
    "floor": lambda x: jnp.floor(x),
    "ceil": lambda x: jnp.ceil(x),
    "round to even": lambda x: jnp.round(x),
    "round away from zero": lambda x: jax.lax.round(x),
    "sign": lambda x: jnp.sign(x),
    "whole part": lambda x: x.astype(jnp.int32).astype(jnp.float32),
    "to bool": lambda x: x.astype(bool),
    "and, or, not": lambda x: (x > 0) & ~(x[:, ::-1] > 1) | (x == -1),
    "exclusive or": lambda x: jnp.where((x > 0) ^ (x[:, ::-1] > 0), x, 0),
    "any and all": lambda x: ((x > 0).any(1), (x > -2).all(1)),
    "finite": lambda x: jnp.where(jnp.isfinite(x), x, 0),
    "unbounded": lambda x: jnp.minimum(jnp.maximum(x, -jnp.inf), jnp.asarray([1, jnp.inf, 0.5, jnp.inf])),
    "clip from below": lambda x: jax.lax.clamp(-0.5, x, jnp.inf),
    "three cases": lambda x: jax.lax.select_n(jnp.clip(x, 0, 2).astype(jnp.int32), x, 2 * x, 3 * x),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "reverse cumsum": lambda x: jax.lax.cumsum(x.reshape(-1, 2, 2), 2, reverse=True),
    "cummax": lambda x: jax.lax.cummax(x, 1),
    "reverse cummin": lambda x: jax.lax.cummin(x, 1, reverse=True),
    "split": lambda x: [v * n for n, v in enumerate(jnp.split(x, [1, 3], 1), 1)],
    "loop": lambda x: jax.lax.scan(lambda c, v: (c + v, c), 0 * x[:, 0], x.T)[1].T,
    "tanh": lambda x: jnp.tanh(x),
    "exp": lambda x: jnp.exp(x),
    "softmax": lambda x: jax.nn.softmax(x),
    "square root": lambda x: jnp.sqrt(jnp.abs(x)),
    "reciprocal": lambda x: x**-1,
    "divide by three": lambda x: x / 3,
    "divide by a value": lambda x: x / x[:, ::-1],
    "mean of three": lambda x: x[:, :3].mean(1),
    "barrier": lambda x: jnp.add(*jax.lax.optimization_barrier((x, 2 * x))),
    "concatenate": lambda x: jnp.concatenate([x, -x, jnp.ones_like(x)], 1),
    "slice": lambda x: x[:, 1:3],
    "strided slice": lambda x: x[:, ::2],
    "one element": lambda x: x[:, 0],
    "last element": lambda x: 2 * x[:, -1],
    "reverse": lambda x: x[:, ::-1],
    "roll": lambda x: jnp.roll(x, 1, 1),
    "reshape": lambda x: x.reshape(-1, 2, 2),
    "transpose": lambda x: x.reshape(-1, 2, 2).transpose(0, 2, 1),
    "broadcast": lambda x: x[:, :, None] + x[:, None, :],
    "repeat": lambda x: jnp.repeat(x, 2, 1),
    "sum": lambda x: x.sum(1),
    "sum, axes kept": lambda x: x.reshape(-1, 2, 2).sum((1, 2), keepdims=True),
    "sum of one axis": lambda x: x.reshape(-1, 2, 2).sum(1),
    "mean of four": lambda x: x.mean(1),
    "max of all": lambda x: x.max(1),
    "min of an axis": lambda x: x.reshape(-1, 2, 2).min(2),
    "residual": lambda x: x + jax.nn.relu(x - 1),
    "twice the same": lambda x: (x, x),
    "constant output": lambda x: (x, 0 * x + 0.5),
    "the input": lambda x: x,
    "checkpoint": lambda x: jax.checkpoint(lambda v: jnp.maximum(v, 0))(x),
    "stop_gradient": lambda x: jax.lax.stop_gradient(-x),
    "batched product": lambda x: jnp.einsum("bi,bj->bij", x, x),
    "quantize": lambda x: pq.numerics.quantize(x, pq.kif(1, 1, 1, overflow="WRAP")),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name):
    inst, view = compressed(pq.from_function(lambda p, x: SUPPORTED[name](x), {}), np.zeros((2, 4), np.float32))
    _, outputs = three_ways(inst, view, vectors=200)
    assert len(np.unique(outputs)) > 1


def test_values_are_those_of_numpy():
    """One operation of each kind against numpy, so that a mistake that all three share is seen."""
    inst, view = compressed(
        pq.from_function(lambda p, x: (x[:, ::-1] / 4, jnp.abs(x) - x**3, jnp.where(x > 0.5, x, 0.25), x.mean(1)), {}),
        np.zeros((2, 4), np.float32),
        activations=F(6, 6),
    )
    graph = lower.trace(inst, view, {})
    (x,) = port_grid(graph, 300, np.random.default_rng(1))
    for ours, want in zip(
        emulate(graph, [x]), (x[:, ::-1] / 4, np.abs(x) - x**3, np.where(x > 0.5, x, 0.25), x.mean(1)), strict=True
    ):
        np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize(("rounding", "overflow"), list(itertools.product(ROUNDINGS, OVERFLOWS)))
def test_every_mode_of_an_activation(rounding, overflow):
    """Formats per element, one of no width; the port overflows all of them."""
    k, i, f = jnp.asarray([1.0, 0, 1, 0]), jnp.asarray([1.0, 0, -1, -2]), jnp.asarray([0.0, 1, 1, 2])
    fmt = pq.kif(k, i, f, rounding=rounding, overflow=overflow)
    inst, view = compressed(pq.from_function(lambda p, x: pq.numerics.quantize(x, fmt), {}), np.zeros((2, 4), np.float32))
    _, outputs = three_ways(inst, view, vectors=100)
    assert np.all(outputs[:, 3] == 0) and all(len(np.unique(outputs[:, n])) > 1 for n in (0, 1))


def weights(rng: np.random.Generator, *shapes: tuple[int, int]) -> dict[str, Any]:
    return {
        n: {"kernel": jnp.asarray(rng.normal(0, 1, s), jnp.float32), "bias": jnp.asarray(rng.normal(0, 1, s[1]), jnp.float32)}
        for n, s in zip("abcd", shapes, strict=False)
    }


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def test_two_inputs_two_outputs():
    params = weights(np.random.default_rng(0), (3, 4), (2, 4), (4, 2))

    def forward(p, x):
        h = jax.nn.relu(dense(p["a"], x["left"]) + dense(p["b"], x["right"]))
        return {"logits": dense(p["c"], h), "score": h.max(1)}

    x = {"left": np.zeros((2, 3), np.float32), "right": np.zeros((2, 2), np.float32)}
    ports = {"left": pq.InputSpec(1, 2, 2), "right": pq.InputSpec(0, 3, 1)}
    inst, view = compressed(pq.from_function(forward, params), x, port=ports)
    graph, outputs = three_ways(inst, view)
    assert [graph.nodes[n].shape for n in graph.inputs] == [(3,), (2,)]
    assert [graph.nodes[n].attrs[p] for n in graph.inputs for p in "kif"] == [1, 2, 2, 0, 3, 1]
    assert [graph.nodes[n].shape for n in graph.outputs] == [(2,), ()]
    assert outputs.shape == (400, 3)


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_of_matmul(heads):
    """Products of two activations over axes that `jnp.matmul` squeezes where both operands have size 1."""
    rng = np.random.default_rng(0)
    params = {n: {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)} for n in "qkv"}

    def forward(p, x):
        q, k, v = ((x @ p[n]["kernel"]).reshape(-1, 2, heads, 4 // heads).swapaxes(1, 2) for n in "qkv")
        return jnp.maximum(q @ k.swapaxes(2, 3), 0) @ v

    _, outputs = three_ways(*compressed(pq.from_function(forward, params), np.zeros((2, 2, 3), np.float32)))
    assert len(np.unique(outputs)) > 10


class Net(nn.Module):
    """flax as everybody writes it: BatchNorm with running averages, a residual branch."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        h = h + nn.relu(nn.Dense(6)(h))
        return nn.Dense(3)(h)


@pytest.fixture(scope="module")
def net() -> tuple[pq.Instrumented, pq.View, Any]:
    """`Net` with statistics that are no powers of two."""
    inst, view = compressed(
        pq.from_linen(Net(), np.zeros((2, 4), np.float32)), np.zeros((2, 4), np.float32), port=pq.InputSpec(1, 3, 3)
    )
    rng = np.random.default_rng(0)
    stats = {"mean": jnp.asarray(rng.normal(0, 1, 6), jnp.float32), "var": jnp.asarray(rng.uniform(0.3, 3, 6), jnp.float32)}
    return inst, view, {"batch_stats": {"BatchNorm_0": stats}}


def test_batchnorm_of_flax_is_exact(net):
    """rsqrt, the running statistics, scale and bias are folded in float32; the fused scale and offset are quantized."""
    graph, outputs = three_ways(*net, vectors=2000)
    assert len(np.unique(outputs)) > 100
    assert "div" not in ops(graph) and set(ops(graph)) <= set(ir.ARITY)


def test_parameters_are_folded(net):
    """A constant is read by no other constant's computation: no node has constants alone as inputs."""
    graph = lower.trace(*net)
    for node in graph.nodes:
        assert not node.inputs or any(graph.nodes[j].op != "const" for j in node.inputs), node


def test_graph_is_pruned(net):
    """Every node is reached from an output; a model's dead branch leaves nothing behind."""
    for graph in (lower.trace(*net), graph_of(lambda p, x: (jnp.abs(x), (x**3).sum())[0])):
        needed = set(graph.outputs)
        for index in reversed(range(len(graph.nodes))):
            if index in needed:
                needed.update(graph.nodes[index].inputs)
        assert needed | set(graph.inputs) == set(range(len(graph.nodes)))
    assert "mul" not in ops(graph) and "abs" in ops(graph)


def test_unused_input_stays_a_port():
    x = {"used": np.zeros((2, 3), np.float32), "unused": np.zeros((2, 2), np.float32)}
    inst, view = compressed(pq.from_function(lambda p, x: jnp.abs(x["used"]), {}), x)
    graph = lower.trace(inst, view, {})
    assert [graph.nodes[n].shape for n in graph.inputs] == [(2,), (3,)]
    assert "abs" in ops(graph)


def test_rearrangements_are_one_gather():
    graph = graph_of(lambda p, x: x.reshape(-1, 2, 2).transpose(0, 2, 1).reshape(-1, 4)[:, ::-1][:, :3])
    assert ops(graph) == ["input", "take"]
    np.testing.assert_array_equal(graph.nodes[1].attrs["index"], [3, 1, 2])


def test_port_is_not_quantized_twice(net):
    """What comes through the port is on its grid; the first quantizer is that of the first site."""
    graph = lower.trace(*net)
    assert [n.name for n in graph.nodes if n.op == "quantize"][0] == "Dense_0/input"
    assert ops(graph_of(lambda p, x: x)) == ["input"]


def test_nodes_are_named_by_site_and_layer(net):
    names = {node.name for node in lower.trace(*net).nodes}
    assert {"Dense_0/input", "BatchNorm_0/input", "Dense_1/input", "Dense_2/input"} <= names
    assert any(name.startswith("Dense_1") for name in names)


def test_saved_and_loaded_graph_is_the_same(net, tmp_path):
    graph = lower.trace(*net)
    ir.save(graph, tmp_path / "graph.npz")
    loaded = ir.load(tmp_path / "graph.npz")
    assert loaded.inputs == graph.inputs and loaded.outputs == graph.outputs
    for ours, theirs in zip(graph.nodes, loaded.nodes, strict=True):
        assert (ours.op, ours.inputs, ours.shape, ours.name) == (theirs.op, theirs.inputs, theirs.shape, theirs.name)
        assert set(ours.attrs) == set(theirs.attrs)
        for key, value in ours.attrs.items():
            np.testing.assert_array_equal(value, theirs.attrs[key])
    inputs = port_grid(graph, 100, np.random.default_rng(0))
    np.testing.assert_array_equal(flatten_batch(emulate(loaded, inputs)), flatten_batch(emulate(graph, inputs)))


def test_masks_become_zeros(net):
    inst, view, state = net
    kernel = view.model["Dense_1"]["kernel"]
    mask = jnp.asarray(np.random.default_rng(0).integers(0, 2, kernel.shape), jnp.float32)
    pruned = view._replace(model={**view.model, "Dense_1": {**view.model["Dense_1"], "kernel": kernel * mask}})
    graph, _ = three_ways(inst, pruned, state)
    consts = [n.attrs["value"] for n in graph.nodes if n.op == "const" and np.size(n.attrs["value"]) == 36]
    np.testing.assert_array_equal(np.reshape(consts[0], (6, 6)), kernel * mask)


UNSUPPORTED: dict[str, tuple[Callable, str]] = {
    "random numbers": (
        lambda x: x + jax.random.normal(jax.random.key(0), (4,)),
        r"can't lower 'random_.*differ between batches",
    ),
    "bits of integers": (lambda x: x.astype(jnp.int32) & 3, r"can't lower 'and' of int32.*use comparisons"),
    "sort": (lambda x: jnp.sort(x, 1), r"can't lower 'sort'"),
    "argmax": (lambda x: jnp.argmax(x, 1), r"can't lower 'argmax'"),
    "product of all": (lambda x: jnp.prod(x, 1), r"can't lower 'reduce_prod'"),
    "to bfloat16": (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), r"can't lower the conversion of float32 to bfloat16"),
    "fewer bits": (lambda x: jax.lax.reduce_precision(x, 8, 3), r"can't lower 'reduce_precision'.*no fixed-point form here"),
    "count to integers": (
        lambda x: (x > 0).sum(1).astype(jnp.int8).astype(jnp.float32),
        r"can't lower the conversion of int32 to int8",
    ),
    "data-dependent format": (
        lambda x: pq.numerics.quantize(x, pq.KIF(jnp.ones_like(x), jnp.ones_like(x), jnp.maximum(x, 0))),
        r"can't lower a quantizer .*its format depends on the data; formats must be constants",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported(name):
    function, message = UNSUPPORTED[name]
    with pytest.raises(pq.LoweringError, match=message):
        graph_of(lambda p, x: function(x))


def test_error_names_the_place_in_the_model():
    """Near the last thing with a name that the value came from."""

    class Layer(nn.Module):
        function: Callable

        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(3)(x))
            return self.function(nn.Dense(3)(h))

    for function, message in ((lambda v: jnp.sort(v, 1), "'sort'"), (lambda v: jnp.prod(v, 1), "'reduce_prod'")):
        inst, view = compressed(pq.from_linen(Layer(function), np.zeros((2, 4), np.float32)), np.zeros((2, 4), np.float32))
        with pytest.raises(pq.LoweringError, match=rf"{message} \(near Dense_1/kernel, .*test_trace.py:\d+\)"):
            lower.trace(inst, view, {})
    with pytest.raises(pq.LoweringError, match=r"'sort' \(near input, .*test_trace.py:\d+\)"):
        graph_of(lambda p, x: jnp.sort(x, 1))


@pytest.mark.parametrize("missing", ["a/kernel", "b/input", "b/bias"])
def test_site_without_a_format(missing):
    """A prune-only model trains, but has no netlist."""
    params = weights(np.random.default_rng(0), (4, 3), (3, 2))
    inst, view = compressed(pq.from_function(lambda p, x: dense(p["b"], jax.nn.relu(dense(p["a"], x))), params), np.zeros((2, 4)))
    view = view._replace(sites={n: v for n, v in view.sites.items() if n != missing})
    with pytest.raises(pq.LoweringError, match=rf"site '{missing}' has no fixed-point format: add a quantizer"):
        lower.trace(inst, view, {})


def test_wide_accumulator_names_its_layer():
    """8 inputs of 12 bits times weights of 12 bits: 27 bits, float32 holds 24."""
    params = {"wide": {"kernel": jnp.full((8, 2), 1.0), "bias": jnp.zeros(2)}}
    inst, view = compressed(
        pq.from_function(lambda p, x: dense(p["wide"], x), params), np.zeros((2, 8), np.float32),
        port=pq.InputSpec(1, 5, 6), weights=F(1, 10, 1), activations=F(5, 6),
    )  # fmt: skip
    exact = lower.trace(inst, view, {})
    check_float32(exact)  # the weights are ones: 15 bits
    odd = view._replace(model={"wide": {**view.model["wide"], "kernel": jnp.full((8, 2), 2 - 2.0**-10)}})
    graph = lower.trace(inst, odd, {})
    with pytest.raises(pq.LoweringError, match=r"dot .*'wide'.* needs 2\d bits, float32 has 24.*Use \d fewer fractional bits"):
        check_float32(graph)
    with pytest.raises(pq.LoweringError, match=r"float32 has 24"):
        lower.verify(graph, inst, odd, {}, x_test=np.zeros((4, 8), np.float32), vectors=8)
