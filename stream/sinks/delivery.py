"""What is delivered and what became of an attempt: the seam between a sink's loop and where it sends to."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from stream.alerts import CloudEvent


class Outcome(StrEnum):
    """Of one attempt."""

    DELIVERED = "delivered"
    AWAY = "away"
    """The receiver does not work now: nothing else is sent to it until it does."""
    REFUSED = "refused"
    """The receiver works and did not take this alert: others go on."""
    GONE = "gone"
    """The receiver wants nothing any more."""


@dataclass(frozen=True, slots=True)
class Result:
    """`reason` is one of few words (a metric's label), `detail` a sentence without secrets.

    `retry_after_s`: how long the receiver asked us to wait.
    """

    outcome: Outcome
    reason: str = ""
    detail: str = ""
    retry_after_s: float | None = None


DELIVERED = Result(Outcome.DELIVERED)


class Target(Protocol):
    """Where a sink sends to. Used by one thread."""

    def deliver(self, event: CloudEvent) -> Result:
        """Try once, within the sink's own bound on time. What it raises is taken for AWAY and logged."""

    def identity(self) -> str:
        """Return what tells this receiver from another, not secret: who is gone is not asked again."""

    def close(self) -> None: ...
