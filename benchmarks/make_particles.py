"""The particle jets embedded in the package: a balanced part of a big file of jets with their leading particles.

    python benchmarks/make_particles.py jets_particles.npz pquant_jax/data/particles.npz

The big file holds x (n, 32, 3) float16 = (pT fraction, delta eta, delta phi) and y (n,), labels 0..4 of g, q, t, w, z.
Equal arguments give equal bytes.  docs/data_card.md describes what comes out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

CLASSES: Final = "gqtwz"
FEATURES: Final = ("pt_fraction", "delta_eta", "delta_phi")
PER_CLASS: Final = {"train": 1440, "val": 160, "test": 400}
SOURCE: Final = "Pythia 8 + FastJet, the jets of benchmarks/generate_jets.py of pquant-jax, ungroomed"


def subset(source: Path, out: Path, seed: int, per_class: dict[str, int]) -> None:
    """Write `out`: x_train, y_train, ... with `per_class` jets of each class; every five rows in sequence are one of each."""
    with np.load(source) as archive:
        x, y = archive["x"], archive["y"]
    rng = np.random.Generator(np.random.Philox(seed))
    rows = [rng.permutation(np.flatnonzero(y == label)) for label in range(len(CLASSES))]
    wanted = sum(per_class.values())
    if min(map(len, rows)) < wanted:
        sys.exit(f"{source} has {min(map(len, rows))} jets in its smallest class, {wanted} are wanted")
    parts = np.split(np.stack([r[:wanted] for r in rows], axis=1), np.cumsum(list(per_class.values()))[:-1])
    arrays: dict[str, np.ndarray] = {}
    for part, table in zip(per_class, parts, strict=True):
        index = rng.permuted(table, axis=1).ravel()
        arrays |= {f"x_{part}": x[index].astype(np.float16), f"y_{part}": y[index].astype(np.int8)}
    texts = {"features": FEATURES, "classes": list(CLASSES), "source": SOURCE, "licence": "CC0-1.0"}
    temporary = out.with_name(out.name + ".part.npz")
    np.savez_compressed(temporary, **arrays, **{key: np.array(value) for key, value in texts.items()})
    os.replace(temporary, out)
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB,", {key: value.shape for key, value in arrays.items()})


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; `--help` tells the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the choice and the order (default %(default)s)")
    args = parser.parse_args(argv)
    subset(args.source, args.out, args.seed, PER_CLASS)


if __name__ == "__main__":
    main()
