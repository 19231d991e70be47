"""Whether a sink wants an alert: severity, verdict, stream, labels, and how many there are already."""

from collections import deque
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from stream.records import split_stream_id
from stream.sinks.settings import SEVERITIES, Flood, Only
from stream.sinks.state import Alert

Labels = Callable[[str], Mapping[str, str]]
"""Labels of a stream as the list of feeds has them, empty for one that is not listed."""


def wants(only: Only, alert: Alert, labels: Labels) -> bool:
    """Return whether a filter lets an alert through."""
    kind = "feed" if alert.incident is None else "incident"
    if kind not in only.events or not reaches(alert.severity, only.severity):
        return False
    if only.verdicts and alert.incident is not None and alert.event.data.get("verdict") not in only.verdicts:
        return False
    if only.streams and not any(fnmatchcase(alert.stream, pattern) for pattern in only.streams):
        return False
    if not only.labels:
        return True
    # What is decoded again has the labels of its feed.
    base, _ = split_stream_id(alert.stream)
    return labels(base).items() >= only.labels.items()


def reaches(severity: str, least: str) -> bool:
    return SEVERITIES.index(severity) >= SEVERITIES.index(least)


class Rate:
    """Counts what was sent within the last seconds, by the monotonic clock."""

    def __init__(self, flood: Flood) -> None:
        self._most = flood.most
        self._within_s = flood.within_s
        self._sent: deque[float] = deque()

    def full(self, now: float) -> bool:
        while self._sent and now - self._sent[0] >= self._within_s:
            self._sent.popleft()
        return len(self._sent) >= self._most

    def note(self, now: float) -> None:
        self._sent.append(now)
