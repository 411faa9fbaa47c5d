"""PQuantML's pruning layers, played call by call through our methods (golden/pquantml.json).

To add a method, add one entry to METHODS.  Theirs has (out, in) and (out, in, *k), ours (in, out) and (*k, in, out):
`turned` does that for weights, masks and trainables alike.
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
import pytest

from pquant_jax._base import Event, Params, Stage, State, Transform, View
from pquant_jax.prune import dst, pdp
from pquant_jax.transforms import with_hyper

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pquantml.json").read_text())
EVENTS = {
    "post_pretrain": (Event.POST_PRETRAIN, Stage.TRAIN),
    "pre_epoch": (Event.PRE_EPOCH, None),
    "post_epoch": (Event.POST_EPOCH, None),
    "post_round": (Event.POST_ROUND, None),
    "pre_finetune": (Event.PRE_FINETUNE, Stage.FINETUNE),
}
SILENT = ("train", "eval", "update_mask")  # ours has no modes, and stores masks when it is told of the end of an epoch
SETTLED = ("pre_epoch", "post_epoch", "update_mask", "post_round", "pre_finetune")  # after these, stored values are compared
CLOSE: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)


class Method(NamedTuple):
    """How one of our methods answers what theirs was asked.

    make      (their parameters) -> Transform, or None for an option that ours does not have.
    name      the trainable in `Params.extra[transform.name]`, as theirs calls it; None without one.
    hard      (state, view) -> what theirs calls the hard mask.
    stored    {their state: (our state) -> the same}, compared after every call between epochs.
    numbers   {their number: our hyperparameter}, for what is set on the way.
    calls     {call: (player, step) -> None} for calls that only this method knows.
    differs   cases in which ours is meant to differ; a test of its own shows both.
    """

    make: Callable[[dict[str, Any]], Transform | None]
    name: str | None
    hard: Callable[[State, View], jax.Array]
    stored: Mapping[str, Callable[[State], jax.Array]] = {}
    numbers: Mapping[str, str] = {}
    calls: Mapping[str, Callable[[Player, dict[str, Any]], None]] = {}
    differs: tuple[str, ...] = ()


def make_dst(p: dict[str, Any]) -> Transform:
    granularity = {"weightwise": "weight", "channelwise": "channel", "layerwise": "layer"}[p["threshold_type"]]
    limits = dict(max_sparsity=p["max_pruning_pct"], threshold_init=p["threshold_init"])
    return dst(alpha=p["alpha"], granularity=granularity, **limits)


def make_pdp(p: dict[str, Any]) -> Transform | None:
    if p["structured_pruning"]:
        return None
    return pdp(sparsity=p["sparsity"], epsilon=p["epsilon"], temperature=p["temperature"])


METHODS = {
    "dst": Method(
        make_dst,
        "threshold",
        lambda state, view: view.masks["kernel"],
        {"mask": lambda state: state.mask["kernel"]},
        differs=tuple(f"dst/reset-{kind}/dense/0" for kind in ("layerwise", "channelwise", "weightwise")),
    ),
    "pdp": Method(
        make_pdp,
        None,
        lambda state, view: state.mask["kernel"] >= 0.5,
        {"mask": lambda state: state.mask["kernel"], "r": lambda state: state.ratio["kernel"]},
        {"_init_r": "sparsity"},
        differs=("pdp/count-s=0.8/hundred", "pdp/count-s=0.3/dense/1", "pdp/count-s=0.0/dense/0"),
    ),
}


def turned(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Their weight, mask or trainable of a weight of this shape (out first), as ours: one value, one per output, or all."""
    value = np.asarray(value, np.float32)
    if value.size == math.prod(shape):
        value = value.reshape(shape)
    elif value.ndim:
        value = value.reshape((value.shape[0],) + (1,) * (len(shape) - 1))
    return value.transpose({0: (), 2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}[value.ndim])


