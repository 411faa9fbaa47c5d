"""Bit flips and triplication on the jets MLP: does the ranking beat chance, does the RTL survive every flip.

The ranking is measured on the MLP of the zoo, the RTL on a smaller one (16-16-16-5) that Verilator compiles in a minute: with
4,400 multipliers of two inputs and 23,000 register bits it takes many.

    python benchmarks/hardware_robust.py [--pictures FOLDER]

`lines()` gives one dict per promise: name, figure, holds (and skipped, with a reason, without Verilator).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import zoo
from zoo_entries import ENTRIES, Entry

from pquant_jax import lower, robust
from pquant_jax.lower import registers, sim
from pquant_jax.lower.backends import da4ml
from pquant_jax.report import plots
from pquant_jax.zoo import mlp

PERCENT, RATE, TRIALS, CHANCES, SAMPLES, VECTORS = 10.0, 0.03, 24, 3, 500, 4
RATES: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
OTHERS: Final = 500  # unprotected bits that are flipped, so that the test can fail


class Study(NamedTuple):
    """The trained model, the samples it is looked at with (from the test set) and the scores (from the training set)."""

    trained: zoo.Trained
    x: np.ndarray
    y: np.ndarray
    found: robust.Sensitivity
    inject: Callable[..., robust.Injection]


SMALL: Final = ENTRIES["mlp"]._replace(build=lambda: mlp([16, 16], 5))


def study(entry: Entry = ENTRIES["mlp"], seed: int = 0, scale: float = 0.5) -> Study:
    """The jets MLP, trained briefly, and the sensitivity of its bits."""
    trained = zoo.train(entry, seed=seed, scale=scale)
    inst, view, state, data = trained
    found = robust.bit_sensitivity(inst, view, state, data.train.x[:SAMPLES], data.train.y[:SAMPLES])
    x, y = data.test.x[:SAMPLES], data.test.y[:SAMPLES]
    return Study(trained, x, y, found, robust.injector(inst, view, state, x, y))


def injected(made: Study, score: Any, rates: Any, percent: float = PERCENT) -> robust.Injection:
    """Accuracy under flips of what is not protected by the bits of the highest `score`."""
    return made.inject(rates, trials=TRIALS, seed=1, protected=robust.protect(score, percent))


def ranking_line(made: Study) -> dict[str, Any]:
    """Protected by sensitivity against protected at random, the same number of bits and the same draws of flips."""
    ours = injected(made, made.found.score, [RATE])
    chance = [injected(made, robust.random_scores(made.found.score, seed), [RATE]) for seed in range(CHANCES)]
    differences = ours.figure[0] - np.mean([c.figure[0] for c in chance], 0)
    error = differences.std(ddof=1) / np.sqrt(TRIALS)
    random = np.mean([c.mean[0] for c in chance])
    figure = (
        f"accuracy {ours.mean[0]:.4f} against {random:.4f} at random, {ours.clean:.4f} without flips; "
        f"difference {100 * differences.mean():.2f} points, standard error {100 * error:.2f}"
    )
    name = (
        f"protecting {PERCENT:g} % of {ours.bits:,} weight bits by sensitivity beats random, {RATE:g} flips per bit, > 2 errors"
    )
    return {"name": name, "figure": figure, "holds": bool(differences.mean() > 2 * error)}


def triplication_line(made: Study, folder: Path) -> dict[str, Any]:
    """Every flip-flop of the protected bits inverted in Verilator, one after the other, and `OTHERS` unprotected ones."""
    name = f"register file of a 16-16-16-5 MLP with {PERCENT:g} % of its bits triplicated survives every single flip of them"
    if sim.missing_tools():
        return {"name": name, "figure": "; ".join(sim.missing_tools()), "holds": True, "skipped": True}
    inst, view, state, _ = made.trained
    graph = lower.trace(inst, view, state, weights="ports")
    weights = lower.weights_of(graph, inst, view, state)
    rtl = da4ml.write_rtl(da4ml.to_comb(graph), folder / "netlist", name="jets")
    voted = registers.most_sensitive(registers.register_map(graph, rtl), made.found.score, PERCENT)
    regs = registers.write_registers(graph, rtl, weights, folder / "registers", voted=voted)
    program = registers.build(regs, folder / "work", inject=True)
    x = np.asarray(inst.encode(made.x[:VECTORS]), np.float64).reshape(VECTORS, -1)
    expected = lower.emulate(lower.loaded(graph, weights), [x])[0]
    (right,), _ = registers.play(program, regs, [registers.vectors(x)], inject=True)
    chosen, (number, _, _) = np.flatnonzero(voted), registers.stored_bits(regs.map)
    broken = registers.flip_effects(program, regs, x, np.repeat(chosen, 3), np.tile(np.arange(3), len(chosen)))
    others = np.random.default_rng(0).permutation(number[~voted[number]])[:OTHERS]
    seen = registers.flip_effects(program, regs, x, others, np.zeros_like(others)) > 0
    figure = (
        f"{int((broken > 0).sum())} of {3 * len(chosen):,} flips change an output of {VECTORS} vectors; "
        f"of {len(others)} unprotected bits {int(seen.sum())} do; without flips {int((right != expected).sum())} integers differ "
        "from the emulator"
    )
    holds = not broken.any() and bool(seen.any()) and np.array_equal(right, expected)
    return {"name": name, "figure": figure, "holds": bool(holds)}


def pictures(made: Study, folder: Path) -> list[Path]:
    """flips.svg and bits.svg."""
    clean = injected(made, made.found.score, RATES, 0)
    curves = [plots.FlipCurve("no protection", clean.levels, clean.figure)]
    chance = injected(made, robust.random_scores(made.found.score), RATES)
    curves.append(plots.FlipCurve(f"{PERCENT:g} % of the bits, at random", chance.levels, chance.figure))
    ours = injected(made, made.found.score, RATES)
    curves.append(plots.FlipCurve(f"{PERCENT:g} % of the bits, the most sensitive", ours.levels, ours.figure))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flips.svg").write_text(plots.flip_rates(curves, clean=clean.clean))
    (folder / "bits.svg").write_text(plots.bit_map(robust.by_bit(made.found)))
    return [folder / "flips.svg", folder / "bits.svg"]


def lines() -> Iterator[dict[str, Any]]:
    """Both promises, measured."""
    yield ranking_line(study())
    with tempfile.TemporaryDirectory(prefix="pquant-robust-") as folder:
        yield triplication_line(study(SMALL, scale=0.2), Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="also draw flips.svg and bits.svg there")
    folder = parser.parse_args().pictures
    for line in lines():
        print("ok  " if line["holds"] else "FAIL", line["name"], "|", line["figure"], flush=True)
    if folder is not None:
        print(*pictures(study(), folder))


if __name__ == "__main__":
    main()
