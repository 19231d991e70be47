"""Quiet hours follow the wall clock, over midnight and over changes of the season."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.sinks.quiet import DAYS, QuietHours, clock_time

ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "Pacific/Apia")
WEEK = frozenset(DAYS)

clocks = st.builds(time, st.integers(0, 23), st.integers(0, 59))
moments = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))


def us(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def berlin(text: str) -> int:
    return us(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC))


NIGHT = QuietHours(time(22), time(7), ZoneInfo("Europe/Berlin"), WEEK)


@pytest.mark.parametrize(
    ("now", "end"),
    [
        ("2026-01-10T21:59:59", None),
        ("2026-01-10T22:00:00", "2026-01-11T07:00:00"),
        ("2026-01-11T06:59:59", "2026-01-11T07:00:00"),
        ("2026-01-11T07:00:00", None),
        ("2026-03-28T23:00:00", "2026-03-29T07:00:00"),  # the clock goes forward
        ("2026-10-24T23:00:00", "2026-10-25T07:00:00"),  # and back
    ],
)
def test_a_night(now: str, end: str | None) -> None:
    assert NIGHT.until_us(berlin(now)) == (None if end is None else berlin(end))


def test_only_nights_that_begin_on_the_given_days() -> None:
    weekend = QuietHours(time(22), time(7), ZoneInfo("UTC"), frozenset({"fri", "sat"}))
    friday = datetime(2026, 1, 9, 23, tzinfo=UTC)
    assert weekend.until_us(us(friday)) is not None
    assert weekend.until_us(us(friday + timedelta(hours=26))) is not None, "one o'clock on Sunday"
    assert weekend.until_us(us(friday + timedelta(days=2))) is None, "Sunday night"
    assert weekend.until_us(us(friday - timedelta(days=1))) is None


def test_hours_that_touch_are_one() -> None:
    weekend = QuietHours(time(0), time(0), ZoneInfo("UTC"), frozenset({"sat", "sun"}))
    saturday = datetime(2026, 1, 10, 12, tzinfo=UTC)
    assert weekend.until_us(us(saturday)) == us(datetime(2026, 1, 12, tzinfo=UTC))


@given(begin=clocks, end=clocks, zone=st.sampled_from(ZONES), at=moments, days=st.sets(st.sampled_from(DAYS)))
def test_inside_is_what_the_clock_on_the_wall_says(
    begin: time, end: time, zone: str, at: datetime, days: set[str]
) -> None:
    hours = QuietHours(begin, end, ZoneInfo(zone), frozenset(days))
    local = at.astimezone(ZoneInfo(zone))
    offsets = {(at + timedelta(hours=h)).astimezone(ZoneInfo(zone)).utcoffset() for h in range(-48, 49, 1)}
    until = hours.until_us(us(at))
    if len(offsets) > 1:
        return  # the season changes: the table above has what is right then
    clock, today = local.time(), DAYS[local.weekday()]
    yesterday = DAYS[(local.weekday() - 1) % 7]
    if begin < end:
        inside = today in days and begin <= clock < end
    else:
        inside = (today in days and clock >= begin) or (yesterday in days and clock < end)
    assert (until is not None) == inside


@given(begin=clocks, end=clocks, zone=st.sampled_from(ZONES), at=moments, days=st.sets(st.sampled_from(DAYS)))
def test_they_end_and_what_follows_is_not_quiet(
    begin: time, end: time, zone: str, at: datetime, days: set[str]
) -> None:
    hours = QuietHours(begin, end, ZoneInfo(zone), frozenset(days))
    until = hours.until_us(us(at))
    if until is None:
        return
    assert us(at) < until <= us(at + timedelta(days=9))
    assert hours.until_us(until - 1) is not None
    always = begin == end and days == set(DAYS)
    assert always or hours.until_us(until) is None


@given(st.text(max_size=6))
def test_a_time_of_day_is_two_and_two_digits(text: str) -> None:
    try:
        found = clock_time(text)
    except ValueError:
        return
    assert len(text) == 5
    assert found == time(int(text[:2]), int(text[3:]))


@given(clocks)
def test_every_time_of_day_is_read(clock: time) -> None:
    assert clock_time(clock.strftime("%H:%M")) == clock
