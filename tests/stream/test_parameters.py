"""Codec parameters: what identifies a sequence, in every codec whose size can change in mid-stream."""

from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream import parameters
from stream.parameters import ParameterWatch, read_rotation
from tests.stream import media

SUFFIXES = {"h264": ".ts", "hevc": ".ts", "mpeg2": ".ts", "vp8": ".webm", "vp9": ".webm", "av1": ".mp4"}


def packets_of(folder: Path, codec: str, size: tuple[int, int]) -> tuple[Any, list[Any]]:
    if not media.has_encoder(codec):
        pytest.skip(f"this PyAV has no encoder for {codec}")
    path = folder / f"{size[0]}{SUFFIXES[codec]}"
    media.make_clip(path, codec=codec, size=size, seconds=1.2, gop=10, audio=None)
    return media.demux(path)


@pytest.mark.parametrize("codec", SUFFIXES)
def test_the_same_sequence_goes_on_and_another_size_begins_anew(codec: str, tmp_path: Path) -> None:
    keep, packets = packets_of(tmp_path, codec, (160, 120))
    keep_others, others = packets_of(tmp_path, codec, (192, 128))
    watch = ParameterWatch(packets[0].stream)
    assert sum(packet.is_keyframe for packet in packets) >= 2
    assert [watch.update(packet) for packet in packets] == [False] * len(packets)
    assert (watch.current.width, watch.current.height) == (160, 120)
    assert [watch.update(packet) for packet in others] == [True] + [False] * (len(others) - 1)
    assert (watch.current.width, watch.current.height) == (192, 128)
    keep.close()
    keep_others.close()


def test_a_fresh_decoder_of_a_transport_stream_gets_its_parameter_sets(tmp_path: Path) -> None:
    keep, packets = packets_of(tmp_path, "h264", (160, 120))
    stream = packets[0].stream
    stream.codec_context.extradata = None
    watch = ParameterWatch(stream)
    assert watch.current.extradata == b""
    watch.update(packets[0])
    assert watch.current.extradata.startswith(b"\0\0\0\1\x67")
    keep.close()


def test_what_mp4_cannot_carry_is_not_turned(tmp_path: Path) -> None:
    keep, packets = packets_of(tmp_path, "vp8", (160, 120))
    assert read_rotation(packets[0].stream) == 0
    keep.close()


@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg2video", "mpeg1video", "vp8", "vp9", "av1", "theora"])
@given(data=st.binary(max_size=200), extradata=st.binary(max_size=40))
def test_garbage_has_no_parameters_but_raises_nothing(codec: str, data: bytes, extradata: bytes) -> None:
    found = parameters._sets(codec, av.Packet(data or b"\0"), extradata)
    assert found is None or isinstance(found[0], bytes)
