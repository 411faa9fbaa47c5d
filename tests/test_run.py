from __future__ import annotations

import json
import math
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import pquant_jax as pq
from pquant_jax import config, report, run
from pquant_jax.graph import instrument
from pquant_jax.lower import ir
from pquant_jax.run import _files, _hardware, _run, _training
from pquant_jax.run._figures import bits_of, bops, model_figures, outputs, profiles
from pquant_jax.run._prepare import prepare, prepare_data

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"build": "mlp", "args": {"hidden": [4]}},
    "data": {"source": "jets", "n": 500},
    "training": {"epochs": {"pretrain": 1, "train": 3, "finetune": 1}, "batch_size": 64, "learning_rate": 3e-3},
    "pruning": {"method": "dst", "alpha": 1e-4},
    "quantization": {"method": "hgq", "beta": 1e-5},
    "hardware": {"simulate": False, "synthesize": False, "vectors": 500},
}
NO_FLOAT = "training.float_baseline=false"


def experiment(*overrides: str) -> config.Experiment:
    return config.parse(TINY, overrides)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of one configuration compile the same functions: keep the executables on disk for this module."""
    keys = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {key: getattr(jax.config, key) for key in keys}
    for key, value in keys.items():
        jax.config.update(key, value)
    yield
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole run: baseline, compressed model, netlist, report; RTL written but not simulated."""
    root = tmp_path_factory.mktemp("runs")
    run.run(experiment(), root=root, quiet=True)
    return root / "tiny"


@pytest.fixture(scope="module")
def summary(folder) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare(experiment(), prepare_data(experiment()))


@pytest.fixture(scope="module")
def final(folder, prepared):
    return pq.load_final(folder / "final.npz", prepared.inst)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def assert_same_arrays(a: Path, b: Path) -> None:
    one, two = arrays(a), arrays(b)
    assert set(one) == set(two)
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)


# --- what a run leaves behind -----------------------------------------------------------------------------------------


def test_run_directory_is_complete(folder):
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml", "dataset.json", "metrics.jsonl", "float_metrics.jsonl", "checkpoints", "float.npz", "final.npz",
        "graph.npz", "rtl", "profiles.npz", "test.npz", "summary.json", "report.html",
    }  # fmt: skip
    assert not list(folder.rglob("*.part*")), "something was left half-written"
    assert (
        list((folder / "rtl" / "comb" / "rtl" / "verilog").glob("*.v")) and (folder / "rtl" / "pipelined" / "README.md").is_file()
    )


def test_summary_has_every_key_of_a_run(summary):
    assert set(summary["accuracy"]) == {"float", "compressed", "emulated"}
    assert set(summary["ebops"]) == {"reference8", "final"}
    assert set(summary["mismatches"]) == {"emulator", "da4ml", "rtl_comb", "rtl_pipelined"}
    timing = {"latency_cycles", "latency_ns", "clock_ns", "ii", "reg_bits"}
    assert set(summary["cost"]) == {"da4ml", "lut", "ff", "dsp", "carry"} | timing
    assert summary["cost"]["latency_ns"] == 5.0 * summary["cost"]["latency_cycles"]
    assert [row["layer"] for row in summary["layer_cost"]][-1] == "total" and len(summary["pipelines"]["da4ml"]) == 7
    assert set(summary["params"]) == {"total", "nonzero"}
    assert summary["channels"]["total"] == 4 + 5 and 0 <= summary["channels"]["dead"] <= 4
    phases = {"data", "model", "float", "train", "evaluate", "lower", "netlist", "verify", "report"}
    assert set(summary["seconds"]) == phases and all(s >= 0 for s in summary["seconds"].values())
    assert {"jax", "python", "pquant_jax", "da4ml"} <= set(summary["versions"])
    assert summary["metric"] == "accuracy" and summary["seeds"] == {"run": 0, "vectors": 0} and summary["traces"] == 1


