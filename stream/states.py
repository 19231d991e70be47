"""Reading the compacted `state` topic: the newest state of every stream of a partition (DESIGN 3.1)."""

import json
from typing import Any

from stream.errors import Code, UnmaskError
from stream.log import Log, TopicPartition
from stream.records import SCHEMA

POSITION_KEY = "#position"
"""Key of the record that repeats the committed position; `#` cannot begin a stream id."""


def read_states(log: Log, partition: TopicPartition) -> dict[str, dict[str, Any]]:
    """Return stream id to newest state. Raises `UnmaskError` (SCHEMA) for a state of another version."""
    newest: dict[str, bytes] = {}
    for record in log.read(partition, log.begin_offset(partition)):
        if record.value is None:
            newest.pop(record.key, None)
        elif record.key != POSITION_KEY:
            newest[record.key] = record.value
    return {stream: _state(stream, value) for stream, value in newest.items()}


def _state(stream: str, value: bytes) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(value)
    if state.get("schema") != SCHEMA:
        raise UnmaskError(
            Code.SCHEMA,
            f"state of {stream} has schema {state.get('schema')!r}; this version reads schema {SCHEMA}",
        )
    return state
