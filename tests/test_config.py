from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

import pquant_jax as pq
from pquant_jax import _tree, config
from pquant_jax.run._prepare import prepare, prepare_data

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMALL = {
    "name": "small",
    "model": {"build": "mlp", "args": {"hidden": [3]}},
    "data": {"source": "jets", "n": 500},
    "training": {"epochs": {"pretrain": 1, "train": 2, "finetune": 1}, "batch_size": 64},
    "pruning": {"method": "dst"},
    "quantization": {"method": "hgq"},
}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_numbers_that_yaml_reads_as_texts(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "training: {learning_rate: 1e-5, batch_size: 1e2}\nquantization: {method: hgq, beta: 2E-6, weights: {f: 7e0}}\n"
    )
    assert yaml.safe_load(path.read_text())["training"]["learning_rate"] == "1e-5", "the trap is gone: simplify the loader"
    read = config.load(path)
    assert read.training.learning_rate.start == 1e-5 and read.training.batch_size == 100
    assert read.quantization.beta == 2e-6 and read.quantization.weights.f == 7.0


def test_short_forms_mean_their_sections():
    short = config.parse({"model": "mlp", "data": "x.npz", "training": {"epochs": 4, "learning_rate": 0.1}})
    long = config.parse(
        {
            "model": {"build": "mlp"},
            "data": {"source": "x.npz"},
            "training": {"epochs": {"pretrain": 0, "train": 4, "finetune": 0}, "learning_rate": {"start": 0.1}},
        }
    )
    assert short == long
    assert config.parse({}, ["training.epochs=4"]).training.epochs == long.training.epochs
    assert config.parse({"model": "mlp"}, ["model.args.hidden=[8]"]).model.args == {"hidden": [8]}


