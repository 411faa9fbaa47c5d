"""The command line.  Every command's work is a function of `pquant_jax.run`; here are only words and exit codes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, Final

from pquant_jax._errors import PQuantError, VerifyError

HLS: Final = ("Vitis", "Vivado", "VivadoAccelerator", "Quartus", "Catapult", "oneAPI", "Libero")  # importing them is slow
EXIT: Final = "exit codes: 0 done, 2 a mistake in the input or a missing tool (one line on stderr), 3 two implementations differ, 130 and 143 stopped by SIGINT and SIGTERM"  # noqa: E501

RUN: Final = """
Train, compress, lower and prove what a configuration describes.

  pquant-jax run configs/jets_hgq.yaml
  pquant-jax run my.yaml --name trial2 --set training.epochs.train=20 --set pruning=null

Writes runs/<name>/: config.yaml (every default written out), metrics.jsonl (one line per epoch), checkpoints/, final.npz
(integers and scales), graph.npz, rtl/ (combinational and pipelined Verilog), profiles.npz, summary.json, report.html.
Own models and data given as 'package.module:function' are looked for in the current directory and in the folder of the
configuration.  Ctrl-C or SIGTERM ends the epoch, writes a checkpoint and stops; `pquant-jax resume` goes on from there.
"""
RESUME: Final = """
Go on with an interrupted run from its newest checkpoint.  The final parameters are bit for bit those of an uninterrupted
run.  A finished run is left as it is.

  pquant-jax resume runs/jets_hgq
"""
LOWER: Final = """
Lower a trained run again: graph.npz, rtl/, the proof, the cell count, summary.json and report.html are replaced.

  pquant-jax lower runs/jets_hgq --set hardware.clock_period=2.5
  pquant-jax lower runs/jets_hgq --backend alkaid --hls Vitis --onnx qonnx
  pquant-jax lower runs/jets_hgq --weights registers --tmr 10

rtl/comb and rtl/pipelined are whole projects: Verilog and VHDL, self-checking testbenches with vectors, constraints, scripts,
metadata.json, a C header and a README.  hls/ is an hls4ml project, model.qonnx.onnx a QONNX file, rtl/registers the netlist
with a register file around it (regmap.json, weights.hex).  Each is compared with the emulator, integer by integer.
"""
VERIFY: Final = """
Compare the JAX forward, the emulator, da4ml's netlist and the written Verilog of a lowered run once more, integer by
integer, on the test set and on random codes of the whole input port.  Updates summary.json and report.html.

  pquant-jax verify runs/jets_hgq --vectors 100000 --seed 1
"""
WEIGHTS: Final = """
Prove another weight set in the netlist of a run that was lowered with --weights registers or ports, without lowering again.
OTHER is a run of the same model with the same formats and masks, or its final.npz.  Its weights are simulated in the written
Verilog, and loaded over the bus of the register file, which is compared before and after.

  pquant-jax lower runs/jets --weights registers
  pquant-jax weights runs/jets runs/jets_seed2

Writes RUN/weights/<name of OTHER>/: weights.hex (the words to load, in the order of addresses), regmap.json (where every weight
is) and proof.json (what was compared, and the metric with these weights).
"""
REPORT: Final = """
Draw report.html of a finished run again, from the files in its directory.

  pquant-jax report runs/jets_hgq
"""
PREDICT: Final = """
Apply a finished run to new data: an .npz with `x` (n, features...), or `x/NAME` for every input of a model with several.
Writes an .npz with `prediction` and, for a lowered run, the integers `codes` and `f` (prediction = codes * 2^-f), which the
emulator has confirmed.

  pquant-jax predict runs/jets_hgq data.npz -o out.npz
"""
EXPLAIN: Final = """
List every quantize site of a configured model: shape, kind, bits to start from, what of them moves, and which rule or
default says so.

  pquant-jax explain configs/jets_hgq.yaml
"""
TEMPLATE: Final = """
Print the quantization section of a configuration with one rule per site of its model, to edit.

  pquant-jax template configs/jets_hgq.yaml --quantizer fixed
"""
SCAN: Final = """
What post-training quantization would have given: the run's uncompressed model (float.npz) at every ap_fixed<W,I> of a grid, on
the test set.  Writes RUN/scan/: scan.json (the metric at every point, the narrowest good one, the layers that need bits most)
and pictures.

  pquant-jax scan runs/jets_hgq --widths 6 8 10 12 --integers 2 3 4 5
"""
ROBUST: Final = """
What bit flips do to a trained run: every stored weight bit scored by gradient and Hessian, and the metric on the test set
against the flip rate, in weights (as they are, and with a part of the bits protected), activations and tables.  Writes
RUN/robust/: robust.json and pictures.

  pquant-jax robust runs/jets_hgq --protect 10
