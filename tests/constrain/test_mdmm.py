"""MDMM: PQuantML's values, the two sides of a constraint, the stages, and the point at which it settles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pquant_jax as pq
from pquant_jax._base import Event, Params, Stage, View
from pquant_jax.constrain import MDMMState, mdmm, metrics

W = [[0.5, -0.2, 0.05, -0.9], [0.3, 0.1, -0.7, 0.02]]
# PQuantML, torch backend: defaults but epsilon 0.1, target sparsity 0.6; (penalty, lambda) of three forwards, and the
# gradient of the fourth's penalty
GOLDEN = {
    "coarse": ([0.7884345, 0.7890115, 0.7895885], [1, 1.0007596, 1.0015192], 0.0759586, 0.29567 * np.sign(W)),
    "smooth": (
        [1.0521878, 1.0531917, 1.0541958],
        [1, 1.0010020, 1.0020039],
        0.1001989,
        [[0.39906, -0.58498, 2.37542, -0.39906], [0.40094, 2.2662, -0.39906, 1.37434]],
    ),
}


def value(params: Params, view: View) -> jax.Array:
    """The one number that the toy problems hold."""
    del view
    return params.model["w"][0]


def told(event: Event, stage: Stage) -> dict:
    return {k: jnp.int32(v) for k, v in dict(event=event, stage=stage, epoch=0, epochs=1).items()}


def training(t, model) -> tuple[Params, MDMMState]:
    params = t.attach(model)
    return t.boundary(params, t.init(params), stats={}, **told(Event.PRE_EPOCH, Stage.TRAIN))


def penalty(t, params, state):
    return t.penalty(params, state, t.apply(params, state)[0])


def with_multiplier(params: Params, multiplier: float) -> Params:
    return params._replace(extra={"mdmm": {"multiplier": jnp.float32(multiplier)}})


@pytest.mark.parametrize("mode", GOLDEN)
def test_golden(mode):
    penalties, multipliers, seen, gradient = GOLDEN[mode]
    metric = metrics.reference_sparsity(target_sparsity=0.6, epsilon=0.1, mode=mode)
    t = mdmm(metric, kind="==", target=0.0, compat="pquantml")
    params, state = training(t, {"kernel": jnp.float32(W)})
    for want_penalty, want_multiplier in zip(penalties, multipliers, strict=True):
        np.testing.assert_allclose(penalty(t, params, state), want_penalty, rtol=0, atol=1e-6)
        params, state = t.step(params, state, stage=jnp.int32(Stage.TRAIN), stats={}, previous=params)
        np.testing.assert_allclose(params.extra["mdmm"]["multiplier"], want_multiplier, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.seen, seen, rtol=0, atol=1e-6)
    grads = jax.grad(lambda p: penalty(t, p, state))(params)
    np.testing.assert_allclose(grads.model["kernel"], gradient, rtol=0, atol=1e-5)  # printed with five digits
    assert float(grads.extra["mdmm"]["multiplier"]) == 0


@pytest.mark.parametrize(("kind", "signs"), [("==", (-1, 1)), ("<=", (0, 1)), (">=", (1, 0))])
def test_a_constraint_from_both_sides(kind, signs):
    """With lambda 0 the multiplier ascends by scale * g, signed for an equality, and not at all where an inequality holds."""
    t = mdmm(value, kind=kind, target=2.0, scale=3.0, damping=0.5)
    for w, sign in zip((1.0, 3.0), signs, strict=True):
        params, state = training(t, {"w": jnp.float32([w])})
        found, grads = jax.value_and_grad(lambda p, s=state: penalty(t, p, s))(params)
        assert float(grads.extra["mdmm"]["multiplier"]) == 3.0 * sign
        assert float(found) == 3.0 * 0.5 * abs(sign) / 2
        toward = 3.0 * 0.5 * (w - 2) if sign else 0.0  # scale * damping * g * dg/dw
        assert float(grads.model["w"][0]) == toward


def test_a_multiplier_comes_back_where_the_reference_only_grows():
    """PQuantML's |g| and max(g, 0) push lambda up for ever; signed, it falls once the constraint is overfulfilled."""
    for kind, w in (("==", 1.0), ("<=", 1.0), (">=", 3.0)):
        ours, theirs = (mdmm(value, kind=kind, target=2.0, compat=c) for c in (None, "pquantml"))
        params, state = training(ours, {"w": jnp.float32([w])})
        grads = jax.grad(lambda p, t=ours, s=state: penalty(t, p, s))(with_multiplier(params, 0.5))
        assert float(grads.extra["mdmm"]["multiplier"]) < 0
        params, state = training(theirs, {"w": jnp.float32([w])})
        seen = []
        for _ in range(4):
            params, state = theirs.step(params, state, stage=jnp.int32(Stage.TRAIN), stats={}, previous=params)
            seen.append(float(params.extra["mdmm"]["multiplier"]))
        assert np.all(np.diff(seen) >= 0)
        assert seen[-1] > 1 if kind == "==" else seen[-1] == 1


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_the_gradients_of_an_inequality_are_those_of_the_augmented_lagrangian(damping):
    """(max(0, lambda + c g)^2 - lambda^2) / 2c, by finite differences in float64; lambda g for c = 0."""
    t = mdmm(value, kind="<=", target=2.0, scale=1.0, damping=damping)

    def closed(w, lam):
        g = w - 2
        return (max(0, lam + damping * g) ** 2 - lam**2) / (2 * damping) if damping else lam * g

    params, state = training(t, {"w": jnp.float32([0.0])})
    for w in (0.3, 1.7, 2.5):
        for lam in (0.1, 0.6):
            here = with_multiplier(Params({"w": jnp.float32([w])}, {}), lam)
            found, grads = jax.value_and_grad(lambda p: penalty(t, p, state))(here)
            np.testing.assert_allclose(found, closed(w, lam), rtol=1e-5, atol=1e-6)
            by_w = (closed(w + 1e-6, lam) - closed(w - 1e-6, lam)) / 2e-6
            by_lam = (closed(w, lam + 1e-6) - closed(w, lam - 1e-6)) / 2e-6
            np.testing.assert_allclose(grads.model["w"][0], by_w, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(grads.extra["mdmm"]["multiplier"], by_lam, rtol=1e-4, atol=1e-6)


def test_the_multiplier_of_an_inequality_stays_positive():
    for kind, want in (("<=", 0.0), (">=", 0.0), ("==", -0.25)):
        t = mdmm(value, kind=kind, target=2.0)
        params, state = training(t, {"w": jnp.float32([1.0])})
        after, _ = t.step(with_multiplier(params, -0.25), state, stage=jnp.int32(Stage.TRAIN), stats={}, previous=params)
        assert float(after.extra["mdmm"]["multiplier"]) == want


def trained(t, model, loss, tx, steps, *, stages=None, before=None):
    """A jitted loop of plain optax.  Gives the last parameters and the path of (w, lambda)."""
    params = t.attach(model)
    opt_state = tx.init(params)
    params, opt_state = pq.boundary(t, params, opt_state, event=Event.PRE_EPOCH, stage=Stage.TRAIN)

    def step(carry, stage):
        params, opt_state = carry
        state = pq.state_of(opt_state)

        def objective(p):
            return loss(p.model["w"]) + t.penalty(p, state, t.apply(p, state)[0])

        updates, opt_state = tx.update(jax.grad(objective)(params), opt_state, params, stage=stage)
        params = optax.apply_updates(params, updates)
        return (params, opt_state), (params.model["w"], params.extra["mdmm"]["multiplier"])

    stages = jnp.full(steps, Stage.TRAIN, jnp.int32) if stages is None else jnp.asarray(stages, jnp.int32)
    (params, opt_state), path = jax.jit(lambda c: jax.lax.scan(step, c, stages))((params, opt_state))
    return params, jax.tree.map(np.asarray, path)


def distance_to_3_and_1(w):
    return jnp.sum(jnp.square(w - jnp.float32([3, 1])))


@pytest.mark.parametrize(
    ("kind", "target", "point", "multiplier"),
    [
        ("==", 1.0, (1, 1), 4.0),
        ("<=", 1.0, (1, 1), 4.0),
        (">=", 1.0, (3, 1), 0.0),
        (">=", 4.0, (4, 1), 2.0),
        ("==", 5.0, (5, 1), -4.0),
    ],
)
def test_a_quadratic_settles_at_its_constrained_minimum(kind, target, point, multiplier):
    """min (w0 - 3)^2 + (w1 - 1)^2 with w0 held: lambda goes to -d loss / d w0 over the scale (its negative for ">=")."""
    t = mdmm(value, kind=kind, target=target, scale=1.0)
    tx = pq.optimizer(t, weights=optax.sgd(0.05), duals=optax.sgd(0.1))
    params, _ = trained(t, {"w": jnp.zeros(2)}, distance_to_3_and_1, tx, 1000)
    np.testing.assert_allclose(params.model["w"], point, rtol=1e-2)
    np.testing.assert_allclose(params.extra["mdmm"]["multiplier"], multiplier, rtol=1e-2, atol=1e-3)


def between_0_and_1(tx):
    """`tx`, with the parameters put back between two walls."""

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, p: jnp.clip(p + u, 0, 1) - p, updates, params), state

    return optax.GradientTransformation(tx.init, update)


