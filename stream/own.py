"""A user's own calibration file: written by `unmask calibrate`, taken by the setting `verdict.calibration`.

It is the calibration of the members as shipped, with kind `own`, the thresholds that were fixed on the user's
footage, and what may be claimed for them. It holds for the members and settings that it was made with.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from detectors.calibration import Calibration, CalibrationError, CalibrationKind, FalseAlarms, Histogram
from stream.alerts import Model
from stream.config import Config, Seconds, Section, Share
from stream.errors import Code, UnmaskError

logger = logging.getLogger(__name__)

SEAL = "content_sha256"
"""Field with the hash of all others: thresholds changed by hand would carry a claim that nobody proved."""

THRESHOLDS = ("open_probability", "close_probability", "open_hold_s", "close_hold_s", "min_track_s")
"""Settings of the group `verdict` that a calibration fixes."""


class Made(Section):
    """A member that a calibration was made with."""

    name: str
    version: str
    sha256: str


class OperatingPoint(Section):
    """Thresholds, as the settings of `verdict` with these names, and what is claimed for them.

    `bound_per_hour` and `bound_per_track`: upper Poisson limits at `confidence` of false alarms in an hour
    with a face good enough to be decided on, and for a face followed, people counted once; `alarms` were
    counted in `hours` of `people`, whose `effective_hours` count. `bound_for_these_people`: the same an hour
    if nobody else is ever on screen. `recall`: share of the manipulated videos found, if there were any.
    `made_for`, `calibrated_from` and `settings`: members, calibration and settings that all this holds for.
    """

    open_probability: Share
    close_probability: Share
    open_hold_s: Seconds
    close_hold_s: Seconds
    min_track_s: Seconds
    false_alarms_per_hour: float
    uncalibrated_for_target: bool
    confidence: float
    bound_per_hour: float
    bound_per_track: float
    bound_for_these_people: float
    alarms: int
    people: int
    tracks: int
    hours: float
    effective_hours: float
    footage_hours: float
    files: int
    recall: float | None
    manipulated_files: int
    made_for: tuple[Made, ...]
    calibrated_from: str
    settings: Mapping[str, Any]


def write(
    path: Path,
    shipped: Calibration,
    point: OperatingPoint,
    reference: Mapping[str, Histogram] = MappingProxyType({}),
) -> str:
    """Write the file, whole or not at all, and return the SHA-256 of its bytes. Raises `UnmaskError`.

    `reference` is what drift is measured against; empty: the shipped one.
    """
    bound = FalseAlarms(point.bound_per_hour, point.effective_hours, point.people)
    calibration = replace(
        shipped,
        kind=CalibrationKind.OWN,
        operating_point=point.model_dump(mode="json"),
        bound=bound,
        reference=dict(reference) or shipped.reference,
    )
    record = calibration.to_json()
    content = json.dumps({**record, SEAL: _seal(record)}, indent=2).encode() + b"\n"
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise UnmaskError(Code.CONFIG, f"calibration {path} cannot be written: {error.strerror}") from None
    return hashlib.sha256(content).hexdigest()


def load(path: Path) -> tuple[Calibration, OperatingPoint]:
    """Return what `write` wrote; the calibration's `sha256` is that of the file.

    Raises `UnmaskError` (CONFIG) for a file that is missing, none of these, or changed since it was written.
    """
    try:
        content = path.read_bytes()
        record = json.loads(content)
    except OSError as error:
        raise _unusable(path, f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise _unusable(path, "is not JSON") from None
    if not isinstance(record, dict) or "operating_point" not in record or SEAL not in record:
        raise _unusable(path, "is no calibration that unmask calibrate wrote")
    seal = record.pop(SEAL)
    if seal != _seal(record):
        raise _unusable(
            path, "was changed after it was written, so what it claims was never proved; calibrate again"
        )
    try:
        calibration = Calibration.from_json(record, hashlib.sha256(content).hexdigest())
        point = OperatingPoint.model_validate_json(json.dumps(record["operating_point"]))
    except (CalibrationError, ValidationError) as error:
        reason = str(error) if isinstance(error, CalibrationError) else _first(error)
        raise _unusable(path, f"cannot be used: {reason}") from None
    return calibration, point


def in_force(settings: Config) -> Config:
    """Return the settings with the thresholds of the calibration file that they name, if they name one.

    Raises `UnmaskError` (CONFIG) as `load` does.
    """
    if not settings.verdict.calibration:
        return settings
    _, point = load(_path(settings))
    fixed = {name: getattr(point, name) for name in THRESHOLDS}
    return settings.model_copy(update={"verdict": settings.verdict.model_copy(update=fixed)})


def adopted(settings: Config, shipped: Calibration, models: tuple[Model, ...]) -> Calibration:
    """Return the calibration of the file that the settings name, else the shipped one.

    Raises `UnmaskError` (CONFIG) for a file made with other members or another calibration of them. Made with
    other settings, its thresholds hold and its bound does not: that is logged, and the bound left out.
    """
    if not settings.verdict.calibration:
        return shipped
    path = _path(settings)
    calibration, point = load(path)
    _check_members(path, point, made(models))
    if point.calibrated_from != shipped.sha256:
        raise _unusable(
            path,
            "was made when these members were calibrated or fused differently; run unmask calibrate again",
        )
    changed = sorted(name for name, value in facts(settings).items() if point.settings.get(name) != value)
    if changed:
        shown = ", ".join(f"{name} (was {point.settings.get(name)})" for name in changed)
        logger.warning(
            "calibration %s was made with other settings; its thresholds are used, its bound on false alarms "
            "does not hold: %s",
            path,
            shown,
        )
        calibration = replace(calibration, bound=None)
    return calibration


def facts(settings: Config) -> dict[str, Any]:
    """Return the settings on which false alarms depend besides `THRESHOLDS`, as JSON by dotted name."""
    groups: dict[str, tuple[str, ...]] = {
        "faces": tuple(type(settings.faces).model_fields),
        "quality": tuple(type(settings.quality).model_fields),
        "verdict": ("window_s", "min_samples", "level", "min_sampled_share"),
        "sampling": ("idle_fps", "burst_fps"),
        "decode": ("detect_width",),
        "policy": tuple(type(settings.policy).model_fields),
        "incidents": ("epoch_grace_s",),
        "members": ("heavy",),
    }
    values = {
        f"{group}.{name}": getattr(getattr(settings, group), name)
        for group, names in groups.items()
        for name in names
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def made(models: tuple[Model, ...]) -> tuple[Made, ...]:
    """Return members as a calibration file names them, by name."""
    named = [Made(name=model.name, version=model.version, sha256=model.sha256) for model in models]
    return tuple(sorted(named, key=lambda model: model.name))


def _check_members(path: Path, point: OperatingPoint, here: tuple[Made, ...]) -> None:
    if point.made_for == here:
        return
    raise _unusable(
        path,
        f"was made with {_shown(point.made_for)}, and watching is done with {_shown(here)}; name those in "
        "members.names, or run unmask calibrate again",
    )


def _shown(members: tuple[Made, ...]) -> str:
    return " and ".join(f"{member.name} {member.version} ({member.sha256[:12]})" for member in members)


def _path(settings: Config) -> Path:
    return Path(settings.verdict.calibration).expanduser()


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"operating_point.{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _unusable(path: Path, reason: str) -> UnmaskError:
    return UnmaskError(Code.CONFIG, f"verdict.calibration {path} {reason}")
