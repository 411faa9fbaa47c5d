"""Multipliers of a dense network against sparsity: single weights, and the groups that one multiplier works off.

    python benchmarks/hardware_sparsity.py [--plot]

With a reuse factor R one multiplier works off R weights, one after the other, so it is saved only if all R of them are 0.
Two measurements, neither of which knows the weights' values:

* hls4ml, strategy resource: the network 16-64-32-32-5 is written as a project, and the weights are read back from its
  files in the order in which `nnet_dense_resource.h` reads them: multiplier m does weights[m R : m R + R] of the transposed
  kernel.  hls4ml's own `multiplier_limit` (products / R - zeros / R) is given beside it: it counts zeros as if they
  stood together, so it is too low for single weights.
* Yosys: the 32 x 32 layer as Verilog with one multiplier per group that holds something, which reads its weights from a
  memory that is written at run time, so that nothing can be folded into constants; DSP48E2 cells are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pquant_jax.lower import synth
from pquant_jax.prune import Reuse
from pquant_jax.transforms import layout

SIZES, REUSE, LEVELS = (16, 64, 32, 32, 5), (1, 2, 4, 8, 16), (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WRITTEN = 0.7  # the level at which projects are written
YOSYS_REUSE, YOSYS_LEVELS, BITS = 8, (0.0, 0.3, 0.5, 0.7, 0.9), 8
KINDS = ("unstructured", "groups")
RESULTS = Path(__file__).with_name("results")


def kernels(seed: int = 0) -> list[np.ndarray]:
    """Dense kernels (in, out) of 6 fractional bits, none of whose weights is 0."""
    rng = np.random.default_rng(seed)
    out = []
    for n, m in zip(SIZES, SIZES[1:], strict=False):
        w = np.rint(rng.normal(0, np.sqrt(2 / n), (n, m)) * 64)
        out.append(np.where(w == 0, 1, np.clip(w, -127, 127)) / 64)
    return out


def pruned(kernel: np.ndarray, kind: str, sparsity: float, reuse: int) -> np.ndarray:
    """`kernel` without its smallest weights, or without the smallest groups of `reuse` weights, as `pq.prune.Reuse` cuts them."""
    rows = kernel.T.reshape(-1, 1 if kind == "unstructured" else reuse)
    order = np.argsort(np.square(rows).sum(1), kind="stable")
    keep = np.ones(len(rows))
    keep[order[: round(sparsity * len(rows))]] = 0
    return (rows * keep[:, None]).reshape(kernel.T.shape).T


def check_groups(reuse: int) -> None:
    """Raise unless the groups of `pq.prune.Reuse` are those of `pruned`."""
    kernel = kernels()[0]
    theirs = layout("kernel", kernel.shape, Reuse(reuse)).scores(jnp.asarray(kernel, jnp.float32))
    if not np.allclose(np.ravel(theirs), np.linalg.norm(kernel.T.reshape(-1, reuse), axis=1), rtol=1e-5):
        raise ValueError(f"pq.prune.Reuse({reuse}) cuts the kernel otherwise than this benchmark")


def hls4ml_multipliers(weights: Sequence[np.ndarray], reuse: int, folder: Path) -> tuple[int, int]:
    """(multipliers with a weight that is not 0, the sum of hls4ml's own `multiplier_limit`) of the written project."""
    import hls4ml
    from hls4ml.model.graph import ModelGraph

    layers: list[dict[str, Any]] = [dict(class_name="InputLayer", name="x", input_shape=[SIZES[0]], data_format="channels_last")]
    for n, w in enumerate(weights):
        data = dict(weight_data=w.astype(np.float32), bias_data=np.zeros(w.shape[1], np.float32), data_format="channels_last")
        layers.append(dict(class_name="Dense", name=f"dense{n}", n_in=w.shape[0], n_out=w.shape[1], **data))
    with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = hls4ml.utils.config.create_config(
            output_dir=str(folder), project_name="dense", backend="Vitis", part="xcvu13p-flga2577-2-e", clock_period=5
        )
        model = {"Precision": {"default": "fixed<16,6>"}, "ReuseFactor": reuse, "Strategy": "resource"}
        config["HLSConfig"] = {"Model": model, "LayerName": {}}
        ModelGraph.from_layer_list(config, layers, ["x"], [layers[-1]["name"]]).write()
    if "Invalid ReuseFactor" in said.getvalue():
        raise ValueError(f"reuse factor {reuse} is not valid for {SIZES}: {said.getvalue()}")
    files = sorted((folder / "firmware" / "weights").glob("w*.txt"), key=lambda p: int(p.stem[1:]))
    used = 0
    for path, w in zip(files, weights, strict=True):
        flat = np.array(path.read_text().split(","), np.float64)
        if not np.array_equal(flat, w.T.ravel()):
            raise ValueError(f"{path.name} does not hold the transposed kernel in order")
        used += int(flat.reshape(-1, reuse).any(1).sum())
    text = (folder / "firmware" / "parameters.h").read_text()
    terms = re.findall(r"multiplier_limit = DIV_ROUNDUP\((?:n_in \* n_out), reuse_factor\) - n_zeros / reuse_factor", text)
    zeros = [int(v) for v in re.findall(r"n_zeros = (\d+);", text)]
    if len(terms) != len(weights) or len(zeros) != len(weights):
        raise ValueError("parameters.h has another form than this benchmark reads")
    return used, sum(-(-w.size // reuse) - z // reuse for w, z in zip(weights, zeros, strict=True))


def verilog(kernel: np.ndarray, reuse: int) -> str:
    """One multiplier per group of `reuse` weights of the transposed kernel that is not all 0, with loadable weights."""
    n_in, n_out = kernel.shape
    groups = kernel.T.reshape(-1, reuse)
    per_output = n_in // reuse  # reuse divides n_in: a group belongs to one output
    step, acc = max((reuse - 1).bit_length(), 1), 2 * BITS + n_in.bit_length()
    lines = [
        f"module dense(input clk, input first, input load, input [15:0] group, input [{step - 1}:0] step,",
        f"  input signed [{BITS - 1}:0] weight, input [{n_in * BITS - 1}:0] x, output reg [{n_out * acc - 1}:0] y);",
    ]  # fmt: skip
    for o in range(n_out):
        terms = []
        for g in range(o * per_output, (o + 1) * per_output):
            if not groups[g].any():
                continue
            first = (g % per_output) * reuse
            lines += [
                f"  reg signed [{BITS - 1}:0] w{g} [0:{reuse - 1}];",
                f"  always @(posedge clk) if (load && group == {g}) w{g}[step] <= weight;",
                f"  wire signed [{BITS - 1}:0] x{g} = x[({first} + step) * {BITS} +: {BITS}];",
                f"  wire signed [{2 * BITS - 1}:0] p{g} = x{g} * w{g}[step];",
            ]
            terms.append(f"p{g}")
        total = " + ".join(terms) or "0"
        lines += [
            f"  wire signed [{acc - 1}:0] s{o} = {total};",
            f"  always @(posedge clk) y[{o * acc} +: {acc}] <= first ? s{o} : $signed(y[{o * acc} +: {acc}]) + s{o};",
        ]
    return "\n".join([*lines, "endmodule", ""])


def yosys_multipliers(kernel: np.ndarray, reuse: int, folder: Path) -> int:
    """DSP48E2 cells of the synthesised layer."""
    folder.mkdir()
    (folder / "dense.v").write_text(verilog(kernel, reuse))
    flow = "synth_xilinx -family xcup -top dense -flatten -noiopad -noclkbuf -run"
    lines = ["read_verilog -sv dense.v", f"{flow} begin:prepare", f"{flow} prepare:map_memory", "tee -q -o stat.json stat -json"]
    return int(synth.run_script(lines, folder, timeout=120)["dsp"])


def multipliers(weights: Sequence[np.ndarray], reuse: int) -> int:
    """Groups of `reuse` weights in a row of the transposed kernels that hold something."""
    return sum(int(w.T.reshape(-1, reuse).any(1).sum()) for w in weights)


def measured_hls4ml() -> list[dict[str, Any]]:
    """Every level and kind; one project per reuse factor is written, which shows that the count is that of its files."""
    rows = []
    for reuse in REUSE:
        check_groups(reuse)
        for kind in KINDS:
            for level in LEVELS:
                weights = [pruned(w, kind, level, reuse) for w in kernels()]
                total = sum(w.size for w in weights)
                zeros = sum(int((w == 0).sum()) for w in weights) / total
                used = multipliers(weights, reuse)
                row = dict(reuse=reuse, kind=kind, sparsity=zeros, multipliers=used, dense=total // reuse)
                if kind == "unstructured" and level == WRITTEN:
                    with tempfile.TemporaryDirectory() as folder:
                        written, row["hls4ml"] = hls4ml_multipliers(weights, reuse, Path(folder) / "project")
                    if written != used:
                        raise ValueError(f"the project needs {written} multipliers, the kernels {used}")
                rows.append(row)
    return rows


def measured_yosys() -> list[dict[str, Any]]:
    rows, kernel = [], kernels()[2]
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for level in YOSYS_LEVELS:
                w = pruned(kernel, kind, level, YOSYS_REUSE)
                count = yosys_multipliers(w, YOSYS_REUSE, Path(folder) / f"{kind}_{level}")
                rows.append(dict(reuse=YOSYS_REUSE, kind=kind, sparsity=float((w == 0).mean()), multipliers=count))
    dense = {row["kind"]: row["multipliers"] for row in rows if row["sparsity"] == 0}
    return [{**row, "dense": dense[row["kind"]]} for row in rows]


def saved(rows: list[dict[str, Any]], kind: str, reuse: int, level: float = 0.7) -> float:
    """Fraction of the multipliers that is saved at the sparsity nearest to `level`."""
    own = [row for row in rows if row["kind"] == kind and row["reuse"] == reuse]
    row = min(own, key=lambda r: abs(r["sparsity"] - level))
    return 1 - row["multipliers"] / row["dense"]


def lines(plot: Path | None = RESULTS / "sparsity.png") -> Iterator[dict[str, Any]]:
    """{"name", "figure", "holds", and the figures}: what 70 % of zeros save, in groups and as single weights."""
    sources = {"hls4ml's project": measured_hls4ml(), "Yosys, weights in memories": measured_yosys()}
    for source, rows in sources.items():
        reuses = [r for r in dict.fromkeys(row["reuse"] for row in rows) if r > 1]
        for kind in KINDS:
            found = {r: saved(rows, kind, r) for r in reuses}
            expected = {r: 0.7 if kind == "groups" else 0.7**r for r in reuses}  # independent weights: all R of them are 0
            yield {
                "name": f"{source}: multipliers that 70 % of zeros save, {kind}",
                "figure": ", ".join(f"{100 * v:.1f} % at reuse factor {r}" for r, v in found.items()),
                "holds": all(abs(found[r] - expected[r]) < 0.03 for r in reuses),
                "rows": [row for row in rows if row["kind"] == kind],
            }
    if plot is not None:
        picture(sources, plot)


def picture(sources: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel per measurement: multipliers that are left over sparsity."""
    import matplotlib

    from pquant_jax.report._style import CYCLE, MUTED, STYLE

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = ("hls4ml project, strategy resource: 16-64-32-32-5", "Yosys, weights in memories: 32 x 32")
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, constrained_layout=True)
        for axis, title, rows in zip(panels, titles, sources.values(), strict=True):
            for colour, reuse in zip(CYCLE, REUSE, strict=False):
                for kind, dash in zip(KINDS, ("-", "--"), strict=True):
                    own = [row for row in rows if row["kind"] == kind and row["reuse"] == reuse]
                    if not own or (kind == "groups" and reuse == 1):  # a group of one weight is that weight
                        continue
                    x, y = [100 * row["sparsity"] for row in own], [100 * row["multipliers"] / row["dense"] for row in own]
                    what = {"groups": "groups of R", "unstructured": "single weights"}[kind]
                    name = "single weights, no reuse (R = 1)" if reuse == 1 else f"{what}, R = {reuse}"
                    axis.plot(x, y, dash, marker="o" if kind == "groups" else "s", ms=3.5, color=colour, label=name)
            axis.axvline(70, color=MUTED, lw=0.8, ls=":")
            axis.set(title=title, xlabel="zeros, %", xlim=(-2, 92), ylim=(0, 104))
            axis.legend(loc="lower left", fontsize=7.5)
        panels[0].set_ylabel("multipliers left, % (R: reuse factor)")
        figure.savefig(path, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="write results/sparsity.png")
    for line in lines(RESULTS / "sparsity.png" if parser.parse_args().plot else None):
        print(json.dumps({key: value for key, value in line.items() if key != "rows"}))
