"""Dead letters: what could not be applied, with everything needed to look at it or replay it (DESIGN 3.9).

A letter is one or more records of the topic `deadletter`, all of one key and in order, the last being the one
at fault (`dead_culprit`). Its id is where that one came from: topic without prefix, partition, offset.
"""

from collections import deque
from collections.abc import Iterable

from stream.errors import Code
from stream.records import SCHEMA, OutRecord, Record

MAX_RECORDS = 128
"""Records kept with one dead letter: at 500 ms a chunk, a minute from the last keyframe. A longer GOP keeps
its newest; `dead_left_out` says how many are missing."""

MAX_BYTES = 64 * 1024 * 1024
"""And bytes: 100 s at 5 Mbit/s, in one transaction."""

MAX_SENTENCE = 1000
"""Characters of the reason: it may quote a stranger."""

MAX_HEADER_BYTES = 32 * 1024
"""Headers of the original larger than this in all are left out: the letter must fit into a record of the same
size, with its own headers."""

MAX_VALUE_BYTES = 8 * 1024 * 1024
"""Default of `media.max_message_bytes`."""

CULPRIT, ORIGIN, CODE, REASON, TIME, LEFT_OUT, CUT = (
    "dead_culprit",
    "dead_origin",
    "dead_code",
    "dead_reason",
    "dead_time",
    "dead_left_out",
    "dead_cut",
)
"""Headers that say why, whence and when; `dead_cut` names what of the original did not fit."""


def newest(records: Iterable[Record]) -> tuple[list[Record], int]:
    """Return the newest of the records, at most MAX_RECORDS and MAX_BYTES, and how many were left out."""
    kept: deque[Record] = deque()
    size = left_out = 0
    for record in records:
        kept.append(record)
        size += len(record.value or b"")
        while len(kept) > MAX_RECORDS or (size > MAX_BYTES and len(kept) > 1):
            size -= len(kept.popleft().value or b"")
            left_out += 1
    return list(kept), left_out


def dead_letters(
    topic: str,
    records: Iterable[Record],
    code: Code,
    sentence: str,
    now_us: int,
    left_out: int = 0,
    max_value_bytes: int = MAX_VALUE_BYTES,
) -> list[OutRecord]:
    """Return one dead letter as records of `topic`, one per given record, the last being the one at fault.

    Headers of the original travel along under their own names; `dead_*` say why, whence and when.
    `left_out` counts records that should be there and are not, besides what goes beyond MAX_RECORDS here. A
    value above `max_value_bytes`, or headers above MAX_HEADER_BYTES, are left out, which `dead_cut` says: the
    letter would be refused by the log, and with it the transaction.
    """
    kept, more = newest(records)
    return [
        _letter(
            topic, record, index == len(kept) - 1, code, sentence, now_us, left_out + more, max_value_bytes
        )
        for index, record in enumerate(kept)
    ]


def _letter(
    topic: str,
    record: Record,
    culprit: bool,
    code: Code,
    sentence: str,
    now_us: int,
    left_out: int,
    max_value_bytes: int,
) -> OutRecord:
    size = sum(len(name.encode()) + len(value) for name, value in record.headers.items())
    long_headers = size > MAX_HEADER_BYTES
    long_value = len(record.value or b"") > max_value_bytes
    cut = ["headers"] * long_headers + ["value"] * long_value
    headers = {
        **({} if long_headers else record.headers),
        "dead_schema": str(SCHEMA).encode(),
        CODE: code.value.encode(),
        REASON: sentence[:MAX_SENTENCE].encode(),
        ORIGIN: f"{record.topic}/{record.partition}/{record.offset}".encode(),
        TIME: str(now_us).encode(),
        CULPRIT: b"1" if culprit else b"0",
        LEFT_OUT: str(left_out).encode(),
    }
    if cut:
        headers[CUT] = " ".join(cut).encode()
    value = b"" if long_value else record.value
    return OutRecord(topic=topic, key=record.key, value=value, headers=headers, timestamp_us=now_us)
