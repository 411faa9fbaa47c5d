"""da4ml netlists against the emulator on random graphs, and what is refused; what both backends must do is in test_rtl.py."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import _scalars, da4ml
from pquant_jax.lower.backends.da4ml import check_supported, predict, to_comb
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from . import netlists
from .random_graphs import KINDS, MODES, const, kernel, node, random_graph

BEYOND_DA4ML = [(r, o) for r in ROUNDINGS for o in OVERFLOWS if (r, o) not in MODES]
compare = partial(netlists.compare, da4ml)


@pytest.mark.parametrize("modes", MODES, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_netlist_equals_emulator(kind, modes):
    rng = np.random.default_rng([KINDS.index(kind), MODES.index(modes)])
    for _ in range(12):
        compare(random_graph(rng, kind, modes), rng)


@pytest.mark.parametrize("modes", BEYOND_DA4ML, ids="-".join)
def test_modes_that_da4ml_lacks_are_exact_too(modes):
    rng = np.random.default_rng([7, BEYOND_DA4ML.index(modes)])
    for kind in KINDS:
        compare(random_graph(rng, kind, modes), rng)


def test_pipelining_aware_and_wider_adders_stay_exact():
    rng = np.random.default_rng(5)
    for _ in range(4):
        graph = random_graph(rng, "dense", ("RND", "SAT"))
        x = port_grid(graph, 200, rng)
        for hwconf in ((1, -1, 4), (6, 8, -1)):
            comb = to_comb(graph, hwconf=hwconf, solver_options={"hard_dc": 1})
            np.testing.assert_array_equal(predict(comb, flatten_batch(x)), flatten_batch(emulate(graph, x)))


def test_a_flipped_weight_is_seen():
    """The comparison can fail: the netlist of a model with the sign of one weight changed differs on most inputs."""
    rng = np.random.default_rng(6)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=3, f=2)
    row = node(nodes, "take", (x,), (1, 1, 3), index=np.arange(3).reshape(1, 1, 3))
    weights = const(nodes, [[[1.5, -1.0], [0.0, 2.0], [0.25, 3.0]]])
    y = node(nodes, "dot", (row, weights), (1, 1, 2))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    compare(graph, rng)
    value = nodes[weights].attrs["value"].copy()
    value[0, 2, 0] = -0.25
    nodes[weights] = Node("const", (), value.shape, {"value": value})
    values = port_grid(graph, 300, rng)
    wrong = predict(to_comb(graph._replace(nodes=tuple(nodes))), flatten_batch(values)) != flatten_batch(emulate(graph, values))
    assert wrong[:, 0].mean() > 0.9 and not wrong[:, 1].any()


def test_scalars_and_higher_ranks():
    rng = np.random.default_rng(9)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (), k=1, i=2, f=2)
    y = node(nodes, "input", (), (2, 1, 3), k=0, i=2, f=3)
    spread = node(nodes, "take", (x,), (2, 1, 3), index=np.zeros((2, 1, 3), np.int64))
    product = node(nodes, "mul", (spread, y))
    fixed = node(nodes, "dot", (const(nodes, kernel(rng, (2, 2, 1))), product), (2, 2, 3))
    graph = validate(Graph(tuple(nodes), (x, y), (fixed, product, x)))
    compare(graph, rng)


def far_apart() -> Graph:
    """A product of 30 bits, negated, whose sign (a bit of weight 2^10) is added to its last bit (2^-16)."""
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=7, f=8)
    a, b = (node(nodes, "take", (x,), (1,), index=np.array([j])) for j in (0, 1))
    y = node(nodes, "neg", (node(nodes, "mul", (a, b)),))
    at = {key: np.array([v]) for key, v in (("k", 1), ("i", 12), ("f", -8))}
    q = node(nodes, "quantize", (y,), rounding="RND_ZERO", overflow="SAT_SYM", **at)
    return validate(Graph(tuple(nodes), (x,), (q,)))


def test_powers_of_two_that_are_far_apart():
    """da4ml's own order would count everything in 2^32 and lose the bounds of the clip: found by benchmarks/fuzz_graphs.py."""
    compare(far_apart(), np.random.default_rng(10), 500)


def test_a_multiplexer_that_da4ml_would_misalign_is_refused(monkeypatch):
    monkeypatch.setattr(_scalars, "MAX_APART", 1000)  # da4ml's own order
    with pytest.raises(LoweringError, match="would misalign a multiplexer.*more than 31 apart"):
        to_comb(far_apart())


def test_select_takes_any_value_but_zero_for_true():
    rng = np.random.default_rng(11)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (4,), k=1, i=2, f=1)
    bit = node(nodes, "gt", (x, const(nodes, np.zeros(4))))
    conditions = (x, node(nodes, "neg", (bit,)), node(nodes, "add", (bit, bit)), node(nodes, "abs", (x,)))
    chosen = [node(nodes, "select", (c, const(nodes, [1.0, 0.0, 2.0, -1.0]), x)) for c in conditions]
    compare(validate(Graph(tuple(nodes), (x,), tuple(chosen))), rng)


