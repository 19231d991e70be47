"""From settings to working parts: what reads faces, and the log (DESIGN 2)."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from detectors.calibration import Calibration, CalibrationKind
from detectors.readings import FaceReading, Image
from stream import device, marker, own
from stream.alerts import Provenance, provenance_of
from stream.cascade import Heavy
from stream.clock import Clock
from stream.closer import Closer, looks_of
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.log import Log
from stream.sqlite_log import SqliteLog

if TYPE_CHECKING:
    from detectors.reader import Usage
    from engines.engine import Refusal

logger = logging.getLogger(__name__)


class Reader(device.Reader, Protocol):
    """Reads faces in pictures, and pictures that are faces. Of each picture faces.max_faces are read, the
    largest; `faces_cut_off` counts the others."""

    @property
    def faces_cut_off(self) -> int: ...

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]: ...


@dataclass(frozen=True, slots=True)
class Assembly:
    """What reads faces, the calibration behind every probability, and what alerts say of both."""

    reader: Reader
    calibration: Calibration
    provenance: Provenance
    heavy: Heavy | None = None
    """What reads suspect faces more deeply, if there is anything that does."""
    usage: Callable[[], "Sequence[Usage]"] = tuple
    """What each member did, for metrics."""
    refusals: "Sequence[Refusal]" = ()
    """Engines that did not serve a member, for metrics; there may be more later."""


def build_reader(config: Config, cascade: bool = True) -> Assembly:
    """Load detector and members and put each member on the first engine that serves it; `verdict.calibration`
    replaces the calibration they come with.

    Without `cascade` heavy members read every face, as others do: where nobody waits for the result. The
    member `marker` needs none of that, nor torch. Raises `UnmaskError` (WEIGHTS) when a member is
    missing, tampered with or broken, (ENGINE) when its numbers cannot be used, (CONFIG) for `marker` beside
    others and for a calibration made with other members.
    """
    found = _markers(config) if marker.NAME in config.members.names else _networks(config, cascade)
    looks = looks_of(config)
    if looks:
        found = replace(found, reader=Closer(found.reader, looks))
    if config.verdict.calibration:
        adopted = own.adopted(config, found.calibration, found.provenance.models)
        calibration = replace(adopted, halves=found.calibration.halves)
        provenance = found.provenance.under(calibration)
        found = replace(found, calibration=calibration, provenance=provenance)
    if found.heavy is not None and found.calibration.kind is CalibrationKind.NONE:
        logger.warning(
            "these members together are uncalibrated: nothing is ever suspect, and members.heavy never reads"
        )
    return found


def _networks(config: Config, cascade: bool) -> Assembly:
    from stream.networks import build_networks

    built = build_networks(config, cascade)
    calibration, cast = built.ensemble.calibration, built.cast
    return Assembly(
        reader=built.reader,
        calibration=calibration,
        provenance=provenance_of(cast.with_a_say, calibration, cast.shadows),
        heavy=built.reader if built.reader.has_heavy else None,
        usage=lambda: (*built.reader.usage(), *built.refused),
        refusals=built.refusals,
    )


def _markers(config: Config) -> Assembly:
    named = [*config.members.names, *config.members.heavy, *config.members.shadow]
    if named != [marker.NAME]:
        raise UnmaskError(
            Code.CONFIG,
            f"members are {named}; {marker.NAME} sees drawn squares for faces and must be the only one",
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
