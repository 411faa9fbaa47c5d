from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml

import pquant_jax as pq
from pquant_jax import config
from pquant_jax.cli import main
from pquant_jax.config import _methods, _quantizers
from pquant_jax.config._load import _sections, _tag

COMMANDS = (
    "run", "resume", "lower", "verify", "weights", "report", "predict", "scan", "robust", "forest",
    "explain", "template", "schema", "doctor",
)  # fmt: skip

MODEL = """
import flax.linen as nn
import jax.numpy as jnp

class Net(nn.Module):
    width: int
    outputs: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(self.width)(x)))

class Curved(Net):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(jnp.sort(nn.Dense(self.width)(x)))

def build(outputs, width=4):
    return Net(width, outputs)

def curved(outputs, width=4):
    return Curved(width, outputs)

def three(width=4):
    return Net(width, 3)

def picky():
    import pquant_jax as pq
    return pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.ones((99, 4))})
"""
CONFIG: dict[str, Any] = {
    "model": {"build": "my_model:build", "args": {"width": 5}},
    "data": "blobs.npz",
    "training": {"epochs": {"pretrain": 1, "train": 2, "finetune": 1}, "batch_size": 32, "float_baseline": False},
    "pruning": {"method": "dst"},
    "quantization": {"method": "fixed"},
    "hardware": {"simulate": False, "synthesize": False, "vectors": 300},
}


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder: a model, data and a configuration, none of them part of the package."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "my_model.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    x = rng.normal(size=(400, 6)) + 2 * np.eye(6)[y]
    np.savez(folder / "blobs.npz", x=x, y=y)
    np.savez(folder / "new.npz", x=x[:10])
    nan, inf, label = x.copy(), x.copy(), y.copy()
    nan[3, 2], inf[4, 1], label[5] = np.nan, np.inf, -1
    np.savez(folder / "nan.npz", x=nan, y=y)
    np.savez(folder / "inf.npz", x=inf, y=y)
    np.savez(folder / "label.npz", x=x, y=label)
    np.savez(folder / "flat.npz", x=x[:, 0], y=y)
    np.savez(folder / "uneven.npz", x=x, y=y[:300])
    (folder / "text.npz").write_text("no archive")
    (folder / "blobs.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def cli(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    """(exit code, stdout, lines of stderr) of one command."""
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def child(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pquant_jax", *map(str, arguments)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_is_read_and_written(capsys, command):
    code, out, err = cli(capsys, command, "--help")
    assert code == 0 and not err
    assert f"pquant-jax {command}" in out.split("exit codes")[0].partition("\n\n")[2], "no example"
    assert "exit codes: 0 done, 2 a mistake" in out


def test_the_overview_names_every_command(capsys):
    code, out, _ = cli(capsys, "--help")
    assert code == 0 and all(f"\n    {command} " in out for command in COMMANDS)


def test_version(capsys):
    assert cli(capsys, "--version") == (0, f"pquant-jax {pq.__version__}\n", [])


def test_every_backend_of_hls4ml_can_be_asked_for(capsys):
    from pquant_jax.cli import HLS
    from pquant_jax.lower.backends.hls4ml import BACKENDS

    assert HLS == tuple(BACKENDS) == get_args(config.Hls.model_fields["backend"].annotation)
    code, _, err = cli(capsys, "lower", "runs/x", "--hls", "Vits")
    assert code == 2 and all(name in err[-1] for name in HLS)


def test_no_command_and_unknown_command(capsys):
    assert cli(capsys)[0] == 2
    assert cli(capsys, "trian")[0] == 2
    assert cli(capsys, "verify", "runs/x", "--vectors", "0")[0] == 2


def test_the_schema_and_its_help_know_every_method(capsys):
    quantizers = {_tag(section) for section in _sections(_quantizers.Quantization)}
    names = {*_methods.METHODS, *_methods.METRICS, *_methods.SEARCHES, *quantizers}
    for arguments in (["schema"], ["schema", "--help"]):
        _, out, _ = cli(capsys, *arguments)
        assert not {name for name in names if not re.search(rf"\b{name}\b", out)}


def test_schema_is_the_configurations(capsys):
    code, out, err = cli(capsys, "schema")
    assert code == 0 and not err and json.loads(out) == config.json_schema()


def test_a_template_is_a_section_of_its_model(capsys, tmp_path):
    """What it prints is appended to the configuration and explained."""
    path = tmp_path / "small.yaml"
    path.write_text("model: {build: mlp, args: {hidden: [3]}}\ndata: {n: 2000}\n")
    assert cli(capsys, "explain", str(path))[::2] == (
        2,
        ["error: the configuration has no quantization section; `pquant-jax template` writes one"],
    )
    code, section, err = cli(capsys, "template", str(path), "--quantizer", "fixed")
    assert code == 0 and not err
    path.write_text(path.read_text() + section.replace("where: Dense_1/kernel, i: 0, f: 7", "where: Dense_1/kernel, i: 0, f: 5"))
    code, table, err = cli(capsys, "explain", str(path), "--set", "input.f=8")
    rows = [line.split() for line in table.splitlines()]
    assert code == 0 and not err and len(rows) == 7
    assert ["Dense_1/kernel", "(3,", "5)", "kernel", "1", "0", "5", "RND", "SAT", "element", "rule", "'Dense_1/kernel'"] in rows


def test_doctor(capsys, monkeypatch):
    code, out, _ = cli(capsys, "doctor")
    assert code == 0 and out.splitlines()[0].split() == ["name", "found", "needed", "for", "how", "to", "install"]
    assert {line.split()[0] for line in out.splitlines()[1:]} >= {
        "python",
        "jax",
        "da4ml",
        "g++",
        "verilator",
        "yosys",
        "matplotlib",
    }
    checks = pq_run().checks()
    monkeypatch.setattr(pq_run(), "checks", lambda: [c._replace(found="") if c.name == "verilator" else c for c in checks])
    code, out, _ = cli(capsys, "doctor")
    assert code == 0 and "MISSING" in out and "without verilator: the step 'simulation' is skipped" in out
    monkeypatch.setattr(pq_run(), "checks", lambda: [c._replace(found="") if c.name == "da4ml" else c for c in checks])
    code, out, _ = cli(capsys, "doctor")
    assert code == 1 and "without da4ml: nothing works" in out and "pip install da4ml" in out


def pq_run() -> Any:
    from pquant_jax import run

    return run


# --- mistakes: one line each ------------------------------------------------------------------------------------------

RUN = ("run", "blobs.yaml", "--set")
BAD: dict[str, tuple[list[str], str]] = {
    "missing configuration": (["run", "blob.yaml"], "configuration file 'blob.yaml' does not exist"),
    "unknown key": ([*RUN, "training.epoch.train=3"], "unknown key 'training.epoch'; did you mean 'epochs'"),
    "bad --set": ([*RUN, "seed"], "--set got 'seed', expected KEY=VALUE"),
    "bad value": ([*RUN, "seed=soon"], "seed: received 'soon' (str), expected a whole number"),
    "bad name": (["run", "blobs.yaml", "--name", "a/b"], "name: received 'a/b' (str), expected letters"),
    "missing data": ([*RUN, "data=blob.npz"], "blob.npz' does not exist"),
    "no archive": ([*RUN, "data=text.npz"], "text.npz' is no .npz archive"),
    "unknown data": ([*RUN, "data=jet"], "data is 'jet', expected 'jets'"),
    "NaN": ([*RUN, "data=nan.npz"], "x has 1 NaN or infinite values, the first is nan at row"),
    "infinity": ([*RUN, "data=inf.npz"], "x has 1 NaN or infinite values, the first is inf at row"),
    "label": ([*RUN, "data=label.npz"], "1 labels outside 0..3 (4 classes), the first is -1 at row"),
    "flat x": ([*RUN, "data=flat.npz"], "x has shape (400,), expected (n, features...)"),
    "uneven": ([*RUN, "data=uneven.npz"], "y has shape (300,), expected 400 rows"),
    "classes": ([*RUN, "model=my_model:three"], "the model gives (3,) per sample, but blobs has 4 classes"),
    "model input": ([*RUN, "model=my_model:picky"], "does not accept an input of shape (2, 6)"),
    "big batch": ([*RUN, "training.batch_size=1000"], "training.batch_size is 1000, but there are 288 training"),
    "missing module": ([*RUN, "model=nowhere:build"], "'nowhere' can't be imported"),
    "missing function": ([*RUN, "model=my_model:bild"], "'my_model' has no 'bild'; did you mean 'build'"),
    "missing argument": ([*RUN, "model.args.widht=3"], "takes no 'widht'; did you mean 'width'"),
    "can't be lowered": ([*RUN, "model=my_model:curved"], "can't lower 'sort'"),
    "no site": ([*RUN, "quantization.rules=[{where: Conv_0, f: 1}]"], "'Conv_0', which matches no site"),
    "no kernel": ([*RUN, "pruning.where=Conv_0"], "the rule 'Conv_0' matches no parameter"),
    "no epochs": ([*RUN, "training.epochs=0"], "the plan has no epochs"),
    "regression": ([*RUN, "task=regression", "--set", "loss=cross_entropy"], "the loss does not take outputs"),
    "starting point": ([*RUN, "training.init=new.npz"], "lacks the parameter 'Dense_0/bias'"),
    "no run": (["resume", "runs/nothing"], "runs/nothing does not exist; give the path of a run"),
    "no run to lower": (["lower", "."], "is no run directory"),
    "no run to verify": (["verify", "."], "is no run directory"),
    "no run for weights": (["weights", ".", "runs/other"], "is no run directory"),
    "no run to report": (["report", "."], "is no run directory"),
    "no run to predict": (["predict", ".", "new.npz"], "is no run directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(project, monkeypatch, capsys, case):
    arguments, message = BAD[case]
    monkeypatch.chdir(project)
    code, _, err = cli(capsys, *arguments)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0], err
    assert not (project / "runs").exists(), "a run directory was made for nothing"


def test_debug_shows_where(project, monkeypatch):
    monkeypatch.setenv("PQUANT_DEBUG", "1")
    with pytest.raises(pq.ConfigError):
        main(["run", str(project / "nothing.yaml")])


def test_a_defect_keeps_its_traceback(project, monkeypatch):
    (project / "my_model.py").write_text("def build(outputs, width):\n    raise ZeroDivisionError('in the user\\'s code')\n")
    monkeypatch.chdir(project)
    with pytest.raises(ZeroDivisionError):
        main(["run", "blobs.yaml", "--quiet"])


def test_a_difference_has_an_exit_code_of_its_own(project, monkeypatch, capsys):
    def differs(*args, **kwargs):
        raise pq.VerifyError("da4ml differs\nin one integer")

    monkeypatch.setattr(pq_run(), "verify", differs)
    assert cli(capsys, "verify", "runs/x") == (3, "", ["error: da4ml differs | in one integer"])


# --- a user's project -------------------------------------------------------------------------------------------------


def test_a_project_outside_the_package(project, tmp_path):
    """From another current directory: the model and the data lie beside the configuration."""
    made = child(tmp_path, "run", "project/blobs.yaml", "--name", "first")
    assert made.returncode == 0 and made.stderr == "", made.stderr
    phases = ["data", "model", "train", "evaluate", "lower", "netlist", "verify", "report"]
    assert [line.split()[0] for line in made.stdout.splitlines() if " s   " in line] == phases
    assert "skipped: simulation: hardware.simulate is false" in made.stdout
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert summary["accuracy"]["compressed"] == summary["accuracy"]["emulated"] > 0.3
    assert summary["mismatches"]["da4ml"] == 0
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000

    told = child(project, "predict", "../runs/first", "new.npz", "-o", "out.npz")
    assert told.returncode == 0 and told.stdout == "10 predictions in out.npz (integers confirmed by the emulator)\n", told.stderr
    with np.load(project / "out.npz") as out:
        np.testing.assert_array_equal(np.ldexp(out["codes"].astype(float), -out["f"]), out["prediction"])

    again = child(tmp_path, "run", "project/blobs.yaml", "--name", "first")
    assert again.returncode == 2 and again.stdout == ""
    assert again.stderr.splitlines() == [
        "error: runs/first exists; choose another --name, replace it with --overwrite, or `pquant-jax resume runs/first`"
    ]


def test_report_and_quiet(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    off = ["--set", "hardware.lower=false", "--set", "training.epochs=1"]
    assert cli(capsys, "run", "blobs.yaml", "--quiet", "--root", "out", *off) == (0, "", [])
    page = project / "out" / "blobs" / "report.html"
    pictures = page.read_text().count("<svg")
    page.unlink()
    assert cli(capsys, "report", "out/blobs") == (0, "out/blobs/report.html\n", [])
    assert page.read_text().count("<svg") == pictures > 3
    code, _, err = cli(capsys, "verify", "out/blobs")
    assert code == 2 and err == ["error: out/blobs has no graph.npz: it is not lowered; `pquant-jax lower out/blobs`"]
    assert cli(capsys, "lower", "out/blobs", "--set", "hardware.lower=true", "--quiet") == (0, "", [])
    assert cli(capsys, "verify", "out/blobs", "--vectors", "700", "--seed", "3", "--quiet") == (0, "", [])
    assert json.loads((project / "out" / "blobs" / "summary.json").read_text())["vectors"] >= 700


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_process_is_resumed_to_the_same_bits(project, monkeypatch, capsys, signum):
    length = ["--set", "training.epochs.train=60", "--set", "hardware.lower=false"]
    words = [sys.executable, "-m", "pquant_jax", "run", "blobs.yaml", "--name", "stopped", *length]
    with subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.split()[:2] == ["model", "pretrain"]:
                os.kill(process.pid, signum)
        error = process.stderr.read().splitlines()
    assert process.returncode == 128 + signum
    assert error[-1] == "stopped; go on with `pquant-jax resume runs/stopped`" and len(error) == 2
    monkeypatch.chdir(project)
    assert 0 < len((project / "runs/stopped/metrics.jsonl").read_text().splitlines()) < 62
    assert cli(capsys, "resume", "runs/stopped", "--quiet") == (0, "", [])
    assert cli(capsys, "run", "blobs.yaml", "--name", "whole", "--quiet", *length) == (0, "", [])
    with np.load("runs/stopped/final.npz") as one, np.load("runs/whole/final.npz") as two:
        assert set(one.files) == set(two.files)
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
