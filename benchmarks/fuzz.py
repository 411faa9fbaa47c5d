"""Random dense and residual models, lowered: jitted JAX forward, numpy emulator and da4ml must give the same integers.

    python benchmarks/fuzz.py [--models 200] [--seed 0]

Every model is drawn anew: framework, depth, widths, BatchNorm, residual branches, the port, and a format per element of
every weight and activation, widths of zero and below included.  Weights take any rounding and overflow mode,
activations every pair in turn: the six that da4ml has (TRN and RND with WRAP, SAT and SAT_SYM) and the 22 that the
lowering writes with its adders.  Vectors are drawn from the whole input port.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pquant_jax as pq
from pquant_jax import _tree, lower
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import flatten_batch, port_grid, trace_values
from pquant_jax.lower.ranges import check_float32
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS, round_codes

PAIRS: Final = tuple(itertools.product(ROUNDINGS, OVERFLOWS))
NATIVE: Final = tuple(itertools.product(("TRN", "RND"), ("WRAP", "SAT", "SAT_SYM")))
TIMES: Final = 10  # how often each pair has to come in 200 models
Modes = tuple[str, str]


class Block(NamedTuple):
    """One layer: h = relu(norm(x @ kernel + bias)), or x + h."""

    width: int
    norm: bool
    relu: bool
    residual: bool


class Case(NamedTuple):
    """A model ready to be compared.  modes: the (rounding, overflow) of every activation site."""

    inst: pq.Instrumented
    view: pq.View
    state: Any
    graph: lower.Graph
    modes: list[Modes]


class Counts(NamedTuple):
    """What one comparison gives; all but the first are counts of scalars.  varying: of outputs that are no constant."""

    vectors: int
    outputs: int
    nonzero: int
    varying: int
    jax: int
    da4ml: int
    sites: int
    overflows: int


class Linen(nn.Module):
    """The blocks in flax.linen."""

    blocks: tuple[Block, ...]
    outputs: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for block in self.blocks:
            h = nn.Dense(block.width)(x)
            h = nn.BatchNorm(use_running_average=not train)(h) if block.norm else h
            h = nn.relu(h) if block.relu else h
            x = x + h if block.residual else h
        return nn.Dense(self.outputs)(x)


def plain(blocks: tuple[Block, ...], outputs: int, inputs: int) -> pq.Model:
    """The same as a function of one's own; its state holds the running statistics."""
    shapes = dict(enumerate(itertools.pairwise((inputs, *(b.width for b in blocks), outputs))))
    params = {f"layer{n}": {"w": np.zeros(s), "b": np.zeros(s[1])} for n, s in shapes.items()}
    params |= {f"norm{n}": {"scale": np.ones(b.width), "bias": np.zeros(b.width)} for n, b in enumerate(blocks) if b.norm}
    state = {f"norm{n}": {"mean": np.zeros(b.width), "var": np.ones(b.width)} for n, b in enumerate(blocks) if b.norm}

    def forward(p: Any, state: Any, x: jax.Array, *, train: bool, rng: Any) -> tuple[jax.Array, Any]:
        del train, rng
        for n, block in enumerate(blocks):
            h = x @ p[f"layer{n}"]["w"] + p[f"layer{n}"]["b"]
            if block.norm:
                at, norm = state[f"norm{n}"], p[f"norm{n}"]
                h = (h - at["mean"]) * (jax.lax.rsqrt(at["var"] + 1e-5) * norm["scale"]) + norm["bias"]
            h = jnp.maximum(h, 0) if block.relu else h
            x = x + h if block.residual else h
        last = p[f"layer{len(blocks)}"]
        return x @ last["w"] + last["b"], state

    return pq.Model(forward, params, state)


def random_model(rng: np.random.Generator) -> tuple[pq.Model, int]:
    """(model, inputs) with 1 to 4 blocks of 2 to 8 features and random parameters and statistics."""
    width = inputs = int(rng.integers(2, 9))
    blocks = []
    for _ in range(rng.integers(1, 5)):
        residual = bool(rng.random() < 0.4)
        width = width if residual else int(rng.integers(2, 9))
        blocks.append(Block(width, bool(rng.random() < 0.3), bool(rng.random() < 0.7), residual))
    outputs = int(rng.integers(1, 6))
    if rng.random() < 0.5:
        model = plain(tuple(blocks), outputs, inputs)
    else:
        net, x = Linen(tuple(blocks), outputs), jnp.zeros((1, inputs))
        variables = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), jax.eval_shape(net.init, jax.random.key(0), x))
        model = pq.from_linen(net, x, variables=variables)

    def drawn(path: str, leaf: Any) -> np.ndarray:
        positive = path.endswith(("scale", "var"))
        v = rng.uniform(0.3, 2.0, leaf.shape) if positive else rng.normal(0, 0.8, leaf.shape)
        return np.asarray(v, np.float32)

    params, state = (_tree.replace(t, {p: drawn(p, v) for p, v in _tree.flatten(t).items()}) for t in (model.params, model.state))
    return model._replace(params=params, state=state), inputs


def random_format(rng: np.random.Generator, spec: pq.SiteSpec, modes: Modes) -> pq.KIF:
    """k, i, f per element: 1 to 7 bits around the size of the values, a tenth without a bit, some with less than none."""
    k = np.full(spec.shape, float(spec.signed)) if rng.random() < 0.8 else rng.integers(0, 2, spec.shape)
    bits = np.maximum(rng.integers(2, 8, spec.shape) - (rng.random(spec.shape) < 0.2), 1)
    bits = np.where(rng.random(spec.shape) < 0.1, rng.integers(-2, 1, spec.shape), bits)
    i = rng.integers(-1, 2, spec.shape)
    return pq.KIF(*(np.asarray(v, np.float32) for v in (k, i, bits - k - i)), *modes)


