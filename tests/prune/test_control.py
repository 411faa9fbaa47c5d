"""The controller of learned methods: the ramp, the exact mask, and targets met in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st

import pquant_jax as pq
from pquant_jax._base import Event, Params, Stage
from pquant_jax._errors import TransformError
from pquant_jax._tree import sparsity
from pquant_jax.prune import autosparse, cs, dst, magnitude
from pquant_jax.prune._control import LIMIT, control, exact, steer, strength
from pquant_jax.transforms import with_hyper

METHODS = {
    "dst": lambda **more: dst(alpha=1e-3, **more),
    "autosparse": lambda **more: autosparse(**{"threshold_init": -2.0, **more}),
    "cs": lambda **more: cs(**more),
}


def steered(state, masks, event=Event.POST_EPOCH, epoch=0, epochs=4, training=True, target=0.8, gain=2.0):
    numbers = dict(event=jnp.int32(event), epoch=jnp.int32(epoch), epochs=jnp.int32(epochs), training=jnp.bool_(training))
    return steer(state, {"target": jnp.float32(target), "gain": jnp.float32(gain)}, masks, **numbers)


def test_the_strength_follows_a_ramp_to_the_target():
    """A sparsity of 0.25 is ahead of the ramp in the first epoch, which is no reason to weaken."""
    masks, state, moves = {"a": jnp.float32([1, 1, 1, 0])}, control(), []
    for epoch in range(4):
        state, move = steered(state, masks, epoch=epoch)
        moves.append(float(move))
    np.testing.assert_allclose(moves, [0, *(2 * (0.2 * e - 0.25) for e in (2, 3, 4))], atol=1e-6)
    np.testing.assert_allclose(strength(jnp.float32(3), state), 3 * np.exp(sum(moves)), rtol=1e-6)
    state, move = steered(state, masks, epoch=0)  # the first epoch of a second round
    assert float(state.part) == 1
    np.testing.assert_allclose(move, 2 * (0.8 - 0.25), rtol=1e-6)


def test_a_sparsity_above_the_target_weakens_without_end_and_below_it_that_is_taken_back():
    state, above, below = control(), {"a": jnp.float32([1, 0, 0, 0])}, {"a": jnp.float32([1, 1, 0, 0])}
    for _ in range(3):
        state, move = steered(state, above, epoch=3, target=0.6)
        np.testing.assert_allclose(move, 2 * (0.6 - 0.75), atol=1e-6)
    state, move = steered(state, below, epoch=3, target=0.6)
    np.testing.assert_allclose(move, 2 * (0.6 - 0.5), atol=1e-6)
    assert float(state.push) < 0


@pytest.mark.parametrize(
    "other",
    [*({"event": e} for e in Event if e != Event.POST_EPOCH), {"training": False}, {"target": np.nan}],
    ids=str,
)
def test_nothing_moves_but_when_an_epoch_of_the_training_stage_ends(other):
    state, move = steered(control(), {"a": jnp.ones(4)}, **other)
    assert float(move) == 0
    assert float(state.push) == 0


def test_the_strength_stays_finite():
    state = control()
    for _ in range(100):
        state, _ = steered(state, {"a": jnp.ones(4)}, epoch=3, gain=100)
    assert float(state.push) == LIMIT
    assert np.isfinite(strength(jnp.float32(1), state))


exactly = jax.jit(exact)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([(1, 1), (3, 30), (12, 7)]), st.floats(0, 0.99), st.integers(0, 99), st.booleans())
def test_the_mask_is_exact_and_of_the_highest_scores(sizes, target, seed, ties):
    rng = np.random.default_rng(seed)
    scores = {p: rng.normal(size=n).astype(np.float32) for p, n in zip("ab", sizes, strict=True)}
    scores = {p: np.round(s) if ties else s for p, s in scores.items()}
    masks = {p: np.asarray(m) for p, m in exactly(scores, jnp.float32(target)).items()}
    kept = sum(m.sum() for m in masks.values())
    assert abs(kept - max((1 - target) * sum(sizes), 2)) <= 0.5 + 1e-4
    assert all(m[s.argmax()] == 1 for m, s in ((masks[p], scores[p]) for p in scores))
    dropped = np.concatenate([s[masks[p] == 0] for p, s in scores.items()])
    rest = np.concatenate([np.delete(s, s.argmax())[np.delete(masks[p], s.argmax()) == 1] for p, s in scores.items()])
    assert rest.min(initial=np.inf) >= dropped.max(initial=-np.inf)


@pytest.mark.parametrize("name", METHODS)
def test_a_target_can_be_set_later_and_none_leaves_the_method_alone(name, w, tell):
    plain, aimed = METHODS[name](), METHODS[name](target=0.75)
    params = plain.attach({"kernel": w})
    late = with_hyper(plain.init(params), target=0.75)
    jax.tree.map(np.testing.assert_array_equal, late, aimed.init(params))
    ends = {}
    for label, t, state in (("plain", plain, plain.init(params)), ("aimed", aimed, aimed.init(params))):
        state = state._replace(stage=jnp.int32(Stage.TRAIN))
        ends[label] = tell(t, *tell(t, params, state, Event.POST_EPOCH, epoch=9), Event.PRE_FINETUNE, Stage.FINETUNE)
    after, state = ends["plain"]
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert float(state.control.push) == 0
    assert float(sparsity(ends["aimed"][1].mask)) == 0.75


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("target", [None, 0.5])
def test_a_rewind_does_not_change_which_weights_were_chosen(name, target, w, tell):
    """Kernels go back to what they were between the last epoch and fine-tuning; the mask is that of the trained ones."""
    t = METHODS[name](target=target)
    params = t.attach({"kernel": w})
    spread = jax.tree.map(lambda v: v + 0.2 * jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape), params.extra)
    params = params._replace(extra=spread)
    state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    params, state = tell(t, params, state, Event.POST_EPOCH, epoch=9)
    chosen = np.asarray(state.mask["kernel"])
    assert 0 < chosen.sum() < chosen.size
    rewound = Params({"kernel": w[::-1, ::-1]}, params.extra)
    _, frozen = tell(t, rewound, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    np.testing.assert_array_equal(frozen.mask["kernel"], chosen)


def test_a_rewind_does_not_change_what_magnitude_keeps(w, tell):
    t = magnitude(sparsity=0.5)
    params = t.attach({"kernel": w})
    state = t.init(params)._replace(stage=jnp.int32(Stage.TRAIN))
    params, state = tell(t, params, state, Event.POST_EPOCH, epoch=9)
    chosen = np.asarray(state.mask["kernel"])
    assert chosen.sum() == chosen.size // 2
    rewound = Params({"kernel": 1 - jnp.abs(w)}, {})
    for event, stage in ((Event.PRE_EPOCH, Stage.TRAIN), (Event.PRE_FINETUNE, Stage.FINETUNE)):
        rewound, state = tell(t, rewound, state, event, stage, epoch=0)
        np.testing.assert_array_equal(state.mask["kernel"], chosen)
    rewound, state = t.step(rewound, state, stage=jnp.int32(Stage.TRAIN), stats={})
    _, state = tell(t, rewound, state, Event.PRE_FINETUNE, Stage.FINETUNE)  # a loop that announces no ends of epochs
    assert np.any(state.mask["kernel"] != chosen)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_errors(make):
    with pytest.raises(TransformError, match="target is 90, expected zeros / total, 0 <= target < 1"):
        make(target=90)
    with pytest.raises(TransformError, match="compat is 'pquant'; did you mean 'pquantml'"):
        make(compat="pquant")


def two_layers() -> tuple[pq.Instrumented, pq.data.Dataset]:
    def split(samples: int, seed: int) -> pq.data.Split:
        x = np.random.default_rng(seed).normal(size=(samples, 8)).astype(np.float32)
        return pq.data.Split(x, np.argmax(np.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3] ** 2 - 1], 1), 1).astype(np.int32))

    rng, shapes = np.random.default_rng(0), {"a": (8, 32), "b": (32, 3)}
    kernels = {n: jnp.asarray(rng.normal(0, s[0] ** -0.5, s), jnp.float32) for n, s in shapes.items()}
    data = pq.data.Dataset(split(256, 0), split(64, 1), split(64, 2), classes=("0", "1", "2"))
    model = pq.from_function(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], kernels)
    return pq.instrument(model, data.train.x[:2]), data


@pytest.mark.parametrize("name", METHODS)
def test_the_target_is_met_within_half_a_point_and_the_way_there_is_gradual(name):
    """96 steps of training."""
    inst, data = two_layers()
    t = METHODS[name](target=0.7, **({"threshold_init": -5.0} if name == "autosparse" else {}))  # far below any weight
    optimizer = pq.optimizer(t, weights=optax.adam(1e-2), thresholds=optax.adam(2e-2))
    plan, states = pq.Plan(pretrain=0, train=12, finetune=2), []
    result = pq.fit(
        inst,
        data,
        plan=plan,
        compression=t,
        optimizer=optimizer,
        batch_size=32,
        callbacks=[lambda record, state: states.append(t.apply(state.params, pq.state_of(state.opt_state))[0].masks)],
    )
    assert abs(float(sparsity(result.view.masks)) - 0.7) <= 0.005
    assert abs(result.best["sparsity"] - 0.7) <= 0.005
    assert result.traces == 1
    before = [float(sparsity({p: (m > 0.5).astype(jnp.float32) for p, m in masks.items()})) for masks in states[:11]]
    assert before[2] < 0.6
    assert abs(before[-1] - 0.7) < 0.12, before  # so fine-tuning's exact mask has little left to do
