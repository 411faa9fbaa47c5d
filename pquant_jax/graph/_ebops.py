"""EBOPs by interpretation: a bits array travels beside every value; every product adds the product of its bits.

What each equation costs, and what HGQ2 takes for the same layer, stands in docs/ebops.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pquant_jax import _tree
from pquant_jax._base import KIF, SiteSpec, Tree, View
from pquant_jax._errors import TraceError, did_you_mean
from pquant_jax.graph import _costs
from pquant_jax.graph._batch import TRANSCENDENTAL
from pquant_jax.graph._cones import folded
from pquant_jax.graph._costs import Total
from pquant_jax.graph._interpret import PRODUCTS, Const, Step, bind, contains_product, flatten, nested
from pquant_jax.graph._values import STRUCTURE
from pquant_jax.numerics import lookup_p, mask_p, quantize_p, region_name

_KEEPING = frozenset("max min abs neg site clamp select_n".split())
_SUMS = {"add": "sum", "max": "max", "min": "min"}  # HGQ2's layers of several operands of one kind
_WINDOWS = frozenset({"reduce_window_sum", "reduce_window_max", "reduce_window_min"})


class _Layer(NamedTuple):
    """The product that a value comes from.  positions: (at which HGQ2 counts its bias, of its output)."""

    label: str
    positions: tuple[int, int] = (1, 1)
    factor: float = 1.0


@dataclass(eq=False)
class _Bits:
    """A value and what is known of its bits.

    data: it depends on the input.  name: what to call it.  widths: arrays that broadcast to the value: "bits" and
    "full" (with the sign in every mode) if it is on a grid; "entry" and "entry_full", the widths that entered the table
    it is the result of; "sum", "max" and "min", the smallest width among the operands of such a chain.  layer: the
    product that gave it.  tag: "table" or "edge" for what such a table gave, "peak" and "shifted" for softmax's
    maximum and what it was subtracted from.
    """

    val: Any
    widths: dict[str, Any] = field(default_factory=dict)
    data: bool = False
    name: str = ""
    layer: _Layer | None = None
    tag: str = ""

    @property
    def bits(self) -> Any:
        """Width of every element, None if it is unknown."""
        return self.widths.get("bits")


class _Run(NamedTuple):
    total: Total
    compat: str | None
    parallel: Mapping[str, float]
    sites: frozenset[str]

    def factor(self, label: str, positions: float) -> float:
        """Share of the positions that have hardware of their own."""
        self.total.seen.add(label)
        return self.parallel[label] / positions if self.parallel.get(label, -1) > 0 else 1.0


def ebops(function: Callable, *args: Any, compat: str | None = None, parallel: Mapping[str, float] | None = None) -> jax.Array:
    """Effective bit operations of `function(*args)`: the sum over all products of bits times bits, and over all tables.

    E = sum over multiplications of b_x * b_w with b = relu(k + i + f), times the mask for pruned weights; a table of
    b_x bits costs b_y 2^(b_x - 6) (look-up tables of 6 inputs); bias additions, adders and poolings nothing.  Bits are
    set by `quantize`, cut by `mask`, carried by reshapes, relu and max.  Differentiable in every i and f.  Arguments
    count as data, closed-over arrays as constants.

    Args:
      compat: "hgq2" counts as that package does: no sign bit in WRAP and SAT_SYM, and its terms for biases, sums,
        poolings and tables.
      parallel: {name: positions that are worked off at once}, for products, convolutions and poolings; all by default.
    Raises: TraceError for a product or a table in which the bits of an operand are unknown, and for a loop of products.

    >>> from pquant_jax.numerics import kif, quantize
    >>> w = quantize(jnp.ones((2, 3)), kif(1, 1, 2))
    >>> float(ebops(lambda x, w: quantize(x, kif(1, 2, 1)) @ quantize(w, kif(1, 1, 2)), jnp.ones((1, 2)), w))
    96.0
    """
    return sum(products(function, *args, compat=compat, parallel=parallel).values(), jnp.zeros((), jnp.float32))


def products(
    function: Callable, *args: Any, compat: str | None = None, parallel: Mapping[str, float] | None = None
) -> dict[str, jax.Array]:
    """`ebops` by product and table: a parameter's path, a table's name, else the scope of the operand's `quantize`."""
    values = [_Bits(v, data=True, name=n) for n, v in _tree.flatten(args).items()]
    return _count(function, args, values, compat=compat, parallel=parallel, sites=())


