"""What several members cost, and what a cascade saves: start, faces, and a device with a suspect feed on it.

    python benchmarks/cascade.py [--json FILE] [--seconds 2]

Copies of the shipped member stand for three cheap ones. The heavy member is an EfficientNet-B4 at 224 px with
RANDOM weights: it costs what a trained one costs, and finds nothing; what a heavy member finds, this does not
measure. Costs are CPU time, which other work on the machine disturbs less than the clock. The device is
computed: the cascade's own code (`stream.cascade`) on a simulated clock, with the costs measured before.
"""

import argparse
import heapq
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.pop(0)  # this folder holds a kafka.py of its own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import save_file

from detectors.backbones import Architecture, FaceNetwork
from detectors.crops import CropKind, CropPolicy
from detectors.members import DEFAULT_MEMBER
from detectors.reader import NO_LANDMARKS
from detectors.readings import Detection, FaceReading, Image, Quality
from detectors.registry import SHIPPED, file_sha256
from stream.assemble import build_reader
from stream.bench import AT_ONCE, MANY, crowd
from stream.cascade import Cascade, Outcome
from stream.clock import FakeClock
from stream.config import Config, Engines, Members, Sampling
from stream.profile import machine
from stream.score import reduced

SQUARE = CropPolicy(CropKind.MARGIN_SQUARE, 224, 0.2, top=0.4)
"""The published networks' framing."""

FEEDS, SUSPECT, SIMULATED_S = 2, 1, 300.0
"""On the simulated device: feeds with one face each, those under suspicion, and for how long."""

BUDGETS = (0.1, 0.25, 0.5)

ROUNDS = 3
"""Of each measurement; the median counts."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of the device thread: for a picture without faces, and for each face in one."""

    picture_s: float
    face_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(json.loads(arguments.start))
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.seconds)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(folder: Path, seconds: float) -> dict[str, Any]:
    shipped = json.loads((SHIPPED / DEFAULT_MEMBER / "member.json").read_text())
    tight = CropPolicy.from_json(shipped["crop"])
    same = [copy(folder, name, tight) for name in ("a", "b", "c")]
    other = [copy(folder, "wide", replace(SQUARE, size=160)), copy(folder, "large", SQUARE.at_size(192))]
    b4 = heavy(folder)
    sets = {
        "one": Members(names=(same[0],)),
        "three, one crop policy": Members(names=tuple(same)),
        "three, three crop policies and sizes": Members(names=(same[0], *other)),
        "three and a shadow": Members(names=tuple(same), shadow=(other[0],)),
        "three and a B4 on every face": Members(names=(*same, b4)),
    }
    costs = {}
    for name, members in sets.items():
        costs[name] = cost(config(folder, members), seconds)
        print(f"{name}: {costs[name]}", file=sys.stderr)
    starts = {
        name: {state: started(folder, sets[name], state == "cold") for state in ("cold", "warm")}
        for name in ("one", "three, three crop policies and sizes")
    }
    cheap = costs["three, one crop policy"]
    extra_s = costs["three and a B4 on every face"].face_s - cheap.face_s
    return {
        "machine": machine(),
        "start": starts,
        "cost": {
            name: {"picture_ms": round(1e3 * one.picture_s, 2), "face_ms": round(1e3 * one.face_s, 2)}
            for name, one in costs.items()
        },
        "heavy_face_ms": round(1e3 * extra_s, 2),
        "device": [device(cheap, extra_s, budget) for budget in (None, *BUDGETS, float("inf"))],
    }


def config(folder: Path, members: Members) -> Config:
    return Config(members=members, engines=Engines(cache_dir=str(folder / "cache"), threads=1))


def copy(folder: Path, name: str, policy: CropPolicy) -> str:
    """The shipped member under another name, and perhaps another crop policy: the same cost per pixel."""
    shutil.copytree(SHIPPED / DEFAULT_MEMBER, folder / name)
    path = folder / name / "member.json"
    record = json.loads(path.read_text()) | {"name": name, "crop": policy.to_json()}
    path.write_text(json.dumps(record))
    return str(folder / name)


def heavy(folder: Path) -> str:
    architecture = Architecture("tf_efficientnet_b4", attention_block=9)
    torch.manual_seed(1)
    target = folder / "b4-random"
    target.mkdir()
    save_file(FaceNetwork(architecture).eval().state_dict(), target / "weights.safetensors")
    record = {
        "schema": 1,
        "name": target.name,
        "version": "0",
        "architecture": architecture.to_json(),
        "crop": SQUARE.to_json(),
        "sha256": file_sha256(target / "weights.safetensors"),
        "licence": "none: random numbers",
    }
    (target / "member.json").write_text(json.dumps(record))
    return str(target)


def cost(settings: Config, seconds: float) -> Cost:
    reader = build_reader(settings).reader
    batches = []
    for faces in (0, MANY):
        picture = crowd(faces)
        batches.append([(picture, reduced(picture, settings.decode.detect_width))] * AT_ONCE)
        if len(reader.read(batches[-1])[0]) != faces:
            raise SystemExit(f"{faces} faces drawn and another number found: the detector is broken")
    # in turn, so that what else the machine does falls on both
    rounds = [[cpu_s(reader, batch, seconds) for batch in batches] for _ in range(ROUNDS)]
    return Cost(median(none for none, _ in rounds), median(many - none for none, many in rounds) / MANY)


