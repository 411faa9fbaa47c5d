"""Level 5: jaxpr -> fixed-point graph -> emulator, RTL and proofs.  Backends and tools are imported when they are used."""

from pquant_jax.lower._plugin import Finished
from pquant_jax.lower._trace import trace
from pquant_jax.lower._verify import forward_outputs, verify
from pquant_jax.lower.dead import remove_dead
from pquant_jax.lower.emulate import emulate
from pquant_jax.lower.ir import Graph, Node

__all__ = ["Finished", "Graph", "Node", "emulate", "forward_outputs", "remove_dead", "trace", "verify"]
