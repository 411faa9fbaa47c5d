"""EBOPs: what each equation costs, masks, and what happens where bits are unknown."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq


def dense(seed: int = 0) -> tuple[pq.Instrumented, pq.View]:
    """Two layers with random bits per element, and their view."""
    rng = np.random.default_rng(seed)
    params = {n: {"w": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in {"a": (4, 5), "b": (5, 2)}.items()}
    model = pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"], params)
    inst = pq.instrument(model, np.zeros((3, 4), np.float32))
    kifs = {n: pq.kif(*(rng.integers(0, n + 1, s.shape) for n in (1, 3, 4))) for n, s in inst.sites.items()}
    return inst, pq.View(params, kifs, {})


def widths(view: pq.View, name: str) -> np.ndarray:
    fmt = view.sites[name]
    return np.maximum(np.asarray(fmt.k + fmt.i + fmt.f), 0)


def test_counts_every_product():
    """sum over k and n of b_x[k] * b_w[k, n], with k + i + f bits in every mode."""
    inst, view = dense()
    want = {f"{n}/w": float((widths(view, f"{n}/input") @ widths(view, f"{n}/w")).sum()) for n in "ab"}
    products = inst.products(view)
    assert {n: float(v) for n, v in products.items()} == want
    assert float(inst.ebops(view)) == sum(want.values())


@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM", "WRAP"])
def test_sign_bit_counts_in_every_mode(overflow):
    """Ours counts k always; HGQ2 leaves it out where the mode is WRAP or SAT_SYM."""
    inst, view = dense()
    kifs = {n: pq.kif(1, jnp.full(s.shape, 1.0), jnp.full(s.shape, 2.0), overflow=overflow) for n, s in inst.sites.items()}
    macs = 4 * 5 + 5 * 2
    assert float(inst.ebops(view._replace(sites=kifs))) == macs * 16
    assert float(inst.ebops(view._replace(sites=kifs), compat="hgq2")) == macs * (16 if overflow == "SAT" else 9)


def test_reference8():
    inst, _ = dense()
    assert inst.reference8 == 64 * (4 * 5 + 5 * 2)


def test_mask_takes_bits_away():
    inst, view = dense()
    mask = jnp.asarray(np.random.default_rng(1).integers(0, 2, (4, 5)), jnp.float32)
    pruned = float(inst.products(view._replace(masks={"a/w": mask}))["a/w"])
    assert pruned == (widths(view, "a/input") @ (widths(view, "a/w") * np.asarray(mask))).sum()
    assert 0 < pruned < float(inst.products(view)["a/w"])
    assert float(inst.products(view._replace(masks={"a/w": 0 * mask}))["a/w"]) == 0


def test_mask_primitive_takes_bits_away():
    """The same in a function of one's own."""
    fmt, x = pq.kif(1, 2, 1), jnp.ones((1, 4))
    w, m = jnp.ones((4, 2)), jnp.asarray([[1.0, 0], [1, 1], [0, 0], [0, 1]])

    def function(x):
        return pq.numerics.quantize(x, fmt) @ pq.mask(pq.numerics.quantize(w, fmt), m)

    assert float(pq.ebops(function, x)) == 4 * 16


def test_both_orders_of_mask_and_quantizer():
    """A zero weight has no bits, whether it was pruned before or after its quantizer."""
    x, m = jnp.ones((1, 3)), jnp.asarray([[1.0], [0.0], [1.0]])

    def cost(prune_first: bool) -> float:
        params = {"w": jnp.ones((3, 1))}
        inst = pq.instrument(pq.from_function(lambda p, x: x @ p["w"], params), x)
        zeros = pq.prune.dst(alpha=0.0)
        grid = pq.quantize.fixed(inst.sites, weights=pq.quantize.Format(1, 2, 1), activations=pq.quantize.Format(1, 2, 1))
        compression = pq.chain(*((zeros, grid) if prune_first else (grid, zeros)))
        attached = compression.attach(params)
        state = compression.init(attached)
        state["dst"] = state["dst"]._replace(mask={"w": m})
        return float(inst.ebops(compression.apply(attached, state)[0]))

    assert cost(True) == cost(False) == 2 * 16