def test_summary_holds_what_can_be_computed_again(summary, prepared, final):
    view, state = final
    test = prepared.dataset.test
    predicted = outputs(prepared.inst, view, state, test.x)
    assert summary["accuracy"]["compressed"] == pytest.approx(np.mean(predicted.argmax(-1) == test.y))
    assert summary["accuracy"]["emulated"] == summary["accuracy"]["compressed"]
    assert summary["ebops"] == {"reference8": 64 * (16 * 4 + 4 * 5), "final": pytest.approx(float(prepared.inst.ebops(view)))}
    kernels = [np.asarray(view.model[layer]["kernel"]) for layer in ("Dense_0", "Dense_1")]
    biases = [np.asarray(view.model[layer]["bias"]) for layer in ("Dense_0", "Dense_1")]
    for layer, kernel in zip(("Dense_0", "Dense_1"), kernels, strict=True):
        found = summary["kernels"][f"{layer}/kernel"]
        assert found["zeros"] == np.sum(kernel == 0) and found["dead_columns"] == np.sum(~kernel.any(0))
    assert summary["sparsity"] == pytest.approx(np.mean(np.concatenate([k.ravel() for k in kernels]) == 0))
    assert summary["params"] == {"total": 93, "nonzero": sum(int(np.count_nonzero(v)) for v in kernels + biases)}
    assert sum(summary["layers"].values()) == pytest.approx(summary["ebops"]["final"])
    assert summary["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": None, "rtl_pipelined": None}
    assert summary["vectors"] >= 500 and summary["cost"]["da4ml"] > 0 and summary["cost"]["latency_cycles"] > 0
    assert set(summary["skipped"]) == {"simulation", "synthesis"}


