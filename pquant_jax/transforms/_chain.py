"""`chain`: methods one after the other; each sees the view the one before it made."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pquant_jax._base import Params, State, Transform, Tree, View
from pquant_jax._errors import TransformError
from pquant_jax.numerics import settle_together
from pquant_jax.transforms._parts import Hyper, entering, keep_params, labelled, no_penalty


class NoState(NamedTuple):
    """hyper: none."""

    hyper: Hyper


def chain(*transforms: Transform) -> Transform:
    """Compose transforms; views go left to right, so that prune-then-quantize and its reverse both mean what they say.

    State and `extra` are dicts keyed by the method's name; penalties add up and each sees the final view.  In `step`
    and `boundary` each method gets the view that enters it.
    Raises: TransformError for a duplicate name (rename one: `pq.named(transform, "other")`).

    >>> from pquant_jax.prune import dst, pdp
    >>> chain(dst(alpha=1e-6), pdp(sparsity=0.5)).name
    'chain(dst, pdp)'
    """
    names = [t.name for t in transforms]
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise TransformError(f"two transforms of one chain are named {doubled[0]!r}; rename one with pq.named(transform, '...')")

    def attach(model: Tree) -> Params:
        return Params(model, {name: tree for t in transforms for name, tree in t.attach(model).extra.items()})

    def init(params: Params) -> State:
        return {t.name: t.init(params) for t in transforms}

    def views(params: Params, state: State) -> list[View]:
        """The view that enters each transform, and last the one that leaves the chain."""
        view, seen = View(params.model, {}, {}), []
        for t in transforms:
            seen.append(view)
            view = _merge(view, t.apply(Params(view.model, params.extra), state[t.name])[0])
        return [*seen, view]

    def apply(params: Params, state: State) -> tuple[View, State]:
        return views(_settled(params), state)[-1], state

    def run(hook: str, params: Params, state: State, extra: dict[str, Any]) -> tuple[Params, State]:
        # what no method reads of these views is dead code to the compiler
        entering_views, new_extra, new_state = views(params, state), dict(params.extra), dict(state)
        for t, view in zip(transforms, entering_views[:-1], strict=True):
            stepped, new_state[t.name] = getattr(t, hook)(params, state[t.name], view=view, **extra)
            new_extra.update({name: stepped.extra[name] for name in t.labels(params).extra})  # its own, a chain's are several
        return Params(params.model, new_extra), new_state

    def step(params: Params, state: State, *, view: View | None = None, **extra: Any) -> tuple[Params, State]:
        del view
        return run("step", params, state, extra)

    def boundary(params: Params, state: State, *, view: View | None = None, **extra: Any) -> tuple[Params, State]:
        del view
        return run("boundary", params, state, extra)

    def penalty(params: Params, state: State, view: View) -> jax.Array:
        return sum((t.penalty(params, state[t.name], view) for t in transforms), jnp.zeros((), jnp.float32))

    def labels(params: Params) -> Params:
        model = jax.tree.map(lambda _: "weights", params.model)
        return Params(model, {name: tree for t in transforms for name, tree in t.labels(params).extra.items()})

    needs = frozenset().union(*(t.needs for t in transforms))
    formats = {site: choice for t in transforms for site, choice in t.formats.items()}
    return Transform(f"chain({', '.join(names)})", attach, init, apply, step, boundary, penalty, labels, needs, formats)


@jax.custom_vjp
def _settled(params: Params) -> Params:
    """The identity, whose gradients are computed once, and all of them before the optimizer uses one."""
    return params


_settled.defvjp(lambda params: (params, None), lambda _, gradient: (settle_together(gradient),))


def _merge(before: View, after: View) -> View:
    masks = dict(before.masks)
    for path, m in after.masks.items():
        masks[path] = masks[path] * m if path in masks else m
    return View(after.model, {**before.sites, **after.sites}, masks)


def named(transform: Transform, name: str) -> Transform:
    """`transform` under another name, so that one method can appear twice in a chain."""
    old = transform.name

    def inward(params: Params) -> Params:
        extra = {k: v for k, v in params.extra.items() if k != old}
        return Params(params.model, {**extra, old: params.extra[name]} if name in params.extra else extra)

    def outward(params: Params) -> Params:
        return Params(params.model, {name if k == old else k: v for k, v in params.extra.items()})

    def hook(function):
        def run(params: Params, state: State, **extra: Any) -> tuple[Params, State]:
            if extra.get("previous") is not None:
                extra["previous"] = inward(extra["previous"])
            new, state = function(inward(params), state, view=entering(params, extra.pop("view", None)), **extra)
            return outward(new), state

        return run

    return transform._replace(
        name=name,
        attach=lambda model: outward(transform.attach(model)),
        init=lambda params: transform.init(inward(params)),
        apply=lambda params, state: transform.apply(inward(params), state),
        step=hook(transform.step),
        boundary=hook(transform.boundary),
        penalty=lambda params, state, view: transform.penalty(inward(params), state, view),
        labels=lambda params: outward(transform.labels(inward(params))),
    )


def identity() -> Transform:
    """The transform that changes nothing: the float model, trained by the same code."""

    def attach(model: Tree) -> Params:
        return Params(model, {})

    def init(params: Params) -> NoState:
        del params
        return NoState({})

    def apply(params: Params, state: State) -> tuple[View, State]:
        return View(params.model, {}, {}), state

    return Transform("identity", attach, init, apply, keep_params, keep_params, no_penalty, labelled("identity", "weights"))
