"""`load` and the OpenML data set, whose download is replaced: there is no network in a test."""

from __future__ import annotations

import sys
import types
import urllib.error

import numpy as np
import pytest

from pquant_jax import data
from pquant_jax._errors import ConfigError, DataError, ToolError


def openml(monkeypatch, fetch):
    module = types.ModuleType("sklearn.datasets")
    module.fetch_openml = fetch
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)


def bunch(letters="gqtwz"):
    y = np.array(list(letters) * 20, dtype=object)
    x = np.stack([np.arange(100.0), [ord(c) for c in y]], axis=1)
    return {"data": x, "target": y, "feature_names": ["index", "letter"], "details": {"licence": "some"}}


def test_openml_letters_become_labels_in_order(monkeypatch):
    asked = []
    openml(monkeypatch, lambda *args, **options: asked.append((args, options)) or bunch())
    dataset = data.load("openml:jets")
    assert asked[0][0] == ("hls4ml_lhc_jets_hlf",) and asked[0][1]["as_frame"] is False
    assert dataset.classes == ("g", "q", "t", "w", "z") and dataset.features == ("index", "letter") and dataset.licence == "some"
    for split in (dataset.train, dataset.val, dataset.test):
        raw = np.round(split.x * dataset.std + dataset.mean).astype(int)
        np.testing.assert_array_equal([ord("gqtwz"[label]) for label in split.y], raw[:, 1])


def test_openml_splits_as_the_published_recipes_do(monkeypatch):
    openml(monkeypatch, lambda *args, **options: bunch())
    dataset = data.openml_jets()
    assert [len(s.y) for s in (dataset.train, dataset.val, dataset.test)] == [72, 8, 20]
    rows = np.round(dataset.test.x[:, 0] * dataset.std[0] + dataset.mean[0]).astype(int)
    # the first entries of sklearn.model_selection.train_test_split(np.arange(100), test_size=0.2, random_state=42)[1]
    np.testing.assert_array_equal(rows[:8], [83, 53, 70, 45, 44, 39, 22, 80])


def failing(error):
    def fetch(*args, **options):
        raise error

    return fetch


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (urllib.error.URLError("no route"), "could not download 'hls4ml_lhc_jets_hlf' from OpenML .*no route.* 'jets'"),
        (ValueError("no such data set"), "OpenML did not deliver 'hls4ml_lhc_jets_hlf': no such data set; use the embedded"),
    ],
)
def test_openml_without_an_answer_is_one_clear_line(monkeypatch, error, message):
    openml(monkeypatch, failing(error))
    with pytest.raises(DataError, match=message) as caught:
        data.openml_jets()
    assert "\n" not in str(caught.value)


def test_openml_with_other_classes_is_refused(monkeypatch):
    openml(monkeypatch, lambda *args, **options: bunch("gqtwx"))
    with pytest.raises(DataError, match=r"has the classes \['x'\]"):
        data.openml_jets()


def test_openml_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ToolError, match=r"pip install 'pquant-jax\[data\]'"):
        data.openml_jets()


def test_load_takes_a_name_and_a_file(tmp_path, arrays):
    assert data.load("jets").digest == data.jets().digest
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    assert data.load(str(path)).mean is None
    assert data.load(str(path), standardise=True).mean.shape == (4,)


OWN = """
import numpy as np
from pquant_jax import data
x = np.arange(80.0).reshape(40, 2)
constant = 3
def a_dict(): return {"x": x, "y": np.arange(40) % 2}
def targets(): return {"x": x, "y": x[:, 0]}
def a_dataset(): return data.jets(100)
def nothing(): return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_module_of_the_user.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_module_of_the_user"
    sys.modules.pop("own_module_of_the_user", None)


def test_load_calls_a_function(module):
    assert data.load(f"{module}:a_dict").train.x.shape == (29, 2)
    assert data.load(f"{module}:a_dict", standardise=True).mean.shape == (2,)
    assert data.load(f"{module}:targets", task="regression").classes == ()
    assert data.load(f"{module}:a_dataset").digest == data.jets(100).digest


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a_dikt", ConfigError, "has no function 'a_dikt'; did you mean 'a_dict'"),
        ("constant", ConfigError, "has no function 'constant'"),
        ("nothing", DataError, "returned a NoneType, expected a pquant_jax.data.Dataset or a dict"),
        ("targets", DataError, "has dtype float64, expected integer labels"),
    ],
)
def test_load_says_what_is_wrong_with_a_function(module, name, error, message):
    with pytest.raises(error, match=message):
        data.load(f"{module}:{name}")


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("jests", ConfigError, "did you mean 'jets'"),
        ("openml:jest", ConfigError, "did you mean 'openml:jets'"),
        ("", ConfigError, "expected 'jets', 'openml:jets', .* a path that ends in .npz or .csv"),
        ("no_such_module_here:f", ConfigError, "can't be imported: No module named 'no_such_module_here'; install it"),
        ("missing.npz", DataError, "data file 'missing.npz' does not exist"),
    ],
)
def test_load_refuses_what_names_nothing(spec, error, message):
    with pytest.raises(error, match=message):
        data.load(spec)
