"""Layers that ask: what they compute, what they are called, and who hears them."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pquant_jax as pq

F = pq.quantize.Format
IMAGE, ROW = np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 6), np.float32)
A, B, C = F(i=1, f=3), F(i=0, f=4, k=1), F(i=1, f=5, k=1)
ALL = {"input": A, "kernel": B, "bias": C}
LINEN = {
    "Dense": (ROW, dict(features=4), ALL),
    "DenseGeneral": (ROW, dict(features=(2, 3)), ALL),
    "Einsum": (ROW, dict(shape=(6, 5), einsum_str="nk,kh->nh"), ALL),
    "Conv": (IMAGE, dict(features=4, kernel_size=(3, 3)), ALL),
    "ConvTranspose": (IMAGE, dict(features=4, kernel_size=(2, 2), strides=(2, 2)), ALL),
    "BatchNorm": (IMAGE, dict(use_running_average=True), {"input": A, "fused_scale": B, "fused_offset": C}),
    "LayerNorm": (ROW, dict(), {"scale": B, "bias": C}),
    "RMSNorm": (ROW, dict(), {"scale": B}),
}
NNX = {
    "Linear": (ROW, (6, 4), {}, ALL),
    "LinearGeneral": (ROW, (6, (2, 3)), {}, ALL),
    "Einsum": (ROW, ("nk,kh->nh", (6, 5), (5,)), {}, ALL),
    "Conv": (IMAGE, (3, 4, (3, 3)), {}, ALL),
    "ConvTranspose": (IMAGE, (3, 4, (2, 2)), {"strides": (2, 2)}, ALL),
    "BatchNorm": (IMAGE, (3,), {"use_running_average": True}, {"input": A, "fused_scale": B, "fused_offset": C}),
    "LayerNorm": (ROW, (6,), {}, {"scale": B, "bias": C}),
    "RMSNorm": (ROW, (6,), {}, {"scale": B}),
}


class Holder(linen.Module):
    """One layer with something in front and behind, so that it has a path."""

    layer: linen.Module

    def __call__(self, x):
        return 2 * self.layer(x)


class NnxHolder(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return 2 * self.layer(x)


def forwards(plain, asking, x):
    """Results of both on the same parameters."""
    a, b = pq.graph.as_model(plain, x), pq.graph.as_model(asking, x)
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    values = jnp.asarray(np.random.default_rng(0).normal(0, 1, x.shape), jnp.float32)
    return [m.forward(a.params, a.state, values, train=False, rng=None)[0] for m in (a, b)]


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_layer_that_asks_computes_what_the_plain_one_does(name):
    x, arguments, wishes = LINEN[name]
    asking = getattr(pq.nn, name)(**arguments, quantize=wishes, prune=0.5)
    np.testing.assert_array_equal(*forwards(Holder(getattr(linen, name)(**arguments)), Holder(asking), x))


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_layer_that_asks_computes_what_the_plain_one_does(name):
    x, arguments, options, wishes = NNX[name]
    plain = getattr(nnx, name)(*arguments, **options, rngs=nnx.Rngs(0))
    asking = getattr(pq.nn.nnx, name)(*arguments, **options, rngs=nnx.Rngs(0), quantize=wishes, prune=0.5)
    np.testing.assert_array_equal(*forwards(NnxHolder(plain), NnxHolder(asking), x))


def test_sparsities_are_found_by_path_in_both_frameworks():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = pq.nn.Dense(4, prune=0.75)(x)
            h = linen.relu(linen.Dense(4)(h))
            return pq.nn.Dense(2, prune=False)(h)

    class Nnx(nnx.Module):
        def __init__(self):
            self.a = pq.nn.nnx.Linear(6, 4, rngs=nnx.Rngs(0), prune=0.75)
            self.b = pq.nn.nnx.Linear(4, 2, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.b(self.a(x))

    assert pq.nn.targets(Linen(), ROW) == {"Dense_0/kernel": 0.75, "Dense_2/kernel": 0.0}
    assert pq.nn.targets(Nnx(), ROW) == {"a/kernel": 0.75}


def test_a_pruning_method_reaches_what_the_layers_ask_for():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = pq.nn.Dense(16, prune=0.75)(x)
            return pq.nn.Dense(8, prune=False)(h)

    model = pq.from_linen(Net(), ROW)
    method = pq.prune.magnitude(sparsity={**pq.nn.targets(model, ROW), ".*": 0.5})
    params = method.attach(model.params)
    state = method.init(params)
    for event in (pq.Event.PRE_EPOCH, pq.Event.POST_EPOCH, pq.Event.PRE_FINETUNE):
        stage = jnp.int32(pq.Stage.TRAIN if event != pq.Event.PRE_FINETUNE else pq.Stage.FINETUNE)
        params, state = method.boundary(
            params, state, view=pq.View(params.model, {}, {}), event=jnp.int32(event), epoch=jnp.int32(9), epochs=jnp.int32(10),
            stage=stage, stats={},
        )  # fmt: skip
    masks = method.apply(params, state)[0].masks
    assert float(masks["Dense_0/kernel"].mean()) == pytest.approx(0.25, abs=0.02)
    assert float(masks["Dense_1/kernel"].mean()) == 1.0


def test_wishes_that_no_layer_has_are_errors():
    with pytest.raises(pq.ConfigError, match="Dense: quantize has the role 'kernels'.*kernel"):
        pq.nn.Dense(4, quantize={"kernels": A}).init(jax.random.key(0), ROW)
    with pytest.raises(pq.ConfigError, match=r"quantize\['kernel'\] is 3"):
        pq.nn.nnx.Linear(2, 3, rngs=nnx.Rngs(0), quantize={"kernel": 3})
    with pytest.raises(pq.ConfigError, match="prune is 1.5"):
        pq.nn.Dense(4, prune=1.5).init(jax.random.key(0), ROW)
    shared = pq.nn.Dense(6, prune=0.5)
    with pytest.raises(pq.TraceError, match="two uses ask for"):
        pq.nn.targets(
            pq.from_function(
                lambda p, x: [shared.clone(prune=v).apply({"params": p}, x) for v in (0.5, 0.25)][0],
                shared.init(jax.random.key(0), ROW)["params"],
            ),
            ROW,
        )


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_layer_that_asks_has_the_sites_of_the_plain_one(name):
    x, arguments, wishes = LINEN[name]
    same_sites(Holder(getattr(linen, name)(**arguments)), Holder(getattr(pq.nn, name)(**arguments, quantize=wishes)), x, wishes)


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_layer_that_asks_has_the_sites_of_the_plain_one(name):
    x, arguments, options, wishes = NNX[name]
    plain = getattr(nnx, name)(*arguments, **options, rngs=nnx.Rngs(0))
    asking = getattr(pq.nn.nnx, name)(*arguments, **options, rngs=nnx.Rngs(0), quantize=wishes)
    same_sites(NnxHolder(plain), NnxHolder(asking), x, wishes)


def same_sites(plain, asking, x, wishes):
    a, b = (pq.instrument(m, x).sites for m in (plain, asking))
    assert {n: replace(s, format=None) for n, s in b.items()} == a
    assert {s.format for s in b.values()} - {None} == set(wishes.values())
    for role, fmt in wishes.items():  # a general layer's bias is a matrix, so its input is called layer/kernel/input
        assert [s.format for n, s in b.items() if n.endswith(f"/{role}")] == [fmt]


def test_no_wish_no_format():
    assert all(s.format is None for s in pq.instrument(Holder(pq.nn.Dense(3, prune=0.5)), ROW).sites.values())
