"""Formats that the layers of a model ask for, and the sites that get them.

A wish is a `numerics.site` of kind "format" on a parameter, its name a role: "" the parameter itself, "input" what the
layer reads, another one a site beside the parameter ("fused_scale"), "/NAME" the site NAME.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pquant_jax._base import SiteSpec
from pquant_jax._errors import TraceError, did_you_mean
from pquant_jax.graph._sites import Run, input_name, joined
from pquant_jax.graph._values import Value

WISHES = frozenset({"format", "target"})  # "target" is for pruning: `pq.nn.targets`


def wish(run: Run, eqn: Any, x: Value) -> Value:
    """Write a wish down; nothing is computed.  Raises: TraceError if it is not about a parameter."""
    role, kind, fmt = eqn.params["name"], eqn.params["kind"], eqn.params["format"]
    if x.leaf is None:
        raise TraceError(f"the wish for {role or 'a ' + kind!r} of {fmt} stands on a computed value; put it on a parameter")
    return ask(run, x.leaf[0], role, fmt, x) if kind == "format" else x


def ask(run: Run, path: str, role: str, fmt: Any, x: Value) -> Value:
    """x, with the wish of the parameter `path` for a format written down.  Raises: TraceError for two that differ."""
    if run.wishes.setdefault((path, role), fmt) != fmt:
        raise TraceError(f"{path}: two uses ask for different formats of {role or 'it'}; it is one parameter, ask once")
    return x


def granted(run: Run) -> dict[str, SiteSpec]:
    """The specs of the sites that are asked for, with their formats.

    Raises: TraceError for a site that does not exist, and for layers that share one and ask for different formats.
    """
    formats: dict[str, Any] = {}
    for (path, role), fmt in run.wishes.items():
        name = _site_of(run, path, role)
        if name not in run.specs:
            what = f"its {role.removeprefix('/')}" if role else "itself"
            raise TraceError(
                f"the layer of {path!r} asks for a format of {what}, but there is no site {name!r}: nothing reads it there, or "
                f"it shares another layer's site; {did_you_mean(name, run.specs)}"
            )
        if formats.setdefault(name, fmt) != fmt:
            raise TraceError(
                f"the site {name!r} is shared by layers that ask for different formats of it ({formats[name]}, {fmt}); "
                "ask for one, or give each a site of its own with instrument(split=...)"
            )
    return {name: replace(run.specs[name], format=fmt) for name, fmt in formats.items()}


def _site_of(run: Run, path: str, role: str) -> str:
    if not role:
        return path
    if role.startswith("/"):
        return role[1:]
    if role == "input":
        return run.roles[path].input_site if path in run.roles else input_name(run, path)
    return joined(path.rpartition("/")[0], role)
