"""PQuantML's FITCompress, piece by piece and whole searches (golden/pquantml.json)."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.search import _fitcompress, _problem, _walk

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pquantml.json").read_text())["fitcompress"]
PIECES, SEARCHES = GOLDEN["pieces"], GOLDEN["searches"]
PATHS = ("first", "second")
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-7)


def tree(layers: list[Any]) -> dict[str, np.ndarray]:
    """Theirs has (out, in)."""
    return {path: np.float32(w).T for path, w in zip(PATHS, layers, strict=True)}


def forward(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["first"]) @ params["second"]


def setting(given: dict[str, Any]) -> tuple[pq.Instrumented, Any, Any]:
    """(instrumented network, weights, data); the port is so fine that it rounds nothing."""
    x, y = np.float32(given["x"]), np.int32(given["y"])
    weights = {path: jnp.asarray(w) for path, w in tree(given["weights"]).items()}
    model = pq.from_function(forward, weights)
    inst = pq.instrument(model, x, inputs=pq.InputSpec(k=1, i=7, f=24))
    return inst, weights, SimpleNamespace(x=x, y=y, weight=None)


def task_of(given: dict[str, Any], goal: float, compat: str | None = "pquantml") -> tuple[_walk.Task, _walk.Point]:
    inst, weights, data = setting(given)
    p = _problem.problem(inst, weights, data, pq.train.cross_entropy, None, 100, 100)
    chosen = {path: np.asarray(w) for path, w in weights.items()}
    task = _walk.Task(
        _fitcompress._informed(p, compat),
        lambda path, w, width: _fitcompress._quantized(inst.sites[path], w, width, None, compat),
        _fitcompress._of_weights(chosen, goal, compat),
        _walk.Steps((8, 7, 6, 5, 4), (0.4,), True, True, 1.0),
        compat,
    )
    return task, _walk.start(task, chosen, None)


def test_the_fisher_information_of_a_batch():
    task, start = task_of(PIECES, PIECES["compression_goal"])
    found = task.information(start.weights)
    for path, expected in tree(PIECES["FeM"]).items():
        np.testing.assert_allclose(found[path], expected, **CLOSE)
    assert _walk.fit(found, start.weights) == pytest.approx(PIECES["FIT_of_itself"], rel=1e-5)
    for path, expected in tree(PIECES["importance"]).items():
        np.testing.assert_allclose(found[path] * np.square(start.weights[path]), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["quantized", "pruned"])
def test_the_distances_of_a_neighbour(kind):
    task, start = task_of(PIECES, PIECES["compression_goal"])
    here = start._replace(information=task.information(start.weights))
    expected = PIECES["costs"][kind]
    widths = {path: b + 1 for path, b in zip(PATHS, expected["bits"], strict=True)}
    if kind == "quantized":
        pairs = {path: task.quantized(path, w, widths[path]) for path, w in start.latent.items()}
        weights, masks = {path: values for path, (_, values) in pairs.items()}, start.masks
        assert [int(pairs[path][0].i) for path in PATHS] == PIECES["integer_bits"]
        assert [int(pairs[path][0].f) for path in PATHS] == PIECES["fractional_bits"]
    else:
        masks = _walk._pruned(task, here, PIECES["pruned_part"])
        weights = {path: w * masks[path] for path, w in start.weights.items()}
    for path, values in tree(expected["params"]).items():
        np.testing.assert_array_equal(weights[path], values)
    there = here._replace(weights=weights, masks=masks, information=None, node=start.node._replace(widths=widths))
    found = _walk._arrived(task, here, 0, there)
    moved = {path: start.weights[path] - w for path, w in weights.items()}
    assert _walk.fit(here.information or {}, moved) == pytest.approx(expected["FIT"], rel=1e-5)
    node = found.node
    assert (node.g, node.h, node.ratio) == pytest.approx((expected["g"], expected["f"], expected["rate"]), rel=1e-5)
    assert node.g + node.h == pytest.approx(expected["distance"], rel=1e-5)


@pytest.mark.parametrize("given", SEARCHES, ids=["both", "bits", "pruning", "whole A*"])
def test_a_whole_search(given, monkeypatch):
    settings = given["parameters"]
    inst, weights, data = setting(given)
    steps = settings["pruning_schedule"]
    sparsities = (1 - np.logspace(steps["start"], steps["end"], steps["steps"]))[1:]
    opened: list[_walk.Node] = []
    neighbours = _walk._neighbours

    def followed(task: _walk.Task, point: _walk.Point) -> list[_walk.Point]:
        opened.append(point.node)
        return neighbours(task, point)

    monkeypatch.setattr(_walk, "_neighbours", followed)
    found = pq.search.fitcompress(
        inst, weights, data, ratio=settings["compression_goal"],
        widths=[b + 1 for b in settings["quantization_schedule"]] if settings["optimize_quantization"] else [],
        sparsities=list(sparsities) if settings["optimize_pruning"] else [],
        greedy=settings["greedy_astar"], approximate=settings["approximate"], strength=settings["f_lambda"],
        compat="pquantml",
    )  # fmt: skip
    assert len(opened) == len(given["path"])
    for node, expected in zip(opened, given["path"], strict=True):
        assert [node.widths[path] - 1 for path in PATHS] == expected["bits"]
        assert (node.g, node.ratio) == pytest.approx((expected["g"], expected["rate"]), rel=1e-5)
        if expected["f"] is not None:
            assert node.h == pytest.approx(expected["f"], rel=1e-5)
    last = found.path[-1]
    assert [last.widths[path] - 1 for path in PATHS] == given["found"]["bits"]
    assert (last.g, last.h, last.ratio) == pytest.approx(tuple(given["found"][k] for k in ("g", "f", "rate")), rel=1e-5)
    for path, mask in tree(given["found"]["masks"]).items():
        np.testing.assert_array_equal(found.masks[path], mask)
    if settings["optimize_quantization"]:
        formats = dict(found.rules)
        assert [[formats[path].i, formats[path].f] for path in PATHS] == list(given["found"]["quant_config"].values())
