"""The page: complete, escaped, self-contained, and the same for the same run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pquant_jax._errors import DataError
from pquant_jax.report import html, plots

VOID = {"meta", "br", "hr", "img"}
SUMMARY = {
    "name": "jets 16-64-32-32-5",
    "accuracy": {"float": 0.6831, "compressed": 0.6795, "emulated": 0.6794},
    "ebops": {"reference8": 272384, "final": 7931.0},
    "sparsity": 0.714,
    "mismatches": {"emulator": 0, "da4ml": 0, "rtl_comb": 0, "rtl_pipelined": None},
    "vectors": 20000,
    "cost": {"da4ml": 5123.0, "latency_cycles": 9, "ii": 1, "lut": 6021, "ff": 2310, "dsp": 0, "carry": 811},
    "params": {"total": 4389, "nonzero": 1254},
    "bops": 61234,
    "seeds": {"run": 7},
    "versions": {"jax": "0.10.2"},
    "seconds": {"train": 93.2, "lower": 3.25},
    "skipped": {"hls4ml": "not asked for"},
    "layers": {"Dense_0/kernel": {"ebops": 3120.0}, "Dense_1/kernel": 2900},
    "kernels": {
        "Dense_0/kernel": {
            "zeros": 704,
            "total": 1024,
            "bits": 901,
            "dead_rows": 2,
            "rows": 16,
            "dead_columns": 31,
            "columns": 64,
        },
        "Dense_1/kernel": {"zeros": 0, "total": 8, "bits": None, "dead_rows": 0, "rows": 4, "dead_columns": 0, "columns": 2},
    },
    "channels": {"total": 133, "dead": 40},
    "layer_cost": [
        {"layer": "Dense_0", "lut": 5400.6, "ff": 1200.0, "carry": 700.0, "dsp": 0.0, "cost": 5000.0},
        {"layer": "total", "lut": 6100.0, "ff": 2300.0, "carry": 790.0, "dsp": 0.0, "cost": 5123.0},
    ],
    "layer_cells": [
        {"layer": "Dense_0", "lut": 5555, "ff": 1300, "carry": 705, "dsp": 0},
        {"layer": "Dense_1", "lut": 666, "ff": 1400, "carry": 106, "dsp": 0},
        {"layer": "total", "lut": 6021, "ff": 2310, "carry": 811, "dsp": 0},
    ],
}


class Page(HTMLParser):
    """Balanced tags, ids, attributes and visible text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.attributes, self.text, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page(tmp_path, summary=SUMMARY, metrics=(), profiles=(), figures=None, config_text="epochs: 3"):
    path = tmp_path / "report.html"
    html.write(path, summary=summary, metrics=metrics, profiles=profiles, figures=figures or {}, config_text=config_text)
    assert list(tmp_path.iterdir()) == [path]
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def figures(metrics, profiles):
    labels = np.arange(60) % 3
    scores = np.random.default_rng(0).random((60, 3)) + np.eye(3)[labels]
    extra = {"confusion": plots.confusion(np.eye(3), "abc"), "roc": plots.roc(scores, labels, "abc")}
    return plots.standard(metrics, profiles) | extra


def test_headline_numbers_are_on_the_page(tmp_path, metrics, profiles, figures):
    words = page(tmp_path, metrics=metrics, profiles=profiles, figures=figures).words
    for text in (
        *("jets 16-64-32-32-5", "68.31 %", "67.95 %", "67.94 %", "7,931", "34.3 times fewer than 8 bit (272,384)", "71.4 %"),
        *("1,254 of 4,389 parameters left", "6,021", "FF 2,310, DSP 0, carry 811", "9 cycles", "a new input every cycle"),
        *("5,123", "61,234", "bit-identical: 0 of 20,000 differ (emulator, da4ml, combinational RTL)", "1 min 33 s", "3.25 s"),
        *("100 epochs (20 pretrain, 60 train, 20 finetune)", "not asked for", "0.10.2", "epochs: 3", "3,120", "2,900"),
    ):
        assert text in words


def test_each_profile_has_a_row_with_its_numbers(tmp_path, profiles):
    words = page(tmp_path, profiles=profiles).words
    kernel = profiles[1]
    density = f"{100 * np.mean(kernel.values != 0):.1f} %"
    widths = np.where(kernel.values != 0, 1 + kernel.f, 0)
    assert f"Dense_0/kernel 16 × 64 kernel {density} {widths.mean():.2f} 0..{widths.max()} 3,120" in words
    assert all(p.name in words for p in profiles)


def test_each_kernel_has_a_row_of_what_pruning_left(tmp_path):
    words = page(tmp_path).words
    assert "Dense_0/kernel 1,024 704 68.8 % 901 2 of 16 31 of 64" in words
    assert "Dense_1/kernel 8 0 0.0 % – 0 of 4 0 of 2" in words
    assert "40 of 133 channels are not in the netlist" in words
    assert "not in the netlist" not in page(tmp_path, {k: v for k, v in SUMMARY.items() if k != "channels"}).words


