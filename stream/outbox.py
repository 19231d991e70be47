"""What waits for the next transaction, with the partition it came of: lost with it, never without."""

from collections.abc import Collection
from dataclasses import dataclass

from stream.log import TopicPartition
from stream.records import OutRecord


@dataclass(frozen=True, slots=True)
class _Item:
    partition: TopicPartition
    record: OutRecord
    urgent: bool
    capture_us: int | None


class Outbox:
    """Bounded by what the worker has in hand: nothing more is read while the log takes nothing."""

    def __init__(self) -> None:
        self._items: list[_Item] = []

    def add(
        self,
        partition: TopicPartition,
        record: OutRecord,
        urgent: bool = False,
        capture_us: int | None = None,
    ) -> None:
        """Queue a record. `urgent` ones wait for no interval; `capture_us` is the receipt behind an event."""
        self._items.append(_Item(partition, record, urgent, capture_us))

    def records(self) -> list[OutRecord]:
        return [item.record for item in self._items]

    def partitions(self) -> set[TopicPartition]:
        return {item.partition for item in self._items}

    @property
    def urgent(self) -> bool:
        return any(item.urgent for item in self._items)

    def captures(self) -> list[int]:
        """Return the receipt times (UTC microseconds) behind the events that wait."""
        return [item.capture_us for item in self._items if item.capture_us]

    def clear(self) -> None:
        """Forget everything: it is written."""
        self._items = []

    def lose(self, partitions: Collection[TopicPartition]) -> None:
        """Forget what came of `partitions`: who has them now will say it."""
        self._items = [item for item in self._items if item.partition not in partitions]
