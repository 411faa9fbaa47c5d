"""A register file for the weights of a netlist, written over a bus as in a chip that is reprogrammed over I2C.

`write_registers` puts a netlist of `trace(..., weights="ports")` into a folder with a top module around it: `clk, rst, we,
addr, wdata, rdata` and the data ports unchanged.  `regmap.json` says where every weight is; `write_weights` makes the file
of words that a bus master sends.  Chosen bits can be triplicated with a majority vote (TMR).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax._errors import DataError, LoweringError
from pquant_jax.lower import _regfile, sim
from pquant_jax.lower.emulate import to_codes
from pquant_jax.lower.ir import Graph, weight_ports
from pquant_jax.lower.loadable import check_weights
from pquant_jax.lower.rtl import RTLInfo, check_names, whole_folder

MAX_WORD: Final = 64  # bits of a bus
_FLIP_CYCLES: Final = 100_000  # of one simulation


class RegisterMap(NamedTuple):
    """Where every weight of a netlist is stored: `words` words of `word` bits.

    One entry per weight that the netlist reads, in the order of its ports.  site: number in `sites`, element: flat index
    in the array of shape `shapes[site]`.  k, i, f: its format; the two's complement code has k + i + f bits.
    address, bit: of its lowest bit; higher ones follow, into the next word where it ends.
    """

    word: int
    words: int
    sites: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    site: np.ndarray
    element: np.ndarray
    k: np.ndarray
    i: np.ndarray
    f: np.ndarray
    address: np.ndarray
    bit: np.ndarray

    @property
    def start(self) -> np.ndarray:
        """Of each weight the number of its lowest bit in the store, address * word + bit."""
        return self.address * self.word + self.bit

    @property
    def bits(self) -> np.ndarray:
        """Of each weight its bits, k + i + f."""
        return self.k + self.i + self.f


class Registers(NamedTuple):
    """A written register file around a netlist.

    netlist: where it is now.  top: the module of the whole, `top.v` beside the netlist's sources.  image: the words it
    holds at power-up, uint64 (words,).  voted: bool (words * word,), the bits with three flip-flops.
    """

    directory: Path
    netlist: RTLInfo
    top: str
    map: RegisterMap
    image: np.ndarray
    voted: np.ndarray


def register_map(graph: Graph, rtl: RTLInfo, *, word: int | None = 8) -> RegisterMap:
    """The layout of the weights of `graph` in words of `word` bits, lowest first and without gaps; weights may cross words.

    word: 1 to 64, or None for one weight per address, as wide as the widest one.  Weights without bits (pruned, or read by
    nothing that reaches an output) are not stored.  Raises: LoweringError for other words, and where there is nothing to store.
    """
    ports = weight_ports(graph)
    shapes = tuple(graph.nodes[j].shape for j in ports)
    sizes = [int(np.prod(s, dtype=np.int64)) for s in shapes]
    first = rtl.inp_kifs.shape[1] - sum(sizes)
    k, i, f = np.asarray(rtl.inp_kifs, np.int64)[:, first:]
    kept = np.flatnonzero(k + i + f > 0)
    if not len(kept) or first < 0:
        raise LoweringError('the netlist has no weights to store: trace it with weights="ports" and write the RTL of that graph')
    site, element = np.repeat(np.arange(len(ports)), sizes)[kept], np.concatenate([np.arange(n) for n in sizes])[kept]
    k, i, f = k[kept], i[kept], f[kept]
    bits = k + i + f
    if word is not None and not 1 <= word <= MAX_WORD or word is None and bits.max() > MAX_WORD:
        raise LoweringError(f"word is {word!r} and the widest weight has {bits.max()} bits; expected 1 to {MAX_WORD} bits")
    width = int(bits.max()) if word is None else word
    start = np.arange(len(kept)) * width if word is None else np.cumsum(bits) - bits
    words = -(-int(start[-1] + bits[-1]) // width)
    names = tuple(graph.nodes[j].name for j in ports)
    return RegisterMap(width, words, names, shapes, site, element, k, i, f, start // width, start % width)


def stored_bits(regs: RegisterMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every stored bit: (its number in the store, the entry of the map it belongs to, its place in the code), int64."""
    entry = np.repeat(np.arange(len(regs.bits)), regs.bits)
    place = np.arange(len(entry)) - np.repeat(np.cumsum(regs.bits) - regs.bits, regs.bits)
    return regs.start[entry] + place, entry, place