"""
FOREST: Final = """
Boosted trees as hardware: a model file of XGBoost (JSON, UBJSON, JSON dump) or LightGBM (text, JSON dump) is put on fixed-point
grids, pruned to a budget of LUTs, and written as RTL that is compared with it, integer by integer.  DATA.npz holds `x`
(n, features), which sets the port and tests the netlist, and optionally `y`: labels give the accuracy, other numbers the error.

  pquant-jax forest model.json --data jets.npz
  pquant-jax forest model.txt --data jets.npz --integer 5 --fraction 10 --luts 2000 --backend alkaid --clock-period 3

Writes runs/<stem of MODEL>/: rtl/comb and rtl/pipelined (whole projects, as `lower` writes them), graph.npz, summary.json
(scores of the float and of the quantized forest, estimated LUTs, latency, mismatches).
"""
SCHEMA: Final = """
Print the JSON schema of a configuration file: every key with its type, default and meaning.  The sections of methods are
pruning (ap, autosparse, cs, dst, magnitude, pdp, random, wanda), constraints (MDMM on sparsity, group_sparsity, dsp_sparsity,
bram_sparsity, nm_violation, ebops, patterns or a function), quantization (binary, dynamic, fixed, frozen, hgq,
minifloat, ternary) and search (fitcompress, hawq).

  pquant-jax schema > experiment.schema.json
"""
DOCTOR: Final = """
Say what a run finds on this machine and what it would have to skip.  Exit code 1 if something is missing without which
nothing works; tools of a single step are only named.

  pquant-jax doctor
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    A PQuantError is one line on stderr; with PQUANT_DEBUG=1 in the environment it is a traceback.  Any other exception
    is a defect and keeps its traceback.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments) or 0)
    except PQuantError as error:
        if os.environ.get("PQUANT_DEBUG") == "1":
            raise
        print(f"error: {' | '.join(filter(None, map(str.strip, str(error).splitlines())))}", file=sys.stderr)
        return 3 if isinstance(error, VerifyError) else 2
    except BrokenPipeError:  # `pquant-jax schema | head`: nobody reads on, and the interpreter must not flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as error:
        hint = getattr(error, "hint", "")
        print(f"stopped; {hint}" if hint else "stopped", file=sys.stderr)
        return 128 + int(getattr(error, "signum", signal.SIGINT))


