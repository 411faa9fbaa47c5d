"""Flips of single bits against integers computed by hand, the Hessian against a full one, and protection against chance."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import pquant_jax as pq
from pquant_jax import _tree, lower, robust
from pquant_jax._errors import DataError, TraceError
from pquant_jax.lower import registers
from pquant_jax.robust._replay import replay
from pquant_jax.train import cross_entropy

F = pq.quantize.Format


class Net(nn.Module):
    """Dense, BatchNorm, a table (tanh) and a last layer: stored weights, derived ones, activations and table entries."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6, use_bias=False)(x)))
        x = nn.tanh(nn.Dense(4)(x))
        return nn.Dense(3)(x)


class Made(NamedTuple):
    """A model with finished formats, its samples and the classes that it gives them itself."""

    inst: pq.Instrumented
    view: pq.View
    state: Any
    x: np.ndarray
    y: np.ndarray


@pytest.fixture(scope="module")
def made() -> Made:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)).astype(np.float32)
    inst = pq.instrument(pq.from_linen(Net(), x[:2]), x[:2], inputs=pq.InputSpec(1, 2, 3))
    params = jax.tree.map(lambda v: jnp.asarray(rng.normal(0, 0.6, v.shape), jnp.float32), inst.model.params)
    mask = jnp.asarray(rng.uniform(size=(5, 6)) > 0.3, jnp.float32)
    params = _tree.replace(params, {"Dense_0/kernel": mask * params["Dense_0"]["kernel"]})
    chain = pq.quantize.fixed(inst.sites, weights=F(1, 3, 1), activations=F(2, 3))
    attached = chain.attach(params)
    view, _ = chain.apply(attached, chain.init(attached))
    view = view._replace(masks={"Dense_0/kernel": mask})
    view = view._replace(tables=inst.tables(view, inst.model.state))
    y = np.argmax(inst.forward(view, inst.model.state, jnp.asarray(inst.encode(x)))[0], -1)
    return Made(inst, view, inst.model.state, x, y)


