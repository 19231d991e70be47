"""The life of incidents: one at a time, numbered without gaps, whatever happens in between."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.config import Evidence, Verdict
from stream.config import Incidents as Settings
from stream.incidents import (
    TRANSITIONS,
    Change,
    ClipRequest,
    CloseReason,
    Crop,
    EventKind,
    Finding,
    IncidentEvent,
    Incidents,
    Moment,
    Severity,
    Status,
    Told,
    TrackView,
    best_crops,
    derived_id,
    random_id,
)
from stream.verdicts import Judgement
from stream.verdicts import Verdict as Said

SECOND = 1_000_000
NOTHING = Finding()


def judgement(lower: float) -> Judgement:
    return Judgement(
        Said.MANIPULATED, (), True, (1 + lower) / 2, (lower, 1.0), 3.0, 3.0, {"m": 3.0}, 9, 9, 4.0
    )


def view(track: int, lower: float = 0.8) -> TrackView:
    return TrackView("a1", 0, track, (0.0, 0.0, 9.0, 9.0), 0, SECOND, 0.97, lower, 9)


def accused(*tracks: int, lower: float = 0.8, fresh: bool = True, lost: bool = False) -> Finding:
    return Finding(judgement(lower), tuple(view(track, lower) for track in tracks), fresh, lost)


def crop(name: str, score: float) -> Crop:
    return Crop("a1/0/1", 0, score, f"evidence://{name * 64}", f"evidence://{name * 64}")


class Book:
    """Incidents of one stream and what they told; clips are answered at once unless told otherwise."""

    def __init__(self, answer: bool = True, **more: object) -> None:
        self.answer = answer
        self.count = 0
        self.settings = Settings(**more)  # type: ignore[arg-type]
        self.told: list[IncidentEvent] = []
        self.asked: list[ClipRequest] = []
        self.incidents = self.fresh()

    def fresh(self) -> Incidents:
        return Incidents("studio", Verdict(), self.settings, Evidence(), self.new_id)

    def new_id(self, stream: str, media_us: int) -> str:
        self.count += 1
        return f"{stream}-{self.count}"

    def see(self, seconds: float, finding: Finding) -> None:
        self.take(seconds, self.incidents.observe(moment(seconds), finding))

    def take(self, seconds: float, told: Sequence[Told]) -> None:
        for item in told:
            if isinstance(item, IncidentEvent):
                self.told.append(item)
                continue
            self.asked.append(item)
            if self.answer:
                self.take(
                    seconds, self.incidents.on_clip(moment(seconds), item.incident, "evidence://" + "c" * 64)
                )

    def restart(self) -> None:
        state = json.loads(json.dumps(self.incidents.state()))
        self.incidents = self.fresh()
        self.incidents.restore(state)

    def story(self) -> list[str]:
        return [
            f"{event.moment.media_us / SECOND:g} {event.incident[-1]}.{event.number} {event.kind.value}"
            + (f" {event.reason}" if event.reason else "")
            + ("".join(f" {change.value}" for change in event.changes))
            for event in self.told
        ]


def moment(seconds: float) -> Moment:
    return Moment(round(seconds * SECOND), "a1", 0, None)


def test_an_incident_from_opening_to_close() -> None:
    #   seconds   0    1    2    3    ...   7    8
    #   accused        #    #    #    ###   #    -
    book = Book()
    book.see(0, NOTHING)
    for seconds in range(1, 8):
        book.see(seconds, accused(1))
    book.see(8, NOTHING)
    assert book.story() == ["1 1.1 opened", "6 1.2 updated clip", "8 1.3 closed cleared"]
    closed = book.told[-1]
    assert (closed.first_us, closed.last_us, closed.peak_us) == (SECOND, 7 * SECOND, SECOND)
    assert (closed.clip, closed.tracks_total, closed.severity) == (
        "evidence://" + "c" * 64,
        1,
        Severity.MEDIUM,
    )


def test_the_clip_reaches_from_before_the_onset_to_after_the_peak() -> None:
    book = Book()
    book.see(20, Finding(judgement(0.8), (view(1),), fresh=True, onset_us=17 * SECOND))
    book.see(22, accused(1, lower=0.85))
    book.see(25, accused(1, lower=0.5))
    assert [(ask.first_us, ask.last_us, ask.peak_us) for ask in book.asked] == [
        (12 * SECOND, 25 * SECOND, 22 * SECOND)
    ]


def test_a_face_that_is_lost_keeps_its_incident_open_for_the_grace() -> None:
    #   seconds   1 2 3 | lost at 4 ............................ 33: 30 s after the last evidence
    book = Book()
    for seconds in (1, 2, 3):
        book.see(seconds, accused(1))
    book.see(4, Finding(lost=True))
    for seconds in range(5, 40):
        book.see(seconds, NOTHING)
    assert book.story() == ["1 1.1 opened", "6 1.2 updated clip", "33 1.3 closed absent"]


def test_a_face_that_comes_back_joins_the_open_incident() -> None:
    book = Book(update_every_s=5.0)
    book.see(1, accused(1))
    book.see(3, Finding(lost=True))
    book.see(12, accused(2))
    book.see(14, NOTHING)
    assert book.story() == [
        "1 1.1 opened",
        "12 1.2 updated track",
        "12 1.3 updated clip",
        "14 1.4 closed cleared",
    ]
    assert book.told[-1].tracks_total == 2


def test_an_accusation_without_new_evidence_dries_out() -> None:
    book = Book()
    book.see(1, accused(1))
    for seconds in range(2, 60):
        book.see(seconds, accused(1, fresh=False))
    assert book.story()[-1] == "31 1.3 closed absent"
    assert len(book.told) == 3


def test_escalation_is_told_at_once_and_other_news_waits() -> None:
    book = Book()
    book.see(1, accused(1, lower=0.6))
    book.see(6, accused(1, lower=0.6))
    book.see(7, accused(1, 2, lower=0.7))
    book.see(8, accused(1, 2, lower=0.95))
    book.see(9, accused(1, 2, 3, lower=0.95))
    for seconds in range(10, 40):
        book.see(seconds, accused(1, 2, 3, lower=0.95))
    assert book.story() == [
        "1 1.1 opened",
        "6 1.2 updated clip",
        "8 1.3 updated escalation track evidence",
        "38 1.4 updated track",
    ]
    assert [event.severity for event in book.told] == [
        Severity.MEDIUM,
        Severity.MEDIUM,
        Severity.HIGH,
        Severity.HIGH,
    ]


def test_severity_never_falls_and_the_peak_is_kept() -> None:
    book = Book()
    book.see(1, accused(1, lower=0.95))
    book.see(2, accused(1, lower=0.6))
    book.see(3, NOTHING)
    closed = book.told[-1]
    assert (closed.kind, closed.severity, closed.judgement.lower) == (EventKind.CLOSED, Severity.HIGH, 0.95)


def test_a_stream_accused_without_a_face_of_its_own_is_of_low_severity() -> None:
    book = Book()
    book.see(1, accused(lower=0.95))
    book.see(2, accused(4, lower=0.95))
    assert [(event.severity, event.tracks_total) for event in book.told] == [
        (Severity.LOW, 0),
        (Severity.HIGH, 1),
    ]
    assert book.told[1].changes == (Change.ESCALATION, Change.TRACK)


def test_at_most_eight_tracks_are_described_and_all_are_counted() -> None:
    book = Book()
    book.see(1, accused(*range(12)))
    book.see(2, accused(*range(12), lower=0.9))
    book.incidents.close(moment(3), CloseReason.ENDED)
    assert (len(book.told[-1].tracks), book.told[-1].tracks_total) == (8, 12)


def test_the_end_of_the_feed_asks_for_the_clip_before_it_closes() -> None:
    book = Book(answer=False)
    book.see(1, accused(1))
    book.take(2, book.incidents.close(moment(2), CloseReason.ENDED))
    assert book.story() == ["1 1.1 opened"]
    assert (book.incidents.ongoing, book.incidents.open) == (False, "studio-1")
    book.see(3, accused(2))
    book.restart()
    request = book.incidents.due_clip()
    assert request == book.asked[0]
    book.take(4, book.incidents.on_clip(moment(4), "studio-1", None))
    assert book.story()[1:] == ["4 1.2 closed ended"]
    assert (book.incidents.open, book.incidents.due_clip()) == (None, None)


def test_an_answer_to_another_question_is_ignored() -> None:
    book = Book(answer=False)
    book.see(1, accused(1))
    assert book.incidents.on_clip(moment(1), "studio-1", "evidence://x") == []
    book.see(6, accused(1))
    assert book.incidents.on_clip(moment(6), "studio-9", "evidence://x") == []
    assert len(book.incidents.on_clip(moment(6), "studio-1", "evidence://x")) == 1
    assert book.incidents.on_clip(moment(6), "studio-1", "evidence://x") == []


@pytest.mark.parametrize("closed", [False, True])
def test_a_retraction_is_the_last_that_is_said(closed: bool) -> None:
    book = Book()
    book.see(1, accused(1))
    if closed:
        book.see(2, NOTHING)
    book.take(3, book.incidents.retract(moment(3), "studio-1", "a shop window's poster"))
    assert book.told[-1].kind is EventKind.RETRACTED
    assert book.told[-1].reason == "a shop window's poster"
    assert book.told[-1].number == len(book.told)
    assert book.incidents.retract(moment(4), "studio-1", "again") == []
    assert book.incidents.retract(moment(4), "studio-2", "unknown") == []
    book.see(5, accused(1))
    assert book.told[-1].incident == "studio-2"


def test_a_retraction_needs_a_reason() -> None:
    book = Book()
    book.see(1, accused(1))
    with pytest.raises(ValueError, match="reason is empty"):
        book.incidents.retract(moment(2), "studio-1", " ")


def test_evidence_of_the_newest_incident_is_pinned() -> None:
    book = Book()
    book.see(1, Finding(judgement(0.8), (view(1),), True, crops=(crop("a", 1.0), crop("b", 2.0))))
    assert book.incidents.references() == {"evidence://" + "a" * 64, "evidence://" + "b" * 64}
    book.see(6, accused(1))
    assert "evidence://" + "c" * 64 in book.incidents.references()


def test_evidence_of_an_incident_that_is_over_may_expire() -> None:
    book = Book()
    book.see(1, Finding(judgement(0.8), (view(1),), True, crops=(crop("a", 1.0),)))
    book.incidents.retract(moment(2), "studio-1", "a mistake")
    assert book.incidents.references() == frozenset()


def test_the_best_different_pictures_are_kept() -> None:
    kept = best_crops([crop("a", 1.0), crop("b", 3.0), crop("b", 3.0), crop("c", 2.0)], 2)
    assert [one.score for one in kept] == [3.0, 2.0]


def test_ids_sort_by_time_and_differ() -> None:
    assert random_id("s", 1) != random_id("s", 1)
    assert random_id("s", 1) < random_id("s", 2)
    assert derived_id("s", 1) == derived_id("s", 1) != derived_id("t", 1)


steps = st.lists(
    st.tuples(
        st.sampled_from([0.5, 3.0, 20.0]),
        st.sampled_from(
            ["accused", "stale", "nothing", "lost", "end", "retract", "restart", "answer", "quiet"]
        ),
        st.integers(0, 12),
        st.sampled_from([0.55, 0.7, 0.95]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(steps)
def test_never_two_open_and_no_number_missing_whatever_happens(
    drawn: list[tuple[float, str, int, float]],
) -> None:
    book = Book()
    now = 0.0
    for step, what, track, lower in drawn:
        now += step
        if what == "restart":
            book.restart()
        elif what == "end":
            book.take(now, book.incidents.close(moment(now), CloseReason.ENDED))
        elif what == "retract":
            book.take(now, book.incidents.retract(moment(now), f"studio-{book.count}", "wrong"))
        elif what in ("answer", "quiet"):
            book.answer = what == "answer"
            request = book.incidents.due_clip()
            if request and book.answer:
                book.take(now, book.incidents.on_clip(moment(now), request.incident, None))
        else:
            finding = NOTHING if what == "nothing" else accused(track, lower=lower, fresh=what == "accused")
            book.see(now, Finding(lost=True) if what == "lost" else finding)
    open_ids: set[str] = set()
    numbers: dict[str, int] = {}
    for event in book.told:
        numbers[event.incident] = numbers.get(event.incident, 0) + 1
        assert event.number == numbers[event.incident]
        assert (event.kind is EventKind.OPENED) == (event.number == 1)
        if event.kind is EventKind.OPENED:
            open_ids.add(event.incident)
        assert len(open_ids) == 1 or event.kind is EventKind.RETRACTED
        if event.kind in (EventKind.CLOSED, EventKind.RETRACTED):
            open_ids.discard(event.incident)
    assert list(numbers) == [f"studio-{index + 1}" for index in range(len(numbers))]


def test_nothing_follows_a_retraction() -> None:
    assert TRANSITIONS[Status.RETRACTED] == frozenset()
    assert Status.OPEN not in {after for allowed in TRANSITIONS.values() for after in allowed}
