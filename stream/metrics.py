"""What detect counts, in Prometheus' conventions (DESIGN 3.10). No label holds what a stranger controls."""

from collections import Counter as Counting
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from stream.decoders import PoolStats
from stream.health import serve

if TYPE_CHECKING:
    from detectors.reader import Usage
    from engines.engine import Refusal

LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
"""Seconds; finest around the second or two that a live chunk takes from receipt to score."""


class Metrics:
    """One registry per worker, so that several workers in one process (tests) do not collide."""

    def __init__(
        self, members: Callable[[], "Sequence[Usage]"] = tuple, refusals: "Sequence[Refusal]" = ()
    ) -> None:
        """`members` tells what each member did; `refusals` is added to when an engine does not serve one."""
        self._members = members
        self._refusals = refusals
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.decoders: PoolStats | None = None
        """The decoders' own counters, a snapshot taken by the worker."""
        self.heavy: Mapping[str, int] = {}
        """Pictures that heavy members were wanted for, by what became of them; the same."""
        self.drift: Mapping[str, Mapping[str, float]] = {}
        """Population stability index by stream and part; the same."""
        self.records = Counter(
            "unmask_records_total", "Media records applied, by outcome", ["outcome"], registry=self.registry
        )
        self.frames = Counter(
            "unmask_frames_total", "Frames, by what became of them", ["outcome"], registry=self.registry
        )
        self.drops = Counter(
            "unmask_frames_dropped_total",
            "Frames never scored, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.faces = Counter("unmask_faces_scored_total", "Faces scored", registry=self.registry)
        self.events = Counter(
            "unmask_alert_events_total",
            "Events on the alerts topic, by type",
            ["type"],
            registry=self.registry,
        )
        self.dead_letters = Counter(
            "unmask_dead_letters_total", "Records dead-lettered, by code", ["code"], registry=self.registry
        )
        self.commits = Counter("unmask_commits_total", "Transactions committed", registry=self.registry)
        self.commits_refused = Counter(
            "unmask_commits_refused_total", "Commits the log could not take", registry=self.registry
        )
        self.pictures_failed = Counter(
            "unmask_pictures_failed_total", "Evidence pictures that could not be kept", registry=self.registry
        )
        self.retractions = Counter(
            "unmask_retractions_total",
            "Withdrawals of incidents that were asked for, by outcome",
            ["outcome"],
            registry=self.registry,
        )
        self.log_up = Gauge("unmask_log_up", "1 while the log answers", registry=self.registry)
        self.log_away = Counter(
            "unmask_log_away_total", "Calls that the log did not answer", registry=self.registry
        )
        self.partitions = Gauge(
            "unmask_partitions_assigned", "Partitions of media that are this worker's", registry=self.registry
        )
        self.rebalance_pause = Histogram(
            "unmask_rebalance_pause_seconds",
            "Streams that stood still: from assignment to the next record applied, and while handing over",
            ["phase"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.position_errors = Counter(
            "unmask_position_errors_total", "Positions outside of what the log holds", registry=self.registry
        )
        self.unread_removed = Counter(
            "unmask_records_removed_unread_total",
            "Records that retention deleted before they were read",
            registry=self.registry,
        )
        self.bursts_refused = Counter(
            "unmask_bursts_refused_total", "Closer looks not taken for lack of budget", registry=self.registry
        )
        self.looks_passed_over = Counter(
            "unmask_burst_looks_passed_over_total",
            "Faces seen by a burst at full rate that no track or no series took",
            registry=self.registry,
        )
        self.clips_failed = Counter(
            "unmask_clips_failed_total", "Evidence clips that could not be cut", registry=self.registry
        )
        self.clips_waiting = Gauge(
            "unmask_clips_waiting", "Evidence clips asked for and not cut yet", registry=self.registry
        )
        self.evidence_bytes = Gauge(
            "unmask_evidence_bytes", "Size of the evidence store", registry=self.registry
        )
        self.evidence_uncopied = Gauge(
            "unmask_evidence_uncopied_files",
            "Files of evidence that are not in evidence.store yet",
            registry=self.registry,
        )
        self.evidence_copy_failures = Counter(
            "unmask_evidence_copy_failures_total",
            "Times that evidence.store did not take a copy",
            registry=self.registry,
        )
        self.stream_up = Gauge(
            "unmask_stream_up",
            "1 while the feed's video is alive, by ticks",
            ["stream"],
            registry=self.registry,
        )
        self.newest_media = Gauge(
            "unmask_newest_media_time_seconds",
            "Heartbeat: newest media time that left the stage",
            ["stage"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "unmask_receipt_to_score_seconds",
            "From receipt of a chunk's first packet to its scores, live feeds",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.alert_latency = Histogram(
            "unmask_receipt_to_alert_seconds",
            "From receipt of a chunk's first packet to the commit of an alert, live feeds",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )

    def forget(self, stream: str) -> None:
        """Export nothing of a stream any more: another worker does."""
        with suppress(KeyError):
            self.stream_up.remove(stream)

    def collect(self) -> Iterator[Metric]:
        """Yield what others count; called by the registry at each scrape, from its own thread."""
        yield from self._of_members()
        yield from self._of_streams()
        stats = self.decoders
        if stats is None:
            return
        children = GaugeMetricFamily("unmask_decoder_children", "Decoder processes that run")
        children.add_metric([], stats.children)
        events = CounterMetricFamily(
            "unmask_decoder_events", "What became of decoder processes and their records", labels=["event"]
        )
        for event in ("started", "died", "stalled", "retried", "failed", "forgotten"):
            events.add_metric([event], getattr(stats, event))
        counted = CounterMetricFamily(
            "unmask_decoder_counts", "Records and frames in the decoders, by outcome", labels=["outcome"]
        )
        for outcome, count in asdict(stats.decode).items():
            counted.add_metric([outcome], count)
        yield from (children, events, counted)

    def _of_members(self) -> Iterator[Metric]:
        faces = CounterMetricFamily("unmask_member_faces", "Faces read", labels=["member", "role"])
        seconds = CounterMetricFamily(
            "unmask_member_seconds", "Time of the reading thread, by the clock", labels=["member", "role"]
        )
        up = GaugeMetricFamily(
            "unmask_shadow_up", "0 once a shadow member failed and was switched off", labels=["member"]
        )
        for usage in self._members():
            faces.add_metric([usage.name, usage.role], usage.faces)
            seconds.add_metric([usage.name, usage.role], usage.seconds)
            if usage.role == "shadow":
                up.add_metric([usage.name], 0 if usage.off else 1)
        heavy = CounterMetricFamily(
            "unmask_heavy_pictures",
            "Pictures that heavy members were wanted for, by outcome",
            labels=["outcome"],
        )
        for outcome, pictures in self.heavy.items():
            heavy.add_metric([outcome], pictures)
        refused = CounterMetricFamily(
            "unmask_engines_refused",
            "Engines that did not serve a member, so that the next one does",
            labels=["engine", "precision"],
        )
        counted = Counting((refusal.engine, refusal.precision) for refusal in self._refusals)
        for (engine, precision), times in counted.items():
            refused.add_metric([engine, precision], times)
        yield from (faces, seconds, up, heavy, refused)

    def _of_streams(self) -> Iterator[Metric]:
        drift = GaugeMetricFamily(
            "unmask_drift_psi",
            "Population stability index against the calibration's data: below 0.1 alike, above 0.25 not",
            labels=["stream", "part"],
        )
        for stream, parts in self.drift.items():
            for part, psi in parts.items():
                drift.add_metric([stream, part], psi)
        yield drift

    def serve(self, port: int) -> None:
        """Serve `/metrics` on loopback at `port`, as `stream.health.serve` does."""
        serve(self.registry, port)


class IngestMetrics:
    """What an ingest process counts; `figures` gives the numbers of the moment by name."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the figures; called by the registry at each scrape, from its own thread."""
        found = self._figures()
        yield GaugeMetricFamily("unmask_ingest_feeds", "Feeds of this process", found["feeds"])
        yield GaugeMetricFamily(
            "unmask_ingest_sources_refused", "Entries of sources that cannot be attached", found["refused"]
        )
        yield GaugeMetricFamily(
            "unmask_ingest_spool_records", "Records on disk that wait for the cluster", found["spooled"]
        )
        yield CounterMetricFamily(
            "unmask_ingest_records_dropped", "Records lost on the way to the cluster", found["dropped"]
        )
        yield CounterMetricFamily(
            "unmask_ingest_shard_restarts", "Shards that died or hung", found["restarts"]
        )
