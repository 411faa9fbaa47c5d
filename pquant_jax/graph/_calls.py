"""Equations that hold other jaxprs: calls are inlined, loops unrolled, branches that are known taken; and how to bind any."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from pquant_jax._errors import TraceError
from pquant_jax.numerics import rebind, site_p

INLINE: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
PRODUCTS: Final = frozenset({"dot_general", "conv_general_dilated"})
MAX_EQUATIONS: Final = 50_000  # of an unrolled loop; longer ones stay loops
MAX_STEPS: Final = 1_000  # of a while, which is run once to count them
_HERE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PACKAGES: Final = tuple(sysconfig.get_paths()[k] for k in ("purelib", "platlib", "stdlib"))


class Unrolled(NamedTuple):
    """A loop or a branch as straight code.

    operands: which operands of the equation it takes.  carries: (operand, output): the carry before and after step 1;
    those outputs follow the equation's own.
    """

    closed: ClosedJaxpr
    operands: tuple[int, ...]
    carries: tuple[tuple[int, int], ...] = ()


def inner(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The jaxpr and constants of a call-like equation, else None."""
    key = INLINE.get(eqn.primitive.name)
    if key is None:
        return None
    sub = eqn.params[key]
    return (sub.jaxpr, sub.consts) if isinstance(sub, ClosedJaxpr) else (sub, ())


def nested(eqn: Any) -> list[Jaxpr]:
    """Every jaxpr among an equation's parameters: calls, loop bodies, branches."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                found.append(item.jaxpr if isinstance(item, ClosedJaxpr) else item)
    return found


def contains_product(jaxpr: Jaxpr) -> bool:
    """Does the jaxpr, or one nested in it, hold a product or a named site?"""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in PRODUCTS or eqn.primitive is site_p:
            return True
        if any(contains_product(sub) for sub in nested(eqn)):
            return True
    return False


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Bind the equation's primitive on concrete or traced values; our own primitives get their gradient rule back.

    What is traced here keeps the model's line, so that a later error can name it.
    """
    with source_info_util.user_context(eqn.source_info.traceback):
        ours = rebind(eqn.primitive, tuple(values), eqn.params)
        if ours is not None:
            return [ours]
        # a custom_jvp_call keeps its rule this way; the functions come apart from the parameters before jax 0.10
        made = eqn.primitive.get_bind_params(eqn.params)
        functions, params = made if isinstance(made, tuple) else ((), made)
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def model_line(eqn: Any) -> str:
    """`model.py:12`: the model's line that an equation comes from; "" if its traceback was not kept.

    The innermost frame outside of this package, of installed ones and of Python's own.
    """
    for frame in getattr(eqn.source_info.traceback, "frames", ()):
        path = os.path.abspath(frame.file_name)
        if not frame.file_name.startswith("<") and not path.startswith((_HERE, *_PACKAGES)):
            return f"{frame.file_name}:{frame.line_num}"
    return ""


def called_from(eqn: Any, caller: Any) -> Any:
    """`eqn` of a library's function with the traceback of its call: the function was traced where it was called first."""
    return eqn if caller is None else eqn.replace(source_info=eqn.source_info.replace(traceback=caller))


def library_caller(eqn: Any, jaxpr: Jaxpr, caller: Any) -> Any:
    """The traceback that the equations of a called jaxpr get, None if they have their own: the model's code."""
    name = getattr(getattr(jaxpr, "debug_info", None), "func_filename", None) or ""
    return (eqn.source_info.traceback if caller is None else caller) if name.startswith(_PACKAGES) else None


def at_line(eqn: Any) -> str:
    """` at model.py:12` for an error, or nothing."""
    line = model_line(eqn)
    return f" at {line}" if line else ""


def unroll(eqn: Any, known: Callable[[int], Any]) -> Unrolled | None:
    """A scan, a while of a known number of steps or a cond of a known branch as straight code; None for anything else.

    known: the value of an operand by its number, None if it is not a constant.
    """
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn)
    if name == "cond" and (index := known(0)) is not None:
        branches = eqn.params["branches"]
        return Unrolled(branches[int(np.clip(index, 0, len(branches) - 1))], tuple(range(1, len(eqn.invars))))
    if name == "stack":  # of jnp.stack, as what every interpreter knows
        axis = eqn.params["axis"]
        joined = jax.make_jaxpr(lambda *v: [lax.concatenate([lax.expand_dims(x, (axis,)) for x in v], axis)])(*_avals(eqn))
        return Unrolled(joined, tuple(range(len(eqn.invars))))
    return _while(eqn, known) if name == "while" else None


