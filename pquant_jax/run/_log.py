"""What a run prints: a line per phase with its time, and a live line per training, plain where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from rich.console import Console

PLAIN_INTERVAL: Final = 3.0  # seconds between two plain lines of one stage


class Log(NamedTuple):
    """Where a run prints, and the seconds of every phase so far."""

    console: Console
    seconds: dict[str, float]


def make_log(*, quiet: bool) -> Log:
    """A log to standard output; quiet prints nothing."""
    return Log(Console(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True), {})


@contextmanager
def phase(log: Log, name: str, *, live: bool = False) -> Iterator[list[str]]:
    """Time a phase and print it when it is done, with the remarks that were put into the list.

    live: the phase draws its own progress, so that no spinner is shown.  A phase that fails is timed too.
    """
    start, remarks = time.perf_counter(), list[str]()
    try:
        if live or not log.console.is_terminal:
            yield remarks
        else:
            with log.console.status(f"{name} ..."):
                yield remarks
    finally:
        log.seconds[name] = log.seconds.get(name, 0.0) + time.perf_counter() - start
    log.console.print(f"{name:<10} {log.seconds[name]:7.1f} s   {', '.join(remarks)}".rstrip())


def describe(record: dict[str, Any], metric: str, speed: float) -> str:
    """The figures of one epoch in a line.

    >>> describe({"loss": 0.5, "val_metric": 0.7, "sparsity": 0.25, "ebops": 1200.0}, "accuracy", 20.0)
    'loss 0.5000  accuracy 0.7000  sparsity 25.0%  EBOPs 1,200  20.0 epochs/s'
    """
    parts = [f"loss {record['loss']:.4f}", f"{metric} {record['val_metric']:.4f}", f"sparsity {record['sparsity']:.1%}"]
    if "ebops" in record:
        parts.append(f"EBOPs {record['ebops']:,.0f}")
    return "  ".join([*parts, f"{speed:.1f} epochs/s"])


@contextmanager
def progress(log: Log, name: str, total: int, metric: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """show(record), to be called after every epoch.  total: epochs of all stages."""
    speed = [0.0]

    def text(record: dict[str, Any]) -> str:
        now = 1.0 / max(record["seconds"], 1e-9)
        speed[0] = now if not speed[0] else 0.9 * speed[0] + 0.1 * now  # the first epoch compiles
        return describe(record, metric, speed[0])

    if log.console.quiet:
        yield lambda record: None
    elif log.console.is_terminal:
        with _bar(log, name, total) as show:
            yield lambda record: show(record, text(record))
    else:
        yield _lines(log, name, total, text)


def _label(name: str, record: dict[str, Any]) -> str:
    return name if name == "float" else f"{name} {record['stage']}"  # the float model has one stage


def _lines(log: Log, name: str, total: int, text: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], None]:
    last: dict[str, Any] = {"time": 0.0, "stage": None}

    def show(record: dict[str, Any]) -> None:
        line = text(record)
        due = time.monotonic() - last["time"] >= PLAIN_INTERVAL
        if due or record["stage"] != last["stage"] or record["epoch"] + 1 == total:
            last.update(time=time.monotonic(), stage=record["stage"])
            log.console.print(f"  {_label(name, record):<14} {record['epoch'] + 1:>5}/{total}  {line}")

    return show


@contextmanager
def _bar(log: Log, name: str, total: int) -> Iterator[Callable[[dict[str, Any], str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=log.console, transient=True) as bar:
        task = bar.add_task(f"{name:<14}", total=total, figures="compiling")

        def show(record: dict[str, Any], figures: str) -> None:
            bar.update(task, completed=record["epoch"] + 1, description=f"{_label(name, record):<14}", figures=figures)

        yield show
