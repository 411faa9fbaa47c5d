"""Random fixed-point graphs for the tests of the lowering: plain functions of a seeded numpy Generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pquant_jax.lower.ir import Graph, Node, validate

MODES = [(r, o) for r in ("TRN", "RND") for o in ("WRAP", "SAT", "SAT_SYM")]
KINDS = ("dense", "residual", "elementwise", "select", "reduce", "product", "mixed", "table")


def node(nodes: list[Node], op: str, inputs: Sequence[int] = (), shape: Sequence[int] | None = None, **attrs: Any) -> int:
    """Append a node (the shape of its first input unless given) and return its index."""
    shape = nodes[inputs[0]].shape if shape is None else tuple(int(s) for s in shape)
    nodes.append(Node(op, tuple(inputs), shape, attrs, attrs.pop("name", "")))
    return len(nodes) - 1


def const(nodes: list[Node], value) -> int:
    """Append a constant."""
    value = np.asarray(value, np.float64)
    return node(nodes, "const", (), value.shape, value=value)


def random_format(rng: np.random.Generator, shape: Sequence[int]) -> dict[str, np.ndarray]:
    """k, i, f per element: most keep something of values around 1 to 16, a tenth have odd places or no bits at all."""
    k, i, f = rng.integers(0, 2, shape), rng.integers(1, 6, shape), rng.integers(-1, 5, shape)
    odd = rng.random(shape)
    i = np.where(odd < 0.1, rng.integers(-4, 6, shape), i)
    f = np.where(odd < 0.1, rng.integers(-4, 6, shape), f)
    i = np.where(odd < 0.03, -k - f - rng.integers(0, 2, shape), i)
    return {"k": k.astype(np.int64), "i": i.astype(np.int64), "f": f.astype(np.int64)}


def quantized(nodes: list[Node], x: int, rng: np.random.Generator, modes: tuple[str, str], name: str = "") -> int:
    """Append a quantizer of a random format per element; `modes` = (rounding, overflow)."""
    form: dict[str, Any] = random_format(rng, nodes[x].shape)
    return node(nodes, "quantize", (x,), name=name, rounding=modes[0], overflow=modes[1], **form)


def table(nodes: list[Node], x: int, rng: np.random.Generator, rows: int = 3, bits: int = 5) -> int:
    """Append tables of random codes behind the quantizer `x`, one of `rows` per element; some rows are constant."""
    at, shape = nodes[x].attrs, nodes[x].shape
    entries = 1 << int(np.max(at["k"] + at["i"] + at["f"], initial=0))
    codes = rng.integers(-(1 << bits), 1 << bits, (rows, entries)) * 2 ** rng.integers(0, 2, (rows, 1))
    codes = np.where(rng.random((rows, 1)) < 0.1, codes[:, :1], codes)
    which, f_out = rng.integers(0, rows, shape), rng.integers(-1, 6, rows)
    return node(nodes, "table", (x,), codes=codes, which=which, f_out=f_out, **{key: at[key] for key in "kif"})


def kernel(rng: np.random.Generator, shape: Sequence[int], bits: int = 4, density: float = 0.6) -> np.ndarray:
    """Random weights of `bits` bits with a different grid each, zeros included."""
    w = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape) * 2.0 ** rng.integers(-3, 1, shape)
    return np.where(rng.random(shape) < density, w, 0.0)


def port(nodes: list[Node], shape: Sequence[int], rng: np.random.Generator) -> int:
    """An input port of a random uniform format."""
    k, i, f = int(rng.random() < 0.7), int(rng.integers(1, 5)), int(rng.integers(0, 6))
    return node(nodes, "input", (), shape, k=k, i=i, f=f, name="x")


def pick(nodes: list[Node], x: int, shape: Sequence[int], rng: np.random.Generator) -> int:
    """A random gather of `x` into `shape`, padding zeros included."""
    size = int(np.prod(nodes[x].shape))
    return node(nodes, "take", (x,), shape, index=rng.integers(-1, size, shape))


def dense(nodes: list[Node], x: int, n: int, rng: np.random.Generator, modes: tuple[str, str], relu: bool = True) -> int:
    """x (m,) @ kernel (m, n) + bias, relu, quantizer -> (n,)."""
    m = int(np.prod(nodes[x].shape))
    row = node(nodes, "take", (x,), (1, 1, m), index=np.arange(m).reshape(1, 1, m))
    y = node(nodes, "dot", (row, const(nodes, kernel(rng, (1, m, n)))), (1, 1, n))
    y = node(nodes, "take", (y,), (n,), index=np.arange(n))
    y = node(nodes, "add", (y, const(nodes, kernel(rng, (n,)))))
    if relu:
        y = node(nodes, "max", (y, const(nodes, np.zeros(n))))
    return quantized(nodes, y, rng, modes, name="Dense/output")


def step(nodes: list[Node], pool: list[int], rng: np.random.Generator, modes: tuple[str, str], ops: Sequence[str]) -> int:
    """Append one random operation on vectors of the pool, all of one length n; returns the new vector (n,)."""
    x, y = (int(v) for v in rng.choice(pool, 2))
    n = nodes[x].shape[0]
    if rng.random() < 0.3:
        y = const(nodes, kernel(rng, (n,)))
    if rng.random() < 0.3:
        x, y = y, x
    op = str(rng.choice(ops))
    if op in ("neg", "abs"):
        return node(nodes, op, (x,))
    if op == "select":
        cond = node(nodes, str(rng.choice(["ge", "gt", "le", "lt", "eq", "ne"])), (x, y))
        return node(nodes, "select", (cond, *(int(v) for v in rng.choice([*pool, y], 2))))
    if op in ("sum", "amax", "amin"):
        return node(nodes, op, (pick(nodes, x, (n, int(rng.integers(1, 5))), rng),), (n,))
    if op == "dot":
        b, k = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        z = node(nodes, "dot", (pick(nodes, x, (b, 2, k), rng), pick(nodes, y, (b, k, 2), rng)), (b, 2, 2))
        return quantized(nodes, pick(nodes, z, (n,), rng), rng, modes)
    if op == "concat":
        return pick(nodes, node(nodes, "concat", (x, y), (2 * n,)), (n,), rng)
    if op == "quantize":
        return quantized(nodes, x, rng, modes)
    if op == "table":
        return table(nodes, quantized(nodes, x, rng, modes), rng)
    z = node(nodes, op, (x, y))
    return quantized(nodes, z, rng, modes) if op == "mul" else z


OPS = {
    "elementwise": ("add", "sub", "mul", "neg", "abs", "max", "min", "quantize"),
    "select": ("select", "max", "min", "abs", "neg", "sub", "quantize"),
    "reduce": ("sum", "amax", "amin", "concat", "quantize"),
    "product": ("dot", "mul", "concat", "neg"),
    "table": ("table", "table", "neg", "sub", "max"),
}


def random_graph(
    rng: np.random.Generator, kind: str, modes: tuple[str, str] = ("RND", "SAT"), n: int = 5, steps: int = 6
) -> Graph:
    """A random graph of a kind in `KINDS` on `n`-vectors, all of which are outputs, and a constant one.

    Values stay below 32 bits: every product is quantized, and additions double at most `steps` times.
    """
    nodes: list[Node] = []
    inputs = [port(nodes, (n,), rng) for _ in range(1 + (kind != "dense"))]
    pool = [quantized(nodes, x, rng, modes, name="x/input") for x in inputs]
    if kind == "dense":
        for _ in range(2):
            pool.append(dense(nodes, pool[-1], n, rng, modes))
    elif kind == "residual":
        pool.append(dense(nodes, pool[-1], n, rng, modes, relu=False))
        pool.append(quantized(nodes, node(nodes, "add", (pool[0], pool[-1])), rng, modes))
    else:
        ops = OPS[kind] if kind in OPS else sorted({op for group in OPS.values() for op in group})
        for _ in range(steps):
            pool.append(step(nodes, pool, rng, modes, ops))
    last = quantized(nodes, pool[-1], rng, modes, name="y/output")
    constant = node(nodes, "neg", (const(nodes, [0.75, 0.0]),))
    return validate(Graph(tuple(nodes), tuple(inputs), (last, *pool, constant)))
