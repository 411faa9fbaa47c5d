"""Beside search: forests of scikit-learn, XGBoost and LightGBM as the graph that every hardware backend reads.

Read a model (`from_sklearn`, `from_xgboost`, `from_lightgbm`, or `load` for a file), put it on the port's grid
(`quantize`), and lower it (`to_graph`): its scores are then integers that every backend reproduces.
"""

from pquant_jax.trees._forest import Forest, Tree, depth, join, leaves, scores
from pquant_jax.trees._graph import luts, to_graph
from pquant_jax.trees._lightgbm import from_lightgbm
from pquant_jax.trees._load import load
from pquant_jax.trees._prove import prove
from pquant_jax.trees._prune import Pruned, prune, prune_path, simplify
from pquant_jax.trees._quantize import QuantizedForest, encode, quantize
from pquant_jax.trees._sklearn import from_sklearn
from pquant_jax.trees._xgboost import from_xgboost

__all__ = [
    "Forest",
    "Pruned",
    "QuantizedForest",
    "Tree",
    "depth",
    "encode",
    "from_lightgbm",
    "from_sklearn",
    "from_xgboost",
    "join",
    "leaves",
    "load",
    "luts",
    "prove",
    "prune",
    "prune_path",
    "quantize",
    "scores",
    "simplify",
    "to_graph",
]
