"""AP: which channels go, when, and what the reference does otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import pquant_jax as pq
from pquant_jax._base import AxisRole, Event, Stage
from pquant_jax._errors import TransformError
from pquant_jax.prune import Heads, ap
from pquant_jax.transforms import with_hyper


def epochs(tell, t, kernel, *activities, state=None):
    """The state after epochs of the training stage, one batch each, and the mask of every one's end, by output channel."""
    params = t.attach({"kernel": kernel})
    state = t.init(params) if state is None else state
    masks = []
    for number, active in enumerate(activities):
        _, state = tell(t, params, state, Event.PRE_EPOCH, epoch=number)
        state = batch(t, params, state, active)
        _, state = tell(t, params, state, Event.POST_EPOCH, epoch=number)
        masks.append(state.mask["kernel"][0].tolist())
    return params, state, masks


def batch(t, params, state, active, stage=Stage.TRAIN):
    return t.step(params, state, stage=jnp.int32(stage), stats={"active": {"kernel": jnp.float32([active])}})[1]


KERNEL = jnp.ones((2, 3))


CASES = {
    "two axes": ("dense", (8, 4)),
    "three": ("dense", (8, 3, 4)),
    "four": ("dense", (8, 2, 3, 4)),
    "convolution": ("convolution", (8, 2, 3, 4)),
}


@pytest.mark.parametrize(("kind", "shape"), CASES.values(), ids=CASES)
def test_channels_that_are_never_positive_go(kind, shape, tell):
    """Two batches, as PQuantML's own test has it; dense inputs of more than two axes are an error there."""
    x = jnp.abs(jnp.round(jax.random.normal(jax.random.key(0), (2, *shape)) * 16) / 16)
    w = jnp.float32([1, -1, 2, -2, 0.5]) * jnp.ones((4, 5))  # positive inputs: the sign of a channel's weights decides
    params = {"kernel": w if kind == "dense" else jnp.broadcast_to(w, (2, 2, 4, 5))}

    def forward(p, x):
        if kind == "dense":
            return jax.nn.relu(x @ p["kernel"])
        return jax.nn.relu(
            jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )

    inst = pq.instrument(pq.from_function(forward, params), x[0])
    t = ap(threshold=0.0, roles=inst.roles)
    attached = t.attach(params)
    state = t.init(attached)
    for some in x:
        view, _ = t.apply(attached, state)
        stats = inst.capture(view, {}, some)[2]
        _, state = t.step(attached, state, stage=jnp.int32(Stage.TRAIN), stats=stats)
    _, state = tell(t, attached, state, Event.POST_EPOCH)
    np.testing.assert_array_equal(state.mask["kernel"], np.broadcast_to([1, 0, 1, 0, 1], params["kernel"].shape))


def test_the_threshold_is_on_the_mean_over_the_batches_of_the_period(tell):
    t = ap(threshold=0.3, period=2)
    _, state, masks = epochs(tell, t, KERNEL, [0.5, 0.2, 0.0], [0.5, 0.5, 0.5])
    assert masks == [[1, 1, 1], [1, 1, 0]]
    assert float(state.batches) == 0 and int(state.since) == 0, "the next mask is made of what follows"
    assert epochs(tell, ap(threshold=0.5), KERNEL, [0.5, 0.75, 1])[2] == [[0, 1, 1]], "at the threshold is not above it"


def test_output_channels_are_where_the_roles_say(tell):
    t = ap(threshold=0.3, roles={"kernel": AxisRole((1,), (0,), "x")})
    params = t.attach({"kernel": jnp.ones((3, 2))})
    stats = {"active": {"kernel": jnp.float32([[0.5], [0.1], [0.4]])}}
    _, state = t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats=stats)
    _, state = tell(t, params, state, Event.POST_EPOCH)
    np.testing.assert_array_equal(state.mask["kernel"], [[1, 1], [0, 0], [1, 1]])


@pytest.mark.parametrize("groups", [Heads(2), "head"])
def test_a_head_has_the_mean_activity_of_its_channels(tell, groups):
    """One of its channels alone is seldom above 0."""
    shape = (3, 2, 2) if groups == "head" else (3, 4)
    t = ap(threshold=0.3, groups=groups, roles={"kernel": AxisRole((0,), tuple(range(1, len(shape))), "x")})
    params = t.attach({"kernel": jnp.ones(shape)})
    stats = {"active": {"kernel": jnp.float32([0.9, 0.1, 0.2, 0.3]).reshape(1, *shape[1:])}}
    _, state = t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats=stats)
    np.testing.assert_allclose(np.ravel(state.mean["kernel"]), [0.5, 0.25], rtol=1e-6)
    _, state = tell(t, params, state, Event.POST_EPOCH)
    np.testing.assert_array_equal(state.mask["kernel"].reshape(3, 4), np.broadcast_to([1, 1, 0, 0], (3, 4)))
    with pytest.raises(TransformError, match="groups is 'in', but an activity is of output channels"):
        ap(threshold=0.3, groups="in")


