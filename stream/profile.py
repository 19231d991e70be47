"""What a machine was measured to do: the profile that `unmask bench` writes and `unmask plan` reads."""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from stream.errors import Code, UnmaskError

SCHEMA = 1

FILE = "profile.json"
"""Where `bench` writes and `plan` looks, in the data folder."""

NAMED = Path(__file__).parent / "profiles"
"""Profiles that were measured elsewhere and are shipped."""

PACKAGES = ("unmask", "av", "torch", "openvino", "opencv-python-headless", "kafka-python")
"""Whose versions a figure may depend on."""


class Name(StrEnum):
    """Every figure of a profile. Those of the cluster and of a GPU may be missing."""

    REMUX_720 = "remux_720p"
    REMUX_1080 = "remux_1080p"
    DECODE_720 = "decode_720p"
    DECODE_1080 = "decode_1080p"
    PICTURE_720 = "picture_720p"
    PICTURE_1080 = "picture_1080p"
    DETECT = "detect"
    FACE = "face"
    GPU_DETECT = "gpu_detect"
    GPU_FACE = "gpu_face"


class Of(StrEnum):
    """Whose work a figure of a log is. The broker's can only be measured beside it."""

    EMBEDDED = "embedded"
    KAFKA = "kafka"
    BROKER = "broker"


class Step(StrEnum):
    """What was done with a log; a figure's name is `<of>_<step>`."""

    APPEND_LARGE = "append_300kb"
    APPEND_SMALL = "append_30kb"
    APPEND_RECORD = "append_1500b"
    APPEND_ALONE = "append_30kb_alone"
    POLL_LARGE = "poll_300kb"
    POLL_SMALL = "poll_30kb"
    COMMIT = "commit"


def log_figure(of: Of, step: Step) -> str:
    """Return the name of a log's figure."""
    return f"{of}_{step}"


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of some repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Figure:
    """What one piece of work costs.

    `unit` says what one is, `how` how it was measured. `cpu_s`: CPU seconds for one, all threads together
    (of a GPU: seconds that it is taken). `per_s`: how many a second by the wall clock, as measured. `size`:
    bytes of one, 0 where that means nothing.
    """

    unit: str
    cpu_s: Spread
    per_s: Spread
    how: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Profile:
    """The figures of one machine. `cores`: how many a process can use; `engine`: what ran the members."""

    name: str
    made: str
    cpu: str
    cores: int
    memory_bytes: int
    system: str
    versions: Mapping[str, str]
    engine: str
    members: tuple[str, ...]
    figures: Mapping[str, Figure]

    def cost(self, name: str) -> float:
        """Return CPU seconds for one; raises `UnmaskError` (CONFIG) if it was not measured."""
        return self._figure(name).cpu_s.median

    def wall(self, name: str) -> float:
        """Return seconds by the clock for one; raises the same."""
        return 1 / self._figure(name).per_s.median

    def _figure(self, name: str) -> Figure:
        if name not in self.figures:
            sentence = f"profile {self.name} has no figure {name}; `unmask bench` measures it"
            raise UnmaskError(Code.CONFIG, sentence)
        return self.figures[name]

    def has(self, *names: str) -> bool:
        return all(name in self.figures for name in names)

    def machine(self) -> str:
        """Return the machine in words."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        memory = self.memory_bytes / 2**30
        return f"{self.cpu}, {self.cores} cores, {memory:.0f} GiB of memory, {self.system}; {versions}"

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    def with_figures(self, figures: Mapping[str, Figure]) -> "Profile":
        return replace(self, figures={**self.figures, **figures})


def parse(text: str, where: str) -> Profile:
    """Return the profile in `text`; raises `UnmaskError` (CONFIG) that names what is wrong with it."""
    try:
        value: dict[str, Any] = json.loads(text)
        if value.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        figures = {name: _figure(name, figure) for name, figure in value.pop("figures").items()}
        profile = Profile(**value | {"figures": figures, "members": tuple(value["members"])})
        if not isinstance(profile.cores, int) or profile.cores < 1:
            raise ValueError(f"cores is {profile.cores!r}; it must be a whole number, at least 1")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnmaskError(
            Code.CONFIG, f"{where} is not a profile that `unmask bench` wrote: {error}"
        ) from None
    return profile


def read(path: Path) -> Profile:
    """Return the profile in a file; raises `UnmaskError` (CONFIG)."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"profile {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UnmaskError(Code.CONFIG, f"profile {path} is not UTF-8 text") from None


def shipped() -> dict[str, Path]:
    """Return the profiles that come with the installation, by name."""
    return {path.stem: path for path in sorted(NAMED.glob("*.json"))}


def find(wanted: str | None, own: Path) -> Profile:
    """Return the profile that `wanted` names, a file or a shipped one; None: the one at `own`.

    Raises `UnmaskError` (CONFIG) that says what there is and what to run.
    """
    if wanted is None:
        if not own.is_file():
            raise UnmaskError(
                Code.CONFIG,
                "this machine was never measured; run `unmask bench` first, or take another's figures "
                f"with --profile: {_choices()}",
            )
        return read(own)
    named = shipped()
    if wanted in named:
        return read(named[wanted])
    if Path(wanted).is_file():
        return read(Path(wanted))
    raise UnmaskError(Code.CONFIG, f"--profile is {wanted!r}; it must be a file or {_choices()}")


def machine() -> dict[str, Any]:
    """Return what a profile says of the machine this runs on."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.M)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _text("/proc/meminfo"), re.M)
    return {
        "cpu": cpu.group(1) if cpu else platform.processor() or platform.machine(),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else 0,
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _choices() -> str:
    return ", ".join(shipped()) or "none is shipped with this installation"


def _figure(name: str, value: dict[str, Any]) -> Figure:
    spreads = {key: _spread(f"{name}.{key}", value[key]) for key in ("cpu_s", "per_s")}
    if not spreads["per_s"].low > 0:
        raise ValueError(f"{name}.per_s is {spreads['per_s'].low}; it must be above 0")
    return Figure(**value | spreads)


def _spread(name: str, value: dict[str, Any]) -> Spread:
    spread = Spread(**value)
    for number in (spread.median, spread.low, spread.high):
        if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
            raise ValueError(f"{name} is {number!r}; it must be a number, at least 0")
    return spread