def test_a_point_of_a_concave_front_is_reached_by_mdmm_alone():
    """Loss 1 - w^2 against cost w, between 0 and 1: every mixture's minimum is an end.

    A fixed weight of the cost ends at a wall, damping 0 circles for ever, MDMM settles at 0.6 with lambda = 2 * 0.6.
    """

    def loss(w):
        return jnp.sum(1 - jnp.square(w))

    weights = jnp.float32([0.1, 0.5, 1.0, 1.19, 1.21, 1.5, 2.0, 5.0])
    slope = jax.grad(lambda w: loss(w) + jnp.sum(weights * w))
    ends = jax.lax.fori_loop(0, 2000, lambda _, w: jnp.clip(w - 0.02 * slope(w), 0, 1), jnp.full(8, 0.6))
    assert set(np.asarray(ends).tolist()) == {0, 1}
    found = {}
    for damping in (0.0, 10.0):
        t = mdmm(value, kind="==", target=0.6, scale=1.0, damping=damping)
        tx = pq.optimizer(t, weights=between_0_and_1(optax.sgd(0.02)), duals=optax.sgd(0.05))
        found[damping] = trained(t, {"w": jnp.float32([0.3])}, loss, tx, 6000)[1]
    w, multiplier = found[10.0]
    np.testing.assert_allclose(w[-1000:], 0.6, rtol=1e-3)
    np.testing.assert_allclose(multiplier[-1000:], 1.2, rtol=1e-2)
    last = found[0.0][0][-1000:]
    assert last.min() == 0 and last.max() == 1