def test_pquantml_waits_again_after_every_mask(tell):
    """t_start counts epochs, and from the last period; ours counts them once."""
    quiet, loud = [0.1, 0.9, 0.9], [0.1, 0.1, 0.9]
    for compat, fourth in (("pquantml", [0, 1, 1]), (None, [0, 0, 1])):
        masks = epochs(tell, ap(threshold=0.3, begin=2, compat=compat), KERNEL, quiet, quiet, quiet, loud, loud)[2]
        assert masks == [[1, 1, 1], [1, 1, 1], [0, 1, 1], fourth, [0, 0, 1]]


def test_pquantml_prunes_nothing_in_a_training_that_ends_before_the_period(tell):
    for compat, expected in (("pquantml", [1, 1, 1]), (None, [0, 1, 1])):
        t = ap(threshold=0.3, period=9, compat=compat)
        params, state, _ = epochs(tell, t, KERNEL, [0.1, 0.9, 0.9])
        _, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
        assert state.mask["kernel"][0].tolist() == expected


def test_pquantml_lets_a_pruned_channel_return_for_its_bias(tell):
    """A channel whose weights are 0 is always or never positive, whatever it would do with them."""
    for compat, second in (("pquantml", [1, 1, 1]), (None, [0, 1, 1])):
        masks = epochs(tell, ap(threshold=0.3, compat=compat), KERNEL, [0.1, 0.5, 0.6], [1.0, 0.5, 0.6])[2]
        assert masks == [[0, 1, 1], second]


def test_pquantml_can_prune_all_channels_of_a_kernel(tell):
    for compat, expected in (("pquantml", [0, 0, 0]), (None, [0, 1, 0])):
        assert epochs(tell, ap(threshold=0.7, compat=compat), KERNEL, [0.1, 0.5, 0.4])[2] == [expected]


def test_a_target_swaps_channels_only_for_those_that_live(tell):
    """The pruned one keeps its 0.2: it comes back when another fires still more seldom, not for its bias."""
    masks = epochs(tell, ap(target=1 / 3), KERNEL, [0.2, 0.5, 0.6], [1.0, 0.3, 0.6], [1.0, 0.3, 0.1])[2]
    assert masks == [[0, 1, 1], [0, 1, 1], [1, 1, 0]]


def test_only_the_training_stage_collects_and_fine_tuning_keeps_the_mask(tell):
    t = ap(threshold=0.3)
    params, state, _ = epochs(tell, t, KERNEL)
    state = batch(t, params, state, [0, 0, 0], Stage.PRETRAIN)
    _, state = tell(t, params, state, Event.POST_EPOCH, Stage.PRETRAIN)
    assert float(state.batches) == 0 and int(state.done) == 0
    params, state, _ = epochs(tell, t, KERNEL, [0.1, 0.9, 0.9], state=state)
    _, state = tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
        state = batch(t, params, state, [0, 0, 0], Stage.FINETUNE)
        _, state = tell(t, params, state, event, Stage.FINETUNE)
    view, _ = t.apply(params, state)
    np.testing.assert_array_equal(view.model["kernel"], [[0, 1, 1]] * 2)


@given(st.integers(1, 9), st.floats(0, 1, width=32), st.integers(0, 99))
def test_an_exact_fraction_of_the_channels_goes(tell, batches, target, seed):
    rng = np.random.default_rng(seed)
    active = rng.integers(0, 5, (batches, 7)).astype(np.float32) / 4  # many ties
    mask = np.asarray(finished(tell, ap(target=0.0), active, target=target))[0]
    assert abs(int((mask == 0).sum()) - target * 7) <= 0.5 + 1e-5
    mean = active.mean(0)
    assert mean[mask == 1].min(initial=1) >= mean[mask == 0].max(initial=0) - 1e-6


@given(st.integers(1, 9), st.floats(0, 1, width=32), st.integers(0, 99))
def test_the_mask_is_the_threshold_on_the_mean(tell, batches, threshold, seed):
    active = np.random.default_rng(seed).uniform(size=(batches, 7)).astype(np.float32)
    mask = np.asarray(finished(tell, ap(threshold=0.0), active, threshold=threshold))[0]
    far = np.abs(active.mean(0) - threshold) > 1e-6
    if mask.sum() == 1 and not np.any(active.mean(0) > threshold):
        assert np.isclose(active.mean(0)[mask == 1][0], active.mean(0).max(), atol=1e-6)  # one has to stay
        return
    np.testing.assert_array_equal(mask[far], (active.mean(0) > threshold)[far])


def finished(tell, t, active, **hypers):
    params = t.attach({"kernel": jnp.ones((2, 7))})
    state = with_hyper(t.init(params), **hypers)
    for one in active:
        state = batch(t, params, state, one)
    return tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)[1].mask["kernel"]


def test_errors():
    for both in (None, 0.5):
        with pytest.raises(TransformError, match="expected one of them"):
            ap(threshold=both, target=both)
    with pytest.raises(TransformError, match="'pquantml' or None"):
        ap(threshold=0.1, compat="torch")
    t = ap(threshold=0.1)
    params = t.attach({"kernel": KERNEL})
    with pytest.raises(TransformError, match=r"'active' of kernel.*masked\(ap"):
        t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats={"active": {}})
    with pytest.raises(TransformError, match=r"shape \(2, 1\), expected \(1, 3\).*roles=inst.roles"):
        turned = {"active": {"kernel": jnp.ones((2, 1))}}
        t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats=turned)
