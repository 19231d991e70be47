"""Filters: each condition by itself narrows, together they are all of them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.alerts import CloudEvent
from stream.sinks.choice import Rate, reaches, wants
from stream.sinks.settings import SEVERITIES, Flood, Only
from tests.stream.sinks.world import alert, feed, incident

STREAMS = ("studio-1", "studio-2", "lobby", "studio-1~replay")
LABELS = {"studio-1": {"site": "berlin", "group": "a"}, "lobby": {"site": "paris"}}

events = st.one_of(
    st.builds(
        incident,
        event=st.sampled_from(["opened", "updated", "closed"]),
        severity=st.sampled_from(SEVERITIES),
        stream=st.sampled_from(STREAMS),
    ),
    st.builds(
        feed, kind=st.sampled_from(["up", "down", "unwatched", "drift"]), stream=st.sampled_from(STREAMS[:3])
    ),
)
onlys = st.builds(
    Only,
    events=st.sets(st.sampled_from(["incident", "feed"])).map(tuple),
    severity=st.sampled_from(SEVERITIES),
    verdicts=st.sets(st.sampled_from(["manipulated", "inconclusive"])).map(tuple),
    streams=st.sets(st.sampled_from(["*", "studio-*", "lobby", "nobody"])).map(tuple),
    labels=st.sampled_from([{}, {"site": "berlin"}, {"site": "berlin", "group": "a"}, {"x": "y"}]),
)


def labels(stream: str) -> dict[str, str]:
    return LABELS.get(stream, {})


def wanted(only: Only, event: CloudEvent) -> bool:
    return wants(only, alert(event), labels)


@given(events)
def test_without_conditions_everything_passes(event: CloudEvent) -> None:
    assert wanted(Only(), event)


@given(onlys, events)
def test_a_filter_is_the_conjunction_of_its_conditions(only: Only, event: CloudEvent) -> None:
    alone = [Only(**{name: getattr(only, name)}) for name in Only.model_fields]
    assert wanted(only, event) == all(wanted(each, event) for each in alone)


@given(onlys, events)
def test_what_passes_at_one_severity_passes_at_a_higher_one(only: Only, event: CloudEvent) -> None:
    if not wanted(only, event):
        return
    for severity in SEVERITIES:
        if reaches(severity, event.attributes["severity"]):
            attributes = {**event.attributes, "severity": severity}
            assert wanted(only, CloudEvent(attributes, event.data))


@given(events, st.sampled_from(SEVERITIES))
def test_severity_is_a_threshold(event: CloudEvent, least: Any) -> None:
    order = SEVERITIES.index(event.attributes["severity"]) >= SEVERITIES.index(least)
    assert wanted(Only(severity=least), event) == order


@pytest.mark.parametrize(
    ("only", "event", "passes"),
    [
        (Only(events=("feed",)), incident(), False),
        (Only(events=("feed",)), feed(), True),
        (Only(verdicts=("manipulated",)), incident(), True),
        (Only(verdicts=("inconclusive",)), incident(), False),
        (Only(verdicts=("inconclusive",)), feed(), True),
        (Only(streams=("studio-*",)), incident(stream="studio-2"), True),
        (Only(streams=("studio-*",)), incident(stream="my-studio-2"), False),
        (Only(streams=("studio-1",)), incident(stream="studio-1~replay"), False),
        (Only(labels={"site": "berlin"}), incident(stream="studio-1"), True),
        (Only(labels={"site": "berlin"}), incident(stream="studio-1~replay"), True),
        (Only(labels={"site": "berlin"}), incident(stream="lobby"), False),
        (Only(labels={"site": "berlin"}), incident(stream="nobody"), False),
        (Only(labels={"site": "berlin", "group": "b"}), incident(stream="studio-1"), False),
    ],
)
def test_examples(only: Only, event: CloudEvent, passes: bool) -> None:
    assert wanted(only, event) is passes


@given(
    most=st.integers(1, 5),
    within_s=st.floats(1, 100),
    gaps=st.lists(st.floats(0, 50), max_size=60),
)
def test_no_span_holds_more_than_is_allowed(most: int, within_s: float, gaps: list[float]) -> None:
    rate, now, sent = Rate(Flood(most=most, within_s=within_s)), 0.0, []
    for gap in gaps:
        now += gap
        if not rate.full(now):
            rate.note(now)
            sent.append(now)
        assert sum(now - each < within_s for each in sent) <= most
    assert not gaps or sent, "some always pass"
