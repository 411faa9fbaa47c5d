"""Percentile and squared error against a search by hand over integer bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax.numerics import oracle

F = pq.quantize.Format
RNG = np.random.default_rng(5)
X = np.float32(RNG.standard_t(2.5, (600, 3)) * [0.4, 1.0, 3.0])  # long tails, other scales


def state_of(quantizer, **options):
    """Two layers of identity kernels, the second behind a relu, and the state before training."""
    params = {n: {"w": jnp.eye(3)} for n in "ab"}
    model = pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]["w"]) @ p["b"]["w"], params)
    inst = pq.instrument(model, X[:1], inputs=pq.InputSpec(1, 8, 12))
    compression = quantizer(inst.sites, **options)
    tx = pq.optimizer(compression, weights=optax.sgd(0.0))
    return inst, compression, pq.train.init_state(inst, compression, tx, seed=0)


def view_of(compression, state):
    return compression.apply(state.params, pq.state_of(state.opt_state))[0]


def calibrated(quantizer, activations, **options):
    inst, compression, state = state_of(quantizer, activations=activations)
    x = inst.encode(X)
    state = pq.calibrate(inst, compression, state, [x[:400], x[400:]], **options)
    return x, view_of(compression, state).sites


def bits_of(fmt):
    return tuple(np.asarray(v).tolist() for v in (fmt.i, fmt.f))


def best(values, k, f_of):
    """i of the least squared error over all values, tried one by one from the range's down; the widest of equals."""
    top = int(np.floor(np.log2(np.abs(values).max()))) + 1
    lost = {i: np.sum((oracle.quantize(values, k, i, f_of(i)) - values) ** 2) for i in range(top, -9, -1)}
    return float(min(lost, key=lost.__getitem__))


@pytest.mark.parametrize("granularity", [pytest.param("tensor", marks=pytest.mark.slow), "channel"])
def test_mse_is_the_best_of_all_ranges(granularity):
    x, sites = calibrated(pq.quantize.dynamic, F(i=6, f=1, granularity=granularity), method="mse")
    groups = [x] if granularity == "tensor" else list(x.T)
    want = [best(g, 1, lambda i: 7 - i) for g in groups]
    assert bits_of(sites["a/input"]) == (want, [7 - i for i in want])
    seen = np.maximum(oracle.quantize(x, 1, np.float32(want), 7 - np.float32(want)), 0)
    want = [best(g, 0, lambda i: 7 - i) for g in ([seen] if granularity == "tensor" else list(seen.T))]
    assert bits_of(sites["b/input"]) == (want, [7 - i for i in want])


def test_percentile_cuts_the_tail_of_all_that_share_a_format():
    x, sites = calibrated(pq.quantize.dynamic, F(i=2, f=5, granularity="channel"), method="percentile", percentile=98)
    low, high = np.percentile(x, 2, 0), np.percentile(x, 98, 0)
    reach = np.maximum(-low, high)
    want = np.ceil(np.log2(reach)).tolist()
    assert bits_of(sites["a/input"])[0] == want
    _, exact = calibrated(pq.quantize.dynamic, F(i=2, f=5, granularity="channel"))
    _, everything = calibrated(pq.quantize.dynamic, F(i=2, f=5, granularity="channel"), method="percentile", percentile=100)
    assert bits_of(everything["a/input"]) == bits_of(exact["a/input"])
    assert np.all(np.asarray(exact["a/input"].i) > np.asarray(want))


@pytest.mark.parametrize("keep", [pytest.param("width", marks=pytest.mark.slow), "f"])
def test_trained_bits_start_from_what_was_chosen(keep):
    """HGQ's bits of saturating activations; kernels are nobody's business here."""
    x, sites = calibrated(pq.quantize.hgq, F(i=1, f=6, overflow="SAT", granularity="tensor"), method="mse", keep=keep)
    i, f = (np.ravel(v)[0] for v in bits_of(sites["a/input"]))
    f_of = (lambda i: 7 - i) if keep == "width" else (lambda i: 6)
    assert i == best(x, 1, f_of) and f == f_of(i)
    assert np.unique(sites["a/w"].f).tolist() == [6.0] and np.unique(sites["a/w"].i).tolist() == [2.0]


def test_what_wraps_keeps_its_exact_range():
    inst, compression, state = state_of(
        pq.quantize.hgq, activations=F(i=2, f=5, overflow="WRAP"), rules=[("b/input", {"overflow": "SAT"})]
    )
    x = inst.encode(X)
    exact = view_of(compression, pq.calibrate(inst, compression, state, [x], method="percentile", percentile=100)).sites
    cut = view_of(compression, pq.calibrate(inst, compression, state, [x], method="percentile", percentile=80)).sites
    assert bits_of(cut["a/input"]) == bits_of(exact["a/input"])
    assert np.all(np.asarray(cut["b/input"].i) < np.asarray(exact["b/input"].i))
    plain = view_of(compression, pq.calibrate(inst, compression, state, [x])).sites
    assert bits_of(plain["a/input"]) == bits_of(exact["a/input"]) and np.unique(plain["b/input"].i).tolist() == [2]


def test_what_can_not_be_calibrated():
    inst, compression, state = state_of(pq.quantize.dynamic)
    for wrong, message in (
        (dict(method="max"), "method is 'max'; did you mean 'minmax'"),
        (dict(method="mse", keep="i"), "keep is 'i', expected 'width' or 'f'"),
        (dict(method="percentile", percentile=0.999), "percentile is 0.999, expected 50 to 100"),
        (dict(method="percentile", percentile=100, keep="f"), "'a/input' does not take the f .* constant width"),
    ):
        with pytest.raises(pq.TransformError, match=message):
            pq.calibrate(inst, compression, state, [inst.encode(X)], **wrong)
    inst, compression, state = state_of(pq.quantize.fixed)
    with pytest.raises(pq.TransformError, match="no site has a format that may be chosen"):
        pq.calibrate(inst, compression, state, [X], method="mse")
