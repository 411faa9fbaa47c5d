"""Any JAX model: instrumented, with a random format at every element of every site, its forward is the emulator's integers.

Formats, rounding and overflow are drawn per element and site, so that values overflow and vanish.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import pquant_jax as pq
from pquant_jax import _tree, lower
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid

PORT = pq.InputSpec(1, 1, 3)


def random_view(inst: pq.Instrumented, rng: np.random.Generator) -> pq.View:
    """Per element 0 to 2 integer and 1 to 3 fractional bits (scales 4 to 6), per site one of RND, TRN and one of WRAP, SAT."""
    formats = {}
    for name, spec in inst.sites.items():
        least = 4 if spec.kind == "scale" else 1  # a sixth is 0 on coarser grids
        i, f = (jnp.asarray(rng.integers(a, a + 3, spec.shape), jnp.float32) for a in (0, least))
        rounding, overflow = rng.choice(["RND", "TRN"]), rng.choice(["WRAP", "SAT"])
        formats[name] = pq.kif(float(spec.signed), i, f, rounding=str(rounding), overflow=str(overflow))
    leaves = _tree.flatten(inst.model.params)
    ours = {n: pq.numerics.quantize(leaves[n], fmt) for n, fmt in formats.items() if n in leaves}
    view = pq.View(_tree.replace(inst.model.params, ours), formats, {})
    return view._replace(tables=inst.tables(view, inst.model.state))


def exact(model: Any, x: Any, *, seed: int, netlist: bool = False, vectors: int = 100) -> np.ndarray:
    """The outputs, after the jitted forward and the emulator (and da4ml) were found equal on vectors of the whole port."""
    rng = np.random.default_rng(seed)
    inst = pq.instrument(model, x, inputs=PORT)
    view, state = random_view(inst, rng), inst.model.state
    graph = lower.trace(inst, view, state)
    inputs = port_grid(graph, vectors, rng)
    expected = flatten_batch(emulate(graph, inputs))
    np.testing.assert_array_equal(lower.forward_outputs(inst, view, state, inputs), expected)
    if netlist:
        np.testing.assert_array_equal(da4ml.predict(da4ml.to_comb(graph), flatten_batch(inputs)), expected)
    assert len(np.unique(expected)) > 1
    return expected


def zeros(*shape: int) -> np.ndarray:
    return np.zeros((2, *shape), np.float32)


def weight(*shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0, 0.7, shape), jnp.float32)


class Linen(nn.Module):
    """A linen module of one function."""

    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(x)


def linen(body: Callable, *shape: int) -> tuple[Any, Any]:
    return pq.from_linen(Linen(body), zeros(*shape)), zeros(*shape)


def plain(forward: Callable, params: Any, *shape: int) -> tuple[Any, Any]:
    return pq.from_function(forward, params), zeros(*shape)


class NnxNet(nnx.Module):
    def __init__(self, layers: list, body: Callable):
        self.layers, self.body = nnx.List(layers), nnx.static(body)

    def __call__(self, x):
        return self.body(self.layers, x)


def of_nnx(make: Callable, body: Callable, *shape: int) -> tuple[Any, Any]:
    return pq.from_nnx(NnxNet(make(nnx.Rngs(0)), body)), zeros(*shape)


class EquinoxNet(eqx.Module):
    layers: list
    body: Callable = eqx.field(static=True)

    def __call__(self, x):
        return self.body(self.layers, x)


def equinox(make: Callable, body: Callable, *shape: int) -> tuple[Any, Any]:
    return pq.from_equinox(EquinoxNet(make(jax.random.key(0)), body)), zeros(*shape)


def interaction(p: Any, x: jax.Array) -> jax.Array:
    """An interaction network: edges between all pairs of three particles, summed at their receivers."""
    senders, receivers = np.asarray([0, 1, 0, 2, 1, 2]), np.asarray([1, 0, 2, 0, 2, 1])
    edges = jax.nn.relu(jnp.concatenate([x[:, senders], x[:, receivers]], -1) @ p["edge"])
    gathered = jax.vmap(lambda e: jax.ops.segment_sum(e, receivers, 3))(edges)
    return (jax.nn.relu(jnp.concatenate([x, gathered], -1) @ p["node"])).sum(1)


def deepsets(p: Any, x: jax.Array) -> jax.Array:
    one = lambda v: jax.nn.relu(p["phi"]["kernel"].T @ v + p["phi"]["bias"])  # noqa: E731
    return jax.vmap(lambda event: jax.vmap(one)(event).sum(0))(x) @ p["rho"]


CONV = dict(dimension_numbers=("NWC", "WIO", "NWC"))
DEEPSETS = {"phi": {"kernel": weight(3, 4), "bias": weight(4)}, "rho": weight(4, 2)}
MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "linen dense": lambda: linen(lambda x: nn.Dense(3)(nn.relu(nn.Dense(4)(x))), 4),
    "nnx dense": lambda: of_nnx(lambda r: [nnx.Linear(4, 3, rngs=r)], lambda m, x: jax.nn.relu(m[0](x)), 4),
    "equinox dense": lambda: equinox(lambda k: [eqx.nn.Linear(4, 3, key=k)], lambda m, x: jax.nn.relu(m[0](x)), 4),
    "einsum": lambda: plain(lambda p, x: jnp.einsum("bij,jk->bki", x, p["w"]), {"w": weight(3, 2)}, 2, 3),
    "linen einsum": lambda: linen(lambda x: nn.Einsum((3, 2), "...ij,jk->...ik")(x), 2, 3),
    "linen conv1d": lambda: linen(lambda x: nn.Conv(2, (3,))(x), 5, 2),
    "linen conv2d": lambda: linen(lambda x: nn.Conv(2, (2, 2))(x), 3, 3, 2),
    "nnx conv": lambda: of_nnx(lambda r: [nnx.Conv(2, 2, (3,), rngs=r)], lambda m, x: m[0](x), 5, 2),
    "equinox conv": lambda: equinox(lambda k: [eqx.nn.Conv2d(2, 3, 2, key=k)], lambda m, x: m[0](x), 2, 3, 3),
    "equinox depthwise": lambda: equinox(lambda k: [eqx.nn.Conv1d(2, 4, 2, groups=2, key=k)], lambda m, x: m[0](x), 2, 4),
    "depthwise": lambda: linen(lambda x: nn.Conv(4, (2,), feature_group_count=2)(x), 4, 2),
    "separable": lambda: linen(lambda x: nn.Conv(3, (1,))(nn.Conv(2, (3,), feature_group_count=2)(x)), 4, 2),
    "grouped": lambda: linen(lambda x: nn.Conv(4, (2,), feature_group_count=2)(x), 3, 4),
    "dilated": lambda: linen(lambda x: nn.Conv(2, (2,), kernel_dilation=2, padding="VALID")(x), 5, 2),
    "strided": lambda: linen(lambda x: nn.Conv(2, (2, 2), strides=2, padding="VALID")(x), 4, 4, 1),
    "causal": lambda: linen(lambda x: nn.Conv(2, (2,), padding="CAUSAL")(x), 4, 2),
    "transposed": lambda: linen(lambda x: nn.ConvTranspose(2, (3,), strides=(2,))(x), 3, 2),
    "equinox transposed": lambda: equinox(
        lambda k: [eqx.nn.ConvTranspose1d(2, 2, 2, stride=2, key=k)], lambda m, x: m[0](x), 2, 3
    ),
    "plain conv": lambda: plain(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (2,), [(2, -1)], **CONV), {"w": weight(2, 2, 2)}, 5, 2
    ),
    "max pool": lambda: linen(lambda x: nn.max_pool(nn.Conv(2, (2,))(x), (2,), (2,)), 4, 1),
    "max pool with padding": lambda: linen(lambda x: nn.max_pool(nn.Conv(2, (2,))(x), (3,), (2,), padding="SAME"), 4, 1),
    "average pool": lambda: linen(lambda x: nn.avg_pool(nn.Conv(2, (2,))(x), (2,), (2,)), 4, 1),
    "equinox pool": lambda: equinox(lambda k: [eqx.nn.MaxPool1d(2, 2)], lambda m, x: m[0](x), 2, 4),
    "global pools": lambda: plain(lambda p, x: (x.mean((1, 2)) @ p["w"], x.max((1, 2))), {"w": weight(3, 2)}, 2, 2, 3),
    "add, sub, mul, concat": lambda: plain(
        lambda p, x: jnp.concatenate([x + x[:, ::-1], x - 1, (x @ p["w"]) * x], 1), {"w": weight(3, 3)}, 3
    ),
    "residual": lambda: linen(lambda x: x + nn.Dense(4)(nn.relu(nn.Dense(4)(x))), 4),
    "several inputs and outputs": lambda: (
        pq.from_function(lambda p, x: {"sum": x["a"] @ p["w"] + x["b"][0], "pair": (x["b"][1], -x["a"])}, {"w": weight(3, 2)}),
        {"a": zeros(3), "b": (zeros(2), zeros(1))},
    ),
    "relu6": lambda: plain(lambda p, x: jax.nn.relu6(4 * (x @ p["w"])), {"w": weight(3, 3)}, 3),
    "leaky_relu of a quarter": lambda: plain(lambda p, x: jax.nn.leaky_relu(x @ p["w"], 0.25), {"w": weight(3, 3)}, 3),
    "leaky_relu": lambda: plain(lambda p, x: jax.nn.leaky_relu(x @ p["w"]), {"w": weight(3, 3)}, 3),
    "hard_tanh": lambda: plain(lambda p, x: jax.nn.hard_tanh(x @ p["w"]), {"w": weight(3, 3)}, 3),
    "hard_sigmoid": lambda: plain(lambda p, x: jax.nn.hard_sigmoid(x @ p["w"]), {"w": weight(3, 3)}, 3),
    "abs, min, max, clip": lambda: plain(
        lambda p, x: jnp.clip(jnp.maximum(jnp.abs(x @ p["w"]), jnp.minimum(x, 0.5)), 0.25, 1.5), {"w": weight(3, 3)}, 3
    ),
    "deepsets by vmap": lambda: plain(deepsets, DEEPSETS, 3, 3),
    "interaction network": lambda: plain(interaction, {"edge": weight(4, 3), "node": weight(5, 2)}, 3, 2),
    "tanh": lambda: linen(lambda x: nn.tanh(nn.Dense(3)(x)), 3),
    "sigmoid": lambda: linen(lambda x: nn.sigmoid(nn.Dense(3)(x)), 3),
    "gelu": lambda: linen(lambda x: nn.gelu(nn.Dense(3)(x)), 3),
    "silu": lambda: linen(lambda x: nn.silu(nn.Dense(3)(x)), 3),
    "softplus": lambda: linen(lambda x: nn.softplus(nn.Dense(3)(x)), 3),
    "softmax": lambda: linen(lambda x: nn.softmax(nn.Dense(3)(x)), 3),
    "BatchNorm": lambda: linen(lambda x: nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x)), 3),
    "LayerNorm": lambda: linen(lambda x: nn.LayerNorm()(nn.Dense(4)(x)), 3),
    "RMSNorm": lambda: linen(lambda x: nn.RMSNorm()(nn.Dense(4)(x)), 3),
    "GroupNorm": lambda: linen(lambda x: nn.GroupNorm(num_groups=2)(nn.Dense(4)(x)), 3),
}
ATTENTION: dict[str, Callable[[], tuple[Any, Any]]] = {
    "causal attention": lambda: linen(
        lambda x: nn.MultiHeadDotProductAttention(2, qkv_features=4)(x, x, mask=nn.make_causal_mask(jnp.ones((1, 3)))), 3, 2
    ),
    "attention with a mask from data": lambda: linen(
        lambda x: nn.MultiHeadDotProductAttention(1, qkv_features=2)(
            x, x, mask=nn.make_attention_mask(x[..., 0] >= 0, x[..., 0] >= 0)
        ),
        3, 2,
    ),
    "linen simple rnn": lambda: linen(lambda x: nn.RNN(nn.SimpleCell(3, activation_fn=nn.relu))(x)[:, -1], 3, 2),
    "linen gru": lambda: linen(lambda x: nn.RNN(nn.GRUCell(2))(x)[:, -1], 3, 2),
    "linen lstm": lambda: linen(lambda x: nn.RNN(nn.OptimizedLSTMCell(2))(x)[:, -1], 3, 2),
    "nnx gru": lambda: of_nnx(lambda r: [nnx.RNN(nnx.GRUCell(2, 2, rngs=r))], lambda m, x: m[0](x)[:, -1], 3, 2),
    "equinox gru": lambda: equinox(
        lambda k: [eqx.nn.GRUCell(2, 2, key=k)],
        lambda m, x: lax.scan(lambda h, v: (m[0](v, h), None), jnp.zeros(2), x)[0], 3, 2,
    ),
}  # fmt: skip
QUICK = ("linen dense", "depthwise", "max pool with padding", "interaction network", "softmax", "equinox conv", "leaky_relu")


@pytest.mark.parametrize("name", QUICK)
def test_models_and_netlists(name):
    exact(*MODELS[name](), seed=zlib.crc32(name.encode()), netlist=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name not in QUICK])
def test_models(name):
    exact(*MODELS[name](), seed=zlib.crc32(name.encode()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_recurrent_models(name):
    exact(*ATTENTION[name](), seed=zlib.crc32(name.encode()))