def test_port_has_bits_of_its_own():
    """Without a site's format what is multiplied is the port's value: fixed<16,6> by default."""
    inst, view = dense()
    kifs = {n: fmt for n, fmt in view.sites.items() if n != "a/input"}
    assert float(inst.products(view._replace(sites=kifs))["a/w"]) == 16 * widths(view, "a/w").sum()


@pytest.mark.parametrize("missing", ["a/w", "b/w", "b/input"])
def test_unknown_bits_are_an_error_that_names_the_operand(missing):
    inst, view = dense()
    kifs = {n: fmt for n, fmt in view.sites.items() if n != missing}
    layer = missing[0]
    with pytest.raises(pq.TraceError, match=rf"dot_general of '{layer}/w': the bits of operand .* are unknown; quantize it"):
        inst.ebops(view._replace(sites=kifs))


def test_unquantized_constant_matrix_is_an_error():
    with pytest.raises(pq.TraceError, match=r"the bits of operand of shape \(3, 2\) are unknown"):
        pq.ebops(lambda x: pq.numerics.quantize(x, pq.kif(1, 2, 1)) @ jnp.ones((3, 2)), jnp.ones((1, 3)))


@pytest.mark.parametrize(
    ("function", "want"),
    [
        (lambda q: q.T, 12 * 4),
        (lambda q: q.reshape(4, 3).T, 12 * 4),
        (lambda q: jax.nn.relu(q), 12 * 4),
        (lambda q: -jnp.abs(q), 12 * 4),
        (lambda q: jnp.maximum(q, 0.5), 12 * 4),
        (lambda q: q[:1], 4 * 4),
        (lambda q: q[::-1], 12 * 4),
        (lambda q: jnp.concatenate([q, q], 1), 24 * 4),
        (lambda q: 2 * q, 12 * 4),  # a shift
    ],
)
def test_bits_follow_the_value(function, want):
    """(3, 4) values of 4 bits, squared after what moves them but adds no bit: 4 * 4 per product."""

    def run(x):
        return jnp.square(function(pq.numerics.quantize(x, pq.kif(1, 2, 1))))

    assert float(pq.ebops(run, jnp.ones((3, 4)))) == want * 4


@pytest.mark.parametrize("function", [lambda q: q + q, lambda q: q.sum(0), lambda q: jnp.tanh(q), lambda q: jnp.maximum(q, q.T)])
def test_bits_are_lost_by_arithmetic(function):
    def run(x):
        return jnp.square(function(pq.numerics.quantize(x, pq.kif(1, 2, 1))))

    with pytest.raises(pq.TraceError, match="quantize it"):
        pq.ebops(run, jnp.ones((3, 3)))


def test_products_sum_to_ebops(four, view_at):
    """BatchNorm's scale is a product as well."""
    inst = pq.instrument(four(0, True)["linen"].model, np.zeros((2, 6), np.float32))
    view = view_at(inst, 1, 2)
    products = inst.products(view)
    assert float(inst.ebops(view)) == sum(float(v) for v in products.values())
    bits = {n: widths(view, n) for n in inst.sites}
    assert float(inst.ebops(view)) == (
        sum(float((bits[f"Dense_{n}/input"] @ bits[f"Dense_{n}/kernel"]).sum()) for n in range(3))
        + float((bits["BatchNorm_0/input"] * bits["BatchNorm_0/fused_scale"]).sum())
    )


def test_jit_equals_eager(four, view_at):
    inst = pq.instrument(four(0, True)["equinox"].model, np.zeros((2, 6), np.float32))
    view = view_at(inst, 1, 3)
    assert float(jax.jit(inst.ebops)(view)) == float(inst.ebops(view))


def test_independent_of_values(four, view_at):
    inst = pq.instrument(four(0, False)["plain"].model, np.zeros((2, 6), np.float32))
    view = view_at(inst, 1, 3)
    assert float(inst.ebops(view)) == float(inst.ebops(view._replace(model=jax.tree.map(jnp.zeros_like, view.model))))


