"""The particle jets embedded in the package: a balanced part of a big file of jets with their leading particles.

    python benchmarks/make_particles.py jets_particles.npz pquant_jax/data/particles.npz

The big file holds x (n, 32, 3) float16 = (pT fraction, delta eta, delta phi) and y (n,), labels 0..4 of g, q, t, w, z.
Equal arguments give equal bytes.  docs/data_card.md describes what comes out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from generate_jets import balanced, write

FEATURES: Final = ("pt_fraction", "delta_eta", "delta_phi")
PER_CLASS: Final = {"train": 1440, "val": 160, "test": 400}
SOURCE: Final = "Pythia 8 + FastJet, the jets of benchmarks/generate_jets.py of pquant-jax, ungroomed"


def subset(source: Path, out: Path, seed: int, per_class: dict[str, int]) -> None:
    """Write `out`: x_train, y_train, ... with `per_class` jets of each class; every five rows in sequence are one of each."""
    arrays = balanced(source, seed, per_class)
    halves = {key: v.astype(np.float16) if key.startswith("x_") else v for key, v in arrays.items()}
    write(out, halves, FEATURES, SOURCE)


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
