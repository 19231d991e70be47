"""What sinks count, in Prometheus' conventions. The label `sink` is a name from the configuration."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

DELAY_BUCKETS = (0.25, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 3600.0, 21600.0, 86400.0)
"""Seconds; from what a healthy receiver takes to the day after which an alert is given up."""


class SinkMetrics:
    """One registry per service, so that several in one process (tests) do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.delivered = Counter(
            "unmask_sink_delivered_total", "Alerts that the receiver took", ["sink"], registry=self.registry
        )
        self.failed = Counter(
            "unmask_sink_failed_attempts_total",
            "Attempts that the receiver did not take, by reason",
            ["sink", "reason"],
            registry=self.registry,
        )
        self.held_back = Counter(
            "unmask_sink_held_back_total",
            "Alerts told of in one message instead of one by one, by reason",
            ["sink", "reason"],
            registry=self.registry,
        )
        self.dropped = Counter(
            "unmask_sink_dropped_total",
            "Alerts that were not and will not be delivered, by reason",
            ["sink", "reason"],
            registry=self.registry,
        )
        self.delay = Histogram(
            "unmask_sink_delay_seconds",
            "From the writing of an alert to its delivery",
            ["sink"],
            buckets=DELAY_BUCKETS,
            registry=self.registry,
        )
        self.up = Gauge(
            "unmask_sink_up",
            "1 while the last attempt was answered, or none was made yet",
            ["sink"],
            registry=self.registry,
        )
        self.disabled = Gauge(
            "unmask_sink_disabled",
            "1 while nothing is sent because the receiver said that it is gone",
            ["sink"],
            registry=self.registry,
        )
        self.waiting = Gauge(
            "unmask_sink_waiting", "Alerts that wait for another attempt", ["sink"], registry=self.registry
        )
        self.lag = Gauge(
            "unmask_sink_lag_records",
            "Alerts in the log that the sink has not looked at",
            ["sink"],
            registry=self.registry,
        )
        self.turn = Gauge(
            "unmask_sink_turn_timestamp_seconds",
            "Heartbeat: when the sink's loop turned last, Unix time",
            ["sink"],
            registry=self.registry,
        )
