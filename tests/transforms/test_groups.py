"""Every kind of group: a partition, exact survivors, and the axes it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from pquant_jax._base import AxisRole
from pquant_jax._errors import TransformError
from pquant_jax.prune import NM, Block, Cross, Heads, Reuse, layout, straddling, survivors

KINDS = ["weight", "in", "out", "filter", "layer", NM(2, 4), NM(1, 8), Block(2, 3), Cross(), Cross(2, 3), Reuse(5), Heads(2)]
SHAPES = [(6, 8), (7, 10), (3, 3, 2, 4), (2, 3, 4)]


def magnitudes(shape, seed=0):
    return np.abs(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def mask_of(cut, w, sparsity):
    return np.asarray(cut.expand(survivors(cut, cut.scores(jnp.asarray(w)), jnp.float32(sparsity))))


@pytest.mark.parametrize("groups", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_target_is_met_within_one_group(groups, shape):
    cut = layout("kernel", shape, groups)
    w = magnitudes(shape)
    for sparsity in (0.0, 0.3, 0.5, 0.9, 1.0):
        mask = mask_of(cut, w, sparsity)
        assert mask.shape == shape
        assert set(np.unique(mask)) <= {0.0, 1.0}
        if cut.keep is None:
            largest = max(cut.sizes.max(), *shape[-2:]) if isinstance(groups, Cross) and groups.h is None else cut.sizes.max()
            assert abs((mask == 0).sum() - sparsity * w.size) <= largest / 2 + 1


@pytest.mark.parametrize("groups", ["row", *(g for g in KINDS if not isinstance(g, Cross))], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_are_a_partition(groups, shape):
    """Each weight is in one group: its number spread over the kernel, counted, is the size of the group."""
    cut = layout("kernel", shape, groups)
    numbers = jnp.arange(cut.sizes.size, dtype=jnp.float32).reshape(cut.sizes.shape)
    found = np.bincount(np.asarray(cut.expand(numbers), int).ravel(), minlength=cut.sizes.size)
    if cut.keep is None:
        np.testing.assert_array_equal(found, cut.sizes.ravel())
    else:  # zeros that fill up a row are in no kernel
        assert found.max() == 1
        assert found.sum() == np.prod(shape)


def test_scores_are_l2_norms():
    w = magnitudes((6, 8))
    np.testing.assert_allclose(layout("k", (6, 8), "out").scores(jnp.asarray(w))[0], np.linalg.norm(w, axis=0), rtol=1e-6)
    np.testing.assert_allclose(layout("k", (6, 8), "in").scores(jnp.asarray(w))[:, 0], np.linalg.norm(w, axis=1), rtol=1e-6)
    blocks = np.linalg.norm(w.T.reshape(4, 2, 3, 2), axis=(1, 3))
    np.testing.assert_allclose(layout("k", (6, 8), Block(2, 2)).scores(jnp.asarray(w)), blocks, rtol=1e-6)
    gradient = jax.grad(lambda w: jnp.sum(layout("k", (6, 8), "out").scores(w)))(jnp.zeros((6, 8)))
    assert np.isfinite(gradient).all()


def test_roles_say_what_the_output_is():
    w = np.ones((3, 4), np.float32)
    w[1] = 0
    role = {"w": AxisRole((1,), (0,), "x")}
    assert layout("w", (3, 4), "out", role).scores(jnp.asarray(w)).ravel().tolist() == [2.0, 0.0, 2.0]
    assert layout("w", (3, 4), "in", role).sizes.ravel().tolist() == [3] * 4
    np.testing.assert_array_equal(layout("w", (3, 4), NM(1, 2), role).scores(jnp.asarray(w)), w.reshape(3, 2, 2))


def test_the_input_channel_of_a_convolution_is_where_its_role_says():
    """equinox has (out, in, height, width): the last axis is a position."""
    role = {"w": AxisRole((1, 2, 3), (0,), "x", positions=(2, 3))}
    assert layout("w", (5, 2, 3, 4), "in", role).sizes.shape == (1, 2, 1, 1)
    assert layout("w", (5, 2, 3, 4), "filter", role).sizes.shape == (5, 2, 1, 1)
    assert layout("w", (3, 4, 2, 5), "in").sizes.shape == (1, 1, 2, 1)


def test_every_pair_of_head_and_place_is_an_input_channel():
    assert layout("o", (4, 2, 8), "in", {"o": AxisRole((0, 1), (2,), "x")}).sizes.shape == (4, 2, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_one_output_channel_and_each_keeps_as_many(shape):
    cut, w = layout("kernel", shape, "row"), magnitudes(shape)
    rows = w.reshape(-1, shape[-1])
    for sparsity in (0.0, 0.3, 0.5, 1.0):
        kept = np.round((1 - sparsity) * len(rows))
        mask = mask_of(cut, w, sparsity).reshape(rows.shape)
        np.testing.assert_array_equal(mask.sum(0), [kept] * shape[-1])
        assert (np.where(mask == 1, rows, np.inf).min(0) >= np.where(mask == 0, rows, 0).max(0)).all()
    stays, goes = straddling(cut, cut.scores(jnp.asarray(w)), jnp.float32(0.5))
    ranked, half = np.sort(rows, 0)[::-1], int(np.round(len(rows) / 2))
    np.testing.assert_array_equal(stays.ravel(), ranked[half - 1])
    np.testing.assert_array_equal(goes.ravel(), ranked[half])


def test_heads():
    kernel = AxisRole((0,), (1, 2), "x")
    assert layout("q", (8, 4, 2), "head", {"q": kernel}).sizes.ravel().tolist() == [16] * 4
    assert layout("o", (4, 2, 8), "head", {"o": AxisRole((0, 1), (2,), "x")}).sizes.ravel().tolist() == [16] * 4
    assert layout("d", (6, 8), Heads(4)).sizes.ravel().tolist() == [12] * 4


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(2, 21), st.integers(0, 99))
def test_nm_holds_in_every_group(n, extra, out, into, seed):
    m = n + extra - 1
    w = magnitudes((into, out), seed)
    mask = mask_of(layout("k", w.shape, NM(n, m)), w, 0.5)
    for start in range(0, into, m):
        group = slice(start, start + m)
        assert (mask[group].sum(0) == min(n, into - start)).all()
        smallest = np.where(mask[group] == 1, w[group], np.inf).min(0)
        assert (smallest >= np.where(mask[group] == 0, w[group], 0).max(0)).all()


def test_ties_are_broken_by_place_and_exact():
    assert mask_of(layout("k", (4, 4), "weight"), np.ones((4, 4), np.float32), 0.75).sum() == 4


def test_the_scores_around_the_threshold():
    cut = layout("k", (8,), "weight")
    w = jnp.float32([8, 7, 6, 5, 4, 3, 2, 1])
    assert [float(v) for v in straddling(cut, w, jnp.float32(0.5))] == [5.0, 4.0]
    cut = layout("k", (4, 1), NM(1, 2))
    stays, goes = straddling(cut, cut.scores(jnp.float32([[4], [3], [1], [2]])), jnp.float32(0.5))
    assert (stays.ravel().tolist(), goes.ravel().tolist()) == ([4.0, 2.0], [3.0, 1.0])


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ("outs", "did you mean 'out'"),
        (NM(3, 2), "0 < n <= m"),
        (Heads(3), "3 equal heads"),
        ("head", "Heads"),
        (Block(0, 1), "empty"),
    ],
    ids=str,
)
def test_groups_that_can_not_be_cut(groups, text):
    with pytest.raises(TransformError, match=text):
        layout("Dense_0/kernel", (4, 8), groups)
