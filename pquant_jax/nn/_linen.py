"""flax.linen's layers with two more arguments, and what linen has as functions only as layers that can ask for formats."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from pquant_jax._errors import ConfigError, did_you_mean
from pquant_jax.nn import _ask, _functions
from pquant_jax.numerics import site

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    **{name: getattr(nn, name) for name in ("relu", "relu6", "leaky_relu", "tanh", "gelu", "silu", "sigmoid", "softplus", "elu")},
    "hard_tanh": _functions.hard_tanh,
    "hard_sigmoid": _functions.hard_sigmoid,
}


def asking(base: Any, roles: Sequence[str], home: str) -> Any:
    """The linen layer `base` that can ask.  home: its parameter that stands for the layer."""

    @nn.nowrap
    def param(self: Any, name: str, *args: Any, **options: Any) -> Any:
        path = "/".join(self.path) or base.__name__
        asked = _ask.formats(self.quantize, roles, ("output",), path)
        return _ask.declare(
            base.param(self, name, *args, **options), name, asked, _ask.check_target(self.prune, path), name == home
        )

    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        path = "/".join(self.path) or base.__name__
        asked = _ask.formats(self.quantize, roles, ("output",), path)
        y = base.__call__(self, *args, **options)
        return site(y, f"{path}/output", "input", asked["output"]) if "output" in asked else y

    doc = f"""`flax.linen.{base.__name__}` with `quantize` and `prune`.

    quantize: a `Format`, or one per role of {", ".join(roles)}, output.  A role is the site that `instrument` puts there
    anyway; "output" is one more, on what the layer gives.  prune: False, or the fraction of zeros in `{home}` (`pq.nn.targets`).
    """
    body = {
        "__annotations__": {"quantize": Any, "prune": Any}, "quantize": None, "prune": None,
        "param": param, "__call__": call, "__doc__": doc, "__module__": __name__,
    }  # fmt: skip
    return types.new_class(base.__name__, (base,), {}, lambda namespace: namespace.update(body))


Dense: Any = asking(nn.Dense, _ask.PRODUCT, "kernel")
DenseGeneral: Any = asking(nn.DenseGeneral, _ask.PRODUCT, "kernel")
Einsum: Any = asking(nn.Einsum, _ask.PRODUCT, "kernel")
Conv: Any = asking(nn.Conv, _ask.PRODUCT, "kernel")
ConvTranspose: Any = asking(nn.ConvTranspose, _ask.PRODUCT, "kernel")
BatchNorm: Any = asking(nn.BatchNorm, _ask.FUSED, "scale")
LayerNorm: Any = asking(nn.LayerNorm, _ask.SCALED, "scale")
RMSNorm: Any = asking(nn.RMSNorm, ("scale",), "scale")


def _asked_sites(module: nn.Module, quantize: _ask.Quantize, function: Callable, *operands: jax.Array) -> jax.Array:
    """`function` between the sites that a layer without parameters asks for."""
    path = "/".join(module.path) or type(module).__name__
    asked = _ask.formats(quantize, ("input",), ("output",), path)
    if "input" in asked:
        names = [f"{path}/input" + (f"#{n}" if n else "") for n in range(len(operands))]
        operands = tuple(site(v, name, "input", asked["input"]) for v, name in zip(operands, names, strict=True))
    y = function(*operands)
    return site(y, f"{path}/output", "input", asked["output"]) if "output" in asked else y


class Activation(nn.Module):
    """An activation function by name or as a callable; quantize: a `Format` of its input, or one per role of input, output.

    >>> Activation("hard_tanh").apply({}, jax.numpy.float32([-2, 0.5])).tolist()
    [-1.0, 0.5]
    """

    function: str | Callable[[jax.Array], jax.Array] = "relu"
    quantize: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Raises: ConfigError for an unknown name."""
        if isinstance(self.function, str) and self.function not in FUNCTIONS:
            raise ConfigError(f"activation {self.function!r}; {did_you_mean(self.function, FUNCTIONS)}")
        function = FUNCTIONS[self.function] if isinstance(self.function, str) else self.function
        return _asked_sites(self, self.quantize, function, x)


class AvgPool(nn.Module):
    """`flax.linen.avg_pool` as a layer; quantize as in `Activation`."""

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: str = "VALID"
    quantize: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, *positions, channels)."""
        pool = functools.partial(nn.avg_pool, window_shape=tuple(self.window_shape), strides=self.strides, padding=self.padding)
        return _asked_sites(self, self.quantize, pool, x)


class MaxPool(nn.Module):
    """`flax.linen.max_pool` as a layer; quantize as in `Activation`."""

    window_shape: Sequence[int]
    strides: Sequence[int] | None = None
    padding: str = "VALID"
    quantize: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (n, *positions, channels)."""
        pool = functools.partial(nn.max_pool, window_shape=tuple(self.window_shape), strides=self.strides, padding=self.padding)
        return _asked_sites(self, self.quantize, pool, x)


class Add(nn.Module):
    """x + y with both on the grid that `quantize` asks for: a residual whose adder is as narrow as its operands.

    Without `quantize` it is the plain sum, which adds exact accumulators.
    """

    quantize: Any = None

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x, y: equal shapes."""
        return _asked_sites(self, self.quantize, lambda a, b: a + b, x, y)


class ReluPo2(nn.Module):
    """relu(x) * 2^round(m) with a trained m (PQuantML's relu multiplier): see `relu_po2`.

    start: m to begin with (PQuantML's is -1).

    >>> layer = ReluPo2(start=-1.0)
    >>> layer.init_with_output(jax.random.key(0), jax.numpy.float32([-3, 3]))[0].tolist()
    [0.0, 1.5]
    """

    start: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape."""
        return _functions.relu_po2(x, self.param("m", nn.initializers.constant(self.start), (), jax.numpy.float32))