def test_formats_that_are_left_out_come_from_the_method():
    hgq, fixed = (config.parse({"quantization": {"method": m, "weights": {"f": 3}}}).quantization for m in ("hgq", "fixed"))
    assert config.format_of(hgq.weights) == pq.quantize.Format(i=2, f=3, k=1, overflow="SAT_SYM")
    assert config.format_of(hgq.activations) == pq.quantize.Format(i=2, f=6, overflow="WRAP")
    assert config.format_of(fixed.weights) == pq.quantize.Format(i=0, f=3, k=1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_load_and_survive_a_round_trip(path, tmp_path):
    read = config.load(path)
    assert read.name == path.stem
    copy = tmp_path / "config.yaml"
    copy.write_text(config.dump(read))
    assert config.parse(yaml.safe_load(copy.read_text())) == read


def test_there_are_shipped_configurations():
    assert {p.stem for p in CONFIGS} >= {"jets_hgq", "jets_prune", "jets_fixed8"}


def test_loss_and_metric_are_written_out():
    assert (config.parse({}).loss, config.parse({}).metric) == ("cross_entropy", "accuracy")
    regression = config.parse({"task": "regression"})
    assert (regression.loss, regression.metric) == ("squared_error", "mse")


def test_overrides_apply_in_order_and_make_missing_sections():
    read = config.parse({"pruning": None}, ["pruning.method=pdp", "pruning.sparsity=0.5", "pruning.sparsity=0.25"])
    assert read.pruning.method == "pdp" and read.pruning.sparsity == 0.25
    assert config.parse(SMALL, ["pruning=null"]).pruning is None
    rules = {"quantization": {"method": "fixed", "rules": [{"where": "a", "f": 1}, {"where": "b", "f": 2}]}}
    changed = config.parse(rules, ["quantization.rules.1.f=5"]).quantization.rules
    assert [r.f for r in changed] == [1, 5]


# --- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[Any, list[str], str]] = [
    ({"trainig": 1}, [], "unknown key 'trainig'; did you mean 'training'"),
    ({"training": {"epochs": {"pretrian": 1}}}, [], "unknown key 'training.epochs.pretrian'; did you mean 'pretrain'"),
    ({"learning_rate": 1}, [], "unknown key 'learning_rate'; did you mean 'training.learning_rate'?"),
    ({"quantization": {"method": "hgq", "weights": {"bitz": 1}}}, [], "unknown key 'quantization.weights.bitz'; known: f,"),
    ({"quantization": {"method": "hgq", "rules": [{"where": "a", "g": 1}]}}, [], "unknown key 'quantization.rules.0.g'"),
    ({"quantization": {"method": "fixed", "beta": 1}}, [], "'quantization.beta'; it belongs to method 'hgq' or 'minifloat'"),
    ({"pruning": {"method": "dts"}}, [], "'pdp', 'random' or 'wanda'; did you mean 'dst'?"),
    ({"pruning": {"alpha": 1}}, [], "pruning.method is missing, expected 'ap', 'autosparse', 'cs', 'dst'"),
    ({"pruning": {"method": "cs", "alpha": 1}}, [], "'pruning.alpha'; it belongs to method 'autosparse' or 'dst', this is 'cs'"),
    ({"pruning": {"method": "pdp", "sparsity": 1.5}}, [], "pruning.sparsity: received 1.5 (float), expected a fraction, 0 to 1"),
    ({"pruning": {"method": "pdp", "sparsity": {"a/.*": "x"}}}, [], "expected a fraction, 0 to 1, or one for each rule, such as"),
    ({"pruning": {"method": "pdp", "groups": "outt"}}, [], "pruning.groups.name: received 'outt' (str), expected 'weight',"),
    ({"pruning": {"method": "pdp", "groups": {"nm": {"n": 2}}}}, [], "pruning.groups.nm.m is missing"),
    ({"pruning": {"method": "pdp", "groups": {"mn": 2}}}, [], "unknown key 'pruning.groups.mn'; did you mean 'nm'"),
    ({"pruning": {"method": "pdp", "groups": {"heads": 2, "reuse": 4}}}, [], "expected one of name, nm, block, cross, reuse"),
    ({"pruning": {"method": "pdp", "compat": "pquant"}}, [], "pruning.compat: received 'pquant' (str), expected 'pquantml'"),
    ({"constraints": [{"metric": "sparsty", "kind": ">=", "target": 1}]}, [], "metric.name: received 'sparsty', expected 'spar"),
    ({"constraints": [{"metric": "sparsity", "kind": ">=", "targt": 1}]}, [], "'constraints.0.targt'; did you mean 'target'?"),
    ({"constraints": [{"metric": "sparsity", "kind": ">", "target": 1}]}, [], "constraints.0.kind: received '>' (str), expect"),
    ({"constraints": [{"metric": {"name": "ebops", "epsilon": 1}}]}, [], "unknown key 'constraints.0.metric.epsilon'; it be"),
    ({"constraints": [{"metric": "dsp_sparsity"}]}, [], "constraints.0.metric.reuse is missing"),
    ({"constraints": [{"metric": "sparsity", "kind": ">=", "target": 1, "prunes": 0}]}, [], "expected true, false or the size"),
    ({"search": {"method": "fitcompres"}}, [], "search.method: received 'fitcompres', expected 'fitcompress' or 'hawq'"),
    ({"search": {"method": "hawq", "widths": [0]}}, [], "search.widths.0: received 0 (int), expected a number of 1 or more"),
    ({"search": {"method": "hawq"}, "pruning": {"method": "dst"}}, [], "expected no pruning and no constraints with a search"),
    ({"search": {"method": "hawq"}, "training": {"epochs": 3}}, [], "a search needs trained weights"),
    ({"training": {"pnorm_decay": {"p": 3}}}, [], "training.pnorm_decay.p: received 3 (int), expected a number of 2 or less"),
    ({"training": {"batch_size": "many"}}, [], "training.batch_size: received 'many' (str), expected a whole number"),
    ({"training": {"batch_size": 1.5}}, [], "training.batch_size: received 1.5 (float), expected a whole number"),
    ({"training": {"batch_size": True}}, [], "training.batch_size: received True (bool), expected a whole number"),
    ({"training": {"learning_rate": "fast"}}, [], "training.learning_rate.start: received 'fast' (str), expected a number"),
    ({"training": {"learning_rate": float("nan")}}, [], "training.learning_rate.start: received nan (float), expected a"),
    ({"training": {"learning_rate": 0}}, [], "training.learning_rate.start: received 0 (int), expected a number above 0"),
    ({"training": {"learning_rate": {"start": 1, "end": 0.1}}}, [], "expected no 'end' with schedule 'constant'"),
    ({"training": {"weight_decay": 0.1}}, [], "optimizer 'adamw'"),
    ({"training": {"shuffle": "perhaps"}}, [], "training.shuffle: received 'perhaps' (str), expected true or false"),
    ({"training": 3}, [], "training: received 3 (int), expected a section of 'key: value' lines"),
    ({"hardware": {"hls": "oneAPI"}}, [], "{backend: oneAPI, simulate: false}: its C simulation needs icpx and cmake, not"),
    ({"seed": -1}, [], "seed: received -1 (int), expected a number of 0 or more"),
    ({"name": "../elsewhere"}, [], "name: received '../elsewhere' (str), expected letters, digits"),
    ({"input": {"k": 0, "i": 0, "f": 0}}, [], "expected a port with bits: k + i + f > 0"),
    ({"quantization": {"method": "hgq", "weights": {"overflow": "WRAP_SM"}}}, [], "WRAP_SM has no trained range"),
    ({"quantization": {"method": "hgq", "rules": [{"where": "a(", "f": 1}]}}, [], "expected a path such as 'Dense_0/kernel'"),
    ({}, ["training.epochs.trian=3"], "unknown key 'training.epochs.trian'; did you mean 'train'"),
    ({}, ["trainig.epochs=3"], "unknown key 'trainig'"),
    ({}, ["seed"], "--set got 'seed', expected KEY=VALUE"),
    ({}, ["=3"], "--set got '=3', expected KEY=VALUE"),
    ({"seed": 1}, ["seed.x=1"], "--set seed.x: seed is 1 (int), which has no parts"),
    ({}, ["training.epochs={a: ["], "--set training.epochs, line 1, column 6: not YAML"),
    ({"trainig": 1, "sed": 2}, [], "(and 1 more mistake)"),
]  # fmt: skip


