"""How much of a stream was looked at: sampled frames against time shown and time dropped (DESIGN 3.8)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from stream.frames import Dropped
from stream.verdicts import CORRUPT, Sampled
from stream.windows import MICRO


class Looked:
    """The sampled frames and dropped ranges of the last `keep_us` of media time. `fps` is the least rate (Hz)
    at which frames should have been sampled."""

    def __init__(self, keep_us: int, fps: float) -> None:
        self._keep_us = keep_us
        self._fps = fps
        self._marks: list[tuple[int, bool]] = []
        self._gaps: list[tuple[int, int, str]] = []
        self._place: tuple[str, int] | None = None

    def set_fps(self, fps: float) -> None:
        self._fps = fps

    def frame(self, media_us: int, place: tuple[str, int]) -> None:
        """Note a frame at `place`, attachment and epoch: across places nothing was shown between frames."""
        self._marks.append((media_us, self._place == place))
        self._place = place
        self._forget(media_us)

    def drop(self, dropped: Dropped) -> None:
        """Note a range that was shown and not scored."""
        if dropped.last_us > dropped.first_us:
            self._gaps.append((dropped.first_us, dropped.last_us, dropped.reason))
        self._forget(dropped.last_us)

    def since(self, from_us: int, now_us: int) -> Sampled:
        """Return how much of [from_us, now_us] was looked at, the lesser of two shares.

        By time: what was not dropped. By frames: those sampled against those due at the least rate. Only time
        in which the stream showed pictures counts; what lies between epochs does not, or a publisher that
        reconnects all the time would never be judged.
        """
        marks = [mark for mark in self._marks if from_us <= mark[0] <= now_us]
        overlaps = [(min(last, now_us) - max(first, from_us), reason) for first, last, reason in self._gaps]
        lost_us = sum(overlap for overlap, _ in overlaps if overlap > 0)
        corrupt_us = sum(overlap for overlap, reason in overlaps if overlap > 0 and reason == CORRUPT)
        corrupt = corrupt_us * 2 > lost_us
        if not marks:
            return Sampled(0.0, corrupt)
        shown_us = sum(after[0] - before[0] for before, after in pairwise(marks) if after[1])
        after_us = sum(max(0, min(last, now_us) - max(first, marks[-1][0])) for first, last, _ in self._gaps)
        stretches = 1 + sum(not joined for _, joined in marks[1:])
        whole_us = max(shown_us + after_us, lost_us)
        by_time = 1.0 - lost_us / whole_us if whole_us else 1.0
        due = stretches + (shown_us + after_us) / MICRO * self._fps
        return Sampled(min(by_time, len(marks) / due, 1.0), corrupt)

    def state(self) -> dict[str, Any]:
        return {
            "marks": [list(mark) for mark in self._marks],
            "gaps": [list(gap) for gap in self._gaps],
            "place": list(self._place) if self._place else None,
        }

    def restore(self, fields: dict[str, Any]) -> None:
        place: Sequence[Any] | None = fields["place"]
        self._marks = [(mark[0], mark[1]) for mark in fields["marks"]]
        self._gaps = [(gap[0], gap[1], gap[2]) for gap in fields["gaps"]]
        self._place = (place[0], place[1]) if place else None

    def _forget(self, now_us: int) -> None:
        oldest = now_us - self._keep_us
        self._marks = [mark for mark in self._marks if mark[0] > oldest]
        self._gaps = [gap for gap in self._gaps if gap[1] > oldest]
