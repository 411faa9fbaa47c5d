"""Every picture: its structure, its numbers, its behaviour on odd input, and that it is one text for one input."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from pquant_jax._errors import DataError, ToolError
from pquant_jax.numerics import oracle
from pquant_jax.report import Profile, bits, load_profiles, plots, save_profiles

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("1")</script>$x^{_&\x00/kernel'


def parsed(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.tag == SVG + "svg" and root.get("role") == "img" and root.get("aria-label")
    return root


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in parsed(svg).iter(SVG + "text")]


def shades(svg: str) -> list[str]:
    ids = [node.get("id", "") for node in parsed(svg).iter(SVG + "g")]
    return [name.split("-")[1] for name in ids if name.startswith("stage-")]


def site(name="a/input", kind="input", k=1, i=2, f=3, low=-1.0, high=1.0, quantiles=(0, 0.1, 0.2, 0.5, 1), values=None):
    k, i, f = (np.asarray(v, np.int32) for v in (k, i, f))
    return Profile(name, kind, k, i, f, low, high, np.array(quantiles, float), values)


def test_history_shades_three_stages_in_four_panels(metrics):
    svg = plots.history(metrics)
    assert shades(svg) == ["pretrain", "train", "finetune"] * 4
    shown = texts(svg)
    for word in ("Loss", "Validation accuracy", "Sparsity", "EBOPs", "training", "validation", "pretrain", "finetune"):
        assert word in shown
    assert "100k" in shown and "10k" in shown  # the axis of EBOPs is logarithmic and says so without mathtext


@pytest.mark.parametrize(
    ("plan", "ebops", "panels", "stages"),
    [
        ((("train", 1),), True, 4, ["train"]),
        ((("pretrain", 1),), False, 3, ["pretrain"]),
        ((("pretrain", 3), ("train", 0), ("finetune", 4)), False, 3, ["pretrain", "finetune"]),
        ((("pretrain", 2), ("train", 2), ("pretrain", 1), ("train", 2)), True, 4, ["pretrain", "train", "pretrain", "train"]),
    ],
)
def test_history_of_odd_plans(make_metrics, plan, ebops, panels, stages):
    svg = plots.history(make_metrics(plan, ebops), metric="AUC")
    assert shades(svg) == stages * panels
    assert ("EBOPs" in texts(svg)) == ebops and "Validation AUC" in texts(svg)


def test_history_takes_missing_none_nan_and_zero():
    rows = [{"epoch": 0}, {"epoch": 1, "loss": None, "ebops": 0.0}, {"epoch": 2, "loss": float("nan"), "val_loss": 1.0}]
    shown = texts(plots.history(rows))
    assert "Loss" in shown and "EBOPs" not in shown and "Sparsity" not in shown
    assert texts(plots.history([])) == ["no epoch was recorded"] == texts(plots.history([{"epoch": 0, "stage": "train"}]))


def test_every_profile_is_named_in_ranges_and_layers_in_widths(profiles):
    shown = texts(plots.ranges(profiles))
    assert all(p.name in shown for p in profiles) and {"Weights", "Activations"} <= set(shown)
    shown = texts(plots.bit_widths(profiles))
    assert {"Dense_0", "Dense_1", "Dense_2", "Dense_3", "activation", "kernel", "bias"} <= set(shown)
    kernel = profiles[1]
    assert f"{bits(kernel).mean():.1f}" in shown and f"{np.mean(kernel.values == 0):.0%}" in shown


def test_ranges_flag_exactly_the_sites_that_leave_their_range(profiles):
    out = {p.name: plots.out_of_range(p) for p in profiles}
    assert out["Dense_2/input"] > 0.5 and out["Dense_0/input"] == 0  # 2 integer bits are too few for the former
    notes = [text for text in texts(plots.ranges(profiles)) if text.endswith(" out")]
    assert len(notes) == sum(value > 0 for value in out.values())


def test_out_of_range_is_what_saturation_changes():
    rng = np.random.default_rng(0)
    k, i, f = rng.integers(0, 2, 3000), rng.integers(-3, 5, 3000), rng.integers(-2, 6, 3000)
    value = rng.normal(size=3000) * 2.0**i
    alive = k + i + f > 0
    free = oracle.quantize(value, 1, i + 8, f)  # so wide that nothing saturates
    clipped = (oracle.quantize(value, k, i, f) != free) & alive
    for index in range(0, 3000, 7):
        p = site(k=k[index], i=i[index], f=f[index], low=value[index], high=value[index])
        assert plots.out_of_range(p) == clipped[index]
    whole = site(k=k, i=i, f=f, low=value, high=value)
    np.testing.assert_allclose(plots.out_of_range(whole), clipped[alive].mean())


def test_bits_are_zero_for_dead_formats_and_zero_weights():
    p = site(kind="kernel", k=[1, 1, 0, 1], i=[0, -3, 2, 0], f=[3, 1, 1, 3], values=np.array([0.5, 0.5, 0.5, 0.0]))
    np.testing.assert_array_equal(bits(p), [4, 0, 3, 0])
    np.testing.assert_array_equal(bits(p._replace(values=None)), [4, 0, 3, 4])


def test_kernel_bits_shows_pruned_weights_as_their_own_entry(profiles):
    svg = plots.kernel_bits(profiles[1])
    share = np.mean(profiles[1].values == 0)
    assert {"Dense_0/kernel", f"{share:.0%} pruned", "0, pruned"} <= set(texts(svg))


@pytest.mark.parametrize("shape", [(), (7,), (3, 3, 4, 8), (1, 1), (40, 2)])
def test_kernel_bits_takes_every_shape(shape):
    values = np.ones(shape)
    assert "input" in texts(plots.kernel_bits(site("c/kernel", "kernel", values=values)))
    dead = site("c/kernel", "kernel", values=0 * values)
    assert {"c/kernel", "100% pruned"} <= set(texts(plots.kernel_bits(dead)))


@pytest.mark.parametrize("draw", [plots.ranges, plots.bit_widths, lambda p: plots.kernel_bits(p[0])])
def test_hostile_names_stay_text(draw):
    svg = draw([site(HOSTILE, "kernel", values=np.ones((2, 3)))])
    assert "<script" not in svg and any("script" in text for text in texts(svg))


def test_long_names_keep_what_tells_them_apart():
    names = [f"TransformerEncoder_0/Block_{b}/MultiHeadDotProductAttention_0/{q}/kernel" for b in (0, 1) for q in ("key", "out")]
    shown = texts(plots.ranges([site(name, "kernel", values=np.ones(2)) for name in names]))
    assert len({text for text in shown if text.endswith("/kernel")}) == 4


def test_a_site_without_bits_and_no_site_at_all():
    dead = site("a/kernel", "kernel", k=1, i=-3, f=1, quantiles=np.zeros(5), low=0, high=0, values=np.zeros(3))
    assert "0 bits" in texts(plots.ranges([dead]))
    assert texts(plots.ranges([])) == texts(plots.bit_widths([])) == ["no site was profiled"]
    with pytest.raises(DataError, match="'a/input' has the kind 'gate', expected one of"):
        plots.ranges([site(kind="gate")])


def test_confusion_writes_row_percentages():
    shown = texts(plots.confusion(np.array([[3, 1], [0, 0]]), ["sig", "bkg"]))
    assert {"75.0", "25.0", "0.0", "sig", "bkg", "predicted", "true"} <= set(shown)
    assert "75.0" not in texts(plots.confusion(np.diag([3] * 20), [str(c) for c in range(20)]))
    with pytest.raises(DataError, match=r"matrix has shape \(2, 2\), expected \(3, 3\)"):
        plots.confusion(np.eye(2), ["a", "b", "c"])


def test_roc_curve_is_the_rank_statistic_with_ties():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 9, 300), rng.random(300) < 0.3
    difference = score[positive][:, None] - score[~positive]
    false, true, area = plots.roc_curve(score, positive)
    np.testing.assert_allclose(area, (difference > 0).mean() + 0.5 * (difference == 0).mean(), rtol=1e-12)
    assert len(false) == 10 and false[0] == true[0] == 0 and false[-1] == true[-1] == 1
    assert np.isnan(plots.roc_curve(score, np.ones(300, bool))[2])


@pytest.mark.parametrize("log_x", [False, True])
def test_roc_names_each_class_with_its_area(log_x):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    scores = rng.random((3000, 3)) + np.eye(3)[labels]
    svg = plots.roc(scores, labels, ["g", "q", "absent"], log_x=log_x)
    area = plots.roc_curve(scores[:, 0], labels == 0)[2]
    shown = texts(svg)
    assert any(text.startswith("g") and f"AUC {area:.4f}" in text for text in shown)
    assert not any("absent" in text for text in shown) and len(svg) < 80_000
    with pytest.raises(DataError, match=r"scores have shape \(3000, 3\), expected \(3000, 2\)"):
        plots.roc(scores, labels, ["g", "q"])


def test_regression_states_mean_and_deviation():
    target = np.linspace(-1, 1, 400)
    residual = np.where(np.arange(400) % 2, 0.25, -0.15)
    predicted = np.append(target + residual, np.nan)
    shown = " ".join(texts(plots.regression(predicted, np.append(target, 0.0))))
    assert "mean 0.05" in shown and "std 0.2" in shown
    assert texts(plots.regression(np.array([np.nan]), np.zeros(1))) == ["no finite prediction"]
    assert "Residuals" in texts(plots.regression(np.ones(3), np.ones(3)))
    with pytest.raises(DataError, match="2 predictions for 3 targets"):
        plots.regression(np.zeros(2), np.zeros(3))


def test_standard_has_what_needs_no_model(metrics, profiles):
    assert list(plots.standard(metrics, profiles, kernels=2)) == [
        *("history", "ranges", "bit_widths", "kernel_bits:Dense_0/kernel", "kernel_bits:Dense_1/kernel")
    ]
    assert list(plots.standard(metrics, [])) == ["history"]


def test_pictures_are_deterministic_and_load_nothing(metrics, profiles):
    first, second = plots.standard(metrics, profiles), plots.standard(metrics, profiles)
    assert first == second
    for svg in first.values():
        rest = svg.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
        assert "http" not in rest and "<metadata" not in rest and "<?xml" not in rest and "@import" not in rest


def test_profiles_come_back_from_their_file(profiles, tmp_path):
    path = tmp_path / "profiles.npz"
    save_profiles(path, [*profiles, site("../x y", low=-0.5)])
    back = load_profiles(path)
    assert [p.name for p in back] == [*(p.name for p in profiles), "../x y"] and list(tmp_path.iterdir()) == [path]
    for old, new in zip(profiles, back, strict=False):
        for one, other in zip(old[1:], new[1:], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(one, other)
    assert plots.ranges(back[:-1]) == plots.ranges(profiles)
    save_profiles(path, [])
    assert load_profiles(path) == []


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_bytes(b"no zip"), lambda p: np.savez(p, x=np.zeros(2))])
def test_a_file_without_profiles_is_refused(make, tmp_path):
    make(tmp_path / "p.npz")
    with pytest.raises(DataError, match="is no file of profiles .* write one with save_profiles"):
        load_profiles(tmp_path / "p.npz")


def test_drawing_touches_no_global_state(profiles):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.ranges(profiles)
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_only_to_draw_and_never_pyplot():
    code = (
        "import sys\nfrom pquant_jax import report\nprint('matplotlib' in sys.modules)\n"
        "report.plots.history([{'epoch': 0, 'loss': 1.0}])\nprint('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_matplotlib_the_extra_is_named(monkeypatch, metrics):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ToolError, match=r"pip install 'pquant-jax\[plots\]'"):
        plots.history(metrics)


PACA = {"patterns": [(1, 0, 0, 1), (0, 1, 1, 0)], "kernels": [3, 2], "counts": [3, 1, 1], "covered": 0.8, "table_bits": 8,
        "index_bits": 5, "mask_bits": 20}  # fmt: skip


def filled(svg: str, colour: str) -> int:
    return len([node for node in parsed(svg).iter(SVG + "path") if f"fill: {colour.lower()}" in node.get("style", "").lower()])


def test_patterns_the_dominant_ones_are_marked_and_drawn():
    """Two blue bars and four blue cells; a grey bar."""
    svg = plots.pattern_histogram(PACA, shape=(2, 2), name=HOSTILE)
    assert filled(svg, "#0072B2") == 2 + 4 and filled(svg, "#9AA5B1") == 1
    shown = " ".join(texts(svg))
    assert "2 of 3 patterns cover 80% of the kernels" in shown and "13 bits for patterns and numbers, 20 for a mask" in shown
    many = {**PACA, "counts": [3, *[1] * 200]}
    assert "all others" in texts(plots.pattern_histogram(many))
    with pytest.raises(DataError, match=r"shape is \(3, 3\), expected one of 4 places"):
        plots.pattern_histogram(PACA, shape=(3, 3))


def test_kernels_before_and_after_the_projection():
    before = np.array([[[1.0, 0.5], [0.0, -2.0]], [[0.0, 1.0], [1.0, 0.0]]])
    after = before * np.array([[1, 0], [0, 1]])
    svg = plots.pattern_kernels(before, after, name="a/kernel")
    assert "a/kernel: after; 0% of all kernels keep their zeros" in texts(svg)
    assert svg == plots.pattern_kernels(before, after, name="a/kernel")
    assert plots.pattern_kernels(before[:1] * 0, before[:1] * 0), "no weight at all has no scale of its own"
    for other in (after[0], after[:1], after[:0]):
        with pytest.raises(DataError, match=r"expected \(n, rows, columns\) twice"):
            plots.pattern_kernels(before[:0] if not other.size else before, other)