def test_metrics_have_one_line_per_epoch(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == list(range(5))
    assert [r["stage"] for r in records] == ["pretrain", "train", "train", "train", "finetune"]
    assert all({"loss", "val_loss", "val_metric", "sparsity", "ebops", "seconds"} <= set(r) for r in records)
    floats = [json.loads(line) for line in (folder / "float_metrics.jsonl").read_text().splitlines()]
    assert len(floats) == 5 and not any("ebops" in r for r in floats), "the baseline gets the epochs of all stages together"


def test_the_written_configuration_repeats_the_run(folder, tmp_path):
    again = config.parse(config.read_yaml((folder / "config.yaml").read_text(), "config.yaml"))
    assert again == experiment()
    run.run(again.model_copy(update={"hardware": again.hardware.model_copy(update={"lower": False})}), root=tmp_path, quiet=True)
    assert_same_arrays(folder / "final.npz", tmp_path / "tiny" / "final.npz")
    assert_same_arrays(folder / "float.npz", tmp_path / "tiny" / "float.npz")


def test_report_has_the_pictures_and_the_proof(folder):
    page = (folder / "report.html").read_text()
    assert "bit-identical: 0 of" in page and page.count("<svg") == 9
    assert "hidden:" in page, "the resolved configuration is in it"


def test_profiles_show_what_was_seen(folder, prepared, final):
    view, state = final
    made = {p.name: p for p in report.load_profiles(folder / "profiles.npz")}
    assert set(made) == set(prepared.inst.sites)
    x = prepared.inst.encode(prepared.dataset.train.x)
    port = made["Dense_0/input"]
    np.testing.assert_array_equal(port.low, x.min(0))
    np.testing.assert_array_equal(port.high, x.max(0))
    np.testing.assert_allclose(port.quantiles, np.quantile(np.abs(x), [0, 0.25, 0.5, 0.75, 1]))
    kernel = made["Dense_1/kernel"]
    np.testing.assert_array_equal(kernel.values, view.model["Dense_1"]["kernel"])
    pruned = np.asarray(view.masks["Dense_1/kernel"]) == 0
    assert np.all(kernel.low[pruned] == 0) and np.all(kernel.low == kernel.high)
    np.testing.assert_array_equal(made["Dense_1/input"].f, np.rint(np.asarray(view.sites["Dense_1/input"].f)))


def test_bops_by_hand(prepared, final):
    view, _ = final
    expected = 0.0
    for layer, n, m in (("Dense_0", 16, 4), ("Dense_1", 4, 5)):
        w = np.asarray(view.model[layer]["kernel"])
        bits = bits_of(view, f"{layer}/kernel", w.shape)
        b_w = bits[w != 0].mean() if np.any(w) else 0.0
        b_a = bits_of(view, f"{layer}/input", (n,)).mean()
        expected += m * n * (np.mean(w != 0) * b_w * b_a + b_a + b_w + math.log2(n))
    assert bops(prepared.inst, view) == pytest.approx(expected)


def test_bops_count_every_use_of_a_kernel():
    model = pq.from_function(lambda p, x: x @ p["w"], {"w": np.ones((4, 2), np.float32)})
    compressed = {}
    for places in (1, 3):
        inst = instrument(model, np.ones((1, places, 4), np.float32))
        chain = pq.quantize.fixed(inst.sites)
        params = chain.attach(inst.model.params)
        compressed[places] = bops(inst, chain.apply(params, chain.init(params))[0])
    assert compressed[3] == 3 * compressed[1]


def test_profiles_of_a_fused_scale(prepared):
    raw = {**TINY, "model": {"build": "mlp", "args": {"hidden": [4], "batch_norm": True}}}
    made = prepare(config.parse(raw), prepared.dataset)
    params = made.compression.attach(made.inst.model.params)
    view = made.compression.apply(params, made.compression.init(params))[0]
    found = {p.name: p for p in profiles(made.inst, view, params.model, made.inst.model.state, prepared.dataset.val.x)}
    scale = next(p for name, p in found.items() if name.endswith("fused_scale"))
    assert scale.values.shape == made.inst.sites[scale.name].shape and np.all(np.abs(scale.values - scale.high) <= 2.0**-6)
    assert set(found) == set(made.inst.sites)


def test_figures_without_formats(prepared):
    view = pq.View(prepared.inst.model.params, {}, {})
    figures = model_figures(prepared.inst, view)
    assert figures["ebops"] == {"reference8": 5376.0, "final": None} and figures["bops"] is None and figures["layers"] == {}
    assert figures["sparsity"] == 0 and profiles(prepared.inst, view, view.model, {}, prepared.dataset.val.x) == []


# --- parts of a run that are switched off -----------------------------------------------------------------------------


def test_prune_only_trains_and_reports_without_lowering(tmp_path):
    made = run.run(
        experiment("quantization=null", "pruning={method: pdp, sparsity: 0.5, epsilon: 1.0}"), root=tmp_path, quiet=True
    )
    assert made["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert made["skipped"]["lower"].startswith("no quantization") and made["ebops"]["final"] is None
    assert made["accuracy"]["compressed"] > 0 and "emulated" not in made["accuracy"]
    assert not (tmp_path / "tiny" / "graph.npz").exists()
    assert "not lowered: no quantization" in (tmp_path / "tiny" / "report.html").read_text()


def test_neither_pruning_nor_quantization(tmp_path):
    made = run.run(experiment("quantization=null", "pruning=null"), root=tmp_path, quiet=True)
    assert "nothing is compressed" in made["skipped"]["float"] and "float" not in made["accuracy"]
    assert made["sparsity"] < 0.05
    started = run.run(
        experiment("name=next", f"training.init={tmp_path / 'tiny' / 'final.npz'}", NO_FLOAT, "hardware.lower=false"),
        root=tmp_path,
        quiet=True,
    )
    first = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["loss"] for n in ("tiny", "next")]
    assert first[1] < first[0], "training did not start from the parameters of the first run"
    assert started["skipped"]["lower"] == "hardware.lower is false"


def test_regression(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3)).astype(np.float32)
    np.savez(tmp_path / "line.npz", x=x, y=(x @ np.array([1.0, -0.5, 0.25]))[:, None])
    overrides = [f"data={tmp_path / 'line.npz'}", "task=regression", "training.epochs=30", "training.learning_rate=0.02"]
    made = run.run(experiment(*overrides, NO_FLOAT, "quantization={method: fixed}", "pruning=null"), root=tmp_path, quiet=True)
    assert made["metric"] == "mse" and made["mse"]["compressed"] < 0.2
    assert made["mse"]["emulated"] == pytest.approx(made["mse"]["compressed"], rel=1e-6)
    assert "residuals" in (tmp_path / "tiny" / "report.html").read_text()


