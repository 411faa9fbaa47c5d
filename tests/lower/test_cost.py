"""Hardware by layer, and the fit of cells to it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower import cost
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.emulate import emulate, port_grid, trace_values
from pquant_jax.lower.ir import Graph, Node, label, validate
from pquant_jax.lower.synth import missing_tools, synth

from .random_graphs import const, dense, node, port, quantized, random_graph, table

BACKENDS = {"da4ml": da4ml, "alkaid": alkaid}


def model(rng: np.random.Generator, sizes: tuple[int, ...] = (5, 4), name: str = "Dense") -> Graph:
    """Dense layers NAME_0, NAME_1, ... behind a port; the outputs of all of them are outputs."""
    nodes: list[Node] = []
    outputs: list[int] = []
    x = y = port(nodes, (6,), rng)
    for j, size in enumerate(sizes):
        y = quantized(nodes, y, rng, ("RND", "SAT"), name=f"{name}_{j}/input")
        y = dense(nodes, y, size, rng, ("RND", "SAT"))
        nodes[y] = Node("quantize", nodes[y].inputs, nodes[y].shape, nodes[y].attrs, f"{name}_{j}/output")
        outputs.append(y)
    return validate(Graph(tuple(nodes), (x,), tuple(outputs)))


@pytest.mark.parametrize("kind", ["mixed", "table", "product"])
def test_layers_hold_every_operation_of_da4ml_once(kind):
    rng = np.random.default_rng(1)
    for _ in range(5):
        graph = random_graph(rng, kind)
        assert cost.total(cost.layers(graph, da4ml)).cost == pytest.approx(da4ml.to_comb(graph).cost)


def test_a_layer_cut_out_computes_what_it_does_in_the_graph():
    rng = np.random.default_rng(10)
    for graph in (model(rng, (5, 4, 3)), *(random_graph(rng, kind) for kind in ("mixed", "table", "dense") * 3)):
        values = trace_values(graph, port_grid(graph, 100, rng))
        names = cost.layer_names(graph)
        index = {label(graph, j): j for j in range(len(graph.nodes))}  # a port of a part is named after its source
        for name in {own for own, part in zip(names, graph.nodes, strict=True) if part.op != "const"} - {"x"}:
            part = cost.cut_layer(graph, name)
            if not part.inputs:  # all of it is constant
                continue
            inside = [j for j, own in enumerate(names) if own == name and graph.nodes[j].op != "const"]
            read = {i for j, own in enumerate(names) if own != name for i in graph.nodes[j].inputs} | set(graph.outputs)
            found = emulate(part, [values[index[part.nodes[j].name]] for j in part.inputs])
            for got, wanted in zip(found, [values[j] for j in inside if j in read], strict=True):
                np.testing.assert_array_equal(*np.broadcast_arrays(got, wanted))
    with pytest.raises(LoweringError, match="no layer is called 'Dens_0'.*did you mean 'Dense_0'"):
        cost.cut_layer(model(rng), "Dens_0")


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_tools()), reason="; ".join(missing_tools()))
def test_layers_synthesized_alone_are_about_the_whole(tmp_path):
    graph = model(np.random.default_rng(11), (6, 4))
    rows = cost.synthesize_layers(graph, da4ml)
    whole = synth(da4ml.write_rtl(da4ml.to_comb(graph), tmp_path / "net", name="net"))
    assert [row["layer"] for row in rows] == ["Dense_0", "Dense_1"]
    assert sum(row["lut"] for row in rows) == pytest.approx(whole["lut"], rel=0.2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_twice_the_weights_has_more_adders_and_the_other_is_as_before(backend):
    small = {p.name: p for p in cost.layers(model(np.random.default_rng(2), (5, 3)), BACKENDS[backend], keep_dead=True)}
    large = {p.name: p for p in cost.layers(model(np.random.default_rng(2), (5, 9)), BACKENDS[backend], keep_dead=True)}
    assert small["Dense_0"].features["adder"] == large["Dense_0"].features["adder"] > 0
    assert large["Dense_1"].features["adder"] > 1.5 * small["Dense_1"].features["adder"]
    assert math.isnan(small["Dense_0"].cost) == (backend == "alkaid")


def test_features_of_known_operations():
    """x and y of 8 bits: a sum needs 9 bits of adder, less where one is shifted; a product is a DSP, a table 4 x its width."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    y = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    added = node(nodes, "add", (x, y))
    shifted = node(nodes, "add", (x, node(nodes, "mul", (y, const(nodes, [2.0])))))
    product = node(nodes, "mul", (x, y))
    at = {key: np.array([v]) for key, v in (("k", 1), ("i", 3), ("f", 4))}
    q = node(nodes, "quantize", (x,), rounding="TRN", overflow="WRAP", **at)
    entries = table(nodes, q, np.random.default_rng(3), rows=1)
    for output, kind, bits in ((added, "adder", 9), (shifted, "adder", 9), (product, "dsp", 1)):
        graph = validate(Graph(tuple(nodes), (x, y), (output,)))
        found = cost.total(cost.layers(graph, da4ml)).features
        assert {key: v for key, v in found.items() if v} == {kind: bits}
    found = cost.total(cost.layers(validate(Graph(tuple(nodes), (x, y), (entries,))), da4ml)).features
    assert found["wide_table"] % 4 == 0 and found["wide_table"] > 0 and not found["adder"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_registers_are_those_of_the_pipeline(backend):
    graph, module = model(np.random.default_rng(4), (8, 8, 4)), BACKENDS[backend]
    for cutoff in (2, 4):
        parts = cost.layers(graph, module, cutoff=cutoff)
        found, (stages, reg_bits, _) = cost.total(parts).features, module.staged(module.to_comb(graph), cutoff)
        low, high = (found["register"] + n * found["shift"] for n in (3, stages + 1))  # a shift register holds 3 bits and more
        assert low * (1 - 1e-9) <= reg_bits <= high * (1 + 1e-9)
        assert sum(part.features["register"] > 0 for part in parts) >= 3
    assert cost.total(cost.layers(graph, da4ml)).features["register"] == 0


def counted(rng: np.random.Generator, n: int, noise: float = 0.0) -> list[dict]:
    rows = []
    for j in range(n):
        features = dict.fromkeys(cost.FEATURES, 0.0) | dict(
            zip(("adder", "mux", "register"), rng.uniform(100, 9000, 3), strict=True)
        )
        lut = (0.7 * features["adder"] + 0.4 * features["mux"]) * (1 + noise * rng.normal())
        carry = 0.25 * features["adder"]
        rows.append({"name": f"m{j}", "features": features, "lut": lut, "ff": features["register"], "carry": carry, "dsp": 0})
    return rows


def test_a_fit_finds_the_weights_that_made_the_counts():
    found = cost.calibrate(counted(np.random.default_rng(5), 8))
    assert found.cells["lut"]["adder"] == pytest.approx(0.7, rel=0.03)
    assert found.cells["lut"]["mux"] == pytest.approx(0.4, rel=0.06)
    assert found.cells["ff"]["register"] == pytest.approx(1, rel=1e-3)
    assert found.cells["carry"]["adder"] == pytest.approx(0.25, rel=0.03)
    assert all("dsp" not in errors for errors in found.left_out.values())  # none of them has one
    assert max(abs(e["lut"]) for e in found.left_out.values()) < 0.03


def test_the_error_of_a_model_left_out_is_of_a_fit_without_it():
    rows = counted(np.random.default_rng(6), 8)
    rows[3]["lut"] *= 2
    found = cost.calibrate(rows)
    assert found.left_out["m3"]["lut"] == pytest.approx(-0.5, abs=0.01)
    without = cost.calibrate(rows[:3] + rows[4:])
    assert cost.cells(rows[3]["features"], without)["lut"] / rows[3]["lut"] - 1 == pytest.approx(found.left_out["m3"]["lut"])


def test_weights_are_never_negative():
    found = cost.calibrate(counted(np.random.default_rng(7), 12, noise=0.5))
    assert all(w >= 0 for weights in found.cells.values() for w in weights.values())
    with pytest.raises(DataError, match="got 2 rows, expected 3 at least"):
        cost.calibrate(counted(np.random.default_rng(7), 2))


def test_a_calibration_is_written_and_read(tmp_path, monkeypatch):
    made = cost.calibrate(counted(np.random.default_rng(8), 5))
    cost.ship(made, tmp_path / "calibration.json")
    monkeypatch.setattr(cost, "_FILE", tmp_path / "calibration.json")
    assert cost.shipped() == made and [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


def test_the_table_ends_with_the_total_and_the_shipped_fit_is_near_da4ml():
    graph = model(np.random.default_rng(9), (12, 8))
    rows = cost.table(graph, da4ml, cutoff=4)
    assert [row["layer"] for row in rows] == ["x", "Dense_0", "Dense_1", "total"]
    for cell in (*cost.CELLS, "cost"):
        assert rows[-1][cell] == pytest.approx(sum(row[cell] for row in rows[:-1]))
    assert 0.6 < rows[-1]["lut"] / rows[-1]["cost"] < 1.3 and rows[-1]["ff"] > 0


def test_the_page_on_costs_quotes_the_shipped_errors():
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 11]
    quoted = {row[0]: row[6] for row in rows if row[6].endswith("%")}
    errors = {name: error["lut"] for name, error in cost.shipped().left_out.items()}
    assert quoted == {name: f"{100 * error:+.1f} %" for name, error in errors.items()}
    sizes = sorted(map(abs, errors.values()))
    assert f"{100 * sizes[len(sizes) // 2]:.1f} % in the median, {100 * sizes[-1]:.1f} % at worst" in page
