"""What a configuration names: functions of other packages and files, looked for beside the configuration."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pquant_jax._errors import ConfigError, did_you_mean

FUNCTION: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@contextmanager
def importing(folders: Sequence[str]) -> Iterator[None]:
    """Let modules be imported from the current directory and `folders`; afterwards `sys.path` is as before.

    Modules that came from there are forgotten, so that the `model.py` of one project is not taken for another's.
    """
    places = list(dict.fromkeys([str(Path.cwd()), *(str(Path(f).absolute()) for f in folders)]))
    before, known = list(sys.path), set(sys.modules)
    sys.path[:0] = places
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        ours = {name for name in set(sys.modules) - known if "." not in name and _is_in(sys.modules[name], places)}
        for name in [n for n in set(sys.modules) - known if n.partition(".")[0] in ours]:
            del sys.modules[name]


def _is_in(module: Any, places: Sequence[str]) -> bool:
    """Does the module's file, or its package's folder, lie directly in one of `places`?"""
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    path = Path(file).absolute()
    return str(path.parent.parent if path.name == "__init__.py" else path.parent) in places


def named(spec: str, what: str) -> Any:
    """The object that 'package.module:name' names.

    what: the configuration's key, for the error.
    Raises: ConfigError if the text has another form, or the module or the name doesn't exist.

    >>> named("math:hypot", "loss")(3, 4)
    5.0
    """
    if not FUNCTION.fullmatch(spec):
        raise ConfigError(f"{what} is {spec!r}, expected 'package.module:function'")
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{what} is {spec!r}, but {module_name!r} can't be imported: {error}; put its folder into `folders`, or install it"
        ) from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{what} is {spec!r}, but {module_name!r} has no {name!r}; {did_you_mean(name, known)}")
    return getattr(module, name)


def find_file(name: str, folders: Sequence[str]) -> Path:
    """The absolute path of `name`: as it stands, in the current directory, or in the first of `folders` that has it.

    A file that is nowhere is given as in the current directory: whoever reads it says that it is missing.
    """
    given, places = Path(name).expanduser(), [Path.cwd(), *map(Path, folders)]
    return next((p / given for p in places if (p / given).exists()), Path.cwd() / given).absolute()
