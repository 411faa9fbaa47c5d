"""What both RTL backends must do: every format and mode, ports without bits, whole folders, clear refusals."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from .netlists import compare, model
from .random_graphs import const, node

BACKENDS = {"da4ml": da4ml, "alkaid": alkaid}
STAGES = {"da4ml": "net_stage*", "alkaid": "logic*"}


@pytest.fixture(params=BACKENDS)
def package(request):
    return request.param


@pytest.fixture
def backend(package):
    return BACKENDS[package]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_one_quantizer_on_every_code(backend, rounding, overflow):
    """Signed and unsigned, negated or not, every small format, zero width and negative i and f included."""
    forms = [(k, i, f) for k in (0, 1) for i in range(-2, 4) for f in range(-2, 4)]
    k, i, f = (np.array(v, np.int64) for v in zip(*forms, strict=True))
    for source in ((0, 1, 2), (1, 2, 1), (1, -1, 3), (0, 3, -1)):
        nodes: list[Node] = []
        x = node(nodes, "input", (), (1,), k=source[0], i=source[1], f=source[2])
        wide = node(nodes, "take", (x,), (len(forms),), index=np.zeros(len(forms), np.int64))
        signs = (wide, node(nodes, "neg", (wide,)))
        at = {"k": k, "i": i, "f": f, "rounding": rounding, "overflow": overflow}
        outputs = tuple(node(nodes, "quantize", (s,), **at) for s in signs)
        graph = validate(Graph(tuple(nodes), (x,), outputs))
        codes = np.arange(-source[0] * 2 ** (source[1] + source[2]), 2 ** (source[1] + source[2]))
        values = np.ldexp(codes.astype(float), -source[2])[:, None]
        np.testing.assert_array_equal(backend.predict(backend.to_comb(graph), values), flatten_batch(emulate(graph, [values])))


def test_constants_unused_inputs_and_missing_bits(backend, tmp_path):
    rng = np.random.default_rng(8)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=2, f=2)
    nothing = node(nodes, "input", (), (2,), k=1, i=-2, f=1)  # a port without bits
    first = node(nodes, "take", (x,), (2,), index=np.array([0, -1]))  # elements 1 and 2 of x are never used
    absent = node(nodes, "add", (nothing, const(nodes, [-1.5, 2.0])))
    size = node(nodes, "abs", (absent,))
    constant = const(nodes, [[-0.75, 0.0]])
    graph = validate(Graph(tuple(nodes), (x, nothing), (first, absent, size, constant)))
    for outputs in ((*graph.outputs, x), graph.outputs, (constant,), (nothing, size)):
        compare(backend, graph._replace(outputs=outputs), rng)
    info = backend.write_rtl(backend.to_comb(graph), tmp_path / "net", name="net")
    assert info.inp_kifs.sum(0).tolist() == [5, 0, 0, 0, 0]


@pytest.mark.parametrize("flavor", ["verilog", "vhdl"])
def test_written_project(package, backend, flavor, tmp_path):
    comb = backend.to_comb(model(np.random.default_rng(11)))
    suffix = {"verilog": ".v", "vhdl": ".vhd"}[flavor]
    flat = backend.write_rtl(comb, tmp_path / "a" / "flat", name="net", flavor=flavor)
    assert (flat.stages, flat.latency_cycles, flat.reg_bits) == (0, 0, 0)
    assert "model_out" in (flat.src / f"net{suffix}").read_text()
    assert not any("clk" in line for line in (flat.src / f"net{suffix}").read_text().splitlines())
    piped = backend.write_rtl(comb, tmp_path / "a" / "piped", name="net", flavor=flavor, latency_cutoff=2)
    assert piped.stages == len(list(piped.src.glob(f"{STAGES[package]}{suffix}"))) > 1
    assert piped.latency_cycles == piped.stages + 1 and piped.ii == 1 and piped.reg_bits > 0
    assert "clk" in (piped.src / f"net{suffix}").read_text()
    assert (package == "alkaid") == (piped.src / f"net_tables{suffix}").exists()  # da4ml writes a memory file per table
    one = backend.write_rtl(comb, tmp_path / "a" / "one", name="net", flavor=flavor, latency_cutoff=1000)
    assert (one.stages, one.latency_cycles) == (1, 2)
    for info in (flat, piped, one):
        assert isinstance(info, RTLInfo) and info.directory.is_absolute() and info.src.is_dir() and info.flavor == flavor
        assert info.inp_kifs.shape == (3, 6) and info.out_kifs.shape == (3, 12)
        assert info.cost > 0 and info.latency_units == max(comb.latency)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["flat", "one", "piped"]


def test_existing_project_is_kept_unless_told(backend, tmp_path):
    comb = backend.to_comb(model(np.random.default_rng(12)))
    target = tmp_path / "net"
    backend.write_rtl(comb, target, name="net")
    (target / "mine.txt").write_text("precious")
    with pytest.raises(LoweringError, match="exists; pass overwrite=True"):
        backend.write_rtl(comb, target, name="net")
    assert (target / "mine.txt").exists()
    backend.write_rtl(comb, target, name="other", overwrite=True)
    assert (target / "src" / "other.v").exists() and not (target / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_failed_write_leaves_nothing(package, backend, tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        raise AssertionError("unexpected shift")

    monkeypatch.setattr(importlib.import_module(f"{package}.codegen").RTLModel, "write", fail)
    with pytest.raises(LoweringError, match=rf"{package} failed while writing RTL \(AssertionError: unexpected shift\)"):
        backend.write_rtl(backend.to_comb(model(np.random.default_rng(13))), tmp_path / "net", name="net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "options", "words"),
    [
        *(
            (package, options, words)
            for package in BACKENDS
            for options, words in (
                ({"name": "9net"}, "name is '9net'"),
                ({"name": "mux"}, "none of binop"),
                ({"name": "net", "flavor": "verilo"}, "did you mean 'verilog'"),
            )
        ),
        ("alkaid", {"name": "ternary_adder"}, "none of binop"),
        ("alkaid", {"name": "logic12"}, "alkaid names modules beside it so"),
    ],
)
def test_bad_names_and_flavors(package, options, words, tmp_path):
    backend = BACKENDS[package]
    with pytest.raises(LoweringError, match=words):
        backend.write_rtl(backend.to_comb(model(np.random.default_rng(13))), tmp_path / "net", **options)
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_of_values_is_an_error(backend):
    with pytest.raises(LoweringError, match="has 6 input values per sample, got 5"):
        backend.predict(backend.to_comb(model(np.random.default_rng(14))), np.zeros((3, 5)))