def of_view(
    forward: Callable,
    view: View,
    state: Tree,
    sample: Any,
    specs: Mapping[str, SiteSpec],
    *,
    compat: str | None = None,
    parallel: Mapping[str, float] | None = None,
) -> dict[str, jax.Array]:
    """EBOPs of an instrumented forward, by kernel, product and table.

    The bits of a parameter are those of its format times its mask.
    """

    def widths_of(path: str, leaf: Any) -> dict[str, Any]:
        if path not in view.sites or specs[path].kind not in ("kernel", "bias"):
            return {}
        widths = _costs.widths(view.sites[path], jnp.shape(leaf), compat)
        return {key: w * view.masks[path] for key, w in widths.items()} if path in view.masks else widths

    leaves = [_Bits(v, widths_of(p, v), name=p) for p, v in _tree.flatten(view.model).items()]
    kifs = [_Bits(v) for v in jax.tree.leaves(view.sites)]
    rest = [_Bits(v) for v in jax.tree.leaves(state)]
    data = [_Bits(v, data=True, name="input") for v in jax.tree.leaves(sample)]

    def run(model: Tree, sites: Mapping[str, KIF], state: Tree, x: Any) -> Any:
        return forward(View(model, dict(sites), view.masks), state, x, train=False)[0]

    values = [*leaves, *kifs, *rest, *data]
    return _count(run, (view.model, view.sites, state, sample), values, compat=compat, parallel=parallel, sites=specs)


def _count(
    function: Callable,
    args: tuple,
    values: Sequence[_Bits],
    *,
    compat: str | None,
    parallel: Mapping[str, float] | None,
    sites: Any,
) -> dict[str, jax.Array]:
    if compat not in (None, "hgq2"):
        raise TraceError(f"compat is {compat!r}, expected 'hgq2' or None")
    program = flatten(jax.make_jaxpr(function)(*args), lambda eqn: region_name(eqn) is not None)
    run = _Run(Total(), compat, dict(parallel or {}), frozenset(sites))
    env: dict[int, _Bits] = dict(zip(program.inputs, values, strict=True))
    constants = folded(program)
    env.update((slot, _Bits(value)) for slot, value in constants.items())
    for step in program.steps:
        if step.outs and all(s in constants for s in step.outs):
            continue
        ins = [_Bits(v.value) if isinstance(v, Const) else env[v] for v in step.ins]
        _check_loop(step.eqn, ins)
        outs = bind(step.eqn, [v.val for v in ins])
        name = next((v.name for v in ins if v.name), "")
        made = [_Bits(o, data=any(v.data for v in ins), name=name) for o in outs]
        _rule(run, step, ins, made)
        env.update(zip(step.outs, made, strict=True))
    for label in run.parallel:
        if label not in run.total.seen:
            known = sorted(run.total.seen)
            raise TraceError(f"parallel: nothing with positions is named {label!r}; {did_you_mean(label, known)}")
    return run.total.sums()


def _check_loop(eqn: Any, ins: Sequence[_Bits]) -> None:
    """What is left of control flow runs as often as the data say, and so do the products in it."""
    if region_name(eqn) is None and any(v.data for v in ins) and any(contains_product(sub) for sub in nested(eqn)):
        what = eqn.primitive.name
        raise TraceError(f"products inside {what!r} can't be counted; unroll it (a Python loop over the steps, or scan)")


