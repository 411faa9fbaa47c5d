"""`shrink`: a compressed model without its dead channels, as smaller arrays with the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from pquant_jax import _tree
from pquant_jax._base import KIF, Tree, View
from pquant_jax._errors import TraceError
from pquant_jax.graph._axes import Axis, Linked, Links, Sink, link
from pquant_jax.graph._constants import constants, nonzero
from pquant_jax.graph._fold import folded
from pquant_jax.graph._instrument import Instrumented
from pquant_jax.graph._interpret import Const, bind, flatten, inner
from pquant_jax.graph._models import Model

Cut = tuple[np.ndarray | None, ...]  # per axis the indices that stay, None for all


class Shrunk(NamedTuple):
    """A smaller model.

    model: forward, parameters and state of the small model, ready for `instrument`.  view: the compressed view, cut alike.
    kept: {path: indices kept of each axis, None for all} of every parameter that was cut; state under `state/`.
    """

    model: Model
    view: View
    kept: dict[str, Cut]


def shrink(inst: Instrumented, view: View, model_state: Tree = None) -> Shrunk:
    """Remove the channels that no output depends on: all incoming or all outgoing weights 0, or a relu that gives 0.

    A channel is what an axis of a kernel shares with biases, normalisations, activations and the next kernels; it goes
    if in every product and sum over it one factor is always 0, in the quantized inference forward.  What reads
    positions (a concatenation, the heads in a reshape, inputs and outputs) keeps its size.  A neuron that is a constant
    c other than 0 goes as well where c * w can be added to the next bias exactly; elsewhere (no bias, BatchNorm in
    between, a kernel used twice) it stays.  One channel of each axis is kept.

    The outputs of `instrument(shrunk.model, x)` on `shrunk.view` are those of `inst` on `view` bit for bit while each
    accumulator fits float32's 24 bits, which lowering checks: leaving out zeros may change the order of a sum, and
    sums on the grid are exact in any order.  Without formats they agree to rounding.

    The small forward replays the model's own one, traced at its old size: sizes that a module fixes (`features=` of
    linen) don't matter, a mean keeps its divisor, and gradient rules of its own (a `custom_vjp`) are lost but for relu's.

    Args:
      view: what `compression.apply` returned for the finished model.
      model_state: as for `inst.forward`; default the model's own.
    Raises: TraceError, from the small forward with train=True, if training reads positions that inference does not.

    >>> import jax.numpy as jnp
    >>> from pquant_jax.graph import from_function, instrument
    >>> p = {"w": jnp.float32([[1, 0], [2, 0]]), "v": jnp.float32([[3], [4]])}
    >>> inst = instrument(from_function(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], p), jnp.ones((1, 2)))
    >>> shrunk = shrink(inst, View(p, {}, {}))
    >>> jax.tree.map(jnp.shape, shrunk.model.params), shrunk.kept["v"][0].tolist()
    ({'v': (1, 1), 'w': (2, 1)}, [0])
    """
    state = inst.model.state if model_state is None else model_state
    leaves = {"params": view.model, "state": state}
    links = Links()

    def run(leaves: Tree, sites: Tree, x: Any) -> Any:
        return inst.forward(View(leaves["params"], sites, view.masks), leaves["state"], x, train=False)

    linked = _linked(links, run, (leaves, view.sites, inst.sample))[0]
    view = folded(linked.program, view, state, inst.sample)
    leaves = {"params": view.model, "state": state}
    _linked(links, partial(_run, inst.model, train=False), (_structs(leaves), None, inst.sample))
    paths = _tree.flatten(leaves)
    owned = links.classes(((0, path), d) for path, leaf in paths.items() for d in range(np.ndim(leaf)))
    ports = {((2, path), d) for path, v in _tree.flatten(inst.sample).items() for d in range(np.ndim(v))}
    whole = links.classes(links.pins | links.born | ports)
    kept = _kept(links, linked.sinks, _there(linked, leaves, view.sites, inst.sample), owned - whole)

    def cuts(name: Any, rank: int) -> Cut:
        return tuple(kept.get(links.find((name, d))) for d in range(rank))

    found = {path: cuts((0, path), np.ndim(leaf)) for path, leaf in paths.items()}
    small = _tree.replace(leaves, {path: _cut(leaf, found[path]) for path, leaf in paths.items()})
    sites = {}
    for name, fmt in view.sites.items():
        like = found.get(f"params/{name}")
        k, i, f = (
            _cut(v, cuts((1, f"{name}/{key}"), np.ndim(v)) if like is None else _facing(np.shape(v), like))
            for key, v in zip("kif", (fmt.k, fmt.i, fmt.f), strict=True)
        )
        sites[name] = KIF(k, i, f, fmt.rounding, fmt.overflow)
    masks = {path: _cut(m, _facing(np.shape(m), found[f"params/{path}"])) for path, m in view.masks.items()}
    changed = {path: cut for path, cut in found.items() if any(part is not None for part in cut)}
    forward = partial(_replay, inst.model, _structs(leaves), changed)
    model = Model(forward, small["params"], small["state"])
    return Shrunk(
        model, View(small["params"], sites, masks), {path.removeprefix("params/"): cut for path, cut in changed.items()}
    )


def _run(model: Model, leaves: Tree, rng: Any, x: Any, *, train: bool) -> Any:
    return model.forward(leaves["params"], leaves["state"], x, train=train, rng=rng)


def _linked(links: Links, function: Any, args: tuple) -> tuple[Linked, Any]:
    """The flat program of function(*args) -> (y, state) in `links`, and the shapes of what it returns; y is pinned.

    Inputs are called (number of the argument, path).
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    names = [(n, path) for n, arg in enumerate(args) for path in _tree.flatten(arg)]
    return link(links, flatten(closed, _is_relu), names, len(jax.tree.leaves(shape[0]))), shape