def equations(jaxpr: Jaxpr) -> int:
    """How many equations a jaxpr has when everything in it is inlined and unrolled."""
    return sum(
        1 + sum(equations(sub) for sub in nested(eqn)) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for eqn in jaxpr.eqns
    )


def _avals(eqn: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]


def _scan(eqn: Any) -> Unrolled | None:
    at = eqn.params
    length, consts, carried = at["length"], at["num_consts"], at["num_carry"]
    if length == 0 or length * equations(at["jaxpr"].jaxpr) > MAX_EQUATIONS:
        return None
    body = jaxpr_as_fun(at["jaxpr"])
    order = range(length)[:: -1 if at["reverse"] else 1]

    def straight(*args: Any) -> list[Any]:
        fixed, carry, slices = args[:consts], list(args[consts : consts + carried]), args[consts + carried :]
        rows: dict[int, list[Any]] = {}
        first: list[Any] = []
        for t in order:
            out = body(*fixed, *carry, *(lax.index_in_dim(x, t, 0, keepdims=False) for x in slices))
            carry, rows[t] = out[:carried], out[carried:]
            first = first or carry
        columns = zip(*(rows[t] for t in range(length)), strict=True)
        stacked = [lax.concatenate([lax.expand_dims(y, (0,)) for y in column], 0) for column in columns]
        return [*carry, *stacked, *first]

    pairs = tuple((consts + n, len(eqn.outvars) + n) for n in range(carried))
    return Unrolled(jax.make_jaxpr(straight)(*_avals(eqn)), tuple(range(len(eqn.invars))), pairs)


def _while(eqn: Any, known: Callable[[int], Any]) -> Unrolled | None:
    at = eqn.params
    cond, body, tests, fixed = at["cond_jaxpr"], at["body_jaxpr"], at["cond_nconsts"], at["body_nconsts"]
    values = [known(n) for n in range(len(eqn.invars))]
    carry, steps, limit = values[tests + fixed :], 0, min(MAX_STEPS, MAX_EQUATIONS // max(equations(body.jaxpr), 1))
    while (again := _partial(cond, [*values[:tests], *carry])[0]) is not None and bool(again):
        carry = _partial(body, [*values[tests : tests + fixed], *carry])
        steps += 1
        if steps > limit:
            return None
    if again is None:
        return None
    step = jaxpr_as_fun(body)

    def straight(*args: Any) -> list[Any]:
        constants, out = args[:fixed], list(args[fixed:])
        first = out
        for n in range(steps):
            out = step(*constants, *out)
            first = out if n == 0 else first
        return [*out, *first]

    operands = tuple(range(tests, len(eqn.invars)))
    pairs = tuple((tests + fixed + n, len(eqn.outvars) + n) for n in range(len(eqn.outvars)))
    return Unrolled(jax.make_jaxpr(straight)(*_avals(eqn)[tests:]), operands, pairs if steps else ())


def _partial(closed: ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """The outputs that follow from the known inputs; None for the others."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, values, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for eqn in closed.jaxpr.eqns:
        env.update(zip(eqn.outvars, evaluate(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in closed.jaxpr.outvars]


def evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation, eagerly even inside of a trace; None where an operand is."""
    if any(v is None for v in values):
        return [None] * len(eqn.outvars)
    with jax.ensure_compile_time_eval():
        return bind(eqn, values)


def refuse_loop(eqn: Any) -> TraceError:
    """The error for control flow that depends on the data or is too long."""
    name = eqn.primitive.name
    why = {
        "while": "its number of steps depends on the data; use lax.scan, or lax.fori_loop with constant bounds",
        "cond": "its branch depends on the data; compute both and choose with jnp.where",
    }.get(name, f"it has more than {MAX_EQUATIONS:,} equations when unrolled; make it shorter")
    return TraceError(f"can't unroll {name!r}{at_line(eqn)}: {why}")
