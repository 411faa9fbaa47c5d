"""HGQ: ranges that follow the data, the penalty, and the stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pquant_jax._base import Event, Params, SiteSpec, Stage
from pquant_jax._errors import TransformError
from pquant_jax.numerics import oracle, quantize, total_bits
from pquant_jax.quantize import Format, fixed, hgq
from pquant_jax.transforms import as_optax, with_hyper

INPUT = {"input": SiteSpec((4,), "input", channel_axes=(0,))}
KERNEL = {"kernel": SiteSpec((2, 4), "kernel", channel_axes=(1,))}


def activations(overflow="WRAP", granularity="element", i=2, f=3):
    """A model without parameters and one activation of four features."""
    t = hgq(INPUT, activations=Format(i=i, f=f, overflow=overflow, granularity=granularity))
    params = t.attach({})
    return t, params, t.init(params)


def ranges(low, high):
    return {"range": {"input": (jnp.float32(low), jnp.float32(high))}}


def step(t, params, state, stats=None, stage=Stage.TRAIN, **extra):
    return t.step(params, state, stage=jnp.int32(stage), stats=stats or {}, **extra)


def test_a_tracked_range_sinks_by_the_decay_to_what_the_data_need():
    """i <- max(i - 0.01, needed); HGQ2's answers to the same batch, where its bound on |x| agrees."""
    t, params, state = activations()
    stats = ranges([-0.2, -1.0, -3.1, -0.01], [0.9, 0.5, 2.9, 0.02])
    _, state = step(t, params, state, stats)
    np.testing.assert_allclose(state.i["input"], [1.99, 1.99, 2, 1.99], rtol=1e-6)
    for _ in range(300):
        _, state = step(t, params, state, stats)
    np.testing.assert_allclose(state.i["input"], [0, 0, 2, -0.99 - 0.02], rtol=0, atol=2e-3)


def test_hgq2_tracks_the_same_in_training(hgq2):
    x = np.float32(hgq2["wrap_bookkeeping"]["x"])
    for case in hgq2["wrap_bookkeeping"]["cases"]:
        granularity = {1: "element", 2: "tensor"}[len(case["homogeneous_axis"])]
        t, params, state = activations(granularity=granularity, i=case["i0"], f=case["f"])
        _, state = step(t, params, state, ranges(x.min(0), x.max(0)))
        np.testing.assert_allclose(state.i["input"], np.ravel(case["train"]["i"]), rtol=1e-6)


def test_calibration_gives_what_hgq2_traces_but_for_the_negative_extreme(hgq2, tell):
    """[-1, 0.5] at f = 3 fits in -1 .. 0.875, i = 0; HGQ2 bounds |x| and says 1.  The grid decides the sign: -0.01 is 0."""
    x = np.float32(hgq2["wrap_bookkeeping"]["x"])
    for case in hgq2["wrap_bookkeeping"]["cases"]:
        shared = len(case["homogeneous_axis"]) == 2
        t, params, state = activations(granularity="tensor" if shared else "element", i=case["i0"], f=case["f"])
        state = tell(t, params, state, Event.CALIBRATE, stats=ranges(x.min(0), x.max(0)))
        i, k = np.ravel(case["trace"]["i"]), np.ravel(case["trace"]["k"])
        np.testing.assert_array_equal(state.i["input"], i if shared else [0, 0, 2, -3])
        np.testing.assert_array_equal(state.k["input"], k)
        if shared:
            fmt = t.apply(params, state)[0].sites["input"]
            np.testing.assert_array_equal(quantize(2 * x, fmt), case["eval_on_2x"])


@pytest.mark.parametrize(
    ("low", "high", "i", "k"),
    [(-1, 0.5, 0, 1), (-1, 1, 1, 1), (0, 0.875, 0, 0), (0, 0.94, 1, 0), (0, 0, -3, 0), (-4, 3.875, 2, 1), (0.25, 0.5, 0, 0)],
)
def test_low_and_high_are_tracked_separately(low, high, i, k, tell):
    t, params, state = activations()
    state = tell(t, params, state, Event.CALIBRATE, stats=ranges([low] * 4, [high] * 4))
    np.testing.assert_array_equal(state.i["input"], np.full(4, i))
    np.testing.assert_array_equal(state.k["input"], np.full(4, k))
    fmt = t.apply(params, state)[0].sites["input"]
    ends = jnp.float32([[low] * 4, [high] * 4])
    exact = oracle.quantize(ends, 1, 20, 3)
    np.testing.assert_array_equal(quantize(ends, fmt), exact)  # nothing of the calibrated range wraps
    assert int(total_bits(fmt)[0]) == (0 if low == high == 0 else k + i + 3)


