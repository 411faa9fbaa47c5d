"""What `instrument` refuses, and how it says so."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq

X = np.zeros((4, 6), np.float32)
W = {"w": jnp.ones((6, 6), jnp.float32)}


def instrument(forward, x=X, **options) -> pq.Instrumented:
    return pq.instrument(pq.from_function(forward, W), x, **options)


@pytest.mark.parametrize("model", [lambda x: x, {"w": 1}, "net", None])
def test_unknown_model(model):
    with pytest.raises(pq.TraceError, match=r"a model of type \w+ is not a linen, nnx or equinox module.*from_function"):
        pq.instrument(model, X)


@pytest.mark.parametrize(
    "build", [lambda: nn.Dense(3), lambda: eqx.nn.Linear(6, 3, key=jax.random.key(0))], ids=["linen", "equinox"]
)
def test_modules_are_taken_as_they_are(build):
    assert len(pq.instrument(build(), X).sites) == 3


def test_wrong_input_shape_of_a_function():
    with pytest.raises(pq.TraceError, match=r"does not accept an input of shape \(4, 5\).*contracting"):
        instrument(lambda p, x: x @ p["w"], np.zeros((4, 5), np.float32))


def test_wrong_input_shape_of_linen():
    """flax raises errors of its own classes."""
    model = pq.from_linen(nn.Dense(3), X)
    with pytest.raises(pq.TraceError, match=r"does not accept an input of shape \(4, 5\).*shape \(5, 3\)"):
        pq.instrument(model, np.zeros((4, 5), np.float32))


def test_wrong_input_shape_of_equinox():
    with pytest.raises(pq.TraceError, match=r"does not accept an input of shape \(4, 5\)"):
        pq.instrument(eqx.nn.Linear(6, 3, key=jax.random.key(0)), np.zeros((4, 5), np.float32))


def test_input_without_a_batch():
    with pytest.raises(pq.TraceError, match=r"does not accept an input of shape"):
        instrument(lambda p, x: x @ p["w"], np.zeros(6, np.float32))


def test_wrong_input_structure():
    with pytest.raises(pq.TraceError, match=r"does not accept an input of shape"):
        instrument(lambda p, x: x["a"] @ p["w"])


def test_ports_of_another_structure():
    with pytest.raises(pq.TraceError, match="InputSpec"):
        instrument(lambda p, x: x @ p["w"], inputs={"a": pq.InputSpec()})


def test_batch_axis():
    with pytest.raises(pq.TraceError, match=r"batch_axis is 1, expected 0.*moveaxis"):
        instrument(lambda p, x: x @ p["w"], batch_axis=1)


LOOPS = {
    "while": lambda p, x: jax.lax.while_loop(lambda c: jnp.sum(c) < 5, lambda c: c @ p["w"], x),
    "cond": lambda p, x: jax.lax.cond(p["w"][0, 0] > 0, lambda c: c @ p["w"], lambda c: c, x),
    "switch": lambda p, x: jax.lax.switch(
        jnp.asarray(p["w"][0, 0], jnp.int32), [lambda c: c, lambda c: 2 * c, lambda c: c @ p["w"]], x
    ),
    "no product": lambda p, x: jax.lax.while_loop(lambda c: jnp.sum(c) < 5, lambda c: c + 1, x) @ p["w"],
    "steps counted by data": lambda p, x: jax.vmap(lambda v: jax.lax.fori_loop(0, v[0].astype(int), lambda _, c: c @ p["w"], v))(
        x
    ),
    "endless": lambda p, x: jax.lax.while_loop(lambda c: c[0] >= 0, lambda c: (c[0] + 0, -c[1]), (0, x))[1] @ p["w"],
    "long": lambda p, x: jax.lax.scan(lambda c, _: (-c, None), x, None, length=60_000)[0] @ p["w"],
}


@pytest.mark.parametrize("loop", LOOPS)
def test_control_flow_that_depends_on_data(loop):
    """It would stay in float without a word.  The error names the model's line."""
    with pytest.raises(
        pq.TraceError, match=r"can't unroll '(scan|while|cond)' at .*test_errors.py:\d+: .*(lax.scan|jnp.where|equations when)"
    ):
        instrument(LOOPS[loop])


def test_loops_over_parameters_alone_are_fine():
    """They are folded into constants: here a power iteration that normalises the kernel."""

    def forward(p, x):
        v = jax.lax.fori_loop(0, 3, lambda _, v: p["w"] @ v / jnp.linalg.norm(p["w"] @ v), jnp.ones(6))
        return x @ (p["w"] / jnp.linalg.norm(p["w"] @ v))

    inst = instrument(forward)
    assert {s.kind for s in inst.sites.values()} == {"input", "scale"}


@pytest.mark.parametrize("shape", [(-1, 3), (-1,), (2, 12), (12, 2), (2, 2, 6)])
def test_reshape_that_mixes_samples(shape):
    with pytest.raises(pq.TraceError, match=r"reshape .* mixes the batch \(axis 0\) with other axes"):
        instrument(lambda p, x: (x @ p["w"]).reshape(shape))


