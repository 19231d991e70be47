"""`unmask attach`, `detach`, `streams` on the embedded log; over Kafka see test_ingest_service."""

import io
import json
from pathlib import Path

import pytest

from stream import attachments
from stream.assemble import open_embedded
from stream.claims import Claim, read_standings
from stream.clock import SystemClock
from stream.config import Config, Media
from stream.errors import Code, UnmaskError
from stream.intake import Last
from stream.log import Log
from stream.records import OutRecord
from stream.sources import from_entry
from stream.topics import media_partition


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(data_dir=str(tmp_path / "data"), media=Media(partitions=2))


def attach(
    config: Config, text: str, name: str | None = None, fps: float | None = None, labels: tuple[str, ...] = ()
) -> str:
    out = io.StringIO()
    assert attachments.attach(config, text, name, fps, labels, out) == 0
    return out.getvalue()


def listed(config: Config) -> list[dict[str, object]]:
    out = io.StringIO()
    assert attachments.streams(config, True, out) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def shown(config: Config) -> str:
    out = io.StringIO()
    attachments.streams(config, False, out)
    return out.getvalue()


def put(log: Log, topic: str, key: str, value: bytes, partition: int | None = None) -> None:
    with log.producer(f"test {key}") as producer:
        producer.send(OutRecord(topic, key, value, {}, 1, partition))


def test_what_is_attached_is_listed_until_it_is_detached(config: Config) -> None:
    attach(config, "tcp://192.0.2.7:9000", "studio", 4.0, ("region=north", "group=a=b"))
    attach(config, "rtsp://camera.example/lobby")
    lobby, studio = listed(config)
    assert (lobby["id"], lobby["url"], lobby["kind"]) == ("lobby", "rtsp://camera.example/lobby", "live")
    assert (studio["fps"], studio["labels"]) == (4.0, {"region": "north", "group": "a=b"})
    assert "fps=4" in shown(config)
    out = io.StringIO()
    assert attachments.detach(config, "studio", out) == 0
    assert [entry["id"] for entry in listed(config)] == ["lobby"]
    with pytest.raises(UnmaskError, match="no stream 'studio' is attached; attached are: lobby") as caught:
        attachments.detach(config, "studio", out)
    assert caught.value.code is Code.SOURCE_NOT_FOUND


def test_an_empty_list_says_what_to_do(config: Config) -> None:
    assert "unmask attach URL" in shown(config)
    assert listed(config) == []


@pytest.mark.parametrize(
    ("text", "name", "fps", "label", "sentence"),
    [
        ("rtmp://user:hunter22@host/live/x", None, None, "a=b", "env:NAME"),
        ("https://host/live.m3u8?token=hunter22", None, None, "a=b", "env:NAME"),
        ("-", None, None, "a=b", "standard input"),
        ("tcp://host:1", "Not Allowed", None, "a=b", "is not allowed"),
        ("one=tcp://host:1", "two", None, "a=b", "given twice"),
        ("tcp://host:1", "x", 0.0, "a=b", "above 0"),
        ("tcp://host:1", "x", 61.0, "a=b", "at most 60"),
        ("tcp://host:1", "x", None, "region", "--label region=north"),
        ("ftp://host/x", "x", None, "a=b", "not supported"),
        ("env:UNMASK_TEST_NOWHERE", "x", None, "a=b", "empty or not set"),
    ],
)
def test_what_cannot_be_attached_is_refused_in_one_sentence(
    config: Config, text: str, name: str | None, fps: float | None, label: str, sentence: str
) -> None:
    with pytest.raises(UnmaskError, match=sentence) as caught:
        attach(config, text, name, fps, (label,))
    assert "hunter22" not in str(caught.value)
    assert listed(config) == []


def test_a_credential_stays_in_the_environment(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "rtsp://user:hunter22@camera.example/lobby"
    monkeypatch.setenv("LOBBY", address)
    assert "hunter22" not in attach(config, "env:LOBBY")
    (entry,) = listed(config)
    assert entry["secret_ref"] == "env:LOBBY"
    assert "hunter22" not in json.dumps(entry)
    assert from_entry(entry, {"LOBBY": address}).address == address
    assert from_entry(entry, {}).address == ""


def test_a_file_is_listed_by_its_whole_path(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    attach(config, "clip.mp4")
    (entry,) = listed(config)
    assert entry["url"] == str(tmp_path / "clip.mp4")


def test_how_detect_sees_a_stream_and_what_others_wrote(config: Config) -> None:
    attach(config, "tcp://host:1", "good")
    log = open_embedded(config, SystemClock())
    state = {"feed": ["down", 3], "incident": {"id": "01X", "status": "open"}}
    put(log, "unmask.state", "good", json.dumps(state).encode(), media_partition("good", 2))
    put(log, "unmask.state", "#position", b"17", 0)
    put(log, "unmask.sources", "bad", b"\x1b[31m")
    log.close()
    bad, good = listed(config)
    assert (good["state"], good["incident"]) == ("down", "01X")
    assert "no JSON" in str(bad["error"])
    assert "incident 01X" in shown(config)
    out = io.StringIO()
    assert attachments.detach(config, "bad", out) == 0
    assert [entry["id"] for entry in listed(config)] == ["good"]


def test_an_entry_of_another_producer_needs_no_more_than_an_address() -> None:
    source = from_entry({"id": "a", "url": "rtsp://camera.example/lobby"})
    assert (source.scheme, source.kind, source.fps) == ("rtsp", "live", None)
    hidden = from_entry({"id": "a", "secret_ref": "env:A"}, {"A": "rtmp://u:p@host/live/x"})
    assert (hidden.scheme, hidden.address) == ("rtmp", "rtmp://u:p@host/live/x")
    assert "u:p" not in hidden.shown
    for entry in ({"id": "a"}, {"id": "a", "url": "x://y"}, {"id": "a", "url": "tcp://h:1", "fps": "2"}):
        with pytest.raises(UnmaskError):
            from_entry(entry)


def test_identity_changes_with_the_address_and_not_with_labels() -> None:
    entry = {"id": "a", "url": "rtsp://camera.example/lobby"}
    one = from_entry(entry).identity()
    assert from_entry(entry | {"labels": {"x": "y"}, "fps": 3, "attached_us": 5}).identity() == one
    assert from_entry(entry | {"url": "rtsp://camera.example/door"}).identity() != one


def test_where_a_stream_stands_is_the_most_that_claims_and_states_say(config: Config) -> None:
    attach(config, "tcp://host:1", "a")
    log = open_embedded(config, SystemClock())
    place = media_partition("a", 2)
    state = {"resume": {"attachment": "00000000000000ff"}, "now_us": 100}
    put(log, "unmask.state", "a", json.dumps(state).encode(), place)
    with log.producer("claim") as producer:
        producer.send(Claim("000000000000000f", 200, "me").record(config, "a", place, 1))
    found = read_standings(log, config, ["a", "nobody"])
    put(log, "unmask.state", "#ingest:a", b"garbage", place)
    damaged = read_standings(log, config, ["a"])["a"]
    log.close()
    assert found["a"].last == Last("00000000000000ff", 200)
    assert found["a"].claim == Claim("000000000000000f", 200, "me")
    assert found["nobody"].last == Last()
    assert damaged.last == Last("00000000000000ff", 100)
