"""What the models compute, against the formulas of their docstrings in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import zoo
from pquant_jax.zoo import vae_encoder, vae_loss

CLOSE = dict(rtol=2e-5, atol=2e-6)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(5, 6, 3)).astype(np.float32)


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def relu(x):
    return np.maximum(x, 0)


def layers(p, x):
    for name in sorted(p):
        x = relu(dense(p[name], x))
    return x


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run(module, variables, x, **kwargs):
    return jax.jit(lambda v, x: module.apply(v, x, **kwargs))(variables, x)


def test_deepsets(drawn, x):
    module = zoo.deepsets((4, 5), (3,), 2)
    p = (v := drawn(module, x))["params"]
    pooled = layers(p["phi"], x).sum(1) / 8  # the power of two nearest below 1/6
    np.testing.assert_allclose(run(module, v, x), dense(p["output"], layers(p["rho"], pooled)), **CLOSE)


def test_interaction_network(drawn, x):
    module = zoo.interaction_network((4, 3), (5,), (4,), 2)
    p = (v := drawn(module, x))["params"]
    received = np.zeros((5, 6, 3))
    for r in range(6):
        for s in range(6):
            if r != s:
                received[:, r] += layers(p["edge"], np.concatenate([x[:, r], x[:, s]], -1))
    nodes = layers(p["node"], np.concatenate([x, received], -1))
    np.testing.assert_allclose(run(module, v, x), dense(p["output"], layers(p["head"], nodes.sum(1) / 8)), **CLOSE)


def test_jedi_linear_is_the_sum_of_linear_messages(x):
    made = zoo.jedi_linear(edge=4, node=(3,), head=(4,), outputs=2, seed=3)
    model = pq.from_nnx(made)
    p = jax.tree.map(np.asarray, model.params)
    edges = x[:, :, None] @ p["own"]["kernel"] / 6 + x[:, None] @ p["others"]["kernel"] / 8  # (n, receiver, sender, features)
    h = relu(edges.sum(2) + p["own"]["bias"])
    pooled = relu(dense(p["node"][0], h)).sum(1) / 8
    wanted = dense(p["output"], relu(dense(p["head"][0], pooled)))
    np.testing.assert_allclose(made(x), wanted, **CLOSE)


@pytest.mark.parametrize("name", ["deepsets", "interaction_network", "transformer"])
def test_the_order_of_particles_does_not_matter(drawn, x, name):
    module = getattr(zoo, name)()
    forward = jax.jit(module.apply)
    v = drawn(module, x)
    np.testing.assert_allclose(forward(v, x), forward(v, x[:, [3, 0, 5, 1, 4, 2]]), rtol=1e-4, atol=1e-5)


def test_mixer(drawn, x):
    module = zoo.mixer(width=4, tokens=5, channels=3, blocks=1, outputs=2)
    v = drawn(module, x)
    p, state = v["params"], v["batch_stats"]["BatchNorm_0"]
    h = (x @ p["Dense_0"]["kernel"] - state["mean"]) / np.sqrt(state["var"] + 1e-5)
    h = relu(h * p["BatchNorm_0"]["scale"] + p["BatchNorm_0"]["bias"])
    by_width = {p[f"Dense_{n}"]["kernel"].shape: p[f"Dense_{n}"] for n in range(1, 6)}  # names are in the order of creation
    h = h + np.swapaxes(dense(by_width[5, 6], relu(dense(by_width[6, 5], np.swapaxes(h, 1, 2)))), 1, 2)
    h = h + dense(by_width[3, 4], relu(dense(by_width[4, 3], h)))
    np.testing.assert_allclose(run(module, v, x), dense(by_width[4, 2], relu(h).sum(1) / 8), **CLOSE)


def test_gru(drawn, x):
    module = zoo.gru(4, 2)
    p = (v := drawn(module, x))["params"]
    g, h = p["GRUCell_0"], np.zeros((5, 4))
    for t in range(6):
        now = x[:, t]
        r = sigmoid(dense(g["ir"], now) + dense(g["hr"], h))
        z = sigmoid(dense(g["iz"], now) + dense(g["hz"], h))
        n = np.tanh(dense(g["in"], now) + r * dense(g["hn"], h))
        h = (1 - z) * n + z * h
    np.testing.assert_allclose(run(module, v, x), dense(p["Dense_0"], h), **CLOSE)


def test_two_heads_share_their_trunk(drawn):
    rng = np.random.default_rng(0)
    x = {"image": rng.normal(size=(3, 8, 8, 1)), "features": rng.normal(size=(3, 4, 3))}
    x = jax.tree.map(lambda v: v.astype(np.float32), x)
    module = zoo.two_heads()
    v = drawn(module, x)
    forward = jax.jit(module.apply)
    made, without = forward(v, x), forward(v, {**x, "image": 0 * x["image"]})
    assert all((made[head] != without[head]).any() for head in ("class", "value"))


def test_resnet_adds_its_shortcuts(drawn):
    module = zoo.resnet20(3, blocks=1, width=2)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)
    v = drawn(module, x)
    quiet = jax.tree_util.tree_map_with_path(  # no convolution but the first and the shortcuts: what they add stays
        lambda path, leaf: 0 * leaf if "Conv" in jax.tree_util.keystr(path) and leaf.shape[:2] == (3, 3) else leaf, v
    )
    quiet["params"]["Conv_0"] = v["params"]["Conv_0"]
    forward = jax.jit(module.apply)
    made = [np.asarray(forward(params, x)) for params in (v, quiet)]
    assert (made[0] != made[1]).any() and np.ptp(made[1], axis=0).max() > 0
    _, updated = jax.eval_shape(lambda: module.apply(v, x, train=True, mutable=["batch_stats"]))
    assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(v["batch_stats"])


def test_the_vae_draws_in_training_alone_and_its_score_is_its_encoder(drawn):
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    module = zoo.vae(6, (5,), 2)
    p = (v := drawn(module, x))["params"]
    hidden = relu(dense(p["encoder_0"], x))
    mean, log_var = dense(p["mean"], hidden), dense(p["log_var"], hidden)
    made = run(module, v, x)
    divergence = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(-1, keepdims=True)
    np.testing.assert_allclose(made["divergence"], divergence, rtol=1e-4, atol=1e-5)
    back = dense(p["output"], relu(dense(p["decoder_0"], mean)))
    np.testing.assert_allclose(made["reconstruction"], back, **CLOSE)
    one, two = (module.apply(v, x, train=True, rngs={"dropout": jax.random.key(s)})["reconstruction"] for s in range(2))
    assert (one != two).all()
    np.testing.assert_allclose(vae_loss(made, x, 0.1), np.square(back - x).mean(-1) + 0.1 * divergence[:, 0], rtol=1e-4)
    encoder = vae_encoder(module, p)
    score, _ = encoder.forward(encoder.params, encoder.state, x, train=False, rng=None)
    np.testing.assert_allclose(score, np.square(mean).sum(-1, keepdims=True), **CLOSE)
    assert set(encoder.params) == {"encoder_0", "mean"}


def test_the_expression(x):
    features = np.random.default_rng(2).normal(size=(9, 16)).astype(np.float32)
    model = zoo.symbolic()
    p = {name: float(v) for name, v in model.params.items()}
    made, _ = model.forward(model.params, model.state, jnp.asarray(features), train=False, rng=None)
    mass, count = features[:, 14], features[:, 15]
    np.testing.assert_allclose(made[:, 0], p["g_scale"] * count + np.tanh(p["g_slope"] * features[:, 2] - mass), **CLOSE)
    gauss = p["w_width"] * np.exp(-((mass + p["w_centre"]) ** 2)) - features[:, 0] * features[:, 2]
    np.testing.assert_allclose(made[:, 3], gauss, **CLOSE)
