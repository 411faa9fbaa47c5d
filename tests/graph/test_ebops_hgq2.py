"""HGQ2's answers for every one of its layers, each written as an ordinary function with quantize calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.numerics import quantize, region

GOLDEN = {c["name"]: c for c in json.loads((Path(__file__).parents[1] / "golden" / "hgq2_ebops.json").read_text())["cases"]}
Formats = dict[str, pq.KIF]
NUMBERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def parameters(q: Formats) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias (0 where there is none), named "layer" for `parallel`."""
    with jax.named_scope("layer"):
        kernel = quantize(jnp.ones(np.shape(q["kq"].f)), q["kq"])
    return kernel, quantize(jnp.ones(np.shape(q["bq"].f)), q["bq"]) if "bq" in q else jnp.zeros(())


def dense(q: Formats, x: jax.Array) -> jax.Array:
    kernel, bias = parameters(q)
    y = quantize(x, q["iq"]) @ kernel
    return y + bias if "bq" in q else y


def conv(padding: str = "VALID", stride: int = 1) -> Callable:
    def layer(q: Formats, x: jax.Array) -> jax.Array:
        kernel, bias = parameters(q)
        n = x.ndim - 2
        y = jax.lax.conv_general_dilated(quantize(x, q["iq"]), kernel, (stride,) * n, padding, dimension_numbers=NUMBERS[n])
        return y + bias

    return layer


def batchnorm(q: Formats, x: jax.Array) -> jax.Array:
    scale, offset = parameters(q)
    return quantize(x, q["iq"]) * scale + offset


def einsum_dense(q: Formats, x: jax.Array) -> jax.Array:
    kernel, bias = parameters(q)
    return jnp.einsum("btc,co->bto", quantize(x, q["iq"]), kernel) + bias


def both(merge: Callable) -> Callable:
    return lambda q, a, b: merge(quantize(a, q["iq0"]), quantize(b, q["iq1"]))


def pool(init: float, merge: Callable) -> Callable:
    def layer(q: Formats, x: jax.Array) -> jax.Array:
        with jax.named_scope("layer"):
            x = quantize(x, q["iq"])
        return jax.lax.reduce_window(x, init, merge, (1, 2, 1), (1, 2, 1), "VALID")

    return layer


def unary(q: Formats, x: jax.Array) -> jax.Array:
    return quantize(region(lambda v: jnp.tanh(v) * 0.5 + v, "gate")(quantize(x, q["iq"])), q["oq"])


def trained_tables(q: Formats, x: jax.Array) -> jax.Array:
    """Every edge a network 1 -> 4 -> 1; x (batch, in) -> (batch, out)."""
    edges = quantize(jnp.broadcast_to(x[..., None], np.shape(q["iq"].f)), q["iq"])
    w = jnp.ones((*np.shape(q["iq"].f)[1:], 4))
    network = region(lambda v, a, b: jnp.sum(jnp.tanh(v[..., None] * a) * b, -1), "layer")
    return quantize(network(edges, w, w), q["toq"]).sum(1)


def softmax(q: Formats, x: jax.Array) -> jax.Array:
    x = quantize(x, q["iq"]) if "iq" in q else x
    distance = quantize(x - jnp.max(x, -1, keepdims=True), q["exp_iq"])
    with jax.named_scope("terms"):
        terms = quantize(region(jnp.exp, "exp")(distance), q["exp_oq"])
    total = quantize(jnp.sum(terms, -1, keepdims=True), q["inv_iq"])
    return terms * quantize(region(lambda v: 1 / (v + 1e-7), "inv")(total), q["inv_oq"])


def attention(q: Formats, x: jax.Array) -> jax.Array:
    """The products alone: their term of the layer's own, behind the projections."""
    batch, n, heads, size = np.shape(q["q_oq"].f)
    split = jnp.broadcast_to(x[:, :, None, :size], (batch, n, heads, size))
    query, key, value = (quantize(split, q[f"{name}_oq"]) for name in "qkv")
    scores = jnp.einsum("aecd,abcd->acbe", key, query)
    return jnp.einsum("acbe,aecd->abcd", quantize(scores, q["softmax_oq"]), value)


LAYERS: dict[str, tuple[Callable, dict[str, float] | None]] = {
    "QDense": (dense, None),
    "QDense_nobias": (dense, None),
    "QDense_3d_pf_all": (dense, {"layer": -1}),
    "QDense_3d_pf1": (dense, {"layer": 1}),
    "QConv1D": (conv(), None),
    "QConv1D_pf1": (conv(), {"layer": 1}),
    "QConv2D_same_s2": (conv("SAME", 2), None),
    "QConv2D_pf2": (conv(), {"layer": 2}),
    "QBatchNormalization": (batchnorm, None),
    "QEinsumDense": (einsum_dense, None),
    "QEinsumDense_pf1": (einsum_dense, {"layer": 1}),
    "QAdd": (both(jnp.add), None),
    "QSubtract": (both(jnp.subtract), None),
    "QMultiply": (both(jnp.multiply), None),
    "QMaximum": (both(jnp.maximum), None),
    "QDot": (both(lambda a, b: jnp.einsum("ni,ni->n", a, b)), None),
    "QEinsum": (both(jnp.matmul), None),
    "QSum": (lambda q, x: quantize(x, q["iq"]).sum(1), None),
    "QMeanPow2": (lambda q, x: quantize(x, q["iq"]).mean(1), None),
    "QMaxPooling1D": (pool(-np.inf, jax.lax.max), None),
    "QAveragePooling1D_pf1": (pool(0.0, jax.lax.add), {"layer": 1}),
    "QUnaryFunctionLUT": (unary, None),
    "QDenseT": (trained_tables, None),
    "QSoftmax_stable": (softmax, None),
    "QMultiHeadAttention": (attention, None),
}


