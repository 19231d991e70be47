"""Benford's law on stills: the numbers of SCIENCE E, the forest without scikit-learn, equal histories."""

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib import cbook
from numpy.typing import NDArray
from PIL import Image as Pil

from detectors.cues.benford import (
    BASES,
    DIVERGENCES,
    FEATURES,
    FREQUENCIES,
    QUALITIES,
    Forest,
    ForestError,
    digit_shares,
    divergences,
    features,
    fitted,
    grey_face,
    log_odds,
    quantised,
    read_forest,
    read_still,
    write_forest,
)
from detectors.readings import Image
from detectors.training import benford as training
from detectors.training.benford import (
    Set,
    Treatment,
    examined,
    exported,
    face_in,
    fit,
    opened,
    square_of,
    with_history,
)
from detectors.training.data import DataError

BOX = (150.0, 60.0, 370.0, 330.0)


@pytest.fixture(scope="module")
def portrait() -> Image:
    path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return np.asarray(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), np.uint8)


def test_a_face_has_540_numbers(portrait: Image) -> None:
    assert FEATURES == 540 == len(QUALITIES) * len(FREQUENCIES) * len(BASES) * len(DIVERGENCES)
    assert QUALITIES == (80, 85, 90, 95, 100)
    assert BASES == (10, 20, 40, 60)
    found = features(grey_face(portrait, BOX))
    assert found.shape == (540,)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert len(np.unique(found)) > 400


@pytest.mark.parametrize("quality", [80, 90])
def test_terms_are_those_that_a_jpeg_stores(portrait: Image, quality: int) -> None:
    grey = grey_face(portrait, BOX)
    done, file = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    stored = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)
    # decoding rounds to whole grey levels, which moves few terms
    assert (quantised(np.asarray(stored, np.uint8), quality) == quantised(grey, quality)).mean() > 0.95


def test_first_digits() -> None:
    series = np.array([[0, 7, -7, 70, 123, -1999, 10, 0]], np.int32)
    counts = np.round(digit_shares(series, 10)[0] * (6 + 9 / 2) - 0.5)
    assert counts.tolist() == [3, 0, 0, 0, 0, 0, 3, 0, 0]
    # in base 20: 7, 7, 3, 6, 4 (1999 = 4 * 400 + ...), 10
    counts = np.round(digit_shares(series, 20)[0] * (6 + 19 / 2) - 0.5)
    assert [int(k) + 1 for k in np.flatnonzero(counts)] == [3, 4, 6, 7, 10]


@pytest.mark.parametrize(
    ("a", "b", "base"), [(0.0, 1.0, 10), (0.7, 1.6, 20), (-0.4, 1.2, 40), (0.1, 2.5, 60)]
)
def test_a_law_is_found_again(a: float, b: float, base: int) -> None:
    digits = np.arange(1, base)
    law = np.log1p(1 / (a + digits**b))
    law /= law.sum()
    found = fitted(law[None])
    assert np.abs(found - law).max() < 0.01
    assert divergences(law[None], found).max() < 1e-3
    # nothing of the family looks like this one
    other = np.roll(law, base // 2)
    assert divergences(other[None], fitted(other[None])).min() > 0.05


def test_divergences_are_symmetric_and_as_defined() -> None:
    p, q = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.2, 0.6]])
    found = divergences(p, q)
    assert np.allclose(found, divergences(q, p))
    assert np.allclose(divergences(p, p), 0)
    mixed = (p**0.3 * q**0.7).sum() + 0.0
    other = (q**0.3 * p**0.7).sum() + 0.0
    leibler = (p * np.log(p / q)).sum() + (q * np.log(q / p)).sum()
    renyi = (np.log(mixed) + np.log(other)) / (0.3 - 1)
    tsallis = (mixed + other - 2) / (0.3 - 1)
    assert np.allclose(found[0], [leibler, renyi, tsallis])


