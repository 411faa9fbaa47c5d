"""The embedded jets are what docs/data_card.md says, and can be learned from."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pquant_jax import data
from pquant_jax._errors import DataError

DIGEST = "3774739ab745505c"
FILE = Path(data.__file__).with_name("jets.npz")
CARD = Path(__file__).parents[2] / "docs" / "data_card.md"


@pytest.fixture(scope="module")
def jets() -> data.Dataset:
    return data.jets()


def stacked(dataset: data.Dataset) -> np.ndarray:
    return np.concatenate([dataset.train.x, dataset.val.x, dataset.test.x])


@pytest.mark.parametrize(("part", "n"), [("train", 28_800), ("val", 3_200), ("test", 8_000)])
def test_each_split_has_its_size_type_and_balance(jets, part, n):
    split = getattr(jets, part)
    assert split.x.shape == (n, 16) and split.x.dtype == np.float32
    assert split.y.shape == (n,) and split.y.dtype == np.int32 and split.weight is None
    np.testing.assert_array_equal(np.bincount(split.y), [n // 5] * 5)


def test_the_digest_is_the_one_in_the_data_card(jets):
    assert jets.digest == DIGEST
    assert DIGEST in CARD.read_text(encoding="utf-8")
    assert jets.licence == "CC0-1.0" and jets.classes == ("g", "q", "t", "w", "z")
    assert FILE.stat().st_size < 4e6


def test_standardised_over_train_and_validation(jets):
    fitted = np.concatenate([jets.train.x, jets.val.x]).astype(np.float64)
    np.testing.assert_allclose(fitted.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(fitted.std(axis=0), 1, atol=1e-5)
    assert abs(jets.test.x.mean(axis=0)).max() > 1e-4  # the test jets took no part


def test_the_raw_features_come_back_and_are_physics(jets):
    with np.load(FILE) as archive:
        raw = archive["x_train"]
    back = jets.train.x * jets.std + jets.mean
    np.testing.assert_allclose(back, raw, rtol=1e-5, atol=3e-6 * float(jets.std.max()))
    mass, y = raw[:, jets.features.index("mass_mmdt")], jets.train.y
    medians = [np.median(mass[y == label]) for label in range(5)]
    assert 75 < medians[3] < 85 and 85 < medians[4] < 95 and 150 < medians[2] < 180  # W, Z, top in GeV
    np.testing.assert_array_equal(raw[:, 8], raw[:, 6])


def test_the_range_is_the_documented_one(jets):
    x = stacked(jets)
    tail = jets.features.index("d2_b2")
    rest = np.delete(x, tail, axis=1)
    assert rest.min() > -8.2 and rest.max() < 10.3 and 69 < x[:, tail].max() < 70
    assert (np.abs(x) > 32).any(axis=1).sum() == 9


def test_no_jet_is_in_two_splits(jets):
    assert len(np.unique(stacked(jets), axis=0)) == 40_000


@pytest.mark.parametrize("n", [50, 333, 5_000, 40_000])
def test_a_part_is_the_leading_rows_of_each_split(jets, n):
    part = data.jets(n)
    sizes = [len(s.y) for s in (part.train, part.val, part.test)]
    assert sum(sizes) == n and sizes[0] == round(0.72 * n)
    np.testing.assert_array_equal(part.train.x, jets.train.x[: sizes[0]])
    np.testing.assert_array_equal(part.test.y, jets.test.y[: sizes[2]])
    counts = np.bincount(part.train.y, minlength=5)
    assert counts.max() - counts.min() <= 1
    assert (part.digest == DIGEST) == (n == 40_000)


@pytest.mark.parametrize("n", [0, -5, 49, 40_001])
def test_a_part_that_cant_be_is_refused(n):
    with pytest.raises(DataError, match=r"n must be from 50 to 40000"):
        data.jets(n)


def test_a_float_mlp_reaches_the_documented_accuracy(jets):
    sizes, batch, epochs = (16, 64, 32, 32, 5), 1024, 20
    keys = jax.random.split(jax.random.key(0), 4)
    normal = jax.nn.initializers.lecun_normal()
    params = [(normal(k, (a, b)), jnp.zeros(b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]
    tx = optax.adam(3e-3)

    def forward(params, x):
        for kernel, bias in params[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        return x @ params[-1][0] + params[-1][1]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

    def step(carry, xy):
        updates, state = tx.update(jax.grad(loss)(carry[0], *xy), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    @jax.jit
    def epoch(carry, x, y):
        return jax.lax.scan(step, carry, (x, y))[0]

    @jax.jit
    def accuracy(params, x, y):
        return (forward(params, x).argmax(axis=-1) == y).mean()

    carry, found = (params, tx.init(params)), []
    steps = len(jets.train.y) // batch
    for seed in range(epochs):
        order = np.random.default_rng(seed).permutation(len(jets.train.y))[: steps * batch]
        carry = epoch(carry, jets.train.x[order].reshape(steps, batch, 16), jets.train.y[order].reshape(steps, batch))
        found.append((float(accuracy(carry[0], *jets.val[:2])), float(accuracy(carry[0], *jets.test[:2]))))
    assert max(found)[1] >= 0.67
