"""What a configuration may hold: one pydantic model per section, data only.

Numbers may be written as `1e-5`, which YAML 1.1 reads as a text.  The text below a field is its description in the JSON
schema (`pquant-jax schema`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pquant_jax.config._fields import AtLeastOne, Count, NotNegative, Positive, Section, Sign, Where, number, short, whole
from pquant_jax.config._hardware import Hardware
from pquant_jax.config._methods import Constraint, Pruning, Search, metric_section
from pquant_jax.config._quantizers import Quantization


def _section(key: str) -> Callable[[Any], Any]:
    return lambda value: {key: value}


def _only_training(epochs: Any) -> Any:
    return {"pretrain": 0, "train": epochs, "finetune": 0}


SHORT: Final[Mapping[str, Callable[[Any], Any]]] = {
    "model": _section("build"),
    "data": _section("source"),
    "training.epochs": _only_training,
    "training.learning_rate": _section("start"),
    "training.bits_learning_rate": _section("start"),
    "training.threshold_learning_rate": _section("start"),
    "training.multiplier_learning_rate": _section("start"),
    "pruning.groups": _section("name"),
    "constraints.metric": metric_section,
    "constraints.metric.groups": _section("name"),
    "hardware.hls": _section("backend"),
}
"""The sections that may be written as one value, and what it stands for."""


class Model(Section):
    """What is trained.  Short form: the name alone."""

    build: str = "mlp"
    """A name of `pquant_jax.zoo`, or 'package.module:function', found beside the configuration, in the current directory or
    installed.  It returns a linen, nnx or equinox module or a `pq.Model`."""
    args: dict[str, Any] = {}
    """Its keyword arguments.  `outputs`, `seed` and `x` (one batch of zeros) are filled in where it takes them and they are
    left out."""
    split: list[Where] = []
    """A value that several layers read has one quantize site; where a rule matches the site's name each use gets its own."""


class Data(Section):
    """What it is trained on.  Short form: the source alone."""

    source: str = "jets"
    """'jets', 'particles' or another name that `pquant_jax.data.load` knows, a path that ends in .npz or .csv, or
    'package.module:function', which returns a `pquant_jax.data.Dataset` or a dict of arrays."""
    n: AtLeastOne | None = None
    """Only the first n samples, taken from the three splits in proportion."""
    standardise: bool = False
    """x <- (x - mean) / std per column, for files and functions; the jets always are."""


class Input(Section):
    """The input port, fixed<k+i+f, k+i>; data are rounded and saturated to it before they enter."""

    k: Sign = 1
    """Sign bit, 0 or 1."""
    i: Annotated[int, Field(ge=-16, le=16), BeforeValidator(whole)] = 5
    """Integer bits without the sign."""
    f: Annotated[int, Field(ge=-16, le=24), BeforeValidator(whole)] = 10
    """Fractional bits."""

    @model_validator(mode="after")
    def _has_bits(self) -> Self:
        if self.k + self.i + self.f <= 0:
            raise ValueError(f"a port with bits: k + i + f > 0, got {self.k + self.i + self.f}")
        return self


class Epochs(Section):
    """How long each stage is.  Short form: one number, which trains without pre-training and fine-tuning."""

    pretrain: Count = 10
    """Epochs of dense training with the starting formats."""
    train: Count = 100
    """Epochs per round that prune and that train bit-widths."""
    finetune: Count = 20
    """Epochs with masks (and bit-widths, unless quantization.freeze is false) held still."""