@pytest.mark.parametrize("raw, overrides, message", MISTAKES, ids=[m[2][:40] for m in MISTAKES])
def test_mistakes_are_one_line_with_the_path(raw, overrides, message):
    with pytest.raises(pq.ConfigError) as caught:
        config.parse(raw, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [1\nb: 2", "line 2, column"),
        ("- 1\n- 2", "expected 'key: value' lines"),
        ("seed: 1\nmodel: mlp\nseed: 2", "line 3: the key 'seed' appears twice"),
        ("training:\n  epochs: {train: 1, train: 2}", "line 2: the key 'train' appears twice"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(pq.ConfigError) as caught:
        config.load(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_configuration(tmp_path):
    with pytest.raises(pq.ConfigError, match=r"nothing.yaml' does not exist"):
        config.load(tmp_path / "nothing.yaml")
    with pytest.raises(pq.ConfigError, match="is a directory"):
        config.load(tmp_path)


def test_schema_describes_every_key():
    schema = config.json_schema()
    json.dumps(schema)
    sections = {"Experiment": schema, **schema["$defs"]}
    assert set(schema["properties"]) == set(config.Experiment.model_fields)
    assert all(not s["additionalProperties"] for s in sections.values())
    assert all("description" in s for s in sections.values())
    assert schema["$defs"]["HGQ"]["properties"]["decay"]["minimum"] == 0
    assert "required" not in schema["$defs"]["Bits"], "an editor would ask for what has a default"


# --- what the sections stand for --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    experiment = config.parse(SMALL)
    return prepare(experiment, prepare_data(experiment))


@pytest.mark.parametrize(
    "section, values",
    [
        ({"start": 0.1}, [0.1, 0.1, 0.1]),
        ({"start": 0.1, "schedule": "linear"}, [0.1, 0.05, 0.0]),
        ({"start": 0.1, "end": 0.02, "schedule": "linear"}, [0.1, 0.06, 0.02]),
        ({"start": 0.1, "end": 0.02, "schedule": "cosine"}, [0.1, 0.06, 0.02]),
        ({"start": 0.1, "schedule": "cosine"}, [0.1, 0.05, 0.0]),
    ],
)
def test_rates_run_from_start_to_end_over_all_steps(section, values):
    made = config.rate(config.parse({"training": {"learning_rate": section}}).training.learning_rate, 40)
    np.testing.assert_allclose([made(0), made(20), made(40)], values, rtol=1e-6, atol=1e-9)


def test_steps_are_those_of_all_stages(prepared):
    assert prepared.epochs == 4 and prepared.steps == 4 * (360 // 64)
    more = config.parse(SMALL, ["training.rounds=3"])
    assert prepare(more, prepared.dataset).steps == (1 + 3 * 2 + 1) * (360 // 64)


def test_weight_decay_reaches_the_weights_only(prepared):
    experiment = config.parse(SMALL, ["training.optimizer=adamw", "training.weight_decay=0.5"])
    tx = config.optimizer(experiment, prepared.compression, 10)
    params = prepared.compression.attach(prepared.inst.model.params)
    zero = jax.tree.map(np.zeros_like, params)
    stats = {"range": {n: (np.zeros(s.shape), np.ones(s.shape)) for n, s in prepared.inst.sites.items()}}
    updates, _ = tx.update(zero, tx.init(params), params, stage=np.int32(1), stats=stats)
    assert any(np.any(v) for v in jax.tree.leaves(updates.model))
    assert not any(np.any(v) for v in jax.tree.leaves(updates.extra))


def test_rules_keep_the_rest_of_their_section(prepared):
    rules = [{"where": "Dense_1/.*", "f": 3}, {"where": "Dense_0/input", "overflow": "SAT"}]
    raw = {**SMALL, "quantization": {"method": "fixed", "weights": {"f": 5}, "activations": {"f": 4, "i": 1}, "rules": rules}}
    made = config.compression(config.parse({**raw, "pruning": None}), prepared.inst)
    params = made.attach(prepared.inst.model.params)
    sites = made.apply(params, made.init(params))[0].sites
    assert {name: (float(np.max(s.i)), float(np.max(s.f)), s.overflow) for name, s in sites.items()} == {
        "Dense_0/kernel": (0, 5, "SAT"),
        "Dense_0/bias": (0, 5, "SAT"),
        "Dense_0/input": (1, 4, "SAT"),
        "Dense_1/kernel": (0, 3, "SAT"),
        "Dense_1/bias": (0, 3, "SAT"),
        "Dense_1/input": (1, 3, "SAT"),
    }


def test_rules_and_selections_that_match_nothing(prepared):
    rule = {"quantization": {"method": "hgq", "rules": [{"where": "Dense_0/kernal", "f": 3}]}}
    with pytest.raises(pq.ConfigError, match=r"quantization.rules.0.where is 'Dense_0/kernal'.*did you mean 'Dense_0/kernel'"):
        config.compression(config.parse(rule), prepared.inst)
    with pytest.raises(pq.TransformError, match="matches no parameter"):
        config.compression(config.parse({"pruning": {"method": "pdp", "where": "Conv.*"}}), prepared.inst)
    with pytest.raises(pq.ConfigError, match="matches no kernel, only Dense_0/bias"):
        config.compression(config.parse({"pruning": {"method": "pdp", "where": "Dense_0/bias"}}), prepared.inst)


def test_pruning_where_takes_kernels_only(prepared):
    made = config.compression(config.parse({"pruning": {"method": "pdp", "where": "Dense_1/.*"}}), prepared.inst)
    params = made.attach(prepared.inst.model.params)
    assert set(made.apply(params, made.init(params))[0].masks) == {"Dense_1/kernel"}


def test_order_is_the_order_of_the_chain(prepared):
    for order, name in (("prune_then_quantize", "chain(dst, hgq)"), ("quantize_then_prune", "chain(hgq, dst)")):
        assert config.compression(config.parse({**SMALL, "order": order}), prepared.inst).name == name
    assert config.compression(config.parse({}), prepared.inst) is None


# --- models, data and files by name -----------------------------------------------------------------------------------

PROJECT = """
import flax.linen as nn
import numpy as np
import pquant_jax as pq

WIDTH = {width}

def build(outputs, seed, x, depth: int = 1):
    params = {{"w": np.full((x.shape[1], outputs), seed + depth, np.float32)}}
    return pq.from_function(lambda p, x: x @ p["w"], params)

def needs(size):
    return nn.Dense(size)

def load():
    rng = np.random.default_rng(0)
    return {{"x": rng.normal(size=(200, WIDTH)), "y": rng.integers(0, 3, 200)}}

def hinge(prediction, target):
    return abs(prediction[:, 0] - target)

near = pq.Metric("near", hinge, higher_is_better=False)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "own_project.py").write_text(PROJECT.format(width=7))
    return tmp_path


def test_an_own_model_gets_outputs_seed_and_x(project):
    experiment = config.parse({"model": {"build": "own_project:build", "args": {"depth": 4}}, "seed": 10})
    with config.importing([str(project)]):
        made = config.model(experiment, np.zeros((2, 6), np.float32), 3)
    assert made.params["w"].shape == (6, 3) and float(made.params["w"][0, 0]) == 14


@pytest.mark.parametrize(
    "model, message",
    [
        ("mpl", "model is 'mpl', expected a model of the zoo or 'package.module:function'; did you mean 'mlp'"),
        ("nowhere.at_all:build", "can't be imported: No module named 'nowhere'"),
        ("own_project:bild", "'own_project' has no 'bild'; did you mean 'build'"),
        ("own_project:WIDTH", "is a int, expected a function"),
        ("own_project:needs", "needs 'size'; give it under model.args"),
        ({"build": "own_project:build", "args": {"dept": 1}}, "takes no 'dept'; did you mean 'depth'"),
        ({"build": "mlp", "args": {"hiden": [1]}}, "takes no 'hiden'; did you mean 'hidden'"),
        ("own project:build", "expected 'package.module:function'"),
    ],
)
def test_models_that_do_not_exist(project, model, message):
    with config.importing([str(project)]), pytest.raises(pq.ConfigError) as caught:
        config.model(config.parse({"model": model}), np.zeros((2, 6), np.float32), 3)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_own_data_loss_and_metric(project):
    raw = {"data": "own_project:load", "loss": "own_project:hinge", "metric": "own_project:near"}
    with config.importing([str(project)]):
        made = config.dataset(config.parse(raw))
        assert made.train.x.shape == (144, 7) and made.classes == ("0", "1", "2")
        np.testing.assert_array_equal(config.loss(config.parse(raw))(np.ones((2, 1)), np.zeros(2)), [1, 1])
        assert config.metric(config.parse(raw)).name == "near"
        with pytest.raises(pq.ConfigError, match="is a function, expected pq.Metric"):
            config.metric(config.parse({"metric": "own_project:hinge"}))
    with pytest.raises(pq.ConfigError, match="did you mean 'accuracy'"):
        config.metric(config.parse({"metric": "acuracy"}))


def test_importing_restores_the_path_and_forgets_what_it_found(tmp_path):
    before, widths = list(sys.path), []
    for width in (3, 5):  # two projects whose module has the same name
        folder = tmp_path / str(width)
        folder.mkdir()
        (folder / "own_project.py").write_text(PROJECT.format(width=width))
        with config.importing([str(folder)]):
            widths.append(config.named("own_project:WIDTH", "model"))
        assert sys.path == before and "own_project" not in sys.modules
    assert widths == [3, 5]


def test_importing_restores_the_path_after_an_error(tmp_path):
    before = list(sys.path)
    with pytest.raises(pq.ConfigError), config.importing([str(tmp_path)]):
        config.named("nowhere:f", "loss")
    assert sys.path == before


def test_paths_are_looked_for_beside_the_configuration(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / "src").mkdir(parents=True)
    np.savez(folder / "mine.npz", x=np.zeros((20, 2)), y=np.arange(20) % 2)
    (folder / "a.yaml").write_text("data: mine.npz\nfolders: [src]\ntraining: {init: nowhere.npz}\n")
    monkeypatch.chdir(tmp_path)
    read = config.load("project/a.yaml")
    assert read.data.source == str(folder / "mine.npz")
    assert read.folders == [str(folder), str(folder / "src")]
    assert read.training.init == str(tmp_path / "nowhere.npz"), "a file that is nowhere is named as in the current directory"


def test_a_file_name_becomes_a_run_name(tmp_path):
    for file, name in (("my run (2).yaml", "my_run__2_"), ("_a.b.yaml", "a.b"), ("-.yaml", "run")):
        (tmp_path / file).write_text("seed: 1")
        assert config.load(tmp_path / file).name == name


def test_starting_parameters(prepared, tmp_path):
    x, path = np.zeros((2, 16), np.float32), tmp_path / "start.npz"
    leaves = {n: np.full(np.shape(v), 0.5, np.float32) for n, v in _tree.flatten(prepared.inst.model.params).items()}
    experiment = config.parse({**SMALL, "training": {"init": str(path)}})
    for prefix in ("", "value/"):
        np.savez(path, **{prefix + n: v for n, v in leaves.items()})
        assert all(np.all(v == 0.5) for v in jax.tree.leaves(config.model(experiment, x, 5).params))
    coded = {f"codes/{n}": np.full(v.shape, 3, np.int32) for n, v in leaves.items()}
    np.savez(path, **coded, **{f"f/{n}": np.full(v.shape, 2, np.int32) for n, v in leaves.items()})
    assert all(np.all(v == 0.75) for v in jax.tree.leaves(config.model(experiment, x, 5).params))
    assert not any(np.all(v == 0.75) for v in jax.tree.leaves(config.model(experiment, x, 5, trained=False).params))


def test_starting_parameters_that_do_not_fit(prepared, tmp_path):
    x, path = np.zeros((2, 16), np.float32), tmp_path / "start.npz"
    experiment = config.parse({**SMALL, "training": {"init": str(path)}})
    with pytest.raises(pq.ConfigError, match="can't be read as an .npz"):
        config.model(experiment, x, 5)
    leaves = {n: np.asarray(v) for n, v in _tree.flatten(prepared.inst.model.params).items()}
    np.savez(path, **{n.replace("Dense_0/kernel", "Dense_0/kernels"): v for n, v in leaves.items()})
    with pytest.raises(pq.ConfigError, match="lacks the parameter 'Dense_0/kernel'; did you mean 'Dense_0/kernels'"):
        config.model(experiment, x, 5)
    np.savez(path, **{**leaves, "Dense_0/kernel": np.zeros((16, 9))})
    with pytest.raises(pq.ConfigError, match=r"'Dense_0/kernel' has shape \(16, 9\), the model's \(16, 3\)"):
        config.model(experiment, x, 5)


def test_batch_statistics_come_with_the_starting_parameters(tmp_path):
    x, path = np.zeros((2, 16), np.float32), tmp_path / "start.npz"
    raw = {**SMALL, "model": {"build": "mlp", "args": {"hidden": [3], "batch_norm": True}}}
    made = config.model(config.parse(raw), x, 5)
    arrays = {n: np.asarray(v) for n, v in _tree.flatten(made.params).items()}
    arrays |= {f"state/{n}": np.full(np.shape(v), 7, np.float32) for n, v in _tree.flatten(made.state).items()}
    np.savez(path, **arrays)
    started = config.model(config.parse({**raw, "training": {"init": str(path)}}), x, 5)
    assert all(np.all(v == 7) for v in jax.tree.leaves(started.state))


def test_data_are_cut_in_proportion():
    made = config.dataset(config.parse({"data": {"source": "jets", "n": 1000}}))
    assert [len(s.y) for s in (made.train, made.val, made.test)] == [720, 80, 200]
    assert made.digest != config.dataset(config.parse({"data": {"source": "jets", "n": 1001}})).digest
    with pytest.raises(pq.DataError, match="data.n is 50000, but jets has 40000 samples"):
        config.dataset(config.parse({"data": {"source": "jets", "n": 50_000}}))
    with pytest.raises(pq.DataError, match="leaves a split of jets empty"):
        config.dataset(config.parse({"data": {"source": "jets", "n": 3}}))
