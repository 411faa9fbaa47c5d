"""One network in four frameworks with the same numbers in it, and helpers that every graph test needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pquant_jax as pq
from pquant_jax import _tree

WIDTHS = {"a": (6, 8), "b": (8, 8), "c": (8, 3)}


class Written(NamedTuple):
    """A model in one framework.  names: {its own path prefix: the common one}; transposed: kernels are (out, in)."""

    model: pq.Model
    names: dict[str, str]
    transposed: bool = False


class LinenNet(nn.Module):
    batchnorm: bool

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(8)(x)
        if self.batchnorm:
            h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.relu(h)
        h = h + nn.relu(nn.Dense(8)(h))
        return nn.Dense(3)(h)


class NnxNet(nnx.Module):
    def __init__(self, batchnorm, rngs):
        self.a = nnx.Linear(6, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs) if batchnorm else None
        self.b = nnx.Linear(8, 8, rngs=rngs)
        self.c = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        h = self.a(x)
        h = nnx.relu(self.bn(h) if self.bn is not None else h)
        h = h + nnx.relu(self.b(h))
        return self.c(h)


class EquinoxNet(eqx.Module):
    a: eqx.nn.Linear
    bn: Any
    b: eqx.nn.Linear
    c: eqx.nn.Linear

    def __init__(self, batchnorm, key):
        keys = jax.random.split(key, 3)
        self.a, self.b, self.c = (eqx.nn.Linear(*WIDTHS[n], key=k) for n, k in zip("abc", keys, strict=True))
        self.bn = eqx.nn.BatchNorm(8, "batch", mode="ema") if batchnorm else None

    def __call__(self, x, state):
        h = self.a(x)
        if self.bn is not None:
            h, state = self.bn(h, state)
        h = jax.nn.relu(h)
        h = h + jax.nn.relu(self.b(h))
        return self.c(h), state


def plain_net(batchnorm: bool) -> Callable:
    def forward(params, state, x, *, train, rng):
        del rng

        def dense(name, v):
            return v @ params[name]["kernel"] + params[name]["bias"]

        h = dense("a", x)
        if batchnorm:
            mean, var = (jnp.mean(h, 0), jnp.var(h, 0)) if train else (state["mean"], state["var"])
            h = (h - mean) * (jax.lax.rsqrt(var + 1e-5) * params["bn"]["scale"]) + params["bn"]["bias"]
            if train:
                state = {"mean": 0.99 * state["mean"] + 0.01 * mean, "var": 0.99 * state["var"] + 0.01 * var}
        h = jax.nn.relu(h)
        h = h + jax.nn.relu(dense("b", h))
        return dense("c", h), state

    return forward


def numbers(seed: int) -> dict[str, np.ndarray]:
    """Parameters and running statistics of the network by their common names."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, shape in WIDTHS.items():
        values[f"{name}/kernel"] = rng.normal(0, 0.7, shape)
        values[f"{name}/bias"] = rng.normal(0, 0.3, shape[1])
    values["bn/scale"], values["bn/bias"] = rng.uniform(0.5, 1.5, 8), rng.normal(0, 0.5, 8)
    values["bn/mean"], values["bn/var"] = rng.normal(0, 0.5, 8), rng.uniform(0.3, 2.0, 8)
    return {name: np.asarray(v, np.float32) for name, v in values.items()}


def write_four(seed: int, batchnorm: bool) -> dict[str, Written]:
    values, x = numbers(seed), np.zeros((2, 6), np.float32)
    linen = {"Dense_0": "a", "Dense_1": "b", "Dense_2": "c", "BatchNorm_0": "bn"}
    written = {"linen": Written(pq.from_linen(LinenNet(batchnorm), x), linen)}
    written["nnx"] = Written(pq.from_nnx(NnxNet(batchnorm, nnx.Rngs(0))), {})
    net, state = eqx.nn.make_with_state(EquinoxNet)(batchnorm, jax.random.key(0))
    written["equinox"] = Written(pq.from_equinox(net, state), {"weight": "kernel", "bn/weight": "bn/scale"}, True)
    params = {n: {part: values[f"{n}/{part}"] for part in ("kernel", "bias")} for n in WIDTHS}
    stats = {"mean": values["bn/mean"], "var": values["bn/var"]} if batchnorm else {}
    if batchnorm:
        params["bn"] = {"scale": values["bn/scale"], "bias": values["bn/bias"]}
    written["plain"] = Written(pq.Model(plain_net(batchnorm), jax.tree.map(jnp.asarray, params), stats), {})
    return {name: w._replace(model=filled(w, values)) for name, w in written.items()}


def filled(w: Written, values: dict[str, np.ndarray]) -> pq.Model:
    """`w.model` with `values` in place of what its framework initialised."""
    leaves = {}
    for path in _tree.flatten(w.model.params):
        name = common(path, w)
        leaves[path] = jnp.asarray(values[name].T if w.transposed and name.endswith("kernel") else values[name])
    kinds = {"mean": "bn/mean", "var": "bn/var", "1/0": "bn/mean", "1/1": "bn/var"}  # equinox numbers its statistics
    state = {}
    for path, leaf in _tree.flatten(w.model.state).items():
        known = next((v for end, v in kinds.items() if path.endswith(end)), None)
        state[path] = leaf if known is None else jnp.asarray(values[known]).reshape(jnp.shape(leaf))
    if "0" in state:  # equinox: "has it seen a batch yet"
        state["0"] = jnp.zeros_like(state["0"])
    return w.model._replace(params=_tree.replace(w.model.params, leaves), state=_tree.replace(w.model.state, state))


def common(name: str, w: Written) -> str:
    """A path or site of `w` under its common name."""
    for own, ours in sorted(w.names.items(), key=lambda pair: -len(pair[0])):
        if name == own or name.startswith(f"{own}/") or name.endswith(f"/{own}"):
            return name.replace(own, ours)
    return name


@pytest.fixture(scope="session")
def four() -> Callable[..., dict[str, Written]]:
    return write_four


@pytest.fixture(scope="session")
def common_name() -> Callable[[str, Written], str]:
    return common


@pytest.fixture(scope="session")
def view_at() -> Callable[..., pq.View]:
    """view_at(inst, i, f): every site and parameter at the same format; modes by keyword."""

    def make(inst: pq.Instrumented, i: float, f: float, **modes: str) -> pq.View:
        kifs = {n: pq.kif(float(s.signed), jnp.full(s.shape, i), jnp.full(s.shape, f), **modes) for n, s in inst.sites.items()}
        leaves = _tree.flatten(inst.model.params)
        chosen = {n: pq.numerics.quantize(leaves[n], kifs[n]) for n, s in inst.sites.items() if n in leaves}
        return pq.View(_tree.replace(inst.model.params, chosen), kifs, {})

    return make


@pytest.fixture(scope="session")
def float_view() -> Callable[[pq.Instrumented], pq.View]:
    return lambda inst: pq.View(inst.model.params, {}, {})
