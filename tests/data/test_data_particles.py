"""The embedded particle jets are what docs/data_card.md says; masses and anomalies are what their docstrings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pquant_jax import data
from pquant_jax._errors import DataError

DIGEST = "10e573cd58f2a1e7"
ROOT = Path(__file__).parents[2]
FILE = Path(data.__file__).with_name("particles.npz")


@pytest.fixture(scope="module")
def whole() -> data.Dataset:
    return data.particles()


@pytest.mark.parametrize(("part", "n"), [("train", 7_200), ("val", 800), ("test", 2_000)])
def test_each_split_has_its_size_type_and_balance(whole, part, n):
    split = getattr(whole, part)
    assert split.x.shape == (n, 32, 3) and split.x.dtype == np.float32
    assert split.y.dtype == np.int32 and split.weight is None
    np.testing.assert_array_equal(np.bincount(split.y), [n // 5] * 5)


def test_the_digest_is_the_one_in_the_data_card(whole):
    assert whole.digest == DIGEST and DIGEST in (ROOT / "docs" / "data_card.md").read_text(encoding="utf-8")
    assert whole.licence == "CC0-1.0" and whole.classes == ("g", "q", "t", "w", "z")
    assert FILE.stat().st_size < 2e6


def test_the_units_are_powers_of_two_and_undo_exactly(whole):
    with np.load(FILE) as archive:
        raw = archive["x_train"].astype(np.float64)
    np.testing.assert_array_equal(whole.train.x * whole.std, raw)
    np.testing.assert_array_equal(np.frexp(whole.std)[0], 0.5)


def test_particles_fall_in_momentum_and_end_in_zeros(whole):
    x = whole.train.x
    assert (np.diff(x[..., 0], axis=1) <= 0).all()
    empty = (x == 0).all(-1)
    assert (np.diff(empty.astype(int), axis=1) >= 0).all() and 0 < empty[:, -1].mean() < 0.5
    lost = (x[..., 0] == 0) & ~empty  # softer than float16 holds: the card says so
    assert lost.mean() < 1e-3
    shares = [float(x[:, :n, 0].sum(1).mean()) / 16 for n in (8, 16, 32)]
    np.testing.assert_allclose(shares, [0.64, 0.81, 0.94], atol=0.006)


@pytest.mark.parametrize(("n", "particles"), [(50, 1), (333, 8), (10_000, 32)])
def test_a_part_is_the_leading_rows_and_particles(whole, n, particles):
    part = data.particles(n, particles)
    assert sum(len(s.y) for s in (part.train, part.val, part.test)) == n
    np.testing.assert_array_equal(part.train.x, whole.train.x[: len(part.train.y), :particles])
    np.testing.assert_array_equal(part.test.y, whole.test.y[: len(part.test.y)])


@pytest.mark.parametrize("particles", [0, 33, 4.0, True])
def test_a_number_of_particles_that_cant_be_is_refused(particles):
    with pytest.raises(DataError, match="a whole number from 1 to 32"):
        data.particles(50, particles)


@pytest.mark.parametrize("n", [49, 10_001, 60.0])
def test_a_part_that_cant_be_is_refused(n):
    with pytest.raises(DataError, match=r"particles\(n=.*n must be from 50 to 10000"):
        data.particles(n)


def test_another_file_is_cut_with_a_fixed_seed(tmp_path, whole):
    with np.load(FILE) as archive:
        np.savez(tmp_path / "mine.npz", x=archive["x_val"], y=archive["y_val"], classes=archive["classes"])
    mine = data.particles(100, 4, tmp_path / "mine.npz")
    assert mine.train.x.shape == (72, 4, 3) and mine.classes == whole.classes
    assert mine.digest == data.particles(100, 4, tmp_path / "mine.npz").digest
    np.savez(tmp_path / "flat.npz", x=np.zeros((60, 12)), y=np.arange(60) % 5)
    with pytest.raises(DataError, match=r"x has shape \(n, 12\), expected \(n, >= 4, 3\)"):
        data.particles(50, 4, tmp_path / "flat.npz")


def test_the_script_makes_the_same_bytes_again(tmp_path, benchmark_module):
    script = benchmark_module("make_particles")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 32, 3)).astype(np.float16), np.arange(100) % 5
    np.savez(tmp_path / "big.npz", x=x, y=y)
    for name in ("a.npz", "b.npz"):
        script.subset(tmp_path / "big.npz", tmp_path / name, 0, {"train": 10, "val": 4, "test": 6})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as archive:
        np.testing.assert_array_equal(np.sort(archive["y_train"].reshape(-1, 5), axis=1), [range(5)] * 10)
        taken = np.concatenate([archive[f"x_{part}"] for part in ("train", "val", "test")])
    assert len(np.unique(taken.reshape(100, -1), axis=0)) == 100
    with pytest.raises(SystemExit, match="20 jets in its smallest class, 21 are wanted"):
        script.subset(tmp_path / "big.npz", tmp_path / "c.npz", 0, {"train": 21})


def test_masses_are_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x = np.stack([rng.uniform(0, 1, (50, 9)), *rng.normal(0, 0.3, (2, 50, 9))], axis=-1)
    z, eta, phi = np.moveaxis(x, -1, 0)
    pairs = np.cosh(eta[:, :, None] - eta[:, None]) - np.cos(phi[:, :, None] - phi[:, None])
    np.testing.assert_allclose(data.mass(x) ** 2, np.einsum("ni,nj,nij->n", z, z, pairs), rtol=1e-5)


def test_the_masses_of_w_z_and_t_are_in_order(whole):
    few, all_ = data.jet_masses(2_000, 8), data.jet_masses(2_000)
    assert few.train.x.shape[1] == 8 and few.classes == () and few.train.y.shape == (1_440, 1)
    np.testing.assert_array_equal(few.train.y, all_.train.y)
    y, label = few.train.y[:, 0], whole.train.y[:1_440]
    w, z, t = (float(np.median(y[label == whole.classes.index(c)])) for c in "wzt")
    assert 0.6 < w < z < 0.8 and 1.1 < t < 1.3  # 80, 91 and 173 GeV over 1,000 GeV, times 8


def test_anomalies_learn_the_background_alone():
    found, jets = data.anomalies(5_000), data.jets(5_000)
    background = [np.isin(part.y, (0, 1)) for part in (jets.train, jets.val)]
    assert [len(found.train.y), len(found.val.y), len(found.test.y)] == [*(b.sum() for b in background), 1_000]
    for split in (found.train, found.val, found.test):
        np.testing.assert_array_equal(split.x, split.y)
        assert np.abs(split.x).max() <= 8
    between = np.abs(np.corrcoef(found.train.x.T))[np.triu_indices(16, 1)]
    assert np.median(between) < 0.05 < np.median(np.abs(np.corrcoef(jets.train.x.T))[np.triu_indices(16, 1)])
    far = np.square(found.test.x).sum(1)
    signal = ~np.isin(jets.test.y, (0, 1))
    assert np.median(far[signal]) > np.median(far[~signal])
