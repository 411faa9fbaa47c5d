"""Shapes, weights and refused arguments of every factory."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import zoo
from pquant_jax.graph import Model, as_model

PARTICLES = (6, 3)
CASES = {  # name: (input of one sample, output of one sample, weights)
    "mlp": ((16,), (5,), 4_389),
    "particle_mlp": ((32, 3), (5,), 19_013),
    "deepsets": (PARTICLES, (5,), 429),
    "interaction_network": (PARTICLES, (5,), 435),
    "jedi_linear": (PARTICLES, (5,), 477),
    "mixer": ((8, 3), (5,), 373),
    "transformer": (PARTICLES, (5,), 541),
    "gru": (PARTICLES, (5,), 341),
    "conv1d": ((16, 3), (5,), 693),
    "cnn": ((14, 14, 1), (10,), 802),
    "smart_pixels": ((13, 21, 2), (3,), 2_193),
    "resnet20": ((32, 32, 3), (10,), 272_474),
    "two_heads": ({"image": (8, 8, 1), "features": (4, 3)}, {"class": (5,), "value": (1,)}, 622),
    "autoencoder": ((16,), (16,), 524),
    "vae": ((16,), {"divergence": (1,), "reconstruction": (16,)}, 576),
    "symbolic": ((16,), (5,), 10),
}
FACTORIES = [name for name in zoo.__all__ if name.islower()]


def is_shape(value):
    return isinstance(value, tuple)


def test_every_factory_is_here():
    assert set(CASES) == set(FACTORIES)


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_weights(name):
    inputs, wanted, weights = CASES[name]
    x = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s), jnp.float32), inputs, is_leaf=is_shape)
    made = getattr(zoo, name)()
    if hasattr(made, "init"):
        variables = jax.eval_shape(lambda v: made.init(jax.random.key(0), v), x)
        params, y = variables["params"], jax.eval_shape(made.apply, variables, x)
    else:
        model = as_model(made, x)
        params = model.params
        y = jax.eval_shape(lambda p, v: model.forward(p, model.state, v, train=False, rng=None)[0], params, x)
    assert jax.tree.map(lambda v: v.shape[1:], y) == wanted
    assert sum(int(np.prod(v.shape)) for v in jax.tree.leaves(params)) == weights


@pytest.mark.parametrize("name", [n for n in FACTORIES if n != "symbolic"])
@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "8", None])
def test_sizes_that_are_none_are_refused(name, bad):
    """Every number and every list of numbers, but for seeds."""
    build = getattr(zoo, name)
    for argument, parameter in inspect.signature(build).parameters.items():
        if argument == "seed" or isinstance(parameter.default, bool):
            continue
        several = isinstance(parameter.default, tuple)
        with pytest.raises(pq.ConfigError, match=f"{'mlp' if name == 'particle_mlp' else name}: "):
            build(**{argument: [bad] if several else bad})
        if several and name not in ("mlp", "particle_mlp"):
            with pytest.raises(pq.ConfigError, match=f"{argument} is .*expected"):
                build(**{argument: []})


def test_heads_divide_the_width():
    with pytest.raises(pq.ConfigError, match="width is 6, expected a multiple of heads = 4"):
        zoo.transformer(width=6, heads=4)


def test_the_same_seed_gives_the_same_weights():
    for build in (zoo.jedi_linear, zoo.autoencoder):
        one, same, other = (jax.tree.leaves(as_model(build(seed=s), None).params) for s in (0, 0, 1))
        for a, b in zip(one, same, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any((a != b).any() for a, b in zip(one, other, strict=True))


def test_the_expression_is_a_plain_function():
    model = zoo.symbolic()
    assert isinstance(model, Model) and all(jnp.shape(v) == () for v in jax.tree.leaves(model.params))


@pytest.mark.parametrize("size", [14, 28])
def test_the_cnn_takes_digits(outside, size):
    digits = pq.data.mnist(outside("mnist.npz"), n=50, size=size)
    made = zoo.cnn()
    shape = jax.eval_shape(lambda x: made.apply(made.init(jax.random.key(0), x), x), digits.test.x).shape
    assert shape == (10, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n != "resnet20"])
def test_sites_off_is_bitwise_the_original(name):
    """A view without formats is the model itself, for every kind of layer there is."""
    inputs = CASES[name][0]
    rng = np.random.default_rng(0)
    x = jax.tree.map(lambda s: rng.normal(size=(8, *s)).astype(np.float32), inputs, is_leaf=is_shape)
    inst = pq.instrument(as_model(getattr(zoo, name)(), x), x)
    params, state = inst.model.params, inst.model.state
    params = jax.tree.map(lambda v: v + 0.1 * jax.random.normal(jax.random.key(1), v.shape), params)
    ours = jax.jit(lambda p, v: inst.forward(pq.View(p, {}, {}), state, v, train=False)[0])(params, x)
    original = jax.jit(lambda p, v: inst.model.forward(p, state, v, train=False, rng=None)[0])(params, x)
    jax.tree.map(np.testing.assert_array_equal, ours, original)