class Player:
    """One case: `step` does what the case says, `theirs` is the state that theirs was left in."""

    def __init__(self, case: dict[str, Any]):
        self.case, self.data, self.method = case, GOLDEN["inputs"][case["input"]], METHODS[case["method"]]
        self.shape = np.shape(self.data["u"])
        self.theirs: dict[str, Any] = {}
        self.stage = Stage.PRETRAIN
        transform = self.method.make(case["parameters"])
        assert transform is not None
        self.transform = transform
        self.params = transform.attach({"kernel": self.weight(0)})
        self.state = transform.init(self.params)
        self.ask, self.tell = jax.jit(self.answers), jax.jit(transform.boundary)

    def weight(self, moment: int) -> jax.Array:
        return jnp.asarray(turned(self.data["w"][moment], self.shape))

    def trained(self, params: Params) -> jax.Array:
        return params.extra[self.transform.name]["kernel"]

    def step(self, step: dict[str, Any]) -> dict[str, jax.Array]:
        """Ours under their names, {"out", "dw", ...}; empty for calls that answer nothing."""
        self.theirs |= step.get("state", {})
        call, name = step["call"], self.method.name
        if call in ("build", "set"):
            if name is not None and name in step.get(
                "state", {}
            ):  # theirs starts where it is put, whatever `threshold_init` says
                value = jnp.asarray(turned(self.theirs[name], self.shape))
                assert self.trained(self.params).shape == value.shape
                self.params = Params(self.params.model, {self.transform.name: {"kernel": value}})
            new = {ours: step["state"][n] for n, ours in self.method.numbers.items() if n in step.get("state", {})}
            self.state = with_hyper(self.state, **new)
        elif call in EVENTS:
            event, stage = EVENTS[call]
            self.stage = self.stage if stage is None else stage
            numbers = dict(event=event, stage=self.stage, epoch=step.get("epoch", 0), epochs=step.get("epochs", 1))
            numbers = {k: jnp.int32(v) for k, v in numbers.items()}
            self.params, self.state = self.tell(self.params, self.state, stats={}, **numbers)
        elif call == "forward":
            return self.forward(step)
        elif call not in SILENT:
            self.method.calls[call](self, step)
        return {}

    def forward(self, step: dict[str, Any]) -> dict[str, jax.Array]:
        """Ours: value, gradients and loss, then the update's own step."""
        self.params = params = Params({"kernel": self.weight(step["w"])}, self.params.extra)
        ours = self.ask(params, self.state)
        self.params, self.state = self.transform.step(
            params, self.state, stage=jnp.int32(self.stage), stats={}, view=View(params.model, {}, {}), previous=params
        )
        return ours

    def answers(self, params: Params, state: State) -> dict[str, jax.Array]:
        u, name = turned(self.data["u"], self.shape), self.method.name

        def value(params: Params) -> tuple[jax.Array, View]:
            view, _ = self.transform.apply(params, state)
            return jnp.sum(u * view.model["kernel"]), view

        (_, view), d = jax.value_and_grad(value, has_aux=True)(params)
        loss, dl = jax.value_and_grad(lambda p: self.transform.penalty(p, state, self.transform.apply(p, state)[0]))(params)
        ours = {"out": view.model["kernel"], "dw": d.model["kernel"], "loss": loss, "loss_dw": dl.model["kernel"]}
        if name is not None:
            ours |= {f"d{name}": self.trained(d), f"loss_d{name}": self.trained(dl)}
        return {**ours, "hard_mask": self.method.hard(state, view)}

    def answer(self, step: dict[str, Any], name: str) -> np.ndarray:
        """Theirs: what is not there is a gradient of zero, and a name stands for what it equals."""
        inside, _, key = name.rpartition("_") if name.startswith("loss_") else ("", "", name)
        found = (step["loss_grads"] if inside else step).get(key, 0.0)
        if isinstance(found, str):
            found = {"w": self.data["w"][step["w"]], "u": self.data["u"], "mask": self.theirs["mask"]}[found]
        return turned(found, self.shape)


