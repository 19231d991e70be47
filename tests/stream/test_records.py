"""Headers from strangers: what they cannot mean is refused, at once and by name."""

from dataclasses import replace
from fractions import Fraction

import pytest

from stream.errors import Code, UnmaskError
from stream.records import FARTHEST_US, ChunkMeta, Kind, check_times, decode_headers, encode_headers

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
