"""Every metric: hard counts as numpy does, soft has a gradient and goes to hard."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pquant_jax import prune
from pquant_jax._base import KIF, AxisRole, Params, View
from pquant_jax._errors import TransformError
from pquant_jax.constrain import metrics
from pquant_jax.constrain.metrics import bram_group, bram_sparsity, dsp_sparsity, group_sparsity, nm_violation, sparsity

EPSILON = 0.1
MAKERS = {
    "sparsity": lambda **more: sparsity(**more),
    "out": lambda **more: group_sparsity("out", **more),
    "block": lambda **more: group_sparsity(prune.Block(2, 2), **more),
    "cross": lambda **more: group_sparsity(prune.Cross(), **more),
    "dsp": lambda **more: dsp_sparsity(reuse=3, **more),
    "bram": lambda **more: bram_sparsity(reuse=3, precision=18, **more),
    "nm": lambda **more: nm_violation(2, 4, **more),
}


@pytest.fixture
def kernels():
    """Half of the weights are gone, in whole groups too; none lies on the edge."""
    rng = np.random.default_rng(0)
    a, b = (rng.choice([-1, 1], s) * rng.uniform(0.3, 1, s) * (rng.random(s) < 0.5) for s in ((5, 6), (3, 3, 2, 4)))
    a[:, 2:4] = 0
    b[..., 1] = 0
    return {"a/kernel": a.astype(np.float32), "b/kernel": b.astype(np.float32)}


def of(metric, kernels, which="hard"):
    model = {p: jnp.asarray(w) for p, w in kernels.items()}
    return np.asarray(getattr(metric, which)(Params(model, {}), View(model, {}, {})))


def rows_of(w):
    return w.reshape(-1, w.shape[-1]).T  # (out, in)


def in_groups(w, size):
    """Norms of groups of `size` of the kernel written out as (out, in), filled up with zeros."""
    flat = rows_of(w).ravel()
    return np.linalg.norm(np.pad(flat, (0, -flat.size % size)).reshape(-1, size), axis=1)


def empty(norms):
    return int((norms <= EPSILON).sum()), norms.size


def excess(w, n, m):
    found = most = 0
    for row in rows_of(w):
        for start in range(0, row.size, m):
            block = row[start : start + m]
            found += max(0, int((np.abs(block) > EPSILON).sum()) - n)
            most += max(0, block.size - n)
    return found, most


COUNTS = {
    "sparsity": lambda w: empty(np.abs(w)),
    "out": lambda w: empty(np.linalg.norm(rows_of(w), axis=1)),
    "dsp": lambda w: empty(in_groups(w, 3)),
    "bram": lambda w: empty(in_groups(w, 6)),
    "nm": lambda w: excess(w, 2, 4),
}


@pytest.mark.parametrize("name", COUNTS)
def test_hard_counts(name, kernels):
    counts = np.asarray([COUNTS[name](w) for w in kernels.values()])
    assert np.all(counts[:, 0] > 0)
    for mode in ("coarse", "smooth"):
        metric = MAKERS[name](epsilon=EPSILON, mode=mode)
        np.testing.assert_allclose(of(metric, kernels), counts[:, 0].sum() / counts[:, 1].sum(), rtol=1e-6)
        layers = MAKERS[name](epsilon=EPSILON, mode=mode, per="layer")
        np.testing.assert_allclose(of(layers, kernels), counts[:, 0] / counts[:, 1], rtol=1e-6)
        assert layers.shape(kernels) == (2,) and metric.shape(kernels) == ()


@pytest.mark.parametrize("name", MAKERS)
def test_soft_has_hards_value_or_goes_to_it(name, kernels):
    """Coarse is hard exactly; smooth is as near as exp(-alpha w^2) of the weights that stay."""
    hard = of(MAKERS[name](epsilon=EPSILON), kernels)
    assert of(MAKERS[name](epsilon=EPSILON, mode="coarse"), kernels, "soft") == hard
    far = [abs(of(MAKERS[name](epsilon=EPSILON, mode="smooth", alpha=a), kernels, "soft") - hard) for a in (1.0, 30.0, 1000.0)]
    assert far[0] > far[1] > far[2] and far[2] < 1e-6


@pytest.mark.parametrize("mode", ["coarse", "smooth"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_step_along_the_gradient_moves_smooth_and_in_the_end_hard(name, mode, kernels):
    """The reference's structured and coarse metrics have no gradient; every one of ours reaches its bound by it."""
    metric = MAKERS[name](epsilon=EPSILON, mode=mode, alpha=1.0)
    sign = -1 if name == "nm" else 1

    @jax.jit
    def up(model, _=None):
        slope = jax.grad(lambda m: metric.soft(Params(m, {}), View(m, {}, {})))(model)
        return jax.tree.map(lambda w, g: w + sign * 0.5 * g, model, slope), slope

    model = {p: jnp.asarray(w) for p, w in kernels.items()}
    _, slope = up(model)
    for p, w in kernels.items():
        assert np.all(np.isfinite(slope[p])) and np.any(slope[p] != 0)
        assert np.all(np.asarray(slope[p])[w == 0] == 0)
    after = jax.lax.fori_loop(0, 1500, lambda _, m: up(m)[0], model)
    assert of(metric, after) == (0 if name == "nm" else 1)


