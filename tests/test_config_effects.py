"""No key of a configuration is without an effect: a table with another value for each, and what it changes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
from pydantic import BaseModel

import pquant_jax as pq
from pquant_jax import _tree, config
from pquant_jax.config import _methods, _quantizers
from pquant_jax.config._load import TAGS, _sections, _tag
from pquant_jax.lower import Graph, Node
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.run import _hardware, _training, skips
from pquant_jax.run._files import new_folder
from pquant_jax.run._log import make_log
from pquant_jax.run._prepare import prepare, prepare_data

SMALL = {
    "name": "small",
    "model": {"build": "mlp", "args": {"hidden": [3]}},
    "data": {"source": "jets", "n": 500},
    "training": {"epochs": {"pretrain": 1, "train": 2, "finetune": 1}, "batch_size": 64},
    "pruning": {"method": "dst"},
    "quantization": {"method": "hgq"},
}


@pytest.fixture(scope="module")
def prepared():
    experiment = config.parse(SMALL)
    return prepare(experiment, prepare_data(experiment))


def _leaves(tree: Any) -> list[Any]:
    """A tree as plain values that compare; functions count by name."""
    return [np.asarray(v).tolist() if hasattr(v, "shape") else v for v in jax.tree.leaves(tree)]


def _model(experiment, prepared, **_):
    with config.importing([]):
        return _leaves(config.model(experiment, np.zeros((2, 16), np.float32), 5).params)


def _split(experiment, prepared, **_):
    twice = pq.from_function(lambda p, x: x @ p["a"] + x @ p["b"], {n: np.ones((4, 2), np.float32) for n in "ab"})
    return sorted(config.instrumented(experiment, twice, np.zeros((1, 4), np.float32)).sites)


def _data(experiment, prepared, **_):
    return config.dataset(experiment).digest


def _compression(experiment, prepared, **_):
    with config.importing([]):
        made = config.compression(experiment, prepared.inst)
    params = made.attach(prepared.inst.model.params)
    state = made.init(params)
    view = made.apply(params, state)[0]
    modes = [(n, s.rounding, s.overflow) for n, s in sorted(view.sites.items())]
    return made.name, modes, sorted(view.masks), _leaves((params, state, view))


def _frozen(experiment, prepared, *, tmp_path, **_):
    """What is held still of a model that was quantized to that many fractional bits."""
    for bits in (2, 4):
        held = pq.quantize.fixed(prepared.inst.sites, weights=pq.quantize.Format(i=0, f=bits, k=1))
        params = held.attach(prepared.inst.model.params)
        arrays = pq.train.finalize(held, params, held.init(params), prepared.inst.model.state, inst=prepared.inst)
        pq.save_final(tmp_path / f"found_{bits}.npz", arrays)
    section = experiment.quantization.model_copy(update={"of": str(tmp_path / experiment.quantization.of)})
    made = config.compression(experiment.model_copy(update={"quantization": section, "pruning": None}), prepared.inst)
    return [(name, choice.format) for name, choice in made.formats.items()]


def _every_kind(experiment, prepared, **_):
    """What a quantizer does at every site of a model that has tables and outputs with a format of their own."""
    more = {kind: pq.SiteSpec((3,), kind) for kind in ("table", "output")}
    inst = prepared.inst._replace(sites={**prepared.inst.sites, **more})
    made = config.quantizer(experiment.quantization.model_dump(), inst)
    return [(name, choice.format, choice.moves) for name, choice in made.formats.items()]


def _plainly(value: Any) -> Any:
    return "a function" if callable(value) else value


def _arguments(experiment, prepared, *, monkeypatch, **_):
    """What reaches the factories of pruning methods, metrics and constraints; what that does is tested with them."""
    calls: list[Any] = []

    def recorded(factory, result):
        def call(*args, **arguments):
            calls.append((factory.__name__, [*map(_plainly, args)], {k: _plainly(v) for k, v in sorted(arguments.items())}))
            return result

        return functools.wraps(factory)(call)  # with the signature, from which the arguments are taken

    for name, factory in _methods.METHODS.items():
        monkeypatch.setitem(_methods.METHODS, name, recorded(factory, pq.named(pq.identity(), name)))
    for name, factory in _methods.METRICS.items():
        made = pq.constrain.patterns() if name == "patterns" else pq.constrain.metrics.sparsity()
        monkeypatch.setitem(_methods.METRICS, name, recorded(factory, made))
    monkeypatch.setattr(pq.constrain, "mdmm", recorded(pq.constrain.mdmm, pq.identity()))
    with config.importing([]):
        config.compression(experiment, prepared.inst)
    return calls


def _search(experiment, prepared, *, monkeypatch, **_):
    calls: list[Any] = []
    for name, factory in _methods.SEARCHES.items():
        monkeypatch.setitem(_methods.SEARCHES, name, functools.wraps(factory)(lambda **arguments: calls.append(arguments)))
    config.search(experiment, None, None, None, None)
    return [{k: _plainly(v) for k, v in sorted(arguments.items())} for arguments in calls]


def _stats(prepared) -> dict[str, Any]:
    return {"range": {n: (np.zeros(s.shape), np.ones(s.shape)) for n, s in prepared.inst.sites.items()}}


def _optimizer(experiment, prepared, **_):
    """Two updates of ones, for every kind of parameter."""
    tx = config.optimizer(experiment, prepared.compression, 4)
    params = prepared.compression.attach(jax.tree.map(np.ones_like, prepared.inst.model.params))
    state, gradient = tx.init(params), jax.tree.map(np.ones_like, params)
    for _ in range(2):
        updates, state = tx.update(gradient, state, params, stage=np.int32(1), stats=_stats(prepared))
        params = optax.apply_updates(params, updates)
    return _leaves(params)


def _multiplier(experiment, prepared, **_):
    """Two updates of ones of a constraint's multiplier."""
    with config.importing([]):
        made = config.compression(experiment, prepared.inst)
    tx, params = config.optimizer(experiment, made, 4), made.attach(prepared.inst.model.params)
    state, gradient = tx.init(params), jax.tree.map(np.ones_like, params)
    for _ in range(2):
        updates, state = tx.update(gradient, state, params, stage=np.int32(1), stats=_stats(prepared))
        params = optax.apply_updates(params, updates)
    view = made.apply(params, pq.state_of(state))[0]
    return _leaves(params.extra), float(made.penalty(params, pq.state_of(state), view))


