"""Pictures of precision scans: what is drawn and said for grids in any order, with holes, and beside other models."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest

from pquant_jax._errors import DataError
from pquant_jax.report import plots

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<b>"$x^&'
WIDTHS, INTEGERS = (4, 8, 12, 16), (2, 4, 6)


def texts(svg: str) -> list[str]:
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    return ["".join(node.itertext()).strip() for node in root.iter(SVG + "text")]


def colours(svg: str, colour: str) -> int:
    return sum(colour.lower() in (node.get("style") or "").lower() for node in ET.fromstring(svg).iter(SVG + "path"))


def scanned(order=slice(None), name="accuracy", higher=True):
    metric = np.array([[0.2, 0.21, 0.22], [0.3, 0.6, 0.5], [0.31, 0.68, 0.679], [0.32, 0.681, 0.682]])
    metric = metric if higher else 1 / metric
    baseline = {name: 0.69 if higher else 1 / 0.69}
    return SimpleNamespace(
        widths=WIDTHS[order], integers=INTEGERS[order], metric=metric[order, order], values={name: metric[order, order]},
        baseline=baseline, name=name, higher_is_better=higher,
    )  # fmt: skip


def regression():
    found = scanned(name="resolution", higher=False)
    middle = np.array([[0.0, 0.5, 0.6], [0.5, 0.9, 0.9], [0.6, 1.0, 1.0], [0.6, 1.0, 1.0]])
    found.values |= {"response median": middle, "response 25 %": middle - 0.1, "response 75 %": middle + 0.12}
    found.baseline |= {"response median": 1.01, "response 25 %": 0.9, "response 75 %": 1.1}
    return found


def test_the_map_has_every_value_and_outlines_what_is_good_enough():
    svg = plots.scan_map(scanned(), drop=0.02, unit="a.u.")
    shown = texts(svg)
    for value in ("0.200", "0.681", "0.682", "4", "16", "2", "6", "total width W [bits]", "accuracy [a.u.]"):
        assert value in shown
    assert any(t.startswith("Accuracy [a.u.] of ap_fixed<W,I>; float 0.69") for t in shown)
    assert "outlined: at most 0.02 a.u. worse than float" in shown
    assert colours(svg, "#D55E00") == 8, "the 2 x 2 good cells have 8 edges outside"
    assert not any("outlined" in t for t in texts(plots.scan_map(scanned())))


@pytest.mark.parametrize("draw", [plots.scan_map, plots.scan_lines])
def test_the_order_of_the_axes_changes_nothing(draw):
    assert draw(scanned()) == draw(scanned(slice(None, None, -1)))


def test_values_that_are_none_and_errors_out_of_all_proportion_are_drawn():
    found = scanned(name="resolution", higher=False)
    found.metric[0] = np.inf, np.nan, 12345.678
    shown = texts(plots.scan_map(found))
    assert shown.count("–") == 2 and "1e4" in shown
    assert "I = 4 (best)" in [" ".join(t.split()) for t in texts(plots.scan_lines(found, log=True))]
    found.metric[:] = np.nan
    assert "–" in texts(plots.scan_map(found)) and plots.scan_lines(found)


def test_the_lines_name_the_best_integer_bits_and_show_other_models():
    svg = plots.scan_lines(scanned(), compared={HOSTILE: [(8, 4, 0.65), (4, 4, 0.5)], "empty": []}, unit="%")
    shown = [" ".join(t.split()) for t in texts(svg)]
    assert "I = 4 (best)" in shown and "I = 2" in shown and "float, 0.69 %" in shown and HOSTILE in shown
    assert "empty" not in shown and "QAT" in texts(plots.scan_lines(scanned(), compared=[(8, 4, 0.65)]))
    with pytest.raises(DataError, match=r"points of 'QAT' have shape \(1, 2\), expected \(width, integer bits, value\)"):
        plots.scan_lines(scanned(), compared=[(8, 0.65)])


def test_the_response_has_its_band_and_both_resolutions():
    shown = texts(plots.scan_response(regression(), quantity="mass / true mass"))
    assert "Response of ap_fixed<W,4>" in shown and "response, mass / true mass" in shown
    assert "float, 9.9 %" in shown and "IQR / (2 median) [%]" in shown
    assert "Response of ap_fixed<W,2>" in texts(plots.scan_response(regression(), integer=2)), "a median of 0 has no resolution"
    broken = regression()
    broken.values["response median"] = broken.values["response median"] * np.nan
    assert texts(plots.scan_response(broken)) == ["no response: every truth is 0, or a prediction is not finite"]
    with pytest.raises(DataError, match=r"I = 3 was not scanned, expected one of \[2, 4, 6\]"):
        plots.scan_response(regression(), integer=3)
    with pytest.raises(DataError, match=r"no metric 'response 25 %'; scan with metric=pq.search.RESPONSE"):
        plots.scan_response(scanned())


def test_axes_of_a_groups_own_have_to_be_chosen():
    found = scanned()
    found.metric = found.metric[..., None]
    for draw in (plots.scan_map, plots.scan_lines):
        with pytest.raises(DataError, match=r"shape \(4, 3, 1\), expected \(4, 3\): choose one index"):
            draw(found)


def test_layers_and_differences():
    found = SimpleNamespace(names=["a", HOSTILE], drop=np.array([0.5, -0.01]), name="accuracy", low=(6, None))
    shown = texts(plots.scan_layers(found))
    assert HOSTILE in shown and "-0.01" in shown and "Sensitivity: one at a time with 6 bits, I from its range" in shown
    narrow, even = (SimpleNamespace(**{**vars(found), **change}) for change in ({"low": (6, 2)}, {"drop": np.zeros(2)}))
    assert "Sensitivity: one at a time with ap_fixed<6,2>" in texts(plots.scan_layers(narrow)) and plots.scan_layers(even)
    sites = [SimpleNamespace(name=n, kind="input", largest=v, rms=v / 3, size=1.0) for n, v in (("a/input", 0.1), ("b", 0.0))]
    shown = texts(plots.scan_differences(sites, title=HOSTILE))
    assert "a/input" in shown and "b" not in shown and HOSTILE in shown and "10⁻¹" in shown
    assert texts(plots.scan_differences(sites[1:])) == ["fixed and float agree at every site"]
