"""The written project of a model: its testbenches pass in Verilator and GHDL, and fail when one bit of one weight is flipped.

    python benchmarks/hardware_project.py GRAPH.npz [--vectors N] [--cutoff DELAYS]

The flipped netlist keeps the formats of its ports, so that only the integers differ.  The vectors and the expected outputs
are those of the whole model.  GHDL takes about 80 ms for a vector at 33,000 LUTs, Verilator less than 0.1 ms.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pquant_jax.lower import ir
from pquant_jax.lower.backends import da4ml
from pquant_jax.lower.emulate import emulate, flatten_batch, port_grid
from pquant_jax.lower.project import ProjectInfo, run_testbench, write_project

CUTOFF = 5.0


def kernels(graph: ir.Graph) -> list[int]:
    """The constants that a product reads."""
    read = {j for node in graph.nodes if node.op in ("dot", "mul") for j in node.inputs}
    return [j for j in sorted(read) if graph.nodes[j].op == "const"]


def flip_bit(graph: ir.Graph, index: int, element: int, bit: int) -> ir.Graph:
    """`graph` with bit `bit` of the two's complement code of one weight inverted; bit 0 is its lowest bit that is 1."""
    value = np.array(graph.nodes[index].attrs["value"], np.float64)
    mantissa, exponent = np.frexp(value.flat[element])
    code, low = int(mantissa * 2**53), int(exponent) - 53
    shift = (code & -code).bit_length() - 1
    value.flat[element] = np.ldexp(float((code >> shift) ^ (1 << bit)), low + shift)
    changed = graph.nodes[index]
    node = ir.Node(changed.op, changed.inputs, changed.shape, {**changed.attrs, "value": value}, changed.name)
    return graph._replace(nodes=(*graph.nodes[:index], node, *graph.nodes[index + 1 :]))


def port_formats(comb: Any) -> list[tuple[int, ...]]:
    """k, i, f of all elements of both ports."""
    from da4ml.types import minimal_kif

    return [tuple(map(int, minimal_kif(q))) for q in (*comb.inp_qint, *comb.out_qint)]


def visible_flip(graph: ir.Graph, comb: Any, inputs: Sequence[np.ndarray], seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """(netlist with one flipped bit, which one): a random bit that changes an output on `inputs` and no port's format."""
    rng = np.random.default_rng(seed)
    expected, formats = flatten_batch(emulate(graph, inputs)), port_formats(comb)
    places = [(j, int(e)) for j in kernels(graph) for e in np.flatnonzero(graph.nodes[j].attrs["value"])]
    for n in rng.permutation(len(places)):
        index, element = places[int(n)]
        other = flip_bit(graph, index, element, int(rng.integers(0, 3)))
        changed = (flatten_batch(emulate(other, inputs)) != expected).any(1)
        if changed.any() and port_formats(made := da4ml.to_comb(other)) == formats:
            before, after = (float(g.nodes[index].attrs["value"].flat[element]) for g in (graph, other))
            where = {"node": ir.label(graph, index), "element": element, "from": before, "to": after}
            return made, {**where, "vectors_changed": int(changed.sum())}
    raise ValueError("no weight bit changes an output on these vectors and keeps the ports; give more vectors")


def measure(project: ProjectInfo, flavor: str, work: Path) -> dict[str, Any]:
    """One testbench run; warnings counted by what they are about."""
    result = run_testbench(project, flavor, work=work)
    about = Counter("testbench" if "tb_" in line else "netlist" for line in result.warnings)
    return {**result._asdict(), "warnings": {key: about[key] for key in ("netlist", "testbench")}}


def lines(graph: ir.Graph, *, vectors: int = 200, cutoff: float = CUTOFF, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A row per comb/pipelined and Verilog/VHDL: {"design", "flavor", "passes", "fails_when_flipped", "vectors",
    "latency_cycles", "cost", "flip", "first_mismatch", "warnings", "build_seconds", "run_seconds"}."""
    inputs = port_grid(graph, vectors, np.random.default_rng(seed))
    comb = da4ml.to_comb(graph)
    other, flip = visible_flip(graph, comb, inputs, seed)
    for design, delays in (("comb", -1.0), ("pipelined", cutoff)):
        with tempfile.TemporaryDirectory(prefix="pquant-project-") as folder:
            root = Path(folder)
            made = [
                write_project(graph, c, root / name, name="model", latency_cutoff=delays, vectors=inputs)
                for name, c in (("right", comb), ("flipped", other))
            ]
            for flavor in made[0].rtl:
                right, wrong = (measure(project, flavor, root / "work") for project in made)
                yield {
                    "design": design,
                    "flavor": flavor,
                    "passes": right["passed"],
                    "fails_when_flipped": not wrong["passed"],
                    "vectors": right["vectors"],
                    "latency_cycles": made[0].rtl[flavor].latency_cycles,
                    "cost": made[0].rtl[flavor].cost,
                    "flip": flip,
                    "first_mismatch": next(iter(wrong["mismatches"]), ""),
                    "warnings": right["warnings"],
                    "build_seconds": round(right["build_seconds"], 1),
                    "run_seconds": round(right["run_seconds"], 1),
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--vectors", type=int, default=200)
    parser.add_argument("--cutoff", type=float, default=CUTOFF)
    args = parser.parse_args()
    failed = 0
    for row in lines(ir.load(args.graph), vectors=args.vectors, cutoff=args.cutoff):
        failed += not (row["passes"] and row["fails_when_flipped"])
        print(json.dumps(row), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