@pytest.mark.parametrize("shape", [(0, 0), (12, 16), (8, 8, 3)])
def test_what_is_no_grey_face(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        features(np.zeros(shape, np.uint8))


def made_up(rng: np.random.Generator, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    found = rng.normal(size=(count, FEATURES)).astype(np.float32)
    labels = (found[:, 3] + found[:, 200] > 0).astype(np.int64)
    return found, labels


def test_the_forest_without_scikit_learn_says_the_same(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    found, labels = made_up(rng, 200)
    learned = fit(found, labels, trees=12)
    path = tmp_path / "forest.npz"
    write_forest(path, exported(learned, {"auc": 0.9}))
    forest = read_forest(path)
    fresh, _ = made_up(rng, 100)
    # thresholds themselves, too: the last bit must not send a number the other way
    fresh[0] = np.float32(learned.estimators_[0].tree_.threshold[0])
    assert np.allclose(forest.share(fresh), learned.predict_proba(fresh)[:, 1], atol=1e-6)
    assert forest.record == {"auc": 0.9}
    assert all(abs(odds) <= np.log(13) + 1e-9 for odds in log_odds(forest, fresh))


def leaf(value: float) -> dict[str, Any]:
    one = np.zeros(1, np.int32)
    return {
        "feature": one - 1,
        "threshold": np.zeros(1, np.float32),
        "left": one - 1,
        "right": one - 1,
        "value": np.array([value], np.float32),
        "roots": one,
    }


def test_a_broken_forest_is_refused(tmp_path: Path) -> None:
    loop = leaf(0.5) | {name: np.zeros(1, np.int32) for name in ("feature", "left", "right")}
    for parts in (loop, leaf(0.5) | {"value": np.zeros(2, np.float32)}, leaf(1.5)):
        with pytest.raises(ForestError, match="forest"):
            Forest(**parts, record={})
    path = tmp_path / "forest.npz"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ForestError, match=str(path)):
        read_forest(path)


def test_a_still_has_a_value_or_a_reason(tmp_path: Path, portrait: Image) -> None:
    path = tmp_path / "forest.npz"
    assert "no forest" in str(read_still(portrait, BOX, path).reason)
    write_forest(path, Forest(**leaf(0.8), record={}))
    assert read_still(portrait, BOX, path).value == pytest.approx(np.log(1.8 / 1.2))
    small = read_still(portrait, (200.0, 100.0, 260.0, 160.0), path)
    assert small.reason == "the face has 56 pixels, 96 are needed"
    assert read_still(portrait, (-90.0, -90.0, -10.0, -10.0), path).value is None


def jpeg(image: Image, **settings: Any) -> bytes:
    file = io.BytesIO()
    Pil.fromarray(image).save(file, "JPEG", **settings)
    return file.getvalue()


def test_a_synthetic_face_gets_its_partners_history(portrait: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    partner = opened("a", "wide_faces", jpeg(portrait[:300, :256], quality=83, subsampling=0))
    assert partner.tables is not None
    seen: list[bytes] = []
    encode = training._encoded

    def noted(picture: Pil.Image, **settings: Any) -> bytes:
        seen.append(encode(picture, **settings))
        return seen[-1]

    monkeypatch.setattr(training, "_encoded", noted)
    face = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    made = with_history(face, partner, 120, (100.0, 80.0, 340.0, 380.0), np.random.default_rng(1))
    assert made.shape == (120, 120, 3)
    last = opened("b", "wide_faces", seen[-1])
    assert (last.tables, last.subsampling) == (partner.tables, 0)
    assert last.image.shape[:2] == (205, 205)  # 512 * 120 / 300: its face is as large as the partner's
    assert len(seen) == 2  # the camera's and the partner's


def test_only_a_partner_that_was_aligned_turns_the_face(portrait: Image) -> None:
    face = np.ascontiguousarray(portrait[:512, :512])
    box = (150.0, 60.0, 370.0, 330.0)
    rng = np.random.default_rng
    of_source = {
        source: with_history(face, opened("a", source, lossless(portrait)), 200, box, rng(3))
        for source in ("wide_faces", "lfw_faces")
    }
    assert not np.array_equal(of_source["wide_faces"], of_source["lfw_faces"])


def lossless(image: Image) -> bytes:
    file = io.BytesIO()
    Pil.fromarray(image).save(file, "PNG")
    return file.getvalue()


def test_both_of_a_pair_are_treated_alike(portrait: Image) -> None:
    rng = np.random.default_rng(0)
    drawn = [Treatment.drawn(rng, 180) for _ in range(50)]
    assert all(96 <= treatment.side <= 176 and treatment.side % 8 == 0 for treatment in drawn)
    assert {treatment.quality is None for treatment in drawn} == {True, False}
    face = np.ascontiguousarray(portrait[60:300, 140:380])
    grey, trivial = Treatment(120, 80).apply(face)
    assert grey.shape == (120, 120)
    assert len(trivial) == len(training.TRIVIAL)
    assert trivial[-2:] == [120, 80]


def test_a_face_must_be_large_enough_and_inside_of_its_picture(portrait: Image) -> None:
    class Found:
        def __init__(self, *box: float) -> None:
            self.box = box

        def detect(self, _: list[Image]) -> list[list["Found"]]:
            return [[self]]

    def box_of(*box: float) -> Any:
        return face_in(portrait, Found(*box))  # type: ignore[arg-type]

    box = box_of(150.0, 100.0, 350.0, 320.0)
    assert box == (150.0, 100.0, 350.0, 320.0)
    assert square_of(portrait, box).shape == (220, 220, 3)
    # as the cue frames it at run time
    assert grey_face(portrait, box).shape == (216, 216)
    assert box_of(-10.0, 0.0, 190.0, 200.0) is None
    assert box_of(100.0, 100.0, 190.0, 190.0) is None


def test_what_separates_by_size_alone_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    found, labels = made_up(rng, 120)
    trivial = rng.normal(size=(120, len(training.TRIVIAL)))
    looks = Set(found, trivial, labels, np.arange(120), ("lfw_faces",) * 60 + ("wide_faces",) * 60)
    record = examined(looks, trees=10)
    assert record["auc"] > 0.6
    assert record["trivial"]["auc"] < 0.65
    given_away = Set(found, trivial + labels[:, None], labels, looks.pair, looks.sources)
    assert examined(given_away, trees=2)["trivial"]["auc"] > 0.9
    assert "file size" in "\n".join(training.told(record))
    assert not training.worth({"interval": [0.7, 0.9], "trivial": {"auc": 0.75}})
    assert not training.worth({"interval": [0.4, 0.9], "trivial": {"auc": 0.3}})
    assert training.worth({"interval": [0.7, 0.9], "trivial": {"auc": 0.65}})


def test_a_generator_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps random-face"):
        training.generate(tmp_path, 1)
    with pytest.raises(DataError, match=r"lfw_faces.tar: no such file"):
        list(training._files(tmp_path))
