"""Reading the compacted `state` topic: the newest state of every stream of a partition (DESIGN 3.1)."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stream.clock import Clock, Deadline
from stream.errors import Code, UnmaskError
from stream.log import Readable, TopicPartition
from stream.records import SCHEMA

logger = logging.getLogger(__name__)

AGREE_S = 15.0
"""Longest wait for position and states to agree: longer than any transaction stays open."""
AGREE_NAP_S = 0.1

POSITION_KEY = "#position"
"""Key of the record that repeats the committed position; `#` cannot begin a stream id, and what else begins
with it belongs to others (ingest keeps where its attachments are)."""


@dataclass(frozen=True, slots=True)
class PartitionState:
    """The newest state of each stream, and the position that was committed with them; None: none yet."""

    position: int | None
    streams: Mapping[str, dict[str, Any]]


def read_partition(log: Readable, partition: TopicPartition) -> PartitionState:
    """Read a partition of `state` to its end; raises `UnmaskError` (SCHEMA) for states of other versions."""
    newest: dict[str, bytes] = {}
    for record in log.read(partition, log.begin_offset(partition)):
        if record.value is None:
            newest.pop(record.key, None)
        elif record.key == POSITION_KEY or not record.key.startswith("#"):
            newest[record.key] = record.value
    position = newest.pop(POSITION_KEY, None)
    return PartitionState(
        None if position is None else int(position),
        {stream: _state(stream, value) for stream, value in newest.items()},
    )


def read_states(log: Readable, partition: TopicPartition) -> Mapping[str, dict[str, Any]]:
    """Return stream id to newest state. Raises `UnmaskError` (SCHEMA) for a state of another version."""
    return read_partition(log, partition).streams


def read_agreeing(
    log: Readable, partition: TopicPartition, committed: Callable[[], int | None], clock: Clock
) -> tuple[int | None, PartitionState]:
    """Return the committed position and the states that were committed with it (DESIGN 3.1).

    They were written in one transaction, but are asked for one after the other: what lies between is awaited.
    Raises `UnmaskError` (LOG_POSITION) naming both if they do not come to agree within AGREE_S.
    """
    deadline = Deadline(AGREE_S, clock)
    while True:
        position, found = committed(), read_partition(log, partition)
        if found.position == position or (found.position is None and not found.streams):
            return position, found
        if deadline.passed():
            break
        clock.sleep(AGREE_NAP_S)
    if position is None:
        # Kafka forgets the positions of a group that was empty for a week; the states know theirs.
        logger.warning("%s: the group has no position; the states' is %s", partition, found.position)
        return found.position, found
    raise UnmaskError(
        Code.LOG_POSITION,
        f"the group's position in partition {partition.partition} is {position} and its states were written "
        f"at {found.position}; set the group back to {found.position}, or nothing can be counted once",
    )


def _state(stream: str, value: bytes) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(value)
    if state.get("schema") != SCHEMA:
        raise UnmaskError(
            Code.SCHEMA,
            f"state of {stream} has schema {state.get('schema')!r}; this version reads schema {SCHEMA}",
        )
    return state
