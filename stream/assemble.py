"""From settings to working parts: what reads faces, and the log (DESIGN 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from detectors.calibration import Calibration
from detectors.readings import FaceReading, Image
from stream import device, marker
from stream.alerts import Provenance, provenance_of
from stream.clock import Clock
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.log import Log
from stream.sqlite_log import SqliteLog


class Reader(device.Reader, Protocol):
    """Reads faces in pictures, and pictures that are faces."""

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]: ...


@dataclass(frozen=True, slots=True)
class Assembly:
    """What reads faces, the calibration behind every probability, and what alerts say of both."""

    reader: Reader
    calibration: Calibration
    provenance: Provenance


def build_reader(config: Config) -> Assembly:
    """Load detector and members and put each member on the first engine that serves it.

    The member `marker` needs none of that, nor torch. Raises `UnmaskError` (WEIGHTS) when a member is
    missing, tampered with or broken, (ENGINE) when its numbers cannot be used, (CONFIG) for `marker` beside
    others.
    """
    if marker.NAME in config.members.names:
        return _markers(config)
    from stream.networks import face_reader, load_members

    members = load_members(config.members.names)
    return Assembly(face_reader(config, members), members[0].calibration, provenance_of(members))


def _markers(config: Config) -> Assembly:
    if config.members.names != (marker.NAME,):
        raise UnmaskError(
            Code.CONFIG,
            f"members.names is {list(config.members.names)}; {marker.NAME} sees drawn squares for faces and "
            "must be the only one",
        )
    return Assembly(marker.MarkerReader(), marker.CALIBRATION, marker.PROVENANCE)


def data_folder(config: Config) -> Path:
    """Return the folder of log, evidence and reports; it need not exist."""
    return Path(config.data_dir).expanduser()


def log_folder(config: Config) -> Path:
    """Return the folder of the embedded log."""
    return data_folder(config) / "log"


def open_embedded(config: Config, clock: Clock) -> SqliteLog:
    """Open the embedded log, making its folder if missing. Raises `UnmaskError` as `SqliteLog` does."""
    return SqliteLog(log_folder(config), config.log, clock)


def open_log(config: Config, clock: Clock) -> Log:
    """Open the log over the cluster that the settings name, else the embedded one.

    Raises `UnmaskError` as `SqliteLog` and `stream.cluster.open_cluster` do.
    """
    if not config.kafka.bootstrap_servers:
        return open_embedded(config, clock)
    from stream.cluster import open_cluster

    return open_cluster(config)
