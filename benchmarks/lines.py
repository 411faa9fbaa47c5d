"""A line of `acceptance.py`: one promise, its figure, whether it holds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Line(NamedTuple):
    """One promise: what, what was measured, whether it holds."""

    name: str
    figure: str
    holds: bool


def module(name: str) -> Any:
    """A benchmark as a module, imported when its line's turn has come."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def listed(values: Iterable[float], form: str) -> str:
    """Numbers side by side."""
    return ", ".join(format(v, form) for v in values)


def pytest_line(name: str, *arguments: str) -> Line:
    """Tests that are the measurement themselves; the figure is pytest's own closing line.  No test found is no success."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
    return Line(name, lines[-1] if lines else done.stderr.strip()[-200:], done.returncode == 0)
