"""Level 5: jaxpr -> fixed-point graph -> emulator, RTL and proofs.  Backends and tools are imported when they are used."""

from pquant_jax.lower._build import Gap
from pquant_jax.lower._check import check
from pquant_jax.lower._estimate import Estimate, estimate
from pquant_jax.lower._onnx_in import Imported, from_qonnx
from pquant_jax.lower._plugin import Finished
from pquant_jax.lower._trace import trace
from pquant_jax.lower._verify import check_outputs, forward_outputs, output_f, vectors_of, verify
from pquant_jax.lower.canonical import canonical, difference, same
from pquant_jax.lower.dead import remove_dead
from pquant_jax.lower.emulate import emulate
from pquant_jax.lower.ir import Graph, Node, weight_ports
from pquant_jax.lower.loadable import loaded, weights_of
from pquant_jax.lower.overflow import overflows, prove_no_overflow
from pquant_jax.lower.passes import lint, simplify

__all__ = [
    "Estimate",
    "Finished",
    "Gap",
    "Graph",
    "Imported",
    "Node",
    "canonical",
    "check",
    "check_outputs",
    "difference",
    "emulate",
    "estimate",
    "forward_outputs",
    "from_qonnx",
    "lint",
    "loaded",
    "output_f",
    "overflows",
    "prove_no_overflow",
    "remove_dead",
    "same",
    "simplify",
    "trace",
    "vectors_of",
    "verify",
    "weight_ports",
    "weights_of",
]
