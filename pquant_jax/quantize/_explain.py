"""Every site of a model as text: what it is given and why, and a file of rules to edit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from pquant_jax import _tree
from pquant_jax._base import SiteSpec, Transform
from pquant_jax._errors import TransformError, did_you_mean
from pquant_jax.quantize._dynamic import dynamic
from pquant_jax.quantize._fixed import fixed
from pquant_jax.quantize._format import Choice, Format, by_kind, defaults_of, fields_of, resolve, sign_bit
from pquant_jax.quantize._hgq import hgq

TEMPLATES: Final = {factory.__name__: factory for factory in (hgq, fixed, dynamic)}
_HEADER: Final = ("site", "shape", "kind", "k", "i", "f", "limit", "rounding", "overflow", "shared", "moves", "from")


def explain(inst: Any, compression: Transform) -> str:
    """A table of every site: shape, kind, format to start from, what of it moves in training, and where it was said.

    inst: an `Instrumented`, or its sites.  compression: a quantizer or a chain with one; a site that it leaves in float
    says so.

    >>> from pquant_jax.quantize import fixed
    >>> sites = {"a/kernel": SiteSpec((4, 3), "kernel"), "a/input": SiteSpec((4,), "input", max_bits=12)}
    >>> print(explain(sites, fixed(sites, rules=[("a/input", {"f": 3})])))
    site      shape   kind    k  i  f  limit  rounding  overflow  shared   moves  from
    a/kernel  (4, 3)  kernel  1  0  7         RND       SAT       element         default for kernel
    a/input   (4,)    input   1  2  3  12     RND       SAT       element         rule 'a/input'
    """
    sites: Mapping[str, SiteSpec] = inst if isinstance(inst, Mapping) else inst.sites
    rows = [_HEADER, *(_row(name, spec, compression.formats.get(name)) for name, spec in sites.items())]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(name: str, spec: SiteSpec, choice: Choice | None) -> tuple[str, ...]:
    limit = str(spec.max_bits or "")
    if choice is None:
        return name, str(spec.shape), spec.kind, "", "", "", limit, "", "", "", "", "no quantizer: float"
    fmt = choice.format
    bits = (str(sign_bit(spec, fmt)), f"{fmt.i:g}", f"{fmt.f:g}")
    modes = (fmt.rounding, fmt.overflow, str(fmt.granularity))
    return name, str(spec.shape), spec.kind, *bits, limit, *modes, choice.moves, choice.source


def template(inst: Any, quantizer: str = "hgq") -> str:
    """The `quantization` section that says for every site what `quantizer` does by default: one rule per site, to edit.

    `pq.config.quantizer(text, inst)` gives the transform back, and so does a configuration with this section.
    inst: an `Instrumented`, or its sites.  quantizer: "hgq", "fixed" or "dynamic".
    Raises: TransformError for an unknown quantizer.

    >>> print(template({"a/kernel": SiteSpec((4, 3), "kernel")}, "fixed").splitlines()[-1])
      - {where: a/kernel, i: 0, f: 7, k: 1, rounding: RND, overflow: SAT, granularity: element}  # kernel (4, 3)
    """
    if quantizer not in TEMPLATES:
        raise TransformError(f"quantizer is {quantizer!r}; {did_you_mean(quantizer, TEMPLATES)}")
    sites: Mapping[str, SiteSpec] = inst if isinstance(inst, Mapping) else inst.sites
    given = defaults_of(TEMPLATES[quantizer])
    lines = [
        f"# The {quantizer} quantizer, one rule per site.  k: sign bit, i: integer bits without it, f: fractional bits.",
        "# What a rule leaves out is the default of its kind of site; one rule may serve many (where: 'Dense_./kernel').",
        f"method: {quantizer}",
        "rules:" if sites else "rules: []",
    ]
    for name, choice in resolve(sites, by_kind(**given), ()).items():  # pyright: ignore[reportArgumentType]
        lines.append(f"  - {_rule(name, sites, choice.format, moves=quantizer != 'fixed')}{_comment(sites[name], choice)}")
    return "\n".join(lines) + "\n"


def _rule(name: str, sites: Mapping[str, SiteSpec], fmt: Format, *, moves: bool) -> str:
    others = (other for other in sites if other != name)
    where = re.escape(name) if any(_tree.matches(name, other) for other in others) else name
    values = {"where": where, **fields_of(fmt), "k": sign_bit(sites[name], fmt)}
    order = ["where", "i", "f", "k", "rounding", "overflow", "granularity", *(["trainable"] if moves else [])]
    return "{" + ", ".join(f"{key}: {_scalar(values[key])}" for key in order) + "}"


def _scalar(value: Any) -> str:
    """A value as YAML writes it in a line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_./-]*", value) else "'" + value.replace("'", "''") + "'"
    return repr(float(value)) if not float(np.float32(value)).is_integer() else str(int(value))


def _comment(spec: SiteSpec, choice: Choice) -> str:
    limit = f", at most {spec.max_bits} bits" if spec.max_bits else ""
    asked = "" if choice.source.startswith("default") else f", {choice.source}"
    return f"  # {spec.kind} {spec.shape}{limit}{asked}"
