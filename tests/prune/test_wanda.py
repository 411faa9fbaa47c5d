"""Wanda: PQuantML's values and where ours differ, the collection, and the pass without training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

import pquant_jax as pq
from pquant_jax._base import AxisRole, Event, Stage
from pquant_jax._errors import TransformError
from pquant_jax.prune import NM, frozen, wanda, wanda_from_data

X = jnp.float32([[1, 2, 3, 0.5], [0, 1, 1, 0.5]])  # the inputs for which PQuantML's masks were printed, sparsity .5
ROLES = {"kernel": AxisRole((1,), (0,), "kernel/input")}
GOLDEN = {
    "the whole layer": ({}, [[1, 1, 0, 1], [0, 0, 1, 0]]),
    "N:M": ({"groups": NM(1, 4)}, [[1, 1, 0, 1], [1, 1, 1, 0]]),
}


def squares(x):
    return {"square": {"kernel": jnp.mean(x**2, 0)[None]}}


def pruned(tell, t, w, *batches):
    """The mask after these batches, one step each, as fine-tuning begins."""

    @jax.jit
    def run(w, batches):
        params = t.attach({"kernel": w})
        state = t.init(params)
        for x in batches:
            _, state = t.step(params, state, stage=jnp.int32(Stage.TRAIN), stats=squares(x))
        return tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)[1].mask["kernel"]

    return np.asarray(run(w, batches))


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, w, tell):
    options, expected = GOLDEN[case]
    t = wanda(sparsity=0.5, roles=ROLES, compat="pquantml", **options)
    np.testing.assert_array_equal(pruned(tell, t, w, X), expected)


def test_pquantml_compares_the_whole_layer_and_the_paper_each_output(w, tell):
    by_output = pruned(tell, wanda(sparsity=0.5, roles=ROLES), w, X)
    np.testing.assert_array_equal(by_output, [[1, 0, 0, 1], [1, 0, 1, 0]])
    np.testing.assert_array_equal(
        pruned(tell, wanda(sparsity=0.5, groups="weight", roles=ROLES), w, X), GOLDEN["the whole layer"][1]
    )


def test_pquantml_prunes_n_of_m_where_we_keep_n(w, tell):
    for compat, kept in (("pquantml", 3), (None, 1)):
        mask = pruned(tell, wanda(sparsity=0.5, groups=NM(1, 4), roles=ROLES, compat=compat), w, X)
        np.testing.assert_array_equal(mask.sum(1), [kept, kept])


def test_pquantml_drops_zero_weights_on_top_of_the_target(w, tell):
    """A weight that rounds to zero as the mask is made is lost for ever there."""
    sparse = w.at[0].set(jnp.float32([0, 0, 0, 1])).at[1].set(jnp.float32([1, 2, 3, 4]))
    for compat, kept in (("pquantml", 5), (None, 6)):
        assert pruned(tell, wanda(sparsity=0.25, groups="weight", roles=ROLES, compat=compat), sparse, X).sum() == kept


def test_the_mean_is_over_batches_and_the_axes_are_the_roles(tell, key):
    w, x = jax.random.normal(key, (6, 5)), jax.random.normal(jax.random.key(1), (3, 8, 6)) * jnp.arange(1, 7)
    transposed = pruned(tell, wanda(sparsity=0.5, roles=ROLES), w.T, *x)
    score = np.abs(w) * np.sqrt(np.mean(x.reshape(-1, 6) ** 2, 0))[:, None]
    np.testing.assert_array_equal(transposed.T, score > np.sort(score, 0)[2])


def test_without_a_batch_magnitudes_decide(w, tell):
    np.testing.assert_array_equal(pruned(tell, wanda(sparsity=0.5, roles=ROLES), w), [[1, 0, 0, 1], [1, 0, 1, 0]])


def test_it_collects_between_begin_and_end_then_prunes_once(w, tell):
    """The batch of epoch e is large at the input e; only those of epochs 1 and 2 count."""
    t = wanda(sparsity=0.5, begin=1, end=3, roles=ROLES)
    ones = t.attach({"kernel": jnp.ones_like(w)})

    @jax.jit
    def epoch(state, number, stage, largest):
        _, state = t.boundary(ones, state, event=jnp.int32(Event.PRE_EPOCH), epoch=number, epochs=jnp.int32(9), stage=stage)
        mask = state.mask["kernel"]
        return t.step(ones, state, stage=stage, stats=squares(1 + 9 * jax.nn.one_hot(largest, 4)[None]))[1], mask

    state = t.init(ones)
    state, mask = epoch(state, jnp.int32(2), jnp.int32(Stage.PRETRAIN), 3)
    assert float(state.seen["batches"]) == 0 and mask.min() == 1
    for number, largest in enumerate((3, 1, 2, 0, 0)):
        state, mask = epoch(state, jnp.int32(number), jnp.int32(Stage.TRAIN), largest)
        np.testing.assert_array_equal(mask, np.ones((2, 4)) if number < 3 else [[0, 1, 1, 0]] * 2)
        assert float(state.seen["batches"]) == min(number, 2)
    state, _ = epoch(state, jnp.int32(0), jnp.int32(Stage.TRAIN), 0)  # another round
    grown = t.attach({"kernel": jnp.float32([[9, 1, 1, 1]] * 2)})
    _, state = tell(t, grown, state, Event.PRE_FINETUNE, Stage.FINETUNE)
    np.testing.assert_array_equal(state.mask["kernel"], [[0, 1, 1, 0]] * 2)


@functools.cache
def masks_of(tell, groups):
    t = wanda(sparsity=0.0, groups=groups)

    def run(w, square, sparsity):
        params = t.attach({"kernel": w})
        state = pq.with_hyper(t.init(params), sparsity=sparsity)
        _, state = t.step(params, state, stage=jnp.int32(Stage.TRAIN), stats={"square": {"kernel": square}})
        return tell(t, params, state, Event.PRE_FINETUNE, Stage.FINETUNE)[1].mask["kernel"]

    return jax.jit(run)


@given(st.sampled_from(["row", NM(2, 4)]), st.floats(0.0625, 1, width=32), st.integers(0, 99))
def test_every_output_keeps_the_same_number_of_its_most_important_weights(tell, groups, sparsity, seed):
    rng = np.random.default_rng(seed)
    w, square = rng.normal(size=(8, 5)).astype(np.float32), rng.uniform(0.1, 4, (8, 1)).astype(np.float32)
    mask, score = np.asarray(masks_of(tell, groups)(w, square, sparsity)), np.abs(w) * np.sqrt(square)
    size = 8 if groups == "row" else 4
    kept = round((1 - sparsity) * 8) if groups == "row" else 2
    for m, s in zip(mask.T.reshape(-1, size), score.T.reshape(-1, size), strict=True):
        assert m.sum() == kept
        assert s[m == 1].min(initial=np.inf) >= s[m == 0].max(initial=0)


def network(p, x):
    """A convolution on images, a product on what is left of three axes, and a table that nothing multiplies."""
    y = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.nn.relu(y).reshape(len(y), 9, -1)
    return y @ p["dense"]["kernel"] + jnp.sum(p["table"])


@pytest.fixture(scope="module")
def images():
    """Instrumented network, and images on its port's grid, of which the last channel is loud."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    kernels = {"conv": {"kernel": (2, 2, 3, 6)}, "dense": {"kernel": (6, 4)}, "table": (2, 2)}
    params = jax.tree.map(lambda s: jax.random.normal(next(keys), s), kernels, is_leaf=lambda s: isinstance(s, tuple))
    x = jnp.round(jax.random.normal(next(keys), (7, 4, 4, 3)) * jnp.float32([1, 1, 8]) * 16) / 16
    return pq.instrument(pq.from_function(network, params), x), np.asarray(x)


