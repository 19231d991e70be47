"""`unmask coverage`: how much of a stream was watched, from the records in the data folder (DESIGN 3.4)."""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from stream.assemble import log_folder, open_embedded
from stream.clock import SystemClock
from stream.config import Config
from stream.coverage import Coverage, cover
from stream.errors import Code, UnmaskError
from stream.log import Log, everything
from stream.records import Topic, check_stream_id
from stream.topics import topic_name
from stream.windows import MICRO


def run(
    settings: Config, stream: str, begin: datetime | None, end: datetime | None, as_json: bool, out: TextIO
) -> int:
    """Write the coverage of `stream` between `begin` and `end` (UTC) to `out`; return the exit code.

    Raises `UnmaskError` (SOURCE_NOT_FOUND) if nothing was ever recorded of it, (CONFIG) for an empty period.
    """
    check_stream_id(stream)
    if not log_folder(settings).is_dir():
        raise _unknown(settings, stream)
    log = open_embedded(settings, SystemClock())
    try:
        covered = _covered(settings, log, stream, begin, end)
    finally:
        log.close()
    out.write(json.dumps(covered.as_json()) + "\n" if as_json else "\n".join(lines(covered)) + "\n")
    return 0


def score_records(settings: Config, log: Log, stream: str) -> Iterator[dict[str, Any]]:
    """Yield the values of a stream's `scores` records, in order."""
    for record in everything(log, topic_name(settings, Topic.SCORES)):
        if record.key == stream and record.value is not None:
            yield json.loads(record.value)


def lines(covered: Coverage) -> list[str]:
    """Return the coverage as lines for a person."""
    told = [
        f"{covered.stream}, {_shown(covered.from_us)} to {_shown(covered.to_us)}, {covered.total_s:.1f} s",
        f"  watched {covered.watched_s:.1f} s in {covered.frames} pictures with {covered.faces} faces",
    ]
    for name, amounts in (
        ("said", covered.decided_s),
        ("inconclusive", covered.inconclusive_s),
        ("not watched", covered.unwatched_s),
    ):
        if amounts:
            told.append(
                f"  {name}: " + ", ".join(f"{key} {seconds:.1f} s" for key, seconds in amounts.items())
            )
    told.append(f"  incidents: {', '.join(covered.incidents) or 'none'}")
    return told


def _covered(
    settings: Config, log: Log, stream: str, begin: datetime | None, end: datetime | None
) -> Coverage:
    period = _period(score_records(settings, log, stream))
    if period is None:
        raise _unknown(settings, stream)
    from_us = period[0] if begin is None else _microseconds(begin)
    to_us = period[1] if end is None else _microseconds(end)
    if to_us <= from_us:
        raise UnmaskError(
            Code.CONFIG, f"--to is {_shown(to_us)}; it must be later than --from, {_shown(from_us)}"
        )
    return cover(stream, score_records(settings, log, stream), from_us, to_us)


def _period(records: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the first and last media time of pictures, looked at or dropped."""
    ends: tuple[int, int] | None = None
    for record in records:
        if record["type"] == "verdict":
            continue
        ranged = record["type"] == "dropped"
        first, last = (record["first_us"], record["last_us"]) if ranged else (record["media_us"],) * 2
        ends = (first, last) if ends is None else (min(first, ends[0]), max(last, ends[1]))
    return ends


def _unknown(settings: Config, stream: str) -> UnmaskError:
    return UnmaskError(
        Code.SOURCE_NOT_FOUND,
        f"nothing is recorded of stream {stream!r} in {settings.data_dir}; name one that was watched there",
    )


def _microseconds(time: datetime) -> int:
    return round((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * MICRO)


def _shown(us: int) -> str:
    return datetime.fromtimestamp(us / MICRO, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
