"""Every error a user can meet: what was received, what was expected, and the fix.

All derive from `PQuantError`, so that the command line can print one line for any of them and a caller can catch
one kind.  None of them is an `assert`: they must survive `python -O`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PQuantError(Exception):
    """Base of all errors raised on purpose by pquant_jax."""


class ConfigError(PQuantError):
    """A configuration value, key or command-line override that can't be used."""


class DataError(PQuantError):
    """Data that can't be trained on: wrong shape, NaN or infinity, label out of range, missing file."""


class TransformError(PQuantError):
    """A compression transform was composed or called in a way that can't work."""


class TraceError(PQuantError):
    """A model whose jaxpr can't be instrumented or whose bits are unknown."""


class LoweringError(PQuantError):
    """A model that has no exact fixed-point netlist; names the node and what to do."""


class VerifyError(PQuantError):
    """Two implementations of one netlist disagree; names the first node, element and both integers."""


class ToolError(PQuantError):
    """An external tool is missing or failed."""


class SearchError(PQuantError):
    """A goal that no choice of a search can reach; says the smallest that can be reached."""


class TrainingError(PQuantError):
    """Training produced NaN or infinity, or was asked to do something impossible."""


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """The tail of an error about an unknown name: the closest known names, or all of them.

    >>> did_you_mean("sparcity", ["sparsity", "beta"])
    "did you mean 'sparsity'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(known) if known else 'none'}"