def test_a_range_that_rounds_to_nothing_has_no_bits(tell):
    """-0.01 is 0 in steps of 1/8: a sign bit of its own would be a bit for a value that is always 0."""
    t, params, state = activations()
    state = tell(t, params, state, Event.CALIBRATE, stats=ranges([-0.01] * 4, [0.02] * 4))
    np.testing.assert_array_equal(total_bits(t.apply(params, state)[0].sites["input"]), np.zeros(4))


def test_calibration_widens_and_narrows(tell):
    t, params, state = activations(i=2)
    state = tell(t, params, state, Event.CALIBRATE, stats=ranges([-100, -0.1, 0, 0], [1, 0.1, 60, 0.1]))
    np.testing.assert_array_equal(state.i["input"], [7, -2, 6, -2])
    np.testing.assert_array_equal(state.k["input"], [1, 1, 0, 0])


def test_only_calibration_consumes_the_statistics(tell):
    """A loop that always passes statistics still gets its beta."""
    t = hgq(INPUT, beta=1e-4, beta_end=1e-2)
    params = t.attach({})
    stats = ranges([0.0] * 4, [0.5] * 4)
    state = tell(t, params, t.init(params), Event.PRE_EPOCH, epoch=9, epochs=10, stats=stats)
    np.testing.assert_allclose(state.beta, 1e-2, rtol=1e-5)
    np.testing.assert_array_equal(state.i["input"], t.init(params).i["input"])


def test_a_tracked_range_covers_the_batch_in_every_stage():
    for stage in Stage:
        t, params, state = activations(i=0)
        _, state = step(t, params, state, ranges([-5] * 4, [5] * 4), stage)
        np.testing.assert_array_equal(state.i["input"], np.full(4, 3))


def test_saturating_activations_track_nothing():
    t, params, state = activations("SAT")
    assert t.needs == frozenset() and state.i == {} and list(params.extra["hgq"]["i"]) == ["input"]
    assert activations("WRAP")[0].needs == {"range"}


@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM", "WRAP"])
def test_what_is_trained(overflow):
    t = hgq(KERNEL, weights=Format(i=2, f=6, k=1, overflow=overflow))
    extra = t.attach({"kernel": jnp.ones((2, 4))}).extra["hgq"]
    assert list(extra["f"]) == ["kernel"] and list(extra["i"]) == ([] if overflow == "WRAP" else ["kernel"])
    assert set(jax.tree.leaves(t.labels(t.attach({"kernel": jnp.ones((2, 4))})).extra)) == {"bits"}


def narrowest(values: np.ndarray, f: int) -> tuple[int, int]:
    """(k, i) of the narrowest two's complement that holds integers n = value * 2^f, by trial."""
    codes = np.rint(np.ldexp(values.astype(float), f)).astype(int)
    k = int(codes.min() < 0)
    width = next(w for w in range(40) if np.all((codes >= -k * 2**w) & (codes <= 2**w - 1)))
    return k, width - f


@pytest.mark.parametrize(("granularity", "groups"), [("element", None), ("channel", 0), ("tensor", (0, 1))])
@pytest.mark.parametrize("f", [0, 2, 5])
def test_wrapping_weights_have_the_narrowest_format(granularity, groups, f, key):
    w = np.asarray(oracle.quantize(jax.random.normal(key, (8, 6)) * 3, 1, 9, f), np.float32)
    w[0, 0], w[1, 1], w[2, 2], w[:, 5] = 0.0, -4.0, 4.0, 0.0
    sites = {"kernel": SiteSpec((8, 6), "kernel", channel_axes=(1,))}
    t = hgq(sites, weights=Format(f=f, overflow="WRAP", granularity=granularity))
    params = t.attach({"kernel": jnp.asarray(w)})
    view, _ = t.apply(params, t.init(params))
    np.testing.assert_array_equal(view.model["kernel"], w)
    fmt = view.sites["kernel"]
    split = {None: w.reshape(-1, 1), 0: w.T, (0, 1): w.reshape(1, -1)}[groups]
    want = np.array([narrowest(group, f) for group in split])
    np.testing.assert_array_equal(np.ravel(fmt.k), want[:, 0])
    np.testing.assert_array_equal(np.ravel(fmt.i), want[:, 1])
    np.testing.assert_array_equal(quantize(jnp.asarray(w), fmt), w)  # as it will wrap in hardware
    bits = np.broadcast_to(total_bits(fmt), w.shape)
    assert np.all(bits[w != 0] > 0) and np.all(bits[:, 5] == (0 if granularity != "tensor" else bits.max()))