def supported(method: str) -> list[dict[str, Any]]:
    return [c for c in GOLDEN["cases"] if c["method"] == method and METHODS[method].make(c["parameters"]) is not None]


ALIKE = [c for m in METHODS for c in supported(m) if c["name"] not in METHODS[m].differs]


@pytest.mark.parametrize("case", ALIKE, ids=lambda c: c["name"])
def test_equal(case):
    player, steps, compared = Player(case), case["steps"], 0
    for n, step in enumerate(steps):
        said = f"step {n}, {step['call']} in {player.stage.name}"
        for name, value in player.step(step).items():
            theirs = np.broadcast_to(player.answer(step, name), value.shape)
            np.testing.assert_allclose(value, theirs, **CLOSE, err_msg=f"{said}: {name}")
            compared += 1
        if step["call"] not in SETTLED or [later["call"] for later in steps[n + 1 : n + 2]] == ["update_mask"]:
            continue
        for name, read in player.method.stored.items():
            if name == "mask" or player.stage == Stage.TRAIN:  # theirs moves its schedules in every stage
                theirs = turned(player.theirs[name], player.shape)
                np.testing.assert_allclose(read(player.state), theirs, **CLOSE, err_msg=f"{said}: stored {name}")
                compared += 1
    assert compared


def case_of(name: str) -> dict[str, Any]:
    return next(c for c in GOLDEN["cases"] if c["name"] == name)


@pytest.mark.parametrize("name", METHODS["dst"].differs)
def test_dst_honours_threshold_init_where_theirs_starts_from_zero(name):
    case = case_of(name)
    assert case["parameters"]["threshold_init"] == 0.25
    assert not np.any(case["steps"][0]["state"]["threshold"])
    player = Player(case)  # which puts nothing anywhere yet
    np.testing.assert_array_equal(player.trained(player.params), np.float32(0.25))
    w = player.weight(0)
    theirs = next(step for step in case["steps"] if step["call"] == "forward")
    player.step({"call": "post_pretrain"})
    np.testing.assert_array_equal(player.forward(theirs)["out"], np.where(np.abs(w) > 0.25, w, 0))
    assert theirs["out"] == "w"


@pytest.mark.parametrize("name", METHODS["dst"].differs)
def test_dst_gives_a_collapsed_layer_its_thresholds_back_after_the_epoch_and_theirs_in_the_forward(name):
    player, steps = Player(case_of(name)), iter(case_of(name)["steps"])
    for step in steps:
        player.step(step)
        if step["call"] == "set":
            break
    step, w, thresholds = next(steps), player.weight(0), player.trained(player.params)
    ours = player.step(step)
    kept = np.abs(w) > thresholds
    assert 1 - kept.mean() >= player.case["parameters"]["max_pruning_pct"]
    np.testing.assert_array_equal(ours["out"], np.where(kept, w, 0))
    np.testing.assert_array_equal(player.answer(step, "out"), w)
    assert not np.any(player.theirs["threshold"])
    np.testing.assert_array_equal(player.trained(player.params), thresholds)
    player.step({"call": "post_epoch"})
    assert not np.any(player.trained(player.params))


COUNTS = [(19, 20), (16, 17), (31, 32)]  # kept by theirs, by ours


@pytest.mark.parametrize(("name", "counts"), list(zip(METHODS["pdp"].differs, COUNTS, strict=True)))
def test_pdp_rounds_the_count_that_theirs_truncates(name, counts):
    """float32 (1 - 0.8) * 100 is just below 20, 0.7 * 24 is 16.8; and theirs prunes one weight even where the target is 0."""
    player, answers, step = Player(case_of(name)), {}, {}
    for step in player.case["steps"]:
        answers = player.step(step)
    half = np.abs(player.weight(0)) / 2
    kept = [int(np.sum(np.abs(out) > half)) for out in (player.answer(step, "out"), answers["out"])]
    assert tuple(kept) == counts