def image(regs: RegisterMap, weights: Sequence[np.ndarray]) -> np.ndarray:
    """The words that hold a weight set (`loadable.weights_of`), uint64 (words,).

    Raises: LoweringError for a value that its field can't hold.
    """
    shapes = tuple(np.shape(w) for w in weights)
    if shapes != regs.shapes:
        raise LoweringError(f"the register map holds arrays of shapes {regs.shapes}, got {shapes}; see loadable.weights_of")
    flat = np.concatenate([np.ravel(np.asarray(w, np.float64)) for w in weights])
    ends = np.cumsum([0, *(int(np.prod(s, dtype=np.int64)) for s in shapes)])
    codes = to_codes(flat[ends[regs.site] + regs.element], regs.f)
    span = np.left_shift(1, regs.i + regs.f)
    bad = (codes < -regs.k * span) | (codes >= span)
    if bad.any():
        n = int(bad.argmax())
        raise LoweringError(
            f"{regs.sites[regs.site[n]]!r}: element {regs.element[n]} has the code {codes[n]}, its field holds "
            f"{-regs.k[n] * span[n]} to {span[n] - 1}; check the set with loadable.check_weights"
        )
    number, entry, place = stored_bits(regs)
    store = np.zeros(regs.words * regs.word, np.uint64)
    store[number] = (codes[entry] >> place) & 1
    shifts = np.arange(regs.word, dtype=np.uint64)
    return np.bitwise_or.reduce(store.reshape(regs.words, regs.word) << shifts, axis=1)