@given(st.integers(0, 1), st.integers(-2, 4), st.integers(-2, 6), st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
def test_a_flip_is_an_exclusive_or_of_the_code(k, i, f, raw, mask):
    bits = max(k + i + f, 0)
    raw %= 2**bits

    def value(r: int) -> float:
        return (r - (2**bits if k and bits and r >> bits - 1 else 0)) * 2.0**-f

    fmt = robust.Format(*(jnp.int32(v) for v in (k, i, f)))
    once = robust.flip_values(jnp.float32(value(raw)), fmt, jnp.int32(mask))
    assert float(once) == value(raw ^ mask % 2**bits)
    assert float(robust.flip_values(once, fmt, jnp.int32(mask))) == value(raw)


@given(st.integers(0, 1), st.integers(-1, 3), st.integers(-1, 4), st.integers(0, 255))
def test_a_step_is_what_a_flip_adds(k, i, f, raw):
    fmt = robust.Format(*(np.array([v], np.int32) for v in (k, i, f)))
    bits = max(k + i + f, 0)
    raw %= 2**bits
    value = np.array([(raw - (2**bits if k and bits and raw >> bits - 1 else 0)) * 2.0**-f], np.float32)
    steps = robust.bit_steps(value, fmt)[0]
    for b in range(len(steps)):
        moved = robust.flip_values(value, fmt, jnp.int32(1 << b))
        assert float(moved[0]) - float(value[0]) == steps[b]


def test_nothing_flipped_is_the_forward(made):
    x = jnp.asarray(made.inst.encode(made.x))
    np.testing.assert_array_equal(
        robust.flip(made.inst, made.view, made.state, x, {}), made.inst.forward(made.view, made.state, x)[0]
    )


def test_stored_are_the_sites_of_parameters(made):
    found = replay(made.inst, made.view, made.state, 2)
    assert set(found.stored) == {n for n, s in made.inst.sites.items() if s.kind in ("kernel", "bias", "scale", "offset")}
    np.testing.assert_array_equal(found.stored["Dense_0/kernel"].bits, 5 * np.asarray(made.view.masks["Dense_0/kernel"]))
    graph = lower.trace(made.inst, made.view, made.state, weights="ports")
    loaded = lower.weights_of(graph, made.inst, made.view, made.state)
    for j, value in zip(lower.weight_ports(graph), loaded, strict=True):
        np.testing.assert_array_equal(found.values[graph.nodes[j].name], value)


def test_flips_equal_the_netlist(made):
    """Bits of weights (derived ones too), an activation and a table, against the emulator with those integers changed."""
    x = made.inst.encode(made.x)
    graph = lower.trace(made.inst, made.view, made.state, weights="ports")
    weights = lower.weights_of(graph, made.inst, made.view, made.state)
    names = [graph.nodes[j].name for j in lower.weight_ports(graph)]
    for site, element, bit in (("Dense_1/kernel", (2, 1), 4), ("BatchNorm_0/fused_scale", (0, 3), 3), ("Dense_2/bias", (0,), 0)):
        mask = np.zeros(made.inst.sites[site].shape, np.int32)
        mask[element] = 1 << bit
        n = names.index(site)
        code = round(float(weights[n][element]) * 8)
        raw = (code & 31) ^ (1 << bit)
        changed = [w.copy() for w in weights]
        changed[n][element] = (raw - 32 * (raw >> 4)) / 8
        want = lower.emulate(lower.loaded(graph, changed), [np.asarray(x, np.float64)])[0]
        np.testing.assert_array_equal(robust.flip(made.inst, made.view, made.state, x, {site: mask}), want)
        assert np.any(want != made.inst.forward(made.view, made.state, x)[0])
    plain = lower.trace(made.inst, made.view, made.state)
    (name,) = made.view.tables
    entries = np.zeros(np.shape(made.view.tables[name].codes), np.int32)
    entries[0, 5:40] = 2
    nodes = [
        n if n.op != "table" else lower.Node(n.op, n.inputs, n.shape, {**n.attrs, "codes": _bit1(n.attrs["codes"])}, n.name)
        for n in plain.nodes
    ]
    want = lower.emulate(plain._replace(nodes=tuple(nodes)), [np.asarray(x, np.float64)])[0]
    np.testing.assert_array_equal(robust.flip(made.inst, made.view, made.state, x, {}, {name: entries}), want)
    assert np.any(want != made.inst.forward(made.view, made.state, x)[0])


def _bit1(codes: Any) -> np.ndarray:
    """Entries 5 to 39 of the first row with bit 1 inverted, which no sign is."""
    out = np.array(codes, np.int64)
    out[0, 5:40] ^= 2
    return out


def test_an_activation_is_flipped_where_it_is_quantized(made):
    """The sign bit of one element of one sample: that sample's output changes, no other's."""
    mask = np.zeros((200, 6), np.int32)
    x = made.inst.encode(made.x)
    mask[7, :] = 1 << 4  # unsigned behind a relu: the highest of five bits
    before, after = (
        made.inst.forward(made.view, made.state, x)[0],
        robust.flip(made.inst, made.view, made.state, x, {"Dense_1/input": mask}),
    )
    assert np.argwhere((np.asarray(before) != np.asarray(after)).any(1)).ravel().tolist() == [7]


@pytest.mark.parametrize("where", ["weights", "activations", "tables"])
def test_accuracy_falls_with_the_rate(made, where):
    found = robust.inject(made.inst, made.view, made.state, made.x, made.y, rates=[0, 0.02, 0.5], where=where, trials=6)
    assert found.clean == 1 and found.figure.shape == (3, 6) and np.all(found.figure[0] == 1) and found.bits > 50
    assert found.mean[0] > found.mean[1] > found.mean[2] and found.mean[2] < 0.75
    assert np.all(found.quantile(0.1) <= found.quantile(0.9)) and len(set(found.figure[2])) > 1
    again = robust.inject(made.inst, made.view, made.state, made.x, made.y, rates=[0.02], where=where, trials=6)
    np.testing.assert_array_equal(again.figure[0], found.figure[1])


def test_counts_of_flips_and_protection(made):
    """Exactly n of all bits; with everything protected nothing happens, with all but one bit that one is hit."""
    found = replay(made.inst, made.view, made.state, 2)
    total = sum(int(f.bits.sum()) for f in found.stored.values())
    one = robust.inject(made.inst, made.view, made.state, made.x, made.y, flips=[0, 1, 40], trials=8)
    assert one.bits == total and one.mean[0] == 1 and one.mean[0] > one.mean[1] > one.mean[2]
    score = {n: np.where(np.arange(5) < f.bits[..., None], 1.0, -np.inf) for n, f in found.stored.items()}
    whole = robust.inject(
        made.inst, made.view, made.state, made.x, made.y, rates=[1.0], trials=2, protected=robust.protect(score, 100)
    )
    assert np.all(whole.figure == 1)
    masks = robust.protect(score, 100)
    masks["Dense_2/bias"] = masks["Dense_2/bias"] & ~np.array([16, 0, 0], np.int32)
    free = robust.inject(made.inst, made.view, made.state, made.x, made.y, flips=[5], trials=2, protected=masks)
    only = {"Dense_2/bias": np.array([16, 0, 0], np.int32)}
    sign = robust.flip(made.inst, made.view, made.state, made.inst.encode(made.x), only)
    np.testing.assert_allclose(free.figure[0], np.mean(np.argmax(sign, -1) == made.y), rtol=1e-6)


def quadratic() -> tuple[pq.Instrumented, pq.View, np.ndarray, np.ndarray]:
    """A linear model with squared error: its Hessian is 2 x^T x / n exactly, its loss a parabola."""
    rng = np.random.default_rng(3)
    x = np.rint(rng.normal(size=(64, 4)) * 8) / 8
    inst = pq.instrument(
        pq.from_function(lambda p, x: x @ p["w"], {"w": jnp.asarray(rng.normal(size=(4, 1)), jnp.float32)}),
        x[:2].astype(np.float32),
        inputs=pq.InputSpec(1, 3, 3),
    )
    chain = pq.quantize.fixed(inst.sites, weights=F(1, 4, 1), activations=F(3, 3))
    attached = chain.attach(inst.model.params)
    return inst, chain.apply(attached, chain.init(attached))[0], x.astype(np.float32), rng.normal(size=(64, 1)).astype(np.float32)


def square(y: Any, target: Any) -> Any:
    return jnp.sum((y - target) ** 2, -1)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "eigen"])
