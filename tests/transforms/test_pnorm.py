"""p-norm decay: the reference's update, a decay that is decoupled, and weights that vanish."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pquant_jax._errors import TransformError
from pquant_jax.transforms import pnorm_decay

W = {"kernel": jnp.float32([[0.5, -0.2], [1e-4, 0.0]])}
G = {"kernel": jnp.float32([[1.0, -1.0], [0.5, 0.0]])}


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0])
def test_the_update_is_the_papers(p):
    tx = optax.chain(optax.sgd(0.1), pnorm_decay(0.1, p=p, strength=0.3))
    updates, _ = jax.jit(tx.update)(G, tx.init(W), W)
    w, g = (np.asarray(v["kernel"], np.float64) for v in (W, G))
    x = np.abs(w) ** (2 - p)
    np.testing.assert_allclose(optax.apply_updates(W, updates)["kernel"], (w - 0.1 * g) * x / (x + p * 0.1 * 0.3), atol=1e-7)


GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pquantml.json").read_text())["optimizers"]
OPTIMIZERS = {"pAdam": optax.adam, "pSGD": lambda rate: optax.sgd(rate, momentum=0.9)}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['optimizer']}-p={c['p_norm']}-{c['lambda_p']}")
def test_golden(case):
    """PQuantML's pAdam and pSGD, step by step; its parameter groups are `optax.masked`."""
    rate, p = GOLDEN["lr"], case["p_norm"]
    strengths = {"a": case["lambda_p"], "b": GOLDEN["lambda_p_of_b"]}
    decays = [optax.masked(pnorm_decay(rate, p=p, strength=v), {"a": k == "a", "b": k == "b"}) for k, v in strengths.items()]
    tx = optax.chain(OPTIMIZERS[case["optimizer"]](rate), *decays)
    w = {name: jnp.float32(v) for name, v in GOLDEN["start"].items()}
    update, state = jax.jit(tx.update), tx.init(w)
    for gradient, theirs in zip(GOLDEN["gradients"], case["steps"], strict=True):
        updates, state = update({name: jnp.float32(v) for name, v in gradient.items()}, state, w)
        w = optax.apply_updates(w, updates)
        for name, value in w.items():
            np.testing.assert_allclose(value, np.float32(theirs[name]), rtol=1e-5, atol=1e-6, err_msg=name)


def test_defect_the_learning_rate_has_to_be_named():
    """pAdam(params, 0.01) is a TypeError in PQuantML, whose first argument after the parameters is its own."""
    updates, _ = pnorm_decay(0.01).update(G, pnorm_decay(0.01).init(W), W)
    named, _ = pnorm_decay(learning_rate=0.01).update(G, pnorm_decay(0.01).init(W), W)
    jax.tree.map(np.testing.assert_array_equal, updates, named)


def test_small_weights_vanish_and_large_ones_stay():
    tx = pnorm_decay(1e-2, p=1.0, strength=1.0)
    w, state = jnp.float32([1.0, 0.01]), tx.init(W)
    for _ in range(60):
        updates, state = tx.update(jnp.zeros(2), state, w)
        w = w + updates
    assert w[0] > 0.3 and abs(w[1]) < 1e-6 and int(state.count) == 60


def test_a_schedule_is_read_at_its_step_and_nothing_recompiles():
    rate = optax.linear_schedule(0.1, 0.0, 10)
    tx = pnorm_decay(rate, strength=1.0)
    traces = []

    @jax.jit
    def step(w, state):
        traces.append(1)
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        return w + updates, state

    w, state = jnp.float32([0.1]), tx.init(jnp.float32([0.1]))
    for n in range(3):
        expected = w * (w / (w + rate(n)))
        w, state = step(w, state)
        np.testing.assert_allclose(w, expected, rtol=1e-6)
    assert len(traces) == 1


def test_a_rate_of_0_leaves_a_weight_of_0_alone():
    tx = pnorm_decay(optax.linear_schedule(0.1, 0.0, 1))
    state = tx.update(G, tx.init(W), W)[1]
    updates, _ = tx.update(G, state, W)
    np.testing.assert_allclose(updates["kernel"], G["kernel"], rtol=1e-6)


def test_errors():
    with pytest.raises(TransformError, match="p is 3"):
        pnorm_decay(0.1, p=3)
    with pytest.raises(TransformError, match="needs the parameters"):
        pnorm_decay(0.1).update(G, pnorm_decay(0.1).init(W))
