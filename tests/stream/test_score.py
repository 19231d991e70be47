"""Files in, one judgement each out: with a reader that knows the truth, so only our own logic is tested."""

import io
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detectors.calibration import Calibration, CalibrationKind, Scale
from detectors.cues import Cue, missing
from detectors.late import MOST, Late, Weighed
from detectors.readings import Box, FaceReading, Image, Quality, Reason
from stream import score
from stream.alerts import Model, Provenance
from stream.config import Config
from stream.errors import UnmaskError
from stream.marker import GREEN, RED, MarkerReader, draw, write_clip
from stream.score import Scorer, expand, lines, read_picture, reduced

CALIBRATION = Calibration(CalibrationKind.SHIPPED, (Scale(1, 1.0, 0.0),), tau=2.0, sigma=2.0)
PROVENANCE = Provenance((Model("marker", "1", "0" * 64),), ("squares",), (), "shipped", "0" * 12, 0.5)


class CropReader(MarkerReader):
    """Remembers the sizes of its batches of crops."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def read_crops(self, crops: Sequence[Image]) -> list[FaceReading]:
        self.batches.append(len(crops))
        return super().read_crops(crops)


class PoorReader(CropReader):
    """Finds the same faces, none of them good enough to decide on."""

    def read(self, frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        bad = Quality(0.0, {"face_px": 20.0}, (Reason.BLUR,))
        return [tuple(replace(face, quality=bad) for face in faces) for faces in super().read(frames)]


def save(path: Path, picture: Image) -> Path:
    assert cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    return path


@pytest.fixture
def scorer(tmp_path: Path) -> Scorer:
    return make(tmp_path, CropReader())


def make(tmp_path: Path, reader: CropReader, **settings: Any) -> Scorer:
    return Scorer(Config(**settings), reader, CALIBRATION, PROVENANCE, tmp_path / "scratch")


def one(scorer: Scorer, path: Path, crops: bool = False) -> dict[str, Any]:
    (result,) = scorer.score([path], crops)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    return result


def test_a_picture_of_a_manipulated_face(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, save(tmp_path / "a.png", draw(0, RED)))
    assert result["verdict"] == "manipulated"
    assert result["probability"] == pytest.approx(CALIBRATION.probability(6.0))
    low, high = result["interval"]
    assert 0.5 < low < result["probability"] < high < 1
    assert result["members"] == {"marker": 6.0}
    assert result["reasons"] == []
    (track,) = result["tracks"]
    assert (track["verdict"], track["samples"], track["box"]) == (
        "manipulated",
        1,
        [128.0, 58.0, 192.0, 122.0],
    )


def test_a_picture_of_an_authentic_face(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, save(tmp_path / "a.png", draw(0, GREEN)))
    assert (result["verdict"], result["reasons"]) == ("authentic", [])
    assert result["interval"][1] < 0.5


def test_without_a_face_there_is_no_probability(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, save(tmp_path / "a.png", draw(0, None)))
    assert (result["verdict"], result["reasons"]) == ("inconclusive", ["NO_FACE"])
    assert result["probability"] is None
    assert result["interval"] is None
    assert result["tracks"] == []


@pytest.mark.parametrize("name", ["a.png", "a.mp4"])
def test_a_face_too_bad_to_decide_on_keeps_its_probability(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".png":
        save(path, draw(0, RED))
    else:
        write_clip(path, 4, planted=[(0, 4)])
    result = one(make(tmp_path, PoorReader()), path)
    assert (result["verdict"], result["reasons"]) == ("inconclusive", ["BLUR"])
    assert result["probability"] > 0.9


def test_an_undecided_score_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stream.marker.SURE", 1.0)
    result = one(make(tmp_path, CropReader()), save(tmp_path / "a.png", draw(0, RED)))
    assert (result["verdict"], result["reasons"]) == ("inconclusive", ["AMBIGUOUS"])
    assert 0.5 < result["probability"] < 0.9


def test_a_video_with_a_manipulated_stretch(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, write_clip(tmp_path / "a.mp4", 14, planted=[(5, 14)], absent=[(2, 5)]))
    assert result["verdict"] == "manipulated"
    first, second = result["tracks"]
    assert (first["first_s"], first["samples"], first["reasons"]) == (0.0, 4, ["SHORT_TRACK"])
    assert first["probability"] < 0.5
    assert (second["verdict"], second["samples"]) == ("manipulated", 18)
    assert (second["first_s"], second["last_s"]) == (
        pytest.approx(5.0, abs=0.04),
        pytest.approx(13.5, abs=0.04),
    )


def test_an_authentic_video(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, write_clip(tmp_path / "a.mp4", 6))
    assert result["verdict"] == "authentic"
    assert len(result["tracks"]) == 1


def test_a_stretch_that_the_whole_track_would_dilute_is_still_an_incident(
    scorer: Scorer, tmp_path: Path
) -> None:
    result = one(scorer, write_clip(tmp_path / "a.mp4", 60, planted=[(40, 60)]))
    assert result["tracks"][0]["verdict"] != "manipulated"
    assert result["verdict"] == "manipulated"
    assert result["reasons"] == []


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jpg", None, "cannot be read: No such file or directory"),
        ("none.mp4", None, "cannot be read: No such file or directory"),
        ("empty.jpg", b"", "is not a picture that can be decoded"),
        ("noise.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "is not a picture that can be decoded"),
        ("empty.mp4", b"", "cannot be opened as video: "),
        ("noise.mp4", bytes(5000), "cannot be opened as video: "),
        ("no-ending", b"words", "cannot be opened as video: "),
    ],
)
def test_files_that_cannot_be_read_are_named(
    scorer: Scorer, tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = one(scorer, path)
    assert set(result) == {"path", "error"}
    assert result["error"].startswith(sentence)
    assert lines(result) == [f"{path}: not scored: {result['error']}"]


def test_a_damaged_video_is_judged_by_what_can_be_decoded(scorer: Scorer, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.ts", 8, planted=[(0, 8)], gop=25)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = np.random.default_rng(3).bytes(400)
    path.write_bytes(data)
    result = one(scorer, path)
    assert result["verdict"] == "manipulated"
    assert 8 <= sum(track["samples"] for track in result["tracks"]) <= 16


def test_thousands_of_crops_are_read_in_batches_and_in_order(tmp_path: Path) -> None:
    reader = CropReader()
    red, green = tmp_path / "red.png", tmp_path / "green.png"
    save(red, np.full((20, 20, 3), RED, np.uint8))
    save(green, np.full((20, 20, 3), GREEN, np.uint8))
    paths = [red if index % 3 == 0 else green for index in range(1000)]
    paths[500] = tmp_path / "none.png"
    results = list(make(tmp_path, reader).score(paths, crops=True))
    assert [result["path"] for result in results] == [str(path) for path in paths]
    assert "error" in results[500]
    verdicts = [result.get("verdict") for result in results]
    assert all(
        (verdict == "manipulated") == (path == red) for verdict, path in zip(verdicts, paths, strict=True)
    )
    assert max(reader.batches) == Config().engines.batch
    assert len(reader.batches) == -(-1000 // Config().engines.batch)


def test_reading_does_not_run_far_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    lock = threading.Lock()

    def counted(path: Path) -> Image | str:
        nonlocal begun
        with lock:
            begun += 1
        return read_picture(path)

    monkeypatch.setattr(score, "read_picture", counted)
    path = save(tmp_path / "a.png", draw(0, GREEN))
    results = make(tmp_path, CropReader(), engines={"batch": 4}).score((path for _ in range(500)), crops=True)
    next(results)
    assert begun <= 16
    results.close()  # type: ignore[attr-defined]


def test_the_name_of_a_video_given_as_crop_is_an_error(scorer: Scorer, tmp_path: Path) -> None:
    result = one(scorer, write_clip(tmp_path / "a.mp4", 1), crops=True)
    assert result["error"] == "is not a picture that can be decoded"


def test_folders_are_searched_in_order_of_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    below = tmp_path / "b" / "c"
    below.mkdir(parents=True)
    for name in ("z.JPG", "b/c/y.mp4", "a.txt", "b/x.png"):
        (tmp_path / name).touch()
    named = tmp_path / "a.txt"
    assert expand([named, tmp_path], crops=False) == [
        named,
        below.parent / "c/y.mp4",
        tmp_path / "b/x.png",
        tmp_path / "z.JPG",
    ]
    assert "1 files in" in caplog.text
    assert expand([tmp_path], crops=True) == [tmp_path / "b/x.png", tmp_path / "z.JPG"]
    with pytest.raises(UnmaskError, match="holds no file ending in"):
        expand([below], crops=True)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    from PIL import Image as Pillow

    exif = Pillow.Exif()
    exif[0x0112] = 6
    Pillow.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    picture = read_picture(tmp_path / "a.jpg")
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (40, 20, 3)


def test_reduced_keeps_the_shape_of_a_picture() -> None:
    assert reduced(np.zeros((1000, 2000, 3), np.uint8), 640).shape == (320, 640, 3)
    assert reduced(np.zeros((1, 5000, 3), np.uint8), 640).shape == (1, 640, 3)
    small = np.zeros((100, 200, 3), np.uint8)
    assert reduced(small, 640) is small


def test_lines_for_a_person(scorer: Scorer, tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", draw(0, RED))
    assert lines(one(scorer, path)) == [
        f"{path}: manipulated probability 1.00 (0.79 to 1.00)",
        "  face 0, seen once: manipulated probability 1.00 (0.79 to 1.00)",
    ]
    clip = write_clip(tmp_path / "a.mp4", 6)
    assert lines(one(scorer, clip))[1].startswith(
        "  face 0, 0.0 s to 5.5 s, 12 readings: authentic probability 0.00"
    )


def test_several_members_and_shadows_are_shown(scorer: Scorer, tmp_path: Path) -> None:
    def read(frames: Sequence[tuple[Image, Image]]) -> list[tuple[FaceReading, ...]]:
        (found,) = MarkerReader().read(frames)
        return [tuple(replace(face, logits={"a": 6.0, "b": 5.5}, shadow={"s": -1.0}) for face in found)]

    scorer._reader.read = read  # type: ignore[method-assign]
    path = save(tmp_path / "a.png", draw(0, RED))
    found = one(scorer, path)
    assert found["members"] == {"a": 6.0, "b": 5.5}
    assert found["tracks"][0]["shadow"] == {"s": -1.0}
    assert lines(found)[-1] == "    logits: a +6.00, b +5.50, s -1.00 (shadow)"


@pytest.mark.parametrize(
    ("as_json", "missing", "code"), [(True, False, 0), (True, True, 1), (False, True, 1)]
)
def test_run_writes_a_line_per_file_and_returns_the_code(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool, missing: bool, code: int
) -> None:
    monkeypatch.setattr(score, "assembled", lambda settings, scratch, tell_cues: scorer)
    paths = [save(tmp_path / "a.png", draw(0, RED)), *([tmp_path / "none.png"] if missing else [])]
    out = io.StringIO()
    assert score.run(Config(), paths, False, as_json, out) == code
    if as_json:
        written = [json.loads(line) for line in out.getvalue().splitlines()]
        assert [result["path"] for result in written] == [str(path) for path in paths]
    else:
        assert "not scored" in out.getvalue()


FINDS = Late((Weighed("benford", 1.0, 0.0, 1.0, MOST, {"gain": 0.01}),))


def cued(tmp_path: Path, late: Late) -> Scorer:
    """A scorer whose still cue says 1 of large faces."""

    def read(picture: Image, box: Box) -> Cue:
        return Cue("benford", 0.5) if picture.size > 1000 else missing("benford", "the face is too small")

    return Scorer(
        Config(), CropReader(), CALIBRATION, PROVENANCE, tmp_path / "scratch", still_cue=read, late=late
    )


def test_a_still_says_the_cue_or_why_there_is_none(tmp_path: Path) -> None:
    found = save(tmp_path / "red.png", draw(0, RED))
    empty = save(tmp_path / "empty.png", draw(0, None))
    small = save(tmp_path / "small.png", draw(0, RED)[:8, :8])
    first, second = cued(tmp_path, Late()).score([found, empty], crops=False)
    assert first["tracks"][0]["cues"] == first["cues"] == {"benford": {"value": 0.5}}
    assert second["cues"] == {"benford": {"reason": "no face was found"}}
    assert "    cue benford: +0.50" in lines(first)
    (crop,) = cued(tmp_path, Late()).score([small], crops=True)
    assert crop["tracks"][0]["cues"] == {"benford": {"reason": "the face is too small"}}


def test_a_cue_with_a_say_shifts_a_still(tmp_path: Path) -> None:
    path = save(tmp_path / "red.png", draw(0, RED))
    (plain,) = make(tmp_path, CropReader()).score([path], crops=False)
    (told,) = cued(tmp_path, Late()).score([path], crops=False)
    (moved,) = cued(tmp_path, FINDS).score([path], crops=False)
    assert "cues" not in plain
    assert told["probability"] == plain["probability"] < moved["probability"]
    assert moved["cues"] == {"benford": {"value": 0.5, "shift": 0.5}}
    assert "    cue benford: +0.50 (adds +0.50 to the log odds)" in lines(moved)


def test_a_video_says_that_the_cue_is_for_stills(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_clip(clip, 6.0)
    (plain,) = make(tmp_path, CropReader()).score([clip], crops=False)
    (told,) = cued(tmp_path, FINDS).score([clip], crops=False)
    reason = "for stills only: a video codec has rewritten the coefficients"
    assert told["cues"]["benford"] == told["tracks"][0]["cues"]["benford"] == {"reason": reason, "shift": 0.0}
    assert (told["verdict"], told["probability"]) == (plain["verdict"], plain["probability"])
