"""What every RTL backend writes: one folder that is complete or absent, and what is known of it.  numpy only."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from pquant_jax._errors import LoweringError, did_you_mean

FLAVORS: Final = ("verilog", "vhdl")


class RTLInfo(NamedTuple):
    """Written RTL: where it is, its ports and the backend's estimates.

    `stages` is 0 for a combinational netlist; a vector on the input before clock edge 1 is on the output after edge
    `latency_cycles`; a new vector can enter every `ii` cycles.  `reg_bits`: flip-flops; `cost`: estimated LUTs;
    `latency_units`: length of the longest path in adder delays.  `inp_kifs`, `out_kifs`: int (3, n), rows k, i, f, of
    the port elements as they lie in `model_inp` and `model_out`, first element in the lowest bits, no bit where
    k + i + f = 0 (an input that is never used).
    """

    name: str
    directory: Path
    src: Path
    flavor: str
    stages: int
    latency_cycles: int
    ii: int
    reg_bits: int
    cost: float
    latency_units: float
    inp_kifs: np.ndarray
    out_kifs: np.ndarray


def describe(
    directory: str | Path,
    name: str,
    flavor: str,
    ports: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    *,
    stages: int,
    reg_bits: int,
    cost: float,
    latency_units: float,
) -> RTLInfo:
    """The `RTLInfo` of what lies in `directory` with its sources in src/, pipelined with II = 1 if it has `stages`.

    ports: k, i, f of every element of the input and of the output.

    >>> figures = dict(stages=2, reg_bits=9, cost=7.0, latency_units=3.0)
    >>> made = describe("net", "net", "verilog", ([(1, 2, 3), (0, 1, 0)], [(1, 4, 3)]), **figures)
    >>> made.latency_cycles, made.inp_kifs.tolist()
    (3, [[1, 0], [2, 1], [3, 0]])
    """
    target = Path(directory).absolute()
    latency = stages + 1 if stages else 0  # a register before every stage and one behind the last
    inp, out = (np.array(p, np.int64).reshape(len(p), 3).T for p in ports)
    return RTLInfo(
        name, target, target / "src", flavor, stages, latency, 1, int(reg_bits), float(cost), float(latency_units), inp, out
    )


def check_names(name: str, flavor: str, reserved: frozenset[str]) -> None:
    """Raise `LoweringError` unless `name` can be a module beside the `reserved` ones and `flavor` is one of `FLAVORS`."""
    if flavor not in FLAVORS:
        raise LoweringError(f"flavor is {flavor!r}; {did_you_mean(flavor, FLAVORS)}")
    if not (name.isascii() and name.isidentifier()) or name.startswith("_") or name in reserved:
        raise LoweringError(
            f"name is {name!r}, expected letters, digits and _, beginning with a letter, "
            f"and none of {', '.join(sorted(reserved))}"
        )


@contextmanager
def whole_folder(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` when the block ends and vanishes when it raises.

    Raises `LoweringError` at once if `directory` exists and `overwrite` is not set; the old one stays until then.

    >>> with tempfile.TemporaryDirectory() as work:
    ...     with whole_folder(Path(work) / "made") as partial:
    ...         _ = (partial / "file").write_text("whole")
    ...     (Path(work) / "made" / "file").read_text()
    'whole'
    """
    target = Path(directory).absolute()
    if target.exists() and not overwrite:
        raise LoweringError(f"{target} exists; pass overwrite=True to replace it, or another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put `new` where `target` is; the old one is removed only after the new one is in its place."""
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    new.rename(target)
    shutil.rmtree(old)
