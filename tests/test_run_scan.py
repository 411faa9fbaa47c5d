"""`pquant-jax scan`: a run's uncompressed model at a grid of formats, with its files and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import cli, config, train
from pquant_jax.run import _files
from pquant_jax.run._prepare import describe_data, prepare, prepare_data
from pquant_jax.transforms import identity

TINY = {"name": "tiny", "model": {"build": "mlp", "args": {"hidden": [4]}}, "data": {"source": "jets", "n": 500},
        "training": {"epochs": 1, "batch_size": 64}, "quantization": {"method": "fixed"}}  # fmt: skip
GRID = ("--widths", "4", "8", "16", "--integers", "4", "6")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run directory whose float model is untrained."""
    experiment = config.parse(TINY)
    prepared = prepare(experiment, prepare_data(experiment))
    _files.create(tmp_path / "tiny", experiment)
    _files.write_json(tmp_path / "tiny" / "dataset.json", describe_data(prepared.dataset))
    model = prepared.inst.model
    none = identity()
    params = none.attach(model.params)
    train.save_final(tmp_path / "tiny" / "float.npz", train.finalize(none, params, none.init(params), model.state))
    return tmp_path / "tiny"


def test_a_scan_writes_its_figures_and_pictures(folder, capsys):
    assert cli.main(["scan", str(folder), *GRID]) == 0
    said = capsys.readouterr().out
    found = json.loads((folder / "scan" / "scan.json").read_text())
    assert np.shape(found["values"]["accuracy"]) == (3, 2) and found["widths"] == [4, 8, 16] and found["samples"] == 100
    point = found["chosen"]
    assert f"<{point['width']},{point['integer']}> has {point['value']:.4f}" in said and "of 6 in" in said
    assert set(found["sensitivity"]["drop"]) == {"Dense_0", "Dense_1", "output"} and found["sensitivity"]["width"] == 4
    assert {p.name for p in (folder / "scan").iterdir()} == {"scan.json", "map.svg", "lines.svg", "layers.svg"}
    dataset = pq.data.jets(500)
    inst = pq.instrument(pq.zoo.mlp([4]), dataset.train.x[:2])
    view, _ = train.load_final(folder / "float.npz", inst)
    again = pq.scan(inst, view.model, dataset.test, widths=(8,), integers=(6,))
    assert again.metric[0, 0] == pytest.approx(found["values"]["accuracy"][1][1])


def test_no_good_point_is_said(folder, capsys):
    assert cli.main(["scan", str(folder), "--widths", "16", "--integers", "6", "--drop", "-1"]) == 0
    assert "no point is within -1, of 1 in" in capsys.readouterr().out


def test_a_run_without_a_float_model_is_one_line(folder, capsys):
    (folder / "float.npz").unlink()
    assert cli.main(["scan", str(folder)]) == 2
    assert "has no float.npz: the run is not that far, or has training.float_baseline=false" in capsys.readouterr().err
