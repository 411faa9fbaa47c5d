"""One model, many spellings, one graph: plain and asking layers, linen, nnx and equinox."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax import _tree, lower
from pquant_jax.lower.canonical import difference
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

F = pq.quantize.Format
IMAGE, ROW = np.zeros((2, 6, 6, 2), np.float32), np.zeros((2, 5), np.float32)
PORT = pq.InputSpec(1, 2, 3)


def numbers(seed: int) -> dict[str, np.ndarray]:
    """Parameters and statistics of the network: Conv(4, 3x3) -> BatchNorm -> relu -> Dense(3)."""
    rng = np.random.default_rng(seed)
    shapes = {"conv/kernel": (3, 3, 2, 4), "conv/bias": (4,), "dense/kernel": (64, 3), "dense/bias": (3,), "bn/bias": (4,)}
    values = {n: rng.normal(0, 0.5, s) for n, s in shapes.items()}
    values |= {"bn/scale": rng.uniform(0.5, 1.5, 4), "bn/mean": rng.normal(0, 0.5, 4), "bn/var": rng.uniform(0.3, 2, 4)}
    return {n: np.asarray(v, np.float32) for n, v in values.items()}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        h = linen.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        h = linen.relu(linen.BatchNorm(use_running_average=not train, name="bn")(h))
        return linen.Dense(3, name="dense")(h.reshape(h.shape[0], -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.bn(self.conv(x)))
        return self.dense(h.reshape(h.shape[0], -1))


class Equinox(eqx.Module):
    """Channels first, as equinox has it; transposed where it meets the others' order."""

    conv: eqx.nn.Conv2d
    bn: Any
    dense: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=key)
        self.bn = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.dense = eqx.nn.Linear(64, 3, key=key)

    def __call__(self, x, state):
        h, state = self.bn(self.conv(jnp.transpose(x, (2, 0, 1))), state)
        return self.dense(jnp.transpose(jax.nn.relu(h), (1, 2, 0)).reshape(-1)), state


def equinox_numbers(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "conv/weight": values["conv/kernel"].transpose(3, 2, 0, 1), "conv/bias": values["conv/bias"].reshape(4, 1, 1),
        "bn/weight": values["bn/scale"], "bn/bias": values["bn/bias"],
        "dense/weight": values["dense/kernel"].T, "dense/bias": values["dense/bias"],
    }  # fmt: skip


