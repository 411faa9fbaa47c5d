"""`instrument`: quantize sites put into any JAX forward by interpreting its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, AxisRole, InputSpec, SiteSpec, Stats, Tree, View
from pquant_jax._errors import TraceError, did_you_mean
from pquant_jax.graph import _ebops
from pquant_jax.graph._interpret import PRODUCTS, Const, batch_axes, bind, contains_product, flatten, inner, live, nested
from pquant_jax.graph._models import Model, as_model, check_forward
from pquant_jax.graph._stats import mean_square, output_axes, positive_fraction
from pquant_jax.graph._values import Value, constant, expand, is_parameter, outputs, prefix, span
from pquant_jax.numerics import kif, oracle, product, quantize, site_p


class Instrumented(NamedTuple):
    """A model with named quantize sites.

    model     the model as it came.
    sites     {name: SiteSpec}: activation sites and the parameters that meet data.
    roles     {parameter path: AxisRole} of the kernels.
    forward   (view, model_state, x, *, train=False, rng=None, wrap=None) -> (y, model_state).
    capture   the same -> (y, model_state, stats): also `Stats` of this batch.
    ebops     (view, *, compat=None, parallel=None) -> effective bit operations of one sample, differentiable in the formats.
    products  (view, *, compat=None, parallel=None) -> {kernel, product or table: EBOPs}.
    reference8  64 x MACs: the EBOPs of the unpruned model at 8 bits everywhere.
    inputs    the declared port of every input array, a tree like x.
    encode    (x) -> x on the ports: rounded to nearest and saturated, numpy.
    sample    a one-sample input of zeros, for tracing.
    """

    model: Model
    sites: dict[str, SiteSpec]
    roles: dict[str, AxisRole]
    forward: Callable[..., tuple[Any, Tree]]
    capture: Callable[..., tuple[Any, Tree, Stats]]
    ebops: Callable[..., jax.Array]
    products: Callable[..., dict[str, jax.Array]]
    reference8: float
    inputs: Any
    encode: Callable[[Any], Any]
    sample: Any


@dataclass
class _Run:
    """One interpretation: what it reads (view, modes) and what it gathers (specs, roles, stats)."""

    view: View
    wrap: bool
    kernel_folders: Mapping[str, int]
    split: Callable[[str], bool]
    known: Mapping[str, SiteSpec] | None  # None while discovering
    observe: bool  # gather statistics: only `capture` does, since an interpreter of `forward` would take them for the model's
    specs: dict[str, SiteSpec] = field(default_factory=dict)
    roles: dict[str, AxisRole] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=lambda: {"range": {}, "square": {}, "active": {}})
    uses: dict[str, int] = field(default_factory=dict)


def instrument(
    model: Any,
    x: Any,
    *,
    batch_axis: int = 0,
    inputs: InputSpec | Any = InputSpec(),
    split: Sequence[_tree.Where] = (),
) -> Instrumented:
    """Put a quantize site at every operand of a product, and at the fused scale and offset of every BatchNorm.

    Names are parameter paths: `Dense_0/kernel`, `Dense_0/input`, a second use `Dense_0/input#1`.  Values that several
    products read share one site, named by the first of them.  A scale and offset that are the same for all samples
    are fused (x * scale + offset) and get the sites `BatchNorm_0/input`, `.../fused_scale` and `.../fused_offset`.

    Args:
      model: a Model, or a linen, nnx or equinox module.
      x: a batch; only shapes and dtypes matter.
      batch_axis: must be 0.
      inputs: port format of every input array, one `InputSpec` or a tree like x.
      split: rules on site names; a shared value gets a site of its own where the name matches.
    Raises: TraceError for control flow around products, a mixed batch axis, or a rule that matches nothing.

    >>> from pquant_jax.graph import from_function
    >>> m = from_function(lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]), {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
    >>> sorted(instrument(m, jnp.ones((1, 2))).sites)
    ['b', 'w', 'w/input']
    """
    if batch_axis != 0:
        raise TraceError(f"batch_axis is {batch_axis}, expected 0: move the batch of every input to axis 0 (jnp.moveaxis)")
    model = as_model(model, x)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), jnp.float32), x)
    check_forward(model, shapes)
    ports = jax.tree.map(lambda _: inputs, x) if isinstance(inputs, InputSpec) else inputs
    if jax.tree.structure(ports) != jax.tree.structure(x):
        given, wanted = jax.tree.structure(ports), jax.tree.structure(x)
        raise TraceError(f"inputs has the structure {given}, x {wanted}; give one InputSpec, or one per array of x")
    folders: dict[str, int] = {}
    for path, leaf in _tree.flatten(model.params).items():
        if _tree.is_kernel(path, leaf):
            folders[path.rpartition("/")[0]] = folders.get(path.rpartition("/")[0], 0) + 1

    def split_site(name: str) -> bool:
        return any(_tree.matches(where, name) for where in split)

    def execute(view: View, state: Tree, x: Any, *, train: bool, rng: Any, wrap: bool | None, known: Any, observe=False):
        run = _Run(view, (not train) if wrap is None else wrap, folders, split_site, known, observe)
        if not train:
            x = jax.tree.map(lambda v, port: quantize(v, _port_format(port)), x, ports)
        return *_execute(run, model, ports, state, x, train=train, rng=rng), run

    found = _discover(execute, model, shapes)
    for where in split:
        if not any(_tree.matches(where, name) for name in found.specs):
            raise TraceError(f"the split rule {where!r} matches no site; {did_you_mean(str(where), found.specs)}")

    def forward(view: View, state: Tree, x: Any, *, train: bool = False, rng: Any = None, wrap: bool | None = None):
        y, state, _ = execute(view, state, x, train=train, rng=rng, wrap=wrap, known=found.specs)
        return y, state

    def capture(view: View, state: Tree, x: Any, *, train: bool = False, rng: Any = None, wrap: bool | None = None):
        y, state, run = execute(view, state, x, train=train, rng=rng, wrap=wrap, known=found.specs, observe=True)
        return y, state, run.stats

    sample = jax.tree.map(lambda v: np.zeros((1, *v.shape[1:]), np.float32), shapes)

    def products(view: View, **convention: Any) -> dict[str, jax.Array]:
        return _ebops.of_view(forward, view, model.state, sample, found.specs, **convention)

    def ebops(view: View, **convention: Any) -> jax.Array:
        return sum(products(view, **convention).values(), jnp.zeros((), jnp.float32))

    return Instrumented(
        model, found.specs, found.roles, forward, capture, ebops, products, _reference8(ebops, model.params, found.specs),
        ports, partial(_encode, ports), sample,
    )  # fmt: skip


def _discover(execute: Callable, model: Model, shapes: Any) -> _Run:
    runs: list[_Run] = []

    def trace(params: Tree, state: Tree, x: Any) -> Any:
        y, _, run = execute(View(params, {}, {}), state, x, train=False, rng=None, wrap=True, known=None)
        runs.append(run)
        return y

    jax.eval_shape(trace, model.params, model.state, shapes)
    return runs[0]


def _reference8(ebops: Callable, params: Tree, specs: Mapping[str, SiteSpec]) -> float:
    eight = {name: kif(1, jnp.zeros(spec.shape), jnp.full(spec.shape, 7.0)) for name, spec in specs.items()}
    return float(jax.jit(ebops)(View(params, eight, {})))


def _port_format(port: InputSpec) -> KIF:
    return kif(port.k, port.i, port.f, rounding="RND", overflow="SAT")


def _encode(ports: Any, x: Any) -> Any:
    def one(v: Any, port: InputSpec) -> np.ndarray:
        return oracle.quantize(np.asarray(v), port.k, port.i, port.f, rounding="RND", overflow="SAT").astype(np.float32)

    return jax.tree.map(one, x, ports)


def _opaque(eqn: Any) -> bool:
    """Calls with a gradient rule of their own stay whole (relu has gradient 0 at 0, a bare max has 1/2)."""
    call = inner(eqn)
    return eqn.primitive.name.startswith("custom_") and call is not None and not contains_product(call[0])


def _execute(run: _Run, model: Model, ports: Any, state: Tree, x: Any, *, train: bool, rng: Any) -> tuple[Any, Tree]:
    params = run.view.model

    def function(params: Tree, state: Tree, x: Any, rng: Any) -> Any:
        return model.forward(params, state, x, train=train, rng=rng)

    closed, shape = jax.make_jaxpr(function, return_shape=True)(params, state, x, rng)
    program = flatten(closed, _opaque)
    args = [Value(v, leaf=(p, tuple(range(jnp.ndim(v)))), paths=frozenset({p})) for p, v in _tree.flatten(params).items()]
    args += [Value(v, derived=True) for v in jax.tree.leaves(state)]
    args += [Value(v, 0, signed=port.k == 1) for v, port in zip(jax.tree.leaves(x), jax.tree.leaves(ports), strict=True)]
    args += [Value(v) for v in jax.tree.leaves(rng)]
    axes = batch_axes(program, [v.batch for v in args])
    count = len(jax.tree.leaves(shape[0]))
    for operand, out in zip(program.outputs[:count], jax.tree.leaves(shape[0]), strict=True):
        if isinstance(operand, Const) or axes[operand] != 0:
            shapes = ", ".join(str(jnp.shape(v)) for v in jax.tree.leaves(x))
            raise TraceError(
                f"the model does not accept an input of shape {shapes} whose axis 0 is the batch: its output of shape "
                f"{out.shape} does not have the batch as axis 0"
            )
    alive = live(program, axes, program.outputs[:count])
    env: dict[int, Value] = dict(zip(program.inputs, args, strict=True))

    def read(operand: int | Const) -> Value:
        return constant(operand.value) if isinstance(operand, Const) else env[operand]

    for step in program.steps:
        ins = [read(v) for v in step.ins]
        made = _rule(run, step.eqn, ins, axes[step.outs[0]] if step.outs else None, any(s in alive for s in step.outs))
        env.update(zip(step.outs, made, strict=True))
    flat = [_plain(run, read(v)).val for v in program.outputs]
    return jax.tree.unflatten(jax.tree.structure(shape), flat)


def _rule(run: _Run, eqn: Any, ins: list[Value], batch: int | None, alive: bool) -> list[Value]:
    name = eqn.primitive.name
    if eqn.primitive is site_p:
        return [_at_site(run, _plain(run, ins[0]), eqn.params["name"], eqn.params["kind"])]
    if alive and batch is not None:
        if name in PRODUCTS:
            return _product(run, eqn, [_plain(run, v) for v in ins], batch)
        if name in ("add", "sub", "mul", "div") and sum(v.batch is not None for v in ins) == 1:
            lazy = _affine(run, name, ins, eqn.outvars[0].aval.shape)
            if lazy is not None:
                return [lazy]
        if name == "mul" and all(v.batch is not None for v in ins) or name in ("square", "integer_pow"):
            ins = [_operand(run, _plain(run, v), name) for v in ins]
    if alive and name not in PRODUCTS and any(contains_product(sub) for sub in nested(eqn)):
        raise TraceError(f"products inside {name!r} can't be instrumented; unroll it (a Python loop over the steps)")
    ins = [_plain(run, v) for v in ins]
    return outputs(eqn, ins, bind(eqn, [v.val for v in ins]), batch)


def _product(run: _Run, eqn: Any, ins: list[Value], batch: int) -> list[Value]:
    """Sites on the operands of dot_general and conv; the parameter operand names the data operand's site."""
    data = [n for n in (0, 1) if ins[n].batch is not None]
    if len(data) == 1 and is_parameter(ins[1 - data[0]]):
        d, kernel = data[0], ins[1 - data[0]]
        home = kernel.leaf[0] if kernel.leaf is not None else prefix(kernel.paths) or min(kernel.paths, default="derived")
        ins[1 - d] = _parameter(run, kernel, "kernel", f"{home}/derived_kernel")
        ins[d] = _at_site(run, ins[d], _input_name(run, home), "input", shared=True)
        if kernel.leaf is not None:
            run.roles.setdefault(home, _role(eqn, 1 - d, kernel.leaf[1], _site_name(run, ins[d])))
            spec = run.specs[home]
            run.specs[home] = SiteSpec(spec.shape, spec.kind, spec.signed, run.roles[home].out_axes)
    else:
        for n in data:
            ins[n] = _operand(run, ins[n], "product")
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
        _record_active(run, made[0])
    return made


def _record_active(run: _Run, v: Value) -> None:
    """How often a layer's output is positive; the last value of it, after its bias or BatchNorm, counts."""
    if run.observe and v.channels is not None:
        path, places = v.channels
        share = positive_fraction(v.val, places, run.specs[path].shape)
        if share is not None:
            run.stats["active"][path] = share


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


def _affine(run: _Run, name: str, ins: list[Value], shape: tuple[int, ...]) -> Value | None:
    """x * scale + offset, kept open while parameters of all samples are added and multiplied; None if it is something else."""
    side = 0 if ins[0].batch is not None else 1
    x, c = ins[side], ins[1 - side]
    if not is_parameter(c) or (name == "div" and side == 1) or x.batch is None:
        return None
    base, scale, offset = x.affine if x.affine is not None else (x, None, None)
    if tuple(jnp.shape(base.val)) != tuple(shape):
        return None
    if name == "add":
        offset = c if offset is None else _combine(jnp.add, offset, c)
    elif name == "sub" and side == 0:
        offset = _combine(jnp.negative, c) if offset is None else _combine(jnp.subtract, offset, c)
    elif name == "sub":
        scale = _combine(jnp.negative, scale) if scale is not None else Value(-jnp.ones_like(c.val), derived=True)
        offset = c if offset is None else _combine(jnp.subtract, c, offset)
    else:
        factor = c if name == "mul" else _combine(lambda v: 1 / v, c)
        scale = factor if scale is None else _combine(jnp.multiply, scale, factor)
        offset = None if offset is None else _combine(jnp.multiply, offset, factor)
    lazy = Value(jax.ShapeDtypeStruct(shape, base.val.dtype), base.batch, True, affine=(base, scale, offset))
    # a bias that is one parameter closes the term: what follows sees a finished layer output
    return _plain(run, lazy) if scale is None and offset is not None and offset.leaf is not None else lazy


def _combine(function: Callable, *parts: Value) -> Value:
    return Value(function(*(v.val for v in parts)), paths=frozenset().union(*(v.paths for v in parts)), derived=True)


def _plain(run: _Run, v: Value) -> Value:
    """Close an open affine term: y = site(x) * site(scale) + site(offset)."""
    if v.affine is None:
        return v
    if v.on_grid is not None:
        return v.on_grid
    base, scale, offset = v.affine
    home = prefix(frozenset().union(*(p.paths for p in (scale, offset) if p is not None))) or "affine"
    y = base.val
    if scale is not None:
        root = scale.leaf[0] if scale.leaf is not None else home
        q = _at_site(run, base, _input_name(run, root if scale.leaf is not None else f"{home}/fused_scale"), "input", shared=True)
        y = q.val * _parameter(run, scale, "scale", f"{home}/fused_scale").val
    rises = None
    if offset is not None:
        shift = _parameter(run, offset, "offset", f"{home}/fused_offset").val
        y = y + shift
        rises = (base, lambda v: v + _one_sample(shift, v, base.batch)) if scale is None else None
    v.on_grid = Value(y, v.batch, True, rises=rises, channels=base.channels)
    _record_active(run, v.on_grid)
    return v.on_grid


def _one_sample(shift: Any, like: Any, batch: int | None) -> Any:
    """What is the same for all samples, without the batch axis if it was broadcast to one."""
    return jnp.take(shift, 0, batch) if jnp.ndim(shift) > jnp.ndim(like) else shift


def _parameter(run: _Run, v: Value, kind: str, derived_name: str) -> Value:
    """A parameter that meets data: the view has quantized it if it is one leaf, else it gets a site of its own here."""
    if v.leaf is None:
        return _at_site(run, v, _count(run, derived_name), kind if kind != "kernel" else "scale")
    path = v.leaf[0]
    if path not in run.specs:
        shape = jnp.shape(_tree.flatten(run.view.model)[path])
        run.specs[path] = SiteSpec(tuple(shape), "bias" if kind == "offset" else "kernel", True, tuple(range(len(shape))))
    return v


def _operand(run: _Run, v: Value, name: str) -> Value:
    """A site on an operand of a product of two activations; constants stay as they are."""
    return v if v.batch is None else _at_site(run, v, f"{name}/input", "input", shared=True)


def _input_name(run: _Run, path: str) -> str:
    folder = path.rpartition("/")[0]
    return f"{folder}/input" if folder and run.kernel_folders.get(folder, 0) <= 1 else f"{path}/input"


def _count(run: _Run, name: str) -> str:
    used = run.uses.get(name, 0)
    run.uses[name] = used + 1
    return name if used == 0 else f"{name}#{used}"


def _site_name(run: _Run, v: Value) -> str:
    return next(iter(v.paths)) if v.paths else ""


def _at_site(run: _Run, v: Value, name: str, kind: str, *, shared: bool = False) -> Value:
    """v on the grid of its site.  shared: `name` is that of a use; a value that has a site already keeps it."""
    own = shared and run.split(name)
    if shared and v.on_grid is not None and not own:
        return v.on_grid
    if shared:
        name = _count(run, name)
    shape = list(jnp.shape(v.val))
    if v.batch is not None:
        del shape[v.batch]
    spec = SiteSpec(tuple(shape), kind, v.signed, (len(shape) - 1,) if shape else ())
    if run.known is not None and name not in run.known:
        close = did_you_mean(name, run.known)
        raise TraceError(f"the training forward has a site {name!r} that the inference forward lacks; {close}")
    run.specs[name] = spec
    axis = v.batch
    x = v.val
    if run.observe:
        run.stats["range"][name] = span(v)
    fmt = run.view.sites.get(name)
    if fmt is not None:
        k, i, f = (expand(part, axis, jnp.ndim(x)) for part in (fmt.k, fmt.i, fmt.f))
        fmt = KIF(k, i, f, fmt.rounding, fmt.overflow)
        with jax.named_scope(name):
            x = quantize(x, fmt, wrap=run.wrap or kind != "input")
    made = Value(x, v.batch, v.signed, None, frozenset({name}) if kind == "input" else v.paths)
    if not own:  # a site of its own is nobody else's
        v.on_grid = made
    return made
