"""Level 0: the values that every other module passes around.  Data only, no numerics."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

Tree = Any  # a pytree of arrays
State = Any  # a pytree of arrays whose structure and dtypes never change


class Stage(enum.IntEnum):
    """The three stages of a plan.  Passed as a traced int32, so that one executable serves all of them."""

    PRETRAIN = 0
    TRAIN = 1
    FINETUNE = 2


class Event(enum.IntEnum):
    """What `Transform.boundary` is told, between epochs.  Passed as a traced int32."""

    PRE_EPOCH = 0
    POST_EPOCH = 1
    POST_PRETRAIN = 2
    POST_ROUND = 3
    PRE_FINETUNE = 4
    CALIBRATE = 5  # comes with stats= of a whole data set


@dataclass(frozen=True)
class KIF:
    """A fixed-point format: k sign bits (0 or 1), i integer bits without the sign, f fractional bits, per element.

    Representable: integers n times 2^-f with -k * 2^(i+f) <= n <= 2^(i+f) - 1; only 0 where k + i + f <= 0.  i and f
    may be negative and may be trained: the effective value of a fractional entry is its round-half-even.
    k, i and f broadcast to the tensor they describe; `rounding` and `overflow` are static.
    """

    k: Any
    i: Any
    f: Any
    rounding: str = "RND"
    overflow: str = "SAT"


jax.tree_util.register_dataclass(KIF, data_fields=["k", "i", "f"], meta_fields=["rounding", "overflow"])


class Params(NamedTuple):
    """What is trained: the model's parameters and, per transform, its trainables (thresholds, bits, multipliers)."""

    model: Tree
    extra: dict[str, Tree]


class Table(NamedTuple):
    """Integer tables of one site: element e of the value v gives codes[which[e], v * 2^f - lowest] * 2^-f_out[which[e]].

    codes: int32 (tables, entries), entries from the lowest code of the input's format on.  f: int32 (tables,),
    fractional bits of the entries.  which: int32 of the site's shape, the row of every element.
    """

    codes: Any
    f: Any
    which: Any


class View(NamedTuple):
    """What the forward sees: masked and quantized parameters, the format of every site, the mask of every pruned leaf.

    `sites` has one `KIF` per activation site and per quantized parameter path; `masks` has one array in [0, 1] per
    pruned parameter path.  Formats and masks ride along because a product's bits can't be read off its values.
    `tables` has one `Table` per table site once they are built (`inst.tables`): the forward then reads them instead of
    computing the function, which is what makes it equal to hardware bit for bit.
    """

    model: Tree
    sites: dict[str, KIF]
    masks: dict[str, jax.Array]
    tables: dict[str, Table] = {}  # never written to: every change of a view is a new one


@dataclass(frozen=True)
class SiteSpec:
    """One place where a value is put on a fixed-point grid.

    shape: per sample for activations, the array's for parameters.  kind: "input" (an operand of a product or of a
    table), "table" (what a table gives), "output" (of the model), "kernel", "bias", or "scale" and "offset" (derived
    from parameters or constants, such as a fused BatchNorm).  signed: can it be negative.
    channel_axes: the axes that "per channel" keeps apart: a kernel's output axes, an activation's last.
    max_bits: the widest format the hardware takes there (k + i + f), 0 for no limit: a table has 2^bits entries.
    format: the format that the model itself asks for at this place (direct style), None for the quantizer's default.
    """

    shape: tuple[int, ...]
    kind: str
    signed: bool = True
    channel_axes: tuple[int, ...] = ()
    max_bits: int = 0
    format: Any = None


@dataclass(frozen=True)
class AxisRole:
    """Which axes of a kernel face its input and its output, and the sites on both sides.

    Read from the product's dimension numbers, so that "output channel" is axis 1 of a linen kernel (in, out) and
    axis 0 of an equinox weight (out, in).  positions: those of in_axes that a convolution slides over.
    """

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    input_site: str
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """The declared format of an input port: fixed<k+i+f, k+i>.  Data are put on it before they enter (saturating)."""

    k: int = 1
    i: int = 5
    f: int = 10


class Transform(NamedTuple):
    """A compression method as a value: pure functions and nothing else.

    name      key of the method's trainables in `Params.extra` and of its state in a chain.
    attach    (model_params) -> Params: adds the trainables the method needs.
    init      (params) -> State: hyperparameters are copied into `state.hyper` as arrays.
    apply     (params, state) -> (view, state): masked and quantized view, differentiable; the state comes back as is.
    step      (params, state, *, view, stage, stats, previous, **extra) -> (params, state): after each update.
    boundary  (params, state, *, view, event, epoch, epochs, stage, stats, **extra) -> (params, state): between epochs.
    penalty   (params, state, view) -> scalar added to the loss; 0 if the method has none.
    labels    (params) -> tree like params of "weights" | "bits" | "thresholds" | "duals".
    needs     statistics it wants in `step(stats=...)`; only those are computed (see `Stats`).
    formats   {site: format to start from, and where it was said} of a quantizer, for people to read (`pq.explain`).

    `view` in `step` and `boundary` is the view that enters the method, `previous` the parameters before the update.
    """

    name: str
    attach: Callable[[Tree], Params]
    init: Callable[[Params], State]
    apply: Callable[[Params, State], tuple[View, State]]
    step: Callable[..., tuple[Params, State]]
    boundary: Callable[..., tuple[Params, State]]
    penalty: Callable[[Params, State, View], jax.Array]
    labels: Callable[[Params], Params]
    needs: frozenset[str] = frozenset()
    formats: Mapping[str, Any] = {}  # never written to


Stats = Mapping[str, Mapping[str, Any]]
"""Statistics of one batch by kind.

"range": {site: (low, high)}, arrays of the site's per-sample shape.  "format": {site: (i, f)} as a calibration chose
them, of the format's shape.  By kernel, arrays that broadcast against it:
"square": E[x^2] of its inputs; "active": the fraction of its outputs, after bias or BatchNorm, above 0; "gradient": of the loss.
"""
