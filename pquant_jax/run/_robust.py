"""What bit flips do to a finished run, and which stored bits to protect."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax

from pquant_jax import config, robust as flips
from pquant_jax._base import Tree, View
from pquant_jax.report import plots
from pquant_jax.run._files import open_run, read_json, write_json, write_text
from pquant_jax.run._log import make_log, phase
from pquant_jax.run._prepare import Prepared
from pquant_jax.run._run import restored

RATES: Final = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SAMPLES: Final = 4096  # of the training set, on which the bits are scored
HIGHEST: Final = 100  # bits that robust.json names


def sensitivity(prepared: Prepared, view: View, model_state: Tree) -> flips.Sensitivity:
    """How much a flip of each stored weight bit changes the run's loss, on the first `SAMPLES` of its training set."""
    x, y = jax.tree.map(lambda v: v[:SAMPLES], (prepared.dataset.train.x, prepared.dataset.train.y))
    return flips.bit_sensitivity(prepared.inst, view, model_state, x, y, loss=config.loss(prepared.experiment))


def robust(
    folder: str | Path, *, rates: Sequence[float] = RATES, percent: float = 10.0, trials: int = 32, quiet: bool = False
) -> dict[str, Any]:
    """Score every stored bit of a run, inject flips on its test set; writes robust/robust.json and pictures, returns the former.

    rates: probability that a bit is inverted.  percent: of the weight bits that are protected, by score and at random.
    trials: draws of flips per rate.  Weights, activations and, where there are any, table entries are flipped.
    Raises: ConfigError for what is no finished run, DataError for rates and percentages that are none, TraceError for a
      model without formats.
    """
    folder, experiment = open_run(folder, "final.npz", "summary.json")
    log = make_log(quiet=quiet)
    with config.importing(experiment.folders):
        prepared, view, state = restored(folder, experiment, log)
        inst, test = prepared.inst, prepared.dataset.test
        with phase(log, "sensitivity"):
            found = sensitivity(prepared, view, state)
        chosen = {
            "no protection": None,
            f"{percent:g} % of the bits, at random": flips.protect(flips.random_scores(found.score), percent),
            f"{percent:g} % of the bits, the most sensitive": flips.protect(found.score, percent),
        }
        common: dict[str, Any] = dict(metric=prepared.metric)
        curves: dict[str, flips.Injection] = {}
        with phase(log, "weights"):
            run = flips.injector(inst, view, state, test.x, test.y, **common)
            curves |= {name: run(rates, trials=trials, protected=mask) for name, mask in chosen.items()}
        tables = inst.tables(view, state)
        for where in ("activations", *(("tables",) if tables else ())):
            with phase(log, where):
                own = view._replace(tables=tables)
                curves[where] = flips.inject(inst, own, state, test.x, test.y, where=where, rates=rates, trials=trials, **common)
    return _written(folder, found, curves, prepared.metric.name, percent)


def _written(
    folder: Path, found: flips.Sensitivity, curves: dict[str, flips.Injection], metric: str, percent: float
) -> dict[str, Any]:
    ranking = flips.rank(found.score)
    rows = zip(ranking.site[:HIGHEST], ranking.element[:HIGHEST], ranking.bit[:HIGHEST], ranking.score[:HIGHEST], strict=True)
    result = {
        "metric": metric,
        "percent": percent,
        "bits": len(ranking.score),
        "curves": {
            name: {"rates": c.levels.tolist(), "mean": c.mean.tolist(), "low": c.quantile(0.1).tolist()}
            | {"high": c.quantile(0.9).tolist(), "clean": c.clean, "bits": c.bits}
            for name, c in curves.items()
        },
        "highest": [
            {"site": ranking.sites[site], "element": int(element), "bit": int(bit), "score": float(score)}
            for site, element, bit, score in rows
        ],
    }
    place = folder / "robust"
    place.mkdir(exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        clean = next(iter(curves.values())).clean
        lines = [plots.FlipCurve(name, c.levels, c.figure) for name, c in curves.items()]
        write_text(place / "flips.svg", plots.flip_rates(lines, clean=clean, metric=metric))
        write_text(place / "bits.svg", plots.bit_map(flips.by_bit(found)))
    write_json(place / "robust.json", result)
    return read_json(place / "robust.json")