def test_batch_norm_and_residual(tmp_path):
    more = ["model.args={hidden: [4, 4], batch_norm: true, residual: true}", "quantization.activations.overflow=WRAP"]
    made = run.run(experiment(*more, NO_FLOAT), root=tmp_path, quiet=True)
    assert made["mismatches"]["emulator"] == made["mismatches"]["da4ml"] == 0
    assert made["accuracy"]["emulated"] == made["accuracy"]["compressed"]
    assert any(name.startswith("BatchNorm_0") for name in made["layers"]), "the fused scale multiplies too"
    statistics = {n: v for n, v in arrays(tmp_path / "tiny" / "final.npz").items() if n.startswith("state/")}
    assert len(statistics) == 4 and all(np.isfinite(v).all() for v in statistics.values())


# --- interruption -----------------------------------------------------------------------------------------------------


def interrupted(monkeypatch, root: Path, after: int, how: str, *overrides: str) -> None:
    """Run until `after` epochs are recorded, then stop by a signal or by an exception out of a callback."""

    @contextmanager
    def progress(log, name, total, metric):
        seen = []

        def stopping(record):
            seen.append(record)
            if len(seen) == after and how == "interrupt":
                raise KeyboardInterrupt
            if len(seen) == after:
                signal.raise_signal(getattr(signal, how))

        yield stopping

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as caught:
        patched.setattr(_training, "progress", progress)
        run.run(experiment(NO_FLOAT, "hardware.lower=false", *overrides), root=root, quiet=True)
    if how != "interrupt":
        assert caught.value.signum == getattr(signal, how)
        assert caught.value.hint == f"go on with `pquant-jax resume {root / 'tiny'}`"


@pytest.mark.parametrize("how, after", [("interrupt", 2), ("SIGTERM", 4), pytest.param("SIGINT", 5, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, monkeypatch, how, after):
    interrupted(monkeypatch, tmp_path, after, how)
    stopped = tmp_path / "tiny"
    assert not (stopped / "summary.json").exists() and not (stopped / "final.npz").exists()
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == after
    made = run.resume(stopped, quiet=True)
    assert_same_arrays(folder / "final.npz", stopped / "final.npz")
    lines = [[json.loads(v) for v in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, stopped)]
    times = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in times} for r in lines[0]] == [
        {k: v for k, v in r.items() if k not in times} for r in lines[1]
    ]
    assert made["best_epoch"] == json.loads((folder / "summary.json").read_text())["best_epoch"]


def test_resume_without_a_checkpoint_begins_again(folder, tmp_path):
    lost = tmp_path / "tiny"
    _files.create(lost, experiment(NO_FLOAT, "hardware.lower=false"))
    run.run(experiment(NO_FLOAT, "hardware.lower=false"), root=tmp_path, resume=True, quiet=True)
    assert_same_arrays(folder / "final.npz", lost / "final.npz")


def test_a_finished_run_is_left_alone(folder, capsys):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert run.resume(folder) == json.loads((folder / "summary.json").read_text())
    assert "is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_resume_refuses_other_data(tmp_path):
    lost = tmp_path / "tiny"
    _files.create(lost, experiment())
    _files.write_json(lost / "dataset.json", {"digest": "0123"})
    with pytest.raises(pq.DataError, match="have changed since it began"):
        run.resume(lost, quiet=True)


