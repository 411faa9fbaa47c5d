"""Generated pixel clusters, tables of text, and the files that are not shipped."""

from __future__ import annotations

import numpy as np
import pytest

from pquant_jax import data
from pquant_jax._errors import DataError


def test_pixel_clusters_are_a_function_of_the_seed():
    first, again, other = data.pixel_clusters(90), data.pixel_clusters(90), data.pixel_clusters(90, seed=1)
    assert first.digest == again.digest != other.digest
    y = np.concatenate([s.y for s in (first.train, first.val, first.test)])
    np.testing.assert_array_equal(np.bincount(y), [30, 30, 30])


def test_pixel_clusters_are_on_the_grid_and_tell_the_sign():
    made = data.pixel_clusters(1_500)
    x, y = made.train.x, made.train.y
    assert x.shape[1:] == (13, 21, 2) and x.min() == 0 and x.max() <= 7.875
    np.testing.assert_array_equal(x * 8, np.rint(x * 8))
    assert (x[..., 0].sum((1, 2)) < x[..., 1].sum((1, 2))).mean() > 0.99  # the late slice has all of the charge
    rows = (x[..., 1].sum(2) > 0).sum(1)
    lengths = [rows[y == label].mean() for label in range(3)]
    assert lengths[2] > lengths[0] + 1  # leaning with the Lorentz angle is longer; against it, it is a matter of sign
    # the early slice is near the readout: a lean moves the late one against it
    centre = [(x[..., s].sum(2) * np.arange(13)).sum(1) / x[..., s].sum((1, 2)) for s in range(2)]
    drift = np.nan_to_num(centre[1] - centre[0])
    assert drift[y == 1].mean() < drift[y == 0].mean() < drift[y == 2].mean()


@pytest.mark.parametrize("n", [49, 60.0, True])
def test_too_few_clusters_are_refused(n):
    with pytest.raises(DataError, match="at least 50"):
        data.pixel_clusters(n)


def table(tmp_path, text):
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    return str(tmp_path / "table.csv")


ROWS = "".join(f"{n},{n / 2},{'gh'[n % 2]}\n" for n in range(50))


@pytest.mark.parametrize("head", ["", "length, width,class\n"])
def test_a_table_of_text_is_a_data_set(tmp_path, head):
    found = data.load(table(tmp_path, head + ROWS))
    assert found.classes == ("g", "h") and found.train.x.shape == (36, 2)
    assert found.features == (("length", "width") if head else ())
    np.testing.assert_array_equal(found.train.y, found.train.x[:, 0] % 2)
    np.testing.assert_array_equal(found.train.x[:, 1], found.train.x[:, 0] / 2)


def test_the_last_column_is_the_target_of_a_regression(tmp_path):
    found = data.from_csv(table(tmp_path, "".join(f"{n},{n * n}\n" for n in range(50))), task="regression", standardise=True)
    raw = found.train.x[:, 0] * found.std[0] + found.mean[0]
    np.testing.assert_allclose(found.train.y, raw**2, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table, expected as many in every row"),
        ("1\n2\n", "no table"),
        ("1,2,g\n3,h\n", "2 columns in line 2"),
        ("a,b,c\n1,2,g\n3,x,h\n", "'x' in line 3, column 1 is no number"),
        ("1,nan,g\n" + ROWS, "NaN or infinite values"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        data.from_csv(table(tmp_path, text))


def test_a_missing_table_is_refused():
    with pytest.raises(DataError, match="'none.csv' does not exist"):
        data.load("none.csv")


@pytest.fixture
def digits(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x_train": rng.integers(0, 256, (200, 28, 28)).astype(np.uint8), "y_train": np.arange(200) % 10}
    arrays |= {"x_test": rng.integers(0, 256, (50, 28, 28)).astype(np.uint8), "y_test": np.arange(50) % 10}
    np.savez(tmp_path / "mnist.npz", **arrays)
    return arrays


@pytest.mark.parametrize("size", [28, 14, 7])
def test_mnist_comes_from_a_folder_and_is_averaged(tmp_path, monkeypatch, digits, size):
    monkeypatch.setenv("PQUANT_DATA", str(tmp_path))
    found = data.mnist(size=size)
    assert found.train.x.shape == (180, size, size, 1) and found.val.x.shape[0] == 20 and found.test.x.shape[0] == 50
    step = 28 // size
    means = digits["x_test"].reshape(50, size, step, size, step).astype(float).mean((2, 4))
    np.testing.assert_array_equal(found.test.x[..., 0], np.floor(means) / 256)
    np.testing.assert_array_equal(found.val.y, digits["y_train"][:20])


def test_a_part_of_mnist(tmp_path, digits):
    found = data.mnist(tmp_path / "mnist.npz", n=100, size=7)
    assert [len(s.y) for s in (found.train, found.val, found.test)] == [90, 10, 20]
    with pytest.raises(DataError, match="n must be from 50 to 200"):
        data.mnist(tmp_path / "mnist.npz", n=201)
    with pytest.raises(DataError, match=r"size is 10, expected one of \(28, 14, 7\)"):
        data.mnist(tmp_path / "mnist.npz", size=10)


def test_what_is_not_shipped_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("PQUANT_DATA", raising=False)
    with pytest.raises(DataError, match="mnist.npz is not shipped: give its path, or set PQUANT_DATA"):
        data.mnist()
    monkeypatch.setenv("PQUANT_DATA", str(tmp_path))
    with pytest.raises(DataError, match="holds no mnist.npz"):
        data.load("mnist")
    np.savez(tmp_path / "mnist.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="expected x_train, y_train, x_test, y_test"):
        data.mnist()


def test_a_number_behind_the_name_is_how_many_particles():
    assert data.load("particles:8").train.x.shape == (7_200, 8, 3)
    assert data.load("jet_masses:4", task="regression").train.x.shape == (7_200, 4, 3)
    with pytest.raises(DataError, match="a whole number from 1 to 32"):
        data.load("particles:64")