@pytest.mark.parametrize(
    ("mismatches", "skipped", "css", "text"),
    [
        ({"emulator": 0, "da4ml": 0}, {}, "good", "bit-identical: 0 of 20,000 differ (emulator, da4ml)"),
        (
            {"emulator": 0, "da4ml": 3, "rtl_comb": 20000},
            {},
            "bad",
            "not bit-identical: da4ml 3 of 20,000 differ; combinational RTL 20,000",
        ),
        ({"emulator": None}, {"lower": "tanh has no <table>"}, "none", "not lowered: tanh has no <table>"),
        (None, {"rtl": "no g++"}, "none", "not lowered: rtl: no g++"),
        ({}, None, "none", "not lowered: no comparison was made"),
    ],
)
def test_the_badge_tells_the_truth(tmp_path, mismatches, skipped, css, text):
    found = page(tmp_path, SUMMARY | {"mismatches": mismatches, "skipped": skipped})
    assert text in found.words and ("class", f"badge {css}") in found.attributes


@pytest.mark.parametrize(
    "summary", [{}, {key: None for key in SUMMARY}, {"accuracy": {"float": float("nan")}, "ebops": {"final": 0.0}}]
)
def test_anything_may_be_missing(tmp_path, summary):
    found = page(tmp_path, summary, metrics=[{"epoch": 0}], config_text="")
    assert "not lowered" in found.words and "–" in found.words and "nan" not in found.words.lower()


def test_a_metric_that_is_no_accuracy_is_not_a_percentage(tmp_path):
    words = page(tmp_path, {"metric": "mae", "mae": {"float": 0.0123456, "emulated": 1234.5}}).words
    assert "mae 0.01235 float" in words and "mae 1,234.5 bit-exact emulation" in words


def test_hostile_text_is_escaped_everywhere(tmp_path, profiles):
    bad = '</style></pre><script>alert("1")</script>&amp;'
    summary = {
        "name": bad,
        "metric": bad,
        bad: {"float": 1.0},
        "skipped": {bad: bad},
        "seeds": {bad: bad},
        "versions": {bad: bad},
    }
    summary |= {"vectors": bad, "mismatches": {bad: 1}, "seconds": {bad: 1.0}, "cost": {"lut": bad, "ii": bad}}
    summary["kernels"] = {bad: SUMMARY["kernels"]["Dense_0/kernel"] | {"bits": bad}}
    odd = profiles[1]._replace(name=bad)
    figures = {bad: plots.kernel_bits(odd), f"kernel_bits:{bad}": plots.ranges([odd])}
    found = page(tmp_path, summary, [{"epoch": 0, "stage": bad, "seconds": 1.0}], [odd], figures, bad)
    assert "script" not in found.tags and found.tags.count("style") == 1 + len(figures)
    assert bad in found.words


def test_the_page_is_self_contained_with_unique_ids(tmp_path, metrics, profiles, figures):
    found = page(tmp_path, metrics=metrics, profiles=profiles, figures=figures)
    assert not {"script", "link", "iframe", "img"} & set(found.tags)
    assert len(found.ids) == len(set(found.ids)) > 100
    for key, value in found.attributes:
        if key in ("href", "src", "xlink:href"):
            assert value.startswith(("#f", "data:image/png"))
            assert value.startswith("data:") or value[1:] in found.ids
        elif not key.startswith("xmlns"):
            assert "http" not in (value or "") and "//" not in (value or "")
        for reference in re.findall(r"url\(#([^)]*)\)", value or ""):
            assert reference in found.ids


def test_pictures_come_in_order_each_with_its_caption(tmp_path, figures):
    backwards = {"mine": figures["history"]} | dict(reversed(figures.items()))
    words = page(tmp_path, figures=backwards).words
    places = [words.index(html.CAPTIONS[key]) for key in ("history", "ranges", "bit_widths", "confusion", "roc", "kernel_bits")]
    assert places == sorted(places)
    assert words.count(html.CAPTIONS["kernel_bits"]) == 1 and "mine" in words


def test_the_same_run_gives_the_same_page(tmp_path, metrics, profiles, figures):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        page(tmp_path / name, metrics=metrics, profiles=profiles, figures=figures)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()


def test_a_figure_that_is_no_svg_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(DataError, match="figure 'x' is no SVG: it starts with '<script>'"):
        html.write(tmp_path / "r.html", summary={}, metrics=[], profiles=[], figures={"x": "<script>"}, config_text="")
    assert not list(tmp_path.iterdir())


def test_cells_of_every_layer_before_and_after_synthesis(tmp_path):
    page(tmp_path)
    text = (tmp_path / "report.html").read_text()
    rows = re.search(r"<h2>Cells by layer</h2><table>(.*?)</table>", text)[1]
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", rows)]
    assert cells[0][:4] == ["layer", "LUT, estimate", "LUT, Yosys", "FF, estimate"]
    assert [row[:4] for row in cells[1:]] == [
        ["Dense_0", "5,401", "5,555", "1,200"],
        ["Dense_1", html.ABSENT, "666", html.ABSENT],
        ["<b>whole netlist</b>", "6,100", "6,021", "2,300"],
    ]
    assert "flip-flops between two layers are counted twice" in text