def filled(model: pq.Model, leaves: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> pq.Model:
    """`model` with these numbers; statistics are known by the end of their path (equinox numbers them)."""
    params = {p: jnp.asarray(leaves[p]) for p in _tree.flatten(model.params)}
    ends = {"mean": "bn/mean", "var": "bn/var", "1/0": "bn/mean", "1/1": "bn/var"}
    state = {}
    for path, leaf in _tree.flatten(model.state).items():
        name = next((v for end, v in ends.items() if path.endswith(end)), None)
        state[path] = jnp.zeros_like(leaf) if name is None else jnp.asarray(values[name]).reshape(jnp.shape(leaf))
    return model._replace(params=_tree.replace(model.params, params), state=_tree.replace(model.state, state))


def lowered(model: Any, x: Any, formats: dict[str, F] | None = None) -> lower.Graph:
    """The graph with every site at its own wish, or that of `formats` by name, or the default."""
    inst = pq.instrument(model, x, inputs=PORT)
    rules = tuple((formats or {}).items())
    compression = pq.quantize.fixed(inst.sites, weights=F(1, 4, 1), activations=F(2, 3), rules=rules)
    params = compression.attach(inst.model.params)
    return lower.trace(inst, compression.apply(params, compression.init(params))[0], inst.model.state)


@pytest.mark.parametrize("seed", [0, 1])
def test_same_ir_frameworks(seed):
    values = numbers(seed)
    net, state = eqx.nn.make_with_state(Equinox)(jax.random.key(0))
    models = {
        "linen": filled(pq.from_linen(Linen(), IMAGE), values, values),
        "nnx": filled(pq.from_nnx(Nnx(nnx.Rngs(0))), values, values),
        "equinox": filled(pq.from_equinox(net, state), equinox_numbers(values), values),
    }
    graphs = {name: lowered(model, IMAGE) for name, model in models.items()}
    assert difference(graphs["linen"], graphs["nnx"]) == ""
    assert difference(graphs["linen"], graphs["equinox"]) == ""
    inputs = port_grid(graphs["linen"], 200, np.random.default_rng(seed))
    outputs = [flatten_batch(emulate(g, inputs)) for g in graphs.values()]
    assert np.unique(outputs[0]).size > 20
    for other in outputs[1:]:
        np.testing.assert_array_equal(other, outputs[0])


A, B, C, D = F(i=1, f=2), F(i=0, f=3, k=1), F(i=1, f=5, k=1), F(i=1, f=3, k=1, overflow="SAT_SYM")
WISHES = {
    "Dense_0/input": A, "Dense_0/kernel": B, "Dense_0/bias": C, "BatchNorm_0/fused_scale": D, "BatchNorm_0/fused_offset": C,
    "Dense_1/kernel": D, "Dense_2/input": A,
}  # fmt: skip


def network(layers: Any, asking: bool) -> linen.Module:
    def wishes(layer: str) -> dict[str, Any]:
        own = {n.split("/")[1]: fmt for n, fmt in WISHES.items() if n.startswith(f"{layer}/")}
        return {"quantize": own} if asking else {}

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            h = layers.Dense(8, **wishes("Dense_0"))(x)
            h = linen.relu(layers.BatchNorm(use_running_average=not train, **wishes("BatchNorm_0"))(h))
            h = h + linen.relu(layers.Dense(8, **wishes("Dense_1"))(h))
            return layers.Dense(3, **wishes("Dense_2"))(h)

    return Net()


def test_same_ir_direct():
    """Formats asked for in the layers give the graph that the same formats by rules give on the plain model."""
    direct = lowered(network(pq.nn, True), ROW)
    plain = lowered(network(linen, False), ROW, WISHES)
    assert [n.name for n in direct.nodes] == [n.name for n in plain.nodes]
    assert difference(direct, plain) == ""
    assert difference(direct, lowered(network(linen, False), ROW)) != ""  # the wishes matter
    assert difference(lowered(network(pq.nn, False), ROW), lowered(network(linen, False), ROW)) == ""


def test_layers_that_share_a_site_have_to_agree():
    class Net(linen.Module):
        wishes: tuple

        @linen.compact
        def __call__(self, x):
            a, b = (pq.nn.Dense(3, quantize={"input": w})(x) for w in self.wishes)
            return a + b

    assert pq.instrument(Net((A, A)), ROW).sites["Dense_0/input"].format == A
    with pytest.raises(pq.TraceError, match="'Dense_0/input' is shared by layers that ask for different formats"):
        pq.instrument(Net((A, F(i=3, f=3))), ROW)
    split = pq.instrument(Net((A, F(i=3, f=3))), ROW, split=["Dense_1/input"])
    assert split.sites["Dense_1/input"].format == F(i=3, f=3)


def test_an_output_and_a_sum_can_be_asked_for():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = pq.nn.Dense(5, quantize={"output": A})(x)
            h = pq.nn.Add(quantize=B)(h, x)
            return pq.nn.Activation("hard_tanh", quantize={"output": C})(h)

    inst = pq.instrument(Net(), ROW)
    asked = {n: s.format for n, s in inst.sites.items() if s.format is not None}
    assert asked == {"Dense_0/output": A, "Add_0/input": B, "Add_0/input#1": B, "Activation_0/output": C}
    graph = lowered(Net(), ROW)
    found = {n.name for n in graph.nodes if n.op == "quantize"}
    assert set(asked) <= found
