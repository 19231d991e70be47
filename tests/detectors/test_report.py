"""The examination of members: degradations, masks, groups, tables and the command, on a made-up data set.

The data are faces of one portrait with a green patch for a manipulation, and members that see green.
"""

import csv
import io
import json
import math
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detectors.calibration import (
    LEVELS,
    Calibration,
    CalibrationKind,
    Disagreement,
    FalseAlarms,
    Scale,
    Sets,
)
from detectors.crops import CropKind, CropPolicy, crop
from detectors.ensemble import Ensemble, Part, Rule
from detectors.members import DEFAULT_MEMBER, Member
from detectors.mtcnn import MtcnnDetector
from detectors.quality import QualityLimits, measure
from detectors.readings import Image, Quality, Reason
from detectors.reference import portrait
from detectors.training import explain, groups, robustness
from detectors.training.calibrate import OPEN_PROBABILITY
from detectors.training.card import EVIDENCE, ablation_table, calibration_told, what_was_tested, with_evidence
from detectors.training.data import DataError
from detectors.training.evidence import ENSEMBLE, markdown
from detectors.training.explain import Known, difference_mask, iou, iou_at_area, pointing
from detectors.training.fusion import Panel, choose
from detectors.training.probes import Probe, in_turn, load_pairs, load_probes
from detectors.training.report import (
    LEVEL,
    Judge,
    blended,
    examine,
    main,
    read_rows,
    write,
)
from detectors.training.robustness import CONDITIONS, Decision, Rate, quality_of
from stream.config import Config
from stream.config import Verdict as Settings
from stream.verdicts import judge
from stream.windows import Sample, estimate

POLICY = CropPolicy(CropKind.TIGHT, size=64, side=0.81, shift=0.06)
FACE = (170.0, 108.0, 353.0, 331.0)
"""Where MTCNN finds the portrait's face, about: a test needs no detector for that."""
PATCH = (slice(80, 190), slice(70, 150))
TINT = np.array([0.4, 1.2, 0.4])
"""What is painted over would be taken for covered."""
PEOPLE = 6
FEW = {name: CONDITIONS[name] for name in ("clean", "0.33x", "H.264 CRF 37")}