def _plan(experiment, prepared, **_):
    return pq.train.schedule(config.plan(experiment))


def _fit(experiment, prepared, *, monkeypatch, tmp_path):
    """The arguments that reach `fit`."""
    seen: dict[str, Any] = {}

    def fit(inst, data, **arguments):
        plain = ("batch_size", "seed", "shuffle", "checkpoint_every", "plan")
        seen.update({k: arguments[k] for k in plain} | {k: arguments[k].__class__ for k in ("loss",)})
        return pq.Result(None, None, [{}] * prepared.epochs, {}, 1, 0.0)

    monkeypatch.setattr(pq.train, "fit", fit)
    _training.fit_compressed(prepared._replace(experiment=experiment), tmp_path, make_log(quiet=True), resume=False)
    return seen


def _task(experiment, prepared, **_):
    return config.loss(experiment).__name__, config.metric(experiment).name


def _port(experiment, prepared, **_):
    return config.input_spec(experiment)


def _skipped(experiment, prepared, **_):
    return skips(experiment)


def _rtl(experiment, prepared, *, monkeypatch, tmp_path):
    """What is asked of the written project and of `verify`."""
    from pquant_jax.lower import project
    from pquant_jax.lower.backends import alkaid, da4ml

    calls: list[Any] = []
    info = RTLInfo("m", tmp_path, tmp_path, "verilog", 0, 0, 1, 0, 0.0, 0.0, np.zeros((3, 1)), np.zeros((3, 1)))

    def write_project(graph, comb, where, *, vectors, backend, **options):
        calls.append((where.name, len(vectors), backend.__name__, sorted(options.items())))
        return project.ProjectInfo("m", where, {"verilog": info}, 1, {})

    for package in (da4ml, alkaid):
        monkeypatch.setattr(package, "to_comb", lambda graph: None)
        monkeypatch.setattr(package, "longest", lambda comb: 100.0)
        monkeypatch.setattr(package, "staged", lambda comb, cutoff: (round(100 / cutoff), 8, 1.0))
    monkeypatch.setattr(project, "write_project", write_project)
    monkeypatch.setattr(
        _hardware,
        "compare",
        lambda *a, vectors, seed, **k: calls.append((vectors, seed)) or dict(mismatches={}, vectors=1, outputs=1),
    )
    (tmp_path / "rtl").mkdir()
    changed = prepared._replace(experiment=experiment)
    graph = Graph((Node("input", (), (3,), dict(k=1, i=1, f=1)),), (0,), (0,))
    _hardware.write_projects(changed, graph, _hardware.netlist(changed, graph), [np.zeros((2, 3))], tmp_path)
    _hardware.prove(_hardware.Job(changed, None, None, tmp_path, make_log(quiet=True), {"skipped": {}}), None, None, {})
    return calls