def one_quantizer(**changes) -> Graph:
    attrs = {"k": np.ones(2, int), "i": np.ones(2, int), "f": np.ones(2, int), "rounding": "RND", "overflow": "SAT"}
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=3, f=4)
    y = node(nodes, "quantize", (x,), name="Dense_0/input", **{**attrs, **changes})
    return validate(Graph(tuple(nodes), (x,), (y,)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounding": "RND_ODD"}, r"%1 quantize 'Dense_0/input': rounding mode 'RND_ODD' has no netlist \(did you mean 'RND"),
        ({"rounding": "STOCHASTIC"}, "rounding mode 'STOCHASTIC'.*change the rounding mode"),
        ({"overflow": "SAT_ZERO"}, r"overflow mode 'SAT_ZERO' .*change the overflow mode"),
    ],
)
def test_unknown_modes_are_refused_before_any_work(changes, words, monkeypatch):
    import da4ml.trace

    def touched(*args, **kwargs):
        raise AssertionError("da4ml was called")

    monkeypatch.setattr(da4ml.trace, "comb_trace", touched)
    for refuse in (check_supported, to_comb):
        with pytest.raises(LoweringError, match=words):
            refuse(one_quantizer(**changes))


def with_constant(value: float) -> Graph:
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=3, f=4)
    y = node(nodes, "mul", (x, const(nodes, [value])))
    return validate(Graph(tuple(nodes), (x,), (y,)))


def test_constants_are_limited_to_24_bits():
    to_comb(with_constant((2.0**24 - 1) / 2**20))
    with pytest.raises(LoweringError, match=r"%1 const: .* has 25 significant and 20 fractional bits.*quantize that parameter"):
        to_comb(with_constant((2.0**24 + 1) / 2**20))
    with pytest.raises(LoweringError, match="has 1 significant and 32 fractional"):
        to_comb(with_constant(2.0**-32))
    with pytest.raises(LoweringError, match="24 and 31"):
        to_comb(with_constant(0.1))


def test_constants_that_are_quantized_first_may_be_fine():
    """A float32 kernel and its quantizer in the graph are folded; a kernel computed from constants obeys the limit."""
    rng = np.random.default_rng(14)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=3, f=4)
    raw = const(nodes, rng.normal(size=3) * 1e-3)
    fine = node(
        nodes, "quantize", (raw,), k=np.ones(3, int), i=-np.full(3, 7), f=np.full(3, 14), rounding="RND_CONV", overflow="SAT"
    )
    y = node(nodes, "mul", (x, fine))
    compare(validate(Graph(tuple(nodes), (x,), (y,))), rng)
    wide = node(nodes, "mul", (const(nodes, np.full(3, 2.0**13 + 1)), const(nodes, np.full(3, 2.0**13 - 1))))
    z = node(nodes, "add", (x, wide))
    with pytest.raises(LoweringError, match="mul: the constant .* has 26 significant and 0 fractional bits"):
        to_comb(validate(Graph(tuple(nodes), (x,), (z,))))


def test_formats_finer_than_da4ml_are_refused():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=0, i=-20, f=36)
    y = node(nodes, "quantize", (x,), k=np.zeros(1, int), i=-np.full(1, 20), f=np.full(1, 34), rounding="RND", overflow="SAT")
    with pytest.raises(LoweringError, match="%1 quantize: needs 34 fractional bits, da4ml takes 31"):
        to_comb(validate(Graph(tuple(nodes), (x,), (y,))))


def test_interpreter_limit_is_an_error():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=31, f=0)
    y = node(nodes, "neg", (x,))
    comb = to_comb(validate(Graph(tuple(nodes), (x,), (y,))))
    with pytest.raises(LoweringError, match="handles 31 bits per value, this netlist has 32"):
        predict(comb, np.zeros((3, 1)))


def test_more_than_53_bits_are_refused():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=30, f=0)
    with pytest.raises(LoweringError, match="60 bits, float64 has 53"):
        to_comb(Graph(tuple([*nodes, Node("mul", (x, x), (1,))]), (x,), (1,)))


def test_a_multiplier_slower_than_the_stage_is_explained():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (2,), k=1, i=3, f=4)
    y = node(nodes, "mul", (x, node(nodes, "take", (x,), (2,), index=np.array([1, 0]))))
    graph = validate(Graph(tuple(nodes), (x,), (y,)))
    with pytest.raises(LoweringError, match="latency cutoff 2.*one multiplier is slower than a pipeline stage: use a larger"):
        to_comb(graph, hwconf=(1, -1, 2))
    to_comb(graph, hwconf=(1, -1, 8))
