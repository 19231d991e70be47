"""The shipped limits of the quality gate are whole, and a file that is not is refused by name."""

import json
from pathlib import Path

import pytest

from detectors.limits import FILE, MEASURED, LimitsError, QualityLimits, read_limits


def test_the_shipped_limits_are_the_defaults() -> None:
    limits = QualityLimits()
    assert read_limits() == {name: getattr(limits, name) for name in MEASURED}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"schema": 9}, "schema 9, expected 1"),
        ({"limits": {"min_face_px": {"limit": 3}}}, "expected"),
        ({"limits": {name: {"limit": -1} for name in MEASURED}}, "expected 0 or more"),
        ({"limits": {name: {"limit": "much"} for name in MEASURED}}, "ValueError"),
        ({"limits": 7}, "AttributeError"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, change: dict[str, object], sentence: str) -> None:
    path = tmp_path / "limits.json"
    path.write_text(json.dumps({**json.loads(FILE.read_text()), **change}))
    with pytest.raises(LimitsError, match=sentence) as refused:
        read_limits(path)
    assert str(path) in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitsError, match="FileNotFoundError"):
        read_limits(tmp_path / "none.json")
