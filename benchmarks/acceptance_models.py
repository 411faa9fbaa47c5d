"""The lines of the milestone `models`: any JAX model in, exact fixed point out.  See `acceptance.py`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
from lines import Line, module, pytest_line

GRAPHS: Final = 1000


def zoo_lines() -> Iterator[Line]:
    """One line per model of the zoo."""
    zoo = module("zoo")
    for name, entry in zoo.ENTRIES.items():
        found = zoo.run(name)
        promise = "trains, refused with a way out" if entry.refused else "trains, lowers, 0 mismatches"
        yield Line(f"zoo, {name}: {promise}", zoo.text(found), found["holds"])
        jax.clear_caches()  # no model comes twice
        gc.collect()


def fuzz_lines() -> Iterator[Line]:
    """Random graphs."""
    counts: dict[str, Any] = module("fuzz_graphs").run(GRAPHS, 0)
    figure = ", ".join(f"{key} {value}" for key, value in counts.items() if not isinstance(value, dict) or len(value) < 6)
    yield Line(f"fuzz: {GRAPHS:,} random graphs, 0 mismatches", figure, bool(counts["holds"]))


def same_ir_lines() -> Iterator[Line]:
    """One model in several words."""
    yield pytest_line("linen, nnx, equinox, plain, and direct style against instrumented: identical IR", "tests", "-k", "same_ir")


def ebops_lines() -> Iterator[Line]:
    """Costs."""
    yield pytest_line("EBOPs of HGQ2's layers, exact", "tests/graph", "tests/quantize", "-k", "golden or hgq2")


def scan_lines() -> Iterator[Line]:
    """The precision scan."""
    yield pytest_line("precision scan 8 x 8: one compilation, every point as quantize.fixed", "tests/search/test_scan.py")
    yield pytest_line("precision scan: its pictures", "tests/report", "-k", "scan")


def table_lines() -> Iterator[Line]:
    """Layers of trained tables on the jets."""
    yield from (Line(*line) for line in module("bench_tables").lines())


def site_lines() -> Iterator[Line]:
    """What a user sees of the sites."""
    yield pytest_line("pq.template: read back it is the quantizer, an edit changes that site", "tests/quantize", "-k", "template")
    yield pytest_line("pq.check on 20 graphs", "tests", "-k", "test_check_graphs or check_on")
    yield pytest_line("all sites off: bitwise the original", "tests", "-k", "sites_off")


def overflow_lines() -> Iterator[Line]:
    """Proofs on ranges."""
    yield pytest_line("overflow proof: what passes it never overflows", "tests/lower/test_overflow.py")


PARTS: Final[dict[str, Callable[[], Iterator[Line]]]] = {
    "zoo": zoo_lines,
    "fuzz": fuzz_lines,
    "same_ir": same_ir_lines,
    "ebops": ebops_lines,
    "scan": scan_lines,
    "tables": table_lines,
    "sites": site_lines,
    "overflow": overflow_lines,
}


def lines(only: Sequence[str] = ()) -> Iterator[Line]:
    """All lines, or those of the parts in `only`."""
    for name in only or PARTS:
        yield from PARTS[name]()