def write_weights(path: str | os.PathLike, regs: RegisterMap, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Write a weight set as hexadecimal words, one a line in the order of addresses (`$readmemh` reads it); the words."""
    words = image(regs, weights)
    digits, target = -(-regs.word // 4), Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(f"{int(w):0{digits}x}\n" for w in words))
    partial.replace(target)
    return words


def read_words(path: str | os.PathLike, regs: RegisterMap) -> np.ndarray:
    """The words of a file of `write_weights`, uint64.  Raises: DataError for another number of words, or none such."""
    try:
        words = [int(line, 16) for line in Path(path).read_text().split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no file of hexadecimal words ({error})") from error
    if len(words) != regs.words or any(not 0 <= w < 2**regs.word for w in words):
        raise DataError(f"{path}: {len(words)} words, expected {regs.words} of {regs.word} bits")
    return np.array(words, np.uint64)


def check_tmr(weights: str, percent: float) -> None:
    """Raise `LoweringError` unless `percent` is 0, or in (0, 100] with weights that have flip-flops.

    Constant weights are wires and gates: nothing stores them that a particle could flip, and configuration memory of an
    FPGA is protected by scrubbing, not by triplicating constants.  Weights on ports are stored outside of the netlist.
    """
    if not 0 <= percent <= 100:
        raise LoweringError(f"tmr is {percent!r}, expected a percentage of the stored bits, 0 to 100")
    if percent and weights != "registers":
        where = "are constants, which no flip-flop stores" if weights == "constants" else "are stored outside of the netlist"
        raise LoweringError(
            f"tmr={percent:g} % triplicates stored weight bits, but with weights={weights!r} they {where}; use "
            'weights="registers"'
        )


def most_sensitive(regs: RegisterMap, scores: Mapping[str, np.ndarray], percent: float) -> np.ndarray:
    """The `percent` % of the stored bits with the highest scores, bool (words * word,): round(n percent / 100) of n bits.

    scores: {site: (*shape, bits)}, of the bit of weight 2^b of an element's code at [..., b]; equal ones in the order of the
    store.  Raises: LoweringError for a percentage outside of 0 to 100, and for scores that lack a site or a bit.
    """
    check_tmr("registers", percent)
    number, entry, place = stored_bits(regs)
    value = np.zeros(len(number))
    for n, (name, shape) in enumerate(zip(regs.sites, regs.shapes, strict=True)):
        mine = regs.site[entry] == n
        if not mine.any():
            continue
        table = np.asarray(scores[name], np.float64) if name in scores else np.zeros((0,))
        if table.shape[:-1] != shape or place[mine].max() >= table.shape[-1]:
            raise LoweringError(
                f"the scores of {name!r} have the shape {table.shape}, expected {shape} and {place[mine].max() + 1} bits"
            )
        value[mine] = table.reshape(-1, table.shape[-1])[regs.element[entry[mine]], place[mine]]
    order = np.argsort(-value, kind="stable")[: round(len(number) * percent / 100)]
    chosen = np.zeros(regs.words * regs.word, bool)
    chosen[number[order]] = True
    return chosen


def write_registers(
    graph: Graph,
    rtl: RTLInfo,
    weights: Sequence[np.ndarray],
    directory: str | Path,
    *,
    word: int | None = 8,
    voted: np.ndarray | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Registers:
    """A copy of the netlist `rtl` of `graph` in `directory`, with a register file for its weights around it.

    Written: the top module `src/NAME.v` (ports: clk, rst, we, addr, wdata, rdata, model_inp with the data alone, model_out),
    `src/pq_register_file.v`, `regmap.json` and `weights.hex`, the set `weights` that it holds at power-up and after `rst`.  A
    word is written at the clock edge where `we` is high; a vector that enters in a cycle meets the weights of that cycle.

    Args:
      word: bits of the bus, see `register_map`.  voted: the bits to triplicate, from `most_sensitive`.
      name: of the top module, the netlist's with `_registers` otherwise.
    Raises: LoweringError for VHDL, a set that doesn't fit, and what `register_map` refuses, before anything is written.
    """
    top = name or f"{rtl.name}_registers"
    check_names(top, rtl.flavor, frozenset({rtl.name, _regfile.MODULE}))
    if rtl.flavor != "verilog":
        raise LoweringError(f"a register file is written in Verilog, the netlist is {rtl.flavor}; write it with flavor='verilog'")
    check_weights(graph, weights)
    regs = register_map(graph, rtl, word=word)
    used = np.zeros(regs.words * regs.word, bool)
    used[stored_bits(regs)[0]] = True
    voted = np.zeros_like(used) if voted is None else np.asarray(voted, bool)
    if voted.shape != used.shape or (voted & ~used).any():
        raise LoweringError(f"voted has the shape {voted.shape}, expected {used.shape} and stored bits only; see most_sensitive")
    words = image(regs, weights)
    shifts = np.arange(regs.word, dtype=np.uint64)
    reset = ((words[:, None] >> shifts) & np.uint64(1)).astype(bool).ravel()
    with whole_folder(directory, overwrite=overwrite) as partial:
        shutil.copytree(rtl.directory, partial, dirs_exist_ok=True)
        src = partial / rtl.src.relative_to(rtl.directory)
        (src / f"{_regfile.MODULE}.v").write_text(_regfile.REGISTER_FILE)
        (src / f"{top}.v").write_text(_regfile.top_verilog(_layout(regs, rtl, top), reset, used, voted))
        (partial / "regmap.json").write_text(json.dumps(regmap_json(regs, voted), indent=1) + "\n")
        write_weights(partial / "weights.hex", regs, weights)
    where = Path(directory).absolute()
    moved = rtl._replace(directory=where, src=where / rtl.src.relative_to(rtl.directory))
    return Registers(where, moved, top, regs, words, voted)


def read_registers(directory: str | Path, graph: Graph, rtl: RTLInfo, *, word: int | None = 8) -> Registers:
    """What `write_registers` left in `directory` around `rtl`, a netlist of `graph`, with the same `word`.

    Raises: DataError where a file is missing, or is of another netlist or bus.
    """
    folder, regs = Path(directory).absolute(), register_map(graph, rtl, word=word)
    try:
        told = json.loads((folder / "regmap.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no register map ({error}); write it with write_registers") from error
    voted = np.zeros(regs.words * regs.word, bool)
    for start, row in zip(regs.start, told.get("weights", ()), strict=False):
        voted[start + np.array(row.get("voted", ()), np.int64)] = True
    sources = list(folder.rglob(f"{_regfile.MODULE}.v"))
    if told != regmap_json(regs, voted) or len(sources) != 1:
        raise DataError(f"{folder} is the register file of another netlist or bus; write it again with write_registers")
    moved = rtl._replace(directory=folder, src=sources[0].parent)
    return Registers(folder, moved, f"{rtl.name}_registers", regs, read_words(folder / "weights.hex", regs), voted)


def _layout(regs: RegisterMap, rtl: RTLInfo, top: str) -> _regfile.Layout:
    fields = tuple(zip(regs.start.tolist(), regs.bits.tolist(), strict=True))
    data = int(rtl.inp_kifs.sum()) - int(regs.bits.sum())
    return _regfile.Layout(top, rtl.name, regs.word, regs.words, data, int(rtl.out_kifs.sum()), rtl.stages > 0, fields)


def regmap_json(regs: RegisterMap, voted: np.ndarray) -> dict[str, Any]:
    """What `regmap.json` says: the bus, and per weight its site, element, format, address, bit and which bits are voted."""
    number, entry, place = stored_bits(regs)
    chosen = [[] for _ in regs.bits]
    for n in np.flatnonzero(voted[number]):
        chosen[entry[n]].append(int(place[n]))
    rows = []
    for n, (site, element) in enumerate(zip(regs.site.tolist(), regs.element.tolist(), strict=True)):
        row = {"site": regs.sites[site], "element": [int(v) for v in np.unravel_index(element, regs.shapes[site])]}
        row |= {key: int(getattr(regs, key)[n]) for key in ("k", "i", "f", "address", "bit")}
        rows.append(row | ({"voted": chosen[n]} if chosen[n] else {}))
    bus = {"word": regs.word, "words": regs.words, "address_bits": _regfile.address_bits(regs.words)}
    text = "code = value * 2^f in two's complement of k+i+f bits; its lowest bit is bit `bit` of word `address`, the next follow"
    return {"format": text, **bus, "weights": rows}


def build(regs: Registers, work: str | Path, *, inject: bool = False, jobs: int = 2) -> Path:
    """Compile the register file and its netlist; the program for `play`.  inject: with the ports that flip flip-flops.

    Raises: ToolError if a tool is missing or fails.
    """
    return sim.build(_whole(regs), Path(work).absolute(), jobs=jobs, pins=pins(regs, inject))


def _whole(regs: Registers) -> RTLInfo:
    return regs.netlist._replace(name=regs.top)


def pins(regs: Registers, inject: bool = False) -> sim.Pins:
    """The ports of the top module, without its clock."""
    data = int(regs.netlist.inp_kifs.sum()) - int(regs.map.bits.sum())
    bus = {"rst": 1, "we": 1, "addr": _regfile.address_bits(regs.map.words), "wdata": regs.map.word}
    upset = {"flip": 1, "flip_bit": 32, "flip_copy": 2} if inject else {}
    outputs = {"model_out": int(regs.netlist.out_kifs.sum()), "rdata": regs.map.word}
    return sim.Pins(bus | upset | ({"model_inp": data} if data else {}), outputs, True, (_regfile.INJECT,) if inject else ())


class Cycles(NamedTuple):
    """What drives the ports of a register file, one entry per clock cycle.

    bus: int64 (N, 4), rst, we, addr, wdata.  x: float64 (N, n_data), real numbers.  flips: int64 (N, 2), bit of the store
    (-1 for none) and copy, or None.
    """

    bus: np.ndarray
    x: np.ndarray
    flips: np.ndarray | None = None


def load(words: np.ndarray, n_data: int) -> Cycles:
    """The cycles that write `words` to the addresses 0, 1, ..."""
    n = len(words)
    bus = np.stack(
        [np.zeros(n, np.uint64), np.ones(n, np.uint64), np.arange(n, dtype=np.uint64), np.asarray(words, np.uint64)], 1
    )
    return Cycles(bus, np.zeros((n, n_data)))


def vectors(x: np.ndarray, flips: np.ndarray | None = None) -> Cycles:
    """The cycles of data `x` (N, n_data) while nothing is written."""
    return Cycles(np.zeros((len(x), 4), np.uint64), np.asarray(x, np.float64), flips)


def reset(n_data: int) -> Cycles:
    """One cycle of `rst`."""
    return Cycles(np.array([[1, 0, 0, 0]], np.uint64), np.zeros((1, n_data)))


def play(
    program: Path, regs: Registers, cycles: Sequence[Cycles], *, inject: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    """(the outputs, float64 (N, n_out), of each part of `cycles`; `rdata` of every cycle, uint64) of the simulation.

    The parts follow each other without a gap.  `program` is what `build` made with the same `inject`.
    """
    rtl, top = regs.netlist, pins(regs, inject)
    latency, n_data = rtl.latency_cycles, cycles[0].x.shape[1]
    kifs = rtl.inp_kifs[:, :n_data]
    n = sum(len(c.bus) for c in cycles)
    bus = np.concatenate([c.bus for c in cycles] + [np.zeros((latency, 4), np.uint64)]).astype(np.uint64)
    x = np.concatenate([c.x for c in cycles] + [np.zeros((latency, n_data))])
    fields = [bus[:, j] for j in range(4)]
    if inject:
        none = [np.tile(np.array([[-1, 0]]), (len(c.bus), 1)) if c.flips is None else c.flips for c in cycles]
        flips = np.concatenate([*none, np.tile(np.array([[-1, 0]]), (latency, 1))]).astype(np.int64)
        fields += [v.astype(np.uint64) for v in (flips[:, 0] >= 0, np.maximum(flips[:, 0], 0), flips[:, 1])]
    parts = [np.ascontiguousarray(v[:, None]).view(np.uint8) for v in fields]
    records = np.concatenate([*parts, sim.pack_bits(x, kifs)] if "model_inp" in top.inputs else parts, axis=1)
    out_bytes = sim.record_bytes(top.outputs["model_out"])
    raw = sim.run_records(program, _whole(regs), records, out_bytes + 8, 0)
    out = sim.unpack_bits(raw[latency:, :out_bytes], rtl.out_kifs)
    rdata = np.ascontiguousarray(raw[:n, out_bytes:]).view(np.uint64)[:, 0]
    ends = np.cumsum([len(c.bus) for c in cycles])[:-1]
    return np.split(out, ends), rdata


def flip_effects(program: Path, regs: Registers, x: np.ndarray, bit: np.ndarray, copy: np.ndarray) -> np.ndarray:
    """How many of the vectors `x` (N, n_data) have another output while one flip-flop is wrong, int64 (n,) for n cases.

    Case j inverts copy `copy[j]` (0, and 1 and 2 of a voted bit) of bit `bit[j]` of the store, after a reset: an unprotected
    bit stays wrong by itself; the copy of a voted one, which the vote would mend, is held wrong for all of the vectors.
    `program` is what `build(..., inject=True)` made.
    """
    x, bit, copy = np.asarray(x, np.float64), np.asarray(bit, np.int64), np.asarray(copy, np.int64)
    (right,), _ = play(program, regs, [vectors(x)], inject=True)
    found = np.zeros(len(bit), np.int64)
    size = max(1, _FLIP_CYCLES // (len(x) + 2))
    for start in range(0, len(bit), size):
        chosen = range(start, min(start + size, len(bit)))
        cases = [_case(x, int(bit[j]), int(copy[j]), bool(regs.voted[bit[j]])) for j in chosen]
        parts, _ = play(program, regs, cases, inject=True)
        found[start : start + size] = [(part[2:] != right).any(1).sum() for part in parts]
    return found


def _case(x: np.ndarray, bit: int, copy: int, hold: bool) -> Cycles:
    """A reset, the flip, the vectors."""
    n = len(x) + 2
    bus, flips = np.zeros((n, 4), np.uint64), np.full((n, 2), (bit, copy), np.int64)
    bus[0, 0] = 1
    flips[0, 0] = -1
    if not hold:
        flips[2:, 0] = -1
    return Cycles(bus, np.concatenate([np.zeros((2, x.shape[1])), x]), flips)