MIXERS = {
    "sort": lambda x: jnp.sort(x, 0),
    "reverse": lambda x: x[::-1],
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "slice": lambda x: x[:2],
    "roll": lambda x: jnp.roll(x, 1, 0),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_operations_along_the_batch(mixer):
    with pytest.raises(pq.TraceError, match=r"batch|axis 0"):
        instrument(lambda p, x: MIXERS[mixer](x @ p["w"]))


def test_squeeze_of_the_batch():
    """A batch of one sample looks like any other axis of size 1, unless those to squeeze are named."""
    for x in (X[:1], X):  # EBOPs are those of one sample
        with pytest.raises(
            pq.TraceError, match=r"squeeze \(1, 1, 6\) -> \(6,\) drops the batch of one sample \(axis 0\).*; name"
        ):
            pq.instrument(pq.from_function(lambda p, x: jnp.squeeze(x[:, None]) @ p["w"], W), x)


FOLLOWED = pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: x.reshape(-1, 2, 3).reshape(-1, 6) @ p["w"],
        lambda p, x: (
            x.reshape(x.shape[0], -1, 2).transpose(1, 0, 2).reshape(3, x.shape[0], 2).transpose(1, 0, 2).reshape(-1, 6) @ p["w"]
        ),
        lambda p, x: x[:, None, :, None].squeeze((1, 3)) @ p["w"],
        lambda p, x: jnp.cumsum(x, 1) @ p["w"],
        lambda p, x: x[:, ::-1] @ p["w"],
        lambda p, x: jnp.concatenate([x[:, :3], x[:, 3:]], 1) @ p["w"],
        lambda p, x: (p["w"] @ x.T).T,  # the batch is the last axis for a while
        lambda p, x: jax.vmap(lambda v: p["w"] @ v, in_axes=1, out_axes=1)(x.T).T,
        lambda p, x: jnp.einsum("ij,bj->bi", p["w"], x),
        lambda p, x: x[:, None] @ p["w"][None],
        lambda p, x: x.reshape(-1, 2, 3) @ x.reshape(-1, 3, 2),
        lambda p, x: (x @ p["w"]).reshape(-1, 2, 3) @ x.reshape(-1, 3, 2),
        lambda p, x: x[:, None, :, None] @ x[:, None, None, :],  # one head
        lambda p, x: x.reshape(-1, 1, 2, 3) @ jnp.stack([x, 2 * x], 1).reshape(-1, 2, 3, 2),  # one head and two
        lambda p, x: jnp.moveaxis(jnp.swapaxes(x.reshape(-1, 3, 1, 2), 0, 1) @ jnp.swapaxes(x.reshape(-1, 3, 2, 1), 0, 1), 1, 0),
    ],
)


@FOLLOWED
def test_sites_are_those_of_any_batch(forward):
    one, four = (pq.instrument(pq.from_function(forward, W), X[:n]) for n in (1, 4))
    assert list(one.sites.items()) == list(four.sites.items()) and one.roles == four.roles
    assert one.reference8 == four.reference8 > 0


@FOLLOWED
def test_batch_is_followed(forward):
    """Every one of these keeps samples apart; one sample alone gives its row of the batch."""
    inst = instrument(forward)
    x = np.random.default_rng(0).integers(-8, 8, X.shape).astype(np.float32)
    y, _ = inst.forward(pq.View(W, {}, {}), {}, x)
    for n in range(4):
        np.testing.assert_array_equal(inst.forward(pq.View(W, {}, {}), {}, x[n : n + 1])[0], y[n : n + 1])


def test_training_site_that_inference_lacks():
    def forward(p, x, train=False):
        return jnp.abs(x) @ p["w"] + x @ p["w"] if train else x @ p["w"]

    inst = instrument(forward)
    with pytest.raises(pq.TraceError, match=r"training forward has a site 'w/input#1' that the inference forward lacks"):
        inst.forward(pq.View(W, {}, {}), {}, X, train=True)


def test_scalar_format_on_any_batch_axis():
    """One format for a whole site broadcasts where the batch is the last axis, too."""
    inst = instrument(lambda p, x: (p["w"] @ x.T).T)
    x = np.full((3, 6), 0.3, np.float32)
    y, _ = inst.forward(pq.View(W, {"w/input": pq.kif(1, 2, 1)}, {}), {}, x)
    np.testing.assert_array_equal(y, np.full((3, 6), 3.0))


def test_derived_kernel_is_not_named_like_a_parameter():
    """2 * kernel has a site of its own: under the parameter's name `finalize` would take its format for the parameter's."""
    params = {"Dense_0": {"kernel": jnp.full((6, 2), 0.3, jnp.float32)}}
    inst = pq.instrument(pq.from_function(lambda p, x: x @ (2 * p["Dense_0"]["kernel"]), params), X)
    assert "Dense_0/kernel" not in inst.sites
    assert all(name.startswith("Dense_0/") for name in inst.sites)
    plain = pq.instrument(pq.from_function(lambda p, x: x @ (2 * p["w"]), {"w": jnp.ones((6, 2))}), X)
    assert all(name.startswith("w/") for name in plain.sites)
