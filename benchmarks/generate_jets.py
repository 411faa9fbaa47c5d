"""Boosted jets with the 16 high-level features of the LHC jet-substructure task, and the set embedded in the package.

    python benchmarks/generate_jets.py generate big.npz --jets 40000 --workers 5
    python benchmarks/generate_jets.py subset big.npz pquant_jax/data/jets.npz

`generate` needs the extra `generate` (pythia8mc <= 8.317.2, the last with wheels for Python 3.11; fastjet; numba);
`subset` needs numpy only.  One jet costs about 8 ms.  docs/data_card.md describes what comes out.

Proton collisions at 13 TeV, Pythia 8 at hadron level without multi-parton interactions; gluons, light quarks and top
quarks from pTHat 950..1100 GeV, W and Z from a scalar of 2.05 TeV.  Jets: anti-kT, R = 0.8, 800 < pT < 1600 GeV,
|eta| < 2, groomed by modified mass drop (z_cut = 0.1, beta = 0).
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

CLASSES: Final = "gqtwz"
FEATURES: Final = (
    *("zlogz", "c1_b0", "c1_b1", "c1_b2", "c2_b1", "c2_b2", "d2_b1", "d2_b2", "d2_a1_b1", "d2_a1_b2"),
    *("m2_b1", "m2_b2", "n2_b1", "n2_b2", "mass_mmdt", "multiplicity"),
)
COMMON: Final = ("Beams:eCM = 13000.", "PartonLevel:MPI = off", "Print:quiet = on", "Random:setSeed = on")
QCD: Final = ("PhaseSpace:pTHatMin = 950.", "PhaseSpace:pTHatMax = 1100.")
RESONANCE: Final = (
    *("HiggsSM:gg2H = on", "25:m0 = 2050", "25:mWidth = 20", "25:doForceWidth = on"),
    *("PhaseSpace:mHatMin = 1900", "25:onMode = off"),
)
# W and Z come from a heavy scalar, so that they are longitudinal and their decays are rarely groomed away
PROCESSES: Final = {
    "g": (*QCD, "HardQCD:gg2gg = on", "HardQCD:qqbar2gg = on"),
    "q": (*QCD, "HardQCD:qq2qq = on", "HardQCD:gg2qqbar = on", "HardQCD:qqbar2qqbarNew = on"),
    "t": (*QCD, "Top:gg2ttbar = on", "Top:qqbar2ttbar = on", "24:onMode = off", "24:onIfAny = 1 2 3 4 5"),
    "w": (*RESONANCE, "25:onIfMatch = 24 -24", "24:onMode = off", "24:onIfAny = 1 2 3 4 5"),
    "z": (*RESONANCE, "25:onIfMatch = 23 23", "23:onMode = off", "23:onIfAny = 1 2 3 4 5"),
}
RADIUS, Z_CUT, PT_MIN, PT_MAX, ETA_MAX = 0.8, 0.1, 800.0, 1600.0, 2.0
MAX_CONSTITUENTS: Final = 150  # for the correlators, whose cost grows with the cube; less than 1 % of jets have more
PER_CLASS: Final = {"train": 5760, "val": 640, "test": 1600}
SOURCE: Final = "Pythia 8 + FastJet, benchmarks/generate_jets.py of pquant-jax"


class Correlators(NamedTuple):
    """Energy correlators, z = pT / sum pT, R = angle: [beta = 1, 2] for all but `e2`, which has beta = 0, 1, 2.

    e2 = sum_ij z_i z_j R_ij^beta; e3, v2, v1 = sum_ijk z_i z_j z_k times the product of all three, the two smaller,
    the smallest of the angles, each to the power beta (e3, 2e3 and 1e3 in the literature).
    """

    e2: np.ndarray
    e3: np.ndarray
    v1: np.ndarray
    v2: np.ndarray


def angles(eta: np.ndarray, phi: np.ndarray) -> np.ndarray:
    """R_ij = sqrt(d_eta^2 + d_phi^2) (n, n) in radians, d_phi wrapped to -pi..pi.

    >>> angles(np.array([0.0, 3.0]), np.array([3.0, 3.0 - 2 * np.pi])).round(6).tolist()
    [[0.0, 3.0], [3.0, 0.0]]
    """
    d_phi = np.abs(phi[:, None] - phi) % (2 * np.pi)
    return np.hypot(eta[:, None] - eta, np.minimum(d_phi, 2 * np.pi - d_phi))


def correlator_sums(z: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The fields of `Correlators` for pT fractions z (n,) and angles r (n, n); plain loops, to be compiled by numba."""
    n = z.shape[0]
    e2, e3, v1, v2 = np.zeros(3), np.zeros(2), np.zeros(2), np.zeros(2)
    for i in range(n):
        for j in range(i + 1, n):
            zz, a = z[i] * z[j], r[i, j]
            e2[0] += zz
            e2[1] += zz * a
            e2[2] += zz * a * a
            for k in range(j + 1, n):
                zzz, b, c = zz * z[k], r[i, k], r[j, k]
                low, high = min(a, b, c), max(a, b, c)
                two = low * (a + b + c - low - high)
                three = a * b * c
                e3[0] += zzz * three
                e3[1] += zzz * three * three
                v1[0] += zzz * low
                v1[1] += zzz * low * low
                v2[0] += zzz * two
                v2[1] += zzz * two * two
    return e2, e3, v1, v2