def test_vmaps_over_bits():
    inst, view = dense()
    f = jnp.arange(4.0)

    def cost(extra):
        kifs = {n: pq.KIF(v.k, v.i, v.f + extra, v.rounding, v.overflow) for n, v in view.sites.items()}
        return inst.ebops(view._replace(sites=kifs))

    np.testing.assert_array_equal(jax.jit(jax.vmap(cost))(f), [float(cost(v)) for v in f])
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(cost)))(f), [float(jax.grad(cost)(v)) for v in f])


def test_fractional_bits_round_half_to_even_with_gradient_one():
    fmt = pq.kif(1, 1, 1.5)

    def cost(f):
        return pq.ebops(lambda x: jnp.square(pq.numerics.quantize(x, pq.KIF(fmt.k, fmt.i, f))), jnp.ones((1,)))

    assert [float(cost(f)) for f in jnp.float32([0.5, 1.5, 2.4])] == [4.0, 16.0, 16.0]
    assert float(jax.grad(cost)(jnp.float32(1.5))) == 8.0  # d(b^2)/df at b = 4


def test_attention_counts_both_products():
    """Q K^T and A V are products of two activations; `jnp.matmul` squeezes a batch of one sample, which is what is counted."""
    inst = attention()
    assert inst.reference8 == 64 * (3 * 2 * 3 * 4 + 2 * (2 * 2 * 4))


def attention() -> pq.Instrumented:
    params = {n: {"w": jnp.ones((3, 4))} for n in "qkv"}

    def forward(p, x):
        q, k, v = (x @ p[n]["w"] for n in "qkv")
        return jnp.maximum(q @ jnp.swapaxes(k, 1, 2), 0) @ v

    return pq.instrument(pq.from_function(forward, params), np.zeros((5, 2, 3), np.float32))


def test_particles_count_each():
    """A vmapped layer multiplies once per particle."""
    params = {"phi": {"w": jnp.ones((3, 5))}}
    inst = pq.instrument(
        pq.from_function(lambda p, x: jax.vmap(lambda v: v @ p["phi"]["w"])(x), params), np.zeros((2, 7, 3), np.float32)
    )
    assert inst.reference8 == 64 * 7 * 3 * 5


FOUR = pq.kif(1, 2, 1)


def q4(v, fmt=FOUR):
    return pq.numerics.quantize(v, fmt)


def cost(function, *shapes, **options):
    return {n: float(v) for n, v in pq.graph.products(function, *(jnp.ones(s) for s in shapes), **options).items()}


