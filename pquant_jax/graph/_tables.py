"""Functions that hardware looks up, in one interpretation of a model: cones, declared regions, quotients and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pquant_jax._base import KIF, Table
from pquant_jax._errors import LoweringError, TraceError
from pquant_jax.graph._sites import Run, at_site, count, format_of, home, joined, operand
from pquant_jax.graph._values import LARGE, Value, expand
from pquant_jax.numerics import MAX_TABLE_BITS, build_table, code_grid, lookup, power_of_two, region

_TINY: Final = 2.0**-24  # a divisor below it counts as this: 1/0 has no gradient that survives a clipped output
_VANISH: Final = frozenset({"exp", "exp2"})  # functions that are 0 at minus infinity


def table(run: Run, label: str, x: Value, function: Callable[[Any], Any], original: Value, *, declared: bool = False) -> Value:
    """`function(x)` as a table: quantize(function(quantize(x))), or the entries that the view holds.

    original: what the model's own equations give, for a view that has no format here.  declared: label is its whole name.
    """
    masked, x = x.masked, x if x.masked is None else x.masked[1]
    if masked is not None and label not in _VANISH:
        raise TraceError(
            f"a mask sends values to minus infinity in front of {label!r}; only exp gives 0 there (softmax). "
            "Mask the result instead: jnp.where(mask, y, 0)"
        )
    name = count(run, label if declared else joined(home(run, x), label))
    q = at_site(run, x, f"{name}/input", "input", shared=True, max_bits=MAX_TABLE_BITS)
    source, site = run.view.sites.get(q.site or ""), f"{name}/table"
    run.fed[name] = q.site or ""
    y = original.val
    if run.quantizes(q.site or "", site):
        built = run.view.tables.get(name)
        with jax.named_scope(name):
            y = region(function, name)(q.val) if built is None or source is None else _read(run, q, built)
    if run.tables is not None and source is not None:
        run.tables[name] = _on_every_code(function, source, q, name)
    made = Value(y, original.batch, original.signed, paths=x.paths)
    made = at_site(run, made, site, "table", done=name in run.view.tables)
    return made if masked is None else _hidden(run, made, masked[0], original)


def _read(run: Run, q: Value, built: Table) -> Any:
    assert q.site is not None
    fmt = format_of(run, q.site, q)
    assert fmt is not None
    return lookup(q.val, fmt, built._replace(which=expand(built.which, q.batch, jnp.ndim(q.val))))


def _hidden(run: Run, y: Value, keep: Value, original: Value) -> Value:
    """0 outside of the mask, still on its grid."""
    quantized = run.quantizes(y.site or "")
    value = jnp.where(keep.val, y.val, jnp.zeros((), y.val.dtype)) if quantized else original.val
    made = Value(value, y.batch, y.signed, paths=y.paths)
    made.on_grid = made
    return made


def _on_every_code(function: Callable[[Any], Any], fmt: KIF, q: Value, name: str) -> Any:
    """The function on every code of its input's format, (entries, *site shape)."""
    assert q.batch is not None
    shape, batch = list(jnp.shape(q.val)), q.batch
    del shape[batch]

    def one(codes: Any) -> Any:
        return jnp.squeeze(function(jnp.expand_dims(codes, batch)), batch)

    return jax.vmap(one)(jnp.asarray(code_grid(fmt, tuple(shape), name), jnp.float32))


def built_tables(values: dict[str, Any], inputs: dict[str, str], specs: dict, sites: dict[str, KIF]) -> dict[str, Table]:
    """Integer tables from what the functions give on every code.  inputs: {table: the site in front of it}."""
    made = {}
    for name, found in values.items():
        site = f"{name}/table"
        if site not in sites:
            raise LoweringError(f"the table {name!r} has no format for its output; add a quantizer for the site {site!r}")
        array = np.asarray(found)
        made[name] = build_table(lambda _, array=array: array, sites[inputs[name]], sites[site], specs[site].shape, name)
    return made


