"""The gate's settings reach the detectors, and a picture's quantiser reaches the faces read in it."""

from dataclasses import replace
from pathlib import Path

import pytest

from detectors.limits import QualityLimits
from detectors.quality import measure
from detectors.readings import Quality, Reason
from detectors.reference import portrait
from stream.config import Config, Policy, QualityGate
from stream.gate import RETOUCHED_SKIN_DETAIL, gated, quality_limits
from stream.scores import ScoreRecord
from stream.stills import stills
from tests.stream.decoding import chunked, frames, run
from tests.stream.media import make_clip
from tests.stream.story import Story, face

FACE = (170.0, 108.0, 353.0, 331.0)


def good() -> Quality:
    return measure(portrait(), FACE, None, QualityLimits())


def test_the_settings_are_the_shipped_limits_unless_changed() -> None:
    assert quality_limits(Config()) == QualityLimits()
    changed = quality_limits(Config(quality=QualityGate(max_qp=30.0, max_moire=0.0)))
    assert changed == replace(QualityLimits(), max_qp=30.0, max_moire=0.0)


def test_retouched_faces_are_edited_only_where_the_policy_says_so() -> None:
    assert quality_limits(Config()).min_skin_detail == 0
    flagging = quality_limits(Config(policy=Policy(retouch="flag")))
    assert flagging.min_skin_detail == RETOUCHED_SKIN_DETAIL


def test_a_coarsely_quantised_picture_decides_nothing() -> None:
    reading = replace(face(3.0), quality=good())
    limits = QualityLimits()
    assert gated([reading], None, limits) == (reading,)
    (fine,) = gated([reading], 20.0, limits)
    (coarse,) = gated([reading], 50.0, limits)
    assert fine.quality.reasons == ()
    assert coarse.quality.reasons == (Reason.COMPRESSION,)
    assert gated([coarse], 50.0, limits) == (coarse,)
    assert coarse.logits == reading.logits


def test_manipulated_faces_of_coarse_pictures_accuse_nobody(tmp_path: Path) -> None:
    reading = replace(face(6.0), quality=good())
    said = {}
    for qp in (None, 50.0):
        story = Story(tmp_path / str(qp))
        for _ in range(30):
            (frame, *rest) = story.teller.tell("a")
            assert hasattr(frame, "faces")
            story.apply(replace(frame, faces=(reading,), qp=qp))  # type: ignore[arg-type]
            for event in rest:
                story.apply(event)
        said[qp] = story
    assert said[None].verdicts()[-1][1] == "manipulated"
    assert said[50.0].verdicts()[-1][1:] == ("inconclusive", "COMPRESSION")
    records = [output.as_json() for output in said[50.0].said if isinstance(output, ScoreRecord)]
    assert {record["faces"][0]["quality_parts"]["qp"] for record in records} == {50.0}


@pytest.mark.parametrize(("codec", "tells"), [("h264", True), ("mpeg2", False)])
def test_decoded_pictures_carry_their_quantiser(tmp_path: Path, codec: str, tells: bool) -> None:
    path = make_clip(tmp_path / "clip.ts", codec=codec, seconds=0.5)
    live = [frame.qp for frame in frames(run(chunked(path)))]
    filed = [still.qp for still in stills(path, lambda: 25.0, 640)]
    for qps in (live, filed):
        assert qps
        assert all((qp is not None and 0 <= qp <= 51) is tells for qp in qps)
