"""The register file in front of a netlist's weights: through its bus in Verilator, and with flipped flip-flops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower import registers, sim, synth
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.loadable import loaded, weights_of
from pquant_jax.lower.rtl import RTLInfo

from .weight_sets import Sets, two_sets

needs_simulator = pytest.mark.skipif(bool(sim.missing_tools()), reason="; ".join(sim.missing_tools()))
needs_yosys = pytest.mark.skipif(bool(synth.missing_tools()), reason="; ".join(synth.missing_tools()))


class Made(NamedTuple):
    """The model of `weight_sets`, both sets, its netlists by latency cutoff, vectors and what either set makes of them."""

    sets: Sets
    weights: list[list[np.ndarray]]
    rtl: dict[int, RTLInfo]
    x: np.ndarray
    expected: list[np.ndarray]
    work: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder, sets = tmp_path_factory.mktemp("registers"), two_sets()
    weights = [weights_of(sets.graph, sets.inst, *pair) for pair in zip(sets.views, sets.states, strict=True)]
    comb = da4ml.to_comb(sets.graph)
    rtl = {cut: da4ml.write_rtl(comb, folder / f"net{cut}", name="net", latency_cutoff=cut) for cut in (-1, 4)}
    graphs = [loaded(sets.graph, w) for w in weights]
    grid = port_grid(graphs[0], 120, np.random.default_rng(0))
    expected = [flatten_batch(emulate(g, grid)) for g in graphs]
    assert (expected[0] != expected[1]).any(1).mean() > 0.9
    return Made(sets, weights, rtl, flatten_batch(grid), expected, tmp_path_factory.getbasetemp() / "loadable-sim")


def write(made: Made, directory: Path, cut: int = -1, **options: Any) -> registers.Registers:
    return registers.write_registers(made.sets.graph, made.rtl[cut], made.weights[0], directory, **options)


def decoded(regs: registers.RegisterMap, words: np.ndarray) -> list[np.ndarray]:
    """A weight set back from its words, by reading the map as a user's software would: bit by bit."""
    store = [int(w) >> j & 1 for w in words for j in range(regs.word)]
    out = [np.zeros(shape) for shape in regs.shapes]
    for n in range(len(regs.site)):
        start, bits = int(regs.address[n]) * regs.word + int(regs.bit[n]), int(regs.k[n] + regs.i[n] + regs.f[n])
        code = sum(store[start + j] << j for j in range(bits))
        code -= (code >> bits - 1 << bits) if regs.k[n] else 0
        out[regs.site[n]].ravel()[regs.element[n]] = code * 2.0 ** -int(regs.f[n])
    return out


