"""`unmask engines bench`: every engine here on every member and batch size, each in a process of its own.

Of its own, because memory that one engine took would else be counted to the next, threads of one library spin
beside those of another, and a compiler of networks that crashes takes nothing else with it.
"""

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast, get_args

import numpy as np
import torch
from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from detectors.mtcnn import MtcnnDetector
from detectors.readings import Box
from engines import bench
from engines.bench import Pace
from engines.eager import EagerEngine
from engines.engine import ORDERS, Mode, Name, Plan, Precision, answers, make
from stream.assemble import data_folder
from stream.config import Config
from stream.engine_commands import MIB, Subject, cache_of, load_subject, names_of
from stream.errors import Code, UnmaskError
from stream.networks import find_face, plan_of
from stream.profile import machine

OK = 0
SCHEMA = 1
FILE = "engines.json"
"""Where the figures are written, in the data folder."""

QUICK, FULL = Pace(3, 0.5), Pace(7, 2.0)
BATCHES = (1, 4, 16)
TABLE_WIDTH = 150
"""Columns of the table where no terminal says how many there are."""

PARITY_SEED = 7
"""Of the batches that parity is taken over: the same in every bench."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure; empty: all there is. `batches` over `engines.batch` are measured too."""

    names: tuple[str, ...] = ()
    engines: tuple[Name, ...] = ()
    precisions: tuple[Precision, ...] = ()
    batches: tuple[int, ...] = BATCHES
    quick: bool = False


def options_of(
    names: Sequence[str],
    engines: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    quick: bool,
) -> BenchOptions:
    """Return what a command line asks for. Raises `UnmaskError` (CONFIG) for what there is not."""
    for option, given, known in (
        ("--engine", engines, get_args(Name)),
        ("--precision", precisions, get_args(Precision)),
    ):
        for word in given:
            if word not in known:
                raise UnmaskError(Code.CONFIG, f"{option} is {word!r}; it must be one of {', '.join(known)}")
    return BenchOptions(
        names=tuple(names),
        engines=cast(tuple[Name, ...], tuple(engines)),
        precisions=cast(tuple[Precision, ...], tuple(precisions)),
        batches=tuple(batches) or BATCHES,
        quick=quick,
    )


@dataclass(frozen=True, slots=True)
class Task:
    """One engine of one network, to be examined in a process of its own."""

    config: Config
    face: Box
    network: str
    engine: Name
    plan: Plan
    batches: tuple[int, ...]
    pace: Pace

    @property
    def precision(self) -> Precision:
        assert self.plan.precision != "auto"
        return self.plan.precision


