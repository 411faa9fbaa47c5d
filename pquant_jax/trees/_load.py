"""A model file of XGBoost or LightGBM, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pquant_jax._errors import DataError
from pquant_jax.trees._forest import Forest, read_bytes
from pquant_jax.trees._lightgbm import from_lightgbm
from pquant_jax.trees._xgboost import from_xgboost


def load(path: str | Path, *, base_margin: Any = None, features: int | Sequence[str] | None = None) -> Forest:
    """The forest in a file, told by its content: XGBoost's JSON, UBJSON or JSON dump, LightGBM's text or JSON dump.

    base_margin, features: as `from_xgboost` takes them, for its dumps alone (a number of features is ignored elsewhere).
    Raises: as `from_xgboost` and `from_lightgbm`, and DataError for a pickle, which runs what is in it.
    """
    raw = read_bytes(path, "which is all that can be told by its content")
    if raw.startswith(b"\x80"):
        raise DataError(f"{path} is a pickle, which runs the code in it: load it yourself and call trees.from_sklearn(model)")
    start = raw.lstrip()
    if start.startswith(b"["):
        return from_xgboost(path, base_margin=base_margin, features=features)
    if base_margin is not None or not isinstance(features, int | None):
        raise DataError(f"a base margin and names of features are for a dump of XGBoost; {path} has its own, leave them out")
    ours = start.startswith(b"tree") or (start.startswith(b"{") and b'"tree_info"' in raw and b'"learner"' not in raw)
    return from_lightgbm(path) if ours else from_xgboost(path)