def _rule(run: _Run, step: Step, ins: list[_Bits], made: list[_Bits]) -> None:
    """Add to the total what the equation costs, and write into `made` what is known of its results."""
    eqn, out = step.eqn, made[0] if made else None
    name = eqn.primitive.name
    if out is None:
        return
    if eqn.primitive is quantize_p:
        _quantized(run, step, ins, out)
    elif eqn.primitive is mask_p:
        out.widths = {key: w * jnp.broadcast_to(ins[1].val, jnp.shape(w)) for key, w in ins[0].widths.items()}
    elif eqn.primitive is lookup_p:
        _read(run, step, ins, out)
    elif region_name(eqn) is not None:
        _region(eqn, ins, out)
    elif name in STRUCTURE or name == "split":
        _moved(eqn, ins, made)
    elif not out.data:
        return
    elif name in PRODUCTS or name in ("mul", "div", "square", "integer_pow"):
        _product(run, eqn, ins, out)
    elif name in TRANSCENDENTAL and (ins[0].bits is not None or "entry" in ins[0].widths):
        _enter(ins[0], out, "table")
    else:
        _combined(run, eqn, ins, out)


def _quantized(run: _Run, step: Step, ins: list[_Bits], out: _Bits) -> None:
    """The grid sets the bits; a table in front of it is charged now that both its widths are known."""
    x = ins[0]
    k, i, f = (v.val for v in ins[1:])
    fmt = KIF(k, i, f, step.eqn.params["rounding"], step.eqn.params["overflow"])
    out.widths = _costs.widths(fmt, jnp.shape(x.val), run.compat)
    named = _site_of(step.scope, run.sites)
    out.name = named or x.name
    if "entry" in x.widths:
        amount, scale = _costs.table(x.widths, out.widths, x.tag, run.compat)
        run.total.add(x.name or named or "table", amount, scale)
        out.tag, out.name = x.tag, named or f"{x.name}/table"
    if x.tag == "shifted" and run.compat == "hgq2":
        run.total.add(out.name or "softmax", jnp.sum(out.bits))


def _site_of(scope: str, sites: frozenset[str]) -> str:
    """The site that a scope names; without sites the scope itself."""
    if not sites or scope in sites:
        return scope
    return max((s for s in sites if scope.endswith(f"/{s}")), key=len, default="")


def _read(run: _Run, step: Step, ins: list[_Bits], out: _Bits) -> None:
    """`lookup`: a table that is already built; its codes say how wide its entries are."""
    x, (k, i, f, codes, _, which) = ins[0], (v.val for v in ins[1:])
    entry = _costs.widths(KIF(k, i, f), jnp.shape(x.val), run.compat) if x.bits is None else x.widths
    low, high = jnp.min(codes, 1), jnp.max(codes, 1)
    out.widths = {key: w[which] for key, w in _costs.code_widths(low, high).items()}
    out.widths = {key: jnp.broadcast_to(w, jnp.shape(x.val)) for key, w in out.widths.items()}
    amount, scale = _costs.table({f"entry{key[4:]}": entry[key] for key in ("bits", "full")}, out.widths, "table", run.compat)
    run.total.add(_site_of(step.scope, run.sites) or x.name or "table", amount, scale)
    out.tag = "table"


def _region(eqn: Any, ins: list[_Bits], out: _Bits) -> None:
    """A declared table; with parameters inside it is an edge of a layer of trained tables."""
    x = next((v for v in ins if v.data), None)  # what a function closes over comes in front of its arguments
    if x is None:
        return
    label = region_name(eqn) or ""
    if x.bits is None:
        raise TraceError(f"the table {label!r}: the bits of its input of shape {np.shape(x.val)} are unknown; quantize it")
    _enter(x, out, "edge" if any(jnp.ndim(v.val) for v in ins if v is not x) else "table")
    out.name = label


def _enter(x: _Bits, out: _Bits, tag: str) -> None:
    known = x.widths
    out.widths = {"entry": known.get("bits", known.get("entry")), "entry_full": known.get("full", known.get("entry_full"))}
    out.tag = x.tag if "entry" in known else tag
    out.name = x.name