def test_a_weight_on_the_negative_power_of_two_needs_no_extra_bit():
    t = hgq(KERNEL, weights=Format(f=1, overflow="WRAP"))
    model = {"kernel": jnp.float32([[-2, 2, 1.5, -0.5], [0, 0.2, -0.2, 0.3]])}
    fmt = t.apply(t.attach(model), t.init(t.attach(model)))[0].sites["kernel"]
    np.testing.assert_array_equal(total_bits(fmt), [[3, 3, 2, 1], [0, 0, 0, 1]])
    np.testing.assert_array_equal(fmt.k, [[1, 0, 0, 1], [0, 0, 0, 0]])


def cost(view):
    return sum(jnp.sum(total_bits(fmt)) for fmt in view.sites.values())


def penalty(t, params, state):
    return float(t.penalty(params, state, t.apply(params, state)[0]))


def test_the_penalty_is_beta_times_the_cost(tell):
    t = hgq(KERNEL, beta=0.5, cost=cost, weights=Format(k=1, i=1, f=2, overflow="SAT"))
    params = t.attach({"kernel": jnp.ones((2, 4))})
    assert penalty(t, params, t.init(params)) == 0, "none in pre-training"
    assert penalty(t, params, tell(t, params, t.init(params), Event.PRE_EPOCH, Stage.PRETRAIN)) == 0
    for stage in (Stage.TRAIN, Stage.FINETUNE):
        assert penalty(t, params, tell(t, params, t.init(params), Event.PRE_EPOCH, stage)) == 0.5 * 8 * 4
    state = tell(t, params, t.init(params), Event.PRE_EPOCH)
    grads = jax.grad(lambda p: t.penalty(p, state, t.apply(p, state)[0]))(params)
    np.testing.assert_array_equal(grads.extra["hgq"]["f"]["kernel"], np.full((2, 4), 0.5))
    np.testing.assert_array_equal(grads.model["kernel"], np.zeros((2, 4)))


def test_gamma_is_a_penalty_on_the_raw_bits(tell):
    t = hgq(KERNEL, beta=0.0, gamma=0.25, weights=Format(k=1, i=1, f=2.5, overflow="SAT"))
    params = t.attach({"kernel": jnp.ones((2, 4))})
    assert penalty(t, params, t.init(params)) == 0
    assert penalty(t, params, tell(t, params, t.init(params), Event.PRE_EPOCH)) == 0.25 * 8 * 3.5


def test_gamma_can_be_set_later_or_says_that_it_cannot(tell):
    t = hgq(KERNEL, beta=0.0, weights=Format(k=1, i=1, f=2, overflow="SAT"))
    params = t.attach({"kernel": jnp.ones((2, 4))})
    try:
        state = with_hyper(t.init(params), gamma=1.0)
    except TransformError:
        return
    assert penalty(t, params, tell(t, params, state, Event.PRE_EPOCH)) == 8 * 3


@pytest.mark.parametrize(("start", "end"), [(1e-6, 1e-3), (1e-3, 1e-6), (0.0, 1e-3), (1e-3, 0.0), (1e-5, 1e-5)])
def test_beta_ramps_from_end_to_end(start, end, tell):
    t = hgq(KERNEL, beta=start, beta_end=end)
    params = t.attach({"kernel": jnp.ones((2, 4))})
    state = t.init(params)
    np.testing.assert_allclose(state.beta, start)
    seen = [float(tell(t, params, state, Event.PRE_EPOCH, epoch=e, epochs=11).beta) for e in range(11)]
    np.testing.assert_allclose(seen[0], start, rtol=1e-5)
    np.testing.assert_allclose(seen[-1], end, rtol=1e-5)
    if start and end:
        np.testing.assert_allclose(seen[5], np.sqrt(start * end), rtol=1e-4)
    assert np.all(np.diff(seen) * np.sign(end - start) >= 0)
    assert np.isfinite(float(tell(t, params, state, Event.PRE_EPOCH, epoch=0, epochs=1).beta))


@pytest.mark.parametrize(("event", "stage"), [(Event.POST_EPOCH, Stage.TRAIN), (Event.PRE_EPOCH, Stage.FINETUNE)])
def test_beta_moves_only_at_the_start_of_a_training_epoch(event, stage, tell):
    t = hgq(KERNEL, beta=1e-6, beta_end=1e-3)
    params = t.attach({"kernel": jnp.ones((2, 4))})
    state = tell(t, params, t.init(params), Event.PRE_EPOCH, epoch=5, epochs=11)
    assert float(tell(t, params, state, event, stage, epoch=10, epochs=11).beta) == float(state.beta)


