"""The sections of pruning methods and constraints: a key is an argument of the method's factory, its default the factory's.

Nothing is written down twice: a method that `METHODS` or `METRICS` lists has a section, made of its signature and of
`KEYS`, which says once what an argument of some name is.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, create_model, model_validator

from pquant_jax import constrain, prune, search
from pquant_jax.config._fields import AtLeastOne, Float, Fraction, NotNegative, Positive, Section, Where, number, short

metrics = constrain.metrics
_METRICS = (
    metrics.sparsity, metrics.group_sparsity, metrics.dsp_sparsity, metrics.bram_sparsity, metrics.nm_violation,
    metrics.ebops, constrain.patterns,
)  # fmt: skip
METHODS: Final[Mapping[str, Callable]] = {
    name: factory
    for name, factory in vars(prune).items()
    if inspect.isfunction(factory) and factory.__annotations__["return"] == "Transform" and factory is not prune.frozen
}  # masks found elsewhere can't be written down
METRICS: Final[Mapping[str, Callable]] = {factory.__name__: factory for factory in _METRICS}
SEARCHES: Final[Mapping[str, Callable]] = {factory.__name__: factory for factory in (search.fitcompress, search.hawq)}
FILLED: Final = {"roles", "cost", "seed", "inst", "params", "data", "loss", "model_state"}  # by the model and the experiment
UNSAID: Final = {"masks", "cycles"}  # arrays and tables, which a file can't give


class NM(Section):
    """Of every m weights in a row along the input, the n largest stay."""

    n: AtLeastOne
    m: AtLeastOne


class Block(Section):
    """Blocks of h inputs by w outputs."""

    h: AtLeastOne
    w: AtLeastOne


class Cross(Section):
    """Tiles of h inputs by w outputs (null: all); a weight lives where both its row and its column of the tile do."""

    h: AtLeastOne | None = None
    w: AtLeastOne | None = None


class Groups(Section):
    """Which weights live and die together, one of these.  Short form: the name alone."""

    name: Literal["weight", "row", "in", "out", "filter", "head", "layer"] | None = None
    """Weights; weights, as many in every output channel; input or output channels; filters; heads; whole layers."""
    nm: NM | None = None
    block: Block | None = None
    cross: Cross | None = None
    reuse: AtLeastOne | None = None
    """The weights that one multiplier of hls4ml works off with this reuse factor."""
    heads: AtLeastOne | None = None
    """Output channels in so many equal parts."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"one of {', '.join(type(self).model_fields)}, got {' and '.join(given) or 'none'}")
        return self


def _targets(value: Any) -> Any:
    """A fraction, or one per rule."""
    rules = value if isinstance(value, dict) else {".*": value}
    try:
        made = {str(where): float(number(v)) for where, v in rules.items()}
    except (TypeError, ValueError):
        made = {}
    if not made or not all(0 <= v <= 1 for v in made.values()):
        raise ValueError("a fraction, 0 to 1, or one for each rule, such as {Dense_0/.*: 0.5, .*: 0.9}")
    return made if isinstance(value, dict) else made[".*"]


