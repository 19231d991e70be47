"""The mean quantiser of a picture is what the bitstream says, and is None where it says nothing."""

from fractions import Fraction

import av
import numpy as np
import pytest

from detectors.quantiser import OPTIONS, mean_qp
from detectors.reference import portrait
from detectors.training.robustness import coded_h264


def test_it_rises_with_the_compression() -> None:
    coded = [coded_h264(portrait()[:320, :320], crf, np.random.default_rng(0))[1] for crf in (18, 28, 38, 48)]
    assert all(qp is not None for qp in coded)
    assert coded == sorted(coded)
    assert all(abs(qp - crf) < 8 for qp, crf in zip(coded, (18, 28, 38, 48), strict=True) if qp is not None)


def frames(codec: str, options: dict[str, str]) -> list[av.VideoFrame]:
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = 128, 96, "yuv420p"
    encoder.time_base = Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(portrait()[:96, :128].copy(), format="rgb24")
    picture = picture.reformat(format="yuv420p")
    picture.pts = 0
    packets = [*encoder.encode(picture), *encoder.encode(None)]
    decoder = av.CodecContext.create(encoder.codec.canonical_name, "r")
    decoder.options = options
    return [frame for packet in [*packets, None] for frame in decoder.decode(packet)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("codec", "options"), [("mpeg2video", OPTIONS), ("libx264", {})])
def test_other_codecs_and_decoders_that_were_not_asked_tell_nothing(
    codec: str, options: dict[str, str]
) -> None:
    decoded = frames(codec, options)
    assert decoded
    assert [mean_qp(frame) for frame in decoded] == [None] * len(decoded)


def test_it_is_the_mean_over_all_macroblocks() -> None:
    frame = frames("libx264", OPTIONS)[0]
    told = frame.side_data.get("VIDEO_ENC_PARAMS")
    assert told is not None
    assert mean_qp(frame) == pytest.approx(float(told.qp_map().mean()))
