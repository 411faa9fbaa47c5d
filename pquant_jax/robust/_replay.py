"""The finished forward, equation by equation, with a hook at every site: where bits are flipped and weights are moved.

The inference forward is traced once for a batch size; what the hook returns goes on in the place of the quantized value.
It runs under `jit`, `vmap` and `grad`, and with a hook that changes nothing it gives the forward's own integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import Tree, View
from pquant_jax._errors import TraceError
from pquant_jax.graph import Const, Instrumented, Program, bind, flatten
from pquant_jax.numerics import quantize_p

PARAMETERS: Final = ("kernel", "bias", "scale", "offset")
MAX_BITS: Final = 24  # of a code: float32 holds it


class Format(NamedTuple):
    """k, i, f, int32 and of one shape (or broadcasting to it): the code of v is v * 2^f in two's complement of k+i+f bits."""

    k: Any
    i: Any
    f: Any

    @property
    def bits(self) -> Any:
        """k + i + f, 0 for a format without bits."""
        return (self.k + self.i + self.f).clip(min=0)


Hook = Callable[[str, Any, Format], Any]  # (site, quantized value, format) -> value


class Replay(NamedTuple):
    """stored: {site: Format} of the quantized parameters, no bits where pruned.  values: what the view holds for them.

    activations: {site: (shape of its value on the batch, Format that broadcasts to it)}.
    run: (hook, x, tables, smooth) -> the forward's outputs; x on the ports, of the batch size that was traced.  smooth:
      quantizers of activations and ports pass their operand on, so that the Hessian is that of the function they approximate.
    """

    stored: dict[str, Format]
    values: dict[str, np.ndarray]
    tables: dict[str, Any]
    activations: dict[str, tuple[tuple[int, ...], Format]]
    run: Callable[..., Any]


def replay(inst: Instrumented, view: View, model_state: Tree, batch: int) -> Replay:
    """The forward of `view` on `batch` samples.  Raises: TraceError for a site without format or with over 24 bits."""
    missing = sorted(n for n in inst.sites if n not in view.sites)
    if missing:
        raise TraceError(
            f"site {missing[0]!r} has no fixed-point format, so it has no bits to flip: add a quantizer to the chain"
        )

    def forward(params: Tree, state: Tree, tables: Any, x: Any) -> Any:
        return inst.forward(view._replace(model=params, tables=tables), state, x, train=False)[0]

    x = jax.tree.map(lambda v: jnp.zeros((batch, *np.shape(v)[1:]), jnp.float32), inst.sample)
    closed, shape = jax.make_jaxpr(forward, return_shape=True)(view.model, model_state, view.tables, x)
    program = flatten(closed)
    leaves = jax.tree.leaves((view.model, model_state))
    paths = [*_tree.flatten(view.model), *([""] * len(jax.tree.leaves(model_state)))]
    own = {p: s for p, s in zip(paths, program.inputs, strict=False) if p in inst.sites and inst.sites[p].kind in PARAMETERS}
    derived = _derived(inst, program, set(program.inputs[: len(leaves)]))
    stored = {name: _stored(inst, view, name) for name in [*own, *derived]}
    values: dict[str, np.ndarray] = {}

    def run(hook: Hook, x: Any, tables: Any = None, smooth: bool = False) -> Any:
        env: dict[int, Any] = {}
        inputs = [*leaves, *jax.tree.leaves(view.tables if tables is None else tables), *jax.tree.leaves(x)]
        env.update(zip(program.inputs, (jnp.asarray(v) for v in inputs), strict=True))
        for path, slot in own.items():
            env[slot] = hook(path, env[slot], stored[path])
        for step in program.steps:
            ins = [jnp.asarray(v.value) if isinstance(v, Const) else env[v] for v in step.ins]
            if smooth and step.eqn.primitive is quantize_p:  # no derivative of second order goes through a quantizer
                outs = [jnp.asarray(values[step.scope]) if step.scope in values else ins[0]]
            else:
                outs = bind(step.eqn, ins)
            if step.eqn.primitive is quantize_p and step.scope in inst.sites:
                fmt = stored.get(step.scope) or Format(*(jnp.rint(v).astype(jnp.int32) for v in ins[1:4]))
                outs = [hook(step.scope, outs[0], fmt)]
            env.update(zip(step.outs, outs, strict=True))
        found = [jnp.asarray(v.value) if isinstance(v, Const) else env[v] for v in program.outputs]
        return jax.tree.unflatten(jax.tree.structure(shape), found)

    shapes: dict[str, tuple[int, ...]] = {}

    def held(x: Any) -> tuple[dict[str, Any], dict[str, Format]]:
        seen: dict[str, Any] = {}
        formats: dict[str, Format] = {}

        def watch(site: str, value: Any, fmt: Format) -> Any:
            if site in stored:
                seen[site] = value
            else:
                formats[site], shapes[site] = fmt, tuple(value.shape)
            return value

        run(watch, x)
        return seen, formats

    found, formats = jax.tree.map(np.asarray, jax.jit(held)(x))
    values.update(found)
    return Replay(stored, values, view.tables, {name: (shapes[name], fmt) for name, fmt in formats.items()}, run)


def _derived(inst: Instrumented, program: Program, trained: set[int]) -> list[str]:
    """Sites whose value is computed from parameters alone."""
    names = []
    for step in program.steps:
        slots = [v for v in step.ins if isinstance(v, int)]
        if not slots or not all(v in trained for v in slots):
            continue
        trained.update(step.outs)
        if step.eqn.primitive is quantize_p and step.scope in inst.sites and inst.sites[step.scope].kind in PARAMETERS:
            names.append(step.scope)
    return names


def _stored(inst: Instrumented, view: View, site: str) -> Format:
    shape, fmt = inst.sites[site].shape, view.sites[site]
    k, i, f = (np.broadcast_to(np.rint(np.asarray(v, np.float64)), shape).astype(np.int32) for v in (fmt.k, fmt.i, fmt.f))
    alive = (np.broadcast_to(np.asarray(view.masks.get(site, 1.0)), shape) != 0) & (k + i + f > 0)
    k, i, f = (np.where(alive, v, 0).astype(np.int32) for v in (k, i, f))
    if (k + i + f).max(initial=0) > MAX_BITS:
        raise TraceError(f"site {site!r} has {(k + i + f).max()} bits, float32 holds codes of {MAX_BITS}; use fewer")
    return Format(k, i, f)
