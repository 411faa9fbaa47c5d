"""Loops: a scan, a while of a known length and a known branch are straight code before anything else looks at them."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import pquant_jax as pq
from pquant_jax.graph import flatten

W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)}
X = np.random.default_rng(1).normal(size=(4, 5, 3)).astype(np.float32)


def cell(p, h, x):
    h = jnp.maximum(h @ p["w"] + x, 0)
    return h, h


def over_time(p, x, **options):
    """(last carry, every output) of a scan over axis 1, which starts from zeros."""
    h, ys = lax.scan(lambda h, v: cell(p, h, v), jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1), **options)
    return h, jnp.swapaxes(ys, 0, 1)


def counted(p, x):
    """A while loop whose counter is known."""
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.maximum(c[1] @ p["w"], 0)), (0, x[:, 0]))[1]


LOOPS: dict[str, Callable] = {
    "scan": over_time,
    "reverse": lambda p, x: over_time(p, x, reverse=True),
    "unrolled by 2": lambda p, x: over_time(p, x, unroll=2),
    "carry alone": lambda p, x: lax.scan(lambda h, _: (h @ p["w"], None), x[:, 0], None, length=3)[0],
    "carry with the batch last": lambda p, x: lax.scan(lambda h, _: (p["w"] @ h, None), x[:, 0].T, None, length=2)[0].T,
    "nested": lambda p, x: lax.scan(
        lambda h, v: (lax.scan(lambda g, _: (cell(p, g, v)[0], None), h, None, length=2)[0], None),
        jnp.zeros((len(x), 3)), jnp.swapaxes(x, 0, 1),
    )[0],
    "under vmap": lambda p, x: jax.vmap(lambda v: lax.scan(lambda h, u: cell(p, h, u), jnp.zeros(3), v)[1])(x),
    "under jit": lambda p, x: jax.jit(over_time)(p, x),
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda n, h: h @ p["w"] + n, x[:, 0]),
    "fori over steps": lambda p, x: lax.fori_loop(
        0, 5, lambda t, h: cell(p, h, lax.dynamic_index_in_dim(x, t, 1, False))[0], jnp.zeros((len(x), 3))
    ),
    "while": counted,
    "map": lambda p, x: jnp.moveaxis(lax.map(lambda v: v @ p["w"], jnp.moveaxis(x, 1, 0)), 0, 1),
    "associative_scan": lambda p, x: lax.associative_scan(jnp.add, x, axis=1) @ p["w"],
    "cond": lambda p, x: lax.cond(True, lambda v: v @ p["w"], lambda v: v, x[:, 0]),
    "switch": lambda p, x: lax.switch(jnp.int32(1), [lambda v: v, lambda v: 2 * (v @ p["w"])], x[:, 0]),
    "no steps": lambda p, x: lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, -c[1]), (0, x[:, 0]))[1] @ p["w"],
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_straight_code_computes_the_same(name):
    """With all sites off, and for one sample as for its row of a batch; nothing of the loop is left."""
    forward = LOOPS[name]
    inst = pq.instrument(pq.from_function(forward, W), X[:2])
    names = {s.eqn.primitive.name for s in flatten(jax.make_jaxpr(lambda x: inst.forward(pq.View(W, {}, {}), {}, x)[0])(X)).steps}
    assert not names & {"scan", "while", "cond"}
    y, _ = jax.jit(lambda x: inst.forward(pq.View(W, {}, {}), {}, x, train=True))(X)
    for ours, wanted in zip(jax.tree.leaves(y), jax.tree.leaves(jax.jit(lambda x: forward(W, x))(X)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-6)
    one = pq.instrument(pq.from_function(forward, W), X[:1])
    assert list(one.sites.items()) == list(inst.sites.items()) and one.roles == inst.roles


def test_every_step_has_sites_and_the_kernel_one():
    """But for the first, which multiplies the zeros that the loop starts from."""
    inst = pq.instrument(pq.from_function(over_time, W), X)
    assert set(inst.sites) == {"w", "w/input", *(f"w/input#{n}" for n in range(1, 4))}
    assert {spec.shape for spec in inst.sites.values()} == {(3, 3), (3,)}
    assert inst.reference8 == 4 * 9 * 64


def test_start_that_is_a_parameter():
    params = {**W, "start": jnp.ones(3)}
    inst = pq.instrument(
        pq.from_function(
            lambda p, x: lax.scan(
                lambda h, v: cell(p, h, v), jnp.broadcast_to(p["start"], (len(x), 3)), jnp.swapaxes(x, 0, 1)
            )[0],
            params,
        ),
        X,
    )  # fmt: skip
    assert inst.sites["w/input"].shape == (3,) and inst.roles["w"].in_axes == (0,)


def linen_rnn(inner: Callable) -> pq.Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.RNN(inner())(x)[:, -1])

    return pq.from_linen(Net(), X[:2])


def nnx_rnn(inner: Callable) -> pq.Model:
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(inner(rngs))
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[:, -1])

    return pq.from_nnx(Net(nnx.Rngs(0)))


class EquinoxRNN(eqx.Module):
    cell: eqx.nn.GRUCell

    def __call__(self, x):
        return lax.scan(lambda h, v: (self.cell(v, h), None), jnp.zeros(4), x)[0]


RECURRENT: dict[str, Callable[[], pq.Model]] = {
    "linen simple": lambda: linen_rnn(lambda: nn.SimpleCell(4, activation_fn=nn.relu)),
    "linen gru": lambda: linen_rnn(lambda: nn.GRUCell(4)),
    "linen lstm": lambda: linen_rnn(lambda: nn.LSTMCell(4)),
    "linen optimized lstm": lambda: linen_rnn(lambda: nn.OptimizedLSTMCell(4)),
    "nnx simple": lambda: nnx_rnn(lambda rngs: nnx.SimpleCell(3, 4, rngs=rngs)),
    "nnx gru": lambda: nnx_rnn(lambda rngs: nnx.GRUCell(3, 4, rngs=rngs)),
    "nnx lstm": lambda: nnx_rnn(lambda rngs: nnx.OptimizedLSTMCell(3, 4, rngs=rngs)),
    "equinox gru": lambda: pq.from_equinox(EquinoxRNN(eqx.nn.GRUCell(3, 4, key=jax.random.key(0)))),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_cells(name):
    """Every step's activations are sites, every kernel is one, and the forward is the model's."""
    model = RECURRENT[name]()
    inst = pq.instrument(model, X[:2])
    kernels = {name for name, spec in inst.sites.items() if spec.kind == "kernel"}
    assert kernels and kernels <= set(inst.roles)
    assert any(name.endswith("#4") for name in inst.sites)
    assert all(2 not in spec.shape[:1] for name, spec in inst.sites.items() if spec.kind == "input"), "a batch in a site"
    view = pq.View(model.params, {}, {})
    y, _ = inst.forward(view, model.state, X, train=True, rng=jax.random.key(0))
    wanted, _ = model.forward(model.params, model.state, X, train=True, rng=jax.random.key(0))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)
