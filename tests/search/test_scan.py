"""Precision scans: every point is what a direct evaluation gives, all of them are one trace, and they say what a format costs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import pquant_jax as pq
from pquant_jax._tree import flatten
from pquant_jax.numerics import kif, oracle, quantize
from pquant_jax.quantize import Format
from pquant_jax.search import Grid
from pquant_jax.search._points import FLOAT, kif_of, subject, view_at

OUTPUTS = 12
EACH = [pq.Metric(f"y{n}", lambda y, t, n=n: y.reshape(-1)[n * 17 % y.size]) for n in range(OUTPUTS)]  # single outputs
FEW = dict(widths=(4, 7, 8), integers=(1, 3, 5))


def spread(y: jax.Array, t: jax.Array) -> jax.Array:
    del t
    return jnp.mean(y**2, -1)


def by_fixed(inst: pq.Instrumented, params: Any, x: Any, rounding: str, overflow: str) -> Callable[[int, int], np.ndarray]:
    """(W, I) -> the outputs that `quantize.fixed` gives with these formats, on <32, 14>."""

    def transform(w: int, n: int) -> tuple[pq.Transform, Any, Any]:
        fmt = Format(i=n - 1, f=w - n, k=1, rounding=rounding, overflow=overflow)
        t = pq.quantize.fixed(inst.sites, weights=fmt, activations=fmt)
        attached = t.attach(params)
        return t, attached, t.init(attached)

    apply = transform(8, 4)[0].apply  # the formats are in the state

    @jax.jit
    def outputs(attached: Any, state: Any) -> jax.Array:
        y, _ = inst.forward(apply(attached, state)[0], inst.model.state, jnp.float32(x))
        return quantize(y, kif(1, 13, 18, rounding=rounding, overflow=overflow))

    return lambda w, n: np.ravel(outputs(*transform(w, n)[1:]))


@pytest.mark.parametrize(
    ("which", "rounding", "overflow"), [("jets", "TRN", "WRAP"), ("jets", "RND", "SAT"), ("signal", "TRN", "WRAP")]
)
def test_a_point_is_bitwise_what_fixed_gives(request, which, rounding, overflow):
    """BatchNorm and convolutions included.  Accumulators stay below 24 bits, so that the order of sums can't matter."""
    inst, params, data = request.getfixturevalue(which)
    x, y = data.train.x[:40], data.train.y[:40]
    found = pq.scan(inst, params, (x, y), metric=EACH, rounding=rounding, overflow=overflow, **FEW)
    largest = max(float(np.abs(leaf).max()) for leaf in flatten(params).values())
    direct, compared = by_fixed(inst, params, x, rounding, overflow), 0
    for a, w in enumerate(found.widths):
        for b, n in enumerate(found.integers):
            if overflow == "WRAP" and largest >= 2.0 ** (n - 1):
                continue  # quantize.fixed leaves a weight that is out of range where it is
            expected, ours = direct(w, n), [found.values[m.name][a, b] for m in EACH]
            np.testing.assert_array_equal(ours, [expected[k * 17 % expected.size] for k in range(OUTPUTS)])
            compared += 1
    assert compared >= 6 and len(np.unique(found.metric)) > 4


