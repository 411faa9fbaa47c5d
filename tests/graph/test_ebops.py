"""EBOPs: HGQ2's golden values, gradients, masks, and what happens where bits are unknown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hgq2_ebops.json").read_text())["cases"]
FUNCTIONS: dict[str, Callable] = {
    "dense": lambda p, x: x @ p["w"] + p["b"],
    "affine": lambda p, x: x * p["w"] + p["b"],
    "multiply": lambda p, x: x["a"] * x["b"],
    "dot": lambda p, x: jnp.einsum("ni,ni->n", x["a"], x["b"]),
    "matmul": lambda p, x: x["a"] @ x["b"],
}


def instrumented(case: dict[str, Any]) -> tuple[pq.Instrumented, list[str]]:
    """The layer of a golden case without its bits, and the names of the sites of its two operands."""
    shapes = [tuple(s) for s in case["shapes"]]
    if len(shapes) == 2:
        x = {name: np.zeros(shape, np.float32) for name, shape in zip("ab", shapes, strict=True)}
        inst = pq.instrument(pq.from_function(FUNCTIONS[case["op"]], {}), x)
        return inst, list(inst.sites)
    w = jnp.zeros(np.shape(case["operands"][1]["f"]), jnp.float32)
    params = {"layer": {"w": w, "b": jnp.zeros(w.shape[-1:], jnp.float32)}}
    model = pq.from_function(lambda p, x: FUNCTIONS[case["op"]](p["layer"], x), params)
    inst = pq.instrument(model, np.zeros(shapes[0], np.float32))
    return inst, ["layer/input", "layer/w"]


def formats(case: dict[str, Any], inst: pq.Instrumented, names: list[str]) -> dict[str, pq.KIF]:
    """Activations lose their leading axis of 1; the bias, which ours leaves out, gets 31 bits that must not count."""
    made = {}
    for name, operand in zip(names, case["operands"], strict=True):
        k, i, f = (np.reshape(operand[part], inst.sites[name].shape) for part in "kif")
        made[name] = pq.kif(k, i, f, overflow=operand["overflow"])
    return {**made, **{n: pq.kif(1, 15, 15) for n, s in inst.sites.items() if s.kind == "bias"}}


def bias_term(case: dict[str, Any]) -> float:
    """HGQ2 counts mean(bits of the bias) once per output position; ours counts products alone."""
    if case["bias_bits"] is None:
        return 0.0
    shape = case["shapes"][0]
    return float(np.mean(case["bias_bits"]) * np.prod(shape[:-1]) * len(case["bias_bits"]))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["name"])
def test_golden_value(case):
    inst, names = instrumented(case)
    view = pq.View(inst.model.params, formats(case, inst, names), {})
    ours = float(jax.jit(lambda v: inst.ebops(v, compat="hgq2"))(view))
    assert ours == case["ebops"] - bias_term(case)
    assert ours > 0


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["name"])
def test_golden_gradient(case):
    """To f of an activation, and to (b, i) of a weight, whose f is b - i.

    At b = 0 theirs goes on pushing a weight's width down; ours is relu(k + i + f) everywhere, whose slope there is 0.
    """
    inst, names = instrumented(case)
    kifs = formats(case, inst, names)

    def cost(bits: dict[str, dict[str, jax.Array]]) -> jax.Array:
        made = {n: pq.KIF(k.k, bits[n]["i"], bits[n]["f"], k.rounding, k.overflow) if n in bits else k for n, k in kifs.items()}
        return inst.ebops(pq.View(inst.model.params, made, {}), compat="hgq2")

    grads = jax.jit(jax.grad(cost))({n: {"i": kifs[n].i, "f": kifs[n].f} for n in names})
    for name, operand in zip(names, case["operands"], strict=True):
        di, df, bits = (
            np.asarray(grads[name]["i"]),
            np.asarray(grads[name]["f"]),
            np.reshape(operand["bits"], np.shape(kifs[name].f)),
        )
        want = {part: np.reshape(g, df.shape) for part, g in operand["gradient"].items()}
        if operand["type"] == "KIF":
            np.testing.assert_allclose(df, want["f"], rtol=1e-6)
            np.testing.assert_allclose(di, want["f"], rtol=1e-6)
        else:
            np.testing.assert_allclose(df, np.where(bits > 0, want["b"], 0), rtol=1e-6)
            np.testing.assert_array_equal(di - df, want["i"])


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
