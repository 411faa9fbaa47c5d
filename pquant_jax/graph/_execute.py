"""A model's jaxpr, run equation by equation with sites put in: what `instrument` and everything it offers is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from pquant_jax import _tree
from pquant_jax._base import AxisRole, SiteSpec, Tree
from pquant_jax._errors import TraceError
from pquant_jax.graph._affine import affine, plain
from pquant_jax.graph._cones import Plan, apply_steps, elementwise_call, plan
from pquant_jax.graph._interpret import (
    PRODUCTS,
    Const,
    Program,
    Step,
    batch_axes,
    bind,
    contains_product,
    flatten,
    live,
    nested,
)
from pquant_jax.graph._models import Model
from pquant_jax.graph._sites import Run, at_site, input_name, module_of, operand, parameter, record_active
from pquant_jax.graph._stats import mean_square, output_axes
from pquant_jax.graph._tables import masked_choice, masked_maximum, masked_sum, quotient, table
from pquant_jax.graph._values import Value, constant, is_parameter, outputs, prefix
from pquant_jax.graph._wishes import WISHES, ask, wish
from pquant_jax.numerics import product, region_name, site_p


def opaque(eqn: Any) -> bool:
    """Calls that stay whole: declared tables, and elementwise ones with a gradient rule of their own.

    relu has gradient 0 at 0, a bare max has 1/2.
    """
    return region_name(eqn) is not None or elementwise_call(eqn)


def execute(
    run: Run, model: Model, ports: Any, state: Tree, x: Any, *, train: bool, rng: Any, out_format: Any
) -> tuple[Any, Tree]:
    """(y, model state) of the model with sites.  out_format: as `instrument` takes `outputs`."""
    params = run.view.model

    def function(params: Tree, state: Tree, x: Any, rng: Any) -> Any:
        return model.forward(params, state, x, train=train, rng=rng)

    closed, shape = jax.make_jaxpr(function, return_shape=True)(params, state, x, rng)
    program = flatten(closed, opaque)
    args = [Value(v, leaf=(p, tuple(range(np.ndim(v)))), paths=frozenset({p})) for p, v in _tree.flatten(params).items()]
    args += [Value(v, derived=True) for v in jax.tree.leaves(state)]
    args += [Value(v, 0, signed=port.k == 1) for v, port in zip(jax.tree.leaves(x), jax.tree.leaves(ports), strict=True)]
    keys = len(args)
    args += [Value(v) for v in jax.tree.leaves(rng)]
    axes = batch_axes(program, [v.batch for v in args])
    results = jax.tree.leaves(shape[0])
    _check_outputs(program, axes, results, x)
    alive = live(program, axes, program.outputs[: len(results)])
    found = plan(program, axes, alive, program.inputs[keys:])
    env: dict[int, Value] = dict(zip(program.inputs, args, strict=True))
    for n, step in enumerate(program.steps):
        if step.outs and all(s in found.known for s in step.outs):
            continue
        ins = [_read(v, step, found, env) for v in step.ins]
        batch = axes[step.outs[0]] if step.outs and any(v.batch is not None for v in ins) else None
        run.scope = module_of(step.scope)
        live_here = any(s in alive for s in step.outs)
        env.update(zip(step.outs, _rule(run, found, program, n, ins, batch, live_here, env), strict=True))
    flat = [plain(run, _read(v, None, found, env)) for v in program.outputs]
    if out_format:
        names = _output_names(shape[0])
        own = None if out_format is True else out_format
        flat[: len(names)] = [at_site(run, v, name, "output", fmt=own) for v, name in zip(flat, names, strict=False)]
    return jax.tree.unflatten(jax.tree.structure(shape), [v.val for v in flat])


def _output_names(y: Any) -> list[str]:
    return ["output" if not path else f"output/{path}" for path in _tree.flatten(y)]


def _check_outputs(program: Program, axes: dict[int, int | None], results: Sequence[Any], x: Any) -> None:
    for operand_, out in zip(program.outputs, results, strict=False):
        if isinstance(operand_, Const) or axes[operand_] != 0:
            shapes = ", ".join(str(np.shape(v)) for v in jax.tree.leaves(x))
            raise TraceError(
                f"the model does not accept an input of shape {shapes} whose axis 0 is the batch: its output of shape "
                f"{out.shape} does not have the batch as axis 0"
            )


def _read(v: int | Const, step: Step | None, found: Plan, env: dict[int, Value]) -> Value:
    value = v.value if isinstance(v, Const) else found.known.get(v)
    if value is None:
        assert isinstance(v, int)
        return env[v]
    divides = step is not None and step.eqn.primitive.name == "div" and step.ins[-1] is v
    return constant(value, reciprocal=divides)


def _rule(
    run: Run, found: Plan, program: Program, n: int, ins: list[Value], batch: int | None, alive: bool, env: dict[int, Value]
) -> list[Value]:
    """The results of step n."""
    eqn = program.steps[n].eqn
    name = eqn.primitive.name
    if eqn.primitive is site_p:
        return [wish(run, eqn, ins[0]) if eqn.params["kind"] in WISHES else _named(run, eqn, ins[0])]
    if alive and region_name(eqn) is None and any(contains_product(sub) for sub in nested(eqn)):
        raise TraceError(f"products inside {name!r} can't be instrumented; unroll it (a Python loop over the steps)")
    if not alive or batch is None:
        ins = [plain(run, v) for v in ins]
        return outputs(eqn, ins, bind(eqn, [v.val for v in ins]), batch)
    if n in found.interior:
        ins = [plain(run, v) for v in ins]
        made = outputs(eqn, ins, bind(eqn, [v.val for v in ins]), batch)
        cone = found.cones.get(n)
        if cone is None:
            return made
        root = plain(run, env[cone.root])
        return [table(run, cone.label, root, apply_steps(program, cone, found.known), made[0])]
    if region_name(eqn) is not None:
        return _region(run, eqn, ins, batch)
    if name in PRODUCTS:
        return _product(run, eqn, [plain(run, v) for v in ins], batch)
    data = [v for v in ins if v.batch is not None]
    if n in found.dropout:
        return [_dropped(eqn, [plain(run, v) for v in ins], batch)]
    if name in ("add", "sub", "mul", "div") and len(data) == 1:
        original = bind(eqn, [v.val for v in ins])[0]
        lazy = affine(run, name, ins, original) if all(v.masked is None for v in ins) else None
        if lazy is not None:
            return [lazy]
    ins = [plain(run, v) for v in ins]
    if name == "max" and len(data) == 1 and any(v.batch is None and np.all(np.isneginf(_concrete(v))) for v in ins):
        return [next(v for v in ins if v.batch is not None)]
    if (name == "mul" and len(data) == 2) or name in ("square", "integer_pow"):
        return _elementwise_product(run, eqn, name, ins, batch)
    made = outputs(eqn, ins, bind(eqn, [v.val for v in ins]), batch)
    if name == "div" and ins[1].batch is not None:
        return [quotient(run, ins, made[0])]
    if name == "select_n":
        masked_choice(eqn, ins, made[0])
    if name in ("add", "sub"):
        masked_sum(name, ins, made[0])
    if name == "reduce_max" and ins[0].masked is not None:
        return [masked_maximum(run, eqn, ins[0], made[0])]
    return made


def _dropped(eqn: Any, ins: list[Value], batch: int) -> Value:
    """A part of a dropout: there in training only, so that it must not change which values have sites."""
    made = outputs(eqn, ins, bind(eqn, [v.val for v in ins]), batch)[0]
    x = next((v for v in ins[1 if len(ins) == 3 else 0 :] if v.batch is not None), None)
    if x is not None:
        made.paths, made.channels, made.site, made.signed = x.paths, x.channels, x.site, x.signed
        made.on_grid = made if x.on_grid is x else None
    return made


def _concrete(v: Value) -> Any:
    return np.zeros(()) if isinstance(v.val, Tracer) else np.asarray(v.val, np.float64)


def _named(run: Run, eqn: Any, x: Value) -> Value:
    """`pq.site`: a site of that name; on a parameter it says in which format the view should have it."""
    name, kind, fmt = eqn.params["name"], eqn.params["kind"], eqn.params["format"]
    if x.leaf is not None:
        return x if fmt is None else ask(run, x.leaf[0], "", fmt, x)
    return at_site(run, plain(run, x), name, kind, fmt=fmt)


def _region(run: Run, eqn: Any, ins: list[Value], batch: int) -> list[Value]:
    """A declared table: elementwise in its first operand, the others are the same for all samples."""
    x, *rest = [plain(run, v) for v in ins]
    label = region_name(eqn) or "table"
    if x.batch is None or any(v.batch is not None for v in rest) or eqn.outvars[0].aval.shape != eqn.invars[0].aval.shape:
        raise TraceError(
            f"the region {label!r} must map its first argument to a result of the same shape {eqn.invars[0].aval.shape}, with "
            f"everything else the same for all samples; it gives {eqn.outvars[0].aval.shape}"
        )
    made = outputs(eqn, [x, *rest], bind(eqn, [v.val for v in (x, *rest)]), batch)[0]
    values = [v.val for v in rest]
    return [
        table(run, label, x, lambda v: bind(eqn, [v, *values])[0], Value(made.val, batch, True, paths=made.paths), declared=True)
    ]


def _elementwise_product(run: Run, eqn: Any, name: str, ins: list[Value], batch: int) -> list[Value]:
    original = bind(eqn, [v.val for v in ins])
    sited = [operand(run, v, name) for v in ins]
    quantized = run.quantizes(*(v.site or "" for v in sited))
    return outputs(eqn, sited, bind(eqn, [v.val for v in sited]) if quantized else original, batch)


def _product(run: Run, eqn: Any, ins: list[Value], batch: int) -> list[Value]:
    """Sites on the operands of dot_general and conv; the parameter operand names the data operand's site."""
    data = [n for n in (0, 1) if ins[n].batch is not None]
    if len(data) == 1 and is_parameter(ins[1 - data[0]]):
        d, kernel = data[0], ins[1 - data[0]]
        own = kernel.leaf[0] if kernel.leaf is not None else prefix(kernel.paths) or min(kernel.paths, default="derived")
        ins[1 - d] = parameter(run, kernel, "kernel", f"{own}/derived_kernel")
        ins[d] = at_site(run, ins[d], input_name(run, own), "input", shared=True)
        if kernel.leaf is not None:
            run.roles.setdefault(own, _role(eqn, 1 - d, kernel.leaf[1], _site_name(ins[d])))
            spec = run.specs[own]
            run.specs[own] = SiteSpec(spec.shape, spec.kind, spec.signed, run.roles[own].out_axes)
    else:
        for n in data:
            ins[n] = operand(run, ins[n], "product")
    values = [v.val for v in ins]
    leaf = next((v.leaf for v in ins if v.leaf is not None), None)
    with jax.named_scope(eqn.primitive.name if leaf is None else leaf[0]):
        if len(data) == 1 and eqn.primitive.name == "dot_general" and eqn.params["dimension_numbers"][1] == ((), ()):
            made = outputs(eqn, ins, [product(*values, parameter=1 - data[0], **eqn.params)], batch)
        else:
            made = outputs(eqn, ins, bind(eqn, values), batch)
    if len(data) == 1 and leaf is not None:
        path, axes = leaf
        shape = run.specs[path].shape
        if run.observe:
            square = mean_square(values[data[0]], data[0], eqn, axes, shape)
            seen = run.stats["square"].get(path)  # a parameter of two products sees both inputs
            run.stats["square"][path] = square if seen is None else seen + square
        made[0].channels = path, output_axes(data[0], eqn, axes)
        record_active(run, made[0])
    return made


def _site_name(v: Value) -> str:
    return next(iter(v.paths)) if v.paths else ""


def _role(eqn: Any, side: int, axes: tuple[int | None, ...], input_site: str) -> AxisRole:
    if eqn.primitive.name == "dot_general":
        (contract, batched) = (eqn.params["dimension_numbers"][0][side], eqn.params["dimension_numbers"][1][side])
        into, slid = tuple(contract), ()
    else:
        spec = eqn.params["dimension_numbers"].rhs_spec
        into, slid, batched = tuple(spec[1:]), tuple(spec[2:]), ()
    facing, positions = (tuple(sorted(a for d in dims if (a := axes[d]) is not None)) for dims in (into, slid))
    out = tuple(sorted(a for d, a in enumerate(axes) if a is not None and d not in (*into, *batched)))
    return AxisRole(facing, out, input_site, positions)
