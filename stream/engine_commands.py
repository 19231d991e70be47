"""`unmask engines`: networks built ahead of time, what is kept, and whether they agree (docs/engines.md)."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from detectors.members import MemberError, load_member
from detectors.mtcnn import MtcnnDetector
from detectors.published import ARCHITECTURES, PAPER_CROP
from detectors.published import build as build_layout
from detectors.readings import Box
from detectors.reference import reference_crops
from engines import bench, hardware, kept
from engines.eager import EagerEngine
from engines.engine import (
    NAMES,
    EngineUnavailableError,
    Network,
    Plan,
    Refusal,
    build,
    make,
)
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.networks import find_face, load_cast, plan_of

OK, REFUSED = 0, 1
"""Exit codes."""

RANDOM = "random:"
"""Before the name of a published layout: that network with random weights, to see how fast it would be."""

SEED = 4
"""Of those weights: the same each time, so that what was built of them is found again."""

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Subject:
    """A network with what an engine of it has to agree on: inputs (N, 3, S, S), and a logit's probability."""

    network: Network
    reference: Tensor
    to_probability: Callable[[float], float]


def build_engines(config: Config, names: Sequence[str], out: TextIO) -> int:
    """Build what serves each network, or find it kept; exit code 1 if an engine before it was refused.

    Raises `UnmaskError` (ENGINE) for a network whose own numbers cannot be used.
    """
    plan, cache = plan_of(config), cache_of(config)
    refused: list[Refusal] = []
    for subject in subjects(config, names):
        begun, known = time.monotonic(), len(refused)
        try:
            engine = build(
                subject.network,
                plan,
                cache,
                subject.reference,
                subject.to_probability,
                on_refused=refused.append,
            )
        except ValueError as error:
            raise UnmaskError(Code.ENGINE, str(error)) from error
        seconds = time.monotonic() - begun
        out.write(f"{subject.network.name}: {engine.name} {engine.precision}, {seconds:.1f} s\n")
        for refusal in refused[known:]:
            out.write(f"  refused {refusal.engine} {refusal.precision}: {refusal.reason}\n")
        out.flush()
    return REFUSED if refused else OK


