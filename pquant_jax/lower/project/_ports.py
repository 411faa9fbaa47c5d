"""The elements of a design's ports and the bits of vectors on them.  numpy only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, VerifyError
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.rtl import RTLInfo
from pquant_jax.lower.sim import pack_bits, unpack_bits

MAX_BITS = 53  # of an element: what a double holds, in the emulator as in the C header


class Element(NamedTuple):
    """One element of a port: its tensor and place there, its format, its lowest bit in the port and its number of bits."""

    tensor: str
    index: tuple[int, ...]
    k: int
    i: int
    f: int
    offset: int
    width: int

    @property
    def label(self) -> str:
        """`input[0,3]`; the name alone for a scalar."""
        return self.tensor + (f"[{','.join(map(str, self.index))}]" if self.index else "")


class Ports(NamedTuple):
    """Elements of `model_inp` and `model_out`, and the {name: shape} of the tensors that lie in them one after the other."""

    inputs: tuple[Element, ...]
    outputs: tuple[Element, ...]
    input_shapes: dict[str, tuple[int, ...]]
    output_shapes: dict[str, tuple[int, ...]]


def bits(elements: Sequence[Element]) -> int:
    """Width of the port."""
    return sum(e.width for e in elements)


def ports_of(graph: Graph, rtl: RTLInfo) -> Ports:
    """The ports of `rtl`, which was made of `graph`; `LoweringError` if they have no bits or an element too many of them."""
    inputs = _shapes(graph, graph.inputs, "input", named=True)
    outputs = _shapes(graph, graph.outputs, "output", named=False)
    made = Ports(_elements(inputs, rtl.inp_kifs), _elements(outputs, rtl.out_kifs), inputs, outputs)
    for side, elements in (("input", made.inputs), ("output", made.outputs)):
        if not bits(elements):
            raise LoweringError(f"the {side} port of {rtl.name} has no bits: its outputs are constant, there is nothing to build")
        if (wide := max(elements, key=lambda e: e.width)).width > MAX_BITS:
            raise LoweringError(f"{wide.label} has {wide.width} bits, at most {MAX_BITS} can be packed; quantize it to fewer")
    return made


def _shapes(graph: Graph, nodes: Sequence[int], word: str, *, named: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for position, j in enumerate(nodes):
        node = graph.nodes[j]
        name = re.sub(r"[^\w./-]", "_", node.name, flags=re.ASCII) if named else ""
        if not name or name in shapes:
            name = word if len(nodes) == 1 else f"{word}_{position}"
        shapes[name] = tuple(node.shape)
    return shapes


def _elements(shapes: dict[str, tuple[int, ...]], kifs: np.ndarray) -> tuple[Element, ...]:
    places = [(name, tuple(map(int, index))) for name, shape in shapes.items() for index in np.ndindex(*shape)]
    if len(places) != kifs.shape[1]:
        raise LoweringError(f"{list(shapes)} have {len(places)} elements, the netlist {kifs.shape[1]}; is it of this graph?")
    made, offset = [], 0
    for (name, index), (k, i, f) in zip(places, kifs.T.tolist(), strict=True):
        width = max(k + i + f, 0)
        made.append(Element(name, index, k, i, f, offset, width))
        offset += width
    return tuple(made)


def hex_lines(values: np.ndarray, elements: Sequence[Element]) -> str:
    """One line per row of `values` (N, elements): the bits of the port in hexadecimal, highest first.

    >>> hex_lines(np.array([[-1.0, 0.5]]), [Element("x", (0,), 1, 2, 0, 0, 3), Element("x", (1,), 0, 1, 1, 3, 2)])
    '0f\\n'
    """
    digits = -(-bits(elements) // 4)
    packed = pack_bits(values, kifs_of(elements))
    return "".join(f"{row[::-1].tobytes().hex()[-digits:]}\n" for row in packed)


def kifs_of(elements: Sequence[Element]) -> np.ndarray:
    """int64 (3, n): rows k, i, f."""
    return np.array([(e.k, e.i, e.f) for e in elements], np.int64).reshape(-1, 3).T


def check_fits(values: np.ndarray, elements: Sequence[Element]) -> None:
    """Raise `VerifyError` if an expected output is no value of its element: its bits would stand for another number."""
    kifs = kifs_of(elements)
    back = unpack_bits(pack_bits(values, kifs), kifs)
    if (wrong := np.argwhere(back != values)).size:
        n, j = map(int, wrong[0])
        e = elements[j]
        raise VerifyError(
            f"vector {n}: {e.label} is {float(values[n, j])!r} in the emulator, which is no value of the netlist's output "
            f"(k={e.k}, i={e.i}, f={e.f}); the netlist is not of this graph"
        )


def fill(template: str, **values: object) -> str:
    """The text of `templates/TEMPLATE` with every `@key@` replaced; `KeyError` for a key that is not given."""
    text = files("pquant_jax.lower.project").joinpath("templates", template).read_text()
    return re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text)