def test_handlers_and_path_are_restored(folder, tmp_path, monkeypatch):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    interrupted(monkeypatch, tmp_path, 1, "SIGTERM", "training.epochs=2")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- what fails after training ----------------------------------------------------------------------------------------


def test_a_failed_proof_keeps_everything_else(folder, tmp_path, monkeypatch):
    def differs(*args, **kwargs):
        raise pq.VerifyError("da4ml differs from the emulator in 1 of 5 integers")

    monkeypatch.setattr(_hardware, "compare", differs)
    with pytest.raises(pq.VerifyError, match="da4ml differs"):
        run.run(experiment(NO_FLOAT), root=tmp_path, quiet=True)
    made = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert made["skipped"]["verify"] == "failed: da4ml differs from the emulator in 1 of 5 integers"
    assert made["mismatches"]["da4ml"] is None and made["cost"]["da4ml"] > 0 and made["accuracy"]["emulated"] > 0
    page = (tmp_path / "tiny" / "report.html").read_text()
    assert "bit-identical" not in page and "da4ml differs from the emulator" in page


# --- parts again ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "tiny"))


def test_bit_flips_of_a_run(copy, capsys):
    found = run.robust(copy, rates=[0.01, 0.3], percent=25, trials=4, quiet=True)
    assert found == json.loads((copy / "robust" / "robust.json").read_text())
    plain, chance, best, activations = found["curves"].values()
    assert plain["clean"] == best["clean"] == activations["clean"] and len(plain["mean"]) == 2
    assert best["mean"][1] >= plain["mean"][1] and plain["mean"][1] < plain["clean"]
    scores = [row["score"] for row in found["highest"]]
    assert scores == sorted(scores, reverse=True) and found["highest"][0]["site"].startswith("Dense_")
    assert all((copy / "robust" / f"{name}.svg").read_text().startswith("<") for name in ("flips", "bits"))
    with pytest.raises(pq.DataError, match="percent is 101"):
        run.robust(copy, percent=101, quiet=True)


def test_lower_again_through_every_door(copy, summary):
    pytest.importorskip("onnx")
    other = [
        "hardware.backend=alkaid",
        "hardware.onnx=[qonnx, onnx]",
        "hardware.hls={simulate: false, config: {Model: {Strategy: resource}}}",
    ]
    changed = run.lower(copy, other, quiet=True)
    assert {k for k, v in changed["mismatches"].items() if v == 0} == {"emulator", "alkaid", "qonnx", "onnx"}
    assert changed["cost"]["alkaid"] > 0 and "da4ml" not in changed["cost"]
    assert "Strategy: resource" in (copy / "hls" / "hls4ml_config.yml").read_text()
    assert (copy / "hls" / "firmware").is_dir() and (copy / "model.qonnx.onnx").is_file() and (copy / "model.onnx").is_file()
    registers = [
        "hardware.weights=registers",
        "hardware.tmr=20",
        "hardware.backend=da4ml",
        "hardware.onnx=[]",
        "hardware.hls=null",
    ]
    loadable = run.lower(copy, registers, quiet=True)
    regmap = json.loads((copy / "rtl" / "registers" / "regmap.json").read_text())
    bits = sum(row["k"] + row["i"] + row["f"] for row in regmap["weights"])
    assert sum(len(row.get("voted", ())) for row in regmap["weights"]) == round(0.2 * bits) > 0
    assert loadable["accuracy"] == summary["accuracy"] and loadable["mismatches"]["da4ml"] == 0
    assert not (copy / "hls").exists() and not list(copy.glob("*.onnx")), "what belongs to another netlist is gone"
    with pytest.raises(pq.ConfigError, match="weights: constants with hls and onnx"):
        run.lower(copy, ["hardware.onnx=[qonnx]"], quiet=True)