def features(z: np.ndarray, ecf: Correlators, mass: float, multiplicity: int) -> np.ndarray:
    """The 16 features in the order of `FEATURES`; a ratio whose denominator vanishes is 0."""
    e2, e3, v1, v2 = ecf

    def ratio(a: float, b: float) -> float:
        return a / b if b > 1e-30 else 0.0

    d2_b1 = ratio(e3[0], e2[1] ** 3)
    return np.array(
        [
            np.sum(z * np.log(z)),
            *e2,
            *(ratio(e3[0], e2[1] ** 2), ratio(e3[1], e2[2] ** 2)),
            *(d2_b1, ratio(e3[1], e2[2] ** 3), d2_b1, ratio(e3[0], e2[2] ** 1.5)),
            *(ratio(v1[0], e2[1]), ratio(v1[1], e2[2])),
            *(ratio(v2[0], e2[1] ** 2), ratio(v2[1], e2[2] ** 2)),
            *(mass, multiplicity),
        ],
        np.float64,
    )


def groomed(jet: Any, fastjet: Any) -> list[Any]:
    """The constituents of `jet` after modified mass drop: undo the last clustering until both parts pass `Z_CUT`."""
    definition = fastjet.JetDefinition(fastjet.cambridge_algorithm, 1000.0)
    sequence = fastjet.ClusterSequence(list(jet.constituents()), definition)
    part = fastjet.sorted_by_pt(sequence.inclusive_jets())[0]
    while True:
        a, b = fastjet.PseudoJet(), fastjet.PseudoJet()
        if not part.has_parents(a, b) or min(a.pt(), b.pt()) > Z_CUT * (a.pt() + b.pt()):
            return list(part.constituents())  # before `sequence` goes: constituents belong to it
        part = fastjet.PseudoJet(a if a.pt() > b.pt() else b)


def hard_jets(label: str, seed: int) -> Iterator[Any]:
    """Endless jets of class `label`: at most the two leading ones of each event that pass the cuts."""
    import fastjet
    import pythia8mc

    pythia = pythia8mc.Pythia("", False)
    for setting in (*COMMON, f"Random:seed = {seed}", *PROCESSES[label]):
        pythia.readString(setting)
    if not pythia.init():
        sys.exit(f"Pythia refused the settings of class {label!r}")
    definition = fastjet.JetDefinition(fastjet.antikt_algorithm, RADIUS)
    while True:
        if not pythia.next():
            continue
        particles = (pythia.event[i] for i in range(pythia.event.size()))
        visible = [
            fastjet.PseudoJet(p.px(), p.py(), p.pz(), p.e())
            for p in particles
            if p.isFinal() and p.isVisible() and abs(p.eta()) < 3.0
        ]
        sequence = fastjet.ClusterSequence(visible, definition)
        for jet in fastjet.sorted_by_pt(sequence.inclusive_jets(PT_MIN))[:2]:
            if PT_MIN < jet.pt() < PT_MAX and abs(jet.eta()) <= ETA_MAX:
                yield jet


