"""What the methods claim, measured by `benchmarks/claims.py` on the embedded jets; one quick claim, the others slow."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BY_TARGET = ("magnitude", "wanda", "pdp", "dst", "autosparse", "cs")
STRUCTURED = ("ap, channels", "pdp, channels", "magnitude, channels")


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("claims")


def test_a_population_reaches_its_targets(claims):
    """Two seeds at two targets in one executable; the steering of DST, and the mask that fine-tuning freezes."""
    assert claims.reached("dst", seeds=(0, 1), targets=(0.6, 0.9)).max() <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_TARGET)
def test_three_targets_three_seeds(claims, name):
    assert name in claims.BY_TARGET
    assert claims.reached(name).max() <= 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURED)
def test_channels_within_one_group(claims, name):
    assert claims.groups_off(name) <= 1


@pytest.mark.slow
def test_learned_methods_beat_random(claims):
    """At 90 %, five pairs of equal initial weights, batches and epochs, `random` by four lots: more than 2 standard errors."""
    pairs = claims.against_random()
    assert set(pairs) == {"pdp", "dst", "autosparse", "cs", "wanda"}
    for name, pair in pairs.items():
        assert pair.difference > 2 * pair.error, (name, pair)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", ["2:4", "1:4", "1:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "pdp"])
def test_nm_holds_in_every_block_after_fine_tuning(claims, method, ratio):
    assert claims.nm_violations(method, ratio) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsity", "dsp", "ebops"])
def test_mdmm_settles_at_its_target(claims, name):
    found = claims.settled(name)
    assert found.off <= 0.01
    assert found.drift <= claims.STILL
    assert np.abs(found.multiplier).max() > 0


@pytest.mark.slow
def test_paca_leaves_no_kernel_outside_the_dominant_patterns(claims):
    assert set(claims.patterns_outside().values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["tensor", "channel", "weight"])
@pytest.mark.parametrize("method", ["dst", "pdp"])
def test_the_papers_table_in_kind(claims, method, granularity):
    dense, small = claims.unpruned(), claims.compressed(method, granularity)
    assert small.accuracy.mean() >= dense.accuracy.mean() - 0.01
    assert small.cost.mean() <= dense.cost.mean() / 8
