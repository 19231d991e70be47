"""An incident is withdrawn once, towards everybody, open or closed, now or when detect is back."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import stream
from stream.config import LogSettings
from stream.controls import Retract
from stream.errors import Code, UnmaskError
from stream.marker import write_clip
from stream.records import Topic
from stream.retract import Outcome, command, retract, run
from stream.topics import media_partition
from tests.stream.detecting import Detect, chunked, kinds

START_US = 1_700_000_000_000_000
REASON = "a poster in the background"
ALERT = Draft202012Validator(json.loads((Path(stream.__file__).parent / "alert.schema.json").read_text()))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 s, manipulated from 2 s on to the end."""
    return write_clip(tmp_path_factory.mktemp("clips") / "long.mp4", 16, [(2, 16)])


def begun(folder: Path, clip: Path) -> tuple[Detect, list[Any]]:
    """A stream with an open incident, and the chunks that are still to come."""
    made = Detect(folder, log=LogSettings(commit_ms=50))
    made.list_source("a")
    chunks = chunked(clip, "a", START_US)
    half = 2 * len(chunks) // 3
    made.write(chunks[:half], media_partition("a", made.config.media.partitions))
    made.run()
    assert kinds(made.alerts())[0] == "incident.opened"
    assert "incident.closed" not in kinds(made.alerts())
    return made, chunks[half:]


def ended(folder: Path, clip: Path) -> Detect:
    made, rest = begun(folder, clip)
    made.write(rest, media_partition("a", made.config.media.partitions))
    made.run()
    assert kinds(made.alerts())[-1] == "incident.closed"
    return made


def incident(made: Detect) -> str:
    return str(made.alerts()[0]["id"]).rpartition(".")[0]


def ask(made: Detect, name: str | None = None, reason: str = REASON) -> Outcome:
    return retract(made.config, made.log, made.clock, name or incident(made), reason, wait_s=0.01)


def test_an_open_incident_is_withdrawn_by_detect_and_its_face_accuses_no_more(
    tmp_path: Path, clip: Path
) -> None:
    made, rest = begun(tmp_path, clip)
    assert ask(made) is Outcome.ASKED
    made.write(rest, media_partition("a", made.config.media.partitions))
    made.run()
    told = made.alerts()
    assert kinds(told)[-1] == "incident.retracted"
    assert kinds(told).count("incident.opened") == kinds(told).count("incident.retracted") == 1
    assert [alert["id"].rpartition(".")[2] for alert in told] == [str(n) for n in range(1, len(told) + 1)]
    data = told[-1]["data"]
    assert (data["reason"], data["verdict"], data["suggested_action"]) == (REASON, "inconclusive", "none")
    ALERT.validate(told[-1])
    assert made.dead() == []
    with pytest.raises(UnmaskError, match="retracted already"):
        ask(made)


def test_asking_twice_withdraws_once(tmp_path: Path, clip: Path) -> None:
    made, _ = begun(tmp_path, clip)
    assert [ask(made), ask(made)] == [Outcome.ASKED, Outcome.ASKED]
    made.run()
    assert kinds(made.alerts()).count("incident.retracted") == 1


def test_a_worker_that_dies_over_it_leaves_it_to_the_next(tmp_path: Path, clip: Path) -> None:
    made, _ = begun(tmp_path, clip)
    ask(made)
    made.run_killed(after_commits=0)
    made.run()
    assert kinds(made.alerts()).count("incident.retracted") == 1


def test_a_closed_incident_is_withdrawn_at_once(tmp_path: Path, clip: Path) -> None:
    made = ended(tmp_path, clip)
    out = io.StringIO()
    assert run(made.config, incident(made), f"  {REASON}\n ", True, out) == 0
    assert json.loads(out.getvalue()) == {"incident": incident(made), "outcome": "retracted"}
    closed, retracted = made.alerts()[-2:]
    ALERT.validate(retracted)
    assert retracted["data"]["number"] == closed["data"]["number"] + 1
    assert retracted["id"] == f"{incident(made)}.{retracted['data']['number']}"
    assert (retracted["subject"], retracted["data"]["reason"]) == ("a", REASON)
    with pytest.raises(UnmaskError, match="retracted already"):
        ask(made)


def test_what_cannot_be_withdrawn_is_said(tmp_path: Path, clip: Path) -> None:
    made = ended(tmp_path, clip)
    with pytest.raises(UnmaskError, match="no incident 'nobody'") as caught:
        ask(made, "nobody")
    assert caught.value.code is Code.SOURCE_NOT_FOUND
    with pytest.raises(UnmaskError, match="reason is empty"):
        ask(made, reason=" \n")
    with pytest.raises(UnmaskError, match="no incident"):
        ask(made, incident(made)[:5])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("a", b"nonsense", "no retract"),
        ("a", b'{"incident": "x", "reason": " "}', "reason is empty"),
        ("nobody", b'{"incident": "x", "reason": "y"}', "no stream 'nobody' is watched here"),
    ],
)
def test_a_withdrawal_that_cannot_be_read_is_dead_lettered(
    tmp_path: Path, clip: Path, name: str, value: bytes, said: str
) -> None:
    made, _ = begun(tmp_path, clip)
    record = command(made.config, name, Retract("x", "y"), START_US)
    with made.log.producer("stranger") as producer:
        producer.send(type(record)(**{**{f: getattr(record, f) for f in record.__slots__}, "value": value}))
        producer.flush(10)
    made.run()
    (letter,) = made.dead()
    assert said in letter.headers["dead_reason"].decode()
    assert "incident.retracted" not in kinds(made.alerts())
    assert not any(value["stream"] == "nobody" for value in made.values(Topic.SCORES))


def test_an_incident_that_detect_does_not_know_is_left_alone(tmp_path: Path, clip: Path) -> None:
    made, _ = begun(tmp_path, clip)
    with made.log.producer("stranger") as producer:
        producer.send(command(made.config, "a", Retract("another", REASON), START_US))
        producer.flush(10)
    made.run()
    assert made.dead() == []
    assert "incident.retracted" not in kinds(made.alerts())