def test_the_score_is_the_change_of_a_quadratic_loss(method):
    """Every bit really flipped: on a parabola the second order is exact."""
    inst, view, x, y = quadratic()
    options: dict[str, Any] = dict(loss=square, method=method, probes=4000, eigenpairs=4)
    found = robust.bit_sensitivity(inst, view, {}, x, y, **options)
    tolerance = 0.1 if method == "hutchinson" else 1e-4
    np.testing.assert_allclose(found.curvature["w"][:, 0], 2 * (x**2).mean(0), rtol=tolerance)
    base = float(np.mean(square(inst.forward(view, {}, x)[0], y)))
    if method == "exact":
        for element in range(4):
            for bit in range(6):
                mask = np.zeros((4, 1), np.int32)
                mask[element] = 1 << bit
                change = float(np.mean(square(robust.flip(inst, view, {}, x, {"w": mask}), y))) - base
                g, h, dw = found.gradient["w"][element, 0], found.curvature["w"][element, 0], found.step["w"][element, 0, bit]
                np.testing.assert_allclose(g * dw + h * dw**2 / 2, change, rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(found.score["w"][element, 0, bit], abs(g * dw) + h * dw**2 / 2, rtol=1e-5)


@pytest.mark.slow
def test_curvature_of_a_network_is_that_of_its_full_hessian(made):
    """Of the last layer, whose float forward can be written down: softmax of tanh features."""
    found = robust.bit_sensitivity(made.inst, made.view, made.state, made.x, made.y, method="exact")
    smooth = replay(made.inst, made.view._replace(tables={}), made.state, 200)
    w = jnp.asarray(smooth.values["Dense_2/kernel"])

    def loss(w: Any) -> Any:
        out = smooth.run(lambda s, v, _: w if s == "Dense_2/kernel" else v, jnp.asarray(made.inst.encode(made.x)), smooth=True)
        return jnp.mean(cross_entropy(out, jnp.asarray(made.y)))

    full = jax.hessian(loss)(w).reshape(12, 12)
    np.testing.assert_allclose(found.curvature["Dense_2/kernel"].ravel(), np.diag(full), rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found.gradient["Dense_2/kernel"], jax.grad(loss)(w), rtol=1e-3, atol=1e-5)
    pruned = np.asarray(made.view.masks["Dense_0/kernel"]) == 0
    assert np.all(found.score["Dense_0/kernel"][pruned] == -np.inf) and np.all(found.curvature["Dense_0/kernel"][pruned] == 0)


def test_ranking_protects_better_than_chance(made):
    found = robust.bit_sensitivity(made.inst, made.view, made.state, made.x, made.y)
    options: dict[str, Any] = dict(rates=[0.03], trials=24)
    ours = robust.inject(made.inst, made.view, made.state, made.x, made.y, protected=robust.protect(found.score, 20), **options)
    chance = [
        robust.inject(
            made.inst,
            made.view,
            made.state,
            made.x,
            made.y,
            protected=robust.protect(robust.random_scores(found.score, seed), 20),
            **options,
        ).mean[0]
        for seed in range(2)
    ]
    assert ours.mean[0] > max(chance) + 0.03
    for name, profile in robust.by_bit(found).items():
        assert profile.shape == (5,) and np.all(profile[-1] > profile[0]), name


def test_the_ranking_says_which_bits_the_register_file_triplicates(made):
    """Same scores, same bits: `protect` for the analysis, `most_sensitive` for the hardware."""
    from pquant_jax.lower.backends import da4ml

    graph = lower.trace(made.inst, made.view, made.state, weights="ports")
    comb = da4ml.to_comb(graph)
    sizes = [int(np.prod(graph.nodes[j].shape)) for j in graph.inputs]
    kifs = np.concatenate(
        [np.stack([np.broadcast_to(graph.nodes[j].attrs[a], graph.nodes[j].shape).ravel() for a in "kif"]) for j in graph.inputs],
        1,
    )
    assert kifs.shape == (3, sum(sizes)) == (3, comb.shape[0])
    rtl = registers.RTLInfo("net", None, None, "verilog", 0, 0, 1, 0, 0.0, 0.0, kifs, np.zeros((3, 1), int))  # pyright: ignore[reportArgumentType]
    regs = registers.register_map(graph, rtl, word=8)
    found = robust.bit_sensitivity(made.inst, made.view, made.state, made.x, made.y)
    voted, masks = registers.most_sensitive(regs, found.score, 10), robust.protect(found.score, 10)
    number, entry, place = registers.stored_bits(regs)
    for n, e, b in zip(number, entry, place, strict=True):
        mask = masks[regs.sites[regs.site[e]]].ravel()[regs.element[e]]
        assert voted[n] == bool(mask >> b & 1)


def test_what_makes_no_sense_is_refused(made):
    def inject(**options: Any) -> Any:
        return robust.inject(made.inst, made.view, made.state, made.x, made.y, **options)

    for options, why in (
        ({"rates": [0.1], "where": "weight"}, "where is 'weight'; did you mean 'weights'"),
        ({}, "got neither"),
        ({"rates": [0.1], "flips": [1]}, "give rates, or"),
        ({"flips": [1], "where": "tables"}, "flips of tables"),
        ({"rates": [1.5]}, "expected rates from 0 to 1"),
    ):
        with pytest.raises(DataError, match=why):
            inject(**options)
    with pytest.raises(DataError, match="method is 'hutch'; did you mean 'hutchinson'"):
        robust.bit_sensitivity(made.inst, made.view, made.state, made.x, made.y, method="hutch")
    with pytest.raises(DataError, match="percent is 101"):
        robust.protect({"w": np.zeros((2, 2))}, 101)
    with pytest.raises(TraceError, match="no site 'Dense_1/kernal' .* did you mean 'Dense_1/kernel'"):
        robust.flip(made.inst, made.view, made.state, made.x, {"Dense_1/kernal": 1})
    with pytest.raises(TraceError, match="the view has no table 'tanh'"):
        robust.flip(made.inst, made.view, made.state, made.x, {}, {"tanh": 1})
    with pytest.raises(TraceError, match="has no fixed-point format"):
        robust.flip(made.inst, made.view._replace(sites={}), made.state, made.x, {})
    inst, view, x, y = quadratic()
    with pytest.raises(TraceError, match="no tables"):
        robust.inject(inst, view, {}, x, y[:, 0], rates=[0.1], where="tables")
