"""The configurations of the zoo: each is read and built, down to the graph; whole runs are slow."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from pquant_jax import config, run
from pquant_jax.run._prepare import prepare, prepare_data

CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not p.stem.startswith("jets_"))
SMALL = ("data.n=500", "training.epochs={pretrain: 0, train: 1, finetune: 1}", "training.batch_size=64")


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """What is tested runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_models_of_the_zoo_have_configurations():
    assert {config.load(path).model.build for path in CONFIGS} >= {"deepsets", "mixer", "autoencoder", "smart_pixels"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_is_built_down_to_the_graph(path):
    experiment = config.load(path, SMALL)
    made = prepare(experiment, prepare_data(experiment))
    assert made.compression is not None and made.epochs == 2 and experiment.hardware.lower


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_whole_run(path, tmp_path):
    summary = run.run(config.load(path, [*SMALL, "hardware.synthesize=false"]), root=tmp_path, quiet=True)
    assert summary["epochs"] == 2 and (tmp_path / path.stem / "report.html").is_file()
    assert summary["mismatches"]["emulator"] == summary["mismatches"]["da4ml"] == 0