class Rate(Section):
    """A learning rate over all optimizer steps of all stages.  Short form: one number, a constant rate."""

    start: Positive
    """The first step's."""
    end: NotNegative | None = None
    """The last step's, for cosine and linear; 0 if left out."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    @model_validator(mode="after")
    def _end_is_used(self) -> Self:
        if self.end is not None and self.schedule == "constant":
            raise ValueError("no 'end' with schedule 'constant': write schedule: cosine or linear")
        return self


Schedule = Annotated[Rate, short(_section("start"), Rate | float)]
OwnSchedule = Annotated[Rate | None, short(lambda v: v if v is None else {"start": v}, Rate | float | None)]


class PNorm(Section):
    """Decay of the kernels towards small |w|^p behind any optimizer; the float baseline is trained without."""

    p: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False), BeforeValidator(number)] = 1.0
    """Of the norm; below 2 small weights vanish, 2 is ordinary decay."""
    strength: NotNegative = 1e-2
    """Larger prunes more."""


class Training(Section):
    """The plan: pretrain -> rounds x train -> finetune, and how a step is made."""

    epochs: Annotated[Epochs, short(_only_training, Epochs | int)] = Epochs()
    rounds: AtLeastOne = 1
    """How often the training stage is repeated."""
    rewind: Literal["never", "every-round", "post-training-stage"] = "never"
    """When the kernels go back to what they were before epoch save_epoch of the first round."""
    save_epoch: Count = 0
    batch_size: AtLeastOne = 1024
    shuffle: bool = True
    """A new order of the samples every epoch."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: Schedule = Rate(start=1e-3)
    bits_learning_rate: OwnSchedule = None
    """Of the trained bit-widths; null: as the weights'."""
    threshold_learning_rate: OwnSchedule = None
    """Of the pruning thresholds; null: as the weights'."""
    multiplier_learning_rate: Schedule = Rate(start=1e-2)
    """Of the constraints' multipliers, which ascend by plain gradient."""
    weight_decay: NotNegative = 0.0
    """Decoupled, of the weights only; for adamw."""
    pnorm_decay: PNorm | None = None
    init: str | None = None
    """Start from trained parameters: an .npz with one array per parameter path, or a run's final.npz or float.npz."""
    checkpoint_every: Count = 0
    """Epochs between checkpoints; 0: one per stage, and one when the run is interrupted."""
    float_baseline: bool = True
    """Also train the uncompressed model, for as many epochs as all stages together, to compare with."""

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay 0 with optimizer {self.optimizer!r}, or optimizer 'adamw'")
        return self


class Experiment(Section):
    """One experiment.  Everything has a default; what the run used in the end is in its config.yaml."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the run directory: letters, digits, '.', '_', '-'.  Default: the file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31), BeforeValidator(whole)] = 0
    """Of initial parameters, shuffling, dropout and random test vectors."""
    folders: list[str] = []
    """Where own modules and files are looked for besides the current directory; the configuration's folder is added."""
    model: Annotated[Model, short(_section("build"), Model | str)] = Model()
    data: Annotated[Data, short(_section("source"), Data | str)] = Data()
    task: Literal["classification", "regression"] = "classification"
    loss: str | None = None
    """cross_entropy, squared_error, absolute_error, or 'package.module:function' of (prediction, target) -> one value per
    sample.  Default: cross_entropy, or squared_error for regression."""
    metric: str | None = None
    """accuracy, mse, mae, or 'package.module:name' of a `pq.Metric`.  Default: accuracy, or mse for regression."""
    input: Input = Input()
    training: Training = Training()
    pruning: Pruning | None = None
    constraints: list[Constraint] = []
    """What training holds to a target besides."""
    quantization: Quantization | None = None
    search: Search | None = None
    """What chooses masks and bit-widths when pre-training ends; the other epochs train on with them.  `quantization` is then
    the format of pre-training alone; null: unquantized."""
    order: Literal["prune_then_quantize", "quantize_then_prune"] = "prune_then_quantize"
    """Which of the two sees the other's result."""
    hardware: Hardware = Hardware()

    @model_validator(mode="after")
    def _search_has_its_place(self) -> Self:
        if self.search is not None and (self.pruning is not None or self.constraints):
            raise ValueError("no pruning and no constraints with a search: it finds the masks, and the rest trains on with them")
        if self.search is not None and not self.training.epochs.pretrain and self.training.init is None:
            raise ValueError("training.epochs.pretrain of 1 or more, or training.init: a search needs trained weights")
        return self


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors that complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Experiment.model_json_schema(mode="validation")}