def _registers(experiment, prepared, *, monkeypatch, tmp_path):
    """How weights are traced, and what is asked of the register file."""
    from pquant_jax import robust
    from pquant_jax.lower import registers
    from pquant_jax.lower.backends import da4ml

    calls: list[Any] = []
    monkeypatch.setattr(da4ml, "write_rtl", lambda comb, where, **k: None)
    monkeypatch.setattr(robust, "bit_sensitivity", lambda *a, **k: SimpleNamespace(score={}))
    monkeypatch.setattr(registers, "register_map", lambda graph, info, word: word)
    monkeypatch.setattr(registers, "most_sensitive", lambda regs, scores, percent: percent)
    made = RTLInfo("m", tmp_path, tmp_path, "verilog", 0, 0, 1, 0, 0.0, 0.0, np.zeros((3, 1)), np.zeros((3, 1)))
    regs = SimpleNamespace(map=SimpleNamespace(words=1, word=8), voted=np.zeros(8), netlist=made, top="top")
    monkeypatch.setattr(registers, "write_registers", lambda *a, word, voted, **k: calls.append((word, voted)) or regs)
    found = _hardware.Netlist(None, SimpleNamespace(cutoff=5.0))
    changed = prepared._replace(experiment=experiment)
    skipped = {"skipped": {"simulation": ""}, "mismatches": {}}
    job = _hardware.Job(changed, None, None, tmp_path, make_log(quiet=True), skipped)
    _hardware.register_file(job, None, found, [], [])
    return calls


def _weights(experiment, prepared, *, monkeypatch, tmp_path):
    """How the model is traced."""
    found: list[str] = []

    def trace(*args, weights):
        found.append(weights)
        raise pq.LoweringError("enough")

    monkeypatch.setattr(_hardware, "trace", trace)
    with pytest.raises(pq.LoweringError, match="enough"):
        changed = prepared._replace(experiment=experiment)
        _hardware.lower_model(_hardware.Job(changed, None, None, tmp_path, make_log(quiet=True), {}))
    return found


def _exports(experiment, prepared, *, monkeypatch, tmp_path):
    """What is asked of hls4ml and of the ONNX writer."""
    from pquant_jax.lower.backends import hls4ml, onnx
    from pquant_jax.run import _exports as exports

    calls: list[Any] = []
    model = hls4ml.HLSModel(Graph((), (), ()), None, (), (), {}, tmp_path)
    monkeypatch.setattr(hls4ml, "to_hls", lambda graph, folder, **k: calls.append(sorted(k.items())) or model)
    for verb in ("write", "compile"):
        monkeypatch.setattr(hls4ml, verb, lambda m, verb=verb, **k: calls.append(verb) or m)
    monkeypatch.setattr(hls4ml, "predict", lambda m, x: np.zeros((2, 0)))
    made = SimpleNamespace(graph=SimpleNamespace(node=()))
    for kind in exports.ENGINES:
        monkeypatch.setattr(onnx, f"to_{kind}", lambda graph, path, kind=kind, **k: calls.append(kind) or made)
    monkeypatch.setattr(onnx, "execute", lambda m, x, **k: np.zeros((2, 0)))
    monkeypatch.setattr(exports, "emulate", lambda graph, x: [np.zeros((2, 0))])
    changed = prepared._replace(experiment=experiment)
    exports.export(changed, None, [np.zeros((2, 3))], tmp_path, make_log(quiet=True), {"mismatches": {}})
    return calls


