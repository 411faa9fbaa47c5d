"""Level 4: the framework's layers that ask for formats where they stand, and layers of trained tables.

`pq.nn.Dense(64, quantize=Format(i=1, f=5), prune=0.5)` is `flax.linen.Dense(64)` with two wishes written beside it:
`instrument` finds the formats (`SiteSpec.format`), `targets` the sparsities.  `pq.nn.nnx` has the layers of nnx.
"""

from pquant_jax.nn import nnx
from pquant_jax.nn._ask import targets
from pquant_jax.nn._functions import hard_sigmoid, hard_tanh, relu_po2
from pquant_jax.nn._linen import (
    Activation,
    Add,
    AvgPool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    DenseGeneral,
    Einsum,
    LayerNorm,
    MaxPool,
    ReluPo2,
    RMSNorm,
)
from pquant_jax.nn._tables import TableConv, TableDense

__all__ = [
    "Activation",
    "Add",
    "AvgPool",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dense",
    "DenseGeneral",
    "Einsum",
    "LayerNorm",
    "MaxPool",
    "RMSNorm",
    "ReluPo2",
    "TableConv",
    "TableDense",
    "hard_sigmoid",
    "hard_tanh",
    "nnx",
    "relu_po2",
    "targets",
]
