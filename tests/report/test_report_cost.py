"""Pictures of a sweep of the latency cutoff and of the cells of every layer."""

from __future__ import annotations

import re
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from pquant_jax._errors import DataError
from pquant_jax.report import plots


class Row(NamedTuple):
    cutoff: float
    stages: int
    reg_bits: int
    cost: float
    latency_ns: float


ROWS = [Row(2, 12, 9000, 4200.0, 26.0), Row(5, 5, 2500, 4200.0, 30.0), Row(10, 3, 900, 4200.0, 40.0)]
CELLS = [
    {"layer": "Dense_0", "lut": 900.4, "ff": 120.0, "carry": 200.0, "dsp": 0.0, "cost": 1000.0},
    {"layer": "Dense_1", "lut": 99.6, "ff": 80.0, "carry": 20.0, "dsp": 0.0, "cost": 120.0},
    {"layer": "total", "lut": 1000.0, "ff": 200.0, "carry": 220.0, "dsp": 0.0, "cost": 1120.0},
]


def words(svg: str) -> list[str]:
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    return re.findall(r">([^<>]+)</text>", svg)


def test_a_sweep_names_its_backends_and_its_stages():
    svg = plots.cutoff_sweep({"da4ml": ROWS, "alkaid": [r._replace(stages=r.stages + 20) for r in ROWS]}, unit="adders")
    text = words(svg)
    assert {"da4ml, 4,200 LUTs", "alkaid, 4,200 LUTs", "12", "32", "23"} <= set(text)
    assert "longest path between registers [adders]" in text
    assert svg == plots.cutoff_sweep({"da4ml": ROWS, "alkaid": [r._replace(stages=r.stages + 20) for r in ROWS]}, unit="adders")


def test_layers_have_their_cells_and_what_is_not_used_is_left_out():
    text = words(plots.layer_cost(CELLS))
    assert {"Dense_0", "Dense_1", "LUT: 1,000", "FF: 200", "CARRY: 220"} <= set(text)
    assert {" 900", " 100", " 120"} <= set(text) and not any("DSP" in word for word in text)


COUNTED = [
    {"layer": "Dense_0", "lut": 870, "ff": 150, "carry": 190, "dsp": 0},
    {"layer": "Dense_2", "lut": 7, "ff": 90, "carry": 0, "dsp": 1},
    {"layer": "total", "lut": 860, "ff": 210, "carry": 185, "dsp": 1},
]


def test_the_estimate_stands_beside_the_count():
    text = words(plots.layer_cost(CELLS, COUNTED))
    assert {"Dense_0", "Dense_1", "Dense_2", "LUT: 1,000 / 860", "FF: 200 / 210", "DSP: 0 / 1", "estimate", "Yosys"} <= set(text)
    assert {" 900", " 870", " 7"} <= set(text)
    alone = words(plots.layer_cost([], COUNTED))
    assert "LUT: 860" in alone and "Dense_1" not in alone and "Yosys" not in alone


def test_nothing_to_show_is_an_error():
    with pytest.raises(DataError, match="no row for alkaid"):
        plots.cutoff_sweep({"da4ml": ROWS, "alkaid": []})
    with pytest.raises(DataError, match="no row for anything"):
        plots.cutoff_sweep({})
    with pytest.raises(DataError, match="got 1 rows"):
        plots.layer_cost(CELLS[-1:])
    with pytest.raises(DataError, match="got 0 rows"):
        plots.layer_cost([])
