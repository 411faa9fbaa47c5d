"""Which values of a program are the same for every input, and what they are: constants inside a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax._base import KIF
from pquant_jax.graph._axes import POOLS
from pquant_jax.graph._interpret import ELEMENTWISE, PRODUCTS, Const, Program, bind
from pquant_jax.numerics import mask_p, quantize_p, total_bits

MOVES: Final = frozenset("reshape transpose squeeze broadcast_in_dim slice rev concatenate".split())
_REDUCE: Final = frozenset({"reduce_sum", "reduce_max", "reduce_min"})


def constants(program: Program, leaves: Any, sample: Any, wanted: Sequence[int | Const]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(value on the sample, does it vary with the input) of the wanted values, element by element.

    leaves, sample: the program's inputs, of which only the sample varies.  What an unknown operation makes of something
    that varies does too.
    """

    @jax.jit
    def run(leaves: Any, x: Any) -> list[tuple[Any, Any]]:
        env = [(v, jnp.zeros(jnp.shape(v), bool)) for v in jax.tree.leaves(leaves)]
        env += [(v, jnp.ones(jnp.shape(v), bool)) for v in jax.tree.leaves(x)]
        known = dict(zip(program.inputs, env, strict=True))

        def read(v: int | Const) -> tuple[Any, Any]:
            return (v.value, jnp.zeros(jnp.shape(v.value), bool)) if isinstance(v, Const) else known[v]

        for step in program.steps:
            ins = [read(v) for v in step.ins]
            outs = bind(step.eqn, [v for v, _ in ins])
            varies = [_varies(step.eqn, ins, outs)] if len(outs) == 1 else [_any(o, ins) for o in outs]
            known.update(zip(step.outs, zip(outs, varies, strict=True), strict=True))
        return [read(v) for v in wanted]

    return [(np.asarray(v), np.asarray(varies)) for v, varies in run(leaves, sample)]


def _any(out: Any, ins: Sequence[tuple[Any, Any]]) -> Any:
    return jnp.full(jnp.shape(out), jnp.any(jnp.stack([jnp.any(v) for _, v in ins])) if ins else False)


def nonzero(value: Any, varies: Any) -> Any:
    """Where it is not 0 for every input."""
    return varies | (jnp.asarray(value) != 0)


def _varies(eqn: Any, ins: Sequence[tuple[Any, Any]], outs: Sequence[Any]) -> Any:
    """Which elements of the result depend on the input."""
    name, shape = eqn.primitive.name, jnp.shape(outs[0])
    flags = [v for _, v in ins]
    if name in PRODUCTS:
        (a, va), (b, vb) = ins
        pairs = ((va, nonzero(b, vb)), (nonzero(a, va), vb))
        sums = [bind(eqn, [x.astype(jnp.float32), y.astype(jnp.float32)])[0] for x, y in pairs]
        return sums[0] + sums[1] > 0
    if name in MOVES:
        return bind(eqn, flags)[0]
    if name in POOLS:
        return bind(eqn, [flags[0].astype(outs[0].dtype)])[0] != 0
    if name in _REDUCE:
        return jnp.any(flags[0], eqn.params["axes"])
    if name not in ELEMENTWISE:
        return _any(outs[0], ins)
    if eqn.primitive is mask_p or name == "mul":
        return flags[0] & nonzero(*ins[1]) | flags[1] & nonzero(*ins[0])
    varies = jnp.zeros(shape, bool)
    for v in flags:
        varies = varies | v
    if eqn.primitive is quantize_p:
        k, i, f = (v for v, _ in ins[1:])
        varies = varies & (total_bits(KIF(k, i, f)) > 0)
    return varies
