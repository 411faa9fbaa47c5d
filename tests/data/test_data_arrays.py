"""From arrays and files to a `Dataset`, and every way in which that is refused."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from pquant_jax import data
from pquant_jax._errors import ConfigError, DataError

PARTS = ("train", "val", "test")


def six(arrays, **changes):
    n = len(arrays["x"]) // 4
    index = {"train": slice(0, 2 * n), "val": slice(2 * n, 3 * n), "test": slice(3 * n, None)}
    return {f"{key}_{part}": arrays[key][rows] for part, rows in index.items() for key in "xy"} | changes


def test_one_table_is_cut_72_8_20_without_loss(arrays):
    dataset = data.from_arrays(arrays)
    assert [len(getattr(dataset, part).y) for part in PARTS] == [144, 16, 40]
    together = np.concatenate([getattr(dataset, part).x for part in PARTS])
    np.testing.assert_array_equal(np.sort(together, axis=0), np.sort(arrays["x"].astype(np.float32), axis=0))
    rows = {tuple(x): y for x, y in zip(arrays["x"].astype(np.float32).tolist(), arrays["y"].tolist(), strict=True)}
    for x, y in zip(dataset.test.x.tolist(), dataset.test.y.tolist(), strict=True):
        assert rows[tuple(x)] == y


def test_the_seed_alone_decides_the_split(arrays):
    one, same, other = (data.from_arrays(arrays, seed=seed) for seed in (3, 3, 4))
    assert one.digest == same.digest != other.digest
    np.testing.assert_array_equal(one.test.x, same.test.x)


def test_given_parts_stay_as_they_are(arrays):
    given = six(arrays, weight_train=np.arange(100), classes=np.array(["a", "b", "c"]), features=["p", "q", "r", "s"])
    dataset = data.from_arrays(given)
    np.testing.assert_array_equal(dataset.val.x, given["x_val"].astype(np.float32))
    np.testing.assert_array_equal(dataset.train.weight, np.arange(100, dtype=np.float32))
    assert dataset.val.weight is None and dataset.classes == ("a", "b", "c") and dataset.features == ("p", "q", "r", "s")


def test_classes_are_numbered_from_all_splits(arrays):
    dataset = data.from_arrays(six(arrays, y_test=np.full(50, 5)))
    assert dataset.classes == ("0", "1", "2", "3", "4", "5")


def test_standardise_uses_train_and_validation_and_skips_constants(arrays):
    x = arrays["x"].copy()
    x[:, 1] = 7.0
    given = six(arrays | {"x": x})
    dataset = data.from_arrays(given, standardise=True)
    fitted = np.concatenate([given["x_train"], given["x_val"]])
    np.testing.assert_allclose(dataset.mean, fitted.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(dataset.std[[0, 2, 3]], fitted.std(axis=0)[[0, 2, 3]], rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.x[:, 1], 0)
    np.testing.assert_allclose(dataset.test.x * dataset.std + dataset.mean, given["x_test"], rtol=1e-4, atol=1e-5)


def test_standardise_of_images_is_per_last_axis(arrays):
    x = np.random.default_rng(0).normal(size=(200, 5, 6, 2)) * [1, 10] + [0, 5]
    dataset = data.from_arrays({"x": x, "y": arrays["y"]}, standardise=True)
    assert dataset.mean.shape == (2,)
    np.testing.assert_allclose(dataset.train.x.std(axis=(0, 1, 2)), 1, atol=0.05)


def test_pytrees_are_cut_and_scaled_together(arrays):
    tree = {"points": np.arange(1200.0).reshape(200, 3, 2), "mask": np.ones((200, 3, 1), bool)}
    dataset = data.from_arrays({"x": tree, "y": np.arange(200) % 2}, standardise=True)
    assert dataset.train.x["points"].shape == (144, 3, 2) and dataset.train.x["mask"].dtype == np.float32
    raw = dataset.train.x["points"] * dataset.std["points"] + dataset.mean["points"]
    np.testing.assert_array_equal(np.round(raw[:, 0, 0] / 6).astype(int) % 2, dataset.train.y)


def test_regression_keeps_float_targets(arrays):
    target = np.linspace(-2, 2, 200)
    dataset = data.from_arrays({"x": arrays["x"], "y": target}, task="regression")
    assert dataset.classes == () and dataset.train.y.dtype == np.float32
    assert set(np.concatenate([getattr(dataset, p).y for p in PARTS]).tolist()) == set(target.astype(np.float32).tolist())


def test_a_file_gives_what_its_arrays_give(arrays, tmp_path):
    np.savez(tmp_path / "own.npz", **arrays)
    from_file, direct = data.from_npz(tmp_path / "own.npz"), data.from_arrays(arrays)
    assert from_file.digest == direct.digest and from_file.name == "own"


def test_the_digest_sees_values_shape_and_dtype(arrays):
    split = data.from_arrays(arrays).train
    changed = split.x.copy()
    changed[3, 2] += 1
    variants = [split.x, changed, split.x.reshape(-1, 2, 2), split.x.astype(np.float64)]
    assert len({data.digest([split._replace(x=x)]) for x in variants}) == 4


def nan_at(x, value=np.nan):
    x = x.copy()
    x[17, 2] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"no array 'x': it holds \['y'\], expected 'x' and 'y', or 'x_train'"),
        ({"y": None}, r"no array 'y'"),
        ({"y": np.zeros(199, int)}, r"y has shape \(199,\), expected 200 rows, the length of x"),
        ({"x": np.zeros(200)}, r"x has shape \(200,\), expected \(n, features\.\.\.\); use x\[:, None\]"),
        ({"x": np.zeros((200, 1)).tolist()}, r"x\[0\]\[0\] has shape \(\), .* make one array of it with np.asarray"),
        ({"y": [0] * 200}, r"y\[0\] has shape \(\), expected 200 rows.* make one array of it with np.asarray"),
        ({"x": np.array([["a"]] * 200)}, r"\.x has dtype <U1, expected numbers"),
        ({"y": np.array(["a"] * 200)}, r"\.y has dtype <U1, expected numbers"),
        ({"y": np.zeros((200, 3), int)}, r"y has shape \(144, 3\), expected labels \(n,\); use y.argmax"),
        ({"y": np.zeros(200)}, r"y has dtype float64, expected integer labels.*task='regression'"),
        ({"y": np.arange(200) - 1}, r"labels outside 0\.\.198 \(199 classes\), the first is -1 at row"),
        ({"y": np.arange(200) * 2}, r"y has the label 398 but fewer rows"),
        ({"y": np.full(200, 2**40)}, r"labels from 1099511627776.*below 2\^31"),
        ({"x": np.zeros((4, 2)), "y": np.zeros(4, int)}, r"4 rows, too few for a 72/8/20 % split"),
        ({"weight": np.ones(199)}, r"weight has shape \(199,\), expected \(200,\)"),
        ({"weight": -np.ones(200)}, r"weight has 200 negative values, the first -1 at row 0"),
        ({"weight": np.zeros(200)}, r"every weight is 0"),
        ({"weight": np.full(200, np.inf)}, r"weight has 200 NaN or infinite values, the first is inf at row 0"),
        ({"features": ["a", "b"]}, r"x has 4 columns but features names 2"),
        ({"classes": ["a", "b"]}, r"labels outside 0\.\.1 \(2 classes\), the first is 2 at row"),
    ],
)
def test_tables_that_cant_be_trained_on_are_refused(arrays, change, message):
    given = {key: value for key, value in (arrays | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        data.from_arrays(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_val": None}, r"no array 'x_val'"),
        ({"x_val": np.zeros((0, 4)), "y_val": np.zeros(0, int)}, r"own, val: the split is empty"),
        ({"x_test": np.zeros((50, 3))}, r"own, test: one sample of x has shape \(3,\), but \(4,\) in train"),
        ({"x_test": {"a": np.zeros((50, 4))}}, r"own, test: one sample of x has shape"),
        ({"y_test": np.full(50, -2)}, r"own, test: y has 50 labels outside 0\.\.2 \(3 classes\), the first is -2 at row 0"),
        ({"x_test": {}}, r"own, test: x holds no array"),
    ],
)
def test_parts_that_cant_be_trained_on_are_refused(arrays, change, message):
    given = {key: value for key, value in (six(arrays) | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        data.from_arrays(given, name="own")


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (-np.inf, "-inf"), (1e300, "inf")])
def test_a_bad_value_is_counted_and_placed(arrays, value, shown):
    given = six(arrays, x_test=nan_at(arrays["x"][150:], value), features=["pt", "eta", "phi", "m"])
    message = f"own, test: x has 1 NaN or infinite values, the first is {shown} at row 17, column 2 (feature 'phi'); drop"
    with pytest.raises(DataError, match=re.escape(message)):
        data.from_arrays(given, name="own")


def test_a_bad_target_is_placed(arrays):
    target = np.linspace(0, 1, 200)
    given = six(arrays | {"y": target})
    given["y_val"][4] = np.nan
    with pytest.raises(DataError, match=r"val: y has 1 NaN or infinite values, the first is nan at row 4;"):
        data.from_arrays(given, task="regression")


def test_check_takes_the_number_of_classes(arrays):
    dataset = data.from_arrays(arrays)
    assert data.check(dataset, "classification", n_classes=3) is dataset
    with pytest.raises(DataError, match=r"outside 0\.\.1 \(2 classes\)"):
        data.check(dataset, "classification", n_classes=2)
    with pytest.raises(DataError, match="train it with task='classification'"):
        data.check(dataset, "regression")
    with pytest.raises(ConfigError, match="did you mean 'regression'"):
        data.check(dataset, "regresion")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; expected an .npz"),
        (b"not a zip", "is no .npz archive"),
        (b"PK\x05\x06" + b"\0" * 18, "holds nothing"),
    ],
)
def test_files_that_hold_no_data_are_refused(tmp_path, content, message):
    path = tmp_path / "own.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.from_npz(path)


def test_a_folder_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        data.from_npz(tmp_path)
    np.savez(tmp_path / "p.npz", x=np.array([{}, []], dtype=object), y=np.zeros(2, int))
    with pytest.raises(DataError, match="can't be read: Object arrays"):
        data.from_npz(tmp_path / "p.npz")


def test_importing_the_package_imports_no_optional_one():
    code = "import sys, pquant_jax.data; print({'sklearn', 'pandas', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
