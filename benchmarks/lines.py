"""A line of `acceptance.py`: one promise, its figure, whether it holds."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent


module: Final = importlib.import_module  # a benchmark, when its line's turn has come


class Line(NamedTuple):
    """One promise: what, what was measured, whether it holds; skipped: not measured, for the reason in `figure`."""

    name: str
    figure: str
    holds: bool
    skipped: bool = False


def listed(values: Iterable[float], form: str) -> str:
    """Numbers side by side."""
    return ", ".join(format(v, form) for v in values)


def pytest_line(name: str, *arguments: str) -> Line:
    """Tests that are the measurement themselves; the figure is pytest's own closing line.  No test found is no success."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
    return Line(name, lines[-1] if lines else done.stderr.strip()[-200:], done.returncode == 0)
