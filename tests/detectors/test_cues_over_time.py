"""The cues that a burst at full rate feeds, on series made up for the purpose."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from detectors.cues.blink import blinks
from detectors.cues.burst import BLINK, EYES, LIPS, MOTION, NOT_YET, RATIOS, BurstCues, Tally
from detectors.cues.eyes import NAMES as EYE_FEATURES
from detectors.cues.eyes import features
from detectors.cues.follow import Follower
from detectors.cues.landmarks import (
    LandmarkModel,
    LandmarksError,
    Mesh,
    Region,
    gaze,
    mouth,
    normalised,
    openness,
    region_of,
    why_no_landmarks,
)
from detectors.cues.lips import agreement
from detectors.cues.motion import INPUTS, WINDOW, MotionModel, MotionNet, windows
from detectors.cues.ratios import NAMES as RATIO_NAMES
from detectors.cues.ratios import Regression, ratios
from detectors.cues.series import FaceLook, FaceSeries, SoundSeries, look_of
from detectors.cues.svm import Svm
from detectors.cues.voice import RATE_HZ, SILENCE_DB, VoiceActivity, silero, why_no_voice
from detectors.cues.voice import WINDOW as SAMPLES
from detectors.readings import Detection

FPS = 25


def clock(seconds: float, fps: int = FPS) -> NDArray[np.float64]:
    return np.arange(round(seconds * fps)) / fps


def eyes_open(
    times: NDArray[np.float64], *closed: tuple[float, float], usual: float = 0.25
) -> NDArray[np.float64]:
    """Openness of both eyes; shut within each (begin, end)."""
    one = np.full(len(times), usual)
    for begin, end in closed:
        one[(times >= begin - 1e-9) & (times < end - 1e-9)] = 0.05
    return np.stack([one, one], axis=1)


def series_of(
    seconds: float = 4.0, fps: int = FPS, closed: tuple[tuple[float, float], ...] = (), points: bool = False
) -> FaceSeries:
    series, times = FaceSeries(), clock(seconds, fps)
    open_eyes = eyes_open(times, *closed)
    for at, pair in zip(times, open_eyes, strict=True):
        gap = 0.1 + 0.1 * np.sin(12 * at)
        numbers = np.array([*pair, 0.01 * np.sin(at), 0, 0.01 * np.sin(at), 0, gap], np.float32)
        shape = np.full((68, 2), np.sin(at), np.float32) if points else None
        assert series.add(round(at * 1e6), FaceLook(numbers, shape))
    return series


def test_a_blink_is_found_with_its_length_and_a_wink_is_none() -> None:
    times = clock(4)
    open_eyes = eyes_open(times, (1.0, 1.2), (3.0, 3.12))
    found = blinks(times, open_eyes)
    assert found is not None
    assert found.lengths == pytest.approx((0.2, 0.12))
    assert found.seconds == pytest.approx(3.96)
    open_eyes[:, 1] = 0.25
    wink = blinks(times, open_eyes)
    assert wink is not None
    assert wink.lengths == ()


def test_closed_eyes_and_cut_off_blinks_are_no_blinks() -> None:
    times = clock(4)
    for closed in ((0.0, 0.2), (1.0, 2.0), (3.8, 4.0)):
        found = blinks(times, eyes_open(times, closed))
        assert found is not None
        assert found.lengths == (), closed
    assert blinks(times, eyes_open(times, usual=0.05)) is None
    assert blinks(times[:1], eyes_open(times[:1])) is None


def test_eye_features_tell_saccades_vergence_and_blinks() -> None:
    times = clock(4)
    numbers = np.zeros((len(times), 7))
    numbers[:, :2] = eyes_open(times, (2.0, 2.2))
    numbers[times >= 1, 2] = numbers[times >= 1, 4] = 0.1  # both eyes jump once
    found = blinks(times, numbers[:, :2])
    assert found is not None
    described = features(times, numbers, found)
    assert described is not None
    named = dict(zip(EYE_FEATURES, described, strict=True))
    assert named["vergence"] == pytest.approx(1)
    assert named["saccades"] == pytest.approx(1 / 3.6, rel=0.1)
    assert named["blink_rate"] == pytest.approx(1 / 3.96)
    assert named["blink_length"] == pytest.approx(0.2)
    numbers[times >= 1, 4] = -0.1  # each its own way
    apart = features(times, numbers, found)
    assert apart is not None
    assert apart[1] == pytest.approx(-1)
    assert features(times[:20], numbers[:20], found) is None


def speech(times: NDArray[np.float64], late: float = 0.0) -> NDArray[np.float64]:
    return np.clip(
        np.sin(2 * np.pi * 1.7 * (times - late)) + np.sin(2 * np.pi * 0.6 * (times - late)), 0, None
    )


def test_lips_that_follow_the_voice_agree_and_others_do_not() -> None:
    times, heard = clock(4), np.arange(125) * 0.032
    voice, level = np.ones(125), -60 + 30 * speech(heard)
    own = agreement(times, 0.1 * speech(times, late=0.12), heard, voice, level)
    assert isinstance(own, float)
    assert own > 0.8
    other = agreement(times, 0.1 * speech(5.3 - 1.31 * times), heard, voice, level)
    assert isinstance(other, float)
    assert other < 0.5
    assert agreement(times, np.full(len(times), 0.02), heard, voice, level) == 0.0


def test_lips_say_why_there_is_no_number() -> None:
    times, heard = clock(4), np.arange(125) * 0.032
    gap, level = speech(times), np.full(125, -30.0)
    assert "no voice" in str(agreement(times, gap, heard, np.zeros(125), level))
    assert "no audio" in str(agreement(times, gap, heard[:0], level[:0], level[:0]))
    assert "overlap" in str(agreement(times, gap, heard + 3.5, np.ones(125), level))


def test_a_series_survives_being_written_down() -> None:
    series = series_of(points=True)
    again = FaceSeries.restored(json.loads(json.dumps(series.state())))
    assert again.state() == series.state()
    np.testing.assert_array_equal(again.numbers, series.numbers)
    np.testing.assert_array_equal(again.points, series.points)
    sound = SoundSeries()
    assert sound.add(0, 0.7, -31.25)
    assert not sound.add(0, 0.7, -31.25)
    assert SoundSeries.restored(json.loads(json.dumps(sound.state()))).state() == sound.state()
    assert sound.voice[0] == pytest.approx(0.7, abs=1e-3)


def test_a_series_takes_no_more_than_it_holds_and_no_time_twice() -> None:
    series = series_of(12.0)
    look = FaceLook(np.zeros(7, np.float32), None)
    assert not series.add(series.times[-1], look)
    assert not series.add(series.times[-1] + 1, look)
    assert len(series.times) == 300
    odd = FaceSeries()
    assert odd.add(0, FaceLook(np.array([np.nan, np.inf, 0, 0, 0, 0, -99], np.float32), None))
    assert np.isfinite(odd.numbers).all()


def mesh(turn: float = 0.0, size: float = 100.0) -> Mesh:
    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.4, (468, 2))
    points[33], points[263], points[13], points[14] = (-0.5, 0), (0.5, 0), (0, 1.0), (0, 1.2)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    eye = np.zeros((16, 2))
    eye[0], eye[8] = (-1, 0), (1, 0)
    eye[1:8, 0] = eye[9:, 0] = np.linspace(-0.8, 0.8, 7)
    eye[1:8, 1], eye[9:, 1] = 0.25, -0.25
    mirrored = eye * (-1, 1)
    iris = np.tile([[0.2, 0.1]], (5, 1))
    placed = [part @ rotation * size + 300 for part in (points, mirrored, eye, iris)]
    points, left, right, middle = (part.astype(np.float32) for part in placed)
    return Mesh(points, np.stack([left, right]), np.stack([middle, middle]))


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_measures_do_not_depend_on_place_size_and_roll(turn: float) -> None:
    plain, other = mesh(), mesh(turn, 37.0)
    np.testing.assert_allclose(normalised(other.points), normalised(plain.points), atol=1e-4)
    numbers = look_of(other, with_points=False).numbers
    np.testing.assert_allclose(numbers, look_of(plain, with_points=False).numbers, atol=1e-4)
    assert openness(plain.contours[0]) == pytest.approx(0.25)
    assert gaze(plain.contours[0], plain.irises[0]) == pytest.approx((0.1, 0.05), abs=1e-5)
    assert gaze(plain.contours[1], plain.irises[1]) == pytest.approx((0.1, 0.05), abs=1e-5)
    assert mouth(plain.points) == pytest.approx(0.2)
    region = other.region()
    assert region.angle == pytest.approx(turn, abs=1e-5)


def test_landmarks_that_are_missing_or_others_are_refused(tmp_path: Path) -> None:
    assert "unmask models pull face-mesh" in why_no_landmarks(tmp_path)
    with pytest.raises(LandmarksError, match=r"face_landmark\.tflite"):
        LandmarkModel(tmp_path)
    for name in ("face_landmark.tflite", "iris_landmark.tflite"):
        (tmp_path / name).write_bytes(b"no network")
    assert why_no_landmarks(tmp_path) == ""
    with pytest.raises(LandmarksError, match="SHA-256"):
        LandmarkModel(tmp_path)


def test_ratios_see_a_smoothed_face() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(60, 200, (240, 240, 3)).astype(np.uint8)
    points = np.zeros((468, 2), np.float32) + 120
    angles = np.linspace(0, 2 * np.pi, 468, endpoint=False)
    from detectors.cues.landmarks import OVAL

    points[list(OVAL)] = (
        np.stack([np.cos(angles[:: 468 // 36][:36]), np.sin(angles[:: 468 // 36][:36])], 1) * 60 + 120
    )
    even = ratios(image, points)
    assert even is not None
    assert np.abs(even).max() < 0.2
    smooth = image.copy()
    smooth[70:170, 70:170] = 128
    pasted = ratios(smooth, points)
    assert pasted is not None
    named = dict(zip(RATIO_NAMES, pasted, strict=True))
    assert named["noise"] < -0.5
    assert named["sharpness"] < -0.5
    assert ratios(image[100:140, 100:140], points - 100) is None


def test_a_regression_survives_its_file_and_refuses_others() -> None:
    regression = Regression((0.0,) * 4, (1.0,) * 4, (1.0, 0.0, 0.0, 0.0), 0.5)
    assert Regression.from_json(json.loads(json.dumps(regression.to_json()))) == regression
    assert regression.log_odds([2.0, 9.0, 9.0, 9.0]) == pytest.approx(2.5)
    with pytest.raises(ValueError, match="weights has 1 numbers"):
        Regression((0.0,) * 4, (1.0,) * 4, (1.0,), 0.5)
    with pytest.raises(ValueError, match="bias"):
        Regression.from_json({"mean": [0] * 4, "spread": [1] * 4, "weights": [0] * 4})


def machine() -> Svm:
    support = np.array([[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0]])
    return Svm(np.zeros(5), np.ones(5), support, np.array([1.0, -1.0]), 0.5, 0.0, 2.0, 0.1)


def test_the_machine_follows_its_formula_and_its_file() -> None:
    made = machine()
    x = np.array([1.0, 0, 0, 0, 0])
    assert made.decision(x) == pytest.approx(1 - np.exp(-2))
    assert made.log_odds(x) == pytest.approx(2 * (1 - np.exp(-2)) + 0.1)
    again = Svm.from_json(json.loads(json.dumps(made.to_json())))
    assert again.log_odds(x) == made.log_odds(x)
    with pytest.raises(ValueError, match="shapes"):
        Svm(np.zeros(5), np.ones(5), np.zeros((2, 4)), np.ones(2), 1, 0, 1, 0)
    with pytest.raises(ValueError, match="finite"):
        Svm(np.zeros(1), np.ones(1), np.full((1, 1), np.nan), np.ones(1), 1, 0, 1, 0)


def test_windows_of_motion_are_alike_at_any_rate() -> None:
    slow, fast = series_of(fps=25, points=True), series_of(fps=50, points=True)
    a, b = windows(slow.seconds, slow.points), windows(fast.seconds, fast.points)
    assert a.shape[1:] == (WINDOW, INPUTS)
    np.testing.assert_allclose(a, b[: len(a)], atol=0.02)
    assert (a[:, 0, INPUTS // 2 :] == 0).all()
    assert len(windows(slow.seconds[:20], slow.points[:20])) == 0
    assert len(windows(slow.seconds[:1], slow.points[:1])) == 0


def trained_motion(folder: Path) -> None:
    import hashlib

    torch.manual_seed(0)
    save_file(MotionNet().state_dict(), folder / "motion.safetensors")
    digest = hashlib.sha256((folder / "motion.safetensors").read_bytes()).hexdigest()
    record = {"sha256": digest, "mean": [0.0] * INPUTS, "spread": [1.0] * INPUTS}
    (folder / "motion.json").write_text(json.dumps(record))


def test_motion_attends_and_loads_its_file_only(tmp_path: Path) -> None:
    net = MotionNet()
    logits, weights = net(torch.zeros(3, WINDOW, INPUTS))
    assert logits.shape == (3,)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    trained_motion(tmp_path)
    series = series_of(points=True)
    logit = MotionModel(tmp_path).logit(series.seconds, series.points)
    assert logit is not None
    assert np.isfinite(logit)
    (tmp_path / "motion.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="SHA-256"):
        MotionModel(tmp_path)


def test_voice_activity_hears_whole_windows_across_pieces_and_forgets_at_a_gap() -> None:
    heard: list[float] = []
    resets: list[int] = []

    def network(samples: NDArray[np.float32]) -> float:
        heard.append(float(samples[0]))
        assert samples.shape == (SAMPLES,)
        return 0.25

    ear = VoiceActivity(network, lambda: resets.append(len(heard)))
    ramp = np.arange(2 * SAMPLES, dtype=np.int16)
    first = ear.hear(1_000_000, ramp[:700])
    rest = ear.hear(1_000_000 + round(700 / RATE_HZ * 1e6), ramp[700:])
    assert [window.media_us for window in first + rest] == [1_000_000, 1_032_000]
    assert heard == [0.0, SAMPLES / 32768]
    assert resets == [0]
    late = ear.hear(9_000_000, np.zeros(SAMPLES, np.int16))
    assert resets == [0, 2]
    assert late[0].media_us == 9_000_000
    assert late[0].level_db == SILENCE_DB
    ear.forget()
    ear.hear(9_032_000, np.zeros(SAMPLES, np.int16))
    assert resets == [0, 2, 3]


def test_a_follower_keeps_streams_apart_and_hears_each_by_itself() -> None:
    made: list[int] = []

    def hearing() -> VoiceActivity:
        made.append(1)
        return VoiceActivity(lambda samples: 0.5, lambda: None)

    class Still:
        def look(self, image: NDArray[np.uint8], region: Region) -> Mesh | None:
            return mesh() if image.any() else None

    follower = Follower(Still(), hearing, with_points=True, with_ratios=False)  # type: ignore[arg-type]
    picture = np.full((400, 400, 3), 9, np.uint8)
    eye = (290.0, 300.0)
    face = Detection((250.0, 250.0, 350.0, 350.0), (eye, (310.0, 300.0), eye, eye, eye), 1.0)
    assert follower.follow("a", picture) == ()
    seeded = follower.seed("a", picture, [face, face, face])
    assert [one is not None for one in seeded] == [True, True]
    assert seeded[0] is not None
    assert seeded[0].points is not None
    assert follower.follow("b", picture) == ()
    assert len(follower.follow("a", picture)) == 2
    assert follower.follow("a", np.zeros_like(picture)) == (None, None)
    assert follower.follow("a", picture) == (None, None)
    for stream in ("a", "b", "a"):
        assert len(follower.hear(stream, 0, np.zeros(SAMPLES, np.int16))) == 1
        follower.drop(stream)
    assert len(made) == 1
    assert follower.follow("a", picture) == ()


def readings(
    cues: BurstCues, *series: FaceSeries, sound: SoundSeries | None = None
) -> dict[str, float | str]:
    tally = Tally()
    read = cues.blank()
    for one in series:
        read = cues.add(tally, one, sound or SoundSeries(), one.length_s, len(one.times))
        tally = Tally.restored(json.loads(json.dumps(tally.state())))
    return {cue.name: cue.reason or cue.value or 0.0 for cue in read}


def test_blink_rate_waits_for_ten_seconds_over_several_bursts(tmp_path: Path) -> None:
    cues = BurstCues([BLINK], trained=tmp_path)
    burst = series_of(closed=((1.0, 1.2),))
    assert "10 s" in str(readings(cues, burst, burst)[BLINK])
    assert readings(cues, burst, burst, burst)[BLINK] == pytest.approx(60 * 3 / 11.88, abs=0.01)


def test_every_missing_input_has_its_reason(tmp_path: Path) -> None:
    cues = BurstCues([BLINK, EYES, LIPS, MOTION, RATIOS], trained=tmp_path)
    assert readings(cues)[BLINK] == NOT_YET
    assert "no trained model" in str(readings(cues)[MOTION])
    assert cues.looks
    found = readings(cues, series_of())
    assert "no trained model" in str(found[EYES])
    assert "no audio" in str(found[LIPS]) or "silero-vad" in str(found[LIPS])
    assert "a burst needs" in str(readings(cues, series_of(1.0))[BLINK])
    assert "pictures a second" in str(readings(cues, series_of(4.0, fps=10))[BLINK])
    half = series_of()
    tally = Tally()
    assert "lost the face" in str(cues.add(tally, half, SoundSeries(), half.length_s, 300)[0].reason)
    off = BurstCues([BLINK], against="landmarks: not pulled", trained=tmp_path)
    assert not off.looks
    assert readings(off)[BLINK] == "landmarks: not pulled"
    assert not BurstCues([MOTION], trained=tmp_path).looks


def test_trained_models_give_numbers_and_broken_ones_are_refused(tmp_path: Path) -> None:
    trained_motion(tmp_path)
    (tmp_path / "eyes.json").write_text(json.dumps(machine().to_json()))
    (tmp_path / "ratios.json").write_text(
        json.dumps(Regression((0.0,) * 4, (1.0,) * 4, (1.0,) * 4, 0.0).to_json())
    )
    cues = BurstCues([EYES, MOTION, RATIOS], trained=tmp_path)
    series = series_of(points=True)
    series.add(
        round(4.1e6), FaceLook(np.zeros(7, np.float32), np.zeros((68, 2), np.float32), (0.1, 0.2, 0.3, 0.4))
    )
    found = readings(cues, series)
    assert isinstance(found[EYES], float)
    assert isinstance(found[MOTION], float)
    assert found[RATIOS] == pytest.approx(1.0)
    (tmp_path / "eyes.json").write_text("{}")
    with pytest.raises(ValueError, match=r"eyes\.json"):
        BurstCues([EYES], trained=tmp_path)


def test_the_real_networks_find_the_eyes_where_the_detector_does() -> None:
    folder = Path("~/.cache/unmask/face-mesh").expanduser()
    if why_no_landmarks(folder):
        pytest.skip("needs unmask models pull face-mesh")
    face, image = portrait()
    found = LandmarkModel(folder).look(image, region_of(face))
    assert found is not None
    eyes = np.array(face.landmarks[:2])
    apart = np.linalg.norm(eyes[1] - eyes[0])
    assert np.abs(found.irises[:, 0] - eyes).max() < 0.15 * apart
    assert all(0.1 < openness(contour) < 0.5 for contour in found.contours)
    again = LandmarkModel(folder).look(image, found.region())
    assert again is not None
    assert np.abs(again.points - found.points).mean() < 0.05 * apart
    assert LandmarkModel(folder).look(np.zeros_like(image), region_of(face)) is None


def portrait() -> tuple[Detection, NDArray[np.uint8]]:
    import matplotlib.cbook
    from PIL import Image as Pictures

    from detectors.mtcnn import MtcnnDetector

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        image = np.asarray(Pictures.open(file).convert("RGB"), np.uint8)
    return MtcnnDetector(40, 0.9).detect([image])[0][0], image


def test_the_real_voice_activity_hears_nobody_in_silence_and_noise() -> None:
    if why_no_voice():
        pytest.skip("needs the package silero-vad")
    ear = silero()
    noise = np.random.default_rng(0).normal(0, 300, 20 * SAMPLES).astype(np.int16)
    heard = ear.hear(0, np.zeros(20 * SAMPLES, np.int16)) + ear.hear(640_000, noise)
    assert len(heard) == 40
    assert max(window.voice for window in heard) < 0.5
