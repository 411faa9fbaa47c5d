"""Where a value meets its site: names, formats and statistics of one interpretation of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from pquant_jax import _tree
from pquant_jax._base import KIF, AxisRole, SiteSpec, View
from pquant_jax._errors import TraceError, did_you_mean
from pquant_jax.graph._stats import positive_fraction
from pquant_jax.graph._values import Value, expand, prefix, span
from pquant_jax.numerics import MAX_TABLE_BITS, quantize

ACTIVATIONS = frozenset({"input", "table", "output"})


@dataclass
class Run:
    """One interpretation: what it reads (view, modes) and what it gathers (specs, roles, stats, tables)."""

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
    scope: str = ""  # the module of the model that the present equation is in, as far as its framework says so
    wishes: dict[tuple[str, str], Any] = field(default_factory=dict)  # {(parameter path, role): format}, see `_wishes`
    tables: dict[str, Any] | None = None  # {table: what its function gives on every code}, where `inst.tables` wants it
    fed: dict[str, str] = field(default_factory=dict)  # {table: the site in front of it}

    def quantizes(self, *names: str) -> bool:
        """Does the view hold a format for any of these sites?"""
        return any(name in self.view.sites for name in names)


def count(run: Run, name: str) -> str:
    """`name`, or `name#1` and so on where it is used again."""
    used = run.uses.get(name, 0)
    run.uses[name] = used + 1
    return name if used == 0 else f"{name}#{used}"


def module_of(name_stack: str) -> str:
    """The path of a module in the model's name stack: linen writes `Net/Dense_0/...qhd,...khd->...hqk`, nnx nothing.

    >>> module_of("Net/Block_1/LayerNorm_0"), module_of("vmap(Net)/Dense_0"), module_of("")
    ('Block_1/LayerNorm_0', 'Dense_0', '')
    """
    parts = name_stack.split("/")[1:]
    return "/".join(p for p in parts if p.isidentifier())


def home(run: Run, v: Value) -> str:
    """The layer that a value comes from or, failing that, is used in; "" if there is none."""
    if v.channels is not None:
        return v.channels[0].rpartition("/")[0]
    if run.scope:
        return run.scope
    paths = frozenset(p for p in v.paths if p not in run.specs or run.specs[p].kind in ("kernel", "bias"))
    return prefix(paths) or prefix(v.paths)


def joined(*parts: str) -> str:
    """A path of the parts that are not empty."""
    return "/".join(p for p in parts if p)


def input_name(run: Run, path: str) -> str:
    """The site in front of a kernel: `Dense_0/input`, or `kernel/input` where a folder holds several kernels."""
    folder = path.rpartition("/")[0]
    return f"{folder}/input" if folder and run.kernel_folders.get(folder, 0) <= 1 else f"{path}/input"


def parameter(run: Run, v: Value, kind: str, derived_name: str) -> Value:
    """A parameter that meets data: the view has quantized it if it is one leaf, else it gets a site of its own here."""
    if v.leaf is None:
        return at_site(run, v, count(run, derived_name), kind if kind != "kernel" else "scale")
    path = v.leaf[0]
    if path not in run.specs:
        shape = jnp.shape(_tree.flatten(run.view.model)[path])
        own = "bias" if kind == "offset" else "kernel"
        run.specs[path] = SiteSpec(tuple(shape), own, True, tuple(range(len(shape))))
    return v


def operand(run: Run, v: Value, name: str) -> Value:
    """A site on an operand of a product of two activations; constants stay as they are."""
    return v if v.batch is None else at_site(run, v, f"{joined(run.scope, name)}/input", "input", shared=True)


def at_site(
    run: Run, v: Value, name: str, kind: str, *, shared: bool = False, done: bool = False, max_bits: int = 0, fmt: Any = None
) -> Value:
    """v on the grid of its site.  shared: `name` is that of a use; a value that has a site already keeps it.

    done: it lies on that grid already.  max_bits, fmt: as `SiteSpec` has them.
    """
    own = shared and run.split(name)
    if shared and v.on_grid is not None and not own and (v.on_grid.site is not None or not max_bits):
        _limit(run, v.on_grid.site, max_bits)
        return v.on_grid
    if shared:
        name = count(run, name)
    shape = list(jnp.shape(v.val))
    if v.batch is not None:
        del shape[v.batch]
    spec = SiteSpec(tuple(shape), kind, v.signed, (len(shape) - 1,) if shape else (), max_bits, fmt)
    if run.known is not None and name not in run.known:
        close = did_you_mean(name, run.known)
        raise TraceError(f"the training forward has a site {name!r} that the inference forward lacks; {close}")
    run.specs[name] = spec
    x = v.val
    if run.observe:
        run.stats["range"][name] = span(v)
    fmt = format_of(run, name, v)
    if fmt is not None and not done:
        with jax.named_scope(name):
            x = quantize(x, fmt, wrap=run.wrap or kind not in ACTIVATIONS)
    made = Value(x, v.batch, v.signed, None, frozenset({name}) if kind in ACTIVATIONS else v.paths, site=name)
    if kind in ACTIVATIONS:
        made.on_grid = made
    if not own:  # a site of its own is nobody else's
        v.on_grid = made
    return made


def _limit(run: Run, name: str | None, max_bits: int) -> None:
    """A site that a table reads too has the table's limit."""
    if name is not None and max_bits and run.specs[name].max_bits == 0:
        run.specs[name] = replace(run.specs[name], max_bits=MAX_TABLE_BITS)


def format_of(run: Run, name: str, v: Value) -> KIF | None:
    """The format of a site, with an axis of size 1 where v has its batch; None if the view has none."""
    fmt = run.view.sites.get(name)
    if fmt is None:
        return None
    k, i, f = (expand(part, v.batch, jnp.ndim(v.val)) for part in (fmt.k, fmt.i, fmt.f))
    return KIF(k, i, f, fmt.rounding, fmt.overflow)


def record_active(run: Run, v: Value) -> None:
    """How often a layer's output is positive; the last value of it, after its bias or BatchNorm, counts."""
    if run.observe and v.channels is not None:
        path, places = v.channels
        share = positive_fraction(v.val, places, run.specs[path].shape)
        if share is not None:
            run.stats["active"][path] = share
