"""A precision scan of a run's uncompressed model: what post-training quantization would have given."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pquant_jax import config, search, train
from pquant_jax._errors import ConfigError, SearchError
from pquant_jax.report import plots
from pquant_jax.run._files import open_run, read_json, write_json, write_text
from pquant_jax.run._prepare import batch_of, check_same_data, prepare_data
from pquant_jax.search._scan import INTEGERS, WIDTHS


def scan(
    folder: str | Path, *, widths: Iterable[int] = WIDTHS, integers: Iterable[int] = INTEGERS, drop: float = 0.01
) -> dict[str, Any]:
    """Scan float.npz of a run over ap_fixed<W, I> on its test set; writes scan/scan.json and pictures, returns scan.json.

    widths, integers: W and I, bits, sign included.  drop: how much worse than float the chosen point may be, in units of the
    run's metric.  A regression of one output is scanned by its response as well.
    Raises: ConfigError for a run without float.npz, DataError if its data have changed, and what `pq.scan` raises.
    """
    folder, experiment = open_run(folder)
    if not (folder / "float.npz").is_file():
        raise ConfigError(f"{folder} has no float.npz: the run is not that far, or has training.float_baseline=false")
    with config.importing(experiment.folders):
        dataset = prepare_data(experiment)
        check_same_data(dataset, folder)
        x = batch_of(dataset.train.x, 2)
        known = read_json(folder / "dataset.json")
        model = config.model(experiment, jax.tree.map(np.zeros_like, x), known["outputs"], trained=False)
        inst = config.instrumented(experiment, model, x)
        view, state = train.load_final(folder / "float.npz", inst)
        metrics = [config.metric(experiment)]
        response = experiment.task == "regression" and known["outputs"] == 1
        metrics += search.RESPONSE if response else ()
        common: dict[str, Any] = dict(model_state=state, metric=metrics)
        found = search.scan(inst, view.model, dataset.test, widths=widths, integers=integers, **common)
        ranking = search.sensitivity(inst, view.model, dataset.test, low=min(found.widths), **common)
    result = _result(found, ranking, drop)
    (folder / "scan").mkdir(exist_ok=True)
    if importlib.util.find_spec("matplotlib") is not None:
        figures = {
            "map": plots.scan_map(found, drop=drop),
            "lines": plots.scan_lines(found),
            "layers": plots.scan_layers(ranking),
        }
        figures |= {"response": plots.scan_response(found)} if response else {}
        for name, svg in figures.items():
            write_text(folder / "scan" / f"{name}.svg", svg)
    write_json(folder / "scan" / "scan.json", result)
    return read_json(folder / "scan" / "scan.json")


def _result(found: search.Scanned, ranking: search.Sensitivity, drop: float) -> dict[str, Any]:
    try:
        point = search.chosen(found, drop)
        chosen: dict[str, Any] | None = {"width": point.width, "integer": point.integer, "value": point.value}
    except SearchError:
        chosen = None
    return {
        "metric": found.name,
        "widths": found.widths,
        "integers": found.integers,
        "values": {name: v.tolist() for name, v in found.values.items()},
        "baseline": found.baseline,
        "drop": drop,
        "chosen": chosen,
        "sensitivity": {"width": ranking.low[0], "drop": dict(zip(ranking.names, ranking.drop.tolist(), strict=True))},
        "samples": found.samples,
    }