def _name(experiment, prepared, *, tmp_path, **_):
    return new_folder(tmp_path, experiment.name, overwrite=False)


def _folders(experiment, prepared, *, tmp_path, **_):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "only_here.py").write_text("f = 1")
    with config.importing([str(tmp_path / f) for f in experiment.folders]):
        try:
            return config.named("only_here:f", "model")
        except pq.ConfigError:
            return None


PDP = {"method": "pdp"}
HLS = ["hardware.hls=Vitis"]
SPARSITY = {"metric": "sparsity", "kind": ">=", "target": 0.5}
OWN = """
import flax.linen as nn
import jax.numpy as jnp

def build(outputs):
    return nn.Dense(outputs)

def single(params, view):
    return sum(jnp.mean(jnp.abs(p["kernel"])) for p in params.model.values())

def double(params, view):
    return 2 * single(params, view)
"""
# groups.KEY: (another value, the groups it acts in)
GROUPS: dict[str, tuple[Any, Any]] = {
    "name": ("in", "out"),
    "nm.n": (2, {"nm": {"n": 1, "m": 4}}),
    "nm.m": (8, {"nm": {"n": 1, "m": 4}}),
    "block.h": (4, {"block": {"h": 2, "w": 2}}),
    "block.w": (4, {"block": {"h": 2, "w": 2}}),
    "cross.h": (4, {"cross": {"w": 2}}),
    "cross.w": (4, {"cross": {"w": 2}}),
    "reuse": (8, {"reuse": 4}),
    "heads": (8, {"heads": 4}),
}
# by key: another value of pruning methods and of metrics
METHODS = {
    "threshold": 0.3,
    "target": 0.4,
    "begin": 0.5,
    "end": 3,
    "period": 2,
    "alpha": 0.25,
    "threshold_init": -3,
    "power": 1,
    "granularity": "layer",
    "alpha_reset_epoch": 7,
    "backward_sparsity": 0.5,
    "gain": 1,
    "decay": 1e-3,
    "budget": "global",
    "final_temperature": 9,
    "max_sparsity": 0.5,
    "sparsity": {"Dense_0/.*": 0.5},
    "epsilon": 0.3,
    "temperature": 0.3,
    "compat": "pquantml",
}
METRICS = {
    "epsilon": 0.2,
    "mode": "smooth",
    "alpha": 3,
    "of": "view",
    "per": "layer",
    "where": "Dense_0/.*",
    "n": 2,
    "m": 8,
    "reuse": 8,
    "precision": 18,
    "bram_width": 72,
    "unit": 100,
    "num_patterns": 3,
    "beta": 0.5,
    "distance": "cosine",
}
SEARCHES = {
    "ratio": 0.1,
    "ebops": 1000,
    "bops": 1000,
    "size": 1000,
    "latency": 9,
    "widths": [4, 3],
    "sparsities": [0.5],
    "biases": 6,
    "limit": 1,
    "greedy": False,
    "approximate": False,
    "strength": 0.5,
    "samples": 99,
    "batch_size": 33,
    "probes": 3,
    "compat": "pquantml",
    "where": "Dense_0/.*",
}
NEEDED = {"group_sparsity": {"groups": "out"}, "dsp_sparsity": {"reuse": 4}, "bram_sparsity": {"reuse": 4, "precision": 9},
          "nm_violation": {"n": 1, "m": 4}, "patterns": {"block": {"h": 1, "w": 2}}}  # fmt: skip