@given(w=st.integers(1, 12), n=st.integers(-3, 14), values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_weights_are_ap_fixed_whatever_w_and_i(w, n, values):
    """Out of range they wrap, as a literal in the weights' header does."""
    v = np.float32(values)
    for overflow in ("WRAP", "SAT"):
        ours = quantize(jnp.asarray(v), kif_of(w, n, 1, "TRN", overflow))
        np.testing.assert_array_equal(ours, oracle.quantize(v, 1, n - 1, w - n, rounding="TRN", overflow=overflow))


@given(values=st.lists(st.floats(-8000, 8000, width=32), min_size=1, max_size=8))
def test_formats_wider_than_24_bits_round_as_they_should_within_their_range(values):
    v = np.float32(values)
    result = quantize(jnp.asarray(v), kif_of(32, 14, 1, "TRN", "WRAP"))
    np.testing.assert_array_equal(result, np.floor(v.astype(np.float64) * 2**18) / 2**18)
    normal = np.where(np.abs(v) > 2.0**-60, v, np.float32(0))
    np.testing.assert_array_equal(quantize(jnp.asarray(normal), kif_of(*FLOAT, 1, "TRN", "WRAP")), normal)


def test_the_whole_grid_is_one_trace(jets):
    inst, params, data = jets
    chex.clear_trace_counter()
    once = inst._replace(forward=chex.assert_max_traces(inst.forward, n=1))
    found = pq.scan(once, params, data.test, chunk=5)  # 64 is no multiple of 5
    assert found.metric.shape == (8, 8) and found.samples == len(data.test.y)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        pq.scan(once, params, data.test)


def test_wider_is_better_and_the_widest_is_the_float_model(jets):
    """Of 2,000 jets: the noise of two accuracies of the same model is below a hundredth."""
    inst, params, data = jets
    found = pq.scan(inst, params, data.train, integers=(2, 5, 6))
    good = found.metric[:, 1]
    assert np.all(np.diff(good[1:]) > -0.02) and good[-1] - good[0] > 0.2
    assert abs(good[-1] - found.baseline["accuracy"]) < 0.01
    assert found.metric[-1, 0] < good[-1] - 0.1, "integer bits that the activations need are missing"
    y, _ = inst.model.forward(params, inst.model.state, jnp.asarray(data.train.x), train=False, rng=None)
    assert found.baseline["accuracy"] == pytest.approx(float(np.mean(np.argmax(y, -1) == data.train.y)))


def test_groups_are_scanned_held_float_or_have_axes_of_their_own(jets):
    inst, params, data = jets
    given = dict(metric=[pq.train.accuracy, spread], **FEW)
    full = pq.scan(inst, params, data.test, weights=Grid((5, 8), (2,)), results="scan", **given)
    assert full.metric.shape == (3, 3, 2, 1) and full.groups["weights"] == Grid((5, 8), (2,))
    for k, w in enumerate((5, 8)):
        held = pq.scan(inst, params, data.test, weights=(w, 2), results="scan", **given)
        for name, values in held.values.items():
            np.testing.assert_array_equal(full.values[name][:, :, k, 0], values)
    alone = dict(weights=None, intermediates=None, results="scan")
    free = pq.scan(inst, params, data.test, widths=(4, 6, 32), integers=(3, 14), metric=spread, **alone)
    assert len(np.unique(free.metric)) > 3 and free.metric[2, 1] == pytest.approx(free.baseline["spread"], rel=1e-3)


def test_chunks_and_batches_change_nothing(jets):
    inst, params, data = jets
    first, second = (
        pq.scan(inst, params, data.test, samples=150, metric=[pq.train.accuracy, *EACH[:3]], chunk=c, batch=b, **FEW)
        for c, b in ((4, None), (64, 37))
    )
    for name, values in first.values.items():
        np.testing.assert_array_equal(values, second.values[name])


def test_sample_weights_count(jets):
    inst, params, data = jets
    half = np.float32(np.arange(len(data.test.y)) % 2)
    split = data.test._replace(weight=half)
    odd = (data.test.x[1::2], data.test.y[1::2])
    weighted, alone = (pq.scan(inst, params, d, widths=(6,), integers=(4,)) for d in (split, odd))
    assert weighted.metric[0, 0] == pytest.approx(alone.metric[0, 0])


def test_a_plain_function_of_several_inputs_and_outputs_is_instrumented_here():
    rng = np.random.default_rng(0)
    params = {"a": jnp.float32(rng.normal(size=(3, 2))), "b": jnp.float32(rng.normal(size=(2, 1)))}

    def forward(p, x):
        h = jax.nn.relu(x["u"] @ p["a"] + x["v"])
        return {"h": h, "y": h @ p["b"]}

    x = {"u": np.float32(rng.normal(size=(50, 3))), "v": np.float32(9 * rng.normal(size=(50, 2)))}
    y = forward(params, x)
    error = pq.Metric("error", lambda out, t: jnp.max(jnp.abs(out["y"] - t)), higher_is_better=False)
    found = pq.scan(forward, params, (x, y["y"]), widths=(8, 12, 16, 20), integers=(7,), metric=error)
    assert found.baseline["error"] < 1e-6, "two XLA programs"
    assert np.all(np.diff(found.metric[:, 0]) < 0) and 0 < found.metric[-1, 0] < 0.01
    assert set(found.sites) == {"a", "a/input", "b", "b/input"}


def test_the_narrowest_format_goes_on_to_training_and_lowering(jets):
    inst, params, data = jets
    found = pq.scan(inst, params, data.test, overflow="SAT")
    point = pq.search.chosen(found, drop=0.02)
    assert found.metric[found.widths.index(point.width)].max() == point.value >= point.baseline - 0.02
    narrower = found.metric[[w < point.width for w in found.widths]]
    assert not narrower.size or narrower.max() < point.baseline - 0.02
    t = pq.search.compression(inst, point)
    attached = t.attach(params)
    view = t.apply(attached, t.init(attached))[0]
    (again,) = pq.search.trained(inst, {(point.width, point.integer): view}, data.test, overflow="SAT")
    assert again == (point.width, point.integer, pytest.approx(point.value))
    with pytest.raises(pq.SearchError, match=r"no format of the scan has a accuracy within -0.5 .* the best is"):
        pq.search.chosen(found, drop=-0.5)


def test_rules_keep_a_table_at_its_bits_and_leave_float_groups_out(jets):
    inst, params, data = jets
    found = pq.scan(inst, params, data.test, widths=(16,), integers=(6,), weights=None)
    spec = pq.SiteSpec((4,), "input", max_bits=12)
    rules = pq.search.rules_at(found._replace(sites={**found.sites, "gelu/input": spec}), 16, 6)
    formats = dict(rules)
    assert formats["gelu/input"] == Format(5.0, 6.0, 1, "TRN", "WRAP", "tensor") and "Dense_0/kernel" not in formats
    assert float(kif_of(16, 6, 1, "TRN", "WRAP", 12).f[0]) == 6
    several = pq.scan(inst, params, data.test, widths=(16,), integers=(6,), weights=Grid((4,), (2,)))
    for function in (lambda: pq.search.rules_at(several, 16, 6), lambda: pq.search.chosen(several)):
        with pytest.raises(pq.TransformError, match="axes of its own"):
            function()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(rounding="AP_TRN"), pq.TransformError, "rounding is 'AP_TRN', expected one of"),
        (dict(widths=()), pq.TransformError, r"widths are \[\], expected"),
        (dict(integers=(2, 2)), pq.TransformError, "none of them twice"),
        (dict(widths=(0, 4)), pq.TransformError, "expected 1 or more bits"),
        (dict(weights="hold"), pq.TransformError, "weights is 'hold', expected 'scan'"),
        (dict(results=(8, 4, 1)), pq.TransformError, r"results is \(8, 4, 1\)"),
        (dict(weights=None, intermediates=(8, 4)), pq.TransformError, r"\[None, \(8, 4\), \(32, 14\)\]: expected 'scan' for one"),
        (dict(chunk=0), pq.TransformError, "chunk is 0"),
        (dict(samples=0), pq.DataError, "expected 1 or more of each"),
        (dict(metric=[]), pq.DataError, "expected a pq.Metric"),
        (dict(metric=[spread, spread]), pq.DataError, "expected names that differ"),
        (dict(data=(1, 2, 3)), pq.DataError, r"a tuple of 3, expected \(x, y\)"),
        (dict(data=[1]), pq.DataError, "data is a list, expected"),
        (dict(model=3), pq.TraceError, "is not a linen, nnx or equinox module"),
    ],
)
def test_mistakes_are_told_before_the_work(jets, change, error, text):
    arguments: dict[str, Any] = {"model": jets.inst, "params": jets.params, "data": jets.data.test, **change}
    with pytest.raises(error, match=text):
        pq.scan(**arguments)