@pytest.mark.parametrize(
    ("kernel", "groups", "stride", "padding", "products"),
    [
        ((3, 3, 2, 5), 1, 1, "VALID", 2 * 3 * 9 * 2 * 5),
        ((3, 3, 1, 6), 2, 1, "VALID", 2 * 3 * 9 * 6),  # depthwise, multiplier 3
        ((2, 2, 1, 4), 2, 2, "VALID", 2 * 2 * 4 * 4),
        ((3, 3, 2, 1), 1, 1, "SAME", (4 * 5 * 9 - (2 * 3 * (4 + 5) - 4)) * 2),  # padding is 0 and costs nothing
    ],
)
def test_convolutions_of_any_kind(kernel, groups, stride, padding, products):
    def layer(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            q4(x), q4(jnp.ones(kernel)), (stride,) * 2, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    assert sum(cost(layer, (1, 4, 5, 2)).values()) == 16 * products


@pytest.mark.parametrize(("i", "bits_in"), [(-3, 0), (-2, 1), (0, 3), (2, 5), (3, 6), (6, 9)])
def test_a_table_costs_what_its_look_up_tables_cost(i, bits_in):
    """One LUT of 6 inputs per output bit, 2^(b - 6) above, half of one up to 5 inputs in proportion."""

    def layer(x):
        with jax.named_scope("x"):
            x = q4(x, pq.kif(1, i, 2))
        return q4(pq.numerics.region(jnp.tanh, "gate")(x), pq.kif(1, 0, 6))

    want = 7 * (2.0 ** (bits_in - 6) if bits_in >= 5 else bits_in / 10)
    np.testing.assert_allclose(cost(layer, (1, 3))["gate"], 3 * want, rtol=1e-6)


def test_products_inside_a_table_are_none():
    """Nor is anything that only leads to it unknown: gelu squares and multiplies."""

    def layer(x):
        y = q4(pq.numerics.region(jax.nn.gelu, "gelu")(q4(x)))
        return jnp.square(y.reshape(4))

    assert cost(layer, (2, 2)) == {"gelu": pytest.approx(4 * 4 * 4 / 10), "gelu/table": 4 * 16}


def test_a_built_table_costs_the_same():
    fmt, result = pq.kif(1, 2, 3), pq.kif(1, 0, 6)
    table = pq.numerics.build_table(jnp.tanh, fmt, result, (), "tanh")

    def read(x):
        return pq.numerics.lookup(q4(x, fmt), fmt, table)

    def computed(x):
        return q4(pq.numerics.region(jnp.tanh, "tanh")(q4(x, fmt)), result)

    assert sum(cost(read, (1, 3)).values()) == cost(computed, (1, 3))["tanh"] == 3 * 7


def test_a_function_and_what_scales_it_are_one_table():
    def layer(x):
        return q4(0.5 * jnp.tanh(q4(x)) + 0.5) * q4(x)

    assert sum(cost(layer, (1, 3)).values()) == pytest.approx(3 * (4 * 4 / 10 + 16))


@pytest.mark.parametrize("compat", [None, "hgq2"])
def test_a_table_of_unknown_input_is_an_error(compat):
    with pytest.raises(pq.TraceError, match=r"table 'gate': the bits of its input of shape \(1, 3\) are unknown; quantize it"):
        cost(lambda x: q4(pq.numerics.region(jnp.tanh, "gate")(x)), (1, 3), compat=compat)


def test_a_table_is_differentiable_in_both_widths():
    def total(f):
        x_format, y_format = (pq.KIF(jnp.float32(1), jnp.float32(2), v) for v in f)
        gate = pq.numerics.region(jnp.tanh, "gate")
        return pq.ebops(lambda x: pq.numerics.quantize(gate(pq.numerics.quantize(x, x_format)), y_format), jnp.ones(1))

    dx, dy = jax.grad(total)((jnp.float32(5), jnp.float32(3)))
    np.testing.assert_allclose([dx, dy], [np.log(2) * 4 * 6, 4], rtol=1e-6)  # 8 bits in, 6 out


@pytest.mark.parametrize(
    "adders",
    [
        lambda q: q + q,
        lambda q: q - q.T,
        lambda q: jnp.maximum(q, q.T),
        lambda q: q.sum(1),
        lambda q: q.max(1),
        lambda q: jax.lax.reduce_window(q, 0.0, jax.lax.add, (2, 2), (1, 1), "VALID"),
        lambda q: q.mean(0) - q,
    ],
)
def test_adders_and_poolings_cost_nothing(adders):
    assert cost(lambda x: adders(q4(x)), (3, 3)) == {}
    assert sum(cost(lambda x: adders(q4(x)), (3, 3), compat="hgq2").values()) > 0


def test_hgq2_counts_a_sum_of_several_but_for_its_smallest():
    """0.65 * (5 + 4 + 3 + 2 - 2) per element, in whatever order it is added."""

    def widths(a, b, c, d):
        return [q4(v, pq.kif(1, i, 1, overflow="WRAP")) for v, i in zip((a, b, c, d), (4, 3, 2, 1), strict=True)]

    def chained(*x):
        a, b, c, d = widths(*x)
        return ((d + b) + a + c) / 4

    def paired(*x):
        a, b, c, d = widths(*x)
        return 0.25 * ((a + b) + (c + d))

    for function in (chained, paired):
        assert sum(cost(function, *[(1, 2)] * 4, compat="hgq2").values()) == pytest.approx(2 * 0.65 * 12)


def test_what_nobody_reads_costs_nothing():
    def layer(x):
        unused = x @ jnp.ones((3, 3))  # of unknown bits, an error if it were read
        del unused
        return jnp.square(q4(x))

    assert sum(cost(layer, (1, 3)).values()) == 3 * 16


@pytest.mark.parametrize(
    "moved",
    [
        lambda q: jnp.concatenate(jnp.split(q, 2, 1), 0),
        lambda q: jnp.where(jnp.eye(2, 6) > 0, q, 0.0),
        lambda q: jnp.pad(q, ((0, 0), (2, 2))),
        lambda q: jax.lax.dynamic_slice(q, (0, 0), (2, 6)),
        lambda q: q[:, jnp.array([5, 4, 3, 2, 1, 0])],
        lambda q: q / 3,
        lambda q: jnp.clip(q, -1, 1),
    ],
)
def test_bits_survive_what_moves_values(moved):
    assert sum(cost(lambda x: jnp.square(moved(q4(x))), (2, 6)).values()) == 12 * 16


def test_powers_are_products_of_growing_width():
    """x^3 = x * x^2, and x^2 has 8 bits."""
    assert sum(cost(lambda x: q4(x) ** 3, (1, 2)).values()) == 2 * (16 + 32)


@pytest.mark.parametrize("compat", [None, "hgq2"])
def test_positions_worked_off_one_after_the_other(compat):
    def layer(x):
        with jax.named_scope("layer"):
            w = q4(jnp.ones((3, 2)))
        return q4(x) @ w

    whole = cost(layer, (1, 7, 3), compat=compat)["layer"]
    assert cost(layer, (1, 7, 3), compat=compat, parallel={"layer": 1})["layer"] == pytest.approx(whole / 7)
    assert cost(layer, (1, 7, 3), compat=compat, parallel={"layer": -1})["layer"] == whole
    with pytest.raises(pq.TraceError, match="parallel.*'later'.*layer"):
        cost(layer, (1, 7, 3), compat=compat, parallel={"later": 1})


def test_products_in_a_loop_of_unknown_length_are_an_error():
    def layer(x):
        return jax.lax.while_loop(lambda c: c[0, 0] > 9, lambda c: q4(c @ jnp.eye(3)), q4(x))

    with pytest.raises(pq.TraceError, match="products inside 'while' can't be counted"):
        cost(layer, (1, 3))


def gru(x, h, kernel, recurrent, bias):
    """One step as HGQ2's cell: reset after the product, h' = z h + (1 - z) n."""
    rows = q4(x) @ q4(kernel) + q4(bias)
    xz, xr, xn = jnp.split(rows, 3, -1)
    hz, hr, hn = jnp.split(q4(h) @ q4(recurrent), 3, -1)
    sigmoid = pq.numerics.region(jax.nn.sigmoid, "sigmoid")
    z, r = q4(sigmoid(q4(xz + hz)), pq.kif(0, 0, 5)), q4(sigmoid(q4(xr + hr)), pq.kif(0, 0, 5))
    n = q4(pq.numerics.region(jnp.tanh, "tanh")(q4(xn + r * q4(hn))))
    return z * q4(h) + q4(1 - z, pq.kif(0, 0, 5)) * n


@pytest.mark.parametrize("steps", [1, 3])
def test_a_recurrent_cell_costs_its_steps(steps):
    """HGQ2's QGRU: sum(bi @ bw) + sum(bs @ brw) + sum(br * bh) + sum(bz * (bh + bs)) + sum(bb), per step."""
    units, inputs = 2, 3

    def unrolled(x, h):
        for t in range(steps):
            h = gru(x[:, t], h, jnp.ones((inputs, 6)), jnp.ones((units, 6)), jnp.ones(6))
        return h

    counted = cost(unrolled, (1, steps, inputs), (1, units), compat="hgq2")
    tables = {n for n in counted if n in ("sigmoid", "tanh")}
    assert tables == {"sigmoid", "tanh"}
    b, gate = 4, 5  # SAT counts the sign
    want = inputs * 6 * b * b + units * 6 * b * b + units * gate * b + 2 * units * gate * b + 6 * b
    assert sum(v for n, v in counted.items() if n not in tables) == steps * want
