"""Plays a case of pquantml.json through our methods, call by call; tests/prune has it as the fixture `pquantml`.

To add a method, add one entry to METHODS.  Theirs has (out, in) and (out, in, *k), ours (in, out) and (*k, in, out):
`Player.turned` does that for weights, masks, trainables and statistics alike.  Methods to which the order of the weights
matters are played on kernels with the output first, as equinox has them, whose axes the roles say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import AxisRole, Event, Params, Stage, State, Transform, View
from pquant_jax.constrain import mdmm, metrics
from pquant_jax.prune import NM, Block, ap, autosparse, cs, dst, frozen, pdp, wanda
from pquant_jax.transforms import with_hyper

GOLDEN = json.loads((Path(__file__).parent / "pquantml.json").read_text())
EVENTS = {
    "post_pretrain": (Event.POST_PRETRAIN, Stage.TRAIN),
    "pre_epoch": (Event.PRE_EPOCH, None),
    "post_epoch": (Event.POST_EPOCH, None),
    "post_round": (Event.POST_ROUND, None),
    "pre_finetune": (Event.PRE_FINETUNE, Stage.FINETUNE),
}
SILENT = ("update_mask",)  # ours stores masks when it is told of the end of an epoch
SETTLED = ("pre_epoch", "post_epoch", "update_mask", "post_round", "pre_finetune")
GRANULARITY = {"weightwise": "weight", "channelwise": "channel", "layerwise": "layer"}
KINDS = {"Equality": "==", "LessThanOrEqual": "<=", "GreaterThanOrEqual": ">="}
Parameters = dict[str, Any]


class Method(NamedTuple):
    """How one of our methods answers what theirs was asked.

    make      (their parameters, roles, compat) -> Transform.
    trained   the trainable as theirs calls it, None without one; `of` finds it in (params).
    ascends   it is a multiplier, whose gradient theirs turns round and we don't.
    hard      (params, state, view) -> what theirs calls the hard mask.
    stored    {their state: (player) -> the same, or None where it is of no use}, compared after the calls `settled`.
    put       {their state: (our state, value) -> our state} for what is set on the way.
    calls     {call: (player, step) -> None} for calls that only this method knows.
    updates   a forward is an update; not where an update brings statistics, which are calls of their own.
    out_first play it on kernels with the output first.
    fixed     their parameters that are no numbers in our state: cases that share them share one compilation.
    """

    make: Callable[[Parameters, Mapping[str, AxisRole], str | None], Transform]
    hard: Callable[[Params, State, View], jax.Array]
    trained: str | None = None
    of: Callable[[Params], jax.Array] = lambda params: next(iter(params.extra.values()))["kernel"]
    ascends: bool = False
    stored: Mapping[str, Callable[[Player], jax.Array | None]] = {}
    settled: tuple[str, ...] = SETTLED
    put: Mapping[str, Callable[[State, Any], State]] = {}
    calls: Mapping[str, Callable[[Player, dict[str, Any]], None]] = {}
    updates: bool = True
    out_first: bool = False
    fixed: tuple[str, ...] = ()


COMPILED: dict[tuple, tuple[Callable, Callable]] = {}


class Player:
    """One case: `step` does what the case says, `theirs` is the state that theirs was left in."""

    def __init__(self, case: dict[str, Any], compat: str | None = "pquantml"):
        self.case, self.data, self.method = case, GOLDEN["inputs"][case["input"]], METHODS[case["method"]]
        self.shape = np.shape(self.data["u"])
        self.theirs: dict[str, Any] = {}
        self.stage, self.training, self.epoch = Stage.PRETRAIN, True, 0
        first = AxisRole(tuple(range(1, len(self.shape))), (0,), "")
        roles = {"kernel": first} if self.method.out_first else {}
        self.transform = self.method.make(case["parameters"], roles, compat)
        self.params = self.transform.attach({"kernel": self.weight(0)})
        self.state = self.transform.init(self.params)
        key = (case["method"], compat, self.shape, *(case["parameters"][name] for name in self.method.fixed))
        COMPILED.setdefault(key, (jax.jit(self.answers), jax.jit(self.transform.boundary)))
        self.ask, self.tell_now = COMPILED[key]

    def turned(self, value: Any) -> np.ndarray:
        """Their weight, mask or trainable as ours: one value, one per output, or all."""
        value = np.asarray(value, np.float32)
        if value.size == math.prod(self.shape):
            value = value.reshape(self.shape)
        elif value.ndim:
            value = value.reshape((value.shape[0],) + (1,) * (len(self.shape) - 1))
        out_first = {0: (), 2: (0, 1), 3: (0, 1, 2), 4: (0, 1, 2, 3)}
        in_first = {0: (), 2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}
        return value.transpose((out_first if self.method.out_first else in_first)[value.ndim])

    def weight(self, moment: int) -> jax.Array:
        return jnp.asarray(self.turned(self.data["w"][moment]))

    def step(self, step: dict[str, Any]) -> dict[str, jax.Array]:
        """Ours under their names, {"out", "dw", ...}; empty for calls that answer nothing."""
        self.theirs |= step.get("state", {})
        call = step["call"]
        if call in ("build", "set"):
            self.set(step.get("state", {}))
        elif call in ("train", "eval"):
            self.training = call == "train"
        elif call in self.method.calls:
            self.method.calls[call](self, step)
        elif call in EVENTS:
            self.tell(call, step.get("epoch", 0), step.get("epochs", 1))
        elif call == "forward":
            return self.forward(step)
        elif call not in SILENT:
            raise KeyError(call)
        return {}

    def set(self, values: dict[str, Any]) -> None:
        """Theirs starts where it is put, whatever `threshold_init` says."""
        if self.method.trained in values:
            (name, tree), old = next(iter(self.params.extra.items())), self.method.of(self.params)
            value = jnp.asarray(self.turned(values[self.method.trained]))
            assert old.shape == value.shape
            self.params = Params(self.params.model, {name: jax.tree.map(lambda _: value, tree)})
        for name in self.method.put.keys() & values.keys():
            self.state = self.method.put[name](self.state, values[name])

    def tell(self, call: str, epoch: int, epochs: int = 1) -> None:
        event, stage = EVENTS[call]
        self.stage = self.stage if stage is None else stage
        numbers = dict(event=event, stage=self.stage, epoch=epoch, epochs=epochs)
        numbers = {k: jnp.int32(v) for k, v in numbers.items()}
        self.params, self.state = self.tell_now(self.params, self.state, stats={}, **numbers)

    def forward(self, step: dict[str, Any]) -> dict[str, jax.Array]:
        """Ours: value, gradients and loss, then the update's own step."""
        self.params = Params({"kernel": self.weight(step["w"])}, self.params.extra)
        ours = self.ask(self.params, self.state, self.turned(self.data["u"]))
        if self.method.updates and self.training:
            self.update({})
        return ours

    def update(self, stats: dict[str, Any]) -> None:
        view, before = View(self.params.model, {}, {}), self.params
        self.params, self.state = self.transform.step(
            before, self.state, stage=jnp.int32(self.stage), stats=stats, view=view, previous=before
        )

    def answers(self, params: Params, state: State, u: jax.Array) -> dict[str, jax.Array]:
        name, sign = self.method.trained, -1 if self.method.ascends else 1

        def value(params: Params) -> tuple[jax.Array, View]:
            view, _ = self.transform.apply(params, state)
            return jnp.sum(u * view.model["kernel"]), view

        (_, view), d = jax.value_and_grad(value, has_aux=True)(params)
        loss, dl = jax.value_and_grad(lambda p: self.transform.penalty(p, state, self.transform.apply(p, state)[0]))(params)
        ours = {"out": view.model["kernel"], "dw": d.model["kernel"], "loss": loss, "loss_dw": dl.model["kernel"]}
        if name is not None:
            ours |= {f"d{name}": sign * self.method.of(d), f"loss_d{name}": sign * self.method.of(dl)}
        return {**ours, "hard_mask": self.method.hard(params, state, view)}

    def answer(self, step: dict[str, Any], name: str) -> np.ndarray:
        """Theirs: what is not there is a gradient of zero, and a name stands for what it equals."""
        found = step.get(name, 0.0) if not name.startswith("loss_") else step["loss_grads"].get(name.removeprefix("loss_"), 0.0)
        if isinstance(found, str):
            found = {"w": self.data["w"][step["w"]], "u": self.data["u"], "mask": self.theirs["mask"]}[found]
        return self.turned(found)


