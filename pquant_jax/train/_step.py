"""The training step and the epoch: pure functions of the state, ready for jit, scan and vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pquant_jax import _tree
from pquant_jax._base import Params, Stage, Transform, Tree, View
from pquant_jax.graph import Instrumented
from pquant_jax.quantize import HGQState
from pquant_jax.train._losses import Metric, average
from pquant_jax.transforms import state_of, strong


class TrainState(NamedTuple):
    """Everything that a step reads and writes; what a checkpoint holds.

    key: uint32 data of the random key.  count: steps taken, so that a step's key is a pure function of both.
    """

    params: Params
    opt_state: Any
    model_state: Tree
    key: jax.Array
    count: jax.Array


class Batch(NamedTuple):
    """One batch, or a stack of batches for `epoch`.  weight is None for equal weights."""

    x: Any
    y: Any
    weight: Any = None


def init_state(inst: Instrumented, compression: Transform, tx: Any, *, seed: int, params: Tree | None = None) -> TrainState:
    """The state before the first step.  params: the model's parameters to start from, default the instrumented model's."""

    @jax.jit  # one compilation instead of one per leaf
    def start(params: Tree, model_state: Tree, key: jax.Array) -> TrainState:
        attached = strong(compression.attach(params))
        return TrainState(attached, strong(tx.init(attached)), strong(model_state), key, jnp.zeros((), jnp.int32))

    key = jax.random.key_data(jax.random.key(seed))
    return start(inst.model.params if params is None else params, inst.model.state, key)


def make_step(inst: Instrumented, compression: Transform, tx: Any, loss: Callable) -> Callable:
    """step(state, batch, stage) -> (state, loss): forward with sites, loss plus penalty, gradient, optimizer, compression.

    loss(prediction, target) gives one value per sample, (n,), or a scalar where there are no sample weights.
    """

    def step(state: TrainState, batch: Batch, stage: jax.Array) -> tuple[TrainState, jax.Array]:
        compressed = state_of(state.opt_state)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)

        def objective(params: Params) -> tuple[jax.Array, Any]:
            view, _ = compression.apply(params, compressed)
            y, model_state, stats = inst.capture(view, state.model_state, batch.x, train=True, rng=rng)
            task = average(loss(y, batch.y), batch.weight)
            return task + compression.penalty(params, compressed, view), (model_state, stats, task)

        (_, (model_state, stats, task)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        stats = {**stats, "gradient": _tree.flatten(grads.model)}  # what no method reads is never computed
        updates, opt_state = tx.update(grads, state.opt_state, state.params, stage=stage, stats=stats)
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, model_state, state.key, state.count + 1), task

    return step


def make_epoch(step: Callable) -> Callable:
    """epoch(state, data, order, stage) -> (state, mean loss): one gather of the shuffled data, one scan over its batches.

    data: a `Batch` of all samples.  order: int32 (steps, batch size), from `permutation`.
    """

    def epoch(state: TrainState, data: Batch, order: jax.Array, stage: jax.Array) -> tuple[TrainState, jax.Array]:
        shuffled = jax.tree.map(lambda v: v[order.reshape(-1)].reshape(*order.shape, *v.shape[1:]), data)
        state, losses = jax.lax.scan(lambda s, batch: step(s, batch, stage), state, shuffled)
        return state, jnp.mean(losses)

    return epoch


def compile_epoch(epoch: Callable) -> Callable:
    """`jax.jit`, on CPU with vectors as wide as the machine has.

    LLVM takes half of an AVX-512 register otherwise, which costs a quantized step 5 % and a float step nothing.
    """
    wide = {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else None
    return jax.jit(epoch, compiler_options=wide)


def make_evaluate(inst: Instrumented, compression: Transform, loss: Callable, metric: Metric, *, quantized: bool) -> Callable:
    """evaluate(state, data) -> dict of scalars: val_loss, val_metric, sparsity, beta where bits are trained, and ebops.

    ebops: where every site has a format.
    """

    def evaluate(state: TrainState, data: Batch) -> dict[str, jax.Array]:
        inner = state_of(state.opt_state)
        view, _ = compression.apply(state.params, inner)
        y, _ = inst.forward(view, state.model_state, data.x, train=False)
        figures = {
            "val_loss": average(loss(y, data.y), data.weight),
            "val_metric": average(metric.function(y, data.y), data.weight),
            "sparsity": kernel_sparsity(view),
        }
        prices = [s.beta for s in (inner.values() if isinstance(inner, dict) else [inner]) if isinstance(s, HGQState)]
        figures |= {"beta": prices[0]} if len(prices) == 1 else {}
        return {**figures, "ebops": inst.ebops(view)} if quantized else figures

    return evaluate


def kernel_sparsity(view: View) -> jax.Array:
    """zeros / total over all kernels as the forward sees them: pruned or rounded to zero, a fraction."""
    kernels = [w for path, w in _tree.flatten(view.model).items() if _tree.is_kernel(path, w)]
    zeros = sum((jnp.sum((w == 0).astype(jnp.float32)) for w in kernels), jnp.zeros((), jnp.float32))
    return zeros / jnp.float32(max(1, sum(w.size for w in kernels)))


def permutation(seed: int, epoch: int, samples: int, batch_size: int, *, shuffle: bool = True) -> np.ndarray:
    """int32 (steps, batch_size): which samples each step sees.  A pure function of its arguments, on the host.

    A sort on the device costs as much as the training step (`jax.random.permutation` is one); this takes 3 ms for
    200,000 samples.  Samples that do not fill a last batch are left out, others each epoch.
    """
    steps = samples // batch_size
    order = np.arange(samples, dtype=np.int32)
    if shuffle:
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(order)
    return np.asarray(order[: steps * batch_size].reshape(steps, batch_size), np.int32)


STAGE_NAMES = {Stage.PRETRAIN: "pretrain", Stage.TRAIN: "train", Stage.FINETUNE: "finetune"}
