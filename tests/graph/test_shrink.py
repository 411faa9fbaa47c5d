"""`shrink`: really smaller arrays, the same integers out, in every framework and past what can't be cut."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import pquant_jax as pq
from pquant_jax import _tree, lower
from pquant_jax.lower.emulate import port_grid

X = np.random.default_rng(0).normal(0, 3, (64, 6)).astype(np.float32)


def same_outputs(inst: pq.Instrumented, view: pq.View, x: Any = X, state: Any = None, **kwargs) -> pq.graph.Shrunk:
    """The shrunken model, after the outputs of both were found equal to the last bit."""
    state = inst.model.state if state is None else state
    small = pq.shrink(inst, view, state)
    again = pq.instrument(small.model, jax.tree.map(lambda v: v[:1], x), inputs=inst.inputs, **kwargs)
    assert set(again.sites) == set(inst.sites)
    for name, spec in again.sites.items():
        if name in small.view.sites:
            np.broadcast_shapes(np.shape(small.view.sites[name].f), spec.shape)
    ours, theirs = (jax.jit(i.forward)(v, s, x)[0] for i, v, s in ((again, small.view, small.model.state), (inst, view, state)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    return small


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: np.shape(v) for path, v in _tree.flatten(tree).items()}


def dense(p, x):
    return x @ p["w"] + p["b"]


def layers(*widths: int, seed: int = 0, bias: float = 0.3) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    pairs = enumerate(zip(widths, widths[1:], strict=False))
    made = {f"l{n}": {"w": rng.normal(0, 0.7, s), "b": rng.normal(0, bias, s[1])} for n, s in pairs}
    return jax.tree.map(lambda v: v.astype(np.float32), made)


def mlp(p, x):
    for name in sorted(p)[:-1]:
        x = jax.nn.relu(dense(p[name], x))
    return dense(p[sorted(p)[-1]], x)


@pytest.mark.parametrize("name", ["linen", *(pytest.param(n, marks=pytest.mark.slow) for n in ("nnx", "equinox", "plain"))])
def test_frameworks_with_batchnorm_and_a_residual(four, common_name, view_at, name):
    """Channels 2 and 5 of the residual stream get nothing, nobody reads channel 3."""
    written = four(0, True)[name]
    leaves = {common_name(p, written): np.array(v) for p, v in _tree.flatten(written.model.params).items()}
    of = {common_name(p, written): p for p in _tree.flatten(written.model.params)}
    leaves = {n: v.T if written.transposed and n.endswith("kernel") else v for n, v in leaves.items()}
    for part in ("a/kernel", "a/bias", "b/kernel", "b/bias", "bn/scale", "bn/bias"):
        leaves[part][..., [2, 5]] = 0
    for part in ("b/kernel", "c/kernel"):
        leaves[part][3] = 0
    leaves = {n: v.T if written.transposed and n.endswith("kernel") else v for n, v in leaves.items()}
    params = _tree.replace(written.model.params, {of[n]: jnp.asarray(v) for n, v in leaves.items()})
    inst = pq.instrument(written.model._replace(params=params), X[:1])
    small = same_outputs(inst, view_at(inst, 3, 4))
    found = {common_name(p, written): s[::-1] if written.transposed else s for p, s in shapes(small.view.model).items()}
    assert found["a/kernel"] == (6, 5) and found["b/kernel"] == (5, 5) and found["c/kernel"] == (5, 3), name
    assert found["a/bias"] == found["bn/scale"] == (5,) and found["c/bias"] == (3,), name
    sizes = [np.shape(v) for v in jax.tree.leaves(small.model.state) if np.ndim(v)]
    assert sizes == [(5,), (5,)], name
    kept = next(v for p, v in small.kept.items() if common_name(p, written) == "a/bias")
    np.testing.assert_array_equal(kept[0], [0, 1, 4, 6, 7])


def changed_biases(view, small):
    before, after = _tree.flatten(view.model), _tree.flatten(small.model.params)
    return [n for n, v in after.items() if n.endswith("b") and n not in small.kept and not np.array_equal(v, before[n])]


def constant_neurons(*widths):
    """Neuron 1 of the first layer is 0.5 for every input, neuron 2 is 0."""
    p = layers(*widths)
    p["l0"]["w"][:, [1, 2]] = 0
    p["l0"]["b"][[1, 2]] = [0.5, -0.5]
    return p


@pytest.mark.parametrize("transposed", [False, True])
def test_a_constant_neuron_goes_into_the_next_bias(view_at, transposed):
    p = constant_neurons(6, 8, 8, 3)

    def forward(p, x):
        return mlp({n: {"w": v["w"].T, "b": v["b"]} for n, v in p.items()} if transposed else p, x)

    if transposed:
        p = {n: {"w": v["w"].T, "b": v["b"]} for n, v in p.items()}
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    view = view_at(inst, 3, 4)
    small = same_outputs(inst, view)
    if transposed:  # a kernel that is transposed first is no plain parameter of a product
        assert shapes(small.model.params)["l1/w"] == (8, 7)
        return
    assert shapes(small.model.params)["l1/w"] == (6, 8)
    bias, w = (np.asarray(view.model["l1"][n]) for n in "bw")
    np.testing.assert_array_equal(small.model.params["l1"]["b"], bias + 0.5 * w[1])
    fmt = small.view.sites["l1/b"]
    np.testing.assert_array_equal(pq.numerics.quantize(small.model.params["l1"]["b"], fmt), small.model.params["l1"]["b"])


@pytest.mark.parametrize("why", ["no bias", "twice", "float"])
def test_a_constant_neuron_stays_where_it_can_not_be_moved_exactly(view_at, float_view, why):
    p = constant_neurons(6, 8, 8)
    p["l2"] = layers(8, 3)["l0"]

    def forward(p, x):
        h = jax.nn.relu(dense(p["l0"], x))
        h = jax.nn.relu(h @ p["l1"]["w"] + (0 if why == "no bias" else p["l1"]["b"]))
        return dense(p["l2"], h + jax.nn.relu(h @ p["l1"]["w"]) if why == "twice" else h)

    if why == "no bias":
        del p["l1"]["b"]
    p["l0"]["b"][1] = 0.3  # no few bits of a float
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    view = float_view(inst) if why == "float" else view_at(inst, 3, 4)
    small = pq.shrink(inst, view)
    wanted = (8, 8) if why == "twice" else (7, 8)
    assert shapes(small.model.params)["l1/w"] == wanted
    if why != "float":
        same_outputs(inst, view)


def test_a_constant_that_rounds_to_zero_goes(view_at):
    p = layers(6, 8, 3)
    p["l0"]["w"][:, 1], p["l0"]["b"][1] = 0, 0.125
    inst = pq.instrument(pq.from_function(mlp, p), X[:1])
    view = view_at(inst, 3, 4)
    coarse = pq.kif(0.0, jnp.full((8,), 3), jnp.full((8,), 1))
    assert "l1/b" in changed_biases(view, same_outputs(inst, view))
    small = same_outputs(inst, view._replace(sites={**view.sites, "l1/input": coarse}))
    assert shapes(small.model.params)["l0/w"] == (6, 7)
    assert not changed_biases(view, small)


def test_dead_channels_make_others_dead(view_at):
    """Neuron 1 of the second layer is read by nobody, neuron 4 of the first only by it."""
    p = layers(6, 8, 8, 3)
    p["l2"]["w"][1] = 0
    p["l1"]["w"][4] = 0
    p["l1"]["w"][4, 1] = 1.0
    inst = pq.instrument(pq.from_function(mlp, p), X[:1])
    small = same_outputs(inst, view_at(inst, 3, 4))
    assert shapes(small.model.params)["l1/w"] == (7, 7) and 4 not in small.kept["l0/b"][0]


def test_all_channels_dead_leave_one(view_at):
    p = layers(6, 4, 3)
    p["l1"]["w"][:] = 0
    inst = pq.instrument(pq.from_function(mlp, p), X[:1])
    assert shapes(same_outputs(inst, view_at(inst, 3, 4)).model.params) == {
        "l0/w": (6, 1), "l0/b": (1,), "l1/w": (1, 3), "l1/b": (3,),
    }  # fmt: skip


def test_positions_that_are_read_keep_their_size(view_at):
    """Inputs, outputs, the parts of a concatenation, heads in a reshape."""
    p = layers(6, 8, 4)

    def forward(p, x):
        h = jax.nn.relu(dense(p["l0"], x))
        pairs = h.reshape(-1, 2, 4).max(1)
        return jnp.concatenate([dense(p["l1"], h), pairs], -1)

    p["l0"]["w"][0] = p["l0"]["w"][:, 1] = p["l0"]["b"][1] = p["l1"]["w"][1] = p["l1"]["w"][:, 2] = 0
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    small = same_outputs(inst, view_at(inst, 3, 4))
    assert shapes(small.model.params) == shapes(inst.model.params) and not small.kept


def test_a_mean_keeps_its_divisor(view_at):
    p = layers(6, 8, 3)

    def forward(p, x):
        h = jax.nn.relu(dense(p["l0"], x))
        return dense(p["l1"], h - h.mean(-1, keepdims=True))

    p["l0"]["w"][:, 1] = p["l0"]["b"][1] = 0
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    assert not same_outputs(inst, view_at(inst, 3, 4)).kept  # 0 - mean is no zero
    p["l1"]["w"][1] = 0
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    assert shapes(same_outputs(inst, view_at(inst, 3, 4)).model.params)["l0/w"] == (6, 7)


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in (6, 5):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_convolutions(view_at):
    """The channels of a convolution behind a padding, its BatchNorm, pooling, mean and the layer that follows."""
    x = np.random.default_rng(0).normal(0, 2, (8, 8, 8, 2)).astype(np.float32)
    model = pq.from_linen(Conv(), x)
    leaves = {path: np.array(v) for path, v in _tree.flatten(model.params).items()}
    leaves["BatchNorm_0/scale"][[0, 4]] = 0
    leaves["BatchNorm_0/bias"][[0, 4]] = [-1.0, 0.0]
    leaves["Dense_0/kernel"][3] = 0
    inst = pq.instrument(model._replace(params=_tree.replace(model.params, leaves)), x[:1])
    small = same_outputs(inst, view_at(inst, 3, 4), x)
    found = shapes(small.model.params)
    assert found["Conv_0/kernel"] == (3, 3, 2, 4) and found["Conv_1/kernel"] == (3, 3, 4, 4) and found["Dense_0/kernel"] == (4, 3)


def test_the_small_model_trains(view_at):
    """Batch statistics, dropout and gradients at the new size; those of the kept weights are the large model's."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))

    model = pq.from_linen(Net(), X[:1])
    leaves = {path: np.array(v) for path, v in _tree.flatten(model.params).items()}
    leaves["Dense_1/kernel"][[1, 6]] = 0
    model = model._replace(params=_tree.replace(model.params, leaves))
    inst = pq.instrument(model, X[:1])
    small = pq.shrink(inst, pq.View(model.params, {}, {}))

    def loss(params, model):
        y, state = model.forward(params, model.state, X, train=True, rng=jax.random.key(0))
        return jnp.sum(y**2), state

    (ours, state), gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, small.model), has_aux=True))(small.model.params)
    (theirs, _), full = jax.jit(jax.value_and_grad(lambda p: loss(p, model), has_aux=True))(model.params)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert shapes(gradient) == shapes(small.model.params) and shapes(state) == shapes(small.model.state)
    kept = np.delete(np.asarray(full["Dense_1"]["kernel"]), [1, 6], 0)
    np.testing.assert_allclose(gradient["Dense_1"]["kernel"], kept, rtol=1e-4, atol=1e-5)


