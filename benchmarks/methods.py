"""Every pruning method as the benchmarks and the claims train it: (name) -> (seed, level) -> compression and optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import population

import pquant_jax as pq
from pquant_jax.constrain import mdmm, metrics
from pquant_jax.prune import NM, ap, autosparse, cs, dst, frozen, magnitude, pdp, random, wanda
from pquant_jax.transforms import pnorm_decay

LEVELS: Final = (0.7, 0.8, 0.9, 0.94)
RATIOS: Final = {"2:4": NM(2, 4), "1:4": NM(1, 4), "1:8": NM(1, 8)}
PLAN: Final = pq.Plan(pretrain=10, train=60, finetune=20)
BATCH: Final = 512
RATE: Final = 3e-3
BITS_RATE: Final = 1e-2
EPSILON: Final = 0.02  # what MDMM counts as absent
HIDDEN_KERNELS: Final = "Dense_[012]/kernel"  # no method that prunes channels may prune a class

Members = Sequence[tuple[int, float]]


class Method(NamedTuple):
    """make: (seed, level, plan, roles) -> the pruning transform.  levels: target sparsities, all members of one population.

    family: "weight", "channel" or "N:M".  decay: strength of the p-norm decay behind the optimizer, 0 for none.
    search: members -> what `population.fit` prepares, in place of the plan's pre-training.
    """

    make: Callable[..., pq.Transform]
    family: str = "weight"
    levels: tuple[float, ...] = LEVELS
    decay: float = 0.0
    search: Callable[[Members], Callable[[Any], Any]] | None = None


def _fitcompressed(members: Members) -> Callable[[Any], Any]:
    """The kernels after pre-training, and on them the masks of FITCompress, member by member."""
    inst, train = population.task().inst, population.task().train
    seeds, plan = sorted({seed for seed, _ in members}), pq.Plan(PLAN.pretrain, 0, 0)
    dense = population.fit(maker("none", plan=plan, quantized=False), [(seed, 0.0) for seed in seeds], plan, batch_size=BATCH)
    models = [population.member(dense.state.params.model, seeds.index(seed)) for seed, _ in members]
    masks = []
    for model, (_, level) in zip(models, members, strict=True):
        # met by the last sparsity alone; the allowance is for a count of weights that rounds
        goal = dict(ratio=1 - level + 1e-3, widths=(), sparsities=np.linspace(0, level, 9)[1:])
        masks.append(pq.search.fitcompress(inst, model, train, **goal).masks)

    def stacked(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *v: jnp.stack(v), *trees)

    def prepare(state: Any) -> Any:
        found = stacked(masks)
        opt_state = pq.update_state(state.opt_state, lambda s: {**s, "frozen": s["frozen"]._replace(mask=found)})
        return state._replace(params=state.params._replace(model=stacked(models)), opt_state=opt_state)

    return prepare


@functools.cache
def _given() -> pq.Transform:
    """Masks, all 1 until a search puts its own into the state."""
    kernels = pq.transforms.kernels_of(population.task().inst.model.params)
    return frozen({path: np.ones(w.shape) for path, w in kernels.items()})


def _hidden(make: Callable[..., pq.Transform]) -> Callable[..., pq.Transform]:
    return lambda *args: pq.masked(make(*args), HIDDEN_KERNELS)


def _mdmm(seed: Any, level: Any, plan: pq.Plan, roles: Any) -> pq.Transform:
    del seed, plan, roles
    metric = metrics.sparsity(epsilon=EPSILON, alpha=100.0)
    return mdmm(metric, kind="==", target=level, scale=1.0, damping=10.0, prunes=EPSILON)


METHODS: Final[dict[str, Method]] = {
    "none": Method(lambda s, t, plan, roles: pq.identity(), levels=(0.0,)),
    "random": Method(lambda s, t, plan, roles: random(sparsity=t, seed=s, roles=roles)),
    "magnitude": Method(lambda s, t, plan, roles: magnitude(sparsity=t, roles=roles)),
    "magnitude, global": Method(lambda s, t, plan, roles: magnitude(sparsity=t, budget="global", roles=roles)),
    "magnitude, fisher": Method(lambda s, t, plan, roles: magnitude(sparsity=t, budget="fisher", roles=roles)),
    "p-norm decay": Method(lambda s, t, plan, roles: magnitude(sparsity=t, budget="global", roles=roles), decay=1e-2),
    "wanda": Method(lambda s, t, plan, roles: wanda(sparsity=t, end=1, roles=roles)),
    "pdp": Method(lambda s, t, plan, roles: pdp(sparsity=t, epsilon=4 / 3 / plan.train, roles=roles)),
    "pdp, global": Method(lambda s, t, plan, roles: pdp(sparsity=t, epsilon=4 / 3 / plan.train, budget="global", roles=roles)),
    "dst": Method(lambda s, t, plan, roles: dst(alpha=1e-5, target=t, roles=roles)),
    "autosparse": Method(lambda s, t, plan, roles: autosparse(target=t, alpha_reset_epoch=0.9 * plan.train, roles=roles)),
    "cs": Method(lambda s, t, plan, roles: cs(target=t, decay=1e-6)),
    "mdmm": Method(_mdmm),
    "fitcompress": Method(lambda s, t, plan, roles: _given(), search=_fitcompressed),
    "random, channels": Method(
        _hidden(lambda s, t, plan, roles: random(sparsity=t, seed=s, groups="out", roles=roles)), "channel"
    ),
    "magnitude, channels": Method(_hidden(lambda s, t, plan, roles: magnitude(sparsity=t, groups="out", roles=roles)), "channel"),
    "pdp, channels": Method(
        _hidden(lambda s, t, plan, roles: pdp(sparsity=t, epsilon=4 / 3 / plan.train, groups="out", roles=roles)), "channel"
    ),
    "ap, channels": Method(
        _hidden(lambda s, t, plan, roles: ap(target=t, begin=1, period=plan.train // 4, roles=roles)), "channel"
    ),
}


def _blocks(ratio: NM) -> dict[str, Callable[..., pq.Transform]]:
    share = 1 - ratio.n / ratio.m
    return {
        "magnitude": lambda s, t, plan, roles: magnitude(sparsity=share, groups=ratio, roles=roles),
        "wanda": lambda s, t, plan, roles: wanda(sparsity=share, end=1, groups=ratio, roles=roles),
        "pdp": lambda s, t, plan, roles: pdp(sparsity=share, epsilon=1.0, groups=ratio, roles=roles),
    }


for _name, _ratio in RATIOS.items():
    for _method, _make in _blocks(_ratio).items():
        METHODS[f"{_method} {_name}"] = Method(_make, "N:M", (1 - _ratio.n / _ratio.m,))

QUANTIZER: Final = "8 bits everywhere: weights fixed<8,2>, activations fixed<8,4> (unsigned 7 bits behind a relu), saturating"


def quantizer(inst: pq.Instrumented) -> pq.Transform:
    """The fixed formats of the table."""
    fmt = pq.quantize.Format
    return pq.quantize.fixed(inst.sites, weights=fmt(i=1, f=6, k=1), activations=fmt(i=3, f=4))


def optimizer(compression: pq.Transform, plan: pq.Plan, *, decay: float = 0.0, batch_size: int = BATCH) -> Any:
    """Adam with a cosine over the whole plan; thresholds and multipliers at rates of their own."""
    epochs = plan.pretrain + plan.rounds * plan.train + plan.finetune
    steps = epochs * (len(population.task().train.y) // batch_size)
    rate, bits = (optax.cosine_decay_schedule(start, steps, alpha=0.03) for start in (RATE, BITS_RATE))
    weights = optax.chain(optax.adam(rate), pnorm_decay(rate, strength=decay)) if decay else optax.adam(rate)
    return pq.optimizer(compression, weights=weights, thresholds=optax.adam(1e-3), bits=optax.adam(bits), duals=optax.sgd(0.2))


def maker(name: str, *, plan: pq.Plan = PLAN, quantized: bool = True, batch_size: int = BATCH) -> population.Make:
    """The (seed, level) -> link of a method, pruned and then put on 8 bits."""
    method, inst = METHODS[name], population.task().inst

    def make(seed: Any, level: Any) -> population.Link:
        pruning = method.make(seed, level, plan, inst.roles)
        compression = pq.chain(pruning, quantizer(inst)) if quantized else pq.chain(pruning)
        return population.Link(compression, optimizer(compression, plan, decay=method.decay, batch_size=batch_size))

    return make