def test_the_response_metrics_are_numpys():
    rng = np.random.default_rng(0)
    t = np.float32(rng.uniform(1, 5, 1001))
    y = np.float32(t * rng.normal(1.1, 0.2, 1001))
    t[7] = 0  # has no response
    r = np.delete(y, 7) / np.delete(t, 7)
    low, middle, high = np.quantile(r, [0.25, 0.5, 0.75])
    expected = {
        pq.search.resolution: (high - low) / (2 * middle),
        pq.search.std_resolution: r.std() / r.mean(),
        pq.search.response_median: middle,
        pq.search.response_low: low,
        pq.search.response_high: high,
        pq.search.response_iqr: high - low,
        pq.search.percentage_error: 100 * np.abs(r - 1).mean(),
        pq.search.percentage_bias: 100 * abs((r - 1).mean()),
    }
    for metric, value in expected.items():
        assert float(metric.function(jnp.asarray(y)[:, None], jnp.asarray(t))) == pytest.approx(value, rel=1e-4), metric.name
    dead = jnp.zeros(1001)
    assert float(pq.search.resolution.function(dead, jnp.asarray(t))) == np.inf


def test_sensitivity_narrows_one_part_at_a_time(jets):
    inst, params, data = jets
    found = pq.search.sensitivity(inst, params, data.test, low=(4, 2), by="site", metric=[spread])
    assert set(found.names) == {*inst.sites, "output"} and np.all(np.diff(found.drop) <= 0)
    assert found.reference == pytest.approx(found.baseline, rel=1e-3)
    s = subject(inst, params, data.test, samples=None, batch=None)
    forward = jax.jit(lambda view, x: inst.forward(view, s.state, x)[0])
    for name in ("Dense_1/kernel", "Dense_1/input"):
        view, _ = view_at(s, {name: kif_of(4, 2, len(inst.sites[name].shape), "TRN", "WRAP")})
        y = forward(view, s.x[0])
        assert found.metric[found.names.index(name)] == pytest.approx(float(jnp.mean(y**2)), rel=1e-5)
    layers = pq.search.sensitivity(inst, params, data.test, low=4)
    assert set(layers.names) == {"Dense_0", "Dense_1", "Dense_2", "output"} and layers.low == (4, None)
    assert layers.drop[0] > 0.05 and layers.reference == pytest.approx(layers.baseline, abs=0.01)
    assert layers.metric[layers.names.index("output")] > layers.metric[0]
    with pytest.raises(pq.TransformError, match="by is 'kernel', expected 'layer' or 'site'"):
        pq.search.sensitivity(inst, params, data.test, by="kernel")