def test_training_that_reads_positions_is_refused(view_at):
    def forward(p, x, train=False):
        h = jax.nn.relu(dense(p["l0"], x))
        return dense(p["l1"], jnp.cumsum(h, -1) if train else h)

    p = layers(6, 8, 3)
    p["l0"]["w"][:, 1] = p["l0"]["b"][1] = 0
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    small = same_outputs(inst, view_at(inst, 3, 4))
    with pytest.raises(pq.TraceError, match=r"axis 0 of 'params/l0/b' was cut.*train=True"):
        small.model.forward(small.model.params, small.model.state, X, train=True, rng=None)


def test_lowered_it_gives_the_same_integers(view_at):
    p = layers(6, 8, 8, 3)
    p["l0"]["w"][:, [0, 3]] = 0
    p["l2"]["w"][[1, 2, 7]] = 0
    inst = pq.instrument(pq.from_function(mlp, p), X[:1], inputs=pq.InputSpec(1, 2, 3))
    view = view_at(inst, 3, 4)
    small = pq.shrink(inst, view)
    again = pq.instrument(small.model, X[:1], inputs=inst.inputs)
    graphs = lower.trace(inst, view, {}), lower.trace(again, small.view, {})
    x = port_grid(graphs[0], 500, np.random.default_rng(0))
    np.testing.assert_array_equal(*(lower.emulate(g, x)[0] for g in graphs))
    lower.verify(graphs[1], again, small.view, {}, x_test=X, vectors=500)


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.3, 0.7]), residual=st.booleans())
def test_random_dead_channels(view_at, seed, fraction, residual):
    """Rows and columns drawn at random in a network with a shared product and a residual."""
    rng = np.random.default_rng(seed)
    p = layers(6, 8, 8, 8, 3, seed=seed)

    def forward(p, x):
        h = jax.nn.relu(dense(p["l0"], x))
        both = jax.nn.relu(dense(p["l1"], h)) * jax.nn.relu(dense(p["l2"], h))
        return dense(p["l3"], h + both if residual else both)

    for name in ("l0", "l1", "l2"):
        dead = rng.random(8) < fraction
        p[name]["w"][:, dead] = 0
        p[name]["b"][dead & (rng.random(8) < 0.8)] = 0
    for name in ("l1", "l2", "l3"):
        p[name]["w"][rng.random(8) < fraction] = 0
    inst = pq.instrument(pq.from_function(forward, p), X[:1])
    same_outputs(inst, view_at(inst, 2, 2))
