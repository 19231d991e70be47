"""Quiet hours: when alerts below a severity are held back, by the wall clock of a time zone."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class QuietHours:
    """From `begin` to `end` of the zone's clock, on the days on which they begin.

    An `end` at or before `begin` is on the next day: 22:00 to 07:00 is a night, 00:00 to 00:00 a whole day.
    """

    begin: time
    end: time
    zone: ZoneInfo
    days: frozenset[str]

    def until_us(self, now_us: int) -> int | None:
        """Return when the quiet hours end in which UTC microseconds `now_us` lie, None outside of them.

        Hours that touch each other are one: of days that are quiet as a whole the last one's end counts,
        at most a week ahead.
        """
        end = self._end(now_us)
        for _ in DAYS:
            following = None if end is None else self._end(end)
            if following is None or end == following:
                break
            end = following
        return end

    def _end(self, now_us: int) -> int | None:
        now = EPOCH + timedelta(microseconds=now_us)
        today = now.astimezone(self.zone).date()
        for day in (today, today - timedelta(days=1)):
            if DAYS[day.weekday()] not in self.days:
                continue
            last = day if self.end > self.begin else day + timedelta(days=1)
            begin, end = self._at(day, self.begin), self._at(last, self.end)
            if begin <= now_us < end:
                return end
        return None

    def _at(self, day: date, clock: time) -> int:
        # Through UTC: two times of one zone are compared by their clock faces, whatever the season.
        moment = datetime.combine(day, clock, self.zone).astimezone(UTC)
        return (moment - EPOCH) // timedelta(microseconds=1)


def clock_time(text: str) -> time:
    """Return `HH:MM` as a time. Raises ValueError for anything else."""
    hours, colon, minutes = text.partition(":")
    if not (colon and len(hours) == len(minutes) == 2 and hours.isdecimal() and minutes.isdecimal()):
        raise ValueError(f"{text!r} is no time of day")
    return time(int(hours), int(minutes))