def _parser() -> argparse.ArgumentParser:
    from pquant_jax import __version__

    parser = argparse.ArgumentParser(
        prog="pquant-jax",
        description="Compress a JAX model to a hardware budget, as RTL proved bit-identical to what was trained.",
        epilog=f"`pquant-jax COMMAND --help` says what a command reads and writes.  {EXIT}",
    )
    parser.add_argument("--version", action="version", version=f"pquant-jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = _command(commands, "run", "train, compress, lower and prove a configuration", RUN, _run)
    run.add_argument("config", metavar="CONFIG", help="YAML file")
    _add_set(run, "another value of one key, e.g. training.epochs.train=20 (repeatable)")
    run.add_argument("--name", help="of the run directory; default the configuration's")
    run.add_argument("--root", default="runs", help="where run directories are (default %(default)s)")
    run.add_argument("--overwrite", action="store_true", help="replace a run of this name")
    _add_quiet(run)
    resume = _command(commands, "resume", "go on with an interrupted run", RESUME, _resume)
    lower = _command(commands, "lower", "netlist, proof and cell count of a trained run again", LOWER, _lower)
    verify = _command(commands, "verify", "prove a lowered run again", VERIFY, _verify)
    weights = _command(commands, "weights", "prove another weight set in a run's netlist", WEIGHTS, _weights)
    report = _command(commands, "report", "draw the report of a run again", REPORT, _report)
    predict = _command(commands, "predict", "apply a finished run to new data", PREDICT, _predict)
    scan = _command(commands, "scan", "the uncompressed model at a grid of ap_fixed<W,I>", SCAN, _scan)
    robust = _command(commands, "robust", "bit flips: what they do, and which bits to protect", ROBUST, _robust)
    for command in (resume, lower, verify, weights, report, predict, scan, robust):
        command.add_argument("run", metavar="RUN", help="run directory, e.g. runs/jets_hgq")
    for command in (resume, lower, verify, weights, robust):
        _add_quiet(command)
    _add_set(lower, "another value of a key of hardware (repeatable)")
    lower.add_argument("--backend", choices=["da4ml", "alkaid"], help="what turns the graph into logic")
    lower.add_argument(
        "--weights", choices=["constants", "ports", "registers"],
        help="fixed in the logic; inputs of the netlist; or a register file, written over a bus",
    )  # fmt: skip
    lower.add_argument("--tmr", metavar="N", help="percent of the register file's bits to triplicate, the most sensitive ones")
    lower.add_argument("--hls", choices=HLS, metavar="BACKEND", help=f"an hls4ml project too, simulated: {', '.join(HLS)}")
    lower.add_argument("--onnx", nargs="+", metavar="KIND", help="write qonnx, onnx or qdq files too")
    verify.add_argument("--vectors", type=_positive, help="inputs to compare; default the run's")
    verify.add_argument("--seed", type=int, help="of the random ones; default the run's")
    weights.add_argument("other", metavar="OTHER", help="another run, or its final.npz")
    weights.add_argument("-o", "--out", metavar="OUT", help="folder; default RUN/weights/<name of OTHER>")
    predict.add_argument("data", metavar="DATA.npz", help="input data")
    predict.add_argument("-o", "--out", metavar="OUT.npz", help="default RUN/predictions.npz")
    predict.add_argument("--raw", action="store_true", help="x is not standardised yet: apply the run's (x - mean) / std first")
    explain = _command(commands, "explain", "every quantize site of a model and what it is given", EXPLAIN, _explain)
    template = _command(commands, "template", "a quantization section with a rule per site", TEMPLATE, _template)
    for command in (explain, template):
        command.add_argument("config", metavar="CONFIG", help="YAML file")
        _add_set(command, "another value of one key (repeatable)")
    template.add_argument("--quantizer", default="hgq", help="hgq, fixed or dynamic (default %(default)s)")
    scan.add_argument("--widths", type=_positive, nargs="+", metavar="W", help="total widths; default 4, 6 ... 18")
    scan.add_argument("--integers", type=int, nargs="+", metavar="I", help="integer bits, sign included; default 1 to 8")
    scan.add_argument("--drop", type=float, default=0.01, help="of the metric that a good point may lose (default %(default)s)")
    robust.add_argument("--rates", type=float, nargs="+", metavar="P", help="chances that a bit flips; default 1e-4 to 0.1")
    robust.add_argument("--protect", type=float, default=10.0, metavar="N", help="percent of the bits (default %(default)s)")
    robust.add_argument("--trials", type=_positive, default=32, help="draws per rate (default %(default)s)")
    _add_forest(commands)
    _command(commands, "schema", "print the JSON schema of a configuration", SCHEMA, _schema)
    _command(commands, "doctor", "what is installed and what is missing", DOCTOR, _doctor)
    return parser


def _add_forest(commands: Any) -> None:
    forest = _command(commands, "forest", "boosted trees of XGBoost or LightGBM as proved RTL", FOREST, _forest)
    forest.add_argument("model", metavar="MODEL", help="model file, told by its content")
    forest.add_argument("--data", metavar="DATA.npz", required=True, help="x (n, features) and optionally y")
    forest.add_argument(
        "--bits", type=_positive, default=16, help="of a feature; its range in x places the point (default %(default)s)"
    )
    forest.add_argument("--integer", type=int, metavar="I", help="integer bits of every feature, without the sign")
    forest.add_argument("--fraction", type=int, metavar="F", help="fractional bits of every feature")
    forest.add_argument("--leaves", type=_positive, default=8, metavar="BITS", help="of a leaf (default %(default)s)")
    forest.add_argument("--luts", type=float, metavar="N", help="prune to about N LUTs; every second sample chooses what goes")
    forest.add_argument("--backend", choices=["da4ml", "alkaid"], default="da4ml", help="default %(default)s")
    forest.add_argument("--clock-period", type=float, default=5.0, metavar="NS", help="of the pipeline (default %(default)s)")
    forest.add_argument("--base-margin", type=float, nargs="+", metavar="M", help="of a dump of XGBoost: one per output")
    forest.add_argument("--names", nargs="+", metavar="NAME", help="of a dump with feature names: the columns of x")
    forest.add_argument("--vectors", type=_positive, default=10_000, help="inputs to compare (default %(default)s)")
    forest.add_argument("--seed", type=int, default=0, help="of the random ones (default %(default)s)")
    forest.add_argument("-o", "--out", metavar="FOLDER", help="default runs/<stem of MODEL>")
    forest.add_argument("--overwrite", action="store_true", help="replace what this command wrote there")
    _add_quiet(forest)


def _command(commands: Any, name: str, line: str, text: str, function: Callable[[Any], Any]) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=line,
        description=textwrap.dedent(text),
        epilog="\n".join(textwrap.wrap(EXIT, 100)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=function)
    return command


def _add_set(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help=text)


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number")
    return int(text)


def _run(arguments: Any) -> None:
    from pquant_jax import config
    from pquant_jax.run import run

    named = [] if arguments.name is None else [f"name={json.dumps(arguments.name)}"]
    experiment = config.load(arguments.config, [*arguments.overrides, *named])
    run(experiment, root=arguments.root, overwrite=arguments.overwrite, quiet=arguments.quiet)


def _resume(arguments: Any) -> None:
    from pquant_jax.run import resume

    resume(arguments.run, quiet=arguments.quiet)


def _lower(arguments: Any) -> None:
    from pquant_jax.run import lower

    asked = {key: getattr(arguments, key) for key in ("backend", "weights", "tmr", "hls", "onnx")}
    flags = [f"hardware.{key}={json.dumps(value).replace('%', '')}" for key, value in asked.items() if value is not None]
    lower(arguments.run, [*arguments.overrides, *flags], quiet=arguments.quiet)


def _verify(arguments: Any) -> None:
    from pquant_jax.run import verify

    verify(arguments.run, vectors=arguments.vectors, seed=arguments.seed, quiet=arguments.quiet)


def _weights(arguments: Any) -> None:
    from pquant_jax.run import weights

    made = weights(arguments.run, arguments.other, arguments.out, quiet=arguments.quiet)
    words = f"{made['words']:,} words of {made['word']} bits"
    if not arguments.quiet:
        place = arguments.out or os.path.join(arguments.run, "weights", made["weights"])
        print(f"{made['weights']}: {words} in {place}, 0 mismatches ({', '.join(made['mismatches'])})")


def _report(arguments: Any) -> None:
    from pquant_jax.run import write_report

    print(write_report(arguments.run))


def _predict(arguments: Any) -> None:
    from pquant_jax.run import predict

    arrays = predict(arguments.run, arguments.data, arguments.out, raw=arguments.raw)
    proof = "integers confirmed by the emulator" if "codes" in arrays else "not lowered, so no integers"
    rows = len(next(iter(arrays.values())))
    print(f"{rows:,} predictions in {arguments.out or os.path.join(arguments.run, 'predictions.npz')} ({proof})")


def _explain(arguments: Any) -> None:
    from pquant_jax import config
    from pquant_jax.run import explain

    print(explain(config.load(arguments.config, arguments.overrides)))


def _template(arguments: Any) -> None:
    from pquant_jax import config
    from pquant_jax.run import template

    print(template(config.load(arguments.config, arguments.overrides), arguments.quantizer), end="")


def _scan(arguments: Any) -> None:
    from pquant_jax.run import scan

    axes = {name: v for name in ("widths", "integers") if (v := getattr(arguments, name)) is not None}
    found = scan(arguments.run, drop=arguments.drop, **axes)
    name, point = found["metric"], found["chosen"]
    good = (
        "no point is" if point is None else f"<{point['width']},{point['integer']}> has {point['value']:.4f} and is the narrowest"
    )
    count = len(found["widths"]) * len(found["integers"])
    print(f"{name} of float {found['baseline'][name]:.4f}; {good} within {arguments.drop:g}, of {count} in {arguments.run}/scan")


def _robust(arguments: Any) -> None:
    from pquant_jax.run import robust

    rates = {} if arguments.rates is None else {"rates": arguments.rates}
    found = robust(arguments.run, percent=arguments.protect, trials=arguments.trials, quiet=arguments.quiet, **rates)
    for name, curve in found["curves"].items():
        row = ", ".join(f"{v:.4f} at {p:g}" for p, v in zip(curve["rates"], curve["mean"], strict=True))
        print(f"{name}: {found['metric']} {row} ({curve['clean']:.4f} without flips)")
    print(f"{found['bits']:,} weight bits; pictures and robust.json in {arguments.run}/robust")


def _forest(arguments: Any) -> None:
    from pquant_jax.run import forest

    given = {key: value for key, value in vars(arguments).items() if key not in ("command", "model", "data", "out", "quiet")}
    found = forest(arguments.model, arguments.data, arguments.out, quiet=arguments.quiet, **given)
    if arguments.quiet:
        return
    about = found["forest"]
    if "metric" in about:
        pair = f"{about['quantized']:.4f}, of the float forest {about['float']:.4f}"
        print(f"{about['metric']} {pair}, on {about['samples']:,} samples")
    error = about["score_error"]
    print(f"scores differ by {error['mean']:.3g}, at most {error['largest']:.3g}; summary.json and rtl/ in {found['folder']}")


def _schema(arguments: Any) -> None:
    from pquant_jax import config

    del arguments
    print(json.dumps(config.json_schema(), indent=1))


def _doctor(arguments: Any) -> int:
    from pquant_jax.run import checks

    del arguments
    rows = [("name", "found", "needed for", "how to install")]
    made = checks()
    rows += [(c.name, c.found or "MISSING", c.purpose, "" if c.found else c.fix) for c in made]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    missing = [c for c in made if not c.found]
    for check in missing:
        print(f"without {check.name}: {f'the step {check.step!r} is skipped' if check.step else 'nothing works'}")
    return int(any(not c.step for c in missing))
