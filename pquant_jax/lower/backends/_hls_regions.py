"""What hls4ml has no layer for: connected layers of a graph as one da4ml netlist inside the HLS project."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pquant_jax.lower.backends import _hls_types, da4ml
from pquant_jax.lower.ir import Graph
from pquant_jax.lower.passes import subgraph
from pquant_jax.lower.ranges import Interval
from pquant_jax.lower.structure import Layer


class Region(NamedTuple):
    """Layers that become one netlist: the nodes that it reads, and those that it gives to others."""

    layers: tuple[Layer, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def regions(layers: Sequence[Layer], outputs: Collection[int], native: Callable[[Layer], bool]) -> list[Layer | Region]:
    """Layers in order, those that aren't native gathered into maximal connected regions that no path leaves and enters again.

    Every layer has a depth, which grows when a path goes from one kind to the other; connected layers of equal depth are
    one region.
    """
    depth: dict[int, int] = {}
    group: dict[int, int] = {}  # output -> the first output of its region, as in a union of sets
    plain = {layer.output: native(layer) for layer in layers}

    def first(j: int) -> int:
        while group[j] != j:
            j = group[j]
        return j

    for layer in layers:
        own = plain[layer.output]
        depth[layer.output] = max((depth[j] + (own != plain[j]) for j in layer.inputs), default=0)
        if own:
            continue
        group[layer.output] = layer.output
        for j in layer.inputs:
            if not plain[j] and depth[j] == depth[layer.output]:
                group[first(layer.output)] = first(j)
    readers = {j: [a for a in layers if j in a.inputs] for j in plain}
    members: dict[int, list[Layer]] = {}
    for layer in layers:
        if not plain[layer.output]:
            members.setdefault(first(layer.output), []).append(layer)
    made: list[Layer | Region] = [layer for layer in layers if plain[layer.output]]
    for parts in members.values():
        inside = {a.output for a in parts}
        inputs = tuple(sorted({j for a in parts for j in a.inputs} - inside))
        given = tuple(j for j in sorted(inside) if j in outputs or any(r.output not in inside for r in readers[j]))
        made.append(Region(tuple(parts), inputs, given))
    return _ordered(made)


def _ordered(parts: Sequence[Layer | Region]) -> list[Layer | Region]:
    """Every part behind those that it reads."""
    done: set[int] = set()
    left, out = list(parts), []
    while left:
        ready = [p for p in left if done.issuperset(p.inputs)]
        out += ready
        done.update(j for p in ready for j in (p.outputs if isinstance(p, Region) else (p.output,)))
        left = [p for p in left if not any(p is r for r in ready)]
    return out


def netlist_code(name: str, graph: Graph, known: Sequence[Interval], region: Region, flavor: str) -> str:
    """C++ of the region: `name(x0, x1, ..., y0, y1, ...)` on arrays of any fixed-point type.  Raises: LoweringError."""
    comb = da4ml.to_comb(subgraph(graph, known, region.inputs, region.outputs))
    with da4ml.exact("writing HLS"):
        from da4ml.codegen.hls import hls_logic_and_bridge_gen

        logic, _ = hls_logic_and_bridge_gen(comb, f"{name}_logic", flavor, pragmas=["#pragma HLS INLINE"])
    sizes = [[int(np.prod(known[j].low.shape)) for j in group] for group in (region.inputs, region.outputs)]
    types = [
        _cpp(_hls_types.union([_hls_types.tensor_type(known[j]) for j in group] or [_hls_types.Fixed(0, 1, 0)]), flavor)
        for group in (region.inputs, region.outputs)
    ]
    arguments = [f"x{n}" for n in range(len(sizes[0]))] + [f"y{n}" for n in range(len(sizes[1]))]
    template = ", ".join(f"class {a}_T" for a in arguments)
    lines = [f"template <{template}>", f"void {name}({', '.join(f'{a}_T &{a}' for a in arguments)}) {{", "    #pragma HLS INLINE"]
    for array, kind, total in (("inputs", types[0], sum(sizes[0])), ("outputs", types[1], sum(sizes[1]))):
        lines += [f"    {kind} {array}[{max(total, 1)}];", f"    #pragma HLS ARRAY_PARTITION variable={array} complete"]
    lines += _moves(sizes[0], "inputs[{at} + j] = x{n}[j];")
    lines.append(f"    {name}_logic<{types[0]}, {types[1]}>(inputs, outputs);")
    lines += _moves(sizes[1], "y{n}[j] = outputs[{at} + j];")
    return f"{logic}\n" + "\n".join([*lines, "}", "", ""])


def copy_code(name: str, size: int) -> str:
    """C++ of `name(x, y)`, which gives x."""
    lines = ["template <class x_T, class y_T>", f"void {name}(x_T &x0, y_T &y0) {{", "    #pragma HLS INLINE"]
    return "\n".join([*lines, *_moves([size], "y0[j] = x{n}[j];"), "}", "", ""])


def _moves(sizes: Sequence[int], move: str) -> list[str]:
    lines, at = [], 0
    for n, size in enumerate(sizes):
        lines += [f"    for (unsigned j = 0; j < {size}; j++) {{", "        #pragma HLS UNROLL"]
        lines += [f"        {move.format(at=at, n=n)}", "    }"]
        at += size
    return lines


def _cpp(t: _hls_types.Fixed, flavor: str) -> str:
    if flavor == "vitis":
        return f"ap_{'' if t.k else 'u'}fixed<{t.width}, {t.k + t.i}>"
    return f"ac_fixed<{max(t.width, 2)}, {t.k + t.i}, {'true' if t.k else 'false'}>"


@cache
def register_netlist() -> str:
    """Make `Netlist` known to hls4ml, once, and return its class name: a layer of several inputs and outputs with its own C++.

    hls4ml takes new layers only as subclasses of its own.
    """
    from hls4ml.model.layers import Layer as HLSLayer, register_layer
    from hls4ml.model.types import Source

    def initialize(self: Any) -> None:
        for output, shape in zip(self.outputs, self.attributes["output_shapes"], strict=True):
            precision, _ = self.model.config.get_precision(self, var=output)
            name = f"{output}_value"
            self.add_output_variable(list(shape), out_name=output, var_name=name, type_name=f"{output}_t", precision=precision)
            self.set_attr(f"{output}_t", self.get_output_variable(output).type)  # or defines.h lacks all types but one
        self.set_attr("netlist_code", Source(self.attributes["code"]))

    register_layer("Netlist", type("Netlist", (HLSLayer,), {"initialize": initialize}))
    return "Netlist"


def call_netlists(project: Any) -> None:
    """Write the call of every netlist of a hls4ml model, once the names of its variables are final."""
    namespace = project.config.get_writer_config().get("Namespace", None) or "nnet"
    for node in project.get_layers():
        if node.class_name == "Netlist":
            names = [node.get_input_variable(name).name for name in node.inputs]
            names += [node.get_output_variable(name).name for name in node.outputs]
            node.set_attr("function_cpp", f"{namespace}::{node.name}({', '.join(names)});")
