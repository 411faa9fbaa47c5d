"""An HLS project while it grows: names, layer dictionaries and their types, and reshapes where shapes differ.  numpy only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from pquant_jax.lower.backends._hls_types import Fixed
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.ranges import Interval


class Made(NamedTuple):
    """One layer of the HLS project: hls4ml's name and class, the graph node whose value it gives (-1: none of its own).

    products: (n_in, n_out) of the kernel whose multipliers a reuse factor shares, None without.
    """

    name: str
    kind: str
    output: int
    products: tuple[int, int] | None


@dataclass
class Project:
    """The project while it grows: layer dictionaries, `LayerName`, which layer holds which value, and as what."""

    graph: Graph
    known: Sequence[Interval]
    strategy: Callable[[str], str]  # of a layer by name
    stream: bool = False
    dicts: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    where: dict[int, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)
    views: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)
    types: dict[str, Fixed] = field(default_factory=dict)


def plain(shape: Sequence[int]) -> tuple[int, ...]:
    """Without leading axes of one element; a scalar is a vector of one.

    >>> plain((1, 1, 4, 3)), plain(())
    ((4, 3), (1,))
    """
    dims = [int(n) for n in shape]
    while len(dims) > 1 and dims[0] == 1:
        dims.pop(0)
    return tuple(dims or [1])


def unique(project: Project, layer_name: str, suffix: str) -> str:
    """A name that is an identifier of C++ and of nothing else: `Dense_0/kernel` is `dense_0`, its quantizer `dense_0_input_q`."""
    stem = re.sub(r"(/kernel|/bias)?(#\d+)?$", r"\2", layer_name)
    stem = re.sub(r"\W+", "_", f"{stem}{suffix}").strip("_").lower() or "layer"
    stem = stem if stem[0].isalpha() else f"layer_{stem}"
    name, n = stem, 1
    while name in project.shapes or name in _RESERVED:
        n += 1
        name = f"{stem}_{n}"
    return name


_RESERVED: Final = frozenset(
    {"input", "dense", "relu", "linear", "add", "subtract", "multiply", "maximum", "minimum", "max", "min"}
)


def add(project: Project, name: str, kind: str, inputs: Sequence[str], shape: Sequence[int], result: Fixed, **more: Any) -> str:
    """Append a layer with its types: those in `precision`, and `result`."""
    precision = {key: str(t) for key, t in more.pop("precision", {}).items()}
    products = more.pop("products", None)
    output = more.pop("output", -1)
    config = {"Precision": {"default": str(result), "result": str(result), **precision}, **more.pop("config", {})}
    entry = {"class_name": kind, "name": name, **more}
    if inputs:
        entry["inputs"] = list(inputs)
    project.dicts.append(entry)
    project.names[name] = config
    project.shapes[name], project.types[name] = tuple(int(n) for n in shape), result
    project.made.append(Made(name, kind, output, products))
    if output >= 0:
        project.where[output] = name
    return name


def view(project: Project, node: int, shape: Sequence[int]) -> str:
    """The name of the layer that holds `node`, behind a Reshape where it has another shape."""
    name, want = project.where[node], tuple(int(n) for n in shape)
    if project.shapes[name] == want:
        return name
    if (name, want) not in project.views:
        new = unique(project, name, "_view")
        project.views[name, want] = add(project, new, "Reshape", [name], want, project.types[name], target_shape=list(want))
    return project.views[name, want]


def floats(values: np.ndarray) -> np.ndarray:
    """As hls4ml wants weights."""
    return np.ascontiguousarray(values, np.float64)
