"""Every shipped configuration trains: read, built and trained for two epochs on a few jets and a narrow model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from pquant_jax import config, run, train
from pquant_jax.run._prepare import prepare, prepare_data

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
METHODS = {"ap", "autosparse", "cs", "dst", "magnitude", "mdmm", "nm", "paca", "pdp", "pnorm", "random", "wanda"}
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
def test_two_epochs(path, data):
    experiment = config.load(path, SMALL)
    made = prepare(experiment, data)
    result = train.fit(
        made.inst,
        data,
        loss=made.loss,
        metric=made.metric,
        plan=made.plan,
        compression=made.compression,
        optimizer=config.optimizer(experiment, made.compression, made.steps),
        batch_size=experiment.training.batch_size,
        seed=experiment.seed,
    )
    assert [r["stage"] for r in result.history] == ["train", "finetune"] and result.traces == 1
    assert all(np.isfinite(r["val_loss"]) for r in result.history)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_whole_run(path, tmp_path):
    summary = run.run(config.load(path, SMALL), root=tmp_path, quiet=True)
    assert summary["epochs"] == 2 and (tmp_path / path.stem / "report.html").is_file()
