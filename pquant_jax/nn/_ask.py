"""What a layer asks for: formats by role and a sparsity, declared on its parameters.

A declaration is the identity with a name (`numerics.site` of kind "format" or "target") on a parameter, so the path is
that of the parameter in every framework, and the model computes what the plain layer computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from pquant_jax import _tree
from pquant_jax._errors import ConfigError, TraceError, did_you_mean
from pquant_jax.graph import as_model, flatten
from pquant_jax.numerics import site, site_p
from pquant_jax.quantize import Format

Quantize = Format | Mapping[str, Format] | None

PRODUCT: Final = ("input", "kernel", "bias")
FUSED: Final = ("input", "fused_scale", "fused_offset")
SCALED: Final = ("scale", "bias")


def formats(quantize: Quantize, roles: Sequence[str], extra: Sequence[str], name: str) -> dict[str, Format]:
    """{role: Format}; one Format stands for all of `roles`, those in `extra` have to be named.

    Raises: ConfigError for an unknown role or a value that is no Format.

    >>> sorted(formats(Format(i=1, f=3), PRODUCT, ("output",), "Dense_0"))
    ['bias', 'input', 'kernel']
    """
    if quantize is None:
        return {}
    asked = dict.fromkeys(roles, quantize) if isinstance(quantize, Format) else dict(quantize)
    for role, fmt in asked.items():
        if role not in (*roles, *extra):
            raise ConfigError(f"{name}: quantize has the role {role!r}; {did_you_mean(role, (*roles, *extra))}")
        if not isinstance(fmt, Format):
            raise ConfigError(f"{name}: quantize[{role!r}] is {fmt!r}, expected a pq.quantize.Format")
    return asked


def check_target(prune: Any, name: str) -> float | None:
    """The sparsity that a layer asks for; False is 0.  Raises: ConfigError for what is no fraction below 1."""
    if prune is None or prune is False:
        return None if prune is None else 0.0
    if isinstance(prune, bool) or not isinstance(prune, int | float) or not 0 <= prune < 1:
        raise ConfigError(f"{name}: prune is {prune!r}, expected False or a fraction of zeros, 0 <= prune < 1")
    return float(prune)


def declare(value: Any, parameter: str, asked: Mapping[str, Format], target: float | None, home: bool) -> Any:
    """`value` of a parameter with the declarations that belong to it.

    home: it is the parameter (kernel, scale) on which the layer's other roles are declared too.
    """
    for role, fmt in asked.items():
        if role == parameter:
            value = site(value, "", "format", fmt)
        elif home and role not in ("kernel", "scale", "bias", "output"):
            value = site(value, role, "format", fmt)
    return value if target is None or not home else site(value, "", "target", target)


def targets(model: Any, x: Any) -> dict[str, float]:
    """{path of a parameter: fraction of zeros that its layer asks for with `prune=`}, as `sparsity=` takes it.

    `prune=False` is 0.  Layers that ask for nothing are absent: give them a share of their own with ".*".

    >>> import flax.linen as linen, jax.numpy as jnp, pquant_jax as pq
    >>> net = linen.Sequential([pq.nn.Dense(4, prune=0.5), linen.relu, pq.nn.Dense(2, prune=False)])
    >>> targets(net, jnp.ones((1, 3)))
    {'layers_0/kernel': 0.5, 'layers_2/kernel': 0.0}
    >>> method = pq.prune.magnitude(sparsity={**targets(net, jnp.ones((1, 3))), ".*": 0.25})
    """
    model = as_model(model, x)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), np.float32), x)

    def forward(params: Any, state: Any, x: Any) -> Any:
        return model.forward(params, state, x, train=False, rng=None)[0]

    program = flatten(jax.make_jaxpr(forward)(model.params, model.state, shapes))
    source: dict[Any, str] = dict(zip(program.inputs, _tree.flatten(model.params), strict=False))
    found: dict[str, float] = {}
    for step in program.steps:
        if step.eqn.primitive is not site_p or step.ins[0] not in source:
            continue
        path = source[step.outs[0]] = source[step.ins[0]]
        if step.eqn.params["kind"] == "target":
            wanted = step.eqn.params["format"]
            if found.setdefault(path, wanted) != wanted:
                raise TraceError(f"{path}: two uses ask for {found[path]} and {wanted} zeros; it is one parameter, ask once")
    return dict(sorted(found.items()))