def generate_class(label: str, n: int, seed: int) -> np.ndarray:
    """The features of `n` jets of class `label`, float32 (n, 16)."""
    import fastjet
    from numba import njit

    sums = njit(correlator_sums)

    def described() -> Iterator[np.ndarray]:
        for jet in hard_jets(label, seed):
            parts = sorted(groomed(jet, fastjet), key=lambda p: -p.pt())
            if len(parts) > 1:
                pt, eta, phi = np.array([[p.pt(), p.eta(), p.phi()] for p in parts[:MAX_CONSTITUENTS]]).T
                z = pt / pt.sum()
                mass = math.sqrt(max(_mass2(parts), 0.0))
                yield features(z, Correlators(*sums(z, angles(eta, phi))), mass, len(parts))

    return np.array(list(itertools.islice(described(), n)), np.float32)


def _mass2(parts: Sequence[Any]) -> float:
    px, py, pz, e = np.array([[p.px(), p.py(), p.pz(), p.e()] for p in parts]).sum(axis=0)
    return float(e * e - px * px - py * py - pz * pz)


def generate(out: Path, n: int, seed: int, workers: int) -> None:
    """Write `out`: x (5 n, 16) raw, y (5 n,), shuffled, with their names; class c runs with the seed `seed + c`."""
    with ProcessPoolExecutor(workers) as pool:
        tables = list(pool.map(generate_class, CLASSES, [n] * 5, range(seed, seed + 5)))
    order = np.random.Generator(np.random.Philox(seed)).permutation(5 * n)
    labels = np.repeat(np.arange(5, dtype=np.int8), n)
    write(out, {"x": np.concatenate(tables)[order], "y": labels[order]})


def subset(source: Path, out: Path, seed: int, per_class: dict[str, int]) -> None:
    """Write `out` from the big file `source`: `balanced` with `per_class` jets of each class in each split."""
    write(out, balanced(source, seed, per_class))


def balanced(source: Path, seed: int, per_class: dict[str, int]) -> dict[str, np.ndarray]:
    """x_train, y_train, ... of the big file `source`, `per_class` jets of each class in each split.

    Every five rows in sequence are one jet of each class in random order, so that any leading part is balanced.
    """
    with np.load(source) as archive:
        x, y = archive["x"], archive["y"]
    rng = np.random.Generator(np.random.Philox(seed))
    rows = [rng.permutation(np.flatnonzero(y == label)) for label in range(len(CLASSES))]
    wanted = sum(per_class.values())
    if min(map(len, rows)) < wanted:
        sys.exit(f"{source} has {min(map(len, rows))} jets in its smallest class, {wanted} are wanted")
    parts = np.split(np.stack([r[:wanted] for r in rows], axis=1), np.cumsum(list(per_class.values()))[:-1])
    arrays = {}
    for part, table in zip(per_class, parts, strict=True):
        index = rng.permuted(table, axis=1).ravel()
        arrays |= {f"x_{part}": x[index], f"y_{part}": y[index].astype(np.int8)}
    return arrays


def write(out: Path, arrays: dict[str, np.ndarray], features: Sequence[str] = FEATURES, source: str = SOURCE) -> None:
    """Write the arrays and their names under a temporary name, then rename; equal arrays give equal bytes."""
    texts = {"features": features, "classes": list(CLASSES), "source": source, "licence": "CC0-1.0"}
    temporary = out.with_name(out.name + ".part.npz")
    np.savez_compressed(temporary, **arrays, **{key: np.array(value) for key, value in texts.items()})
    os.replace(temporary, out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB,", {key: value.shape for key, value in arrays.items()})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `--help` tells the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate", help="simulate jets of all five classes into one .npz")
    make.add_argument("out", type=Path)
    make.add_argument("--jets", type=int, default=40_000, help="jets per class (default %(default)s)")
    make.add_argument("--seed", type=int, default=1, help="of class g; q has the next one, ... (default %(default)s)")
    make.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, at most 5 are busy")
    cut = commands.add_parser("subset", help="cut the embedded set out of a big .npz")
    cut.add_argument("source", type=Path)
    cut.add_argument("out", type=Path)
    cut.add_argument("--seed", type=int, default=0, help="of the choice and the order (default %(default)s)")
    args = parser.parse_args(argv)
    if args.command == "generate":
        generate(args.out, args.jets, args.seed, args.workers)
    else:
        subset(args.source, args.out, args.seed, PER_CLASS)


if __name__ == "__main__":
    main()