def _methods_table() -> dict[str, tuple[Any, Any, list[str]]]:
    """Every key of every pruning method and metric, from the sections themselves."""
    table: dict[str, tuple[Any, Any, list[str]]] = {}
    for name, section in _methods.SECTIONS.items():
        setting = f"pruning={json.dumps({'method': name})}"
        for key in sorted(section.model_fields.keys() & METHODS.keys()):
            table[f"pruning.{name}.{key}"] = (METHODS[key], _arguments, [setting])
        table[f"pruning.{name}.where"] = ("Dense_0/kernel", _compression, [setting, *["pruning.target=0.5"] * (name == "ap")])
        for key, (value, groups) in GROUPS.items() if "groups" in section.model_fields else ():
            table[f"pruning.{name}.groups.{key}"] = (
                value,
                _arguments,
                [f"pruning={json.dumps({'method': name, 'groups': groups})}"],
            )
    for name, section in _methods.MEASURES.items():
        metric = {"name": name, **NEEDED.get(name, {})}
        setting = f"constraints={json.dumps([{**SPARSITY, 'metric': metric}])}"
        for key in sorted(section.model_fields.keys() & METRICS.keys()):
            table[f"constraints.metric.{name}.{key}"] = (METRICS[key], _arguments, [setting])
        for key in ("h", "w") if name == "patterns" else ():
            table[f"constraints.metric.patterns.block.{key}"] = (4, _arguments, [setting])
        for key, (value, groups) in GROUPS.items() if "groups" in section.model_fields else ():
            metric = {"name": name, "groups": groups}
            setting = f"constraints={json.dumps([{**SPARSITY, 'metric': metric}])}"
            table[f"constraints.metric.{name}.groups.{key}"] = (value, _arguments, [setting])
    for name, section in _methods.FOUND.items():
        setting = ["pruning=null", f"search={json.dumps({'method': name})}"]
        for key in sorted(section.model_fields.keys() & SEARCHES.keys()):
            table[f"search.{name}.{key}"] = (SEARCHES[key], _search, setting)
        table[f"search.{name}.activations"] = ([4, 6] if name == "hawq" else 6, _search, setting)
    return table


FIXED = {"method": "fixed"}
RULE = {"where": "Dense_0/.*", "f": 4}
FORMAT = {"i": 1, "f": 3, "k": 0, "rounding": "TRN", "overflow": "SAT", "granularity": "tensor", "trainable": False}
SECTIONS = ("weights", "biases", "activations", "tables", "outputs")
HELD = f"constraints=[{json.dumps({**SPARSITY, 'metric': 'effect_net:single', 'target': 9})}]"


def _formats_table() -> dict[str, tuple[Any, Any, list[str]]]:
    """Every key of every format and rule of every quantizer."""
    table: dict[str, tuple[Any, Any, list[str]]] = {}
    for section in _sections(_quantizers.Quantization):
        method = _tag(section)
        for name in (n for n in SECTIONS if n in section.model_fields):
            bits = _sections(section.model_fields[name].annotation)[0]
            default = config.parse({"quantization": {"method": method, name: {}}}).quantization
            given = getattr(default, name)
            values = {**FORMAT, "i": 9, "overflow": "SAT" if given.overflow == "WRAP" else "WRAP"}
            values["granularity"] = [0] if given.granularity == "tensor" else "tensor"
            setting = [f"quantization={json.dumps({'method': method})}"]
            table |= {f"quantization.{method}.{name}.{key}": (values[key], _every_kind, setting) for key in bits.model_fields}
        if "rules" not in section.model_fields:  # frozen: those of another run
            continue
        setting = [f"quantization={json.dumps({'method': method, 'rules': [RULE]})}"]
        values = {**FORMAT, "where": "Dense_1/.*", "kind": "input", "overflow": "SAT" if method == "hgq" else "WRAP"}
        rule = _sections(section.model_fields["rules"].annotation)[0]
        table |= {f"quantization.{method}.rules.{key}": (values[key], _every_kind, setting) for key in rule.model_fields}
    return table


