"""The lines of the milestone `models`: any JAX model in, exact fixed point out.  See `acceptance.py`."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from lines import Line, listed, module, pytest_line

import pquant_jax as pq
from pquant_jax.report import plots

GRAPHS, SIMULATED = 1000, 10
LEAST_MASS: Final = 0.3  # below it a response is the error over almost nothing
NOISE: Final = 0.02  # of a mean absolute error of 0.17


def zoo_lines() -> Iterator[Line]:
    """One line per model of the zoo."""
    zoo = module("zoo")
    for name, entry in zoo.ENTRIES.items():
        found = zoo.run(name)
        promise = "trains, refused with a way out" if entry.refused else "trains, lowers, 0 mismatches"
        yield Line(f"zoo, {name}: {promise}", zoo.text(found), found["holds"], "skipped" in found)
        jax.clear_caches()  # no model comes twice
        gc.collect()


def fuzz_lines() -> Iterator[Line]:
    """Random graphs of every op."""
    counts: dict[str, Any] = module("fuzz_graphs").run(GRAPHS, 0, rtl=SIMULATED)
    keys = ("mismatches", "outputs", "simulated", "failed", "refused", "nonzero", "varying", "overflow", "seconds")
    figure = ", ".join(f"{key} {counts[key]}" for key in keys)
    yield Line(f"fuzz: {GRAPHS:,} random graphs, 0 mismatches", figure, bool(counts["holds"]))


def same_ir_lines() -> Iterator[Line]:
    """One model in several words."""
    where = ("tests/nn/test_same_ir.py", "-k", "same_ir")
    yield pytest_line("linen, nnx, equinox, plain; direct and instrumented: identical IR", *where)


def ebops_lines() -> Iterator[Line]:
    """Costs."""
    yield pytest_line("EBOPs of HGQ2's layers, exact", "tests/graph/test_ebops.py", "tests/graph/test_ebops_hgq2.py")


def scan_lines() -> Iterator[Line]:
    """The precision scan."""
    tests = "tests/search/test_scan.py"
    yield pytest_line("precision scan 8 x 8: one compilation", tests, "-k", "one_trace")
    yield pytest_line("precision scan: monotone, the widest is the float model", tests, "-k", "wider_is_better")
    yield pytest_line("precision scan: every point bitwise quantize.fixed", tests, "-k", "bitwise")
    yield pytest_line("precision scan: its pictures", "tests/report/test_report_scan.py")
    yield mass_scan_line()


def mass_scan_line() -> Line:
    """8 x 8 grid of the DeepSets regression of the jet mass: wider is no worse, and its pictures."""
    inst, params, data, entry = module("zoo").float_model("mass_regression")
    seen = jax.tree.map(lambda v: v[data.test.y[:, 0] > LEAST_MASS], (data.test.x, data.test.y))
    seen = pq.data.Split(*seen)
    found = pq.scan(inst, params, seen, widths=range(4, 20, 2), integers=range(1, 9), metric=(entry.metric, *pq.search.RESPONSE))
    best, float_error = np.min(found.metric, axis=1), found.baseline[found.name]
    point = pq.search.chosen(found, drop=0.1 * float_error)
    fmt = (point.width, point.integer)
    pictures = [
        plots.scan_map(found, drop=0.1 * float_error),
        plots.scan_lines(found, log=True),
        plots.scan_response(found, quantity="mass / true mass"),
        plots.scan_layers(pq.search.sensitivity(inst, params, seen, low=8, metric=entry.metric)),
        plots.scan_differences(pq.search.differences(inst, params, seen, weights=fmt, intermediates=fmt)),
    ]
    figure = (
        f"mae {listed(best, '.3f')} at 4 to 18 bits, float {float_error:.3f}, resolution {found.baseline['resolution']:.3f}; "
    )
    figure += f"narrowest within a tenth <{fmt[0]},{fmt[1]}>; {len(pictures)} pictures"
    holds = float(np.diff(best).max()) < NOISE and all("<svg" in p and "</svg>" in p for p in pictures)
    return Line("precision scan of the jet mass: monotone in width, drawn", figure, holds)


def table_lines() -> Iterator[Line]:
    """Layers of trained tables on the jets, beside HGQ."""
    tables = module("bench_tables")
    report = tables.run()
    with tempfile.TemporaryDirectory() as folder:
        tables.picture(report, picture := Path(folder) / "tables.png")
        drawn = picture.stat().st_size
    points = [f"{p['accuracy']:.4f} at {p['cost']:,.0f}" for p in report["rows"]["tables"]["points"]]
    figure = (
        f"{report['mismatches']} integers differ; tables {', '.join(points)}; multipliers cost {report['ratio']:.2f} times as"
    )
    figure += f" much at {report['level']:.4f}; picture of {drawn:,} bytes"
    yield Line("trained tables on jets: 0 mismatches, accuracy over LUTs drawn", figure, bool(report["holds"]) and drawn > 0)


def site_lines() -> Iterator[Line]:
    """What a user sees of the sites."""
    yield pytest_line("pq.template: read back it is the quantizer, an edit changes that site", "tests/quantize", "-k", "template")
    yield pytest_line("pq.check: every gap named, on 20 graphs", "tests/lower/test_check.py")
    yield pytest_line("all sites off: bitwise the original", "tests/graph", "tests/zoo", "-k", "sites_off")


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
