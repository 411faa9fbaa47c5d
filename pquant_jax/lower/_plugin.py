"""da4ml's plugin for our models: what `da4ml.converter.trace_model` calls for a `Finished` model or a `Graph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pquant_jax._base import Tree, View
from pquant_jax._errors import LoweringError
from pquant_jax.graph import Instrumented
from pquant_jax.lower._trace import trace
from pquant_jax.lower.dead import remove_dead
from pquant_jax.lower.ir import Graph, Node
from pquant_jax.lower.ranges import Interval


class Finished(NamedTuple):
    """A trained model as one value for tools that take a model: what `lower.trace` reads."""

    inst: Instrumented
    view: View
    model_state: Tree = ()


def tracer(model: Finished | Graph, hwconf: Any, solver_options: Any = None, **options: Any) -> Any:
    """The object that da4ml's entry point `dais_tracer.plugins` asks for; users call da4ml.

    `trace_model(Finished(inst, view, model_state))` gives da4ml's (inputs, outputs), with `dump=True` every quantize
    site by name.  Without `inputs_kif` the ports have the formats that `instrument` declared; with one, the values are
    put on these formats as `inst.encode` does it, in hardware.
    Raises: LoweringError for another model or an unknown option.
    """
    from da4ml.converter.plugin import DAISTracerPluginBase

    if not isinstance(model, Finished | Graph):
        raise LoweringError(
            f"da4ml traces a lower.Finished(inst, view, model_state) or a lower.Graph of pquant_jax, got {type(model).__name__}"
        )
    if options:
        raise LoweringError(f"unknown options of trace_model: {', '.join(sorted(options))}; formats and modes are the model's")
    graph = model if isinstance(model, Graph) else trace(*model)
    handle: Any = model  # da4ml's interface says "a callable" and calls nothing

    class Tracer(DAISTracerPluginBase):
        """da4ml's interface, which is a base class."""

        def get_input_shapes(self) -> list[tuple[int, ...]]:
            """Of one sample, one per port."""
            return [graph.nodes[j].shape for j in graph.inputs]

        def apply_model(self, verbose: bool, inputs: tuple[Any, ...]) -> tuple[dict[str, Any], list[str]]:
            """({site or output: its variables}, the names of the outputs in order)."""
            made = trace_into(graph, inputs, solver_options=solver_options)
            if verbose:
                print("\n".join(f"{name}: {value.shape}" for name, value in made.items()))
            return made, [f"output/{n}" for n in range(len(graph.outputs))]

    return Tracer(handle, hwconf, solver_options)


def trace_into(graph: Graph, ports: Sequence[Any], *, solver_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`graph` on da4ml's own `ports` (one FixedVariableArray per input, of its shape): {name: FixedVariableArray}.

    The keys are the quantize sites and the outputs "output/0", "output/1", ....  A port without a format gets that of
    the graph; the values of one that has a format are put on the graph's as `inst.encode` does it, nearest and
    saturating, which costs logic only where they don't fit.  Raises `LoweringError` as `to_comb` does, and for ports of
    other shapes.
    """
    from da4ml.trace import FixedVariableArray, comb_trace

    from pquant_jax.lower.backends import _netlist as netlist, da4ml

    da4ml.check_supported(graph)
    graph = remove_dead(graph)
    known = da4ml.check_supported(graph)
    shapes, wanted = [tuple(p.shape) for p in ports], [graph.nodes[j].shape for j in graph.inputs]
    if shapes != wanted:
        raise LoweringError(f"the model has input ports of shape {wanted}, got {shapes}; give one array per port, without batch")
    circuit = netlist.Circuit(ports[0].hwconf, solver_options)
    with da4ml.exact_da4ml("tracing"):
        entered = {j: _enter(graph.nodes[j], p) for j, p in zip(graph.inputs, ports, strict=True)}
        values = netlist.variables(graph, known, circuit, entered)
        named = {node.name: v for node, v in zip(graph.nodes, values, strict=True) if node.op == "quantize" and node.name}
        named |= {f"output/{n}": values[j] for n, j in enumerate(graph.outputs)}
        made = {n: np.array([netlist.variable(v, circuit) for v in a.ravel()], object).reshape(a.shape) for n, a in named.items()}
        outputs = [v for n in range(len(graph.outputs)) for v in made[f"output/{n}"].ravel()]
        da4ml.check_constants_kept(comb_trace([v for p in ports for v in p._vars.ravel()], outputs))
    return {name: FixedVariableArray(v, circuit.solver_options, hwconf=circuit.hwconf) for name, v in made.items()}


def _enter(node: Node, port: Any) -> np.ndarray:
    """The values of a da4ml array in the format of the input `node`."""
    from da4ml.trace import FixedVariableArrayInput

    from pquant_jax.lower.backends import _netlist as netlist

    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    if isinstance(port, FixedVariableArrayInput):
        return netlist.objects(port.quantize(k, i, f)._vars.ravel().tolist(), node.shape)
    low, high, step = (np.array([float(getattr(v, a)) for v in port._vars.ravel()]) for a in ("low", "high", "step"))
    fraction = np.where(low == high, 0, -np.log2(step)).astype(np.int64)
    known = Interval(*(v.reshape(node.shape) for v in (low, high, fraction)))
    attrs = {"k": k, "i": i, "f": f, "rounding": "RND", "overflow": "SAT"}
    return netlist.quantize_array(Node("quantize", (0,), node.shape, attrs), port._vars, known)
