"""The picture of `bench_pruning.py`: accuracy against sparsity, and against da4ml's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def picture(report: dict[str, Any], path: Path) -> None:
    del report, path
