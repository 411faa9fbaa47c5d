"""`instrument`: quantize sites put into any JAX forward by interpreting its jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pquant_jax import _tree
from pquant_jax._base import KIF, AxisRole, InputSpec, SiteSpec, Stats, Table, Tree, View
from pquant_jax._errors import TraceError, did_you_mean
from pquant_jax.graph import _ebops
from pquant_jax.graph._execute import execute as run_model
from pquant_jax.graph._models import Model, as_model, check_forward
from pquant_jax.graph._sites import Run
from pquant_jax.graph._tables import built_tables
from pquant_jax.graph._wishes import granted
from pquant_jax.numerics import kif, oracle, quantize


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
    tables    (view, model_state) -> {name: Table}: the integer tables of a finished view, to be put into `view.tables`.
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
    tables: Callable[[View, Tree], dict[str, Table]]


def instrument(
    model: Any,
    x: Any,
    *,
    batch_axis: int = 0,
    inputs: InputSpec | Any = InputSpec(),
    split: Sequence[_tree.Where] = (),
    outputs: Any = False,
) -> Instrumented:
    """Put a quantize site at every operand of a product, at both ends of every table and at every fused BatchNorm.

    Names are parameter paths: `Dense_0/kernel`, `Dense_0/input`, a second use `Dense_0/input#1`.  Values that several
    products read share one site, named by the first of them.  A scale and offset that are the same for all samples
    are fused (x * scale + offset) and get the sites `BatchNorm_0/input`, `.../fused_scale` and `.../fused_offset`.  An
    elementwise function that hardware can only look up (tanh, gelu, the exp of a softmax) has the sites
    `Dense_0/gelu/input` and `Dense_0/gelu/table`.  A view without any format gives the model's own result, bitwise.

    Args:
      model: a Model, or a linen, nnx or equinox module.
      x: a batch; only shapes and dtypes matter.
      batch_axis: must be 0.
      inputs: port format of every input array, one `InputSpec` or a tree like x.
      split: rules on site names; a shared value gets a site of its own where the name matches.
      outputs: True for a site `output` (`output/KEY` in a tree) at every result, or the format that it shall have.
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

    def execute(
        view: View, state: Tree, x: Any, *, train: bool, rng: Any, wrap: bool | None, known: Any, observe=False, build=False
    ):  # fmt: skip
        run = Run(view, (not train) if wrap is None else wrap, folders, split_site, known, observe)
        run.tables = {} if build else None
        if not train and view.sites:
            x = jax.tree.map(lambda v, port: quantize(v, _port_format(port)), x, ports)
        return *run_model(run, model, ports, state, x, train=train, rng=rng, out_format=outputs), run

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

    def tables(view: View, state: Tree) -> dict[str, Table]:
        if not any(spec.kind == "table" for spec in found.specs.values()):
            return {}
        view = view._replace(tables={})

        @jax.jit
        def on_every_code(params: Tree, state: Tree) -> dict[str, Any]:
            seen = view._replace(model=params)
            return execute(seen, state, sample, train=False, rng=None, wrap=True, known=found.specs, build=True)[2].tables or {}

        return built_tables(on_every_code(view.model, state), found.fed, found.specs, view.sites)

    def products(view: View, **convention: Any) -> dict[str, jax.Array]:
        return _ebops.of_view(forward, view, model.state, sample, found.specs, **convention)

    def ebops(view: View, **convention: Any) -> jax.Array:
        return sum(products(view, **convention).values(), jnp.zeros((), jnp.float32))

    return Instrumented(
        model, found.specs, found.roles, forward, capture, ebops, products, _reference8(ebops, model.params, found.specs),
        ports, partial(_encode, ports), sample, tables,
    )  # fmt: skip


def _discover(execute: Callable, model: Model, shapes: Any) -> Run:
    runs: list[Run] = []

    def trace(params: Tree, state: Tree, x: Any) -> Any:
        y, _, run = execute(View(params, {}, {}), state, x, train=False, rng=None, wrap=True, known=None)
        runs.append(run)
        return y

    jax.eval_shape(trace, model.params, model.state, shapes)
    runs[0].specs.update(granted(runs[0]))
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
