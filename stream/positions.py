"""Which records are in hand, and so which position may be committed (DESIGN 3.3)."""

from dataclasses import dataclass, field

from stream.log import TopicPartition


@dataclass(slots=True)
class _Partition:
    committed: int
    next_read: int
    in_hand: set[int] = field(default_factory=set)


class Positions:
    """Follows offsets from poll to application, per partition.

    The committed position is the next record to apply: everything below it is applied, whatever the
    order in which streams of one partition finish.
    """

    def __init__(self) -> None:
        self._partitions: dict[TopicPartition, _Partition] = {}

    def assign(self, partition: TopicPartition, committed: int) -> None:
        """Begin to follow `partition`; re-reading below `committed` (warm-up) never moves it back."""
        self._partitions[partition] = _Partition(committed, committed)

    def skip(self, partition: TopicPartition, offset: int) -> None:
        """Reading goes on at `offset`, past what cannot be read; what is in hand still holds the position."""
        state = self._partitions[partition]
        state.next_read = offset
        state.committed = min(state.committed, offset)

    def settled(self, partition: TopicPartition, offset: int) -> bool:
        """Return whether the record lies below the committed position: what it led to is written."""
        return offset < self._partitions[partition].committed

    def forget(self, partition: TopicPartition) -> None:
        self._partitions.pop(partition, None)

    def taken(self, partition: TopicPartition, offset: int) -> None:
        """A record was polled and is being worked on."""
        state = self._partitions[partition]
        state.in_hand.add(offset)
        state.next_read = max(state.next_read, offset + 1)

    def applied(self, partition: TopicPartition, offset: int) -> None:
        """A record is applied, dead-lettered or counted as dropped. Unknown partitions are ignored: a
        record may finish after its partition was revoked."""
        state = self._partitions.get(partition)
        if state is not None:
            state.in_hand.discard(offset)

    def in_hand(self) -> int:
        """Return how many records are being worked on."""
        return sum(len(state.in_hand) for state in self._partitions.values())

    def partitions(self) -> frozenset[TopicPartition]:
        """Return the partitions that are followed."""
        return frozenset(self._partitions)

    def at(self, partition: TopicPartition) -> int:
        """Return the committed position."""
        return self._partitions[partition].committed

    def next_read(self, partition: TopicPartition) -> int:
        """Return the offset after the newest record that was polled."""
        return self._partitions[partition].next_read

    def movable(self) -> dict[TopicPartition, int]:
        """Return the positions that may be committed and are ahead of those that were."""
        ready = {}
        for partition, state in self._partitions.items():
            position = min(state.in_hand, default=state.next_read)
            if position > state.committed:
                ready[partition] = position
        return ready

    def committed(self, positions: dict[TopicPartition, int]) -> None:
        """Note that a transaction moved these positions."""
        for partition, position in positions.items():
            state = self._partitions.get(partition)
            if state is not None:
                state.committed = max(state.committed, position)
