"""Cues in the stream: bounded, told in every record, and nothing at all while none has a say."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from detectors.calibration import Calibration, CalibrationKind, Scale, Sets
from detectors.cues import Cue, missing
from detectors.late import MOST, Late, Share, Weighed
from stream import scores
from stream.alerts import Publisher
from stream.clock import FakeClock
from stream.config import Config
from stream.frames import Applied, ScoredFrame
from stream.incidents import IncidentEvent
from stream.scores import ScoreRecord, VerdictRecord
from stream.verdicts import Judgement, judge
from stream.windows import Estimate
from tests.stream.story import CALIBRATION, PROVENANCE, Story

FOLDER = Path(scores.__file__).parent
RECORD = Draft202012Validator(json.loads((FOLDER / "scores.schema.json").read_text()))
ALERT = Draft202012Validator(json.loads((FOLDER / "alert.schema.json").read_text()))

LATE = Late((Weighed("blink", 1.0, 0.0, 1.0, MOST, {"gain": 0.01}),))
LOOKED = Estimate(1.5, {"m": 1.5}, 5.0, 0.5, 20, 20, 9_500_000, 0, 9_500_000, None, ())
SCALED = Calibration(
    CalibrationKind.SHIPPED,
    (Scale(1, 2.0, 0.3), Scale(16, 4.0, 0.1)),
    tau=0.8,
    sigma=1.0,
    sets=Sets(
        0.02,
        0.25,
        100,
        100,
        tuple(sorted(k / 50 - 2 for k in range(99))),
        tuple(k / 50 + 1 for k in range(99)),
    ),
)
SETTINGS = Config().verdict


def said(cues: tuple[Share, ...], calibration: Calibration = SCALED) -> Judgement:
    return judge(LOOKED, calibration, SETTINGS, cues=cues)


def test_a_shift_moves_the_calibrated_logit_by_just_that() -> None:
    for shift in (0.4, -0.6):
        plain, moved = said(()), said((Share("blink", 1.0, None, shift),))
        assert plain.llr is not None
        assert moved.llr is not None
        assert moved.llr - plain.llr == pytest.approx(shift)
        assert moved.interval is not None
        assert plain.interval is not None
        assert (moved.interval > plain.interval) == (shift > 0)
        assert moved.members == plain.members


@pytest.mark.parametrize(
    "cues",
    [
        (),
        (Share("blink", None, "no burst yet", 0.0),),
        (Share("lips", 9.0, None, None),),
    ],
)
def test_what_has_no_say_changes_no_bit(cues: tuple[Share, ...]) -> None:
    plain, other = said(()), said(cues)
    assert replace(other, cues=()) == plain
    assert other.cues == cues


def test_judgements_survive_json() -> None:
    judgement = said((Share("blink", 1.0, None, 0.4), Share("lips", None, "silent", None)))
    assert Judgement.from_json(json.loads(json.dumps(asdict(judgement)))) == judgement
    old = asdict(said(()))
    del old["cues"]  # states of before have none
    assert Judgement.from_json(old).cues == ()


@dataclass
class Cued(Story):
    """A story in which cues read the first face from the third event on."""

    late: Late | None = field(default_factory=Late)
    cues: tuple[Cue, ...] = ()

    def apply(self, event: ScoredFrame | Applied) -> None:
        if self.events == 3 and self.cues:
            self.aggregate.on_cues(0, self.cues)
            self.aggregate.on_cues(99, self.cues)  # of a face that left: nobody's
        super().apply(event)


def records(story: Story) -> Iterator[dict[str, Any]]:
    for output in story.said:
        if isinstance(output, ScoreRecord | VerdictRecord):
            record = json.loads(json.dumps(output.as_json()))
            RECORD.validate(record)
            yield record


def alerts(story: Story) -> list[dict[str, Any]]:
    publisher = Publisher(story.settings, PROVENANCE, FakeClock())
    told = [json.loads(publisher.event(e).line()) for e in story.said if isinstance(e, IncidentEvent)]
    for alert in told:
        ALERT.validate(alert)
    return told


DRAWN = "MMMM MMMM MMMM MMMM aaaa aaaa aaaa aaaa aaaa aaaa aaaa aaaa $"


def test_without_a_say_records_are_what_they_were(tmp_path: Path) -> None:
    plain = Cued(tmp_path / "a").tell(DRAWN)
    recorded = Cued(tmp_path / "b", cues=(Cue("blink", 2.0),)).tell(DRAWN)
    of_stills = Late((Weighed("benford", 1.0, 0.0, 1.0, MOST, {"gain": 0.01}),))
    enabled = Cued(tmp_path / "c", late=of_stills).tell(DRAWN)
    texts = [json.dumps([*records(story), *alerts(story)]) for story in (plain, recorded, enabled)]
    assert "cues" not in texts[0]
    assert texts[2] == texts[0]
    assert '"blink": {"value": 2.0}' in texts[1]
    assert [event.judgement.logit for event in recorded.incidents()] == [
        event.judgement.logit for event in plain.incidents()
    ]


def test_a_cue_with_a_say_is_in_score_verdict_and_alert(tmp_path: Path) -> None:
    plain = Cued(tmp_path / "a").tell(DRAWN)
    cues = (Cue("blink", 0.5), missing("lips", "nobody speaks"))
    moved = Cued(tmp_path / "b", late=LATE, cues=cues).tell(DRAWN)
    told = {"blink": {"value": 0.5, "shift": 0.5}, "lips": {"reason": "nobody speaks"}}
    faces = [face for record in records(moved) if record["type"] == "frame" for face in record["faces"]]
    assert told in [face.get("cues") for face in faces]
    assert told in [record.get("cues") for record in records(moved) if record["type"] == "verdict"]
    (alert, *_), (before, *_) = alerts(moved), alerts(plain)
    assert alert["data"]["cues"] == told
    assert alert["data"]["llr"] - before["data"]["llr"] == pytest.approx(0.5, abs=1e-3)
    assert alert["data"]["members"] == before["data"]["members"]


def test_cues_alone_accuse_nobody(tmp_path: Path) -> None:
    story = Cued(tmp_path, late=LATE, cues=(Cue("blink", 1e9),)).tell("???? ???? ???? ???? ???? $")
    assert story.incidents() == []


def test_what_cues_read_survives_a_restart(tmp_path: Path) -> None:
    whole = Cued(tmp_path / "a", late=LATE, cues=(Cue("blink", 0.5),)).tell(DRAWN)
    broken = Cued(
        tmp_path / "b", late=LATE, cues=(Cue("blink", 0.5),), restart=lambda index: index % 5 == 0
    ).tell(DRAWN)
    assert [*records(broken)] == [*records(whole)]
    assert alerts(broken) == alerts(whole)


def test_the_calibration_is_as_it_was() -> None:
    assert CALIBRATION.shifted(1.25, 5.0, 0.0) == 1.25