def _moved(eqn: Any, ins: list[_Bits], made: list[_Bits]) -> None:
    """Reshapes and the like move widths as they move values."""
    name = eqn.primitive.name
    first, rest = ins[0], [v.val for v in ins[1:]]
    for out in made:
        out.layer, out.tag = first.layer, first.tag
    if name == "concatenate":
        keys = set.intersection(*(set(v.widths) for v in ins))
        made[0].widths = {key: bind(eqn, [v.widths[key] for v in ins])[0] for key in keys}
        return
    if name == "pad":
        rest = [jnp.zeros_like(rest[0])]  # padding is 0, or a constant that a maximum never takes
    if name == "gather" and ins[1].data and not first.data:  # a row chosen by the data: as wide as the widest row
        for key, w in first.widths.items():
            made[0].widths[key] = jnp.broadcast_to(jnp.max(w), jnp.shape(made[0].val))
        return
    for key, w in first.widths.items():
        w = jnp.broadcast_to(w, jnp.shape(first.val)).astype(jnp.float32)
        for out, moved in zip(made, _bind_as(eqn, w, rest), strict=True):
            out.widths[key] = moved


def _bind_as(eqn: Any, w: Any, rest: Sequence[Any]) -> list[Any]:
    return [w] if eqn.primitive.name == "convert_element_type" else bind(eqn, [w, *(jnp.asarray(v) for v in rest)])


def _product(run: _Run, eqn: Any, ins: list[_Bits], out: _Bits) -> None:
    name = eqn.primitive.name
    if name in ("mul", "div"):
        scalar = [n for n, v in enumerate(ins) if not v.data and v.bits is None and _one_number(v)]
        if scalar and (name == "mul" or scalar[0] == 1):
            # a scalar constant: a shift, or one constant multiplier that the lowering lints
            kept = ins[1 - scalar[0]]
            out.widths = {key: w for key, w in kept.widths.items() if key not in _SUMS.values()}
            out.tag, out.layer = kept.tag, kept.layer
            return
        if name == "div":  # by something that varies: no product, and no table either unless it is declared one
            if ins[0].data is False and ins[1].bits is not None and jnp.ndim(ins[0].val) == 0:
                _enter(ins[1], out, "table")
            return
        _add_product(run, eqn, ins, out, jnp.multiply)
    elif name in PRODUCTS:
        _add_product(run, eqn, ins, out, lambda a, b: bind(eqn, [a, b])[0])
    else:
        power = 2 if name == "square" else eqn.params["y"]
        if power == 1:
            out.widths = ins[0].widths
        elif power < 0:
            if ins[0].bits is not None:
                _enter(ins[0], out, "table")
        elif power > 1:  # x^n = x * x^(n-1), and x^(n-1) is (n-1) times as wide
            _add_product(run, eqn, [ins[0], ins[0]], out, lambda a, b: a * b * (power * (power - 1) / 2))


def _one_number(v: _Bits) -> bool:
    """A scalar, or a constant array that holds one number: the zeros that a loop starts from."""
    if jnp.ndim(v.val) == 0:
        return True
    array = None if isinstance(v.val, Tracer) or v.name else np.asarray(v.val)
    return array is not None and array.size > 0 and bool((array == array.flat[0]).all())


def _add_product(run: _Run, eqn: Any, ins: list[_Bits], out: _Bits, multiply: Callable) -> None:
    unknown = [v for v in ins[:2] if v.bits is None]
    label = next((v.name for v in ins[:2] if not v.data and v.name), None) or next((v.name for v in ins[:2] if v.name), "product")
    if unknown:
        what = f"{unknown[0].name!r} " if unknown[0].name else ""
        raise TraceError(
            f"{eqn.primitive.name} of {label!r}: the bits of operand {what}of shape {np.shape(unknown[0].val)} are unknown; "
            "quantize it (is a quantizer in the chain?)"
        )
    places, per_output = _costs.positions(eqn, [v.data for v in ins])
    factor = run.factor(label, places)
    run.total.add(label, jnp.sum(multiply(ins[0].bits, ins[1].bits)), factor)
    # HGQ2 gives a convolution's bias every position of the input, whatever is worked off at once
    out.layer = _Layer(label, per_output, 1.0 if eqn.primitive.name == "conv_general_dilated" else factor)


