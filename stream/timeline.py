"""What was watched and found in one stream, added up for the end of `watch`, and drawn as a picture."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from stream import config
from stream.coverage import Coverage, cover
from stream.windows import MICRO

MAX_POINTS = 20_000
"""Points kept per curve: above, every second one is dropped. A picture 1200 pixels wide shows no more."""

VERDICT_COLOURS: Mapping[str, str] = {
    "authentic": "tab:green",
    "manipulated": "tab:red",
    "inconclusive": "tab:olive",
}

INCHES, DPI = (10.0, 4.0), 120

MEMBERS_SHARE = 0.5
"""Height of the curves of single members, in heights of what is made of them."""


@dataclass(frozen=True, slots=True)
class IncidentSpan:
    """One incident as last told. Media time in UTC microseconds."""

    id: str
    first_us: int
    last_us: int
    severity: str
    probability: float | None
    interval: tuple[float, float] | None
    suggested_action: str
    retracted: bool


@dataclass(frozen=True, slots=True)
class Said:
    """What a verdict record says, valid until the next one."""

    media_us: int
    verdict: str
    probability: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What was watched and found in one stream. `dropped` counts pictures by reason."""

    coverage: Coverage
    dropped: Mapping[str, int]
    incidents: tuple[IncidentSpan, ...]
    picture: Path | None = None

    def lines(self) -> list[str]:
        """Return the summary as lines for a person; times count from the begin of the stream."""
        covered = self.coverage
        seen = f"{covered.watched_s:.1f} of {covered.total_s:.1f} s watched in {covered.frames} pictures"
        lines = [f"{covered.stream}: {seen}"]
        lines += _listed("said", covered.decided_s, " s")
        lines += _listed("inconclusive", covered.inconclusive_s, " s")
        lines += _listed("not watched", covered.unwatched_s, " s")
        lines += _listed("pictures dropped", self.dropped, "")
        lines += [f"  {self._incident_line(span)}" for span in self.incidents] or ["  no incident"]
        if self.picture is not None:
            lines.append(f"  timeline: {self.picture}")
        return lines

    def _incident_line(self, span: IncidentSpan) -> str:
        first, last = ((us - self.coverage.from_us) / MICRO for us in (span.first_us, span.last_us))
        parts = [f"incident {span.id}: {first:.1f} s to {last:.1f} s", f"severity {span.severity}"]
        if span.probability is not None:
            spread = f" ({span.interval[0]:.2f} to {span.interval[1]:.2f})" if span.interval else ""
            parts.append(f"probability {span.probability:.2f}{spread}")
        parts.append("retracted" if span.retracted else f"suggested: {span.suggested_action}")
        return ", ".join(parts)


def _listed(name: str, amounts: Mapping[str, float], unit: str) -> list[str]:
    shown = [f"{key} {amount:.1f}{unit}" if unit else f"{key} {amount}" for key, amount in amounts.items()]
    return [f"  {name}: {', '.join(shown)}"] if shown else []


def report(
    stream: str,
    scores: Callable[[], Iterable[Mapping[str, Any]]],
    events: Iterable[Mapping[str, Any]],
    settings: config.Verdict,
    picture: Path | None = None,
) -> Summary:
    """Add up one stream and, if `picture` is given, draw its timeline there as PNG.

    `scores` gives the values of the stream's `scores` records in order, anew at each call: a day of them need
    not fit into memory. `events` are CloudEvents as JSON objects; those of other streams are passed over.
    """
    timeline = Timeline(stream)
    for record in scores():
        timeline.add_score(record)
    for event in events:
        timeline.add_event(event)
    covered = cover(stream, scores(), timeline.first_us, max(timeline.last_us, timeline.first_us + 1))
    if picture is not None:
        timeline.draw(picture, settings)
    return Summary(covered, dict(timeline.dropped), tuple(timeline.incidents.values()), picture)


