"""The C header: formats of both ports as constants, and functions between numbers and bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pquant_jax.lower.project._ports import Element, Ports, bits, fill
from pquant_jax.lower.rtl import RTLInfo


def header(name: str, ports: Ports, rtl: RTLInfo) -> str:
    """The text of `NAME_io.h`: C99 and C++ without warnings."""
    upper = name.upper()
    tensors = [*_tensors(upper, "INPUT", ports.input_shapes), *_tensors(upper, "OUTPUT", ports.output_shapes)]
    functions = [fill("functions.h", name=name, port=port, PORT=f"{upper}_{port.upper()}") for port in ("input", "output")]
    return fill(
        "io.h",
        name=name,
        NAME=upper,
        latency=rtl.latency_cycles,
        ii=rtl.ii,
        inputs=len(ports.inputs),
        in_bits=bits(ports.inputs),
        in_words=-(-bits(ports.inputs) // 32),
        outputs=len(ports.outputs),
        out_bits=bits(ports.outputs),
        out_words=-(-bits(ports.outputs) // 32),
        ports="".join(tensors),
        input_rows=_rows(ports.inputs),
        output_rows=_rows(ports.outputs),
        functions="".join(functions),
    )


def _tensors(upper: str, side: str, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Where each tensor begins among the elements of its port, by position: names need not be C identifiers."""
    made, start = [], 0
    for position, (tensor, shape) in enumerate(shapes.items()):
        size = math.prod(shape)
        words = f"#define {upper}_{side}_{position}_START {start} /* {tensor}, shape ({', '.join(map(str, shape))}) */\n"
        made.append(words + f"#define {upper}_{side}_{position}_SIZE {size}\n")
        start += size
    return made


def _rows(elements: Sequence[Element]) -> str:
    """Offset, fraction, width, sign; an element without bits has fraction 0, its f may be anything."""
    rows = [f"{{{e.offset}, {e.f if e.width else 0}, {e.width}, {e.k if e.width else 0}}}" for e in elements]
    return ",\n".join("    " + ", ".join(rows[j : j + 4]) for j in range(0, len(rows), 4))