def _combined(run: _Run, eqn: Any, ins: list[_Bits], out: _Bits) -> None:
    """Sums, extrema and poolings: adders, which only HGQ2's convention charges."""
    name = eqn.primitive.name
    data = [v for v in ins if v.data]
    out.layer = next((v.layer for v in data if v.layer is not None), None) if name in ("add", "sub") else None
    if name in _KEEPING:
        known = [v for v in ins if v.bits is not None or "entry" in v.widths]
        if len(known) == 1 and (name == "select_n" or all(jnp.ndim(v.val) == 0 for v in ins if v is not known[0])):
            out.widths = known[0].widths if name != "select_n" or _others_constant(ins, known[0]) else {}
            out.tag = known[0].tag
    if name in ("add", "sub") and len(data) == 1 and "entry" in data[0].widths and all(jnp.ndim(v.val) == 0 for v in ins[1:]):
        out.widths, out.tag = data[0].widths, data[0].tag  # f(x) + c is a table as well
    if name in ("reduce_max", "argmax"):
        out.tag = "peak"
    if name == "sub" and any(v.tag == "peak" for v in ins) and any(v.bits is None and v.tag != "peak" for v in ins):
        out.tag = "shifted"
    if run.compat == "hgq2":
        _adders(run, eqn, ins, out)


def _others_constant(ins: list[_Bits], known: _Bits) -> bool:
    return all(not v.data or v is known for v in ins[1:])


def _adders(run: _Run, eqn: Any, ins: list[_Bits], out: _Bits) -> None:
    """What HGQ2's layers of sums, extrema, poolings and biases cost, where every operand has a grid."""
    name, data = eqn.primitive.name, [v for v in ins if v.data]
    label = next((v.name for v in data if v.name), name)
    if name in ("add", "sub") and len(data) == 1 and len(ins) == 2:
        other = next(v for v in ins if not v.data)
        if data[0].layer is not None and other.bits is not None:
            layer, size = data[0].layer, jnp.broadcast_to(other.bits, jnp.shape(out.val))
            run.total.add(layer.label, jnp.sum(size) / layer.positions[1] * layer.positions[0], layer.factor)
    elif name in _SUMS and len(data) == 2:
        kind = _SUMS[name]
        least = [v.widths.get(kind, v.bits) for v in data]
        if all(w is not None for w in least):  # sum of all but the smallest, as far as the chain goes
            run.total.add(label, jnp.sum(jnp.maximum(*least)), _costs.ADDER if kind == "sum" else 1.0)
            out.widths = {kind: jnp.minimum(*least)}
    elif name == "sub" and len(data) == 2 and all(v.bits is not None for v in data):
        run.total.add(label, jnp.sum(jnp.maximum(data[0].bits, data[1].bits)))
    elif name == "reduce_sum" and ins[0].bits is not None and ins[0].tag != "edge":
        bits, axes = ins[0].bits, tuple(eqn.params["axes"])
        amount = jnp.sum(bits) - jnp.sum(jnp.min(bits, axes))
        run.total.add(label, amount, 1.0 if ins[0].tag == "table" else _costs.ADDER)
    elif name in ("reduce_max", "reduce_min") and ins[0].bits is not None:
        run.total.add(label, jnp.sum(ins[0].bits))
    elif name in _WINDOWS and ins[0].bits is not None:
        run.total.add(label, jnp.sum(ins[0].bits), run.factor(label, _costs.window_positions(eqn)))
