"""Our plugins of da4ml and alkaid: what their `converter.trace_model` calls for a `Finished` model or a `Graph`."""

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

    from pquant_jax.lower.backends import da4ml

    return _tracer(DAISTracerPluginBase, da4ml, model, hwconf, solver_options, options)


def alkaid_tracer(model: Finished | Graph, hwconf: Any, solver_options: Any = None, **options: Any) -> Any:
    """The object that alkaid's entry point `alir_tracer.plugins` asks for; users call alkaid.  As `tracer`.

    Give what it returns to `alkaid.trace.trace` with `optimize=False`: two of the passes that run by default are not
    exact on 1 of 500 random graphs (`backends.alkaid` says which).  Raises: LoweringError for another model or an
    unknown option.
    """
    from alkaid.converter.plugin import ALIRTracerPluginBase

    from pquant_jax.lower.backends import alkaid

    return _tracer(ALIRTracerPluginBase, alkaid, model, hwconf, solver_options, options)


def _tracer(base: Any, backend: Any, model: Finished | Graph, hwconf: Any, solver_options: Any, options: Mapping) -> Any:
    """A plugin of `backend`, a module of `lower.backends`, whose package has the interface `base`."""
    package = backend.__name__.rpartition(".")[2]
    if not isinstance(model, Finished | Graph):
        got = type(model).__name__
        raise LoweringError(f"{package} traces a lower.Finished(inst, view, model_state) or a lower.Graph, got {got}")
    if options:
        raise LoweringError(f"unknown options of trace_model: {', '.join(sorted(options))}; formats and modes are the model's")
    graph = model if isinstance(model, Graph) else trace(*model)
    handle: Any = model  # the interface says "a callable" and calls nothing

    class Tracer(base):
        """The package's interface, which is a base class."""

        def get_input_shapes(self) -> list[tuple[int, ...]]:
            """Of one sample, one per port."""
            return [graph.nodes[j].shape for j in graph.inputs]

        def apply_model(self, verbose: bool, inputs: tuple[Any, ...]) -> tuple[dict[str, Any], list[str]]:
            """({site or output: its variables}, the names of the outputs in order)."""
            made = trace_into(graph, inputs, backend, solver_options=solver_options)
            if verbose:
                print("\n".join(f"{name}: {value.shape}" for name, value in made.items()))
            return made, [f"output/{n}" for n in range(len(graph.outputs))]

    return Tracer(handle, hwconf, solver_options)


def trace_into(
    graph: Graph, ports: Sequence[Any], backend: Any, *, solver_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`graph` on the package's own `ports` (one of its arrays per input, of its shape): {name: array}.

    `backend` is `backends.da4ml` or `backends.alkaid`.  The keys are the quantize sites and the outputs "output/0",
    "output/1", ....  A port without a format gets that of the graph; the values of one that has a format are put on the
    graph's as `inst.encode` does it, nearest and saturating, which costs logic only where they don't fit.  Raises
    `LoweringError` as `to_comb` does, and for ports of other shapes.
    """
    from pquant_jax.lower.backends import _netlist as netlist

    backend.check_supported(graph)
    graph = remove_dead(graph)
    known = backend.check_supported(graph)
    shapes, wanted = [tuple(p.shape) for p in ports], [graph.nodes[j].shape for j in graph.inputs]
    if shapes != wanted:
        raise LoweringError(f"the model has input ports of shape {wanted}, got {shapes}; give one array per port, without batch")
    circuit = backend.circuit(ports[0].hwconf, solver_options)
    package = circuit.package
    with backend.exact("tracing"):
        entered = {j: _enter(graph.nodes[j], p, package) for j, p in zip(graph.inputs, ports, strict=True)}
        values = netlist.variables(graph, known, circuit, entered)
        named = {node.name: v for node, v in zip(graph.nodes, values, strict=True) if node.op == "quantize" and node.name}
        named |= {f"output/{n}": values[j] for n, j in enumerate(graph.outputs)}
        made = {n: np.array([netlist.variable(v, circuit) for v in a.ravel()], object).reshape(a.shape) for n, a in named.items()}
        outputs = [v for n in range(len(graph.outputs)) for v in made[f"output/{n}"].ravel()]
        backend.trace_exactly([v for p in ports for v in package.scalars(p).ravel()], outputs)
    return {name: package.array(v, circuit.solver_options, hwconf=circuit.hwconf) for name, v in made.items()}


def _enter(node: Node, port: Any, package: Any) -> np.ndarray:
    """The values of an array of the package in the format of the input `node`."""
    from pquant_jax.lower.backends import _netlist as netlist

    k, i, f = (np.broadcast_to(np.asarray(node.attrs[a], np.int64), node.shape) for a in "kif")
    scalars = package.scalars(port)
    if isinstance(port, package.unformatted):
        return netlist.objects(package.scalars(port.quantize(k, i, f)).ravel().tolist(), node.shape)
    low, high, step = (np.array([float(getattr(v, a)) for v in scalars.ravel()]) for a in ("low", "high", "step"))
    fraction = np.where(low == high, 0, -np.log2(step)).astype(np.int64)
    known = Interval(*(v.reshape(node.shape) for v in (low, high, fraction)))
    attrs = {"k": k, "i": i, "f": f, "rounding": "RND", "overflow": "SAT"}
    return netlist.quantize_array(Node("quantize", (0,), node.shape, attrs), scalars, known)
