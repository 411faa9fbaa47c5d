"""The integer program against all choices, and costs against `inst.ebops`."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax.search._problem import counter, problem
from pquant_jax.search._program import Cost, products, solve, value

from .conftest import split


def random_problem(seed: int) -> tuple[dict[str, dict[int, float]], Cost]:
    """Three kernels and two activations, one of which two kernels read; perturbations fall with the width."""
    rng = np.random.default_rng(seed)
    widths = {"k1": (2, 4, 8), "k2": (2, 3, 8), "k3": (4,), "x1": (4, 8), "x2": (3, 5, 6)}
    omega = {n: {w: float(rng.uniform(1, 9) * 4.0**-w) for w in ws} for n, ws in widths.items()}
    own = {n: {w: float(rng.uniform(0, 3) * w) for w in ws} for n, ws in widths.items()}
    pairs = {("k1", "x1"): 16.0, ("k2", "x1"): 40.0, ("k3", "x2"): 7.0, ("x1", "x2"): 3.0}
    return omega, Cost(5.0, own, pairs)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_is_better(seed):
    omega, cost = random_problem(seed)
    names = sorted(omega)
    everything = [dict(zip(names, ws, strict=True)) for ws in itertools.product(*(omega[n] for n in names))]
    costs = np.array([value(cost, bits) for bits in everything])
    lost = np.array([sum(omega[n][w] for n, w in bits.items()) for bits in everything])
    for limit in np.quantile(costs, [0.05, 0.3, 0.7]):
        found = solve(omega, cost, float(limit), "EBOPs")
        assert value(cost, found) <= limit * (1 + 1e-6)
        assert sum(omega[n][w] for n, w in found.items()) == pytest.approx(lost[costs <= limit].min(), rel=1e-6)


def test_an_infeasible_limit_names_the_cheapest_choice():
    omega, cost = random_problem(0)
    least = min(value(cost, dict(zip(omega, ws, strict=True))) for ws in itertools.product(*omega.values()))
    with pytest.raises(pq.SearchError, match=f"EBOPs of 100 can't be reached: the cheapest choice needs {least:.6g}"):
        solve(omega, cost, 100.0, "EBOPs")
    assert value(cost, solve(omega, cost, least, "EBOPs")) == pytest.approx(least)


def test_the_cost_is_that_of_the_model():
    """A site that three products share, a kernel used twice, a square and a product of two activations."""

    def forward(p, x):
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
        y = jax.nn.relu(jnp.einsum("bij,bkj->bik", q, k) @ v)
        return (y @ p["o"] + jnp.square(y) @ p["o"]).sum(1)

    rng = np.random.default_rng(0)
    params = {n: jnp.float32(rng.normal(size=(3, 3))) for n in "qkvo"}
    x = np.float32(rng.normal(size=(4, 5, 3)))
    inst = pq.instrument(pq.from_function(forward, params), x)
    p = problem(inst, params, split(x, np.zeros(4)), pq.train.cross_entropy, None, 4, 4)
    masks = {"k": jnp.float32(rng.integers(0, 2, (3, 3)))}
    widths = (2, 5, 8)
    cost = products(counter(p), masks, dict.fromkeys(inst.sites, widths))
    assert cost.constant == 0 and len(cost.pairs) > 5
    for _ in range(4):
        bits = {name: int(rng.choice(widths)) for name in inst.sites}
        formats = {name: pq.kif(1, 0, jnp.full((1,) * len(inst.sites[name].shape), w - 1.0)) for name, w in bits.items()}
        assert value(cost, bits) == float(inst.ebops(pq.View(params, formats, masks)))