class Timeline:
    """The curves of one stream, thinned to what a picture can show. Times are UTC microseconds."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.first_us = self.last_us = 0
        self.dropped: Counter[str] = Counter()
        self.incidents: dict[str, IncidentSpan] = {}
        self._looks: list[tuple[int, float]] = []
        self._members: dict[str, list[tuple[int, float]]] = {}
        """Logits of each member, of the face that scored highest."""
        self._said: list[Said] = []
        self._gaps: list[tuple[int, int]] = []

    def add_score(self, record: Mapping[str, Any]) -> None:
        """Take one value of the `scores` topic: a frame, a dropped range or a verdict."""
        match record["type"]:
            case "frame":
                self._reach(record["media_us"])
                self._add_frame(record)
            case "dropped":
                self._reach(record["first_us"])
                self._reach(record["last_us"])
                self.dropped[record["reason"]] += record["frames"] or 1
                self._gaps.append((record["first_us"], record["last_us"]))
                _thin(self._gaps)
            case "verdict":
                interval = _interval(record)
                self._said.append(
                    Said(record["media_us"], record["verdict"], record["probability"], interval)
                )
                _thin(self._said)

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Take one CloudEvent; only what is about an incident of this stream counts."""
        if event["subject"] != self.stream or not event["type"].startswith("unmask.incident."):
            return
        data = event["data"]
        self.incidents[data["incident"]] = IncidentSpan(
            id=data["incident"],
            first_us=data["first_media_us"],
            last_us=data["last_media_us"],
            severity=data["severity"],
            probability=data["probability"],
            interval=_interval(data),
            suggested_action=data["suggested_action"],
            retracted=data["event"] == "retracted",
        )

    def draw(self, path: Path, settings: config.Verdict) -> None:
        """Write score with interval, thresholds, verdicts, incidents and dropped ranges over time as PNG."""
        from matplotlib.figure import Figure

        many = len(self._members) > 1
        width, height = INCHES
        figure = Figure(figsize=(width, height * (1 + MEMBERS_SHARE * many)), layout="constrained")
        ratios = [1, MEMBERS_SHARE] if many else [1]
        axes, *below = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        axes.set(ylabel="probability of manipulation")
        for lower in below:
            lower.set(ylabel="logit per member")
            self._draw_members(lower)
        figure.axes[-1].set(xlabel="seconds of media time")
        axes.set(title=self.stream, xlim=(0, max(self._at(self.last_us), 0.001)), ylim=(-0.08, 1.02))
        self._draw_spans(axes)
        self._draw_looks(axes)
        self._draw_said(axes)
        for level, name in ((settings.open_probability, "opens"), (settings.close_probability, "closes")):
            axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
            axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), fontsize=8, color="grey")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper left", fontsize=8, ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)

    def _add_frame(self, record: Mapping[str, Any]) -> None:
        faces = [face for face in record["faces"] if face["fused"] is not None]
        if not faces:
            return
        highest = max(faces, key=lambda face: face["fused"])
        self._looks.append((record["media_us"], highest["fused"]))
        _thin(self._looks)
        shadows = {f"{name} (shadow)": logit for name, logit in highest.get("shadow", {}).items()}
        for name, logit in (highest["logits"] | shadows).items():
            if logit is not None:
                points = self._members.setdefault(name, [])
                points.append((record["media_us"], logit))
                _thin(points)

    def _reach(self, media_us: int) -> None:
        self.first_us = min(self.first_us or media_us, media_us)
        self.last_us = max(self.last_us, media_us)

    def _at(self, media_us: int) -> float:
        return max(0, media_us - self.first_us) / MICRO

    def _draw_looks(self, axes: Any) -> None:
        times = [self._at(media_us) for media_us, _ in self._looks]
        values = 1 / (1 + np.exp(-np.array([fused for _, fused in self._looks])))
        if times:
            axes.plot(times, values, ".", color="0.7", markersize=3, label="single pictures, uncalibrated")

    def _draw_members(self, axes: Any) -> None:
        """Draw the logit of each member; one alone says what the curve above says."""
        for name, points in self._members.items():
            times, logits = [self._at(at) for at, _ in points], [logit for _, logit in points]
            axes.plot(times, logits, ".", markersize=2, alpha=0.6, label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.legend(loc="upper left", fontsize=7, ncols=4)

    def _draw_said(self, axes: Any) -> None:
        """Draw verdicts as a strip at the bottom and the probability with its interval as steps."""
        if not self._said:
            return
        edges = [self._at(said.media_us) for said in self._said] + [self._at(self.last_us)]
        for said, (left, right) in zip(self._said, pairwise(edges), strict=True):
            axes.barh(-0.05, right - left, 0.04, left, color=VERDICT_COLOURS[said.verdict])
        low = [_or_nan(said.interval and said.interval[0]) for said in self._said]
        high = [_or_nan(said.interval and said.interval[1]) for said in self._said]
        middle = [_or_nan(said.probability) for said in self._said]
        axes.stairs(high, edges, baseline=low, fill=True, alpha=0.25, color="tab:blue")
        axes.stairs(middle, edges, baseline=None, color="tab:blue", label="probability with interval")

    def _draw_spans(self, axes: Any) -> None:
        label: str | None = "incident"
        for span in self.incidents.values():
            axes.axvspan(
                self._at(span.first_us), self._at(span.last_us), color="tab:red", alpha=0.15, label=label
            )
            label = None
        label = "not looked at"
        for first_us, last_us in self._gaps:
            axes.axvspan(self._at(first_us), self._at(last_us), color="black", alpha=0.15, label=label)
            label = None


def _interval(record: Mapping[str, Any]) -> tuple[float, float] | None:
    ends = record["interval"]
    return (ends[0], ends[1]) if ends else None


def _thin(points: list[Any]) -> None:
    if len(points) > MAX_POINTS:
        del points[1:-1:2]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