def test_from_data_equals_numpy_and_every_batch_size(images):
    """Dense inputs of more than two axes break PQuantML."""
    inst, x = images
    params = inst.model.params
    masks = wanda_from_data(inst, params, x, sparsity=0.5)
    assert set(masks) == {"conv/kernel", "dense/kernel"}, "a table has no input"
    w = np.abs(params["conv"]["kernel"]) * np.sqrt((x**2).mean((0, 1, 2)))[:, None]
    rows = w.reshape(12, 6)
    np.testing.assert_array_equal(masks["conv/kernel"].reshape(12, 6), rows > np.sort(rows, 0)[5])
    np.testing.assert_array_equal(masks["dense/kernel"].sum(0), [3] * 4)
    attached = pq.identity().attach(params)
    for again in (wanda_from_data(inst, attached, x, sparsity=0.5, batch_size=n) for n in (3, 100)):
        jax.tree.map(np.testing.assert_array_equal, again, masks)


def test_from_data_with_a_budget_rules_and_n_m(images):
    inst, x = images
    dense = functools.partial(wanda_from_data, inst, inst.model.params, x)
    masks = dense(sparsity={"conv/.*": 0.25, ".*": 0.75}, groups="weight")
    assert [int(m.sum()) for m in masks.values()] == [54, 6]
    total = sum(int(m.sum()) for m in dense(sparsity=0.5, groups="weight", budget="global").values())
    assert abs(total - 48) <= 1
    assert int(dense(sparsity=0.5, groups=NM(1, 4))["conv/kernel"].sum()) == 18
    assert int(dense(sparsity=0.5, groups=NM(1, 4), compat="pquantml")["conv/kernel"].sum()) == 54


def test_the_masks_of_a_pass_are_frozen_into_a_training(images):
    inst, x = images
    masks = wanda_from_data(inst, inst.model.params, x, sparsity=0.5)
    t = frozen(masks)
    params = t.attach(inst.model.params)
    view, _ = t.apply(params, t.init(params))
    np.testing.assert_array_equal(view.model["dense"]["kernel"], params.model["dense"]["kernel"] * masks["dense/kernel"])
    y, _ = inst.forward(view, {}, x)
    assert np.isfinite(y).all()


def test_errors(images, w, tell):
    inst, x = images
    with pytest.raises(TransformError, match=r"begin=2 to end=1.*begin < end"):
        wanda(sparsity=0.5, begin=2, end=1)
    with pytest.raises(TransformError, match="'pquantml' or None"):
        wanda(sparsity=0.5, compat="torch")
    t = wanda(sparsity=0.5)
    params = t.attach({"table": w})
    with pytest.raises(TransformError, match=r"'square' of table.*masked\(wanda"):
        t.step(params, t.init(params), stage=jnp.int32(Stage.TRAIN), stats={"square": {}})
    with pytest.raises(TransformError, match=r"'fisher'.*no gradient"):
        wanda_from_data(inst, inst.model.params, x, sparsity=0.5, budget="fisher")
    with pytest.raises(TransformError, match=r"\[0\] samples"):
        wanda_from_data(inst, inst.model.params, x[:0], sparsity=0.5)
    with pytest.raises(TransformError, match="matches no kernel"):
        wanda_from_data(inst, inst.model.params, x, sparsity={"table": 0.5})
