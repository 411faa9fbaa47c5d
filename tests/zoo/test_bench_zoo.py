"""The benchmark's own functions, and every model through it, shortened."""

from __future__ import annotations

import numpy as np
import pytest

import pquant_jax as pq


@pytest.fixture(scope="module")
def bench(benchmark_module):
    return benchmark_module("zoo")


def test_every_model_has_an_entry(bench):
    built = {type(entry.build()).__name__ for entry in bench.ENTRIES.values()}
    assert built == {
        "AutoEncoder", "CNN", "DeepSets", "GRU", "InteractionNetwork", "JediLinear", "MLP", "Mixer", "Model", "ResNet",
        "SmartPixels", "Transformer", "TwoHeads", "VAE",
    }  # fmt: skip


def test_the_area_under_the_curve_counts_pairs(bench):
    from zoo_entries import auc

    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60).astype(float), rng.integers(0, 5, 60)
    signal, background = scores[labels > 1], scores[labels < 2]
    wins = (signal[:, None] > background).mean() + (signal[:, None] == background).mean() / 2
    np.testing.assert_allclose(auc(scores, labels), wins)


def test_images_hold_the_momentum_of_the_jet(bench):
    from zoo_entries import jet_images

    made, particles = jet_images(), pq.data.particles()
    images = made.val.x["image"]
    assert images.shape == (800, 8, 8, 1) and made.val.x["features"].shape == (800, 4, 3)
    np.testing.assert_allclose(images.sum((1, 2, 3)), particles.val.x[..., 0].sum(1), rtol=1e-5)
    assert images[:, 2:6, 2:6].sum() > 0.8 * images.sum()  # the jet's axis is in the middle


def test_missing_data_leave_a_model_out_with_a_reason(bench, monkeypatch):
    monkeypatch.delenv("PQUANT_DATA", raising=False)
    found = bench.run("cnn")
    assert found["holds"] and "set PQUANT_DATA" in found["skipped"] and bench.text(found).startswith("left out: mnist.npz")


SLOW = sorted({
    "autoencoder", "cnn", "conv1d", "deepsets", "gru", "interaction_network", "jedi_linear", "mass_regression", "mixer", "mlp",
    "particle_mlp", "residual_mlp", "resnet20", "smart_pixels", "symbolic", "transformer", "two_heads", "vae",
})  # fmt: skip


def test_the_slow_tests_are_of_all_entries(bench):
    assert set(SLOW) == set(bench.ENTRIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_lowers_without_a_mismatch(bench, name):
    found = bench.run(name, rtl=False, scale=0.05)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["holds"], bench.text(found)
