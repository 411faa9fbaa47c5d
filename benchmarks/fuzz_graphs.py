"""Random graphs of every op of the IR: emulator, interpreter of da4ml or alkaid, and passes must give the same integers.

    python benchmarks/fuzz_graphs.py [--graphs 1000] [--seed 0] [--rtl 0] [--backend alkaid]

`fuzz.py` draws models; here the graphs are what no model happens to be: 3 to 12 random operations on tensors of random
shapes (windows as in a convolution, tables per element, comparisons and selections, sums, maxima, products with
constants on either side and with each other), a format per element of every quantizer, widths of zero and below
included, all 28 pairs of modes in turn, and inputs that overflow the port.  `--rtl N` also simulates the Verilog of the
first N graphs.  A graph that fails is shrunk and printed with its seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax import LoweringError
from pquant_jax.lower import sim
from pquant_jax.lower.backends import alkaid, da4ml
from pquant_jax.lower.canonical import canonical
from pquant_jax.lower.dead import remove_dead
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import ARITY, Graph, Node, reached, validate
from pquant_jax.lower.overflow import overflows
from pquant_jax.lower.passes import simplify
from pquant_jax.lower.ranges import intervals
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

PAIRS: Final = tuple(itertools.product(ROUNDINGS, OVERFLOWS))
LARGEST: Final = 24  # elements of a tensor
WIDEST: Final = 22  # bits of a value before it is quantized again
COMPARISONS: Final = ("ge", "gt", "le", "lt", "eq", "ne")
STEPS: Final = (
    "quantize", "quantize", "quantize", "quantize", "table", "table", "window", "gather", "dot_const", "dot_const", "dot",
    "add", "sub", "mul", "max", "min", "bias", "scale", "neg", "abs", "select", "select", "compare", "sum", "amax", "amin",
    "concat",
)  # fmt: skip
BACKENDS: Final[dict[str, Any]] = {"da4ml": da4ml, "alkaid": alkaid}
Modes = tuple[str, str]


class Counts(NamedTuple):
    """What one comparison gives, of scalars: all outputs, those that are no zero and no constant, and the different ones."""

    outputs: int
    nonzero: int
    varying: int
    netlist: int
    passes: int
    rtl: int


class Draw:
    """A graph while it is drawn: `nodes`, and the `pool` of values that the next operation may read."""

    def __init__(self, rng: np.random.Generator, deck: Iterator[Modes]) -> None:
        self.rng, self.deck = rng, deck
        self.nodes: list[Node] = []
        self.pool: list[int] = []

    def add(self, op: str, inputs: Sequence[int], shape: Sequence[int] | None = None, **attrs: Any) -> int:
        """Append a node, by default of its first input's shape."""
        shape = self.nodes[inputs[0]].shape if shape is None else tuple(int(s) for s in shape)
        self.nodes.append(Node(op, tuple(inputs), shape, attrs))
        return len(self.nodes) - 1

    def const(self, shape: Sequence[int]) -> int:
        """Weights of up to 5 bits on grids from 2^-4 to 2, a third of them zero."""
        w = self.rng.integers(-16, 16, shape) * 2.0 ** self.rng.integers(-4, 2, shape)
        return self.add("const", (), shape, value=np.where(self.rng.random(shape) < 0.35, 0.0, w))

    def any(self) -> int:
        """Some value of the pool, later ones rather."""
        return self.pool[-1 - min(int(self.rng.geometric(0.4)) - 1, len(self.pool) - 1)]

    def like(self, x: int) -> int:
        """A value of the shape of `x`: another one gathered into it, or a constant."""
        return self.const(self.nodes[x].shape) if self.rng.random() < 0.25 else self.gather(self.any(), self.nodes[x].shape)

    def gather(self, x: int, shape: Sequence[int]) -> int:
        """`x` in another shape: reshaped, transposed, broadcast or with random elements, padding zeros included."""
        size, wanted = int(np.prod(self.nodes[x].shape)), int(np.prod(shape))
        index = np.arange(wanted) % size
        kind = self.rng.integers(4)
        if kind == 0:
            index = self.rng.integers(-1, size, wanted)
        elif kind == 1:
            index = index[::-1]
        return self.add("take", (x,), shape, index=index.reshape(shape))

    def window(self, x: int, width: int) -> int:
        """Windows of a convolution over the flat `x`: (positions, width), with a stride and padding zeros."""
        size, stride, pad = int(np.prod(self.nodes[x].shape)), int(self.rng.integers(1, 3)), int(self.rng.integers(0, 2))
        positions = max(1, min((size + 2 * pad - width) // stride + 1, LARGEST // width))
        at = np.arange(positions)[:, None] * stride + np.arange(width) - pad
        return self.add("take", (x,), at.shape, index=np.where((at < 0) | (at >= size), -1, at))

    def quantize(self, x: int, most: int = 9) -> int:
        """A quantizer of up to `most` bits per element around what `x` can be, so that some elements round and overflow."""
        shape, own = self.nodes[x].shape, intervals(Graph(tuple(self.nodes), (), ()))[x]
        size = np.frexp(np.maximum(np.abs(own.low), np.abs(own.high)))[1]
        k = np.where(self.rng.random(shape) < 0.8, own.low < 0, self.rng.integers(0, 2, shape)).astype(np.int64)
        i = (size - self.rng.integers(0, 4, shape) + self.rng.integers(0, 2, shape)).astype(np.int64)
        i = np.clip(i, -6, 12)
        bits = self.rng.integers(1, most + 1, shape)
        bits = np.where(self.rng.random(shape) < 0.07, self.rng.integers(-2, 1, shape), bits)
        f = np.clip(bits - k - i, -8, 12)
        f = np.minimum(f, most - k - i)
        rounding, overflow = next(self.deck)
        return self.add("quantize", (x,), k=k, i=i, f=f, rounding=rounding, overflow=overflow)

    def table(self, x: int) -> int:
        """Behind a quantizer, tables of random codes, a row per element out of three."""
        q = self.quantize(x, most=6)
        at, shape = self.nodes[q].attrs, self.nodes[q].shape
        codes = self.rng.integers(-40, 41, (3, 1 << max(int((at["k"] + at["i"] + at["f"]).max()), 0)))
        codes[0] = np.sort(codes[0])  # as of a monotone function
        which, f_out = self.rng.integers(0, 3, shape), self.rng.integers(-1, 6, 3)
        return self.add("table", (q,), codes=codes, which=which, f_out=f_out, **{key: at[key] for key in "kif"})

    def dot(self, op: str, x: int) -> int:
        """A product of `x` with a constant on one side or with another value."""
        b, m, k, n = (int(v) for v in self.rng.integers((1, 1, 1, 1), (3, 4, 6, 4)))
        shapes = [(b, m, k), (b, k, n)]
        if op == "dot":
            sides = [self.gather(x, shapes[0]), self.gather(self.any(), shapes[1])]
        else:
            left = int(self.rng.integers(2))  # the side of the variable
            sides = [self.const(shapes[0]), self.const(shapes[1])]
            sides[left] = self.gather(x, shapes[left])
        return self.add("dot", sides, (b, m, n))

    def step(self) -> int:
        """One random operation."""
        op, x = str(self.rng.choice(STEPS)), self.any()
        if op == "quantize":
            return self.quantize(x)
        if op == "table":
            return self.table(x)
        if op in ("window", "sum", "amax", "amin"):
            x = self.window(x, int(self.rng.integers(1, 5)))
            return x if op == "window" else self.add(op, (x,), self.nodes[x].shape[:1])
        if op == "gather":
            return self.gather(x, self.rng.integers(1, 4, self.rng.integers(1, 4)).tolist())
        if op in ("dot", "dot_const"):
            return self.dot(op, x)
        if op in ("neg", "abs"):
            return self.add(op, (x,))
        if op == "concat":
            parts = [self.gather(self.any(), (int(self.rng.integers(1, 7)),)) for _ in range(int(self.rng.integers(1, 4)))]
            return self.add("concat", parts, (sum(self.nodes[j].shape[0] for j in parts),))
        if op == "select":
            condition = self.add(str(self.rng.choice(COMPARISONS)), (x, self.like(x)))
            return self.add("select", (condition, self.like(x), self.like(x)))
        if op in ("bias", "scale"):
            return self.add("add" if op == "bias" else "mul", (x, self.const(self.nodes[x].shape)))
        operands = (x, self.like(x)) if self.rng.random() < 0.5 else (self.like(x), x)
        return self.add(str(self.rng.choice(COMPARISONS)) if op == "compare" else op, operands)


def random_graph(rng: np.random.Generator, deck: Iterator[Modes]) -> Graph:
    """3 to 12 operations behind one or two ports; what grows over `WIDEST` bits is quantized, three values are outputs."""
    draw = Draw(rng, deck)
    for _ in range(rng.integers(1, 3)):
        shape = tuple(int(v) for v in rng.integers(1, 4, rng.integers(1, 3)))
        k, i, f = (int(v) for v in rng.integers((0, 0, 0), (2, 4, 5)))
        draw.pool.append(draw.add("input", (), shape, k=k, i=i, f=max(f, 1 - k - i)))
    ports = tuple(draw.pool)
    for _ in range(rng.integers(3, 13)):
        made = draw.step()
        own = intervals(Graph(tuple(draw.nodes), (), ()))[made]
        bits = np.frexp(np.ldexp(np.maximum(np.abs(own.low), np.abs(own.high)), own.f))[1]
        if bits.max(initial=0) > WIDEST or own.f.max(initial=0) > 14:
            made = draw.quantize(made)
        draw.pool.append(made)
    others = rng.choice(draw.pool[len(ports) :], 2)
    return validate(reached(Graph(tuple(draw.nodes), ports, (draw.pool[-1], *(int(j) for j in others)))))


def vectors(graph: Graph, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`n` codes of the whole port, and half as many real numbers off its grid and outside of it."""
    inside, outside = port_grid(graph, n, rng), port_grid(graph, n // 2, rng)
    return [np.concatenate([a, 3.3 * b + 0.01]) for a, b in zip(inside, outside, strict=True)]


def compare(graph: Graph, inputs: list[np.ndarray], work: Path | None = None, backend: str = "da4ml") -> Counts:
    """Emulator against interpreter, passes and, if there is a folder to `work` in, simulated Verilog."""
    expected = flatten_batch(emulate(graph, inputs))
    rtl_of = BACKENDS[backend]
    comb, flat = rtl_of.to_comb(graph), flatten_batch(inputs)
    other = [flatten_batch(emulate(g, inputs)) for g in (simplify(remove_dead(graph)), canonical(graph))]
    rtl = 0
    if work is not None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            written = rtl_of.write_rtl(comb, Path(folder) / "net", name="net")
            rtl = int((sim.simulate(written, flat, work=work) != expected).sum())
    varying = len(expected) * int(np.any(expected != expected[:1], axis=0).sum())
    wrong = int((rtl_of.predict(comb, flat) != expected).sum()), sum(int((v != expected).sum()) for v in other)
    return Counts(expected.size, int((expected != 0).sum()), varying, *wrong, rtl)


def fails(graph: Graph, inputs: list[np.ndarray], backend: str = "da4ml") -> bool:
    """Whether anything differs or breaks; what is refused with a typed error doesn't."""
    try:
        counts = compare(graph, inputs, backend=backend)
    except LoweringError:
        return False
    except Exception:  # a crash of any kind is what the fuzz looks for
        return True
    return bool(counts.netlist or counts.passes)


def shrunk(graph: Graph, inputs: list[np.ndarray], failing: Callable[[Graph, list[np.ndarray]], bool] = fails) -> Graph:
    """A graph with as few outputs and nodes as possible that still fails: nodes become zeros or one of their operands."""
    smaller: Graph | None = graph
    while smaller is not None:
        graph = smaller
        smaller = next((g for g in _candidates(graph) if _size(g) < _size(graph) and failing(g, inputs)), None)
    return graph


def _size(graph: Graph) -> tuple[int, int, int]:
    return len(graph.outputs), len(graph.nodes), sum(n.op not in ("const", "input") for n in graph.nodes)


def _candidates(graph: Graph) -> Iterator[Graph]:
    for j in dict.fromkeys(graph.outputs):
        yield reached(graph._replace(outputs=(j,)))
    for index, node in enumerate(graph.nodes):
        if node.op in ("input", "const"):
            continue
        for operand in node.inputs:
            if graph.nodes[operand].shape == node.shape:
                place = [operand if j == index else j for j in range(len(graph.nodes))]
                nodes = tuple(Node(n.op, tuple(place[j] for j in n.inputs), n.shape, n.attrs) for n in graph.nodes)
                yield reached(Graph(nodes, graph.inputs, tuple(place[j] for j in graph.outputs)))
        zero = Node("const", (), node.shape, {"value": np.zeros(node.shape)})
        yield reached(graph._replace(nodes=(*graph.nodes[:index], zero, *graph.nodes[index + 1 :])))


def text(graph: Graph) -> str:
    """The graph, a line per node."""
    lines = []
    for index, node in enumerate(graph.nodes):
        attrs = ", ".join(f"{key}={np.asarray(v).tolist()}" for key, v in node.attrs.items())
        lines.append(f"%{index} = {node.op}{node.inputs} {node.shape} {attrs}")
    return "\n".join([*lines, f"inputs {graph.inputs} outputs {graph.outputs}"])


def shuffled(rng: np.random.Generator) -> Iterator[Modes]:
    """All 28 pairs in random order, again and again."""
    while True:
        yield from (PAIRS[n] for n in rng.permutation(len(PAIRS)))


def run(
    graphs: int = 1000,
    seed: int = 0,
    *,
    vectors_each: int = 100,
    rtl: int = 0,
    backend: str = "da4ml",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compare `graphs` random graphs and return counts; graph n is a function of (seed, n) alone.

    refused: graphs with a typed error, failed: numbers of those with a mismatch or a crash, each reported with its shrunk
    graph.  ops and pairs: how often each came.  overflow: the part of quantizer elements that can.  holds: none failed or
    refused, every op and pair came (in 100 graphs and more), half of all outputs nonzero and half of them no constants.
    """
    start, failed, refused = time.perf_counter(), [], []
    ops: Counter[str] = Counter()
    pairs: Counter[Modes] = Counter()
    total, quantized = Counts(0, 0, 0, 0, 0, 0), [0, 0]
    with tempfile.TemporaryDirectory(prefix="fuzz-graphs-") as folder:
        for n in range(graphs):
            rng = np.random.default_rng([seed, n])
            graph = random_graph(rng, shuffled(rng))
            inputs = vectors(graph, vectors_each, rng)
            ops.update(node.op for node in graph.nodes)
            pairs.update((node.attrs["rounding"], node.attrs["overflow"]) for node in graph.nodes if node.op == "quantize")
            may = [v for j, v in overflows(graph).items() if graph.nodes[j].op == "quantize"]
            quantized = [quantized[0] + sum(v.size for v in may), quantized[1] + sum(int(v.sum()) for v in may)]
            try:
                counts = compare(graph, inputs, Path(folder) if n < rtl else None, backend)
            except LoweringError as error:
                refused.append(n)
                report(f"graph {n} of seed {seed} is refused: {error}")
                continue
            except Exception as error:  # reported below, as a failure
                counts = Counts(0, 0, 0, 1, 0, 0)
                report(f"graph {n} of seed {seed}: {type(error).__name__}: {error}")
            total = Counts(*(a + b for a, b in zip(total, counts, strict=True)))
            if counts.netlist or counts.passes or counts.rtl:
                failed.append(n)
                small = shrunk(graph, inputs, partial(fails, backend=backend))
                report(f"graph {n} of seed {seed} fails: {counts}\n{text(small)}")
    every = set(ops) == set(ARITY) and set(pairs) == set(PAIRS)
    rates = {key: round(getattr(total, key) / max(total.outputs, 1), 4) for key in ("nonzero", "varying")}
    return {
        "graphs": graphs,
        "seed": seed,
        "outputs": total.outputs,
        "mismatches": {backend: total.netlist, "passes": total.passes, "rtl": total.rtl},
        "simulated": min(rtl, graphs),
        "failed": failed,
        "refused": refused,
        **rates,
        "overflow": round(quantized[1] / max(quantized[0], 1), 4),
        "ops": dict(sorted(ops.items())),
        "pairs": {" ".join(pair): pairs[pair] for pair in PAIRS},
        "seconds": round(time.perf_counter() - start, 1),
        "holds": not failed and not refused and (every or graphs < 100) and min(rates.values()) >= 0.5,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rtl", type=int, default=0, help="how many graphs to simulate in Verilator, about 3 s each")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="da4ml")
    args = parser.parse_args()
    counts = run(args.graphs, args.seed, rtl=args.rtl, backend=args.backend)
    print(json.dumps(counts, indent=2))
    return 0 if counts["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