def test_differences_are_those_of_the_values(jets):
    inst, params, data = jets
    found = {d.name: d for d in pq.search.differences(inst, params, data.test, weights=(7, 2), intermediates=(9, 5), samples=100)}
    assert set(found) == {*inst.sites, "output"}
    w = np.asarray(params["Dense_0"]["kernel"], np.float64)
    q = oracle.quantize(w, 1, 1, 5, rounding="TRN", overflow="WRAP")
    assert found["Dense_0/kernel"].largest == pytest.approx(np.abs(q - w).max(), rel=1e-5)
    assert found["Dense_0/kernel"].rms == pytest.approx(np.sqrt(np.mean((q - w) ** 2)), rel=1e-5)
    x = data.test.x[np.arange(100) * len(data.test.x) // 100].astype(np.float64)
    x_q = oracle.quantize(inst.encode(x).astype(np.float64), 1, 4, 4, rounding="TRN", overflow="WRAP")
    assert found["Dense_0/input"].rms == pytest.approx(np.sqrt(np.mean((x_q - x) ** 2)), rel=1e-5)
    b = np.asarray(params["Dense_0"]["bias"], np.float64)
    b_q = oracle.quantize(b, 1, 1, 5, rounding="TRN", overflow="WRAP")
    h, h_q = np.maximum(x @ w + b, 0), np.maximum(x_q @ q + b_q, 0)
    h_q = oracle.quantize(h_q, 1, 4, 4, rounding="TRN", overflow="WRAP")
    assert found["Dense_1/input"].largest == pytest.approx(np.abs(h_q - h).max(), rel=1e-4)
    assert found["Dense_1/input"].size == pytest.approx(np.sqrt(np.mean(h**2)), rel=1e-4)
    exact = pq.search.differences(inst, params, data.test, weights=None, intermediates=None, results=None)
    assert max(d.largest for d in exact) == 0


def test_tables_and_outputs_that_are_sites():
    """Both ends of a table move with the intermediates, its input within 12 bits; the model's own output sites are used."""
    rng = np.random.default_rng(1)
    params = {"a": jnp.float32(rng.normal(size=(4, 6))), "b": jnp.float32(rng.normal(size=(6, 3)))}
    x = np.float32(rng.normal(size=(200, 4)))
    model = pq.from_function(lambda p, v: jnp.tanh(v @ p["a"]) @ p["b"], params)
    y = model.forward(params, {}, jnp.asarray(x), train=False, rng=None)[0]
    inst, plain = pq.instrument(model, x[:2], outputs=True), pq.instrument(model, x[:2])
    kinds = {spec.kind for spec in inst.sites.values()}
    assert {"table", "output"} <= kinds and "output" not in {spec.kind for spec in plain.sites.values()}
    given = dict(widths=(8, 12, 16), integers=(5,), metric=pq.train.mse, results=(9, 5))
    first, second = (pq.scan(m, params, (x, np.asarray(y)), **given) for m in (inst, plain))
    np.testing.assert_array_equal(first.metric, second.metric)
    assert np.all(np.diff(first.metric[:, 0]) < 0)
    (name,) = (n for n, spec in inst.sites.items() if spec.max_bits)
    formats = dict(pq.search.rules_at(first, 16, 5))
    assert formats[re.escape(name)].f == 7 and formats["output"].f == 4
    view = pq.quantize.fixed(inst.sites, rules=pq.search.rules_at(first, 16, 5))
    view = view.apply(view.attach(params), view.init(view.attach(params)))[0]
    fixed, _ = inst.forward(view, {}, jnp.asarray(x))
    assert float(jnp.mean((fixed - y) ** 2)) == pytest.approx(first.metric[2, 0], rel=1e-4)
    names = {d.name for d in pq.search.differences(inst, params, (x, y), weights=(8, 3), intermediates=(8, 4), results=(8, 5))}
    assert names == set(inst.sites)
    assert set(pq.search.sensitivity(inst, params, (x, y), low=6, by="site", metric=pq.train.mse).names) == set(inst.sites)
