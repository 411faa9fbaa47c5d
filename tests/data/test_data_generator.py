"""The parts of benchmarks/generate_jets.py that need no simulation: formulas, and the cut of the embedded set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pquant_jax import data


def brute_force(z, r, beta):
    """The definitions in docs/data_card.md, by sorting the angles of every triple."""
    n = len(z)
    e2 = sum(z[i] * z[j] * r[i, j] ** beta for i, j in itertools.combinations(range(n), 2))
    e3 = v1 = v2 = 0.0
    for i, j, k in itertools.combinations(range(n), 3):
        low, mid, high = sorted([r[i, j], r[i, k], r[j, k]])
        weight = z[i] * z[j] * z[k]
        e3, v2, v1 = e3 + weight * (low * mid * high) ** beta, v2 + weight * (low * mid) ** beta, v1 + weight * low**beta
    return e2, e3, v1, v2


@pytest.fixture
def constituents(generate_jets):
    rng = np.random.default_rng(0)
    z, eta, phi = rng.dirichlet(np.ones(7)), rng.normal(size=7), rng.uniform(0, 2 * np.pi, 7)
    return z, generate_jets.angles(eta, phi)


def test_correlators_are_their_definitions(generate_jets, constituents):
    z, r = constituents
    e2, e3, v1, v2 = generate_jets.correlator_sums(z, r)
    for beta in (1, 2):
        expected = brute_force(z, r, beta)
        np.testing.assert_allclose((e2[beta], e3[beta - 1], v1[beta - 1], v2[beta - 1]), expected, rtol=1e-12)
    np.testing.assert_allclose(e2[0], (1 - (z**2).sum()) / 2, rtol=1e-12)


def test_features_follow_the_data_card(generate_jets, constituents):
    z, r = constituents
    sums = generate_jets.Correlators(*generate_jets.correlator_sums(z, r))
    named = dict(zip(generate_jets.FEATURES, generate_jets.features(z, sums, 80.0, 7), strict=True))
    (a2, a3, a1v, a2v), (b2, b3, b1v, b2v) = brute_force(z, r, 1), brute_force(z, r, 2)
    expected = {
        **{"zlogz": (z * np.log(z)).sum(), "c1_b1": a2, "c1_b2": b2, "c2_b1": a3 / a2**2, "c2_b2": b3 / b2**2},
        **{"d2_b1": a3 / a2**3, "d2_b2": b3 / b2**3, "d2_a1_b1": a3 / a2**3, "d2_a1_b2": a3 / b2**1.5},
        **{"m2_b1": a1v / a2, "m2_b2": b1v / b2, "n2_b1": a2v / a2**2, "n2_b2": b2v / b2**2},
        **{"mass_mmdt": 80.0, "multiplicity": 7.0},
    }
    for name, value in expected.items():
        np.testing.assert_allclose(named[name], value, rtol=1e-10, err_msg=name)
    assert tuple(named) == data.jets(50).features


def test_features_of_collinear_particles_are_zero_not_nan(generate_jets):
    z, r = np.array([0.5, 0.5]), np.zeros((2, 2))
    sums = generate_jets.Correlators(*generate_jets.correlator_sums(z, r))
    found = generate_jets.features(z, sums, 0.0, 2)
    assert np.isfinite(found).all() and (found[4:14] == 0).all()


def big_file(path, n=60):
    rng = np.random.default_rng(1)
    y = rng.permutation(np.repeat(np.arange(5), n)).astype(np.int8)
    np.savez(path, x=np.arange(5 * n * 16, dtype=np.float32).reshape(-1, 16) + y[:, None] / 8, y=y)
    return path


def test_the_subset_is_balanced_disjoint_and_reproducible(generate_jets, tmp_path):
    source, sizes = big_file(tmp_path / "big.npz"), {"train": 30, "val": 6, "test": 10}
    for name in ("a.npz", "b.npz"):
        generate_jets.subset(source, tmp_path / name, 0, sizes)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as archive:
        for part, size in sizes.items():
            blocks = archive[f"y_{part}"].reshape(size, 5)
            np.testing.assert_array_equal(np.sort(blocks, axis=1), np.tile(np.arange(5), (size, 1)))
            np.testing.assert_array_equal(archive[f"x_{part}"][:, 0] % 1 * 8, archive[f"y_{part}"])
        rows = np.concatenate([archive[f"x_{part}"] for part in sizes])
    assert len(np.unique(rows, axis=0)) == 230
    dataset = data.from_npz(tmp_path / "a.npz")
    assert dataset.features == generate_jets.FEATURES and dataset.licence == "CC0-1.0"


def test_a_source_that_is_too_small_is_refused(generate_jets, tmp_path):
    source = big_file(tmp_path / "big.npz")
    with pytest.raises(SystemExit, match="60 jets in its smallest class, 8000 are wanted"):
        generate_jets.main(["subset", str(source), str(tmp_path / "out.npz")])
    assert not (tmp_path / "out.npz").exists()


def test_help_names_both_commands(generate_jets, capsys):
    with pytest.raises(SystemExit, match="0"):
        generate_jets.main(["--help"])
    shown = capsys.readouterr().out
    assert "generate" in shown and "subset" in shown and "pythia8mc" in shown
