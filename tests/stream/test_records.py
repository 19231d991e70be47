"""Headers from strangers: what they cannot mean is refused, at once and by name."""

from dataclasses import replace
from fractions import Fraction

import pytest

from stream.errors import Code, UnmaskError
from stream.records import (
    FARTHEST_US,
    ChunkMeta,
    Kind,
    check_stream_id,
    check_times,
    decode_headers,
    encode_headers,
    is_canary,
    is_replay,
    split_stream_id,
)

META = ChunkMeta("cam", "0" * 16, 0, 0, Kind.LIVE, 0, 0, Fraction(1, 25), 0, 0, True, None, "video/mp2t", "")


@pytest.mark.parametrize("base", ["1e999999999", "0.04", "1/0", "0/1", "-1/25", "1", ""])
def test_a_time_base_is_two_whole_numbers(base: str) -> None:
    with pytest.raises(UnmaskError, match="time_base"):
        decode_headers("cam", {**encode_headers(META), "time_base": base.encode()})


@pytest.mark.parametrize(
    ("meta", "name"),
    [
        (replace(META, capture_us=FARTHEST_US + 1), "capture_time"),
        (replace(META, epoch_anchor_us=-FARTHEST_US - 1), "epoch_anchor"),
        (replace(META, epoch_anchor_us=10**4000), "epoch_anchor"),
        (replace(META, pts=2**62), "pts"),
    ],
)
def test_times_that_are_no_dates_are_refused(meta: ChunkMeta, name: str) -> None:
    with pytest.raises(UnmaskError, match=f"^{name} ") as found:
        decode_headers("cam", encode_headers(meta))
    assert found.value.code is Code.CHUNK_INVALID


def test_the_packets_of_a_chunk_may_not_lie_farther_than_its_header() -> None:
    check_times(META, [0, 250])
    with pytest.raises(UnmaskError, match=r"^pts "):
        check_times(META, [0, 2**62])


@pytest.mark.parametrize(
    ("stream", "parts"),
    [
        ("cam", ("cam", "")),
        ("cam~replay", ("cam", "replay")),
        ("canary~17", ("canary", "17")),
        ("a" * 64 + "~replay", ("a" * 64, "replay")),
    ],
)
def test_reserved_ids_tell_what_they_are_of(stream: str, parts: tuple[str, str]) -> None:
    assert split_stream_id(stream) == parts
    assert decode_headers(stream, encode_headers(META)).stream == stream
    assert is_replay(stream) == (parts[1] == "replay")
    assert is_canary(stream) == (parts[0] == "canary")


@pytest.mark.parametrize(
    "stream", ["cam~other", "cam~1", "~replay", "cam~replay~replay", "canary~", "Cam", ""]
)
def test_other_ids_with_a_tilde_are_nobodys(stream: str) -> None:
    with pytest.raises(UnmaskError, match="stream id"):
        split_stream_id(stream)
    with pytest.raises(UnmaskError, match="stream id"):
        decode_headers(stream, encode_headers(META))


@pytest.mark.parametrize("stream", ["cam~replay", "canary~0"])
def test_no_user_gets_a_reserved_id(stream: str) -> None:
    with pytest.raises(UnmaskError, match="stream id"):
        check_stream_id(stream)


@pytest.mark.parametrize(("part", "parts"), [(1, 1), (-1, 2), (0, 0), (3, 2)])
def test_a_part_lies_within_its_parts(part: int, parts: int) -> None:
    with pytest.raises(UnmaskError, match="header part is"):
        decode_headers("cam", encode_headers(replace(META, part=part, parts=parts)))