def quotient(run: Run, ins: list[Value], original: Value) -> Value:
    """a / b of two activations: a * table(1 / b), with the table in front of what broadcasts b."""
    a, b = ins
    spread, base = None, b
    if b.spread is not None and b.spread[0].batch is not None:
        base, spread = b.spread[0], b.spread[1]
    inverse = Value(1 / jnp.where(base.val == 0, 1, base.val), base.batch, base.signed, paths=base.paths)
    r = table(run, "reciprocal", base, _reciprocal, inverse)
    r_val = r.val if spread is None else spread(r.val)
    q = operand(run, a, "div") if a.batch is not None else a
    if not run.quantizes(r.site or "", q.site or ""):
        return original
    return Value(q.val * r_val, original.batch, original.signed, paths=original.paths)


def _reciprocal(v: Any) -> Any:
    return 1 / jnp.where(jnp.abs(v) < _TINY, jnp.asarray(_TINY, v.dtype), v)


def masked_choice(eqn: Any, ins: list[Value], made: Value) -> None:
    """`where(keep, x, -1e30)`: remember what is hidden; the number itself never becomes a fixed-point value."""
    if len(ins) != 3:
        return
    for hidden, kept in ((1, 2), (2, 1)):
        if _is_minus_infinity(ins[hidden]) and ins[kept].batch is not None:
            keep = ins[0].val if kept == 2 else jnp.logical_not(ins[0].val)
            made.masked = (Value(jnp.broadcast_to(keep, jnp.shape(made.val)), ins[0].batch), ins[kept])


def masked_sum(name: str, ins: list[Value], made: Value) -> None:
    """Minus infinity plus or minus anything is minus infinity; a constant of zeros and minus infinities is a mask itself."""
    side = next((n for n, v in enumerate(ins) if v.masked is not None), None)
    if side is not None and (name == "add" or side == 0):
        keep, plain = ins[side].masked or (ins[side], ins[side])
        others = [plain.val if n == side else v.val for n, v in enumerate(ins)]
        value = others[0] + others[1] if name == "add" else others[0] - others[1]
        paths = plain.paths | ins[1 - side].paths
        made.masked = (keep, Value(value, made.batch, True, paths=paths))
        return
    if name != "add":
        return
    for side in (0, 1):
        bias, x = ins[side], ins[1 - side]
        if bias.batch is None and not bias.paths and x.batch is not None and not isinstance(bias.val, Tracer):
            hidden = np.asarray(bias.val) <= -LARGE
            if hidden.any():
                rest = np.where(hidden, 0, np.asarray(bias.val)).astype(np.float32)
                value = Value(x.val + rest, x.batch, True, paths=x.paths) if rest.any() else x
                made.masked = (Value(jnp.broadcast_to(~hidden, jnp.shape(made.val))), value)


def _is_minus_infinity(v: Value) -> bool:
    if v.batch is not None or v.paths or isinstance(v.val, Tracer):
        return False
    array = np.asarray(v.val)
    return array.dtype.kind == "f" and bool(array.size) and bool((array <= -LARGE).all())


def masked_maximum(run: Run, eqn: Any, x: Value, original: Value) -> Value:
    """The maximum over what the mask keeps: elsewhere the lowest value that the site of x has."""
    assert x.masked is not None
    keep, plain = x.masked
    q = at_site(run, plain, f"{joined(home(run, plain), 'masked')}/input", "input", shared=True)
    fmt = format_of(run, q.site or "", q)
    x.masked = (keep, q)
    if fmt is None:
        return original
    low = -jnp.asarray(fmt.k) * power_of_two(jnp.round(jnp.asarray(fmt.i)), q.val.dtype)
    value = jnp.where(keep.val, q.val, jax.lax.stop_gradient(jnp.broadcast_to(low, jnp.shape(q.val))))
    return Value(jnp.max(value, axis=tuple(eqn.params["axes"])), original.batch, True, paths=original.paths)