def test_the_references_structured_metric_is_ours_with_a_gradient(kernels):
    """Its groups are ours where rf divides the inputs of an output: fraction of groups with a norm <= epsilon."""
    w = np.asarray(kernels["b/kernel"])
    reference = np.mean(np.linalg.norm(rows_of(w).reshape(4, 6, 3), axis=-1) <= EPSILON)
    assert of(dsp_sparsity(reuse=3, epsilon=EPSILON), {"b/kernel": w}, "soft") == np.float32(reference)
    gradient = jax.grad(lambda w: dsp_sparsity(reuse=3).soft(Params({"k": w}, {}), View({}, {}, {})))(jnp.asarray(w))
    assert np.any(gradient != 0)


def test_bram_words():
    assert [bram_group(precision=p) for p in (36, 18, 12, 16, 8, 5, 72)] == [1, 2, 3, 4, 9, 14, 1]
    with pytest.raises(TransformError, match="73 bits, expected 1 to 72"):
        bram_group(precision=73)


def test_a_memory_is_free_only_where_all_its_multipliers_are():
    w = np.zeros((4, 4), np.float32)
    w[0, 0] = 1  # one weight: one multiplier of 4 works, and holds the memory of two
    assert of(dsp_sparsity(reuse=4), {"k": w}) == 0.75
    assert of(bram_sparsity(reuse=4, precision=18), {"k": w}) == 0.5


def test_groups_follow_the_roles(kernels):
    w = kernels["a/kernel"]
    turned = {"a/kernel": AxisRole((1,), (0,), "x")}
    for make in (
        lambda r: group_sparsity("out", roles=r),
        lambda r: nm_violation(2, 4, roles=r),
        lambda r: dsp_sparsity(reuse=4, roles=r),
    ):
        assert of(make(turned), {"a/kernel": w.T}) == of(make(None), {"a/kernel": w}) > 0


def test_where_and_of(kernels):
    w = {p: jnp.asarray(v) for p, v in kernels.items()}
    zeros = {p: jnp.zeros_like(v) for p, v in w.items()}
    for chosen in ("a/.*", "b/kernel"):
        one = {p: v for p, v in kernels.items() if p.startswith(chosen[0])}
        assert of(sparsity(where=chosen), kernels) == of(sparsity(), one)
    for place, want in (("params", of(sparsity(), kernels)), ("view", 1.0)):
        assert sparsity(of=place).hard(Params(w, {}), View(zeros, {}, {})) == want


def test_ebops_are_those_of_the_view():
    def cost(view):
        return jnp.sum(view.sites["x"].f) * 100

    metric = metrics.ebops(cost, unit=200.0)
    view = View({}, {"x": KIF(1.0, 2.0, jnp.float32([3, 5]))}, {})
    assert float(metric.hard(Params({}, {}), view)) == float(metric.soft(Params({}, {}), view)) == 4.0
    assert metric.shape({}) == ()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: sparsity(mode="corse"), "did you mean 'coarse'"),
        (lambda: sparsity(per="layers"), "did you mean 'layer'"),
        (lambda: sparsity(of="views"), "did you mean 'view'"),
        (lambda: group_sparsity(prune.NM(1, 2)), "nm_violation"),
        (lambda: nm_violation(4, 4), "0 < n < m"),
        (lambda: metrics.reference_sparsity(target_sparsity=0.5, reduce="max"), "reduce is 'max'"),
        (lambda: of(sparsity(where="c/.*"), {"a/kernel": np.ones((2, 2))}), "matches no parameter"),
        (lambda: of(sparsity(where="a/bias"), {"a/bias": np.ones(2)}), "matches no kernel"),
    ],
    ids=range(8),
)
def test_errors(make, text):
    with pytest.raises(TransformError, match=text):
        make()