def _quantizers_table() -> dict[str, tuple[Any, Any, list[str]]]:
    """Every other key of the quantizers but hgq."""
    values = {"decay": 0.5, "compat": "pquantml", "granularity": "tensor", "clip": 2, "threshold": 0.3}
    values |= {"m": 1, "e": 4, "e0": 2, "beta": 0.5, "freeze": False}
    found = "quantization={method: frozen, of: found_4.npz}"
    table: dict[str, tuple[Any, Any, list[str]]] = {"quantization.frozen.of": ("found_2.npz", _frozen, [found])}
    for section in _sections(_quantizers.Quantization):
        method = _tag(section)
        for key in sorted(section.model_fields.keys() & values.keys()) if method != "hgq" else ():
            theirs = key == "compat" and method == "minifloat"  # HGQ2's differ where there is no mantissa
            setting = [f"quantization={json.dumps({'method': method, **({'m': -1} if theirs else {})})}"]
            table[f"quantization.{method}.{key}"] = ("hgq2" if theirs else values[key], _compression, setting)
    return table


RATES = '{"start": 0.02, "end": 0.01, "schedule": "cosine"}'

# key: (another value, what it changes, the configuration it acts in)
EFFECTS: dict[str, tuple[Any, Any, list[str]]] = {
    "name": ("other", _name, []),
    "seed": (3, _model, []),
    "folders": (["beside"], _folders, []),
    "model.build": ("effect_net:build", _model, ["model.args={}"]),
    "model.args": ({"hidden": [2]}, _model, []),
    "model.split": ([".*input.*"], _split, []),
    "data.source": ("test_data.npz", _data, ["data.n=null"]),
    "data.n": (600, _data, []),
    "data.standardise": (True, _data, ["data={source: test_data.npz, n: null}"]),
    "task": ("regression", _task, ["loss=null", "metric=null"]),
    "loss": ("absolute_error", _task, []),
    "metric": ("mae", _task, []),
    "input.k": (0, _port, []),
    "input.i": (3, _port, []),
    "input.f": (3, _port, []),
    "training.epochs.pretrain": (3, _plan, []),
    "training.epochs.train": (3, _plan, []),
    "training.epochs.finetune": (3, _plan, []),
    "training.rounds": (2, _plan, []),
    "training.rewind": ("every-round", _plan, []),
    "training.save_epoch": (1, _plan, ["training.rewind=every-round"]),
    "training.batch_size": (32, _fit, []),
    "training.shuffle": (False, _fit, []),
    "training.optimizer": ("sgd", _optimizer, []),
    **{f"training.{kind}.start": (0.5, _optimizer, [f"training.{kind}=0.1"]) for kind in
       ("learning_rate", "bits_learning_rate", "threshold_learning_rate")},
    **{f"training.{kind}.end": (0.09, _optimizer, [f"training.{kind}={RATES}"]) for kind in
       ("learning_rate", "bits_learning_rate", "threshold_learning_rate")},
    **{f"training.{kind}.schedule": ("linear", _optimizer, [f"training.{kind}={RATES}"]) for kind in
       ("learning_rate", "bits_learning_rate", "threshold_learning_rate")},
    "training.weight_decay": (0.5, _optimizer, ["training.optimizer=adamw"]),
    "training.init": ("start.npz", _model, []),
    "training.checkpoint_every": (7, _fit, []),
    "training.float_baseline": (False, _skipped, []),
    "training.multiplier_learning_rate.start": (0.5, _multiplier, [HELD]),
    **{f"training.multiplier_learning_rate.{key}": (value, _multiplier, [HELD, f"training.multiplier_learning_rate={RATES}"])
       for key, value in {"end": 0.005, "schedule": "linear"}.items()},
    "training.pnorm_decay.p": (0.5, _optimizer, ["training.pnorm_decay={strength: 1}"]),
    "training.pnorm_decay.strength": (0.5, _optimizer, ["training.pnorm_decay={strength: 1}"]),
    **_methods_table(),
    **{f"constraints.{key}": (value, _arguments, [f"constraints=[{json.dumps(SPARSITY)}]"]) for key, value in
       {"kind": "==", "target": 0.7, "scale": 3, "damping": 3, "initial": 2, "prunes": False, "compat": "pquantml",
        "rate": 1}.items()},
    "constraints.metric.own.function": ("effect_net:double", _multiplier, [HELD]),
    "quantization.hgq.beta": (0.5, _compression, ["quantization.beta_end=0.1"]),
    "quantization.hgq.beta_end": (0.5, _compression, []),
    "quantization.hgq.gamma": (0.5, _compression, []),
    "quantization.hgq.decay": (0.5, _compression, []),
    "quantization.hgq.freeze": (False, _compression, []),
    **_formats_table(),
    **_quantizers_table(),
    "order": ("quantize_then_prune", _compression, []),
    "hardware.lower": (False, _skipped, []),
    "hardware.backend": ("alkaid", _rtl, []),
    "hardware.weights": ("ports", _weights, []),
    "hardware.word": (16, _registers, ["hardware.weights=registers"]),
    "hardware.tmr": (12.5, _registers, ["hardware.weights=registers"]),
    "hardware.latency_ns": (400.0, _rtl, []),
    "hardware.latency_cutoff": (9, _rtl, []),
    "hardware.vhdl": (False, _rtl, []),
    "hardware.part": ("xcku115", _rtl, []),
    "hardware.clock_period": (2.5, _rtl, []),
    "hardware.simulate": (False, _skipped, []),
    "hardware.synthesize": (False, _skipped, []),
    "hardware.vectors": (77, _rtl, []),
    "hardware.hls.backend": ("Vivado", _exports, HLS),
    "hardware.hls.io_type": ("io_stream", _exports, HLS),
    "hardware.hls.strategy": ("resource", _exports, HLS),
    "hardware.hls.reuse_factor": (4, _exports, HLS),
    "hardware.hls.layers": ({"Dense_0": {"ReuseFactor": 2}}, _exports, HLS),
    "hardware.hls.config": ({"Model": {"ReuseFactor": 2}}, _exports, HLS),
    "hardware.hls.part": ("xcku115-flvb2104-2-i", _exports, HLS),
    "hardware.hls.simulate": (False, _exports, HLS),
    "hardware.onnx": (["qonnx", "qdq"], _exports, []),
}  # fmt: skip


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that holds a value; the method stands in the path where a section has several."""
    found = []
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if name in TAGS and _tag(section):
            continue
        if not inner:
            found.append(prefix + name)
        for s in inner:
            found += _keys(s, f"{prefix}{name}." + (f"{_tag(s)}." if _tag(s) else ""))
    return found


def test_the_table_of_effects_has_every_key():
    assert set(_keys(config.Experiment)) == set(EFFECTS)


@pytest.mark.parametrize("key", EFFECTS)
def test_every_key_changes_something(key, prepared, tmp_path, monkeypatch):
    value, effect, setting = EFFECTS[key]
    parts = key.split(".")
    parts = [
        p
        for n, p in enumerate(parts)
        if (parts[0], n) not in (("pruning", 1), ("quantization", 1), ("search", 1), ("constraints", 2))
    ]
    path = ".".join(p + ".0" if p in ("rules", "constraints") else p for p in parts)
    monkeypatch.chdir(tmp_path)
    Path("effect_net.py").write_text(OWN)
    rng = np.random.default_rng(0)
    np.savez("test_data.npz", x=rng.normal(3, 2, (100, 16)), y=np.arange(100) % 5)
    np.savez("start.npz", **{n: np.ones_like(v) for n, v in _tree.flatten(prepared.inst.model.params).items()})
    before = config.parse(SMALL, setting)
    after = config.parse(SMALL, [*setting, f"{path}={json.dumps(value)}"])
    assert before != after, "the new value is the old one"
    seen = []
    for n, experiment in enumerate((before, after)):
        folder = tmp_path / f"try{n}"
        folder.mkdir()
        with monkeypatch.context() as patch:
            seen.append(effect(experiment, prepared, monkeypatch=patch, tmp_path=folder))
    strip = [str(s).replace("try0", "try").replace("try1", "try") for s in seen]
    assert strip[0] != strip[1]
