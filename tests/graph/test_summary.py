"""Zeros, digits, dead rows and columns: what every figure counts."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import pquant_jax as pq
from pquant_jax import _tree


def kernel(summary: pq.graph.SparsitySummary, path: str = "kernel") -> pq.graph.KernelSummary:
    return summary.kernels[path]


def csd(n: int) -> int:
    """Nonzero digits of n >= 0 in canonical signed-digit form, by the textbook recoding."""
    count = 0
    while n:
        if n % 2:
            digit = 2 - n % 4
            n, count = n - digit, count + 1
        n //= 2
    return count


def test_rows_are_inputs_and_columns_outputs():
    w = np.zeros((4, 3), np.float32)
    w[1, 0], w[2, 0] = 1.0, -2.0
    summary = pq.sparsity_summary({"kernel": w, "bias": np.zeros(3, np.float32)})
    assert list(summary.kernels) == ["kernel"] and kernel(summary) == summary.total
    found = kernel(summary)
    assert (found.zeros, found.total, found.bits) == (10, 12, None)
    assert (found.dead_rows, found.rows, found.dead_columns, found.columns) == (2, 4, 2, 3)
    assert found.sparsity == pytest.approx(10 / 12) and found.density == pytest.approx(2 / 12)


def test_roles_say_which_axis_is_the_output():
    w = np.zeros((5, 2, 3, 3), np.float32)  # (out, in, h, w)
    w[0, 1, 2, 2] = 1.0
    role = pq.AxisRole((1, 2, 3), (0,), "input", (2, 3))
    found = kernel(pq.sparsity_summary({"kernel": w}, roles={"kernel": role}))
    assert (found.dead_rows, found.rows, found.dead_columns, found.columns) == (1, 2, 4, 5)
    found = kernel(pq.sparsity_summary({"kernel": w.transpose(2, 3, 1, 0)}))  # as linen has it
    assert (found.dead_rows, found.rows, found.dead_columns, found.columns) == (1, 2, 4, 5)


def test_digits_are_those_of_the_codes():
    """Of every code of a format, and of a format per weight."""
    codes = np.arange(-128, 128).reshape(16, 16)
    f = np.tile([0, 1, 4, 7], (16, 4))
    w = np.ldexp(codes.astype(np.float32), -f)
    fmt = pq.kif(1, 7 - f, f)
    found = kernel(pq.sparsity_summary(pq.View({"kernel": w}, {"kernel": fmt}, {})))
    assert found.bits == sum(csd(abs(int(c))) for c in codes.ravel())
    assert kernel(pq.sparsity_summary(pq.View({"kernel": w / 3}, {"kernel": fmt}, {}))).bits is None  # off the grid


def test_it_takes_what_apply_returns():
    params = {f"l{n}": {"w": np.random.default_rng(n).normal(0, 1, (8, 8)).astype(np.float32)} for n in range(2)}
    model = pq.from_function(lambda p, x: jnp.maximum(x @ p["l0"]["w"], 0) @ p["l1"]["w"], params)
    inst = pq.instrument(model, jnp.ones((1, 8)))
    masks = {"l0/w": np.ones((8, 8), np.float32), "l1/w": np.ones((8, 8), np.float32)}
    masks["l0/w"][:, 2:5] = 0
    compression = pq.chain(pq.prune.frozen(masks), pq.quantize.fixed(inst.sites))
    latent = compression.attach(model.params)
    view, state = compression.apply(latent, compression.init(latent))
    summary = pq.sparsity_summary(view, state, roles=inst.roles)
    assert summary == pq.sparsity_summary(*compression.apply(latent, state), roles=inst.roles)
    leaves = _tree.flatten(view.model)
    assert summary.total.zeros == sum(int(np.sum(np.asarray(v) == 0)) for v in leaves.values())
    assert summary.kernels["l0/w"].dead_columns == 3 and summary.total.dead_columns == 3
    assert summary.total.bits == sum(k.bits for k in summary.kernels.values()) > 0
    assert summary.total.sparsity == pytest.approx(float(pq.train.kernel_sparsity(view)))
    with pytest.raises(pq.TransformError, match="latent Params"):
        pq.sparsity_summary(latent, state)


def test_text_has_a_line_per_kernel_and_one_for_all():
    summary = pq.sparsity_summary({"a": np.eye(2, dtype=np.float32), "b": np.zeros((1200, 2), np.float32)})
    lines = pq.summary_text(summary).split("\n")
    assert [line.split()[0] for line in lines] == ["kernel", "a", "b", "total"]
    assert lines[2].split()[1:] == ["2,400", "2,400", "100.0", "%", "0.0", "%", "-", "1200", "/", "1200", "2", "/", "2"]
    assert pq.sparsity_summary({}).total == (0, 0, 0, 0, 0, 0, 0)
