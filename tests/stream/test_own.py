"""The user's own calibration file: what it claims was proved, for these members, and nobody edited it."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detectors.calibration import CalibrationKind, FalseAlarms
from stream import marker, own
from stream.alerts import Model
from stream.assemble import build_reader
from stream.config import Config
from stream.config_file import load as load_settings
from stream.config_file import to_yaml
from stream.errors import Code, UnmaskError

SHIPPED = replace(marker.CALIBRATION, sha256="5" * 64)
MODELS = (Model("b", "2", "b" * 64), Model("a", "1", "a" * 64))


def point(**changes: Any) -> own.OperatingPoint:
    fields: dict[str, Any] = {
        "open_probability": 0.97,
        "close_probability": 0.55,
        "open_hold_s": 2.5,
        "close_hold_s": 9.0,
        "min_track_s": 2.2,
        "false_alarms_per_hour": 0.05,
        "uncalibrated_for_target": False,
        "confidence": 0.95,
        "bound_per_hour": 0.04,
        "bound_per_track": 0.03,
        "bound_for_these_people": 0.01,
        "alarms": 0,
        "people": 80,
        "tracks": 500,
        "hours": 300.0,
        "effective_hours": 75.0,
        "footage_hours": 310.0,
        "files": 90,
        "recall": None,
        "manipulated_files": 0,
        "made_for": own.made(MODELS),
        "calibrated_from": "5" * 64,
        "settings": own.facts(Config()),
    }
    return own.OperatingPoint(**(fields | changes))


def settings(path: Path, **more: Any) -> Config:
    return Config.model_validate({"verdict": {"calibration": str(path)}, **more})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    own.write(tmp_path / "below" / "own.json", SHIPPED, point())
    return tmp_path / "below" / "own.json"


def test_what_is_written_is_read(path: Path) -> None:
    calibration, found = own.load(path)
    assert found == point()
    assert calibration.kind is CalibrationKind.OWN
    assert calibration.bound == FalseAlarms(0.04, 75.0, 80)
    assert (calibration.scales, calibration.tau, calibration.sigma) == (
        SHIPPED.scales,
        SHIPPED.tau,
        SHIPPED.sigma,
    )
    assert calibration.sha256 == own.write(path, SHIPPED, point())
    assert [item.name for item in path.parent.iterdir()] == ["own.json"]


def test_its_thresholds_are_the_settings(path: Path) -> None:
    verdict = own.in_force(settings(path)).verdict
    assert {name: getattr(verdict, name) for name in own.THRESHOLDS} == {
        name: getattr(point(), name) for name in own.THRESHOLDS
    }
    assert verdict.window_s == Config().verdict.window_s
    assert own.in_force(Config()) == Config()


def test_every_command_gets_them(path: Path, tmp_path: Path) -> None:
    found = load_settings(None, [f"verdict.calibration={path}", "verdict.open_probability=0.8"], {})
    assert found.verdict.open_probability == 0.97
    (tmp_path / "printed.yaml").write_text(to_yaml(found))
    assert load_settings(tmp_path / "printed.yaml", [], {}) == found
    assert load_settings(tmp_path / "printed.yaml", ["verdict.calibration="], {}).verdict.calibration == ""


def test_it_holds_for_the_members_it_was_made_with(path: Path) -> None:
    found = own.adopted(settings(path), SHIPPED, MODELS)
    assert (found.kind, found.bound) == (CalibrationKind.OWN, FalseAlarms(0.04, 75.0, 80))
    assert own.adopted(Config(), SHIPPED, MODELS) is SHIPPED


@pytest.mark.parametrize(
    "models",
    [MODELS[:1], (*MODELS, Model("c", "1", "c" * 64)), (MODELS[0], replace(MODELS[1], sha256="d" * 64))],
)
def test_other_members_are_refused_by_name(path: Path, models: tuple[Model, ...]) -> None:
    with pytest.raises(UnmaskError, match=r"was made with a 1 \(aaaaaaaaaaaa\) and b 2 \(b+\), and") as error:
        own.adopted(settings(path), SHIPPED, models)
    assert error.value.code is Code.CONFIG
    assert "run unmask calibrate again" in str(error.value)
    assert models[-1].sha256[:12] in str(error.value)


def test_members_that_were_calibrated_anew_are_refused(path: Path) -> None:
    with pytest.raises(UnmaskError, match="calibrated or fused differently"):
        own.adopted(settings(path), replace(SHIPPED, sha256="6" * 64), MODELS)


def test_under_other_settings_thresholds_hold_and_the_bound_does_not(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = settings(path, quality={"min_sharpness": 1.0}, faces={"max_faces": 3})
    with caplog.at_level(logging.WARNING):
        found = own.adopted(changed, SHIPPED, MODELS)
    assert (found.kind, found.bound) == (CalibrationKind.OWN, None)
    was = Config()
    assert f"faces.max_faces (was {was.faces.max_faces}), " in caplog.text
    assert f"quality.min_sharpness (was {was.quality.min_sharpness})" in caplog.text


def test_its_own_thresholds_are_no_other_settings(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert own.adopted(own.in_force(settings(path)), SHIPPED, MODELS).bound is not None
    assert caplog.text == ""


def test_a_reader_is_built_with_it(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    made_for = own.made(marker.PROVENANCE.models)
    sha256 = own.write(
        path, marker.CALIBRATION, point(made_for=made_for, calibrated_from=marker.CALIBRATION.sha256)
    )
    built = build_reader(settings(path, members={"names": ("marker",)}))
    assert built.calibration.kind is CalibrationKind.OWN
    assert built.provenance.calibration == "own"
    assert sha256.startswith(built.provenance.calibration_version)
    assert len(built.provenance.calibration_version) >= 12
    own.write(path, marker.CALIBRATION, point())
    with pytest.raises(UnmaskError, match=r"watching is done with marker 1 \(000000000000\)"):
        build_reader(settings(path, members={"names": ("marker",)}))


def changed(path: Path, field: str, value: object) -> None:
    record = json.loads(path.read_text())
    record["operating_point"][field] = value
    path.write_text(json.dumps(record))


def test_who_changes_a_threshold_by_hand_loses_the_claim(path: Path) -> None:
    changed(path, "open_probability", 0.5)
    with pytest.raises(UnmaskError, match="was changed after it was written"):
        own.load(path)


@pytest.mark.parametrize(
    ("field", "value"), [("open_probability", 1.5), ("people", "many"), ("bound_per_hour", None), ("more", 1)]
)
def test_what_cannot_be_is_named(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "own.json"
    own.write(path, SHIPPED, point())
    changed(path, field, value)
    record = json.loads(path.read_text())
    record.pop(own.SEAL)
    path.write_text(json.dumps({**record, own.SEAL: own._seal(record)}))
    with pytest.raises(UnmaskError, match=rf"own.json cannot be used: operating_point\.{field}: "):
        own.load(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "is no calibration that unmask calibrate wrote"),
        (b'{"schema": 1, "kind": "shipped"}', "is no calibration that unmask calibrate wrote"),
    ],
)
def test_what_is_no_calibration_is_one_sentence(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "own.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnmaskError, match=f"verdict.calibration .*own.json {sentence}") as error:
        load_settings(None, [f"verdict.calibration={path}"], {})
    assert error.value.code is Code.CONFIG


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnmaskError, match="cannot be written"):
        own.write(tmp_path / "file" / "own.json", SHIPPED, point())
