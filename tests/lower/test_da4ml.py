"""da4ml netlists against the emulator on random graphs, what is refused, and the files that are written."""

from __future__ import annotations

import numpy as np
import pytest

from pquant_jax._errors import LoweringError
from pquant_jax.lower.backends import _scalars
from pquant_jax.lower.backends.da4ml import check_supported, predict, to_comb, write_rtl
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.ir import Graph, Node, validate
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.numerics.oracle import OVERFLOWS, ROUNDINGS

from .random_graphs import KINDS, MODES, const, dense, kernel, node, port, quantized, random_graph

BEYOND_DA4ML = [(r, o) for r in ROUNDINGS for o in OVERFLOWS if (r, o) not in MODES]


def compare(graph: Graph, rng: np.random.Generator, n: int = 300) -> None:
    """Emulator and da4ml interpreter on all codes of the ports, and on reals that are off the grid and outside."""
    comb = to_comb(graph)
    for x in (port_grid(graph, n, rng), [3.3 * v + 0.01 for v in port_grid(graph, n, rng)]):
        np.testing.assert_array_equal(predict(comb, flatten_batch(x)), flatten_batch(emulate(graph, x)))


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


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("overflow", OVERFLOWS)
def test_one_quantizer_on_every_code(rounding, overflow):
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
        np.testing.assert_array_equal(predict(to_comb(graph), values), flatten_batch(emulate(graph, [values])))


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


def test_constants_unused_inputs_and_missing_bits():
    rng = np.random.default_rng(8)
    nodes: list[Node] = []
    x = node(nodes, "input", (), (3,), k=1, i=2, f=2)
    nothing = node(nodes, "input", (), (2,), k=1, i=-2, f=1)  # a port without bits
    first = node(nodes, "take", (x,), (2,), index=np.array([0, -1]))  # elements 1 and 2 of x are never used
    absent = node(nodes, "add", (nothing, const(nodes, [-1.5, 2.0])))
    size = node(nodes, "abs", (absent,))
    constant = const(nodes, [[-0.75, 0.0]])
    graph = validate(Graph(tuple(nodes), (x, nothing), (first, absent, size, constant, x)))
    compare(graph, rng)
    compare(graph._replace(outputs=(constant,)), rng)
    compare(graph._replace(outputs=(nothing, size)), rng)


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


def test_interpreter_limit_and_wrong_width_are_errors():
    nodes: list[Node] = []
    x = node(nodes, "input", (), (1,), k=1, i=31, f=0)
    y = node(nodes, "neg", (x,))
    comb = to_comb(validate(Graph(tuple(nodes), (x,), (y,))))
    with pytest.raises(LoweringError, match="handles 31 bits per value, this netlist has 32"):
        predict(comb, np.zeros((3, 1)))
    with pytest.raises(LoweringError, match="has 2 input values per sample, got 5"):
        predict(to_comb(one_quantizer()), np.zeros((3, 5)))


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


def model(rng: np.random.Generator) -> Graph:
    """A dense layer with a residual connection."""
    nodes: list[Node] = []
    x = port(nodes, (6,), rng)
    a = quantized(nodes, x, rng, ("RND", "SAT"))
    b = dense(nodes, a, 6, rng, ("RND", "SAT"))
    y = node(nodes, "add", (a, b))
    return validate(Graph(tuple(nodes), (x,), (y,)))


@pytest.mark.parametrize("flavor", ["verilog", "vhdl"])
def test_written_project(flavor, tmp_path):
    graph = model(np.random.default_rng(11))
    comb = to_comb(graph)
    suffix = {"verilog": ".v", "vhdl": ".vhd"}[flavor]
    flat = write_rtl(comb, tmp_path / "a" / "flat", name="net", flavor=flavor)
    assert (flat.stages, flat.latency_cycles, flat.reg_bits) == (0, 0, 0)
    assert "model_out" in (flat.src / f"net{suffix}").read_text()
    assert not any("clk" in line for line in (flat.src / f"net{suffix}").read_text().splitlines())
    piped = write_rtl(comb, tmp_path / "a" / "piped", name="net", flavor=flavor, latency_cutoff=2)
    assert piped.stages > 1 and piped.latency_cycles == piped.stages + 1 and piped.ii == 1 and piped.reg_bits > 0
    assert "clk" in (piped.src / f"net{suffix}").read_text()
    assert len(list(piped.src.glob("net_stage*"))) == piped.stages
    for info in (flat, piped):
        assert info.directory.is_absolute() and info.src.is_dir() and info.flavor == flavor
        assert info.inp_kifs.shape == (3, 6) and info.out_kifs.shape == (3, 6)
        assert info.cost > 0 and info.latency_units == max(comb.latency)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["flat", "piped"]


def test_existing_project_is_kept_unless_told(tmp_path):
    comb = to_comb(model(np.random.default_rng(12)))
    target = tmp_path / "net"
    write_rtl(comb, target, name="net")
    (target / "mine.txt").write_text("precious")
    with pytest.raises(LoweringError, match="exists; pass overwrite=True"):
        write_rtl(comb, target, name="net")
    assert (target / "mine.txt").exists()
    info = write_rtl(comb, target, name="other", overwrite=True)
    assert isinstance(info, RTLInfo) and (target / "src" / "other.v").exists() and not (target / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    import da4ml.codegen

    def fail(self, *args, **kwargs):
        raise AssertionError("unexpected shift")

    monkeypatch.setattr(da4ml.codegen.RTLModel, "write", fail)
    with pytest.raises(LoweringError, match=r"writing RTL \(AssertionError: unexpected shift\)"):
        write_rtl(to_comb(model(np.random.default_rng(13))), tmp_path / "net", name="net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "9net"}, "name is '9net'"),
        ({"name": "mux"}, "none of binop"),
        ({"name": "net", "flavor": "verilo"}, "did you mean 'verilog'"),
    ],
)
def test_bad_names_and_flavors(options, words, tmp_path):
    with pytest.raises(LoweringError, match=words):
        write_rtl(to_comb(one_quantizer()), tmp_path / "net", **options)