def random_case(rng: np.random.Generator, deck: Iterator[Modes]) -> Case:
    """A model with formats.  deck: the modes of its activation sites; weights draw theirs from all 28."""
    model, inputs = random_model(rng)
    k, i, f = int(rng.integers(0, 2)), int(rng.integers(0, 4)), int(rng.integers(0, 4))
    inst = pq.instrument(model, np.zeros((1, inputs), np.float32), inputs=pq.InputSpec(k, i, max(f, 1 - k - i)))
    activations = {name: next(deck) for name, spec in inst.sites.items() if spec.kind == "input"}
    kifs = {}
    for name, spec in inst.sites.items():
        kifs[name] = random_format(rng, spec, activations.get(name) or PAIRS[rng.integers(len(PAIRS))])
    view = quantized(model.params, kifs)
    graph = lower.trace(inst, view, model.state)
    check_float32(graph)  # so a difference is a fault, never the float32 forward's rounding
    return Case(inst, view, model.state, graph, list(activations.values()))


@jax.jit
def quantized(params: Any, kifs: dict[str, pq.KIF]) -> pq.View:
    """The view of parameters and formats."""
    leaves = _tree.flatten(params)
    chosen = {n: pq.numerics.quantize(leaves[n], kifs[n]) for n in kifs if n in leaves}
    return pq.View(_tree.replace(params, chosen), kifs, {})


def overflowing(graph: lower.Graph, values: list[np.ndarray]) -> tuple[int, int]:
    """(inputs of all quantizers, those whose rounded value lies outside of a format that has bits)."""
    total = outside = 0
    for node in graph.nodes:
        if node.op == "quantize":
            k, i, f = (np.asarray(node.attrs[part]) for part in "kif")
            codes = round_codes(np.ldexp(values[node.inputs[0]], f), str(node.attrs["rounding"]))
            span = np.ldexp(1.0, i + f)
            total += codes.size
            outside += int(((k + i + f > 0) & ((codes < -k * span) | (codes > span - 1))).sum())
    return total, outside


def compare(case: Case, rng: np.random.Generator, vectors: int) -> Counts:
    """All three on `vectors` random codes of the whole port; the emulator is the reference."""
    inputs = port_grid(case.graph, vectors, rng)
    values = trace_values(case.graph, inputs)
    expected = flatten_batch([values[j] for j in case.graph.outputs])
    forward = lower.forward_outputs(case.inst, case.view, case.state, inputs)
    netlist = da4ml.predict(da4ml.to_comb(case.graph), flatten_batch(inputs))
    wrong = [int((v != expected).sum()) for v in (forward, netlist)]
    nonzero, varying = int((expected != 0).sum()), len(expected) * int(np.any(expected != expected[:1], axis=0).sum())
    return Counts(len(expected), expected.size, nonzero, varying, *wrong, *overflowing(case.graph, values))


def shuffled(rng: np.random.Generator) -> Iterator[Modes]:
    """All 28 pairs in random order, again and again, so that each comes as often as any other."""
    while True:
        yield from (PAIRS[n] for n in rng.permutation(len(PAIRS)))


def run(models: int, seed: int, *, vectors: int = 500, progress: Callable[[int, Counts], None] | None = None) -> dict[str, Any]:
    """Compare `models` random models and return counts.

    failed: the numbers of models with a mismatch; model n is a function of (seed, n) but for the order of its modes.
    pairs: how often an activation site had each "ROUNDING OVERFLOW".  holds: no mismatch, every pair at least 10 times
    in 200 models (in proportion for fewer), half of all outputs nonzero, half of them no constants (a wrong netlist
    would go unseen there), a fifth of all site inputs overflowing.
    """
    start, counts, failed = time.perf_counter(), [], []
    pairs: Counter[Modes] = Counter()
    deck = shuffled(np.random.default_rng(seed))
    for n in range(models):
        rng = np.random.default_rng([seed, n])
        case = random_case(rng, deck)
        pairs.update(case.modes)
        counts.append(compare(case, rng, vectors))
        if counts[-1].jax or counts[-1].da4ml:
            failed.append(n)
        if progress is not None:
            progress(n, counts[-1])
        if n % 25 == 24:
            jax.clear_caches()  # no model comes twice
    total = Counts(*(sum(column) for column in zip(*counts, strict=True)))
    nonzero, varying = total.nonzero / total.outputs, total.varying / total.outputs
    overflow = total.overflows / max(total.sites, 1)
    rarest = min(pairs[pair] for pair in PAIRS)
    return {
        "models": models,
        "seed": seed,
        "vectors": total.vectors,
        "outputs": total.outputs,
        "mismatches": {"jax": total.jax, "da4ml": total.da4ml},
        "failed": failed,
        "nonzero": round(nonzero, 4),
        "varying": round(varying, 4),
        "overflow": round(overflow, 4),
        "rarest_pair": rarest,
        "pairs": {" ".join(pair): pairs[pair] for pair in PAIRS},
        "seconds": round(time.perf_counter() - start, 1),
        "holds": not failed and rarest >= TIMES * models // 200 and min(nonzero, varying) >= 0.5 and overflow >= 0.2,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = run(args.models, args.seed)
    print(json.dumps(counts, indent=2))
    return 0 if counts["holds"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
