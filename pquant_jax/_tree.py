"""Level 0: parameter paths.  A tree is looked at as `{path: leaf}`; the path is the leaf's keys joined by "/"."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax._errors import TransformError, did_you_mean

Where = str | Callable[[str, Any], bool]


def path_str(path: tuple) -> str:
    """The readable form of a key path: `(DictKey('Dense_0'), DictKey('kernel'))` -> `Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """All leaves by path, in tree order.

    >>> flatten({"Dense_0": {"kernel": 1, "bias": 2}})
    {'Dense_0/bias': 2, 'Dense_0/kernel': 1}
    """
    return {path_str(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with the leaves at the given paths replaced; every path must exist.

    >>> replace({"a": 1, "b": 2}, {"b": 3})
    {'a': 1, 'b': 3}
    """
    missing = set(leaves) - set(flatten(tree))
    if missing:
        name = sorted(missing)[0]
        raise TransformError(f"no parameter {name!r}; {did_you_mean(name, flatten(tree))}")
    return jax.tree_util.tree_map_with_path(lambda p, leaf: leaves.get(path_str(p), leaf), tree)


def is_kernel(path: str, leaf: Any) -> bool:
    """The default selection of every pruning method: float arrays of rank two and more."""
    del path
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def matches(where: Where, path: str, leaf: Any = None) -> bool:
    """Does `where` (an exact path, a regular expression on the whole path, or a predicate) select this leaf?"""
    if callable(where):
        return bool(where(path, leaf))
    try:
        return where == path or re.fullmatch(where, path) is not None
    except re.error as error:
        raise TransformError(f"the rule {where!r} is neither a path nor a regular expression: {error}") from error


def select(tree: Any, where: Where) -> dict[str, Any]:
    """The leaves that `where` selects; a rule that matches nothing is an error with the closest names.

    >>> sorted(select({"Dense_0": {"kernel": 1, "bias": 2}}, ".*/kernel"))
    ['Dense_0/kernel']
    """
    leaves = flatten(tree)
    chosen = {path: leaf for path, leaf in leaves.items() if matches(where, path, leaf)}
    if not chosen:
        what = where if isinstance(where, str) else getattr(where, "__name__", repr(where))
        raise TransformError(f"the rule {what!r} matches no parameter; {did_you_mean(str(what), leaves)}")
    return chosen


def first_match(rules: Iterable[tuple[Where, Any]], path: str, default: Any, leaf: Any = None) -> Any:
    """The value of the first rule that matches `path` (and `leaf`, for a predicate), else `default`."""
    for where, value in rules:
        if matches(where, path, leaf):
            return value
    return default


def sparsity(masks: Mapping[str, Any]) -> jax.Array:
    """zeros / total over all masks, a fraction; a soft mask counts as zero where it is exactly 0."""
    zeros = sum((jnp.sum((m == 0).astype(jnp.float32)) for m in masks.values()), jnp.zeros((), jnp.float32))
    total = sum(m.size for m in masks.values())
    return zeros / jnp.float32(max(total, 1))