def _structs(tree: Tree) -> Tree:
    return jax.eval_shape(lambda leaves: leaves, tree)


def _is_relu(eqn: Any) -> bool:
    """relu has a gradient rule of its own, which is kept."""
    call = inner(eqn)
    if call is None or eqn.primitive.name != "custom_jvp_call":
        return False
    steps = flatten(ClosedJaxpr(*call)).steps
    consts = [v.value for step in steps for v in step.ins if isinstance(v, Const)]
    return [step.eqn.primitive.name for step in steps] == ["max"] and len(consts) == 1 and not np.any(consts[0])


def _cut(leaf: Any, cut: Cut) -> Any:
    for axis, kept in enumerate(cut):
        if kept is not None:
            leaf = leaf[(slice(None),) * axis + (kept,)]
    return leaf


def _facing(shape: tuple[int, ...], cut: Cut) -> Cut:
    """The cut of a leaf for what broadcasts to it: its format, its mask."""
    own = cut[len(cut) - len(shape) :]
    return tuple(None if n == 1 else part for n, part in zip(shape, own, strict=True))


def _kept(links: Links, sinks: Sequence[Sink], there: Sequence[Sequence[np.ndarray]], owned: set[Axis]) -> dict[Axis, np.ndarray]:
    """{class: indices kept} of the classes that lose some, all of `owned` that sinks sum over.

    there: where the factors of every sink can be other than 0.
    """
    alive: dict[Axis, np.ndarray] = {}
    for sink, arrays in zip(sinks, there, strict=True):
        for axes, factor in zip(sink.axes, arrays, strict=True):
            for axis, n in zip(map(links.find, axes), factor.shape, strict=True):
                if axis in owned:
                    alive[axis] = np.ones(n, bool)
    while True:
        needed = {axis: np.zeros(v.shape, bool) for axis, v in alive.items()}
        for sink, arrays in zip(sinks, there, strict=True):
            over = links.find(sink.over[0])
            if over in needed:
                needed[over] |= np.logical_and.reduce(
                    [_reaches(links, a, f, axis, alive) for a, f, axis in zip(sink.axes, arrays, sink.over, strict=True)]
                )
        if all(np.array_equal(v, needed[axis]) for axis, v in alive.items()):
            break
        alive = needed
    for v in alive.values():
        v[0] |= not v.any()  # one channel of none: no framework likes arrays without elements
    return {axis: np.flatnonzero(v) for axis, v in alive.items() if not v.all()}