def _prunes(value: Any) -> Any:
    """A switch, or a size above 0."""
    if isinstance(value, bool):
        return value
    try:
        size = float(number(value))
    except (TypeError, ValueError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError("true, false or the size up to which weights are pruned, above 0")
    return size


Grouped = Annotated[Groups, short(lambda v: {"name": v}, Groups | str)]
Targets = Annotated[float | dict[str, float], BeforeValidator(_targets)]


class Key(NamedTuple):
    """What a key is: its type, its description, and its default where the factory has none."""

    kind: Any
    text: str
    default: Any = ...


KEYS: Final[Mapping[str, Key]] = {
    # of pruning methods
    "sparsity": Key(Targets, "Zeros / total of every kernel, or one for each rule: {Dense_0/.*: 0.5, .*: 0.9}.", 0.8),
    "groups": Key(Grouped, "What is pruned together."),
    "budget": Key(
        Literal["layer", "global", "fisher"],
        "Every layer its own target, or one threshold for all of them: on the scores, or on what a weight's absence costs.",
    ),
    "begin": Key(NotNegative, "When the target begins to rise, a fraction of the training stage's epochs."),
    "end": Key(Positive, "When it is reached, a fraction of the training stage's epochs."),
    "power": Key(Positive, "Of the ramp 1 - (1 - t)^power; 1 is a straight line."),
    "wanda.begin": Key(NotNegative, "First epoch of the training stage whose activations count."),
    "wanda.end": Key(Positive, "Epoch of the training stage before which the mask is made, once."),
    "ap.begin": Key(NotNegative, "First epoch of the training stage whose activations count."),
    "period": Key(Positive, "Epochs between two masks."),
    "threshold": Key(Fraction, "Channels above 0 in at most this fraction of samples go; either this or target."),
    "target": Key(Fraction, "Zeros / total over all kernels, reached exactly; null: as much as the strength prunes."),
    "ap.target": Key(Fraction, "Fraction of every kernel's output channels that go, the least active; or threshold."),
    "gain": Key(Positive, "Of the controller that reaches the target, per epoch."),
    "pdp.epsilon": Key(Positive, "Ramp: fraction of the target added per epoch."),
    "temperature": Key(Positive, "Softness of the mask, in units of squared weights."),
    "dst.alpha": Key(NotNegative, "Weight of sum(exp(-T)) in the loss; larger prunes more.", 5e-6),
    "autosparse.alpha": Key(Fraction, "Gradient of a weight below its threshold in the first epoch; it decays."),
    "alpha_reset_epoch": Key(NotNegative, "From this epoch of the training stage on alpha is 0."),
    "backward_sparsity": Key(Fraction, "Fraction of a kernel's weights, furthest below the threshold, without gradient."),
    "threshold_init": Key(Float, "Starting threshold, in units of the weights."),
    "autosparse.threshold_init": Key(Float, "Starting T; the threshold is sigmoid(T), in units of the weights."),
    "cs.threshold_init": Key(Float, "Starting s of the mask sigmoid(beta s); lower prunes more."),
    "max_sparsity": Key(Fraction, "A layer that reaches it gets its thresholds reset."),
    "granularity": Key(Literal["weight", "channel", "layer"], "One threshold per weight, output channel or layer."),
    "decay": Key(NotNegative, "Weight of the sum of the masks in the loss; larger prunes more."),
    "final_temperature": Key(Positive, "beta in the last epoch of a round; it rises from 1."),
    "compat": Key(Literal["pquantml"], "Do as PQuantML does where that differs, to compare with it."),
    # of metrics
    "epsilon": Key(NotNegative, "A weight, or the norm of a group, of at most this counts as absent."),
    "mode": Key(Literal["coarse", "smooth"], "Exact with a smooth gradient, or a smooth mean throughout."),
    "alpha": Key(Positive, "Of the smooth indicator, 1 / units of squared weights; lower reaches larger weights."),
    "of": Key(Literal["params", "view"], "The latent kernels, or those that the forward sees."),
    "per": Key(Literal["model", "layer"], "One number with one multiplier, or one for every kernel."),
    "n": Key(AtLeastOne, "Of every m weights in a row along the input, n may stay."),
    "m": Key(AtLeastOne, "Weights of a block."),
    "reuse": Key(AtLeastOne, "Reuse factor: weights that one multiplier works off."),
    "precision": Key(AtLeastOne, "Bits of a weight."),
    "bram_width": Key(AtLeastOne, "Bits of a memory's word."),
    "unit": Key(Positive, "EBOPs that count as 1; null: those of the unpruned model at 8 bits everywhere.", None),
    "num_patterns": Key(AtLeastOne, "At most so many patterns of a layer."),
    "beta": Key(Fraction, "Share of the kernels that they cover."),
    "distance": Key(Literal["hamming", "valued_hamming", "cosine"], "Of a kernel from a pattern."),
    "block": Key(Block, "Blocks of a dense kernel; null: the positions of a convolution."),
    # of searches
    "ratio": Key(Positive, "Goal: bits of the kept weights / 32 bits of all; either this or ebops."),
    "ebops": Key(Positive, "Goal: effective bit operations of the whole model."),
    "bops": Key(Positive, "Goal: bit operations of the dense model."),
    "size": Key(Positive, "Goal: bits of all weights."),
    "latency": Key(Positive, "Goal: cycles of all layers one after the other."),
    "fitcompress.widths": Key(list[AtLeastOne], "Bit-widths of a kernel, sign included, falling; []: prune only."),
    "widths": Key(list[AtLeastOne], "Candidate bit-widths of every kernel, sign included."),
    "sparsities": Key(list[Fraction], "Zeros / total, rising; []: quantize only."),
    "fitcompress.activations": Key(AtLeastOne, "Bit-width of all activations."),
    "activations": Key(list[AtLeastOne], "Candidate bit-widths of every activation; one value fixes it."),
    "biases": Key(AtLeastOne, "Bit-width of biases, and of BatchNorm's scale and offset."),
    "limit": Key(Positive, "Largest |weight|, for pre-training in a format that holds no more; null: none."),
    "greedy": Key(bool, "Forget the siblings of a node once one of them is chosen; false is A* over all."),
    "approximate": Key(bool, "A quantized node keeps the Fisher information of the node before it until it is chosen."),
    "strength": Key(NotNegative, "Of the heuristic that draws the search towards the goal."),
    "probes": Key(AtLeastOne, "Random vectors of the Hessian's trace."),
    "samples": Key(AtLeastOne, "Training samples that are measured on."),
    "batch_size": Key(AtLeastOne, "Of them at a time."),
    "where": Key(Where, "Only the kernels at this path or regular expression; null: all."),
}  # fmt: skip
"""By name, or by method and name where a name means something else there."""


def arguments_of(factory: Callable) -> dict[str, Any]:
    """{argument: default} of what a section may say; those that `shared` takes are `group_sparsity`'s."""
    own = inspect.signature(factory).parameters.values()
    found = {p.name: p.default for p in own if p.kind is not p.VAR_KEYWORD and p.name not in FILLED | UNSAID}
    if any(p.kind is p.VAR_KEYWORD for p in own):
        shared = arguments_of(metrics.group_sparsity)
        found |= {name: default for name, default in shared.items() if name != "groups"}
    return found


def _default(key: Key, argument: str, given: Any) -> Any:
    """`...` where there is none.  A predicate, which a file can't say, is none."""
    value = given if key.default is ... else key.default
    if value is inspect.Parameter.empty:
        return ...
    if argument == "groups":
        return Groups(name=value)
    return None if callable(value) else list(value) if isinstance(value, tuple) else value


def _section_of(factory: Callable, tag: str, name: str) -> type[Section]:
    """The section of one method; `tag` is the key that says which one it is."""
    method = factory.__name__
    fields: dict[str, Any] = {tag: (Literal[method], method)}
    for argument, default in (arguments_of(factory) | {"where": None}).items():
        key = KEYS.get(f"{method}.{argument}") or KEYS[argument]
        value = _default(key, argument, default)
        fields[argument] = (key.kind | None if value is None else key.kind, Field(value, description=key.text))
    if factory in (metrics.ebops, search.hawq):
        del fields["where"]
    summary = inspect.getdoc(factory) or method
    return create_model(name, __base__=Section, __doc__=summary.split("\n\n")[0], **fields)


def _union(sections: Mapping[str, type[Section]], tag: str) -> Any:
    return Annotated[functools.reduce(operator.or_, sections.values()), Field(discriminator=tag)]


class Own(Section):
    """A metric of one's own."""

    name: Literal["own"] = "own"
    function: str
    """'package.module:function' of (params, view) -> scalar, or a `pq.constrain.Metric`."""


def metric_section(value: Any) -> dict[str, Any]:
    """What the short form of a metric stands for."""
    return {"name": "own", "function": value} if isinstance(value, str) and ":" in value else {"name": value}


SECTIONS: Final = {name: _section_of(factory, "method", name.upper()) for name, factory in METHODS.items()}
MEASURES: Final = {name: _section_of(f, "name", name.title().replace("_", "")) for name, f in METRICS.items()}

FOUND: Final = {name: _section_of(factory, "method", name.upper()) for name, factory in SEARCHES.items()}

if TYPE_CHECKING:
    Pruning = Metric = Search = Any
else:
    Pruning = _union(SECTIONS, "method")
    Search = _union(FOUND, "method")
    Metric = _union({**MEASURES, "own": Own}, "name")


class Constraint(Section):
    """A metric held to a target while training, by a multiplier that is trained with the weights (MDMM)."""

    metric: Annotated[Metric, short(metric_section, Metric | str)]
    """What is held.  Short form: its name alone, or 'package.module:function'."""
    kind: Literal["<=", ">=", "=="]
    """metric <=, >= or == target."""
    target: Float
    """In the metric's units."""
    scale: Positive = 10.0
    """Of the whole penalty, against the loss."""
    damping: NotNegative = 1.0
    """Brings weights and multiplier to rest; with 0 they circle."""
    initial: Float | None = None
    """The multiplier at the start; null: 0."""
    prunes: Annotated[bool | float, BeforeValidator(_prunes)] = True
    """Fine-tuning holds at 0 what the metric counts as absent (PACA: what is off the patterns); a number: weights up to this
    size."""
    compat: Literal["pquantml"] | None = None
    """Do as PQuantML does where that differs, to compare with it."""
    rate: Positive = 1e-3
    """Of the multiplier's advance with compat; without, training.multiplier_learning_rate counts."""
