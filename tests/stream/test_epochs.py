"""Epochs: when timestamps break, and that media time never steps back across a break."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.epochs import Cause, Epochs, Stamp, Times
from stream.records import Kind

TS = Fraction(1, 90_000)
FRAME = 3600
"""One frame at 25 fps in TS ticks."""

START_US = 1_700_000_000_000_000


def times(
    pts: int | None,
    dts: int | None = None,
    *,
    keyframe: bool = False,
    hidden: bool = False,
    duration: int | None = FRAME,
    time_base: Fraction = TS,
) -> Times:
    return Times(pts, dts, duration, time_base, keyframe, hidden)


def run(
    packets: list[Times],
    kind: Kind = Kind.FILE,
    *,
    wall_s: float = 0.04,
    changed: tuple[int, ...] = (),
    not_before_us: int = 0,
) -> tuple[Epochs, list[Stamp]]:
    """Step through `packets`, `wall_s` apart on the wall clock."""
    epochs = Epochs(kind, START_US, not_before_us)
    stamps = [
        epochs.step(packet, START_US + round(index * wall_s * 1e6), index in changed)
        for index, packet in enumerate(packets)
    ]
    return epochs, stamps


def steady(count: int, start: int = 0) -> list[Times]:
    """Return frames with dts = pts at 25 fps, the first a keyframe."""
    return [times(start + n * FRAME, start + n * FRAME, keyframe=n == 0) for n in range(count)]


def causes(stamps: list[Stamp]) -> list[Cause]:
    seen = {stamp.epoch.number: stamp.epoch.cause for stamp in stamps}
    return [seen[number] for number in sorted(seen)]


@pytest.mark.parametrize("start", [0, 5 * 90_000, -154_592, 2**33 - 10 * FRAME])
@pytest.mark.parametrize("kind", list(Kind))
def test_a_stream_may_start_anywhere(start: int, kind: Kind) -> None:
    epochs, stamps = run(steady(50, start), kind)
    assert causes(stamps) == [Cause.FIRST]
    assert stamps[0].epoch.anchor_us == START_US
    assert stamps[0].epoch.first_pts == start
    assert epochs.end_us == START_US + 2_000_000


@pytest.mark.parametrize("fallen_to", [0, 200 * FRAME])
def test_timestamps_that_fall_start_an_epoch(fallen_to: int) -> None:
    _, stamps = run(steady(300, 200 * FRAME) + steady(50, fallen_to))
    assert causes(stamps) == [Cause.FIRST, Cause.BACKWARD]
    assert stamps[300].epoch.first_pts == fallen_to


def test_a_publisher_may_restart_within_its_first_second() -> None:
    _, stamps = run(steady(10) + steady(10))
    assert causes(stamps) == [Cause.FIRST, Cause.BACKWARD]


def test_jitter_is_no_new_epoch() -> None:
    packets = steady(50)
    packets[20] = replace(packets[20], pts=15 * FRAME, dts=15 * FRAME)
    _, stamps = run(packets)
    assert causes(stamps) == [Cause.FIRST]


def test_b_frames_without_dts_are_no_new_epoch() -> None:
    order = [0, 4, 2, 1, 3, 8, 6, 5, 7]
    slow = 90_000
    packets = [times(n * slow, None, keyframe=n == 0, duration=slow) for n in order]
    _, stamps = run(packets)
    assert causes(stamps) == [Cause.FIRST]
    assert [stamp.pts for stamp in stamps] == [n * slow for n in order]


def test_dts_that_appear_late_are_no_new_epoch() -> None:
    """Matroska gives no dts for the first packets, then goes on from 0."""
    packets = [times(0, None, keyframe=True), times(3 * FRAME), times(FRAME, 0), times(2 * FRAME, FRAME)]
    assert causes(run(packets)[1]) == [Cause.FIRST]


def test_a_live_leap_starts_an_epoch_unless_the_wall_clock_explains_it() -> None:
    packets = steady(50) + steady(50, 50 * FRAME + 30 * 90_000)
    assert causes(run(packets, Kind.LIVE)[1]) == [Cause.FIRST, Cause.FORWARD]
    epochs = Epochs(Kind.LIVE, START_US)
    stamps = []
    for packet in packets:
        assert packet.pts is not None
        stamps.append(epochs.step(packet, START_US + packet.pts * 100 // 9, changed=False))
    assert causes(stamps) == [Cause.FIRST]


def test_a_file_may_show_one_picture_for_long() -> None:
    slides = [times(n * 30 * 90_000, n * 30 * 90_000, keyframe=n == 0) for n in range(5)]
    assert causes(run(slides)[1]) == [Cause.FIRST]
    leap = steady(5) + steady(5, 1000 * 90_000)
    assert causes(run(leap)[1]) == [Cause.FIRST, Cause.FORWARD]


def test_changed_parameters_start_an_epoch() -> None:
    _, stamps = run(steady(50), changed=(25,))
    assert causes(stamps) == [Cause.FIRST, Cause.PARAMETERS]
    assert [stamp.epoch.number for stamp in stamps] == [0] * 25 + [1] * 25


@pytest.mark.parametrize(("bits", "time_base"), [(33, TS), (32, Fraction(1, 1000))])
@pytest.mark.parametrize("kind", list(Kind))
def test_a_wrap_is_carried_on(bits: int, time_base: Fraction, kind: Kind) -> None:
    """With B-frames: pts wraps before dts does, and comes back for a few packets."""
    step = int(time_base.denominator / 25)
    start = 2**bits - 20 * step
    order = [n // 4 * 4 + (0, 3, 1, 2)[n % 4] for n in range(60)]
    exact = [(start + (shown + 3) * step, start + n * step) for n, shown in enumerate(order)]
    packets = [
        times(pts % 2**bits, dts % 2**bits, keyframe=pts == exact[0][0], time_base=time_base, duration=step)
        for pts, dts in exact
    ]
    _, stamps = run(packets, kind)
    assert causes(stamps) == [Cause.FIRST]
    assert [(stamp.pts, stamp.dts) for stamp in stamps] == exact


def test_audio_follows_the_video_beyond_a_wrap() -> None:
    epochs, _ = run(
        [times(pts % 2**33, pts % 2**33) for pts in range(2**33 - 10 * FRAME, 2**33 + 10 * FRAME, FRAME)]
    )
    assert epochs.near_video(5 * FRAME, TS) == 2**33 + 5 * FRAME
    assert epochs.near_video(2**33 - 50, TS) == 2**33 - 50
    assert epochs.near_video(480, Fraction(1, 48_000)) == 480


def test_packets_without_any_timestamps_get_even_ones() -> None:
    packets = [times(None, None, keyframe=n == 0, duration=None) for n in range(5)]
    _, stamps = run(packets)
    assert [stamp.pts for stamp in stamps] == [n * FRAME for n in range(5)]


def test_without_pts_dts_stands_in() -> None:
    packets = [times(None, n * FRAME, keyframe=n == 0) for n in range(5)]
    assert [stamp.pts for stamp in run(packets)[1]] == [n * FRAME for n in range(5)]


def test_hidden_pictures_come_before_the_anchor() -> None:
    """MP4 edit lists: decoding begins before 0, showing at 0."""
    packets = [times((n - 10) * FRAME, (n - 10) * FRAME, keyframe=n == 0, hidden=n < 10) for n in range(20)]
    epochs, stamps = run(packets)
    assert stamps[0].epoch.first_pts == 0
    assert stamps[10].epoch.media_us(stamps[10].pts) == START_US
    assert epochs.end_us == START_US + 400_000


def test_media_time_of_a_file_is_continuous() -> None:
    _, stamps = run(steady(50, 7000) + steady(50, 10**9) + steady(50, 0))
    media = [stamp.epoch.media_us(stamp.pts) for stamp in stamps]
    assert causes(stamps) == [Cause.FIRST, Cause.FORWARD, Cause.BACKWARD]
    assert media == pytest.approx([START_US + n * 40_000 for n in range(150)], abs=5)


def test_live_anchors_are_capture_times_but_never_before_the_end_of_what_was() -> None:
    late = run(steady(50) + steady(50), Kind.LIVE, wall_s=0.1)[1]
    assert late[50].epoch.anchor_us == START_US + 5_000_000
    early = run(steady(50) + steady(50), Kind.LIVE, wall_s=0.001)[1]
    assert early[50].epoch.anchor_us == START_US + 2_000_000 + 1
    _, after = run(steady(5), Kind.LIVE, not_before_us=START_US + 9_000_000)
    assert after[0].epoch.anchor_us == START_US + 9_000_000 + 1


@st.composite
def broken_streams(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Return stretches of (pts, dts), legal in themselves: dts rises, pts is not below it; each stretch
    starts somewhere else."""
    stretches = []
    for _ in range(draw(st.integers(1, 5))):
        dts = draw(st.integers(-(10**6), 10**9))
        stretch = []
        for _ in range(draw(st.integers(1, 12))):
            stretch.append((dts + draw(st.integers(0, 4)) * FRAME, dts))
            dts += draw(st.integers(1, 3)) * FRAME
        stretches.append(stretch)
    return stretches


@given(
    stretches=broken_streams(),
    kind=st.sampled_from(list(Kind)),
    wall_s=st.floats(0, 2),
    with_dts=st.booleans(),
    data=st.data(),
)
def test_media_time_never_steps_back_across_epochs(
    stretches: list[list[tuple[int, int]]], kind: Kind, wall_s: float, with_dts: bool, data: st.DataObject
) -> None:
    packets = [
        times(pts, dts if with_dts else None, keyframe=n == 0)
        for stretch in stretches
        for n, (pts, dts) in enumerate(stretch)
    ]
    heads = [sum(map(len, stretches[:n])) for n in range(len(stretches))]
    changed = data.draw(st.sets(st.sampled_from(heads)))
    _, stamps = run(packets, kind, wall_s=wall_s, changed=tuple(changed))
    end_us = 0
    for number in range(stamps[-1].epoch.number + 1):
        media = [s.epoch.media_us(s.pts) for s in stamps if s.epoch.number == number]
        assert min(media) >= end_us
        end_us = max(media)