class Green(nn.Module):
    """Says manipulated where a crop is green; its map is how green."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        green = self._green(faces)
        return self.gain * (80 * green.mean((1, 2)) - 4), green

    def features(self, faces: Tensor) -> Tensor:
        """[N, 2]: brightness twice, so that groups by brightness differ in activation."""
        return (faces.mean((1, 2, 3)) + 3)[:, None].expand(-1, 2)

    @staticmethod
    def _green(faces: Tensor) -> Tensor:
        return torch.relu(torch.nn.functional.avg_pool2d(faces[:, 1] - faces[:, ::2].amax(1), 4) - 0.1)


def calibration(kind: CalibrationKind = CalibrationKind.SHIPPED, **fields: Any) -> Calibration:
    return Calibration(kind, (Scale(1, 1.0, 0.0),), tau=0.5, sigma=0.5, data="made up", **fields)


def member(name: str, gain: float = 1.0) -> Member:
    record = {"tested_for": ["green"], "not_tested_for": ["blue", "green"] if gain > 1 else ["blue"]}
    return Member(name, "1", POLICY, Green(gain), calibration(), name[0] * 64, "Apache-2.0", record)


def face(side: int = 224) -> Image:
    return crop(portrait(), FACE, POLICY.at_size(side))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, two takes each, as bright as their number; every manipulated crop is green in places."""
    root = tmp_path_factory.mktemp("data")
    rows = []
    with tarfile.open(root / "dfdc_faces_val_00.tar", "w") as tar:
        for person in range(PEOPLE):
            for take in range(2):
                real = np.clip(face() * (0.6 + 0.08 * person + 0.02 * take), 0, 255).astype(np.uint8)
                fake = real.copy()
                fake[PATCH] = np.clip(TINT * fake[PATCH], 0, 255)
                name, width = f"p{person}t{take}", 120 + 20 * person
                for title, image in ((name, real), (f"{name}f", fake)):
                    _, coded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
                    info = tarfile.TarInfo(f"{title}.jpg")
                    info.size = len(coded)
                    tar.addfile(info, io.BytesIO(coded.tobytes()))
                rows.append(("val", name, "real", "", width, width + 1, person))
                rows.append(("val", f"{name}f", "fake", name, width, width + 1 + take, person))
    with (root / "dfdc_faces.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "name", "label", "original", "source_width", "source_height", "identity"])
        writer.writerows(rows)
    return root


# -- what is looked at


def test_crops_come_at_the_size_they_had_and_people_in_turn(data_dir: Path) -> None:
    probes = load_probes(data_dir, 12, seed=1)
    assert sorted(probe.identity for probe in probes) == sorted(2 * list(range(PEOPLE)))
    assert [probe.label for probe in probes].count(1) == 6
    assert {probe.image.shape[1] for probe in probes} == {120 + 20 * person for person in range(PEOPLE)}
    assert [probe.name for probe in probes] == [probe.name for probe in load_probes(data_dir, 12, seed=1)]
    assert len(load_probes(data_dir, 1000, seed=1)) == 24


def test_no_person_is_drawn_twice_before_all_were_drawn_once() -> None:
    rows = [{"identity": "a", "name": str(i)} for i in range(50)] + [{"identity": "b", "name": "x"}]
    drawn = in_turn(rows, 4, np.random.default_rng(0))
    assert [row["identity"] for row in drawn[:2]].count("b") == 1
    assert len({row["name"] for row in drawn}) == 4


def test_pairs_are_of_equal_size(data_dir: Path) -> None:
    pairs = load_pairs(data_dir, 100, seed=1)
    assert sorted(pair.name for pair in pairs) == [f"p{person}t0f" for person in range(PEOPLE)]
    assert all(pair.authentic.shape == pair.manipulated.shape == (224, 224, 3) for pair in pairs)


def test_missing_material_is_named(tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(DataError, match=r"dfdc_faces\.csv"):
        load_probes(tmp_path, 4, 0)
    with pytest.raises(DataError, match="split test"):
        load_probes(data_dir, 4, 0, split="test")
    (tmp_path / "dfdc_faces.csv").write_text((data_dir / "dfdc_faces.csv").read_text())
    with pytest.raises(DataError, match="no such file"):
        load_probes(tmp_path, 4, 0)


# -- what is done to it


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_changes_a_picture_and_changes_it_the_same_way_again(name: str) -> None:
    image = face(151)
    out, again = (CONDITIONS[name](image.copy(), np.random.default_rng(5)) for _ in range(2))
    assert out.dtype == np.uint8
    assert np.array_equal(out, again)
    factor = {"0.75x": 0.75, "0.5x": 0.5, "0.33x": 0.33}.get(name, 1.0)
    assert out.shape == (round(151 * factor), round(151 * factor), 3)
    assert np.array_equal(out, image) == (name == "clean")


def loss(name: str, image: Image) -> float:
    out = CONDITIONS[name](image, np.random.default_rng(5)).astype(float)
    return float(np.abs(out - image).mean())


@pytest.mark.parametrize(
    "rising",
    [
        ("blur, sigma 1", "blur, sigma 2", "blur, sigma 3"),
        ("0.75x, enlarged again", "0.5x, enlarged again", "0.33x, enlarged again"),
        ("JPEG 90", "JPEG 50", "JPEG 30"),
        ("H.264 CRF 23", "H.264 CRF 30", "H.264 CRF 37"),
    ],
)
def test_worse_is_worse(rising: tuple[str, ...]) -> None:
    found = [loss(name, face(160)) for name in rising]
    assert found == sorted(found)
    assert 0.5 < found[0] < found[-1] < 20


def test_the_frame_taken_from_h264_is_the_one_that_was_not_moved() -> None:
    image = face(160)
    out = robustness.H264(10)(image, np.random.default_rng(5)).astype(float)
    apart = np.abs(out - image).mean()
    assert apart < np.abs(out - np.roll(image, 1, axis=1)).mean()
    assert apart < 3


def test_blur_at_source_size_is_seen_by_the_gate() -> None:
    image = face(151)
    blurred = CONDITIONS["blur, sigma 3"](image, np.random.default_rng(0))
    box = (0.0, 0.0, 151.0, 151.0)
    assert quality_of(blurred) == measure(blurred, box, None, QualityLimits())
    assert Reason.BLUR in quality_of(blurred).reasons
    assert not quality_of(image).reasons


def test_what_is_covered_is_not_decided_upon() -> None:
    image = face(151)
    for name in ("lower half covered", "upper half covered"):
        covered = CONDITIONS[name](image, np.random.default_rng(0))
        assert Reason.OCCLUSION in quality_of(covered).reasons
    assert "covered" not in quality_of(image).parts


def test_in_a_video_the_quantiser_is_known(data_dir: Path) -> None:
    probes = load_probes(data_dir, 4, seed=1)
    found = robustness.read([member("sharp")], probes, robustness.H264(47), seed=1)
    assert found.in_video is not None
    assert all("qp" not in quality.parts for quality in found.quality)
    assert all(40 < quality.parts["qp"] <= 51 for quality in found.in_video)
    assert all(Reason.COMPRESSION in quality.reasons for quality in found.in_video)
    assert robustness.read([member("sharp")], probes, CONDITIONS["JPEG 50"], seed=1).in_video is None


def test_what_never_happened_may_still_happen() -> None:
    identity, never = np.arange(30), np.zeros(30, bool)
    assert robustness.share(never, ~never, identity) == Rate(0.0, 0.0, pytest.approx(0.1))
    assert robustness.share(~never, ~never, identity) == Rate(1.0, pytest.approx(0.9), 1.0)
    assert math.isnan(robustness.share(never, never, identity).value)
    half = robustness.share(identity < 15, ~never, identity)
    assert half.value == 0.5
    assert 0.2 < half.low < 0.5 < half.high < 0.8


# -- what is said of it


def sets() -> Sets:
    return Sets(
        alpha_authentic=0.1,
        alpha_manipulated=0.1,
        people_authentic=100,
        people_manipulated=100,
        authentic=tuple(np.linspace(-4, 1, LEVELS)),
        manipulated=tuple(np.linspace(0.8, 6, LEVELS)),
    )


@pytest.mark.parametrize(
    "used",
    [
        calibration(),
        calibration(sets=sets()),
        calibration(sets=sets(), disagreement=Disagreement(1.0, {"a": (1.0, 0.0), "b": (1.0, 0.0)})),
        calibration(CalibrationKind.NONE),
    ],
    ids=["interval", "sets", "disagreement", "none"],
)
def test_a_crop_is_judged_as_a_still_is_at_run_time(used: Calibration) -> None:
    parts = tuple(Part(name, "1", name * 64, 0.5, 1.0, 0.0) for name in "ab")
    judges = Judge("both", Ensemble(Rule.MEAN, parts, used))
    still = Settings().model_copy(update={"min_samples": 1, "min_track_s": 0.0})
    said = set()
    for first in np.linspace(-6, 8, 57):
        for second in (first, first + 0.6, first + 3):
            for reasons in ((), (Reason.BLUR,)):
                logits = {"a": float(first), "b": float(second)}
                decision, why = judges.decide(logits, Quality(1.0, {}, reasons))
                fused = judges.ensemble.fuse(logits)
                expected = judge(estimate([Sample(0, fused, logits, 1.0, reasons)]), used, still)
                assert (decision.value, why) == (expected.verdict.value, expected.reasons)
                said.add(decision)
    decides = used.kind is not CalibrationKind.NONE
    assert said == (set(Decision) if decides else {Decision.INCONCLUSIVE})


def test_the_operating_point_is_the_shipped_one() -> None:
    assert (Config().verdict.open_probability, Config().verdict.level) == (OPEN_PROBABILITY, LEVEL)


# -- where the map points


def test_the_difference_of_a_pair_is_its_mask() -> None:
    real = face()
    fake = real.copy()
    fake[PATCH] = (0, 200, 0)
    mask = difference_mask(real, fake)
    assert mask is not None
    truth = np.zeros((224, 224), bool)
    truth[PATCH] = True
    assert iou(mask, truth) > 0.7


def test_pairs_that_show_no_region_are_left_out() -> None:
    real = face()
    other_moment = np.roll(real, 15, axis=1)
    noise = np.random.default_rng(1).normal(0, 2, real.shape)
    noisy = np.clip(real + noise, 0, 255).astype(np.uint8)
    assert difference_mask(real, other_moment) is None
    assert difference_mask(real, noisy) is None
    assert difference_mask(real, real) is None


def test_the_measures_know_right_from_wrong() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:6, 2:6] = True
    right, wrong = mask.astype(np.float32), np.zeros((20, 20), np.float32)
    wrong[15, 15] = 1
    assert (pointing(right, mask), pointing(wrong, mask)) == (1.0, 0.0)
    assert pointing(np.ones((20, 20), np.float32), mask) == pytest.approx(16 / 400)
    assert iou_at_area(right, mask) == 1.0
    assert iou_at_area(1 - right, mask) == 0.0
    assert iou(mask, ~mask) == 0.0


def test_maps_that_know_nothing_score_what_chance_does() -> None:
    rng = np.random.default_rng(2)
    mask = np.zeros((60, 60), bool)
    mask[10:40, 20:40] = True
    known = [Known(face(60), mask, identity) for identity in range(40)]
    _, even = explain.baselines(known)
    maps = [rng.random((60, 60)).astype(np.float32) for _ in known]
    drawn = explain.explained("drawn", maps, known)
    assert even.pointing.value == pytest.approx(mask.mean())
    assert even.iou_at_area.value == pytest.approx(drawn.iou_at_area.value, abs=0.02)
    assert even.iou_at_mean.value == pytest.approx(mask.mean())


def test_blends_come_with_their_masks(data_dir: Path) -> None:
    pairs = load_pairs(data_dir, 3, seed=1)
    by_family = blended(pairs, 7, MtcnnDetector())
    assert len(by_family) == 4
    for known in by_family.values():
        assert known
        for one in known:
            assert one.image.shape == (224, 224, 3)
            assert 0 < one.mask.mean() < 0.9
    assert blended(pairs[:1], 7, MtcnnDetector()) == {}


# -- groups


def test_skin_is_measured_on_the_cheeks() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    image[52:64, 20:32] = 100
    image[52:64, 68:80] = 200
    assert groups.skin_brightness(image) == pytest.approx(150, abs=1)
    assert groups.skin_brightness(face()) > groups.skin_brightness((face() * 0.5).astype(np.uint8))


def test_groups_show_who_fares_worse_and_warn_of_few() -> None:
    probes = [Probe(str(i), face(32), int(i % 2), i) for i in range(120)]
    names = ["many" if i < 100 else "few" for i in range(120)]
    said = [Decision.MANIPULATED if i >= 50 else Decision.AUTHENTIC for i in range(120)]
    activation = np.where(np.arange(120) < 100, 1.0, 0.5)
    found = groups.check("size", [*names[:119], None], probes, activation, np.zeros(120), said)
    few, many = found.groups
    assert (few.name, few.authentic, few.manipulated, few.few) == ("few", 10, 9, True)
    assert (many.authentic, many.people, many.few) == (50, 50, False)
    assert many.false_positives.value == pytest.approx(0.5)
    assert many.recall.value == pytest.approx(0.5)
    assert many.activation.value == 1.0
    assert math.isnan(found.ratio.value)  # one group alone has enough crops
    table = "\n".join(groups.table({"judge": [found]}))
    assert "few (!)" in table
    assert "too few to say anything" in table


def test_the_ratio_is_the_least_activation_over_the_greatest() -> None:
    probes = [Probe(str(i), face(32), 0, i) for i in range(60)]
    names = ["a" if i < 30 else "b" for i in range(60)]
    activation = np.where(np.arange(60) < 30, 1.0, 0.8)
    found = groups.check("x", names, probes, activation, np.zeros(60), [Decision.AUTHENTIC] * 60)
    assert found.ratio.value == pytest.approx(0.8)
    assert found.ratio.low == pytest.approx(0.8)


def test_sex_labels_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "sex.csv"
    path.write_text("name,sex\np0t0,f\np1t0, m\np2t0,\n")
    assert groups.read_sexes(path) == {"p0t0": "f", "p1t0": "m"}
    path.write_text("name,gender\np0t0,f\n")
    with pytest.raises(DataError, match="name,sex"):
        groups.read_sexes(path)


# -- all of it


def test_an_examination_finds_what_the_members_are(data_dir: Path, tmp_path: Path) -> None:
    members = [member("sharp", 2.0), member("dull", 0.05)]
    (tmp_path / "sharp.md").write_text("# Card\n\nText.\n")
    sexes = {f"p{person}t{take}": "f" if person % 2 else "m" for person in range(6) for take in range(2)}
    share = {"share": 0.01, "low": 0.0, "high": 0.02, "upper": 0.03}
    figures = {"val": {"auc": 0.9, "interval": [0.8, 1.0]}, "strangers": {}, "clips_auc": 0.75}
    chosen = {"false_accusations": {"val": share}} | dict.fromkeys(
        ("recall", "missed", "decided_authentic", "decided_manipulated"), share
    )
    people = np.repeat(np.arange(20), 2)
    labels = np.tile([0, 1], 20)
    drawn = np.random.default_rng(8).normal(size=(2, 40)) + labels
    panel = Panel({"sharp": drawn[0], "dull": drawn[1]}, labels, people)
    _, fusion = choose(panel, {"warp": panel})
    shipped = {
        "members": {"sharp": figures | {"strangers": {"warp": {"auc": 0.7, "interval": [0.6, 0.8]}}}},
        "ensemble": figures | {"operating_point": {"chosen": chosen}, "fit": {"fusion": fusion}},
    }
    report = examine(members, data_dir, crops=24, masks=6, conditions=FEW, sexes=sexes, shipped=shipped)

    clean = {name: rows[0] for name, rows in report.robustness.items()}
    assert list(clean) == ["sharp", "dull", ENSEMBLE]
    assert [row.condition for row in report.robustness["sharp"]] == [*FEW, "H.264 CRF 37, in a video"]
    assert clean["sharp"].auc.value == 1.0
    assert (clean["sharp"].recall.value, clean["sharp"].coverage.value) == (1.0, 1.0)
    assert clean["sharp"].false_positives.value == 0.0
    assert clean["dull"].coverage.value == 0.0
    assert clean["dull"].undecided == {"AMBIGUOUS": 1.0}
    assert clean[ENSEMBLE].undecided == {"UNCALIBRATED": 1.0}
    covered = {row.condition: row for row in report.robustness["sharp"]}
    widths = [round(0.33 * (120 + 20 * person)) for person in range(PEOPLE)]
    small = np.mean([width < QualityLimits().min_face_px for width in widths])
    assert covered["0.33x"].undecided["SMALL_FACE"] == pytest.approx(small)
    assert report.gain is not None
    assert report.gain.best == "sharp"

    against_original = {one.name: one for one in report.explanation["manipulated crop against its original"]}
    assert against_original["sharp"].pointing.value == 1.0
    assert against_original["sharp"].iou_at_mean.value > against_original["centre prior"].iou_at_mean.value
    thirds, sex = report.groups["sharp"]
    assert [group.authentic for group in thirds.groups] == [4, 4, 4]
    activations = [group.activation.value for group in thirds.groups]
    assert activations == sorted(activations)
    assert {group.name for group in sex.groups} == {"f", "m"}

    paths = write(report, members, tmp_path, {"all": {"AUC": 0.9512}, "no gate": {"AUC": [0.9, 0.8, 1.0]}})
    assert [path.name for path in paths] == ["evidence.json", "sharp.md", "dull.md", "ensemble.md"]
    json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    card, made, together = (path.read_text() for path in paths[1:])
    assert card.startswith("# Card\n\nText.\n")
    assert "**sharp**" in card
    assert "dull" not in card
    assert "| sharp | 0.900 (0.800 to 1.000) | 0.700 (0.600 to 0.800) | 0.750 |" in card
    assert "false accusations" not in card
    assert "| false accusations, val | 0.010 (0.000 to 0.020) | 0.030 |" in together
    assert "## Fusion" not in card
    even = fusion["ensemble"]
    row = f"{even['val_auc']:.3f} | {even['family_auc']['warp']:.3f}"
    assert f"| **chosen**: mean, sharp 0.5, dull 0.5 | {row} |" in together
    assert f"A cascade: `{fusion['cascade']['always']}` reads every face" in together
    assert made.startswith("# Member `dull` version 1")
    assert "**dull**" in made
    assert "## Limits" in made
    assert "| no gate | 0.900 (0.800 to 1.000) |" in together
    assert "nobody is accused" in together
    assert "- green" in together
    assert "Not tested for: blue." in together
    write(report, members, tmp_path, {})
    assert (tmp_path / "sharp.md").read_text() == card


def test_evidence_is_replaced_and_the_rest_of_a_card_kept(data_dir: Path) -> None:
    report = examine([member("sharp")], data_dir, crops=4, masks=0, conditions=FEW)
    once = with_evidence("# Card\n", report, "sharp")
    assert with_evidence(once, report, "sharp") == once
    assert once.count(EVIDENCE) == 1
    assert report.gain is None
    assert "4 authentic" not in "\n".join(markdown(report))
    assert "2 authentic and 2 manipulated" in once


def test_a_calibration_is_told_with_what_it_claims() -> None:
    used = calibration(sets=sets(), cllr=0.4, bound=FalseAlarms(1.5, 2.0, 7), tested_for=("blue swaps",))
    ensemble = Ensemble(Rule.MEAN, (Part("sharp", "1", "s" * 64, 1.0, 1.0, 0.0),), used)
    told = calibration_told(ensemble)
    for part in ("shipped", "made up", "10% lose", "Cllr 0.400", "At most 1.5 false alarms", "7 people"):
        assert part in told
    assert what_was_tested(ensemble, [member("sharp", 2.0)]) == (["blue swaps"], ["blue", "green"])


def test_an_ablation_is_a_table_of_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "ablation.json"
    path.write_text('{"all": {"AUC": 0.95, "note": "three seeds"}, "no gate": {"AUC": 0.94}}')
    assert ablation_table(read_rows(path))[2:6] == [
        "| | AUC | note |",
        "|---|---|---|",
        "| all | 0.950 | three seeds |",
        "| no gate | 0.940 |  |",
    ]
    assert ablation_table({}) == []
    path.write_text("[1]")
    with pytest.raises(DataError, match="object of rows"):
        read_rows(path)


@pytest.mark.timeout(300)  # a network is compiled
def test_the_command_writes_and_prints(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detectors.training.report.examine", partial(examine, conditions=FEW))
    arguments = [DEFAULT_MEMBER, "--data", str(data_dir), "--out", str(tmp_path), "--crops", "4"]
    assert main([*arguments, "--masks", "2", "--threads", "1", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((tmp_path / "evidence.json").read_text())
    assert f"condition {len(FEW)} of {len(FEW)}" in told.err
    assert main(["no-such-member", "--data", str(data_dir), "--out", str(tmp_path)]) == 2
    assert "no-such-member" in capsys.readouterr().err
