"""Imports go one way: the order of the packages is held here, by reading the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "pquant_jax"
ROOT = Path(__file__).parents[1] / PACKAGE
LAYERS = [  # packages of one line never import each other; the first line is one unit
    ("_base", "_tree", "_errors"),
    ("numerics",),
    ("transforms",),
    ("prune", "quantize", "constrain", "graph"),
    ("nn", "zoo", "data"),
    ("lower", "train"),
    ("search", "report", "robust", "trees"),
    ("config",),
    ("run",),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY = {"report": {"_errors"}, "data": {"_errors", "_base", "_tree"}}  # what these may use of the package
SURFACE = {"run", "cli"}  # written against the public surface, `import pquant_jax as pq`, as a user's program is
NUMPY_ONLY = ["lower/ir.py", "lower/emulate.py", "lower/ranges.py", "lower/dead.py", "numerics/oracle.py"]
HEAVY = {
    "alkaid", "da4ml", "hls4ml", "lightgbm", "matplotlib", "mlflow", "onnx",
    "onnxruntime", "optuna", "qonnx", "sklearn", "xgboost", "equinox",
}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no bodies of functions, no `if TYPE_CHECKING`."""

    class Prune(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)

        visit_AsyncFunctionDef = visit_FunctionDef
        visit_Lambda = visit_FunctionDef

    return Prune().visit(tree)


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, lazy: bool = True) -> set[str]:
    tree = ast.parse(path.read_text())
    return set(imported(tree if lazy else at_module_level(tree), dotted(path), path.name == "__init__.py"))


def part(name: str) -> str:
    """`pquant_jax.lower.ir` -> `lower`; the package itself -> ''."""
    return (name.split(".") + [""])[1]


def complaint(origin: str, target: str) -> str | None:
    """Why a module of part `origin` may not import part `target` of the package; None if it may."""
    if origin == target:
        return None
    if target in ("", "__version__") and origin in SURFACE:
        return None
    if target not in LEVEL:
        return f"imports {target or 'the whole package'!r}, which has no place in the order"
    if LEVEL[target] == LEVEL[origin] == 0:
        return None
    if LEVEL[target] >= LEVEL[origin]:
        return f"{origin} imports {target}, which stands beside or above it"
    if origin in ONLY and target not in ONLY[origin]:
        return f"{origin} may use only {', '.join(sorted(ONLY[origin]))} of the package, not {target}"
    return None


def test_every_part_has_a_place_in_the_order():
    parts = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "__main__"}
    assert len(parts) > 5 and parts <= set(LEVEL), f"give {sorted(parts - set(LEVEL))} a place in LAYERS"


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != ROOT or p.stem not in ("__init__", "__main__")], ids=dotted)
def test_imports_go_one_way(path):
    origin = part(dotted(path))
    inside = {name for name in imports_of(path) if name.split(".")[0] == PACKAGE}
    wrong = {name: complaint(origin, part(name)) for name in inside if complaint(origin, part(name))}
    assert not wrong, wrong


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_the_numpy_side_imports_no_jax(name):
    """By its own text, and by that of the modules of the package that it names."""
    seen, todo = set(), {ROOT / name}
    while todo:
        path = todo.pop()
        seen.add(path)
        found = imports_of(path)
        assert not {n for n in found if n.split(".")[0] in ("jax", "jaxlib", "flax", "optax")}, path
        modules = {ROOT.parent.joinpath(*n.split(".")).with_suffix(".py") for n in found if n.startswith(PACKAGE)}
        modules |= {ROOT.parent.joinpath(*n.split(".")[:-1]).with_suffix(".py") for n in found if n.startswith(PACKAGE)}
        todo |= {m for m in modules if m.exists()} - seen
    assert ROOT / name in seen


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not {n for n in imports_of(path, lazy=False) if n.split(".")[0] in HEAVY}


def test_importing_the_package_is_light():
    """A fresh interpreter, because this one has imported everything."""
    script = f"import json, sys, {PACKAGE}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    loaded = json.loads(done.stdout)
    assert PACKAGE in loaded
    assert not {m for m in loaded if m.split(".")[0] in {"matplotlib", "da4ml", "hls4ml", "sklearn", "orbax", "optuna", "mlflow"}}


SOURCE = """
import jax.numpy as jnp
from . import ir
from ..numerics import oracle
from .. import _errors
from pquant_jax.train.fit import epoch
if TYPE_CHECKING:
    import hls4ml
def lazily():
    from matplotlib import pyplot
    import pquant_jax.cli
"""


def test_the_reader_of_imports_finds_all_of_them():
    tree = ast.parse(SOURCE)
    found = set(imported(tree, "pquant_jax.lower.emulate", False))
    inside = {"pquant_jax.lower.ir", "pquant_jax.numerics.oracle", "pquant_jax._errors", "pquant_jax.train.fit.epoch"}
    assert found == {*inside, "jax.numpy", "matplotlib.pyplot", "pquant_jax.cli", "hls4ml"}
    assert set(imported(ast.parse("from .ir import Net"), "pquant_jax.lower", True)) == {"pquant_jax.lower.ir.Net"}
    assert set(imported(ast.parse("from ..a import b"), "pquant_jax.lower", True)) == {"pquant_jax.a.b"}
    eager = set(imported(at_module_level(tree), "pquant_jax.lower.emulate", False))
    assert eager == {*inside, "jax.numpy"}


@pytest.mark.parametrize(
    ("origin", "target", "allowed"),
    [
        ("_tree", "_errors", True),
        ("lower", "lower", True),
        ("lower", "numerics", True),
        ("numerics", "transforms", False),
        ("prune", "quantize", False),
        ("lower", "train", False),
        ("graph", "prune", False),
        ("report", "_errors", True),
        ("report", "numerics", False),
        ("data", "_tree", True),
        ("data", "numerics", False),
        ("cli", "config", True),
        ("cli", "", True),
        ("config", "cli", False),
        ("train", "", False),
        ("train", "unheard_of", False),
    ],
)
def test_the_order_can_be_broken(origin, target, allowed):
    assert (complaint(origin, target) is None) == allowed
