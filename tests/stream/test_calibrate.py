"""`unmask calibrate` on drawn faces: what is counted, claimed and written, and that it is used."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from detectors.calibration import Calibration
from detectors.readings import FaceReading, Image, Quality, Reason
from stream import calibrate, own
from stream.assemble import Assembly
from stream.calibrate import Asked, Calibrator, Watched, weigh
from stream.calibrate_report import reliability_of
from stream.cli import _repeated, app
from stream.config import Config
from stream.errors import Code, UnmaskError
from stream.footage import File
from stream.ladder import LOOSER, STRICTER
from stream.marker import CALIBRATION, PROVENANCE, MarkerReader, write_clip
from stream.poisson import upper_limit
from stream.replay import Outcome, Seen

RUNGS = LOOSER + 1 + STRICTER


class CountingReader(MarkerReader):
    """Counts the pictures it was shown; `calls` of them at a time."""

    def __init__(self) -> None:
        self.pictures = 0

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        self.pictures += len(frames)
        return super().read(frames)


class PoorReader(CountingReader):
    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        bad = Quality(0.0, {"face_px": 20.0}, (Reason.BLUR,))
        return [tuple(replace(face, quality=bad) for face in faces) for faces in super().read(frames)]


class Deep:
    """Stands for heavy members: counts what it is asked for."""

    def __init__(self) -> None:
        self.pictures = 0

    def deepen(self, image: Image, faces: Sequence[FaceReading]) -> tuple[FaceReading, ...]:
        self.pictures += 1
        return tuple(replace(face, logits=face.logits | {"deep": 9.0}) for face in faces)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> CountingReader:
    return using(monkeypatch, CountingReader())


def using(monkeypatch: pytest.MonkeyPatch, reader: CountingReader, **more: Any) -> CountingReader:
    built = Assembly(reader, more.get("calibration", CALIBRATION), PROVENANCE)
    monkeypatch.setattr(calibrate, "build_reader", lambda settings: built)
    return reader


def run(
    tmp_path: Path, asked: Asked, report: bool = False, **settings: Any
) -> tuple[int, str, dict[str, Any]]:
    out = io.StringIO()
    folder = tmp_path / "report" if report else None
    code = calibrate.run(
        Config(data_dir=str(tmp_path / "data"), **settings),
        asked,
        tmp_path / "own.json",
        folder,
        out,
    )
    return code, out.getvalue(), json.loads((tmp_path / "own.json").read_text())["operating_point"]


def people(folder: Path, **clips: dict[str, Any]) -> str:
    for name, clip in clips.items():
        (folder / name).mkdir(parents=True)
        write_clip(folder / name / "a.mp4", **clip)
    return str(folder)


# What is counted and claimed


def watched(
    person: str, hours: float, alarms: int = 0, tracks: int = 1, manipulated: bool = False
) -> Watched:
    file = File(Path(person), person, manipulated, person)
    outcome = Outcome(alarms, min(alarms, tracks), 0 if alarms else None, ())
    shown = Seen(hours * 3600, hours * 3600, hours * 3600, tracks)
    return Watched(file, shown, (outcome,) * RUNGS, {})


def test_hours_of_one_person_count_as_one_person() -> None:
    alone = weigh([watched("ann", 30), watched("ann", 70)])
    assert (alone.people, alone.hours, alone.effective_hours) == (1, 100, 1)
    many = weigh([watched(str(person), 1) for person in range(100)])
    assert (many.people, many.hours, many.effective_hours) == (100, 100, 100)
    mixed = weigh([watched("ann", 10), watched("bob", 0.25), watched("bob", 0.25), watched("eve", 0.1)])
    assert (mixed.people, mixed.effective_hours) == (3, pytest.approx(1.6))


def test_alarms_weigh_as_their_hours_do() -> None:
    found = weigh([watched("ann", 10, alarms=5, tracks=20), watched("bob", 0.5, alarms=1)])
    assert found.alarms == (6,) * RUNGS
    assert found.weighted == pytest.approx((1.5,) * RUNGS)
    assert found.accused == pytest.approx((5 / 20 + 1,) * RUNGS)


def test_nobody_to_judge_is_no_hour() -> None:
    found = weigh([watched("ann", 1), watched("bob", 0)])
    assert (found.people, found.files, found.footage_hours) == (1, 1, 1)


def test_people_weigh_the_same_in_what_was_found() -> None:
    found = weigh(
        [
            watched("ann", 1),
            *(watched("x", 1, alarms=1, manipulated=True) for _ in range(9)),
            watched("y", 1, manipulated=True),
        ]
    )
    assert found.recall == (0.5,) * RUNGS
    assert (found.manipulated_people, found.manipulated_files) == (2, 10)


@pytest.mark.parametrize(
    ("hours", "alarms", "bound"), [(60, 0, 2.9957 / 60), (100, 0, 2.9957 / 100), (100, 1, 4.7439 / 100)]
)
def test_the_claim_is_the_limit_of_a_poisson_rate(hours: int, alarms: int, bound: float) -> None:
    footage = [watched(str(person), 1, alarms=alarms * (person == 0)) for person in range(hours)]
    assembly = Assembly(MarkerReader(), CALIBRATION, PROVENANCE)
    point = calibrate.calibrated(Config(), assembly, footage, 0.05).point
    assert point.bound_per_hour == pytest.approx(bound, rel=1e-4)
    assert point.bound_per_track == pytest.approx(bound, rel=1e-4)
    assert point.uncalibrated_for_target is (bound > 0.05)


def test_reliability_weighs_classes_and_people_alike() -> None:
    def said(person: str, manipulated: bool, *probabilities: float) -> Watched:
        item = watched(person, 1, manipulated=manipulated)
        return replace(item, outcomes=(replace(item.outcomes[0], probabilities=probabilities),) * RUNGS)

    found = reliability_of(
        [said("ann", False, 0.05), said("bob", False, *[0.95] * 50), said("x", True, 0.95, 0.95)]
    )
    assert found is not None
    low, high = found["bins"]
    assert (low["manipulated"], low["weight"]) == (0.0, pytest.approx(0.25))
    assert (high["manipulated"], high["weight"]) == (pytest.approx(2 / 3), pytest.approx(0.75))
    assert found["gap"] == pytest.approx(0.25 * 0.05 + 0.75 * (0.95 - 2 / 3))
    assert reliability_of([said("ann", False, 0.1)]) is None


def test_with_people_enough_drift_is_measured_against_the_footage() -> None:
    def showing(person: int, looks: int) -> Watched:
        values = [person / 10] * looks
        return replace(watched(str(person), 1), parts={"score": values, "sharpness": values})

    assert calibrate.reference([showing(person, 10) for person in range(29)]) == {}
    found = calibrate.reference([showing(person, 10) for person in range(29)] + [showing(29, 100_000)])
    assert set(found) == {"score", "sharpness"}
    assert found["score"].shares[0] < 0.5  # one person for days is not half of all
    assert max(found["score"].edges) > 2


# Reading


def test_faces_are_read_once(tmp_path: Path, reader: CountingReader) -> None:
    asked = Asked((people(tmp_path / "a", ann={"seconds": 4}),), (), None, 0.05)
    code, told, first = run(tmp_path, asked)
    assert code == 0
    assert reader.pictures == 8
    _, again, second = run(tmp_path, replace(asked, target=1000.0))
    assert reader.pictures == 8
    assert "(read before)" in again
    assert "(read before)" not in told
    assert (first["uncalibrated_for_target"], second["hours"]) == (True, first["hours"])
    run(tmp_path, asked, quality={"min_sharpness": 1.0})
    assert reader.pictures == 16


def test_an_interrupted_run_goes_on(
    tmp_path: Path, reader: CountingReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked((people(tmp_path / "a", ann={"seconds": 4}, bob={"seconds": 5}),), (), None, 0.05)
    read = MarkerReader.read

    def stopped(self: MarkerReader, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        if reader.pictures > 10:
            raise KeyboardInterrupt
        return read(self, frames)

    monkeypatch.setattr(MarkerReader, "read", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, asked)
    monkeypatch.setattr(MarkerReader, "read", read)
    reader.pictures = 0
    assert run(tmp_path, asked)[2]["people"] == 2
    assert reader.pictures == 10


def test_a_full_disk_costs_no_calibration(
    tmp_path: Path, reader: CountingReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, digest: str, looks: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stream.kept.Kept.save", full)
    folder = people(tmp_path / "a", ann={"seconds": 4})
    assert run(tmp_path, Asked((folder,), (), None, 0.05))[0] == 0
    assert "could not be kept: No space left on device" in caplog.text


def test_what_looks_wrong_is_read_as_often_as_live_and_deeply(tmp_path: Path) -> None:
    reader, deep = CountingReader(), Deep()
    assembly = Assembly(reader, CALIBRATION, PROVENANCE, heavy=deep)
    calibrator = Calibrator(Config(), assembly, tmp_path / "kept")
    path = write_clip(tmp_path / "a.mp4", 10, planted=[(2, 10)])
    item, known = calibrator.watch(File(path, "ann", False, "0"))
    assert not known
    assert reader.pictures > 35  # 20 if nothing had looked wrong
    assert 15 < deep.pictures < reader.pictures
    assert item.outcomes[LOOSER].alarms == 1
    assert calibrator.watch(File(path, "ann", False, "0")) == (item, True)


# Choosing


def test_an_alarm_on_authentic_footage_makes_it_stricter(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(
        tmp_path / "a", ann={"seconds": 14, "planted": [(4, 9)]}, bob={"seconds": 8}, eve={"seconds": 7}
    )
    _, told, point = run(tmp_path, Asked((folder,), (), None, 0.05), report=True)
    before = Config().verdict
    assert point["alarms"] == 0
    assert point["open_hold_s"] > before.open_hold_s
    assert point["open_probability"] > before.open_probability
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["rungs"][LOOSER]["alarms"] == 1
    assert [row["chosen"] for row in report["rungs"]].count(True) == 1
    assert "NOT calibrated for 0.05: this footage supports at most" in told


def test_footage_enough_for_a_modest_target_is_calibrated(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(tmp_path / "a", ann={"seconds": 8}, bob={"seconds": 9})
    code, told, point = run(tmp_path, Asked((folder,), (), None, 1000.0))
    assert (code, point["uncalibrated_for_target"], point["people"]) == (0, False, 2)
    assert point["bound_per_hour"] == pytest.approx(upper_limit(0) / point["effective_hours"])
    assert point["bound_per_hour"] == pytest.approx(2.9957 * 3600 / 16, rel=0.02)
    assert {name: point[name] for name in own.THRESHOLDS} == {
        name: getattr(Config().verdict, name) for name in own.THRESHOLDS
    }
    assert "calibrated for 1000 false alarms an hour: at most" in told


def test_manipulated_footage_shows_what_is_found(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(tmp_path / "a", ann={"seconds": 8})
    found = str(write_clip(tmp_path / "x.mp4", 9, planted=[(0, 9)]))
    missed = str(write_clip(tmp_path / "y.mp4", 5))
    _, told, point = run(tmp_path, Asked((folder,), (found, missed), None, 0.05), report=True)
    assert (point["recall"], point["manipulated_files"]) == (0.5, 2)
    assert "found 50% of 2 manipulated videos" in told
    names = {item.name for item in (tmp_path / "report").iterdir()}
    assert names == {"report.md", "report.json", "operating_point.png", "reliability.png"}
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["reliability"]["records"] > 0
    assert [video["manipulated"] for video in report["videos"]] == [False, True, True]


def test_a_list_of_people_joins_folders(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(tmp_path / "a", ann={"seconds": 5}, bob={"seconds": 6})
    named = tmp_path / "people.csv"
    with named.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "person"), ("a/ann", "Ann"), ("a/bob", "Ann")])
    assert run(tmp_path, Asked((folder,), (), named, 0.05))[2]["people"] == 1


# What does not count


def test_nothing_is_left_out_in_silence(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(tmp_path / "a", ann={"seconds": 5}, bob={"seconds": 4, "absent": [(0, 4)]})
    (tmp_path / "a" / "broken.mp4").write_bytes(bytes(500))
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "copy.mp4").write_bytes((tmp_path / "a" / "ann" / "a.mp4").read_bytes())
    code, told, point = run(tmp_path, Asked((folder,), (), None, 0.05), report=True)
    assert code == 1
    assert point["people"] == 1
    assert "broken.mp4: cannot be opened as video" in told
    assert "bob/a.mp4" in told.split("no face in it that could be judged: ")[1]
    assert "counted once, it is there already: " in told
    assert "1 files with other endings passed over" in told
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["left_out"]) == 4


def test_footage_without_faces_is_an_error(tmp_path: Path, reader: CountingReader) -> None:
    folder = people(tmp_path / "a", ann={"seconds": 4, "absent": [(0, 4)]})
    with pytest.raises(UnmaskError, match="no face was found in 1 authentic videos") as error:
        run(tmp_path, Asked((folder,), (), None, 0.05))
    assert error.value.code is Code.SOURCE_INVALID
    assert not (tmp_path / "own.json").exists()


def test_faces_that_cannot_be_judged_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    using(monkeypatch, PoorReader())
    folder = people(tmp_path / "a", ann={"seconds": 4})
    with pytest.raises(UnmaskError, match=r"was good enough to be judged \(BLUR 8 times\)"):
        run(tmp_path, Asked((folder,), (), None, 0.05))


def test_nothing_readable_is_an_error(tmp_path: Path, reader: CountingReader) -> None:
    (tmp_path / "a.mp4").write_bytes(bytes(500))
    with pytest.raises(UnmaskError, match="none of the authentic videos could be read"):
        run(tmp_path, Asked((str(tmp_path / "a.mp4"),), (), None, 0.05))


def test_members_without_calibration_have_no_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    using(monkeypatch, CountingReader(), calibration=Calibration.identity())
    folder = people(tmp_path / "a", ann={"seconds": 1})
    with pytest.raises(UnmaskError, match="members marker have no calibration together"):
        run(tmp_path, Asked((folder,), (), None, 0.05))


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_a_target_that_is_none_is_refused(tmp_path: Path, target: float) -> None:
    with pytest.raises(UnmaskError, match=r"--false-alarms-per-hour is .*; it must be a number above 0"):
        run(tmp_path, Asked(("a",), (), None, target))


# The command


def test_several_paths_may_follow_an_option() -> None:
    options = ("--authentic", "--manipulated")
    given = ["--authentic", "a", "b", "--out", "o", "--manipulated=x", "y", "--set", "k=v"]
    assert _repeated(given, options) == [
        *("--authentic", "a", "--authentic", "b", "--out", "o"),
        *("--manipulated=x", "--manipulated", "y", "--set", "k=v"),
    ]


def test_from_footage_to_alert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: calibrate, watch with the file, and the alert says by what it was opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNMASK_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("UNMASK_MEMBERS__NAMES", "[marker]")
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr("stream.redact.install_logging", lambda level: None)
    people(tmp_path / "a", ann={"seconds": 5}, bob={"seconds": 6})
    fake = str(write_clip(tmp_path / "x.mp4", 12, planted=[(2, 12)]))
    done = CliRunner().invoke(
        app, ["calibrate", "--authentic", "a/ann", "a/bob/a.mp4", "--manipulated", fake, "--out", "own.json"]
    )
    assert done.exit_code == 0, done.stderr
    record = json.loads(Path("own.json").read_text())
    assert (record["kind"], record["operating_point"]["people"]) == ("own", 2)
    sha256 = own.load(Path("own.json"))[0].sha256
    assert sha256 in done.stdout

    shown = CliRunner().invoke(app, ["watch", fake, "--json", "--set", "verdict.calibration=own.json"])
    assert shown.exit_code == 0, shown.stderr
    opened = next(
        event for event in map(json.loads, shown.stdout.splitlines()) if event["type"].endswith("opened.v1")
    )
    assert opened["data"]["calibration"] == "own"
    assert opened["data"]["false_alarms"]["people"] == 2
    assert sha256.startswith(opened["data"]["calibration_version"])

    refused = CliRunner().invoke(app, ["calibrate", "--authentic", "rtmp://me:hunter2@host/live"])
    assert refused.exit_code == 2
    assert "is a live source" in refused.stderr
    assert "hunter2" not in refused.stderr