def _reaches(links: Links, axes: Sequence[Axis], factor: np.ndarray, over: Axis, alive: Mapping[Axis, np.ndarray]) -> np.ndarray:
    """Along `over`, where the factor can be other than 0 in channels that are alive."""
    for d, axis in enumerate(axes):
        if axis != over and (mask := alive.get(links.find(axis))) is not None:
            factor = factor & mask.reshape([-1 if e == d else 1 for e in range(factor.ndim)])
    return np.any(factor, tuple(d for d, axis in enumerate(axes) if axis != over))


def _there(linked: Linked, leaves: Tree, sites: Tree, sample: Any) -> list[list[np.ndarray]]:
    """Per sink and factor, where it is not 0 for every input."""
    found = iter(constants(linked.program, (leaves, sites), sample, [v for sink in linked.sinks for v in sink.factors]))
    return [[np.asarray(nonzero(*next(found))) for _ in sink.factors] for sink in linked.sinks]


def _replay(
    model: Model, leaves: Tree, kept: Mapping[str, Cut], params: Tree, state: Tree, x: Any, *, train: bool, rng: Any
) -> tuple[Any, Tree]:
    """model.forward on smaller leaves: its program at the old sizes (`leaves`), evaluated at the new ones."""
    links = Links()
    linked, shape = _linked(links, partial(_run, model, train=train), (leaves, rng, x))
    pinned, sizes = links.classes(links.pins), dict[Axis, np.ndarray]()
    for path, cut in kept.items():
        for d, indices in enumerate(cut):
            if indices is not None:
                axis = links.find(((0, path), d))
                if axis in pinned or not np.array_equal(sizes.setdefault(axis, indices), indices):
                    raise TraceError(
                        f"axis {d} of {path!r} was cut for inference, but the forward with train={train} reads its positions; "
                        "use the small model for inference, or train the large one"
                    )
    values = _evaluate(links, linked, sizes, jax.tree.leaves(({"params": params, "state": state}, rng, x)))
    return jax.tree.unflatten(jax.tree.structure(shape), values)


def _evaluate(links: Links, linked: Linked, kept: Mapping[Axis, np.ndarray], values: Sequence[Any]) -> list[Any]:
    program = linked.program
    env: dict[int, Any] = dict(zip(program.inputs, values, strict=True))

    def fit(v: int | Const, axes: Sequence[Axis], full: Sequence[int]) -> Any:
        """A value; what was made at the old size (a constant, random bits) is cut now."""
        value = np.asarray(v.value) if isinstance(v, Const) and axes else env[v] if isinstance(v, int) else v.value
        cut = [kept.get(links.find(axis)) if np.shape(value)[d] == full[d] else None for d, axis in enumerate(axes)]
        return _cut(value, tuple(cut))

    for step, axes in zip(program.steps, linked.axes, strict=True):
        ins = [fit(v, a, var.aval.shape) for v, a, var in zip(step.ins, axes[:-1], step.eqn.invars, strict=True)]
        if step.eqn.primitive.name == "custom_jvp_call":
            outs = [jax.nn.relu(*ins)]
        else:
            outs = bind(_resized(step.eqn, [kept.get(links.find(axis)) for axis in axes[-1]]), ins)
        env.update(zip(step.outs, outs, strict=True))
    return [v.value if isinstance(v, Const) else env[v] for v in program.outputs]


def _resized(eqn: Any, cut: Sequence[np.ndarray | None]) -> Any:
    """The equation with the sizes of its result where they are among its parameters."""
    shape = eqn.outvars[0].aval.shape
    name, sizes = eqn.primitive.name, tuple(n if kept is None else len(kept) for n, kept in zip(shape, cut, strict=True))
    if sizes == tuple(shape) or name not in ("broadcast_in_dim", "reshape", "slice"):
        return eqn
    if name == "slice":
        limits = [
            n if kept is not None else limit for n, kept, limit in zip(sizes, cut, eqn.params["limit_indices"], strict=True)
        ]
        return eqn.replace(params={**eqn.params, "limit_indices": tuple(limits)})
    return eqn.replace(params={**eqn.params, "shape" if name == "broadcast_in_dim" else "new_sizes": sizes})
