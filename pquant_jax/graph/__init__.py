"""Level 3: models as pure functions, and the interpreters of their jaxprs."""

from pquant_jax.graph._ebops import ebops
from pquant_jax.graph._instrument import Instrumented, instrument
from pquant_jax.graph._interpret import Const, Program, Step, bind, flatten
from pquant_jax.graph._models import Model, as_model, from_equinox, from_function, from_linen, from_nnx

__all__ = [
    "Const",
    "Instrumented",
    "Model",
    "Program",
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
]
