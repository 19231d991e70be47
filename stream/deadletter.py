"""Dead letters: what could not be applied, with everything needed to look at it or replay it (DESIGN 3.9)."""

from collections.abc import Iterable

from stream.errors import Code
from stream.records import SCHEMA, OutRecord, Record

MAX_RECORDS = 128
"""Chunks kept with one dead letter: at 500 ms a chunk, a minute from the last keyframe. A longer GOP keeps
its newest; `dead_left_out` says how many are missing."""


def dead_letters(
    topic: str, records: Iterable[Record], code: Code, sentence: str, now_us: int
) -> list[OutRecord]:
    """Return one dead letter per record, the last being the one at fault.

    Headers of the original travel along under their own names; `dead_*` say why, whence and when.
    """
    kept = list(records)
    left_out = max(0, len(kept) - MAX_RECORDS)
    kept = kept[left_out:]
    return [
        OutRecord(
            topic=topic,
            key=record.key,
            value=record.value,
            headers={
                **record.headers,
                "dead_schema": str(SCHEMA).encode(),
                "dead_code": code.value.encode(),
                "dead_reason": sentence.encode(),
                "dead_origin": f"{record.topic}/{record.partition}/{record.offset}".encode(),
                "dead_time": str(now_us).encode(),
                "dead_culprit": b"1" if index == len(kept) - 1 else b"0",
                "dead_left_out": str(left_out).encode(),
            },
            timestamp_us=now_us,
        )
        for index, record in enumerate(kept)
    ]
