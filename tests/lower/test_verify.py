"""`verify` finds one wrong integer wherever it is, and says where."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax import lower
from pquant_jax.lower import Graph, Node
from pquant_jax.lower._verify import _output_place, vectors_of
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.ir import label

F = pq.quantize.Format


class Chain(NamedTuple):
    inst: pq.Instrumented
    view: pq.View
    state: Any
    graph: Graph
    x: np.ndarray


def residual(p: Any, x: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"])
    h = h + jax.nn.relu(h @ p["b"]["kernel"] + p["b"]["bias"])
    return h @ p["c"]["kernel"] + p["c"]["bias"]


@pytest.fixture(scope="module")
def trained() -> Chain:
    """A residual network after a few epochs of the whole chain."""
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 6), "b": (6, 6), "c": (6, 3)}
    params = {n: {"kernel": jnp.asarray(rng.normal(0, 0.6, s), jnp.float32), "bias": jnp.zeros(s[1])} for n, s in shapes.items()}
    x = rng.normal(size=(512, 5)).astype(np.float32)
    parts = [pq.data.Split(v, np.argmax(v[:, :3] * v[:, 2:], 1).astype(np.int32)) for v in (x[:384], x[384:], x[384:])]
    inst = pq.instrument(pq.from_function(residual, params), x[:2], inputs=pq.InputSpec(1, 3, 4))
    hgq = pq.quantize.hgq(
        inst.sites, beta=1e-5, cost=inst.ebops, weights=F(0, 5, 1, overflow="WRAP"), activations=F(2, 4, overflow="WRAP")
    )
    compression = pq.chain(pq.prune.dst(alpha=1e-4), hgq)
    tx = pq.optimizer(compression, weights=optax.adam(1e-2))
    result = pq.fit(inst, pq.data.Dataset(*parts), plan=pq.Plan(1, 4, 1), compression=compression, optimizer=tx, batch_size=32)
    graph = lower.trace(inst, result.view, result.state.model_state)
    return Chain(inst, result.view, result.state.model_state, graph, x[384:])


def verify(chain: Chain, graph: Graph | None = None, view: pq.View | None = None, **options: Any) -> dict[str, Any]:
    graph, view = chain.graph if graph is None else graph, chain.view if view is None else view
    return lower.verify(graph, chain.inst, view, chain.state, x_test=chain.x, **{"vectors": 600, **options})


def test_trained_model_has_no_mismatch(trained):
    steps: list[str] = []
    report = verify(trained, comb=da4ml.to_comb(trained.graph), progress=steps.append)
    assert report["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": None, "rtl_pipelined": None}
    assert report["vectors"] == 600 and report["outputs"] == 3
    assert steps == ["emulator", "JAX forward", "da4ml"]


def test_without_a_netlist_nothing_is_said_of_it(trained):
    assert verify(trained)["mismatches"] == {"emulator": 0, "da4ml": None, "rtl_comb": None, "rtl_pipelined": None}


def test_vectors_are_the_test_set_and_the_whole_port(trained):
    """The random half overflows ranges that the data stay within; a large test set does not crowd it out."""
    (few,) = vectors_of(trained.graph, trained.inst, trained.x, 600, 0)
    (many,) = vectors_of(trained.graph, trained.inst, trained.x, 100, 0)
    assert len(few) == 600 and len(many) == 128 + 50
    np.testing.assert_array_equal(few[:128], trained.inst.encode(trained.x))
    codes = np.ldexp(few[128:], 4)
    assert codes.min() == -128 and codes.max() == 127 and np.all(codes == np.rint(codes))
    (other,) = vectors_of(trained.graph, trained.inst, trained.x, 600, 1)
    assert np.any(other[128:] != few[128:])


def kernel_node(chain: Chain, layer: str) -> int:
    """The constant of a kernel."""
    kernel = np.asarray(chain.view.model[layer]["kernel"], np.float64)
    for index, node in enumerate(chain.graph.nodes):
        if node.op == "const" and np.size(node.attrs["value"]) == kernel.size and node.attrs["value"].ndim == 3:
            if np.array_equal(np.reshape(node.attrs["value"], kernel.shape), kernel):
                return index
    raise AssertionError(f"no constant holds the kernel of {layer}")


def flipped(chain: Chain, layer: str) -> Graph:
    """The graph with one weight code of a layer one step off: a weight that lives, of an output that reaches the end."""
    index = kernel_node(chain, layer)
    node = chain.graph.nodes[index]
    value = np.array(node.attrs["value"], np.float64)
    at = np.unravel_index(np.argmax(np.abs(value)), value.shape)
    f = np.broadcast_to(np.rint(np.asarray(chain.view.sites[f"{layer}/kernel"].f)), value.shape[1:])[at[1:]]
    value[at] += 2.0**-f
    nodes = list(chain.graph.nodes)
    nodes[index] = Node(node.op, node.inputs, node.shape, {"value": value}, node.name)
    return chain.graph._replace(nodes=tuple(nodes))


NEXT_SITE = {"a": "b/input", "b": "c/input"}


@pytest.mark.parametrize("layer", ["a", "b"])
def test_one_flipped_weight_is_found_and_its_node_is_named(trained, layer):
    """JAX differs from the graph from the next site on; node, element, and the integers of the output."""
    with pytest.raises(pq.VerifyError) as error:
        verify(trained, flipped(trained, layer))
    message = str(error.value)
    site = next(n for n, node in enumerate(trained.graph.nodes) if node.op == "quantize" and node.name == NEXT_SITE[layer])
    assert "the JAX forward differs from the emulator in" in message
    assert f"node {label(trained.graph, site)}, element" in message
    assert_integers(message)


def assert_integers(message: str) -> None:
    """`output 2 is 37 * 2^-8, the emulator has 38`, two different integers."""
    tail = message.rsplit(": output ", 1)[1]
    theirs, ours = tail.split(" is ")[1].split(" * 2^")[0], tail.rsplit("has ", 1)[1]
    assert float(theirs) == int(float(theirs)) != int(ours)


def test_a_flipped_weight_of_the_last_layer_names_the_output(trained):
    with pytest.raises(pq.VerifyError) as error:
        verify(trained, flipped(trained, "c"))
    (output,) = trained.graph.outputs
    assert f"node {label(trained.graph, output)}, element" in str(error.value)
    assert_integers(str(error.value))


def test_another_view_is_found(trained):
    """One format of an activation, one bit coarser: what enters that quantizer is the same, what leaves it is not."""
    fmt = trained.view.sites["b/input"]
    coarser = {**trained.view.sites, "b/input": pq.KIF(fmt.k, fmt.i, fmt.f - 1, fmt.rounding, fmt.overflow)}
    message = (
        r"the JAX forward differs from the emulator in \d+ of 1800 integers.*node %\d+ quantize 'b/input', element \d+ \(-?\d"
    )
    with pytest.raises(pq.VerifyError, match=message):
        verify(trained, view=trained.view._replace(sites=coarser))


def test_output_is_named_among_several():
    nodes = [Node("input", (), (2,), {"k": 1, "i": 2, "f": 2}, "input")]
    nodes += [Node("abs", (0,), (2,)), Node("take", (0,), (), {"index": np.asarray(1)}), Node("neg", (0,), (2,))]
    graph = Graph(tuple(nodes), (0,), (1, 2, 3))
    places = [_output_place(graph, n) for n in range(5)]
    assert places == [
        f"node %{node}, element {n}" for node, n in [("1 abs", 0), ("1 abs", 1), ("2 take", 0), ("3 neg", 0), ("3 neg", 1)]
    ]


def test_netlist_of_another_graph_is_found(trained):
    with pytest.raises(pq.VerifyError, match=r"da4ml differs from the emulator in \d+ of 1800 integers; first at vector \d+"):
        verify(trained, comb=da4ml.to_comb(flipped(trained, "b")))


def test_quantizer_that_da4ml_gets_wrong_is_named(trained, monkeypatch):
    """A backend that truncates where it should round: the first quantizer that rounds is the one to look at."""
    from pquant_jax.lower.backends import _scalars

    monkeypatch.setattr(_scalars, "round_to", lambda x, f, fx, rounding: x)
    comb = da4ml.to_comb(trained.graph)
    with pytest.raises(pq.VerifyError) as error:
        verify(trained, comb=comb)
    first = next(n for n, node in enumerate(trained.graph.nodes) if node.op == "quantize")
    message = str(error.value)
    assert message.startswith("da4ml differs from the emulator in")
    named = int(message.split("node %")[1].split(" ")[0])
    assert trained.graph.nodes[named].op == "quantize" and named >= first
    assert "emulator" in message.split("element")[1]
    assert_integers(message)


def test_first_difference_is_the_first_vector(trained):
    """The vector that is named differs, and none before it does."""
    graph = flipped(trained, "b")
    with pytest.raises(pq.VerifyError) as error:
        verify(trained, graph)
    n = int(str(error.value).split("first at vector ")[1].split(",")[0])
    inputs = vectors_of(graph, trained.inst, trained.x, 600, 0)
    theirs = lower.forward_outputs(trained.inst, trained.view, trained.state, inputs)
    ours = lower.emulate(graph, inputs)[0]
    wrong = np.flatnonzero(np.any(theirs != ours, axis=1))
    assert wrong[0] == n and f"in {np.sum(theirs != ours)} of" in str(error.value)
