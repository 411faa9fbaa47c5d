"""report.html of a run, from the files in its directory alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from pquant_jax.lower.pipeline import Pipelined
from pquant_jax.report import html, load_profiles, plots
from pquant_jax.run._files import open_run, read_json, read_records


def write_report(folder: str | Path, summary: dict[str, Any] | None = None) -> Path:
    """Draw the report of a run (again) and return its path.  summary: default what summary.json holds.

    Without matplotlib the page has no pictures.
    Raises: ConfigError for a directory that is no run, or one whose training has not ended.
    """
    folder, _ = open_run(folder, "final.npz", *(() if summary is not None else ("summary.json",)))
    found = read_json(folder / "summary.json") if summary is None else summary
    metrics = read_records(folder / "metrics.jsonl")
    profiles = load_profiles(folder / "profiles.npz") if (folder / "profiles.npz").is_file() else []
    figures: dict[str, str] = {}
    if importlib.util.find_spec("matplotlib") is not None:
        figures = plots.standard(metrics, profiles, metric=str(found["metric"])) | _predictions(folder) | _hardware(found)
    html.write(
        folder / "report.html",
        summary=found,
        metrics=metrics,
        profiles=profiles,
        figures=figures,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    return folder / "report.html"


def _hardware(summary: dict[str, Any]) -> dict[str, str]:
    """Where the logic is, and what another clock would give; nothing for a run that isn't lowered."""
    made = {}
    rows, counted = (summary.get(key) or [] for key in ("layer_cost", "layer_cells"))
    if max(len(rows), len(counted)) > 1:
        made["layer_cost"] = plots.layer_cost(rows, counted)
    if summary.get("pipelines"):
        rows = {name: [Pipelined(**row) for row in cuts] for name, cuts in summary["pipelines"].items()}
        made["cutoff_sweep"] = plots.cutoff_sweep(rows)
    return made


def _predictions(folder: Path) -> dict[str, str]:
    """Confusion matrix and ROC curves, or the residuals of a regression; nothing for several outputs."""
    with np.load(folder / "test.npz") as file:
        arrays = {name: file[name] for name in file.files}
    if set(arrays) != {"prediction", "target"}:
        return {}
    predicted, target = arrays["prediction"], arrays["target"]
    classes = read_json(folder / "dataset.json")["classes"]
    if not classes:
        return {"regression": plots.regression(predicted, target)} if predicted.size == target.size else {}
    if predicted.shape != (len(target), len(classes)):
        return {}
    matrix = np.zeros((len(classes),) * 2, np.int64)
    np.add.at(matrix, (target, predicted.argmax(-1)), 1)
    return {"confusion": plots.confusion(matrix, classes), "roc": plots.roc(_softmax(predicted), target, classes)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
