"""The canary: a marked clip that travels the real path and must be noticed (DESIGN 3.10).

A stream `canary~N` for each partition N of `media`. Workers read its frames with the engine and with the
member `marker`, and answer an incident on a topic of the canary's own. Nothing of it reaches scores, alerts,
evidence or states.
"""

import json
from typing import Any, cast

from stream import marker
from stream.aggregate import StreamAggregate
from stream.config import Config, Sampling, Verdict
from stream.evidence import SCHEME, EvidenceStore
from stream.incidents import IncidentEvent
from stream.records import CANARY, SCHEMA, OutRecord

SETTINGS = Config(
    prefix=CANARY,
    sampling=Sampling(idle_fps=2.0, burst_fps=2.0),
    verdict=Verdict(min_track_s=0.5, min_samples=2, open_hold_s=0.5),
)
"""Its own, so that nobody's settings can silence it: of some six pictures the third opens an incident."""


class _NoEvidence:
    """Keeps nothing: what a canary shows is no evidence of anything."""

    def put(self, data: bytes, suffix: str) -> str:
        return SCHEME + "0" * 64


def canary_id(partition: int) -> str:
    """Return the stream of a partition's canary."""
    return f"{CANARY}~{partition}"


def canary_aggregate(stream: str) -> StreamAggregate:
    """Return what judges a canary."""
    nothing = cast("EvidenceStore", _NoEvidence())
    return StreamAggregate(stream, SETTINGS, marker.CALIBRATION, marker.PROVENANCE, nothing)


def canary_record(topic: str, event: IncidentEvent, now_us: int) -> OutRecord:
    """Return the answer to the canary in which an incident was seen."""
    value: dict[str, Any] = {
        "stream": event.stream,
        "attachment": event.moment.attachment,
        "media_us": event.moment.media_us,
        "engine": event.moment.engine,
    }
    headers = {"schema": str(SCHEMA).encode(), "content-type": b"application/json"}
    return OutRecord(topic, event.stream, json.dumps(value).encode(), headers, now_us)