def run(config: Config, options: BenchOptions, target: Path | None, out: TextIO) -> int:
    """Measure, print a table and what to set, write the figures; return the exit code."""
    path = target or data_folder(config) / FILE
    tasks = list(_tasks(config, options))
    with _progress(len(tasks)) as told:
        rows = [row for task in tasks for row in told(task, _examined(task))]
    _print(rows, out)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {
            **machine(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": tasks[0].plan.settled_threads() if tasks else 0,
            "load_1min": os.getloadavg()[0],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "limits": "PyTorch, same threads, best of several: square matrices' product, copy larger than caches",
        "rows": rows,
    }
    for line in advice(rows):
        out.write(line + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"{path} cannot be written: {error.strerror}") from None
    out.write(f"figures: {path}\n")
    return OK


def advice(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the settings under which each network is fastest, of engines that agree, at the largest batch."""
    for network in dict.fromkeys(row["network"] for row in rows):
        timed = [row for row in rows if row["network"] == network and row["agrees"]]
        if not timed:
            yield f"{network}: no engine agrees; eager fp32 serves it"
            continue
        largest = max(row["batch"] for row in timed)
        best = max((row for row in timed if row["batch"] == largest), key=lambda row: float(row["per_s"]))
        yield (
            f"{network}: fastest at {largest}: --set engines.device={best['device']} "
            f"--set engines.order='[\"{best['engine']}\"]' --set engines.precision={best['precision']} "
            f"--set engines.mode={best['mode']}"
        )


def examine(task: Task) -> list[dict[str, Any]]:
    """Build, time and compare one engine; return a row per batch size, one with a reason if it cannot run."""
    subject = load_subject(task.network, task.config, task.face)
    plan, precision = task.plan, task.precision
    torch.set_num_threads(plan.settled_threads())
    row: dict[str, Any] = {
        "network": subject.network.name,
        "engine": task.engine,
        "precision": precision,
        "mode": plan.mode,
        "device": plan.device,
        "agrees": False,
    }
    before = bench.taken(plan.device)
    try:
        engine = make(task.engine, precision, subject.network, plan, cache_of(task.config), subject.reference)
        timings = [bench.timed(engine, _faces(subject, batch), task.pace) for batch in task.batches]
        memory = max(0, bench.taken(plan.device) - before)
        eager = partial(EagerEngine, subject.network.module, "fp32", plan.settled_threads())
        expected = answers(subject.network, subject.reference, cache_of(task.config), eager)
        change, problem = bench.parity(
            engine,
            expected,
            subject.reference,
            plan.batch,
            subject.to_probability,
            np.random.default_rng(PARITY_SEED),
        )
    except Exception as error:  # compilers of networks raise anything, and the next one is to be measured
        return [row | {"refused": " ".join(str(error).split()) or type(error).__name__}]
    work = bench.work(subject.network.module, subject.reference[:1])
    limits = bench.limits(plan.device, precision)
    row |= {"agrees": problem is None, "refused": problem, "memory_bytes": memory}
    row |= {"parity": asdict(change), "limits": asdict(limits), "work": asdict(work)}
    return [
        row
        | asdict(timing)
        | {
            "arithmetic_share": work.flops * timing.per_s / limits.flops,
            "bandwidth_share": work.bytes(precision, timing.batch) * timing.per_s / limits.bandwidth,
        }
        for timing in timings
    ]


def _faces(subject: Subject, batch: int) -> torch.Tensor:
    count = len(subject.reference)
    faces = subject.reference[torch.arange(batch) % count]
    return faces.contiguous(memory_format=torch.channels_last)


def _tasks(config: Config, options: BenchOptions) -> Iterator[Task]:
    plan, face = plan_of(config), find_face(MtcnnDetector())
    batches = tuple(sorted(set(options.batches)))
    plan = replace(plan, batch=max(plan.batch, *batches))
    for network in options.names or names_of(config):
        load_subject(network, config, face)  # what is wrong with it is told before hours are spent
        for engine in options.engines or ORDERS[plan.device]:
            for precision in options.precisions or _precisions(plan):
                for mode in _modes(engine, plan):
                    own = replace(plan, precision=precision, mode=mode)
                    if engine == "openvino":
                        own = replace(own, device="cpu")
                    yield Task(config, face, network, engine, own, batches, QUICK if options.quick else FULL)


def _precisions(plan: Plan) -> tuple[Precision, ...]:
    return ("fp32", "bf16", "fp16") if plan.device == "cuda" else ("fp32", "bf16")


def _modes(engine: Name, plan: Plan) -> tuple[Mode, ...]:
    # with one thread there is nothing to run side by side
    return ("latency", "throughput") if engine == "openvino" and plan.settled_threads() > 1 else ("latency",)


def _examined(task: Task) -> list[dict[str, Any]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(examine, task).result()
        except BrokenProcessPool:
            row = {"network": task.network, "engine": task.engine, "precision": task.precision}
            row |= {"mode": task.plan.mode, "device": task.plan.device}
            return [row | {"agrees": False, "refused": "its process died"}]


@contextmanager
def _progress(count: int) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    terminal = Terminal(stderr=True)
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("engines", total=count)

        def told(task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            what = f"{task.network} {task.engine} {task.precision} {task.plan.mode}"
            progress.update(bar, advance=1, description=what)
            if not terminal.is_terminal:
                terminal.print(f"{what}: {rows[-1].get('refused') or 'measured'}")
            return rows

        yield told


def _print(rows: Sequence[Mapping[str, Any]], out: TextIO) -> None:
    table = Table(title="faces/s: median of the repeats (lowest, highest)")
    for head in ("network", "engine", "precision", "mode"):
        table.add_column(head, no_wrap=True)
    for head in ("batch", "faces/s", "p50 ms", "p95 ms", "MiB", "Δ prob.", "arithm.", "bandw."):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("refused")
    for row in rows:
        table.add_row(row["network"], row["engine"], row["precision"], row["mode"], *_figures(row))
    terminal = Terminal(file=out)
    if not terminal.is_terminal:
        terminal = Terminal(file=out, width=TABLE_WIDTH)
    terminal.print(table)


def _figures(row: Mapping[str, Any]) -> list[str]:
    refused = row["refused"] or ""
    if "per_s" not in row:
        return [""] * 8 + [refused]
    return [
        str(row["batch"]),
        f"{row['per_s']:.1f} ({row['lowest']:.1f}, {row['highest']:.1f})",
        f"{1000 * row['p50_s']:.1f}",
        f"{1000 * row['p95_s']:.1f}",
        f"{row['memory_bytes'] / MIB:.0f}",
        f"{row['parity']['probability']:.5f}",
        f"{row['arithmetic_share']:.0%}",
        f"{row['bandwidth_share']:.0%}",
        refused,
    ]