def kernel(name: str) -> Callable[[Player], jax.Array]:
    """The field of a state that has one array per kernel."""
    return lambda player: getattr(player.state, name)["kernel"]


def channel_means(data: Any) -> np.ndarray:
    """Over samples and positions of data (sample, channel, *positions)."""
    data = np.asarray(data, np.float32)
    return data.mean(tuple(a for a in range(data.ndim) if a != 1), dtype=np.float32)


def make_dst(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    limits = dict(max_sparsity=p["max_pruning_pct"], threshold_init=p["threshold_init"])
    return dst(alpha=p["alpha"], granularity=GRANULARITY[p["threshold_type"]], **limits, roles=roles, compat=compat)


def make_autosparse(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    numbers = {name: p[name] for name in ("alpha", "threshold_init", "alpha_reset_epoch")}
    backward = 0.5 if p["backward_sparsity"] else None
    granularity = GRANULARITY[p["threshold_type"]]
    return autosparse(**numbers, granularity=granularity, backward_sparsity=backward, roles=roles, compat=compat)


def make_cs(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    del roles
    return cs(decay=p["threshold_decay"], threshold_init=p["threshold_init"], final_temperature=p["final_temp"], compat=compat)


def make_pdp(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    groups = "out" if p["structured_pruning"] else "weight"
    numbers = {name: p[name] for name in ("sparsity", "epsilon", "temperature")}
    return pdp(**numbers, groups=groups, roles=roles, compat=compat)


def make_ap(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    return ap(threshold=p["threshold"], begin=p["t_start_collecting_batch"], period=p["t_delta"], roles=roles, compat=compat)


def make_wanda(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    """Ours collects whole epochs, here one; theirs t_delta batches from the beginning of the same."""
    groups, begin = "row" if p["N"] is None else NM(p["N"], p["M"]), p["t_start_collecting_batch"]
    return wanda(sparsity=p["sparsity"], groups=groups, begin=begin, end=begin + 1, roles=roles, compat=compat)


def make_mdmm(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    if p["metric_type"] == "UnstructuredSparsity":
        modes = dict(mode=p["l0_mode"], reduce=p["scale_mode"])
        metric: Any = metrics.reference_sparsity(target_sparsity=p["target_sparsity"], epsilon=p["epsilon"], **modes)
    else:  # of which theirs has no gradient
        metric = metrics.group_sparsity(Block(p["rf"], 1), epsilon=p["epsilon"], roles=roles).hard
    numbers = dict(target=p["target_value"], scale=p["scale"], damping=p["damping"], prunes=p["epsilon"])
    rate = None if p["use_grad"] else p["constraint_lr"]
    return mdmm(metric, kind=KINDS[p["constraint_type"]], **numbers, rate=rate, compat=compat)


def make_frozen(p: Parameters, roles: Mapping[str, AxisRole], compat: str | None) -> Transform:
    del p, roles, compat
    return frozen({"kernel": jnp.ones((8, 4))})  # until it is set


def collect_output(player: Player, step: dict[str, Any]) -> None:
    if step["training"]:
        active = player.turned(channel_means(np.asarray(player.data["y"][step["y"]]) > 0))
        player.update({"active": {"kernel": jnp.asarray(active)}})


def collect_input(player: Player, step: dict[str, Any]) -> None:
    """Theirs makes its mask of the weights of the last batch that it wants, ours before an epoch."""
    if step["training"]:
        square = channel_means(np.square(np.asarray(player.data["x"][step["x"]], np.float32)))
        axis = 0 if player.case["layer_type"] == "depthwise_conv" else 1
        square = square.reshape([-1 if a == axis else 1 for a in range(len(player.shape))])
        player.update({"square": {"kernel": jnp.asarray(square)}})
    if "done" in step.get("state", {}):
        player.params = Params({"kernel": player.weight(step["w"])}, {})
        player.tell("pre_epoch", player.case["parameters"]["t_start_collecting_batch"] + 1)


def begin_epoch(player: Player, step: dict[str, Any]) -> None:
    """What theirs counts epochs by, and ours is told before the next."""
    player.tell(step["call"], step.get("epoch", 0), step.get("epochs", 1))
    player.tell("pre_epoch", player.theirs["t"])


METHODS = {
    "dst": Method(
        make_dst,
        lambda params, state, view: view.masks["kernel"],
        trained="threshold",
        stored={"threshold": lambda p: p.method.of(p.params), "mask": kernel("mask")},
        fixed=("threshold_type",),
    ),
    "autosparse": Method(
        make_autosparse,
        lambda params, state, view: view.masks["kernel"],
        trained="threshold",
        stored={"threshold": lambda p: p.method.of(p.params), "alpha": lambda p: p.state.alpha},
        fixed=("threshold_type", "backward_sparsity"),
    ),
    "cs": Method(
        make_cs,
        lambda params, state, view: params.extra["cs"]["kernel"] > 0,
        trained="s",
        stored={"s": lambda p: p.method.of(p.params), "beta": lambda p: p.state.beta},
        put={"beta": lambda state, value: state._replace(beta=jnp.float32(value))},
    ),
    "pdp": Method(
        make_pdp,
        lambda params, state, view: state.mask["kernel"] >= 0.5,
        # theirs moves r in every stage, though only training reads it
        stored={
            "mask": kernel("mask"),
            "r": lambda p: p.state.part * p.state.hyper["sparsity"] if p.stage == Stage.TRAIN else None,
        },
        put={"_init_r": lambda state, value: with_hyper(state, sparsity=value)},
        fixed=("structured_pruning",),
    ),
    "activation_pruning": Method(
        make_ap,
        lambda params, state, view: state.mask["kernel"],
        stored={
            "mask": kernel("mask"),
            "t": lambda p: p.state.done,
            "batches_collected": lambda p: p.state.batches,
            "activations": lambda p: p.state.mean["kernel"] * p.state.batches,
        },
        settled=("collect_output", *SETTLED),
        calls={"collect_output": collect_output},
        updates=False,
    ),
    "wanda": Method(
        make_wanda,
        lambda params, state, view: state.mask["kernel"],
        stored={"mask": kernel("mask"), "done": lambda p: p.state.part},
        settled=("collect_input", *SETTLED),
        calls={"collect_input": collect_input, "post_pretrain": begin_epoch, "post_epoch": begin_epoch},
        updates=False,
        out_first=True,
        fixed=("N", "M"),
    ),
    "mdmm": Method(
        make_mdmm,
        lambda params, state, view: jnp.where(
            state.stage == Stage.TRAIN, jnp.abs(view.model["kernel"]) > state.hyper["epsilon"], state.mask["kernel"]
        ),
        trained="constraint_layer.lmbda",
        of=lambda params: params.extra["mdmm"]["multiplier"],
        ascends=True,
        stored={
            "constraint_layer.lmbda": lambda p: p.params.extra["mdmm"]["multiplier"],
            "constraint_layer.prev_infs": lambda p: p.state.seen if p.stage != Stage.FINETUNE else None,
        },
        settled=("forward", *SETTLED),
        out_first=True,
        fixed=("constraint_type", "metric_type", "l0_mode", "scale_mode", "rf", "use_grad", "epsilon", "target_sparsity"),
    ),
    "fitcompress": Method(
        make_frozen,
        lambda params, state, view: view.masks["kernel"],
        put={"mask": lambda state, value: state._replace(mask={"kernel": jnp.float32(value).reshape(4, 8).T})},
    ),
}
