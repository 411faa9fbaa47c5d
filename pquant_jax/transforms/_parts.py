"""The parts a method is assembled from, and path selection as a combinator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import Params, State, Transform, Tree, View
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.numerics import mask

Hyper = dict[str, jax.Array]


def hyper(**values: float | bool | jax.Array) -> Hyper:
    """Hyperparameters as strongly typed arrays: float32, or bool for switches.

    A weakly typed leaf recompiles the step once it meets a strong one, so every leaf gets a dtype here.

    >>> {k: str(v.dtype) for k, v in hyper(beta=1e-5, freeze=True).items()}
    {'beta': 'float32', 'freeze': 'bool'}
    """
    return {k: jnp.asarray(v, jnp.bool_ if jnp.result_type(v) == jnp.bool_ else jnp.float32) for k, v in values.items()}


def with_hyper(state: State, /, **values: Any) -> State:
    """`state` with hyperparameters replaced; shapes and dtypes stay, so nothing recompiles.

    A name is looked for in every method of a chain; where two methods have it, write `method__name`.
    Raises: TransformError if a name is unknown or ambiguous.
    """
    for key, value in values.items():
        method, _, name = key.rpartition("__")
        owners = [m for m, hypers in _hypers(state).items() if name in hypers and method in ("", m)]
        if not owners:
            known = [n for hypers in _hypers(state).values() for n in hypers]
            raise TransformError(f"no hyperparameter {key!r}; {did_you_mean(key, known)}")
        if len(owners) > 1:
            options = " or ".join(f"{m}__{name}" for m in owners)
            raise TransformError(f"hyperparameter {name!r} belongs to {len(owners)} methods; write {options}")
        state = _set_hyper(state, owners[0], name, value)
    return state


def _hypers(state: State) -> dict[str, Hyper]:
    if isinstance(state, Mapping):
        return {owner or name: h for name, sub in state.items() for owner, h in _hypers(sub).items()}
    return {"": state.hyper}


def _set_hyper(state: State, method: str, name: str, value: Any) -> State:
    if isinstance(state, Mapping):
        owner = next(key for key, sub in state.items() if key == method or method in _hypers(sub))
        return {**state, owner: _set_hyper(state[owner], method, name, value)}
    old = state.hyper[name]
    # a population carries one value per member, hence no check of the shape
    return state._replace(hyper={**state.hyper, name: jnp.asarray(value, old.dtype)})


def keep_params(params: Params, state: State, **_: Any) -> tuple[Params, State]:
    """The `step` and `boundary` of a method that needs none."""
    return params, state


def no_penalty(params: Params, state: State, view: View) -> jax.Array:
    """The `penalty` of a method that has none: float32 zero."""
    del params, state, view
    return jnp.zeros((), jnp.float32)


def labelled(name: str, label: str) -> Callable[[Params], Params]:
    """`labels` of a method whose trainables all share one label; the model's parameters are "weights"."""

    def labels(params: Params) -> Params:
        model = jax.tree.map(lambda _: "weights", params.model)
        return Params(model, {name: jax.tree.map(lambda _: label, params.extra[name])} if name in params.extra else {})

    return labels


def entering(params: Params, view: View | None) -> View:
    """The view that enters a method: what the chain passes, or the raw parameters where it stands alone."""
    return View(params.model, {}, {}) if view is None else view


def check_compat(compat: str | None) -> bool:
    """Whether the reference's behaviour is wanted.  Raises: TransformError for an unknown name."""
    if compat not in (None, "pquantml"):
        raise TransformError(f"compat is {compat!r}; {did_you_mean(str(compat), ['pquantml'])}; expected 'pquantml' or None")
    return compat is not None


def kernels_of(model: Tree) -> dict[str, jax.Array]:
    """The leaves that pruning is about.  Raises: TransformError if there are none."""
    return _tree.select(model, _tree.is_kernel)


def masked_view(model: Tree, masks: Mapping[str, jax.Array]) -> View:
    """`model` with every mask on its leaf."""
    leaves = _tree.flatten(model)
    return View(_tree.replace(model, {p: mask(leaves[p], m) for p, m in masks.items()}), {}, dict(masks))


def masked(transform: Transform, where: _tree.Where) -> Transform:
    """Apply `transform` only to the parameters that `where` selects: a path, a regular expression, or (path, leaf) -> bool.

    Inside, the method sees a flat `{path: leaf}` tree of the selected leaves.
    Raises: TransformError at `attach` if the rule matches nothing.

    >>> import jax.numpy as jnp
    >>> from pquant_jax.prune import dst
    >>> model = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
    >>> sorted(masked(dst(alpha=1e-6), "a/.*").attach(model).extra["dst"])
    ['a/kernel']
    """

    def narrow(tree: Tree) -> dict[str, Any]:
        return _tree.select(tree, where)

    def inner(params: Params) -> Params:
        return Params(narrow(params.model), params.extra)

    def inner_view(view: View) -> View:
        return view._replace(model=narrow(view.model))

    def attach(model: Tree) -> Params:
        return Params(model, transform.attach(narrow(model)).extra)

    def apply(params: Params, state: State) -> tuple[View, State]:
        view, state = transform.apply(inner(params), state)
        return view._replace(model=_tree.replace(params.model, view.model)), state

    def moved(hook: Callable[..., tuple[Params, State]]) -> Callable[..., tuple[Params, State]]:
        def run(params: Params, state: State, *, view: View | None = None, **extra: Any) -> tuple[Params, State]:
            if extra.get("previous") is not None:
                extra["previous"] = inner(extra["previous"])
            new, state = hook(inner(params), state, view=inner_view(entering(params, view)), **extra)
            return Params(params.model, new.extra), state

        return run

    def labels(params: Params) -> Params:
        return Params(jax.tree.map(lambda _: "weights", params.model), transform.labels(inner(params)).extra)

    return transform._replace(
        attach=attach,
        init=lambda params: transform.init(inner(params)),
        apply=apply,
        step=moved(transform.step),
        boundary=moved(transform.boundary),
        penalty=lambda params, state, view: transform.penalty(inner(params), state, inner_view(view)),
        labels=labels,
    )