def test_a_new_beta_without_an_end_stays_in_force(tell):
    """`with_hyper(state, beta=...)` on a method built without beta_end must not ramp back to the old value."""
    t = hgq(KERNEL, beta=1e-6)
    params = t.attach({"kernel": jnp.ones((2, 4))})
    state = with_hyper(t.init(params), beta=1e-3)
    seen = [float(tell(t, params, state, Event.PRE_EPOCH, epoch=e, epochs=5).beta) for e in range(5)]
    np.testing.assert_allclose(seen, np.full(5, 1e-3), rtol=1e-5)


@pytest.mark.parametrize("freeze", [True, False])
def test_the_bits_are_frozen_in_fine_tuning(freeze):
    t = hgq(KERNEL, freeze=freeze, weights=Format(k=1, i=1, f=4, overflow="SAT"))
    params = t.attach({"kernel": jnp.ones((2, 4))})
    moved = Params(params.model, jax.tree.map(lambda v: v - 1.5, params.extra))
    for stage in Stage:
        after, _ = step(t, moved, t.init(params), stage=stage, previous=params)
        still = freeze and stage == Stage.FINETUNE
        np.testing.assert_array_equal(after.extra["hgq"]["f"]["kernel"], np.full((2, 4), 4.0 if still else 2.5))
        np.testing.assert_array_equal(after.extra["hgq"]["i"]["kernel"], np.full((2, 4), 1.0 if still else -0.5))


def test_frozen_bits_stay_through_an_optimizer():
    t = hgq(KERNEL, weights=Format(k=1, i=1, f=4, overflow="SAT"))
    params = t.attach({"kernel": jnp.ones((2, 4))})
    tx = optax.chain(optax.adam(0.1), as_optax(t))
    state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
    for stage, moves in ((Stage.TRAIN, True), (Stage.FINETUNE, False)):
        before = params.extra["hgq"]["f"]["kernel"]
        for _ in range(3):
            updates, state = tx.update(grads, state, params, stage=jnp.int32(stage))
            params = optax.apply_updates(params, updates)
        assert np.all(np.asarray(params.extra["hgq"]["f"]["kernel"]) != np.asarray(before)) == moves


def test_a_pruned_weight_can_come_back():
    """SAT_SYM at no bits: no gradient to the weight, but one to its width."""
    t = hgq(KERNEL, weights=Format(k=1, i=0, f=-1, overflow="SAT_SYM"))
    params = t.attach({"kernel": jnp.full((2, 4), 0.7)})
    grads = jax.grad(lambda p: jnp.sum(t.apply(p, t.init(p))[0].model["kernel"]))(params)
    np.testing.assert_array_equal(t.apply(params, t.init(params))[0].model["kernel"], np.zeros((2, 4)))
    assert np.all(np.asarray(grads.extra["hgq"]["f"]["kernel"]) > 0)


def test_a_width_is_learned():
    """Weights that need three fractional bits, under a small price: the extra bits go, the needed ones stay."""
    w = jnp.float32([[0.125, 0.5, -0.375, 0.625], [1.0, -0.875, 0.25, 0.75]])
    t = hgq(KERNEL, beta=1e-4, cost=cost, weights=Format(k=1, i=0.4, f=7, overflow="SAT_SYM"))
    params = t.attach({"kernel": w})
    state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))

    @jax.jit
    def update(params, opt_state):
        def loss(params):
            view, _ = t.apply(params, state)
            return jnp.sum((view.model["kernel"] - w) ** 2) + t.penalty(params, state, view)

        grads = jax.grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        moved = optax.apply_updates(params, updates)
        return Params(params.model, moved.extra), opt_state

    tx = optax.adam(0.05)
    opt_state = tx.init(params)
    before = float(cost(t.apply(params, state)[0]))
    for _ in range(200):
        params, opt_state = update(params, opt_state)
    view, _ = t.apply(params, state)
    assert float(cost(view)) < 0.6 * before
    assert float(jnp.max(jnp.abs(view.model["kernel"] - w))) <= 0.125


def test_wrap_sm_cannot_be_trained():
    with pytest.raises(TransformError, match=r"kernel: overflow WRAP_SM.*fixed"):
        hgq(KERNEL, weights=Format(overflow="WRAP_SM"))
    fixed(KERNEL, weights=Format(overflow="WRAP_SM"))


def test_a_site_that_was_not_captured_is_named():
    t, params, state = activations()
    with pytest.raises(TransformError, match="'input'.*capture"):
        step(t, params, state, {"range": {"other": (0.0, 1.0)}})