@pytest.mark.parametrize("word", [1, 8, 13, 64, None])
def test_the_map_reads_back_what_was_stored(made, word):
    regs = registers.register_map(made.sets.graph, made.rtl[-1], word=word)
    for weights in made.weights:
        for ours, back in zip(weights, decoded(regs, registers.image(regs, weights)), strict=True):
            np.testing.assert_array_equal(ours, back)
    assert regs.word == (word or 5) and regs.words == (len(regs.site) if word is None else -(-int(regs.bits.sum()) // word))
    number, _, _ = registers.stored_bits(regs)
    assert len(set(number.tolist())) == len(number) == regs.bits.sum() and number.max() < regs.word * regs.words


def test_a_written_register_file_is_known_again(made, tmp_path):
    """Everything but where the netlist's own project was; another word or graph is refused."""
    rng = np.random.default_rng(3)
    voted = np.zeros(write(made, tmp_path / "plain").voted.shape, bool)
    number, _, _ = registers.stored_bits(registers.register_map(made.sets.graph, made.rtl[4]))
    voted[rng.choice(number, 9, replace=False)] = True
    regs = write(made, tmp_path / "regs", 4, voted=voted)
    again = registers.read_registers(tmp_path / "regs", made.sets.graph, made.rtl[4])
    assert (again.top, again.directory, again.netlist.src) == (regs.top, regs.directory, regs.netlist.src)
    np.testing.assert_array_equal(again.voted, voted)
    np.testing.assert_array_equal(again.image, regs.image)
    np.testing.assert_array_equal(again.map.start, regs.map.start)
    with pytest.raises(DataError, match="another netlist or bus"):
        registers.read_registers(tmp_path / "regs", made.sets.graph, made.rtl[4], word=9)
    with pytest.raises(DataError, match="no register map"):
        registers.read_registers(tmp_path, made.sets.graph, made.rtl[4])


def test_the_files_say_the_same(made, tmp_path):
    """regmap.json and the hexadecimal words are enough to know every weight."""
    regs = write(made, tmp_path / "regs", word=8)
    told = json.loads((regs.directory / "regmap.json").read_text())
    words = [int(line, 16) for line in (regs.directory / "weights.hex").read_text().split()]
    assert told["word"] == 8 and told["words"] == len(words) and 2 ** told["address_bits"] >= len(words)
    store = sum(w << 8 * n for n, w in enumerate(words))
    shapes = dict(zip(regs.map.sites, regs.map.shapes, strict=True))
    found = {name: np.zeros(shape) for name, shape in shapes.items()}
    for row in told["weights"]:
        bits = row["k"] + row["i"] + row["f"]
        code = store >> 8 * row["address"] + row["bit"] & 2**bits - 1
        found[row["site"]][tuple(row["element"])] = (code - (code >> bits - 1 << bits) * row["k"]) * 2.0 ** -row["f"]
    for name, value in zip(regs.map.sites, made.weights[0], strict=True):
        np.testing.assert_array_equal(found[name], value)
    registers.write_weights(tmp_path / "b.hex", regs.map, made.weights[1])
    np.testing.assert_array_equal(registers.read_words(tmp_path / "b.hex", regs.map), registers.image(regs.map, made.weights[1]))
    (tmp_path / "b.hex").write_text("00\n1ff\n")
    with pytest.raises(DataError, match="2 words, expected 36 of 8 bits"):
        registers.read_words(tmp_path / "b.hex", regs.map)


@needs_simulator
@pytest.mark.parametrize(("cut", "word"), [(-1, 8), (4, None)])
def test_both_sets_through_the_bus(made, cut, word, tmp_path):
    """Power-up, set B over the bus, a reset, and back again: one build, the vectors without a gap, and every word read back."""
    regs = write(made, tmp_path / "regs", cut, word=word)
    assert (regs.netlist.stages > 0) == (cut > 0)
    program, n = registers.build(regs, made.work), made.x.shape[1]
    other, data = registers.image(regs.map, made.weights[1]), registers.vectors(made.x)
    steps = [data, registers.load(other, n), data, registers.reset(n), data, registers.load(other, n), data]
    outputs, _ = registers.play(program, regs, steps)
    for k, which in ((0, 0), (2, 1), (4, 0), (6, 1)):
        np.testing.assert_array_equal(outputs[k], made.expected[which])
    reads = np.zeros((regs.map.words, 4), np.uint64)
    reads[:, 2] = np.arange(regs.map.words)
    look = registers.Cycles(reads, np.zeros((len(reads), n)))
    _, rdata = registers.play(program, regs, [look, registers.load(other, n), look])
    np.testing.assert_array_equal(rdata[: len(reads)], regs.image)
    np.testing.assert_array_equal(rdata[-len(reads) :], other)


@needs_simulator
def test_every_single_flip_of_a_voted_bit_is_survived(made, tmp_path):
    """All three copies of all voted bits; without the vote the same flips are seen, and so are those of other bits."""
    plain = write(made, tmp_path / "plain", word=None)
    scores = {}
    for name, shape in zip(plain.map.sites, plain.map.shapes, strict=True):
        scores[name] = np.broadcast_to(2.0 ** np.arange(5), (*shape, 5))  # the signs first
    voted = registers.most_sensitive(plain.map, scores, 20)
    assert voted.sum() == len(plain.map.site) and voted[registers.stored_bits(plain.map)[0]].mean() == 0.2
    regs = write(made, tmp_path / "tmr", word=None, voted=voted)
    told = json.loads((regs.directory / "regmap.json").read_text())["weights"]
    assert all(row["voted"] == [4] for row in told)
    program, x, chosen = registers.build(regs, made.work, inject=True), made.x[:20], np.flatnonzero(voted)
    copies = np.tile(np.arange(3), len(chosen))
    assert not registers.flip_effects(program, regs, x, np.repeat(chosen, 3), copies).any()
    others = registers.stored_bits(regs.map)[0]
    others = others[~voted[others]]
    assert (registers.flip_effects(program, regs, x, others, np.zeros_like(others)) > 0).mean() > 0.5
    bare = registers.build(plain, made.work, inject=True)
    assert (registers.flip_effects(bare, plain, x, chosen, np.zeros_like(chosen)) > 0).mean() > 0.7
    # an upset of a voted copy is mended at the next edge, that of a lone flip-flop stays until the word is written again
    data = registers.vectors(x)
    seen = int(others[registers.flip_effects(program, regs, x, others, np.zeros_like(others)).argmax()])
    hit = registers.Cycles(np.zeros((1, 4), np.uint64), x[:1], np.array([[seen, 0]]))
    parts, _ = registers.play(program, regs, [hit, data, registers.load(regs.image, x.shape[1]), data], inject=True)
    assert np.any(parts[1] != made.expected[0][:20])
    np.testing.assert_array_equal(parts[3], made.expected[0][:20])
    two = [registers.Cycles(np.zeros((1, 4), np.uint64), x[:1], np.array([[chosen[0], c]])) for c in (0, 1)]
    parts, _ = registers.play(program, regs, [*two, data], inject=True)  # one after the other: mended between
    np.testing.assert_array_equal(parts[2], made.expected[0][:20])


@needs_yosys
@pytest.mark.slow
def test_synthesis_keeps_the_three_flip_flops(made, tmp_path):
    regs = write(made, tmp_path / "plain", word=8)
    voted = np.zeros_like(regs.voted)
    voted[registers.stored_bits(regs.map)[0][:40]] = True
    tmr = write(made, tmp_path / "tmr", word=8, voted=voted)
    counts = [synth.synth(r.netlist._replace(name=r.top), work=tmp_path / r.directory.name)["ff"] for r in (regs, tmr)]
    assert counts == [regs.map.bits.sum(), regs.map.bits.sum() + 2 * 40]


def test_what_can_not_be_written_is_refused(made, tmp_path):
    graph, rtl, weights = made.sets.graph, made.rtl[-1], made.weights[0]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"word": 0}, "word is 0 and the widest weight has 5 bits; expected 1 to 64"),
        ({"word": 65}, "word is 65"),
        ({"name": "net"}, "name is 'net'"),
        ({"voted": np.ones(4, bool)}, "voted has the shape"),
        ({"voted": np.ones(36 * 8, bool)}, "stored bits only"),
    ]
    for options, why in cases:
        with pytest.raises(LoweringError, match=why):
            write(made, tmp_path / "regs", **options)
    with pytest.raises(LoweringError, match="in Verilog, the netlist is vhdl"):
        registers.write_registers(graph, rtl._replace(flavor="vhdl"), weights, tmp_path / "regs")
    with pytest.raises(LoweringError, match="weight ports, got 1 arrays"):
        registers.write_registers(graph, rtl, weights[:1], tmp_path / "regs")
    with pytest.raises(LoweringError, match="no weights to store"):
        registers.register_map(loaded(graph, weights), rtl)
    assert not list(tmp_path.iterdir())
    regs = registers.register_map(graph, rtl)
    with pytest.raises(LoweringError, match="has the code 16, its field holds -16 to 15"):
        registers.image(regs, [np.full(w.shape, 2.0) for w in weights])
    with pytest.raises(LoweringError, match="expected .* and 5 bits"):
        registers.most_sensitive(regs, {name: np.zeros((*s, 4)) for name, s in zip(regs.sites, regs.shapes, strict=True)}, 10)


@pytest.mark.parametrize(
    ("weights", "percent", "why"),
    [
        ("constants", 5, 'tmr=5 % .* are constants, which no flip-flop stores; use weights="registers"'),
        ("ports", 5, "stored outside of the netlist"),
        ("registers", 101, "tmr is 101, expected a percentage"),
        ("registers", -1, "tmr is -1"),
    ],
)
def test_triplication_needs_something_stored(weights, percent, why):
    registers.check_tmr("registers", 5)
    registers.check_tmr("constants", 0)
    with pytest.raises(LoweringError, match=why):
        registers.check_tmr(weights, percent)