def list_engines(config: Config, as_json: bool, out: TextIO) -> int:
    """Print what is kept, and whether this machine as it is now would use it."""
    rows = [
        {
            "network": entry.facts.get("name", ""),
            "engine": entry.engine,
            "precision": entry.facts.get("precision", ""),
            "batch": entry.facts.get("batch"),
            "shape": entry.facts.get("shape"),
            "state": "current" if _is_current(entry.facts) else "stale",
            "bytes": entry.size,
            "made": datetime.fromtimestamp(entry.made, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "folder": str(entry.folder),
        }
        for entry in kept.entries(cache_of(config), NAMES)
    ]
    for row in rows:
        if as_json:
            out.write(json.dumps(row) + "\n")
            continue
        batch = "any batch" if row["batch"] is None else f"batch to {row['batch']}"
        out.write(
            f"{row['state']:8}{row['network']:24} {row['engine']:9} {row['precision']:5} {batch:13} "
            f"{row['bytes'] / MIB:6.1f} MiB  {row['made']}  {row['folder']}\n"
        )
    if not rows and not as_json:
        out.write(f"nothing is kept in {cache_of(config)}; `unmask engines build` builds\n")
    return OK


def verify_engines(config: Config, names: Sequence[str], as_json: bool, out: TextIO) -> int:
    """Compare every engine of the settings with eager fp32, each in rounds of random batches.

    Exit code 1 if one that runs here disagrees. The reference is computed anew."""
    plan = plan_of(config)
    wrong = False
    for subject in subjects(config, names):
        eager = partial(EagerEngine, subject.network.module, "fp32", plan.settled_threads())
        expected = eager()(subject.reference)
        for row in _compared(subject, plan, cache_of(config), expected):
            wrong |= row["state"] == "DIFFERS"
            out.write((json.dumps(row) if as_json else _line(row)) + "\n")
            out.flush()
    return REFUSED if wrong else OK


def subjects(config: Config, names: Sequence[str]) -> Iterator[Subject]:
    """Yield the named networks, or every member of the settings. Raises `UnmaskError` (WEIGHTS, CONFIG)."""
    face = find_face(MtcnnDetector())
    for name in names or names_of(config):
        yield load_subject(name, config, face)


def names_of(config: Config) -> tuple[str, ...]:
    """Return the names of the settings' members, as `load_subject` takes them."""
    cast = load_cast(config)
    every = (*cast.voters, *cast.heavy, *cast.shadows, *cast.halves)
    given = (*config.members.names, *config.members.heavy, *config.members.shadow, *config.members.half)
    # a member that lies in a folder is called by its own name once loaded: the folder is what loads it again
    own = {load_member(name, cache_of(config)).name: name for name in given}
    return tuple(own.get(member.name, member.name) for member in every)


def load_subject(name: str, config: Config, face: Box) -> Subject:
    """Return a member by what `members.names` takes, or `random:LAYOUT`. Raises `UnmaskError` (WEIGHTS)."""
    if name.startswith(RANDOM):
        return _random(name, face)
    try:
        member = load_member(name, cache_of(config))
    except (MemberError, ValueError, OSError) as error:
        raise UnmaskError(Code.WEIGHTS, str(error)) from error
    return Subject(
        Network(member.name, member.module, member.sha256),
        reference_crops(face, member.policy),
        member.calibration.probability,
    )


def cache_of(config: Config) -> Path:
    return Path(config.engines.cache_dir).expanduser()


def _random(name: str, face: Box) -> Subject:
    layout = name.removeprefix(RANDOM)
    if layout not in ARCHITECTURES:
        raise UnmaskError(
            Code.WEIGHTS,
            f"{name!r} is no layout; there are: {', '.join(RANDOM + known for known in ARCHITECTURES)}",
        )
    torch.manual_seed(SEED)
    module = build_layout(layout).eval().requires_grad_(False)
    return Subject(
        Network(name, module, _weights_hash(module)),
        reference_crops(face, PAPER_CROP),
        lambda logit: float(1 / (1 + np.exp(-logit))),
    )


def _weights_hash(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_current(facts: kept.Facts) -> bool:
    wanted, device = facts.get("versions", {}), facts.get("device", {})
    if kept.versions(*wanted) != wanted:
        return False
    if list(device) == ["kind"]:  # for every device of its kind
        return True
    if device.get("kind") == "cuda" and hardware.find_device() != "cuda":
        return False
    return bool(hardware.facts(device.get("kind", "cpu")) == device)


def _compared(
    subject: Subject, plan: Plan, cache: Path, expected: tuple[Any, Any]
) -> Iterator[dict[str, Any]]:
    for name, precision in plan.candidates():
        row: dict[str, Any] = {"network": subject.network.name, "engine": name, "precision": precision}
        try:
            engine = make(name, precision, subject.network, plan, cache, subject.reference)
            change, problem = bench.parity(
                engine,
                expected,
                subject.reference,
                plan.batch,
                subject.to_probability,
                np.random.default_rng(),
            )
        except EngineUnavailableError as error:
            yield row | {"state": "absent", "reason": str(error)}
        except Exception as error:  # compilers of networks raise anything
            yield row | {"state": "DIFFERS", "reason": " ".join(str(error).split())}
        else:
            state = "agrees" if problem is None else "DIFFERS"
            yield row | {"state": state, "reason": problem or ""} | asdict(change)


def _line(row: dict[str, Any]) -> str:
    told = row["reason"]
    if "probability" in row:
        parts = (f"{key} {row[key]:.5f}" for key in ("probability", "logit", "attention"))
        apart = f"apart at most: {', '.join(parts)}"
        told = f"{apart}; {told}" if told else apart
    return f"{row['state']:8}{row['network']:24} {row['engine']:9} {row['precision']:5} {told}"
