"""A plan as data: which epochs there are and what happens around each."""

from __future__ import annotations

from typing import NamedTuple

from pquant_jax._base import Event, Stage
from pquant_jax._errors import ConfigError

REWINDS = ("never", "every-round", "post-training-stage")


class Plan(NamedTuple):
    """pretrain epochs -> rounds x train epochs -> finetune epochs.

    rewind: when the kernels go back to what they were before epoch `save_epoch` of the first round: "never",
    "every-round" or "post-training-stage" (after the last round).
    """

    pretrain: int = 10
    train: int = 100
    finetune: int = 20
    rounds: int = 1
    rewind: str = "never"
    save_epoch: int = 0


class Slot(NamedTuple):
    """One epoch: its stage, its number within the stage or round and that one's length, and the events around it.

    save: keep the kernels before it for a rewind.  rewind: put them back after it.
    after: (event, stage that the event announces).
    """

    stage: Stage
    epoch: int
    epochs: int
    after: tuple[tuple[Event, Stage], ...]
    save: bool = False
    rewind: bool = False


def check_plan(plan: Plan) -> Plan:
    """Return `plan`, or raise ConfigError for a negative length or an unknown rewind."""
    for name in ("pretrain", "train", "finetune"):
        if getattr(plan, name) < 0:
            raise ConfigError(f"plan.{name} is {getattr(plan, name)}, expected 0 or more epochs")
    if plan.rounds < 1:
        raise ConfigError(f"plan.rounds is {plan.rounds}, expected 1 or more")
    if plan.rewind not in REWINDS:
        raise ConfigError(f"plan.rewind is {plan.rewind!r}, expected one of {', '.join(REWINDS)}")
    if plan.rewind != "never" and not 0 <= plan.save_epoch < plan.train:
        raise ConfigError(f"plan.save_epoch is {plan.save_epoch}, expected an epoch of the first round, 0 to {plan.train - 1}")
    if plan.pretrain + plan.train + plan.finetune == 0:
        raise ConfigError("the plan has no epochs: give pretrain, train or finetune a positive length")
    return plan


def opening(plan: Plan) -> tuple[tuple[Event, Stage], ...]:
    """Events before the first epoch: with no pre-training, its end is announced at once; likewise the training's."""
    return () if plan.pretrain else _after_pretraining(plan)


def _after_pretraining(plan: Plan) -> tuple[tuple[Event, Stage], ...]:
    """The announcement of the stage that follows pre-training, training or fine-tuning; nothing where none follows."""
    if plan.train:
        return ((Event.POST_PRETRAIN, Stage.TRAIN),)
    return ((Event.PRE_FINETUNE, Stage.FINETUNE),) if plan.finetune else ()


def schedule(plan: Plan) -> list[Slot]:
    """Every epoch of the plan in order.

    A stage's end is announced under the stage that follows, so that masks and bits are in force from its first step.

    >>> [s.stage.name for s in schedule(Plan(pretrain=1, train=1, finetune=1))]
    ['PRETRAIN', 'TRAIN', 'FINETUNE']
    """
    check_plan(plan)
    slots = [Slot(Stage.PRETRAIN, e, plan.pretrain, ()) for e in range(plan.pretrain)]
    if slots:
        slots[-1] = slots[-1]._replace(after=_after_pretraining(plan))
    for r in range(plan.rounds):
        for e in range(plan.train):
            last_epoch, last_round = e == plan.train - 1, r == plan.rounds - 1
            after: tuple[tuple[Event, Stage], ...] = ((Event.POST_ROUND, Stage.TRAIN),) if last_epoch and not last_round else ()
            again = plan.rewind == "every-round" or (plan.rewind == "post-training-stage" and last_round)
            slots.append(Slot(Stage.TRAIN, e, plan.train, after, r == 0 and e == plan.save_epoch, last_epoch and again))
    if slots and plan.train:
        slots[-1] = slots[-1]._replace(after=(*slots[-1].after, (Event.PRE_FINETUNE, Stage.FINETUNE)))
    slots += [Slot(Stage.FINETUNE, e, plan.finetune, ()) for e in range(plan.finetune)]
    return slots