def cpu_s(reader: Any, batch: Sequence[tuple[Image, Image]], seconds: float) -> float:
    """CPU seconds of a picture."""
    begun, wall, pictures = time.process_time(), time.monotonic(), 0
    while pictures == 0 or time.monotonic() - wall < seconds / 2:
        reader.read(batch)
        pictures += len(batch)
    return (time.process_time() - begun) / pictures


def started(folder: Path, members: Members, cold: bool) -> dict[str, float]:
    """CPU seconds until a reader can read, in a process of its own: of all of it, and without the imports."""
    cache = folder / "cache-start"
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    told = json.dumps({"names": list(members.names), "cache": str(cache)})
    command = [sys.executable, __file__, "--start", told]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def start(told: dict[str, Any]) -> None:
    imported = time.process_time()
    begun = time.monotonic()
    names = tuple(told["names"])
    build_reader(Config(members=Members(names=names), engines=Engines(cache_dir=told["cache"], threads=1)))
    print(
        json.dumps(
            {
                "cpu_s": round(time.process_time() - imported, 2),
                "wall_s": round(time.monotonic() - begun, 2),
                "imports_cpu_s": round(imported, 2),
            }
        )
    )


NOTHING = np.zeros((1, 1, 3), np.uint8)
FACE = FaceReading(
    Detection((0.0, 0.0, 1.0, 1.0), NO_LANDMARKS, 1.0),
    Quality(1.0, {}, ()),
    {},
    0.0,
    NOTHING,
    np.zeros((1, 1), np.float32),
)
"""A face good enough to be read deeply, in a picture that nobody looks at: what it costs is known."""


class Costly:
    """Heavy members on a simulated clock."""

    def __init__(self, clock: FakeClock, face_s: float) -> None:
        self._clock = clock
        self._face_s = face_s

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        self._clock.advance(self._face_s * len(faces))
        return tuple(faces)


def device(cheap: Cost, extra_s: float, budget: float | None) -> dict[str, Any]:
    """One device thread, first come, first served. `budget` None: no heavy member; infinite: no limit.

    Suspect feeds are looked at `burst_fps` times a second, the others `idle_fps` times.
    """
    clock = FakeClock(0)
    cascade = Cascade(Costly(clock, extra_s), budget if budget not in (None, float("inf")) else 1.0, clock)
    waits: list[float] = []
    busy_s = 0.0
    for arrival_s, suspect in arrivals():
        clock.advance(max(0.0, arrival_s - clock.monotonic()))
        begun = clock.monotonic()
        clock.advance(cheap.picture_s + cheap.face_s)
        if suspect and budget is not None:
            # a file is refused nothing: that is what no limit means
            cascade.deepen("a", NOTHING, (FACE,), live=budget != float("inf"))
        busy_s += clock.monotonic() - begun
        waits += [] if suspect else [clock.monotonic() - arrival_s]
    deep = cascade.pictures[Outcome.READ]
    wanted = sum(suspect for _, suspect in arrivals())
    return {
        "budget": "no heavy member" if budget is None else "none" if budget == float("inf") else budget,
        "suspect_pictures_read_deeply": round(deep / wanted, 3),
        "deep_looks_per_s": round(deep / SIMULATED_S, 2),
        "heavy_share_of_time": round(cascade.seconds / max(SIMULATED_S, clock.monotonic()), 3),
        "device_busy": round(busy_s / max(SIMULATED_S, clock.monotonic()), 3),
        "calm_feed_waits_ms_median": round(1e3 * median(waits), 1),
        "calm_feed_waits_ms_most": round(1e3 * max(waits), 1),
    }


def arrivals() -> Iterator[tuple[float, bool]]:
    """Yield when each picture comes, and whether its feed is suspect."""
    sampling = Sampling()
    queue = [(number / FEEDS / sampling.idle_fps, number) for number in range(FEEDS)]
    heapq.heapify(queue)
    while queue[0][0] < SIMULATED_S:
        at_s, number = queue[0]
        suspect = number < SUSPECT
        yield at_s, suspect
        heapq.heapreplace(queue, (at_s + 1 / (sampling.burst_fps if suspect else sampling.idle_fps), number))


def table(found: dict[str, Any]) -> str:
    lines = ["| members | CPU ms a picture | CPU ms a face |", "|---|---|---|"]
    lines += [f"| {name} | {one['picture_ms']} | {one['face_ms']} |" for name, one in found["cost"].items()]
    lines += ["", f"A B4 (random weights) adds {found['heavy_face_ms']} CPU ms a face.", ""]
    lines += ["| start, after imports | cold cache, CPU s | warm cache, CPU s |", "|---|---|---|"]
    lines += [
        f"| {name} | {one['cold']['cpu_s']} | {one['warm']['cpu_s']} |"
        for name, one in found["start"].items()
    ]
    sizes = f"{FEEDS} feeds with a face each, {SUSPECT} suspect"
    lines += ["", f"{sizes}; computed from the costs above; waits are median / longest:", ""]
    lines += [
        "| budget | suspect pictures read deeply | a second | heavy share | device busy | calm feeds wait |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['budget']} | {one['suspect_pictures_read_deeply']:.0%} | {one['deep_looks_per_s']} "
        f"| {one['heavy_share_of_time']:.0%} | {one['device_busy']:.0%} "
        f"| {one['calm_feed_waits_ms_median']} / {one['calm_feed_waits_ms_most']} ms |"
        for one in found["device"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
