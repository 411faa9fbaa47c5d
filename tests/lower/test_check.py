"""`pq.check` names every gap of a model at once, and nothing that is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import lower

X = np.zeros((2, 4), np.float32)
FMT = pq.kif(1, 2, 3)


def quantized(x: jax.Array) -> jax.Array:
    return pq.numerics.quantize(x, FMT)


def random_model(seed: int, removed: frozenset[str]) -> tuple[pq.Model, list[str]]:
    """(model, its quantizers): 3 to 8 layers, each product, sum or square with quantizers but those that are removed.

    A data operand is named by its layer, a parameter by its path.
    """
    rng = np.random.default_rng(seed)
    kinds = ["dense", *rng.choice(["dense", "bias", "square", "pair"], rng.integers(2, 8))]
    params = {
        f"p{n}": jnp.asarray(rng.normal(size=(4, 4) if kind == "dense" else 4), jnp.float32) for n, kind in enumerate(kinds)
    }
    names = []
    for n, kind in enumerate(kinds):
        if kind != "bias" and any(k != "bias" for k in kinds[:n]):  # in front of the first product the input has a port
            names.append(f"layer{n}")
        if kind in ("dense", "bias"):
            names.append(f"p{n}")

    def forward(p: Any, x: jax.Array) -> jax.Array:
        for n, kind in enumerate(kinds):
            with jax.named_scope(f"layer{n}"):
                parameter = p[f"p{n}"] if f"p{n}" in removed else quantized(p[f"p{n}"])
                if kind == "bias":
                    x = x + parameter
                    continue
                v = x if f"layer{n}" in removed else quantized(x)
                x = jax.nn.relu(v @ parameter) if kind == "dense" else v * v if kind == "square" else v * v[:, ::-1]
        return x

    return pq.from_function(forward, params), names


@pytest.mark.parametrize("seed", range(20))
def test_every_removed_quantizer_is_named(seed):
    _, names = random_model(seed, frozenset())
    rng = np.random.default_rng(100 + seed)
    removed = frozenset(str(n) for n in rng.choice(names, rng.integers(0, len(names) + 1), replace=False))
    model, _ = random_model(seed, removed)
    gaps = pq.check(model, x=X, inputs=pq.InputSpec(1, 2, 3))
    assert sorted(gap.where for gap in gaps) == sorted(removed)
    assert all("test_check.py:" in gap.line and "quantize" in gap.fix for gap in gaps)


def test_all_kinds_of_gaps_at_once():
    def forward(p, x):
        h = jnp.tanh(x["a"]) @ p["w"]
        h = jnp.sort(h, 1) / 3
        return jnp.argmax(h * quantized(x["b"]), 1)

    model = pq.from_function(forward, {"w": jnp.full((4, 4), 0.3)})
    gaps = pq.check(model, x={"a": X, "b": X})
    assert [(g.where, g.op) for g in gaps] == [
        ("input/a", "input without a port"),
        ("input/a", "'tanh'"),
        ("w", "constant of 23 significant bits"),
        ("input/a", "'sort'"),
        ("input/a", "a division by 3.0"),
        ("input/a", "operand of 'mul' without a quantizer"),
        ("input/a", "'argmax'"),
    ]
    assert all("test_check.py:" in g.line for g in gaps)
    assert str(gaps[0]).startswith("input/a: input without a port at ") and "declare its format" in str(gaps[0])


def test_sites_of_an_instrumented_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Dense(3)(x)))

    inst = pq.instrument(pq.from_linen(Net(), X), X)
    assert {g.where for g in pq.check(inst)} == set(inst.sites)
    chain = pq.quantize.fixed(inst.sites)
    params = chain.attach(inst.model.params)
    view, _ = chain.apply(params, chain.init(params))
    assert pq.check(inst, view) == []
    lower.trace(inst, view, {})
    view = view._replace(sites={n: v for n, v in view.sites.items() if n != "Dense_1/input"})
    (gap,) = pq.check(inst, view)
    assert gap.where == "Dense_1/input" and "add a quantizer to the chain" in gap.fix


TAKEN: dict[str, Callable] = {
    "quantized sums": lambda p, x: quantized(quantized(x) + 1) * quantized(x),
    "relu and slices": lambda p, x: jax.nn.relu(quantized(x)[:, ::-1]) * quantized(x),
    "mask": lambda p, x: jnp.where(jnp.arange(4) < 2, quantized(x), -4.0),
    "table": lambda p, x: pq.numerics.region(jnp.tanh, "tanh")(quantized(x)),
    "scaled": lambda p, x: (quantized(x) * 0.5) * quantized(x),
}


@pytest.mark.parametrize("name", TAKEN)
def test_nothing_is_missing(name):
    assert pq.check(pq.from_function(TAKEN[name], {}), x=X) == []


def test_operand_of_a_table():
    gaps = pq.check(pq.from_function(lambda p, x: pq.numerics.region(jnp.tanh, "tanh")(quantized(x) + quantized(x)), {}), x=X)
    assert [g.op for g in gaps] == ["operand of table 'tanh' without a quantizer"]


def test_what_is_too_large():
    model = pq.from_function(lambda p, x: quantized(x) @ quantized(p["w"]), {"w": jnp.ones((800, 800))})
    (gap,) = pq.check(model, x=np.zeros((1, 800), np.float32))
    assert "640,000 products" in gap.op and "io_stream" in gap.fix


def test_wrong_arguments():
    with pytest.raises(pq.LoweringError, match=r"an Instrumented, or a Model and its input x=, got Model"):
        pq.check(pq.from_function(lambda p, x: x, {}))
