"""One feed as the wall shows it: figures out of its records, and from them where it stands (DESIGN 3.2,
3.9)."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stream.config import Config
from stream.controls import EndReason
from stream.errors import Code
from stream.glimpses import Glimpse
from stream.records import Kind
from stream.windows import MICRO

RATE_S = 6.0
"""The sampled rate is counted over so much time: several commits of detect, which come in bunches."""

MAX_LOOKS = 512
"""Times of sampled pictures kept for that: 60 a second, and room."""

SPARK_POINTS = 60
SPARK_S = 2
"""The sparkline: two minutes, the highest score of every two seconds."""

DROP_S = 30.0
"""A feed of which something was dropped within this is degraded: as long as an operator needs to look up."""

FILE_QUIET_S = 15.0
"""A file of which nothing was read for so long is over, as far as records tell."""


class State(StrEnum):
    """Where a feed stands, as its records and their absence tell. Made anew at every look, so that no
    transition can be missed; `UNWATCHED` needs no record at all."""

    CONNECTING = "connecting"
    LIVE = "live"
    DEGRADED = "degraded"
    SILENT = "silent"
    RECONNECTING = "reconnecting"
    UNWATCHED = "unwatched"
    ENDED = "ended"


RANK: Mapping[State, int] = {
    State.UNWATCHED: 3,
    State.SILENT: 4,
    State.RECONNECTING: 4,
    State.DEGRADED: 5,
    State.CONNECTING: 6,
    State.LIVE: 8,
    State.ENDED: 10,
}
"""The order of trouble on the wall; open incidents stand before all of it."""

SEVERITY_RANK: Mapping[str, int] = {"high": 0, "medium": 1, "low": 2}
UNDECIDED_RANK, MUTED_RANK = 7, 9

ENDS = frozenset(reason.value for reason in EndReason)
"""Codes of `unwatched` events that somebody wanted: the feed came to its end or was taken out."""


@dataclass(frozen=True, slots=True)
class Told:
    """The newest event of a feed: up, down or unwatched."""

    kind: str
    media_us: int
    code: str | None
    sentence: str | None


@dataclass(slots=True)
class FeedRow:
    """What is known of one feed. Times are UTC microseconds: `media_us` of the newest sampled picture,
    `seen_us` when its record was written, `listed_us` when the feed was first seen in the list."""

    stream: str
    listed_us: int
    listed: bool = True
    kind: str = Kind.LIVE.value
    source: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    fps: float | None = None
    refused: str | None = None
    """Why its entry in the list cannot be attached."""
    media_us: int | None = None
    seen_us: int | None = None
    lag_s: float | None = None
    faces: int = 0
    verdict: str | None = None
    reasons: tuple[str, ...] = ()
    probability: float | None = None
    interval: tuple[float, float] | None = None
    told: Told | None = None
    drift: str | None = None
    dropped_us: int = 0
    dropped: str = ""
    incident: str | None = None
    severity: str | None = None
    accused: frozenset[str] = frozenset()
    """Tracks of the open incident, `<attachment>/<epoch>/<track>`."""
    glimpse: Glimpse | None = None
    version: int = 0
    looks: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_LOOKS))
    spark: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=SPARK_POINTS))

    def on_frame(self, score: Mapping[str, Any], written_us: int) -> None:
        """Take a `frame` record of the scores."""
        media_us, faces = int(score["media_us"]), score["faces"]
        self.media_us, self.seen_us, self.faces = media_us, written_us, len(faces)
        self.looks.append(written_us)
        capture_us = score.get("capture_us")
        live = self.kind == Kind.LIVE
        self.lag_s = max(0.0, (written_us - capture_us) / MICRO) if live and capture_us else None
        fused = [face["fused"] for face in faces if face.get("fused") is not None]
        if fused:
            self._spark(media_us, max(fused))

    def on_verdict(self, score: Mapping[str, Any]) -> None:
        """Take a `verdict` record of the scores."""
        self.verdict, self.reasons = score["verdict"], tuple(score["reasons"])
        self.probability = score["probability"]
        self.interval = tuple(score["interval"]) if score["interval"] else None

    def on_dropped(self, score: Mapping[str, Any], written_us: int) -> None:
        self.dropped_us, self.dropped = written_us, str(score["reason"])

    def sampled_fps(self, now_us: int) -> float:
        """Return how many pictures a second were looked at lately."""
        since = now_us - round(RATE_S * MICRO)
        return round(sum(at > since for at in self.looks) / RATE_S, 1)

    def state(self, now_us: int, config: Config) -> tuple[State, str]:
        """Return where the feed stands now, and why, in words ("" where the state says it all)."""
        if not self.listed:
            return State.ENDED, "detached"
        if self.refused is not None:
            return State.UNWATCHED, self.refused
        age_s = None if self.seen_us is None else (now_us - self.seen_us) / MICRO
        if self.kind == Kind.FILE:
            return self._file(age_s)
        silence_s, orphan_s = config.ingest.silence_s, config.incidents.orphan_s
        told = self._told(silence_s)
        if told is not None:
            return told
        if age_s is None:
            waited_s = (now_us - self.listed_us) / MICRO
            if waited_s <= orphan_s:
                return State.CONNECTING, ""
            return (
                State.UNWATCHED,
                f"nothing of it was looked at in {waited_s:.0f} s: are ingest and detect up?",
            )
        if age_s > orphan_s:
            return State.UNWATCHED, f"nothing was looked at for {age_s:.0f} s: are ingest and detect up?"
        if age_s > silence_s:
            return State.SILENT, f"no picture was looked at for {age_s:.0f} s"
        worries = "; ".join(self._worries(now_us, config))
        return (State.DEGRADED, worries) if worries else (State.LIVE, "")

    def _file(self, age_s: float | None) -> tuple[State, str]:
        if age_s is None:
            return State.CONNECTING, ""
        return (
            (State.LIVE, "") if age_s <= FILE_QUIET_S else (State.ENDED, "nothing more is read of this file")
        )

    def _told(self, silence_s: float) -> tuple[State, str] | None:
        """Return what the feed's newest event says, unless it is up or pictures have come since."""
        told = self.told
        if told is None or told.kind == "up":
            return None
        if self.media_us is not None and self.media_us > told.media_us + silence_s * MICRO:
            return None
        sentence = told.sentence or ""
        if told.kind == "unwatched":
            return (State.ENDED if told.code in ENDS else State.UNWATCHED), sentence
        silent = told.code == Code.SOURCE_SILENT
        return (State.SILENT if silent else State.RECONNECTING), sentence

    def _worries(self, now_us: int, config: Config) -> Sequence[str]:
        found = []
        if self.lag_s is not None and self.lag_s > config.freshness.max_staleness_s:
            found.append(f"{self.lag_s:.0f} s behind")
        if self.dropped and now_us - self.dropped_us < DROP_S * MICRO:
            found.append(f"pictures not scored: {self.dropped}")
        if self.drift == "drifted":
            found.append("its faces no longer look like those of the calibration")
        return found

    def rank(self, state: State, muted: bool) -> int:
        """Return the place of the feed in the order of trouble, 0 the worst."""
        if muted and state is not State.ENDED:
            return MUTED_RANK
        if self.incident is not None:
            return SEVERITY_RANK.get(self.severity or "", 2)
        if state is State.LIVE and self.verdict == "inconclusive":
            return UNDECIDED_RANK
        return RANK[state]

    def boxes(self) -> list[dict[str, Any]]:
        """Return the faces of the picture shown: box in shares of the picture, and what holds of each.

        A face is `manipulated` while its track is in the open incident, `inconclusive` with the reasons that
        its quality gave, else what the feed's verdict is if that is not about another face.
        """
        if self.glimpse is None:
            return []
        facts = self.glimpse.facts
        width, height = facts.get("width") or 1, facts.get("height") or 1
        return [
            {
                "box": [
                    round(edge / size, 4)
                    for edge, size in zip(face["box"], (width, height, width, height), strict=True)
                ],
                **self._of_face(face, f"{facts.get('attachment')}/{facts.get('epoch')}/{face['track']}"),
            }
            for face in facts["faces"]
        ]

    def _of_face(self, face: Mapping[str, Any], track: str) -> dict[str, Any]:
        reasons = list(face.get("reasons") or ())
        if track in self.accused:
            return {"verdict": "manipulated", "reasons": []}
        if reasons or self.verdict != "authentic":
            return {"verdict": "inconclusive", "reasons": reasons}
        return {"verdict": "authentic", "reasons": []}

    def _spark(self, media_us: int, fused: float) -> None:
        slot = media_us // (SPARK_S * MICRO)
        if self.spark and self.spark[-1][0] == slot:
            self.spark[-1] = (slot, max(self.spark[-1][1], fused))
        else:
            self.spark.append((slot, fused))

    def sparkline(self) -> list[float | None]:
        """Return SPARK_POINTS scores (logits), the newest last, None where there was no face to score."""
        if not self.spark:
            return []
        by_slot, newest = dict(self.spark), self.spark[-1][0]
        found = [by_slot.get(slot) for slot in range(newest - SPARK_POINTS + 1, newest + 1)]
        return [None if value is None else round(value, 1) for value in found]
