"""What every compression method must do, in one table: the methods of `prune` are in it by themselves."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pquant_jax import prune, quantize
from pquant_jax._base import KIF, AxisRole, Event, Params, SiteSpec, Stage, State, Transform, View
from pquant_jax.constrain import mdmm, metrics, patterns
from pquant_jax.numerics import total_bits
from pquant_jax.prune import NM, Block, Cross, ap, autosparse, cs, dst, frozen, magnitude, pdp, wanda
from pquant_jax.quantize import Format, dynamic, fixed, hgq, minifloat
from pquant_jax.transforms import chain, identity, masked, named, with_hyper

SITES = {
    "a/input": SiteSpec((4,), "input", signed=True, channel_axes=(0,)),
    "a/kernel": SiteSpec((4, 3), "kernel", channel_axes=(1,)),
    "a/bias": SiteSpec((3,), "bias"),
    "b/input": SiteSpec((3,), "input", signed=False, channel_axes=(0,)),
    "b/kernel": SiteSpec((3, 2), "kernel", channel_axes=(1,)),
}
SHAPES = {"a": (4, 3), "b": (3, 2)}
A_SITES = {name: spec for name, spec in SITES.items() if name.startswith("a/")}
ROLES = {"a/kernel": AxisRole((0,), (1,), "a/input"), "b/kernel": AxisRole((0,), (1,), "b/input")}


def cost(view: View) -> jax.Array:
    """Bits times bits, differentiable: EBOPs of the two products."""
    sites = {name: total_bits(fmt) for name, fmt in view.sites.items()}
    pairs = [(sites[f"{n}/input"], sites[f"{n}/kernel"]) for n in "ab" if f"{n}/kernel" in sites]
    return sum((jnp.sum(x) * jnp.sum(w) for x, w in pairs), jnp.zeros((), jnp.float32))


def prune_dst(granularity: str = "weight") -> Transform:
    return dst(alpha=1e-3, threshold_init=0.1, granularity=granularity, roles=ROLES)


def prune_pdp(**more: Any) -> Transform:
    return pdp(**{"sparsity": 0.5, **more}, epsilon=0.5, temperature=0.1)  # a sharper one magnifies the last bit of w * w


def trained(weights: str = "SAT_SYM", activations: str = "WRAP", granularity: str = "element") -> Transform:
    w, a = (Format(i=1, f=4, overflow=overflow, granularity=granularity) for overflow in (weights, activations))
    return hgq(SITES, beta=1e-4, beta_end=1e-3, gamma=1e-6, cost=cost, weights=w, activations=a)


def formats() -> Transform:
    return fixed(SITES, weights=Format(k=1, i=0, f=3), activations=Format(i=2, f=3))


def constrained(**options: Any) -> Transform:
    metric = metrics.sparsity(epsilon=0.3, mode="smooth", alpha=1.0, per="layer")
    return mdmm(metric, **{"kind": ">=", "target": 0.9, "prunes": 0.3, **options})


def few_patterns() -> Transform:
    found = patterns(num_patterns=2, block=(2, 2), distance="valued_hamming", epsilon=0.3, roles=ROLES)
    return mdmm(found.metric, kind="==", target=0.0, prunes=found.masks)


def least(factory: Callable[..., Transform]) -> Callable[[], Transform]:
    """A method of `prune` with no more than it has to be given, so that a new one is in this battery by itself."""
    needed = {"sparsity": 0.5, "alpha": 1e-3, "masks": {"a/kernel": np.eye(4, 3)}}
    parameters = inspect.signature(factory).parameters.values()
    return functools.partial(factory, **{p.name: needed[p.name] for p in parameters if p.default is p.empty})


def widths(view: View) -> jax.Array:
    """Bits of the kernels alone."""
    kernels = [view.sites[f"{n}/kernel"] for n in "ab" if f"{n}/kernel" in view.sites]
    return sum((jnp.sum(total_bits(fmt)) for fmt in kernels), jnp.zeros((), jnp.float32))


QUANTIZERS = {n: f for n, f in vars(quantize).items() if inspect.isfunction(f) and f.__annotations__.get("return") == "Transform"}
PRUNING = {name: f for name, f in vars(prune).items() if inspect.isfunction(f) and f.__annotations__["return"] == "Transform"}
METHODS: dict[str, Callable[[], Transform]] = {
    **{name: least(factory) for name, factory in PRUNING.items()},
    **{name: functools.partial(factory, SITES) for name, factory in QUANTIZERS.items() if name not in ("hgq", "frozen")},
    "identity": identity,
    "autosparse": lambda: autosparse(threshold_init=-1.0),
    "autosparse weight": lambda: autosparse(granularity="weight", backward_sparsity=0.5, target=0.5, roles=ROLES),
    "autosparse layer, PQuantML's": lambda: autosparse(granularity="layer", alpha_reset_epoch=2, compat="pquantml"),
    "cs": lambda: cs(decay=1e-3),
    "cs to a target": lambda: cs(decay=1e-3, threshold_init=-0.1, target=0.5),
    "cs, PQuantML's": lambda: cs(compat="pquantml"),
    "dst": prune_dst,
    "dst channel": lambda: prune_dst("channel"),
    "dst layer": lambda: prune_dst("layer"),
    "dst to a target": lambda: dst(alpha=1e-3, threshold_init=0.1, target=0.5),
    "dst, PQuantML's": lambda: dst(alpha=1e-3, max_sparsity=0.5, compat="pquantml"),
    "ap": lambda: ap(threshold=0.4, roles=ROLES),
    "ap by target": lambda: ap(target=0.5, begin=1, period=2),
    "ap as PQuantML": lambda: ap(threshold=0.4, compat="pquantml"),
    "frozen": lambda: frozen({f"{n}/kernel": np.indices(s).sum(0) % 2 for n, s in SHAPES.items()}),
    "pdp": prune_pdp,
    "pdp row, by Fisher": lambda: prune_pdp(groups="row", budget="fisher"),
    "pdp out": lambda: prune_pdp(groups="out", roles=ROLES),
    "pdp N:M": lambda: prune_pdp(groups=NM(1, 2)),
    "pdp blocks, global": lambda: prune_pdp(sparsity={"a/.*": 0.3, ".*": 0.6}, groups=Block(3, 2), budget="global"),
    "pdp cross": lambda: prune_pdp(groups=Cross()),
    "pdp as PQuantML": lambda: prune_pdp(compat="pquantml"),
    "magnitude out, by Fisher": lambda: magnitude(sparsity={"a/.*": 0.3, ".*": 0.6}, groups="out", budget="fisher", roles=ROLES),
    "magnitude N:M": lambda: magnitude(sparsity=0.5, groups=NM(1, 2), budget="global"),
    "wanda": lambda: wanda(sparsity=0.5, end=3),
    "wanda out, by Fisher": lambda: wanda(sparsity={"a/.*": 0.3, ".*": 0.6}, groups="out", budget="fisher", roles=ROLES),
    "wanda N:M": lambda: wanda(sparsity=0.5, groups=NM(1, 2), begin=1, end=3),
    "wanda as PQuantML": lambda: wanda(sparsity=0.5, budget="global", compat="pquantml"),
    "mdmm": constrained,
    "mdmm, groups": lambda: mdmm(metrics.group_sparsity("out", epsilon=0.5, roles=ROLES), kind="==", target=0.4, damping=0.5),
    "mdmm, patterns": few_patterns,
    "mdmm of the reference": lambda: constrained(compat="pquantml", kind="=="),
    "dynamic": lambda: dynamic(SITES, weights=Format(k=1, i=0, f=3, granularity="channel"), decay=0.1),
    "minifloat": lambda: minifloat(SITES, m=2.0, beta=1e-3, cost=widths),
    "fixed": formats,
    "frozen formats": lambda: quantize.frozen(SITES, {n: KIF(1, 1, np.arange(s.shape[-1])) for n, s in SITES.items()}),
    "hgq SAT": lambda: trained("SAT", "SAT"),
    "hgq SAT_SYM": lambda: trained("SAT_SYM", "SAT_SYM"),
    "hgq WRAP": lambda: trained("WRAP", "WRAP"),
    "hgq channel": lambda: trained(granularity="channel"),
    "hgq tensor": lambda: trained("WRAP", granularity="tensor"),
    "autosparse + hgq": lambda: chain(autosparse(threshold_init=-1.0, roles=ROLES), trained()),
    "cs + fixed": lambda: chain(cs(decay=1e-3), formats()),
    "dst + hgq": lambda: chain(prune_dst(), trained()),
    "hgq + dst": lambda: chain(trained(), prune_dst()),
    "hgq + mdmm": lambda: chain(trained(), mdmm(metrics.ebops(cost, unit=100.0), kind="<=", target=1.0)),
    "pdp + fixed": lambda: chain(prune_pdp(), formats()),
    "fixed + pdp": lambda: chain(formats(), prune_pdp()),
    "masked dst": lambda: masked(prune_dst(), "a/.*"),
    "masked hgq": lambda: masked(hgq(A_SITES, cost=cost), r"a/.*"),
    "named dst": lambda: named(prune_dst(), "other"),
    "masked, named, chained": lambda: chain(named(masked(prune_dst(), "a/.*"), "one"), masked(named(prune_pdp(), "two"), "b/.*")),
}


class Ready(NamedTuple):
    """A method, its parameters and its state at the second epoch of the training stage.

    start: (model) -> (params, state) and run: (params, state, told) -> `everything`, both jitted; a second trace of
    `run` fails wherever it happens.
    """

    t: Transform
    params: Params
    state: State
    start: Callable
    run: Callable


def a_model(seed: int = 0) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    shapes = {n: {"kernel": s, "bias": s[1:]} for n, s in SHAPES.items()}
    return jax.tree.map(lambda s: 0.6 * jax.random.normal(next(keys), s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def told(stage: Any = Stage.TRAIN, **more: Any) -> dict[str, Any]:
    spans = {name: (jnp.full(s.shape, -1.3 * s.signed), jnp.full(s.shape, 2.1)) for name, s in SITES.items() if s.kind == "input"}
    kernels = {f"{n}/kernel": s for n, s in SHAPES.items()}
    by_kernel = {
        "square": {p: jnp.linspace(0.1, 2, s[0])[:, None] for p, s in kernels.items()},
        "active": {p: jnp.linspace(0, 1, s[1])[None] for p, s in kernels.items()},
        "gradient": {p: jnp.linspace(-1, 1, s[0] * s[1]).reshape(s) for p, s in kernels.items()},
    }
    return dict(stage=jnp.asarray(stage, jnp.int32), stats={"range": spans, **by_kernel}, **more)


def when(event: Any = Event.PRE_EPOCH, epoch: Any = 1, epochs: Any = 4) -> dict[str, Any]:
    return {name: jnp.asarray(v, jnp.int32) for name, v in dict(event=event, epoch=epoch, epochs=epochs).items()}


def start(t: Transform, model: Any) -> tuple[Params, State]:
    """Trainables off their round initial values, in the training stage, with stored masks."""
    params = t.attach(model)
    params = params._replace(extra=jax.tree.map(lambda v: v + 0.13, params.extra))
    state = t.init(params)
    for event in (Event.PRE_EPOCH, Event.POST_EPOCH):
        params, state = t.boundary(params, state, stage=jnp.int32(Stage.TRAIN), stats={}, **when(event))
    return t.step(params, state, previous=params, **told())


def types(tree: Any) -> Any:
    """Structure, shapes, dtypes and weakness of a tree: what decides over a recompilation."""
    avals = jax.tree.map(lambda v: (jnp.shape(v), str(jnp.result_type(v)), getattr(v, "weak_type", False)), tree)
    return jax.tree.structure(tree), jax.tree.leaves(avals)


def assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def hypers(state: State) -> dict[str, jax.Array]:
    """Every hyperparameter of a state, under the name that `with_hyper` takes."""
    if isinstance(state, dict):
        return {f"{method}__{name}": v for method, sub in state.items() for name, v in hypers(sub).items()}
    return dict(state.hyper)


def everything(t: Transform, params: Params, state: State, told: dict[str, Any]) -> dict[str, Any]:
    """One pass through every function of a method."""

    def loss(params: Params) -> tuple[jax.Array, tuple[View, jax.Array]]:
        view, _ = t.apply(params, state)
        penalty = t.penalty(params, state, view)
        return sum(jnp.sum(jnp.sin(w)) for w in jax.tree.leaves(view.model)) + penalty, (view, penalty)

    grads, (view, penalty) = jax.grad(loss, has_aux=True)(params)
    stepped = t.step(params, state, previous=params, **told)
    turned = t.boundary(params, state, **{**told, "stats": {}}, **when())
    return dict(view=view, penalty=penalty, grads=grads, step=stepped, boundary=turned)


@functools.cache
def prepared(name: str) -> Ready:
    t = METHODS[name]()

    def run(params: Params, state: State, told: dict[str, Any]) -> dict[str, Any]:
        return everything(t, params, state, told)

    run.__name__ = f"everything of {name}"  # chex counts the traces of a function by its name and source
    begin = jax.jit(lambda model: start(t, model))
    return Ready(t, *begin(a_model()), begin, jax.jit(chex.assert_max_traces(run, n=1)))


@pytest.fixture(params=METHODS)
def ready(request: pytest.FixtureRequest) -> Ready:
    return prepared(request.param)


def test_signatures(ready):
    t = ready.t
    assert isinstance(t.name, str) and t.name and t.needs <= {"range", "square", "active", "gradient"}
    assert list(inspect.signature(t.attach).parameters) in (["model"], ["model_params"])
    assert list(inspect.signature(t.init).parameters) == ["params"]
    assert list(inspect.signature(t.apply).parameters) == ["params", "state"]
    assert list(inspect.signature(t.penalty).parameters) == ["params", "state", "view"]
    assert list(inspect.signature(t.labels).parameters) == ["params"]
    for hook in (t.step, t.boundary):
        parameters = inspect.signature(hook).parameters
        assert list(parameters)[:2] == ["params", "state"]
        assert [p for p in parameters.values() if p.kind is p.VAR_KEYWORD], "unknown extra arguments must be accepted"


def same_leaves(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x is y for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_apply_returns_a_view_and_the_state_as_it_was(ready):
    def applied(params, state):
        view, after = ready.t.apply(params, state)
        assert isinstance(view, View) and same_leaves(after, state)
        return view

    jax.eval_shape(applied, ready.params, ready.state)
    view = ready.run(ready.params, ready.state, told())["view"]
    assert types(view.model) == types(ready.params.model)
    assert set(view.masks) <= {"a/kernel", "a/bias", "b/kernel", "b/bias"} and set(view.sites) <= set(SITES)
    for path, m in view.masks.items():
        layer, leaf = path.split("/")
        assert m.shape == view.model[layer][leaf].shape and np.all((m >= 0) & (m <= 1))


def test_attach_adds_and_takes_nothing(ready):
    model = a_model()
    params = ready.t.attach(model)
    assert isinstance(params, Params) and isinstance(params.extra, dict)
    assert same_leaves(params.model, model)
    assert types(params) == types(ready.params)
    assert types(ready.t.init(params)) == types(ready.state)


def test_no_leaf_is_weakly_typed(ready):
    fresh = ready.t.attach(a_model())
    for leaf in jax.tree.leaves((ready.params, ready.state, fresh, ready.t.init(fresh))):
        assert isinstance(leaf, jax.Array) and not leaf.weak_type


def test_labels_have_the_structure_of_the_parameters(ready):
    labels = ready.t.labels(ready.params)
    assert jax.tree.structure(labels) == jax.tree.structure(ready.params)
    assert set(jax.tree.leaves(labels.model)) == {"weights"}
    assert set(jax.tree.leaves(labels.extra)) <= {"bits", "thresholds", "duals"}


def in_every_stage(ready: Ready) -> list[tuple[Params, State]]:
    return [ready.run(ready.params, ready.state, told(stage))["step"] for stage in Stage]


def test_the_penalty_is_a_float32_scalar(ready):
    for params, state in in_every_stage(ready):
        value = ready.run(params, state, told())["penalty"]
        assert types(value) == types(jnp.zeros((), jnp.float32)) and np.isfinite(value)


def test_gradients_are_finite_in_every_stage(ready):
    for params, state in in_every_stage(ready):
        grads = ready.run(params, state, told())["grads"]
        assert types(grads) == types(params)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
        assert any(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(grads.model)), "no gradient reaches the weights"


def program(function: Callable, *args: Any) -> str:
    """The computation of a call, as text: equal texts are equal computations."""
    return str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize("hook", ["step", "boundary"])
def test_unknown_arguments_and_the_raw_view_change_nothing(ready, hook):
    def called(**more):
        numbers = {**told(), **(when() if hook == "boundary" else {})}

        def call(params, state):
            given = {**more, "view": View(params.model, {}, {})} if "view" in more else more
            return getattr(ready.t, hook)(params, state, **numbers, **given)

        return program(call, ready.params, ready.state)

    alone = called()
    assert called(loss=jnp.float32(1), grads=ready.params, step_number=jnp.int32(3)) == alone
    assert called(view=None) == alone


def test_jit_equals_eager(ready):
    t, params, state, *_ = ready
    assert_close(ready.run(params, state, told()), everything(t, params, state, told()))


def test_the_state_is_stable_under_scan_and_cond(ready):
    t, params, state, *_ = ready

    def body(carry, again):
        params, state = carry
        carry = jax.lax.cond(
            again,
            lambda: t.step(params, state, previous=params, **told()),
            lambda: t.boundary(params, state, **told(), **when()),
        )
        return carry, t.penalty(*carry, t.apply(*carry)[0])

    carry, penalties = jax.jit(lambda p, s: jax.lax.scan(body, (p, s), jnp.array([True, False, True, True])))(params, state)
    assert types(carry) == types((params, state))
    assert np.all(np.isfinite(penalties))


def test_boundary_accepts_every_event_and_stage_under_jit(ready):
    t, params, state, *_ = ready
    traces = []

    @jax.jit
    def run(p, s, told, numbers):
        traces.append(told)  # jax's own count of compilations forgets in a long process
        return t.boundary(p, s, **told, **numbers)

    for stage in Stage:
        for event in Event:
            more = told(stage) if event == Event.CALIBRATE else {**told(stage), "stats": {}}
            assert types(run(params, state, more, when(event))) == types((params, state))
    assert len(traces) == 2, "one trace with statistics and one without"


def test_nothing_recompiles(ready):
    """Not on the second call, not in another stage, and not on a new value of any hyperparameter."""
    params, state = ready.params, ready.state
    again = ready.run(params, state, told())["boundary"]
    for stage in Stage:
        ready.run(*again, told(stage))
    for name, value in hypers(state).items():
        ready.run(params, with_hyper(state, **{name: float(value) * 0.5}), told())


def test_vmap_over_a_population_equals_the_loop(ready):
    """Members differ in their seed and in every hyperparameter."""
    t, members = ready.t, []
    for seed in range(3):
        params, state = ready.start(a_model(seed))
        scaled = {name: v if v.dtype == bool else v * (0.5 + 0.25 * seed) for name, v in hypers(state).items()}
        members.append((params, with_hyper(state, **scaled)))
    params, state = jax.tree.map(lambda *v: jnp.stack(v), *members)
    together = jax.jit(jax.vmap(lambda p, s: everything(t, p, s, told())))(params, state)
    one_by_one = [ready.run(*member, told()) for member in members]
    assert_close(together, jax.tree.map(lambda *v: jnp.stack(v), *one_by_one))
    assert types(jax.vmap(t.init)(params)) == types(state)


def test_a_checkpoint_gives_the_same_results(ready, tmp_path):
    """Written by path, as any tool would that knows nothing of the types."""
    tree = (ready.params, ready.state)
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    assert len(by_path) == len(jax.tree.leaves(tree))
    (tmp_path / "state.msgpack").write_bytes(flax.serialization.msgpack_serialize(by_path))
    read = flax.serialization.msgpack_restore((tmp_path / "state.msgpack").read_bytes())
    back = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(read[jax.tree_util.keystr(path)]), tree)
    assert types(back) == types(tree)
    for ours, theirs in zip(*(jax.tree.leaves(ready.run(*trees, told())) for trees in (back, tree)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_orbax_checkpoint_keeps_every_kind_of_state(tmp_path):
    names = ("dst + hgq", "pdp + fixed", "hgq tensor", "masked, named, chained")
    trees = {name: (prepared(name).params, prepared(name).state) for name in names}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", trees)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "checkpoint", jax.tree.map(ocp.utils.to_shape_dtype_struct, trees))
    assert types(back) == types(trees)
    for ours, theirs in zip(*map(jax.tree.leaves, (back, trees)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
