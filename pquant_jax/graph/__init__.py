"""Level 3: models as pure functions, and the interpreters of their jaxprs."""

from pquant_jax.graph._batch import TRANSCENDENTAL
from pquant_jax.graph._calls import bind, model_line
from pquant_jax.graph._ebops import ebops, products
from pquant_jax.graph._instrument import Instrumented, instrument
from pquant_jax.graph._interpret import Const, Program, Step, flatten
from pquant_jax.graph._models import Model, as_model, from_equinox, from_function, from_linen, from_nnx
from pquant_jax.graph._shrink import Shrunk, shrink
from pquant_jax.graph._summary import KernelSummary, SparsitySummary, sparsity_summary, summary_text

__all__ = [
    "TRANSCENDENTAL",
    "Const",
    "Instrumented",
    "KernelSummary",
    "Model",
    "Program",
    "Shrunk",
    "SparsitySummary",
    "Step",
    "as_model",
    "bind",
    "ebops",
    "flatten",
    "from_equinox",
    "from_function",
    "from_linen",
    "from_nnx",
    "instrument",
    "products",
    "model_line",
    "shrink",
    "sparsity_summary",
    "summary_text",
]