def raw(case: dict[str, Any]) -> dict[str, dict[str, jax.Array]]:
    """What each quantizer trains: (i, f), or (b, i) with f = b - i."""
    return {n: {p: jnp.float32(d[p]) for p in ("b", "i", "f") if p in d} for n, d in case["quantizers"].items()}


def formats(case: dict[str, Any], trained: dict[str, dict[str, jax.Array]]) -> Formats:
    def one(name: str, d: dict[str, Any]) -> pq.KIF:
        r = trained[name]
        return pq.KIF(jnp.float32(d["k"]), r["i"], r["f"] if "f" in r else r["b"] - r["i"], "RND", d["overflow"])

    return {name: one(name, d) for name, d in case["quantizers"].items()}


def products(case: dict[str, Any], q: Formats) -> dict[str, jax.Array]:
    """EBOPs by label of the case's layer as HGQ2 counts them."""
    layer, parallel = LAYERS[case["name"]]
    inputs = [jnp.zeros(shape) for shape in case["shapes"]]
    return pq.graph.products(lambda *x: layer(q, *x), *inputs, compat="hgq2", parallel=parallel)


def own(made: dict[str, jax.Array]) -> jax.Array:
    """HGQ2 gives softmax's two tables beside the layer's own term."""
    return sum((v for name, v in made.items() if name not in ("exp", "inv")), jnp.zeros(()))


def test_every_layer_of_the_recording_is_here():
    assert set(LAYERS) == set(GOLDEN)


@pytest.mark.parametrize("name", LAYERS)
def test_value(name):
    case = GOLDEN[name]
    made = products(case, formats(case, raw(case)))
    assert float(own(made)) == case["ebops"]
    tables = {k: case[f"{k}_table_ebops"] for k in ("exp", "inv") if f"{k}_table_ebops" in case}
    assert {k: float(made[k]) for k in tables} == tables


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "QMultiHeadAttention"])  # theirs are not recorded
def test_gradient(name):
    """To f of an activation, and to (b, i) of a weight.

    At b = 0 theirs goes on pushing a weight's width down; ours is a relu everywhere, whose slope there is 0.
    """
    case = GOLDEN[name]
    grads = jax.jit(jax.grad(lambda r: own(products(case, formats(case, r)))))(raw(case))
    for quantizer, d in case["quantizers"].items():
        for part, want in d["gradient"].items():
            want = np.where(np.asarray(d["bits"]) > 0, want, 0) if part == "b" else want
            np.testing.assert_allclose(grads[quantizer][part], want, rtol=2e-6, err_msg=f"{quantizer}.{part}")


class Layer(nn.Module):
    """The same as linen's own layers."""

    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        return {
            "QDense": lambda: nn.Dense(3, name="layer"),
            "QDense_nobias": lambda: nn.Dense(3, use_bias=False, name="layer"),
            "QDense_3d_pf_all": lambda: nn.Dense(3, name="layer"),
            "QDense_3d_pf1": lambda: nn.Dense(3, name="layer"),
            "QConv1D": lambda: nn.Conv(3, (2,), padding="VALID", name="layer"),
            "QConv1D_pf1": lambda: nn.Conv(3, (2,), padding="VALID", name="layer"),
            "QConv2D_same_s2": lambda: nn.Conv(2, (2, 3), 2, padding="SAME", name="layer"),
            "QConv2D_pf2": lambda: nn.Conv(2, (2, 2), padding="VALID", name="layer"),
            "QBatchNormalization": lambda: nn.BatchNorm(use_running_average=not train, name="layer"),
        }[self.kind]()(x)


LINEN = [n for n in LAYERS if n.startswith(("QDense", "QConv", "QBatch")) and n != "QDenseT"]


@pytest.mark.parametrize("name", LINEN)
def test_an_instrumented_layer_says_the_same(name):
    case = GOLDEN[name]
    x = np.zeros(case["shapes"][0], np.float32)
    inst = pq.instrument(pq.from_linen(Layer(name), x), x)
    made = formats(case, raw(case))
    sites = {"kernel": "kq", "fused_scale": "kq", "bias": "bq", "fused_offset": "bq", "input": "iq"}
    given = {site: made[sites[site.rpartition("/")[2]]] for site in inst.sites}
    for site, fmt in given.items():
        k, i, f = (np.reshape(part, inst.sites[site].shape) for part in (fmt.k, fmt.i, fmt.f))
        given[site] = pq.KIF(k, i, f, fmt.rounding, fmt.overflow)
    view = pq.View(inst.model.params, given, {})
    parallel = {"layer/kernel": pf["layer"]} if (pf := LAYERS[name][1]) else None
    # not under jit: XLA fuses the factor and the sum that follows into one rounding
    assert float(inst.ebops(view, compat="hgq2", parallel=parallel)) == case["ebops"]
