"""Patterns of kernels: counted, ordered, measured and projected as a plain loop does."""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax._base import AxisRole, Event, Params, Stage, View
from pquant_jax._errors import TransformError
from pquant_jax.constrain import dominant, mdmm, patterns
from pquant_jax.constrain._paca import DISTANCES, slices

EPSILON = 0.1
SEED = 1  # of a layer whose second pattern does not hold the first: a larger one has cosine distance 0 to all in it


def supports(n, b, seed, kinds=6):
    """n rows of a few patterns, unevenly often."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 2, (kinds, b))
    return table[np.minimum(rng.geometric(0.4, n) - 1, kinds - 1)].astype(np.float32)


def kernel(shape=(3, 3, 4, 8), seed=SEED):
    rng = np.random.default_rng(seed)
    rows = supports(math.prod(shape[2:]), math.prod(shape[:2]), seed).reshape(*shape[2:], *shape[:2]).transpose(2, 3, 0, 1)
    return (rows * rng.uniform(0.3, 1, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def by_hand(support, num_patterns, beta, order):
    """[(pattern, count)] by frequency, up to the first with which beta is covered."""
    counts = collections.Counter(tuple(int(v) for v in row) for row in support)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], order(item[0])))
    kept, covered = [], 0
    for pattern, count in ranked[:num_patterns]:
        if covered >= math.ceil(beta * len(support) - 1e-9):
            break
        kept.append((pattern, count))
        covered += count
    return kept


def as_number(pattern):
    return sum(v << n for n, v in enumerate(pattern))


@pytest.mark.parametrize("b", [1, 2, 9, 10, 12, 31, 49])
def test_the_dominant_patterns_are_the_most_frequent(b):
    """With 10 weights and fewer all patterns are counted, with more those that occur: both without a sort."""
    for beta in (0.05, 0.5, 0.75, 1.0):
        rank = jax.jit(lambda rows, beta=beta: dominant(rows, 4, beta))
        for seed in range(8):
            rows = supports(40, b, seed)
            seen = [tuple(int(v) for v in row) for row in rows]
            found = jax.device_get(rank(rows))
            got = [(tuple(int(v) for v in p), int(k)) for p, ok, k in zip(*found, strict=True) if ok]
            assert got == by_hand(rows, 4, beta, as_number if b <= 10 else seen.index)


def test_beta_is_met_and_not_passed():
    """3 of 5 kernels cover 0.6 of them, though 0.6 * 5 is a little above 3 in float32."""
    rows = jnp.float32([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    for beta, want in ((0.6, [3]), (0.61, [3, 2]), (1.0, [3, 2]), (0.01, [3])):
        found = dominant(rows, 4, beta)
        assert found.kernels[found.valid].tolist() == want


def by_numpy(rows, table, distance):
    s, size = (np.abs(rows) > EPSILON).astype(np.float64), np.abs(rows).astype(np.float64)
    d = np.zeros((len(rows), len(table)))
    for i in range(len(rows)):
        for j, p in enumerate(table):
            if distance == "hamming":
                d[i, j] = np.abs(s[i] - p).sum()
            elif distance == "valued_hamming":
                d[i, j] = (np.abs(s[i] - p) * size[i]).sum()
            else:
                dot, a, b = (size[i] ** 2 * p).sum(), np.linalg.norm(size[i]), np.linalg.norm(size[i] * p)
                d[i, j] = 0 if a == 0 else 1 - (dot / (a * b) if b else 0)
    return d


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_and_projection(distance):
    w = kernel()
    few = patterns(num_patterns=2, beta=0.9, distance=distance, epsilon=EPSILON)
    rows = w.transpose(2, 3, 0, 1).reshape(-1, 9)
    table = np.asarray([p for p, _ in by_hand(np.abs(rows) > EPSILON, 2, 0.9, as_number)])
    d = by_numpy(rows, table, distance)
    assert d.min(1).mean() > 0.05
    params, view = Params({"kernel": jnp.asarray(w)}, {}), View({}, {}, {})
    for which in (few.metric.hard, few.metric.soft):
        np.testing.assert_allclose(which(params, view), d.min(1).mean(), rtol=1e-5, atol=1e-6)
    mask = np.asarray(few.masks({"kernel": jnp.asarray(w)})["kernel"]).transpose(2, 3, 0, 1).reshape(-1, 9)
    assert set(map(tuple, mask)) <= set(map(tuple, table))
    chosen = np.asarray([d[i, (table == row).all(1).argmax()] for i, row in enumerate(mask)])
    np.testing.assert_allclose(chosen, d.min(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_gradient_leads_to_the_patterns(distance):
    """Finite for kernels of zeros too, 0 for a kernel that is on its pattern, and followed, the distance falls."""
    w = kernel()
    w[:, :, 0, 0] = 0
    few = patterns(num_patterns=2, beta=0.9, distance=distance, epsilon=EPSILON)

    def off(w):
        return few.metric.soft(Params({"kernel": w}, {}), View({}, {}, {}))

    slope = np.asarray(jax.grad(off)(jnp.asarray(w)))
    on = (np.asarray(few.masks({"kernel": jnp.asarray(w)})["kernel"]) == (np.abs(w) > EPSILON)).all((0, 1))
    assert 0 < on.sum() < on.size
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)
    assert np.allclose(slope[:, :, on], 0, atol=1e-6)
    noise = 0.03 * np.random.default_rng(0).choice([-1, 1], w.shape)  # a weight of exactly 0 knows no direction
    start = jnp.asarray(np.where(w == 0, noise, w), jnp.float32)
    after = jax.jit(lambda w: jax.lax.fori_loop(0, 400, lambda _, w: w - 2 * jax.grad(off)(w), w))(start)
    assert float(off(after)) < 0.5 * float(off(start))


@pytest.mark.parametrize(
    ("role", "turn"),
    [(None, None), (AxisRole((0, 1, 2), (3,), "x", (0, 1)), None), (AxisRole((1, 2, 3), (0,), "x", (2, 3)), (3, 2, 0, 1))],
    ids=range(3),
)
def test_slices_follow_the_roles(role, turn):
    """Positions of (height, width, in, out) as linen has it, and of (out, in, height, width) as equinox has it."""
    w = kernel()
    there, back = slices("kernel", w.shape if turn is None else w.transpose(turn).shape, role, None)
    given_w = w if turn is None else w.transpose(turn)
    rows = np.asarray(there(jnp.asarray(given_w)))
    np.testing.assert_array_equal(rows, w.transpose(2, 3, 0, 1).reshape(-1, 9))
    np.testing.assert_array_equal(back(jnp.asarray(rows)), given_w)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (2, 3, 5)])
@pytest.mark.parametrize("block", [(2, 3), (4, 4), (1, 1)])
def test_blocks_of_dense_kernels(shape, block):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    there, back = slices("kernel", shape, None, block)
    rows = np.asarray(there(jnp.asarray(w)))
    flat = w.reshape(-1, shape[-1])
    assert rows.shape == (math.ceil(flat.shape[0] / block[0]) * math.ceil(flat.shape[1] / block[1]), math.prod(block))
    np.testing.assert_array_equal(rows[0].reshape(block), np.pad(flat, ((0, 9), (0, 9)))[: block[0], : block[1]])
    np.testing.assert_array_equal(back(jnp.asarray(rows)), w)


def test_the_report_counts_kernels_and_memory():
    w = np.zeros((2, 2, 1, 5), np.float32)
    for n, support in enumerate([(1, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 1, 1, 0)]):
        w[..., 0, n] = np.reshape(support, (2, 2))
    model = {"conv/kernel": jnp.asarray(w), "dense/kernel": jnp.ones((4, 4))}
    assert patterns(beta=0.8).report(model) == {
        "conv/kernel": {
            "patterns": [(1, 0, 0, 1), (0, 1, 1, 0)],
            "kernels": [3, 2],
            "counts": [3, 1, 1],
            "covered": 0.8,
            "table_bits": 8,
            "index_bits": 5,
            "mask_bits": 20,
        }
    }
    assert patterns(num_patterns=1).report(model)["conv/kernel"]["index_bits"] == 0
    assert set(patterns(block=(2, 2)).report(model)) == set(model)


def test_fine_tuning_freezes_the_projection():
    few = patterns(num_patterns=2, beta=0.9, epsilon=EPSILON)
    t = mdmm(few.metric, kind="==", target=0.0, prunes=few.masks)
    w = jnp.asarray(kernel())
    params = t.attach({"conv": {"kernel": w}, "dense": {"kernel": jnp.ones((4, 4))}})
    numbers = {k: jnp.int32(v) for k, v in dict(event=Event.PRE_FINETUNE, stage=Stage.FINETUNE, epoch=0, epochs=1).items()}
    params, state = t.boundary(params, t.init(params), stats={}, **numbers)
    assert set(state.mask) == {"conv/kernel"}
    want = few.masks({"conv/kernel": w})["conv/kernel"]
    moved = params._replace(model=jax.tree.map(lambda v: v[..., ::-1] + 1, params.model))
    view, _ = t.apply(moved, state)
    np.testing.assert_array_equal(view.masks["conv/kernel"], want)
    rows = np.asarray(view.model["conv"]["kernel"] != 0).transpose(2, 3, 0, 1).reshape(-1, 9)
    assert len(np.unique(rows, axis=0)) <= 2
    np.testing.assert_array_equal(view.model["dense"]["kernel"], moved.model["dense"]["kernel"])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: patterns(distance="haming"), "did you mean 'hamming'"),
        (lambda: patterns(num_patterns=0), "expected at least 1"),
        (lambda: patterns(beta=0.0), "above 0"),
        (lambda: patterns(where="dense").report({"dense": jnp.ones((2, 2))}), r"say block=\(inputs, outputs\)"),
        (lambda: patterns(block=(0, 2)).report({"dense": jnp.ones((2, 2))}), "0 x 2 weights is empty"),
        (
            lambda: patterns().metric.hard(Params({"dense": jnp.ones((2, 2))}, {}), View({}, {}, {})),
            "'with_positions' matches no",
        ),
    ],
    ids=range(6),
)
def test_errors(make, text):
    with pytest.raises(TransformError, match=text):
        make()