def test_lower_again_without_a_netlist(copy, summary):
    other = run.lower(copy, ["hardware.backend=null", "hardware.onnx=[qonnx]"], quiet=True)
    assert other["mismatches"] == {"emulator": 0, "qonnx": 0} and other["cost"] == {} and not (copy / "rtl").exists()
    assert other["skipped"] == dict.fromkeys(("simulation", "synthesis"), "hardware.backend is null: there is no netlist")
    assert other["accuracy"] == summary["accuracy"] and "layer_cost" not in other and (copy / "report.html").is_file()
    assert run.verify(copy, vectors=100, quiet=True)["mismatches"] == other["mismatches"]
    with pytest.raises(pq.ConfigError, match="backend: da4ml or alkaid with weights"):
        run.lower(copy, ["hardware.weights=ports", "hardware.onnx=[]"], quiet=True)


def test_lower_again_with_another_pipeline(copy, summary):
    changed = run.lower(copy, ["hardware.latency_cutoff=1", "hardware.vhdl=false"], quiet=True)
    assert changed["cost"]["latency_cycles"] > summary["cost"]["latency_cycles"]
    assert changed["accuracy"] == summary["accuracy"] and changed["seconds"]["train"] == summary["seconds"]["train"]
    assert not (copy / "rtl" / "comb" / "rtl" / "vhdl").exists() and (copy / "rtl" / "comb" / "rtl" / "verilog").is_dir()
    assert config.parse(config.read_yaml((copy / "config.yaml").read_text(), "")).hardware.latency_cutoff == 1
    with pytest.raises(pq.ConfigError, match="settings of hardware only"):
        run.lower(copy, ["training.epochs=3"], quiet=True)


def test_verify_again_with_other_vectors(copy, summary):
    changed = run.verify(copy, vectors=800, seed=5, quiet=True)
    assert changed["vectors"] == 800 and changed["seeds"] == {"run": 0, "vectors": 5}
    assert changed["mismatches"]["da4ml"] == 0


def test_verify_notices_a_changed_bit(copy):
    values = arrays(copy / "final.npz")
    values["codes/Dense_1/bias"] = values["codes/Dense_1/bias"] + 1
    pq.save_final(copy / "final.npz", values)
    with pytest.raises(pq.VerifyError, match="the JAX forward differs from the emulator"):
        run.verify(copy, quiet=True)


def test_verify_simulates_once_the_tools_are_there(copy, monkeypatch):
    asked: list[Any] = []

    def compare(*args, rtls, **kwargs):
        asked.append(sorted(rtls))
        return {"mismatches": dict.fromkeys(_run.ENGINES, 0), "vectors": 1, "outputs": 5}

    monkeypatch.setattr(_hardware, "compare", compare)
    again = config.parse(config.read_yaml((copy / "config.yaml").read_text(), ""), ["hardware.simulate=true"])
    (copy / "config.yaml").write_text(config.dump(again))
    assert "simulation" not in run.verify(copy, quiet=True)["skipped"]
    assert asked == [["rtl_comb", "rtl_pipelined"]]


def test_written_rtl_is_described_well_enough_to_simulate_it_again(folder):
    from pquant_jax.lower.backends import da4ml

    infos = _hardware.read_infos(folder)
    assert set(infos) == {"rtl_comb", "rtl_pipelined"}
    rebuilt = da4ml.write_rtl(
        da4ml.to_comb(ir.load(folder / "graph.npz")), folder.parent / "again", name="pq_tiny", overwrite=True
    )
    for field in ("name", "flavor", "stages", "latency_cycles", "ii", "cost"):
        assert getattr(infos["rtl_comb"], field) == getattr(rebuilt, field)
    np.testing.assert_array_equal(infos["rtl_comb"].inp_kifs, rebuilt.inp_kifs)
    assert infos["rtl_comb"].src.is_dir()


