"""Every shipped configuration trains: read, built and trained for two epochs on a few jets and a narrow model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from pquant_jax import config, run, train
from pquant_jax.run._files import read_records
from pquant_jax.run._log import make_log
from pquant_jax.run._prepare import prepare, prepare_data
from pquant_jax.run._training import fit_compressed

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("jets_*.yaml"))
METHODS = {
    "ap", "autosparse", "binary", "cs", "dst", "dynamic", "fitcompress", "hawq", "magnitude", "mdmm", "minifloat", "nm", "paca",
    "pdp", "pnorm", "random", "ternary", "wanda",
}  # fmt: skip
SMALL = (
    "data.n=500",
    "model.args={hidden: [8]}",
    "training.epochs={pretrain: 0, train: 1, finetune: 1}",
    "training.rounds=1",
    "training.save_epoch=0",
    "training.batch_size=64",
    "training.float_baseline=false",
    "hardware.lower=false",
)


def small(path: Path) -> config.Experiment:
    """A search comes behind pre-training, and with a goal that the small model can reach."""
    goals = {"jets_fitcompress": "search.ratio=0.2", "jets_hawq": "search.ebops=6000"}
    searched = ["training.epochs={pretrain: 1, train: 0, finetune: 1}", goals[path.stem]] if path.stem in goals else []
    return config.load(path, [*SMALL, *searched])


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """What is tested runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def data():
    return prepare_data(config.load(CONFIGS[0], SMALL))


def test_every_method_has_one():
    assert {path.stem for path in CONFIGS} >= {f"jets_{method}" for method in METHODS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_epochs(path, data, tmp_path):
    experiment = small(path)
    stages = ["train", "finetune"] if experiment.search is None else ["pretrain", "finetune"]
    made = prepare(experiment, data)
    if experiment.search is not None:
        _, result = fit_compressed(made, tmp_path, make_log(quiet=True), resume=False)
        history = read_records(tmp_path / "metrics.jsonl")
        assert json.loads((tmp_path / "search.json").read_text())["bits"].keys() == made.inst.sites.keys()
    else:
        tx = config.optimizer(experiment, made.compression, made.steps)
        parts = dict(plan=made.plan, compression=made.compression, optimizer=tx, loss=made.loss, metric=made.metric)
        result = train.fit(made.inst, data, batch_size=experiment.training.batch_size, **parts)
        history = result.history
    assert [(r["epoch"], r["stage"]) for r in history] == list(enumerate(stages)) and result.traces == 1
    assert all(np.isfinite(r["val_loss"]) for r in history)


@pytest.mark.slow
def test_an_interrupted_search_goes_on_to_the_same_bits(tmp_path):
    """Stopped behind pre-training: the search is done again, from the same weights."""
    setting = [*SMALL, "name=whole", "training.epochs={pretrain: 2, train: 2, finetune: 1}", "search.ratio=0.2"]
    path = next(p for p in CONFIGS if p.stem == "jets_fitcompress")
    run.run(config.load(path, setting), root=tmp_path, quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for name in ("summary.json", "final.npz", "search.json"):
        (tmp_path / "part" / name).unlink()
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "model")
    run.resume(tmp_path / "part", quiet=True)
    finals = [np.load(tmp_path / name / "final.npz") for name in ("whole", "part")]
    assert finals[0].files == finals[1].files
    for key in finals[0].files:
        np.testing.assert_array_equal(finals[0][key], finals[1][key])
    records = [read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "part")]
    assert [r["val_loss"] for r in records[0]] == [r["val_loss"] for r in records[1]] and len(records[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_whole_run(path, tmp_path):
    summary = run.run(small(path), root=tmp_path, quiet=True)
    assert summary["epochs"] == 2 and (tmp_path / path.stem / "report.html").is_file()
