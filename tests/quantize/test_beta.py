"""The price of an EBOP: pieces and the controller against HGQ2's, and that none of it recompiles."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import Event, SiteSpec, Stage
from pquant_jax._errors import TransformError
from pquant_jax.numerics import total_bits
from pquant_jax.quantize import Format, hgq, pid, piecewise, ramp
from pquant_jax.transforms import chain, with_hyper

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hgq2_ebops.json").read_text())
KERNEL = {"kernel": SiteSpec((2, 4), "kernel", channel_axes=(1,))}
MODEL = {"kernel": jnp.ones((2, 4))}
PIECES = [(0, 0.0, "linear"), (10, 1e-5, "log"), (20, 1e-3, "constant")]


def cost(view):
    return 1000 * sum((jnp.sum(total_bits(fmt)) for fmt in view.sites.values()), jnp.zeros(()))


def made(beta, **options):
    t = hgq(KERNEL, beta=beta, cost=cost, weights=Format(k=1, i=1, f=3, overflow="SAT"), **options)
    params = t.attach(MODEL)
    return t, params, t.init(params)


def betas(beta, epochs, tell, total=31):
    t, params, state = made(beta)
    return [float(tell(t, params, state, Event.PRE_EPOCH, epoch=e, epochs=total).beta) for e in epochs]


def drive(controller, ebops, epoch=0):
    """beta of every epoch, given what the epoch before cost."""
    hypers = {name: jnp.float32(v) for name, v in controller.hyper.items()}
    beta, memory = controller.init(hypers)
    seen = []
    for n, e in enumerate(ebops, epoch):
        beta, memory = controller.update(hypers, memory, beta, epoch=jnp.int32(n), epochs=jnp.int32(9), cost=jnp.float32(e))
        seen.append(float(beta))
    return seen


@pytest.mark.parametrize("beta", [PIECES, piecewise(PIECES)], ids=["pieces", "piecewise"])
def test_pieces_equal_hgq2(beta, tell):
    want = GOLDEN["piecewise_schedule"]
    np.testing.assert_allclose(betas(beta, want["epochs"], tell), want["beta"], rtol=2e-6)


def test_log_from_or_to_zero_is_straight(tell):
    np.testing.assert_allclose(betas([(0, 0.0, "log"), (10, 1e-4, "log"), (20, 0.0, "log")], [0, 5, 10, 15, 20, 25], tell),
                               [0, 5e-5, 1e-4, 5e-5, 0, 0], rtol=1e-6)  # fmt: skip


def test_before_the_first_point_is_its_beta(tell):
    np.testing.assert_allclose(betas([(5, 1e-4, "linear"), (10, 1e-3, "constant")], [0, 5], tell), [1e-4, 1e-4])


@pytest.mark.parametrize(("shape", "middle"), [("log", 1e-4), ("linear", 5.05e-4), ("constant", 1e-5)])
def test_ramps(shape, middle, tell):
    np.testing.assert_allclose(betas(ramp(1e-5, 1e-3, shape=shape), [15], tell), [middle], rtol=1e-5)


def test_the_controller_equals_hgq2():
    want = GOLDEN["beta_pid"]
    controller = pid(1e4, beta=1e-6, p=1, i=2e-3, d=0, warmup=0)
    np.testing.assert_allclose(drive(controller, want["ebops_seq"]), want["beta"], rtol=1e-5)


def test_beta_stays_through_the_warm_up_and_does_not_jump_behind_it():
    for log in (True, False):
        seen = drive(pid(1e4, beta=1e-4, p=1e-4, warmup=3, log=log), [4e4] * 4)
        np.testing.assert_allclose(seen, [1e-4] * 4, rtol=1e-5)
    seen = drive(pid(1e4, beta=1e-4, p=1e-4, warmup=3, log=False, compat="hgq2"), [4e4] * 4)
    np.testing.assert_allclose(seen, [1e-4] * 3 + [1e-4 + 2 * 1e-4 * 3], rtol=1e-5)  # the wrong sign: + 2 p e


def test_linear_terms():
    """beta = p e + i sum(e) + d (e - e before), e = E / target - 1, from where beta was."""
    seen = drive(pid(100.0, beta=0.5, p=0.1, i=0.01, d=0.2, warmup=0, log=False), [300, 200, 50])
    start = 0.5 - 0.1 * 2
    want = [0.5, start + 0.01 * 1 + 0.1 * 1 - 0.2 * 1, start + 0.01 * 0.5 - 0.1 * 0.5 - 0.2 * 1.5]
    np.testing.assert_allclose(seen, np.maximum(want, 0), rtol=1e-5)


def test_bounds_and_damping():
    np.testing.assert_allclose(drive(pid(100.0, beta=1e-3, warmup=0, low=5e-4, high=2e-3), [100, 1e6, 1]), [1e-3, 2e-3, 5e-4])
    plain = drive(pid(100.0, beta=1e-3, warmup=0), [100, 50, 200])
    damped = drive(pid(100.0, beta=1e-3, warmup=0, damp=0.5), [100, 50, 200])
    np.testing.assert_allclose(damped, [plain[0], plain[1] / 2, plain[2]], rtol=1e-6)


def test_a_model_of_no_bits_is_a_finite_error():
    assert np.all(np.isfinite(drive(pid(100.0, beta=1e-3, warmup=0), [0, 0, 200])))


def test_the_controller_runs_on_through_rounds_and_only_in_training(tell):
    t, params, state = made(pid(1000.0, beta=1e-6, warmup=2))
    for stage, event in ((Stage.PRETRAIN, Event.PRE_EPOCH), (Stage.TRAIN, Event.POST_EPOCH), (Stage.FINETUNE, Event.PRE_EPOCH)):
        same = tell(t, params, state, event, stage, epoch=5)
        assert float(same.beta) == float(state.beta) and not bool(same.memory["started"])
    seen = []
    for epoch in (0, 1, 2, 3, 4, 0, 1):  # a second round begins: no second warm-up
        state = tell(t, params, state, Event.PRE_EPOCH, epoch=epoch)
        seen.append(float(state.beta))
    np.testing.assert_allclose(seen[:3], [1e-6] * 3, rtol=1e-4)
    assert np.all(np.diff(seen[2:]) > 0), "40,000 EBOPs are above the target: the sum grows"


def test_the_cost_is_that_of_the_pruned_model(tell):
    """The controller of a chain sees the masks that enter it."""
    from pquant_jax.prune import frozen

    def masked_cost(view):
        return 100.0 * jnp.sum(view.masks["kernel"]) if view.masks else jnp.float32(800)

    t = chain(
        frozen({"kernel": np.eye(2, 4)}),
        hgq(KERNEL, beta=pid(100.0, beta=1e-3, warmup=0), cost=masked_cost, weights=Format(k=1, i=1, f=3)),
    )
    params = t.attach(MODEL)
    state = tell(t, params, t.init(params), Event.PRE_FINETUNE)
    state = tell(t, params, state, Event.PRE_EPOCH)
    masks = t.apply(params, state)[0].masks["kernel"]
    np.testing.assert_allclose(10 ** float(state["hgq"].memory["error"]), float(jnp.sum(masks)), rtol=1e-5)


def test_new_numbers_recompile_nothing_and_a_population_has_its_own():
    for beta, values in ((pid(1e4, warmup=0), {"target": 2e4}), (piecewise(PIECES), {"beta": [1e-3, 1e-4, 1e-5]})):
        t, params, state = made(beta)
        traces = []

        def begin(state, t=t, params=params, traces=traces):
            traces.append(1)
            numbers = dict(event=Event.PRE_EPOCH, stage=Stage.TRAIN, epoch=5, epochs=10)
            return t.boundary(params, state, stats={}, **{n: jnp.int32(v) for n, v in numbers.items()})[1]

        begin_jit = jax.jit(begin)
        other = with_hyper(state, **values)
        first, second = begin_jit(state), begin_jit(other)
        begin_jit(begin_jit(first))
        assert len(traces) == 1
        both = jax.vmap(begin)(jax.tree.map(lambda a, b: jnp.stack([a, b]), state, other))
        np.testing.assert_allclose(both.beta, [float(first.beta), float(second.beta)], rtol=1e-5)
        moved, other = ([float(v) for v in jax.tree.leaves((s.beta, s.memory))] for s in (first, second))
        assert moved != other


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        (lambda: piecewise([]), "one or more"),
        (lambda: piecewise([(0, 1e-5, "log"), (0, 1e-4, "log")]), "rising epochs"),
        (lambda: piecewise([(0, -1e-5, "log")]), "beta >= 0"),
        (lambda: piecewise([(0, 1e-5, "cubic")]), "'cubic', expected 'constant', 'linear' or 'log'"),
        (lambda: ramp(1e-5, 1e-3, shape="cosine"), "'cosine'"),
        (lambda: pid(0.0), "target is 0.0"),
        (lambda: pid(1e4, beta=0.0), "log=False"),
        (lambda: pid(1e4, compat="pquantml"), "'hgq2'"),
        (lambda: hgq(KERNEL, beta=PIECES, beta_end=1e-3), "beta_end"),
        (lambda: hgq(KERNEL, beta=pid(1e4)), "cost=inst.ebops"),
    ],
)
def test_errors(beta, message):
    with pytest.raises(TransformError, match=message):
        beta()