def test_parts_of_what_is_no_run(tmp_path):
    for part in (run.resume, run.lower, run.verify, run.write_report):
        with pytest.raises(pq.ConfigError, match="does not exist"):
            part(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(pq.ConfigError, match="is no run directory"):
        run.lower(tmp_path / "empty")
    _files.create(tmp_path / "begun", experiment())
    with pytest.raises(pq.ConfigError, match="has no final.npz: the run is not finished"):
        run.write_report(tmp_path / "begun")


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(copy):
    with pytest.raises(pq.ConfigError, match="takes no 'hiden'"):
        run.run(experiment("model.args={hiden: 3}"), root=copy.parent, overwrite=True, quiet=True)
    assert (copy / "final.npz").exists()


# --- prediction -------------------------------------------------------------------------------------------------------


def test_predictions_are_the_emulators_integers(copy, prepared, final, tmp_path):
    x = prepared.dataset.test.x
    np.savez(tmp_path / "new.npz", x=x)
    made = run.predict(copy, tmp_path / "new.npz")
    written = arrays(copy / "predictions.npz")
    assert set(written) == {"prediction", "codes", "f"}
    np.testing.assert_array_equal(written["prediction"], outputs(prepared.inst, *final, x))
    np.testing.assert_array_equal(np.ldexp(made["codes"].astype(np.float64), -made["f"]), made["prediction"])
    (copy / "graph.npz").unlink()
    assert set(run.predict(copy, tmp_path / "new.npz", tmp_path / "deep" / "out.npz")) == {"prediction"}
    assert (tmp_path / "deep" / "out.npz").is_file()


def test_raw_data_are_standardised_like_the_runs(copy, prepared, tmp_path):
    d = prepared.dataset
    np.savez(tmp_path / "model_units.npz", x=d.test.x)
    np.savez(tmp_path / "raw.npz", x=d.test.x.astype(np.float64) * d.std + d.mean)
    direct, scaled = run.predict(copy, tmp_path / "model_units.npz"), run.predict(copy, tmp_path / "raw.npz", raw=True)
    assert np.mean(direct["codes"] != scaled["codes"]) < 0.02, "float32 rounding may move an input by one step of its port"


@pytest.mark.parametrize(
    "saved, message",
    [
        ({"x": np.zeros((3, 5))}, r"x has shape \(3, 5\).*expected numbers of shape \(n, 16\)"),
        ({"x": np.zeros((0, 16))}, r"x has shape \(0, 16\)"),
        ({"y": np.zeros((3, 16))}, "has no array 'x'"),
        ({"x": np.full((3, 16), np.nan)}, "x has 48 NaN or infinite values"),
        ({"x": np.full((3, 16), "a")}, "dtype <U1, expected numbers"),
    ],
)
def test_data_that_can_not_be_predicted(folder, tmp_path, saved, message):
    np.savez(tmp_path / "bad.npz", **saved)
    with pytest.raises(pq.DataError, match=message):
        run.predict(folder, tmp_path / "bad.npz", tmp_path / "out.npz")


def test_a_model_with_two_inputs(tmp_path, monkeypatch):
    (tmp_path / "two_inputs.py").write_text(
        "import numpy as np, pquant_jax as pq\n"
        "def build(outputs):\n"
        "    rng = np.random.default_rng(0)\n"
        "    w = {n: rng.normal(size=(s, outputs)).astype(np.float32) for n, s in (('a', 3), ('b', 2))}\n"
        "    return pq.from_function(lambda p, x: x['left'] @ p['a'] + x['right'] @ p['b'], w)\n"
        "def load():\n"
        "    rng = np.random.default_rng(1)\n"
        "    x = {'left': rng.normal(size=(300, 3)), 'right': rng.normal(size=(300, 2))}\n"
        "    return {'x': x, 'y': rng.integers(0, 3, 300)}\n"
    )
    monkeypatch.chdir(tmp_path)
    raw = ["model={build: 'two_inputs:build'}", "data={source: 'two_inputs:load'}", NO_FLOAT, "quantization={method: fixed}"]
    made = run.run(experiment(*raw, "pruning=null"), root=tmp_path, quiet=True)
    assert made["mismatches"]["da4ml"] == 0
    rng = np.random.default_rng(2)
    inputs = {"x/left": rng.normal(size=(7, 3)), "x/right": rng.normal(size=(7, 2))}
    np.savez("new.npz", **inputs)
    assert run.predict(tmp_path / "tiny", "new.npz")["codes"].shape == (7, 3)
    np.savez("short.npz", **{**inputs, "x/right": inputs["x/right"][:5]})
    with pytest.raises(pq.DataError, match="expected equally many"):
        run.predict(tmp_path / "tiny", "short.npz")


def test_labels_without_names_are_numbered(tmp_path, monkeypatch):
    (tmp_path / "no_names.py").write_text(
        "import numpy as np, pquant_jax as pq\n"
        "def load():\n"
        "    s = pq.data.Split(np.zeros((100, 2), np.float32), np.arange(100, dtype=np.int32) % 3)\n"
        "    return pq.data.Dataset(s, s, s)\n"
    )
    monkeypatch.chdir(tmp_path)
    with config.importing([]):
        made = prepare(experiment("data='no_names:load'"), prepare_data(experiment("data='no_names:load'")))
    assert made.dataset.classes == ("0", "1", "2")
    assert made.inst.model.params["Dense_1"]["kernel"].shape == (4, 3)


def test_places_that_can_not_be_written(folder, prepared, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(pq.ConfigError, match="can't be written"):
        _files.create(tmp_path / "file" / "run", experiment())
    np.savez(tmp_path / "new.npz", x=prepared.dataset.test.x[:3])
    with pytest.raises(pq.DataError, match="can't be written"):
        run.predict(folder, tmp_path / "new.npz", tmp_path / "file" / "out.npz")


# --- small parts ------------------------------------------------------------------------------------------------------


def test_outputs_are_the_same_in_every_chunk(prepared, final, monkeypatch):
    from pquant_jax.run import _figures

    whole = outputs(prepared.inst, *final, prepared.dataset.test.x)
    monkeypatch.setattr(_figures, "CHUNK", 33)
    np.testing.assert_array_equal(outputs(prepared.inst, *final, prepared.dataset.test.x), whole)


# --- minutes ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_chain_with_simulation_and_synthesis(tmp_path):
    missing = [c for c in run.checks() if not c.found and c.step in ("simulation", "synthesis")]
    assert not missing, f"install the extra rtl: {missing}"
    made = run.run(
        experiment("hardware.simulate=true", "hardware.synthesize=true", "hardware.vectors=10000"), root=tmp_path, quiet=True
    )
    assert made["skipped"] == {} and made["vectors"] >= 10_000
    assert made["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": 0, "rtl_pipelined": 0}
    assert made["cost"]["lut"] > 0 and made["cost"]["ff"] > 0 and made["cost"]["dsp"] == 0
    again = run.verify(tmp_path / "tiny", vectors=2000, seed=9, quiet=True)
    assert again["mismatches"] == made["mismatches"]
    hls = run.lower(tmp_path / "tiny", ["hardware.hls=Vitis", "hardware.backend=alkaid"], quiet=True)["mismatches"]
    assert hls == {"emulator": 0, "alkaid": 0, "rtl_comb": 0, "rtl_pipelined": 0, "hls4ml": 0}
    registers = ["hardware.hls=null", "hardware.weights=registers", "hardware.tmr=10"]
    loadable = run.lower(tmp_path / "tiny", registers, quiet=True)
    assert set(loadable["mismatches"].values()) == {0} and "registers" in loadable["mismatches"]
    assert loadable["cost"]["ff"] > made["cost"]["ff"]


def test_versions_and_phases_are_known(summary):
    assert summary["versions"]["jax"] == jax.__version__
    assert {*_run.ENGINES, "da4ml"} == set(summary["mismatches"])
