"""Dead letters listed, shown and replayed, beside a worker that knows the truth."""

import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import pytest
from jsonschema import Draft202012Validator

from stream import deadletters, decoder_child, worker
from stream.chunks import Chunk, content_hash, split_parts
from stream.clock import Deadline
from stream.config import Decode, Freshness, Incidents, LogSettings
from stream.deadletter import MAX_HEADER_BYTES, MAX_RECORDS, dead_letters, newest
from stream.deadletters import Wanted, list_letters, show
from stream.errors import Code, UnmaskError
from stream.log import TopicPartition
from stream.marker import write_clip
from stream.records import Control, Kind, OutRecord, Record, Topic, decode_headers
from stream.states import read_states
from stream.topics import media_partition
from tests.stream import poison
from tests.stream.detecting import Detect, chunked, kinds
from tests.stream.segments import as_records, ended, segments
from tests.stream.test_producers import publish

START_US = 1_700_000_000_000_000
SECOND = 1_000_000
VALIDATOR = Draft202012Validator(
    json.loads((Path(deadletters.__file__).parent / "alert.schema.json").read_text())
)
BAD = 19
"""The chunk at fault: at 9 s, in the second half of its group of pictures."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 s, manipulated from 2 to 12 s, one group of pictures in 10 s."""
    clip = tmp_path_factory.mktemp("clips") / "planted.mp4"
    return write_clip(clip, 14, [(2, 12)], gop=250)


def detect(folder: Path, **settings: Any) -> Detect:
    made = Detect(
        folder,
        log=LogSettings(commit_ms=50),
        freshness=Freshness(on_late="score"),
        incidents=Incidents(suggested_action="block"),
        **settings,
    )
    made.list_source("cam")
    return made


def spoiled(clip: Path) -> list[Chunk]:
    """Return the clip's records with one that no decoder can read, though its hash is right."""
    chunks = chunked(clip, "cam", START_US)
    meta, value = chunks[BAD]
    junk = value[: len(value) // 2] + bytes(len(value) - len(value) // 2)
    chunks[BAD] = (replace(meta, content_hash=content_hash(junk)), junk)
    return chunks


@contextmanager
def working(made: Detect) -> Iterator[None]:
    """Let a worker run in the background."""
    started = made.worker()
    thread = threading.Thread(target=started.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        started.drain(Deadline(10, made.clock))
        thread.join(15)
        assert started.error is None


def wait_for(made: Detect, condition: Callable[[], bool]) -> None:
    deadline = Deadline(30, made.clock)
    while not condition():
        assert not deadline.passed()
        made.clock.sleep(0.02)


def out_of(call: Callable[..., int], *arguments: Any) -> tuple[int, str]:
    out = io.StringIO()
    code = call(*arguments, out)
    return code, out.getvalue()


def listed(made: Detect, wanted: Wanted | None = None) -> list[dict[str, Any]]:
    _, text = out_of(list_letters, made.config, wanted or Wanted(), True)
    return [json.loads(line) for line in text.splitlines()]


def replay(made: Detect, name: str, wait: bool = True) -> tuple[int, dict[str, Any]]:
    code, text = out_of(deadletters.replay, made.config, name, wait, True)
    return code, json.loads(text)


@pytest.fixture(scope="module")
def watched(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which the stream `cam` was watched, and failed once."""
    folder = tmp_path_factory.mktemp("watched")
    made = detect(folder)
    made.write(spoiled(planted), media_partition("cam", 8))
    made.run()
    made.log.close()
    return folder


@pytest.fixture
def failed_once(tmp_path: Path, watched: Path, monkeypatch: pytest.MonkeyPatch) -> Detect:
    monkeypatch.setattr(worker, "MAINTAIN_S", 0.1)
    shutil.copytree(watched, tmp_path / "data")
    return detect(tmp_path / "data")


def test_a_letter_holds_everything_from_the_keyframe_through_the_chunk_at_fault(failed_once: Detect) -> None:
    [letter] = listed(failed_once)
    assert (letter["stream"], letter["records"], letter["left_out"]) == ("cam", BAD, 0)
    dead = failed_once.dead()
    metas = [decode_headers(record.key, record.headers) for record in dead]
    assert [meta.sequence for meta in metas] == list(range(1, BAD + 1))
    assert metas[0].starts_on_keyframe
    media = failed_once.topic(Topic.MEDIA)
    assert letter["id"] == f"media.{media_partition('cam', 8)}.{BAD}"
    assert dead[-1].headers["dead_origin"] == f"{media}/{media_partition('cam', 8)}/{BAD}".encode()


def test_letters_are_found_by_stream_code_and_time(failed_once: Detect) -> None:
    [letter] = listed(failed_once)
    assert listed(failed_once, Wanted(stream="cam", code=letter["code"])) == [letter]
    assert listed(failed_once, Wanted(stream="other")) == []
    assert listed(failed_once, Wanted(code="schema")) == []
    assert listed(failed_once, Wanted(since=datetime(2999, 1, 1))) == []
    assert listed(failed_once, Wanted(since=datetime(2024, 1, 1, tzinfo=UTC))) == [letter]
    _, text = out_of(list_letters, failed_once.config, Wanted(), False)
    assert letter["id"] in text
    assert letter["code"] in text
    assert out_of(list_letters, failed_once.config, Wanted(stream="x"), False) == (0, "no dead letter\n")


def test_a_letter_can_be_shown_and_looked_at(failed_once: Detect, tmp_path: Path) -> None:
    [letter] = listed(failed_once)
    target = tmp_path / "letter.mp4"
    _, text = out_of(show, failed_once.config, letter["id"], target, False)
    assert "attachment:" in text
    assert f"{BAD} records" in text
    assert "video/mp4, all before the last record" in text
    with av.open(str(target)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 200
    with pytest.raises(UnmaskError, match="unmask deadletter list"):
        show(failed_once.config, "media.0.999999", None, False, io.StringIO())


def test_a_letter_that_cannot_be_played_is_written_as_it_is(tmp_path: Path, planted: Path) -> None:
    made = detect(tmp_path)
    publish(made, [Record("media", 0, 0, "cam", b"no video", {"content-type": b"video/mp2t"}, 0)])
    made.run()
    [letter] = listed(made)
    target = tmp_path / "letter"
    _, text = out_of(show, made.config, letter["id"], target, False)
    assert "not playable" in text
    assert json.loads(target.read_text())["value"] == "bm8gdmlkZW8="


def test_nothing_secret_is_shown(tmp_path: Path, planted: Path) -> None:
    made = detect(tmp_path)
    headers = {"content-type": b"rtmp://user:secret@host/app", "capture_time": b"1700000000000000"}
    publish(made, [Record("media", 0, 0, "cam", b"", headers, 0)])
    made.run()
    [letter] = listed(made)
    told = json.dumps(letter) + out_of(list_letters, made.config, Wanted(), False)[1]
    told += out_of(show, made.config, letter["id"], None, False)[1]
    told += out_of(show, made.config, letter["id"], None, True)[1]
    assert "secret" not in told


def test_a_replay_is_marked_never_live_and_forgotten(failed_once: Detect) -> None:
    before = failed_once.frames("cam")
    [letter] = listed(failed_once)
    with working(failed_once):
        code, outcome = replay(failed_once, letter["id"])
        wait_for(failed_once, lambda: "cam~replay" not in states(failed_once))
    assert failed_once.frames("cam") == before
    frames = failed_once.frames("cam~replay")
    assert [frame["media_us"] for frame in frames] == [
        frame["media_us"] for frame in before if frame["media_us"] <= frames[-1]["media_us"]
    ]
    assert outcome["frames"] == len(frames)
    assert code == 1  # the chunk at fault fails again
    assert [again["stream"] for again in outcome["dead_letters"]] == ["cam~replay"]
    alerts = [alert for alert in failed_once.alerts() if alert["subject"] == "cam~replay"]
    assert kinds(alerts)[0] == "incident.opened"
    assert kinds(alerts)[-1] == "incident.closed"
    assert all(alert["data"]["replay"] for alert in alerts)
    assert {alert["data"]["suggested_action"] for alert in alerts} == {"review"}
    live = [alert["data"]["suggested_action"] for alert in failed_once.alerts() if alert["subject"] == "cam"]
    assert "block" in live
    for alert in alerts:
        VALIDATOR.validate(alert)
    assert list(outcome["incidents"]) == [alerts[0]["data"]["incident"]]
    assert not any(a["data"]["replay"] for a in failed_once.alerts() if a["subject"] == "cam")


def states(made: Detect) -> set[str]:
    topic = made.topic(Topic.STATE)
    found = [read_states(made.log, TopicPartition(topic, n)) for n in range(made.config.media.partitions)]
    return {stream for group in found for stream in group}


def test_a_letter_of_a_replay_is_replayed_under_the_same_name_and_does_not_multiply(
    failed_once: Detect,
) -> None:
    [first] = listed(failed_once)
    with working(failed_once):
        replay(failed_once, first["id"])
        [_, again] = listed(failed_once)
        _, outcome = replay(failed_once, again["id"])
    assert again["stream"] == "cam~replay"
    assert [letter["stream"] for letter in outcome["dead_letters"]] == ["cam~replay"]
    assert len(listed(failed_once)) == 3
    assert outcome["frames"] > 0


def test_a_replay_that_follows_at_once_has_a_story_of_its_own(failed_once: Detect) -> None:
    [letter] = listed(failed_once)
    for _ in range(2):
        replay(failed_once, letter["id"], wait=False)
    failed_once.run()
    frames = failed_once.frames("cam~replay")
    half = len(frames) // 2
    assert [f["media_us"] for f in frames[:half]] == [f["media_us"] for f in frames[half:]]
    alerts = [alert for alert in failed_once.alerts() if alert["subject"] == "cam~replay"]
    assert kinds(alerts).count("incident.opened") == kinds(alerts).count("incident.closed") == 2


def test_a_worker_that_comes_later_does_not_replay_anew_what_was_forgotten(failed_once: Detect) -> None:
    """Its records lie behind the position, its state is gone, and another stream makes it read them again."""
    place = media_partition("cam~replay", 8)
    live = [chunk for chunk in chunked_live(failed_once) if chunk[0].control is not Control.END]
    failed_once.list_source("live")
    failed_once.write(live[:6], place)
    [letter] = listed(failed_once)
    with working(failed_once):
        replay(failed_once, letter["id"])
        wait_for(failed_once, lambda: "cam~replay" not in states(failed_once))
    frames, alerts = failed_once.frames("cam~replay"), len(failed_once.alerts())
    failed_once.write(live[6:8], place)
    failed_once.run()
    assert failed_once.frames("cam~replay") == frames
    assert len(failed_once.alerts()) == alerts


def chunked_live(made: Detect) -> list[Chunk]:
    clip = write_clip(Path(made.config.data_dir) / "live.mp4", 6, gop=250)
    return [(replace(m, kind=Kind.LIVE), v) for m, v in chunked(clip, "live", made.clock.now_us())]


def test_what_cannot_be_replayed_says_why(failed_once: Detect, tmp_path: Path) -> None:
    [letter] = listed(failed_once)
    failed_once.unlist_source("cam")
    with pytest.raises(UnmaskError, match="stream cam, which is not listed"):
        replay(failed_once, letter["id"])
    failed_once.list_source("cam")
    bad = Record("media", 0, 0, "cam", b"", {"attachment": b"1", "schema": b"1"}, 0)
    publish(failed_once, [bad])
    topic = failed_once.topic(Topic.SOURCES)
    entry = Record(topic, 2, 5, "cam", b"{}", {}, 0)
    letters = dead_letters(failed_once.topic(Topic.DEADLETTER), [entry], Code.SOURCE_SYNTAX, "no url", 1)
    with failed_once.log.producer("ingest") as producer:
        producer.send(letters[0])
        producer.flush(10)
    failed_once.run()
    names = {found["reason"]: found["id"] for found in listed(failed_once)}
    with pytest.raises(UnmaskError, match="cannot be replayed: header epoch is missing"):
        replay(failed_once, names["header epoch is missing; it must be present"])
    with pytest.raises(UnmaskError, match="put the entry of cam right"):
        replay(failed_once, names["no url"])


def test_who_waits_for_nobody_is_told_so(failed_once: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadletters, "WAIT_S", 0.3)
    with pytest.raises(UnmaskError, match="is unmask detect running"):
        replay(failed_once, listed(failed_once)[0]["id"])


def test_segments_of_another_producer_are_replayed_too(tmp_path: Path, planted: Path) -> None:
    clip = write_clip(tmp_path / "short.mp4", 8, [(0, 8)], gop=50)
    sent = segments(clip, "video/mp2t", shift_s=50)
    made = detect(tmp_path)
    records = as_records(sent, "video/mp2t")
    publish(made, records[:3])
    # Good, but behind one that is garbage: the letter of that one holds what came before it.
    publish(made, [replace(records[3], value=b"garbage")])
    publish(made, [ended(records)])
    made.run()
    [letter] = listed(made)
    with working(made):
        code, outcome = replay(made, letter["id"])
    assert code == 1
    assert [again["code"] for again in outcome["dead_letters"]] == ["chunk_invalid"]
    replayed = [frame["media_us"] for frame in made.frames("cam~replay")]
    assert replayed
    assert set(replayed) <= {frame["media_us"] for frame in made.frames("cam")}
    events = [a["type"] for a in made.alerts() if a["subject"] == "cam~replay"]
    assert not any(".feed." in kind for kind in events)


def test_a_chunk_that_kills_its_decoder_leaves_a_letter_that_kills_nothing_else(
    tmp_path: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three parts: the letter holds them all, and what came before from the keyframe on."""
    monkeypatch.setattr(decoder_child, "main", poison.main)
    made = detect(tmp_path, decode=Decode(stall_s=5))
    chunks = chunked(planted, "cam", START_US)
    made.list_source("other")
    calm = [(replace(meta, stream="other"), value) for meta, value in chunks]
    meta, value = chunks[BAD]
    parts = split_parts(meta, value + poison.KILL, -(-(len(value) + len(poison.KILL)) // 3))
    assert len(parts) == 3
    made.write([*chunks[:BAD], *parts, *chunks[BAD + 1 :]], 1)
    made.write(calm, 1)
    made.run()
    [letter] = listed(made)
    assert (letter["code"], letter["records"]) == ("decoder_died", BAD - 1 + 3)
    found = [decode_headers(record.key, record.headers) for record in made.dead()]
    assert [(m.sequence, m.part) for m in found[-4:]] == [(BAD - 1, 0), (BAD, 0), (BAD, 1), (BAD, 2)]
    assert len(made.frames("other")) == 28
    with working(made):
        _, outcome = replay(made, letter["id"])
    assert [again["code"] for again in outcome["dead_letters"]] == ["decoder_died"]
    assert [again["records"] for again in outcome["dead_letters"]] == [letter["records"]]


def records_of(sizes: Sequence[int]) -> list[Record]:
    return [Record("media", 0, n, "cam", bytes(size), {}, 0) for n, size in enumerate(sizes)]


def test_a_letter_is_bounded_in_records_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, left_out = newest(records_of([1] * (MAX_RECORDS + 5)))
    assert (kept[0].offset, len(kept), left_out) == (5, MAX_RECORDS, 5)
    monkeypatch.setattr("stream.deadletter.MAX_BYTES", 10)
    kept, left_out = newest(records_of([4, 4, 4, 4]))
    assert ([record.offset for record in kept], left_out) == ([2, 3], 2)
    kept, left_out = newest(records_of([4, 40]))
    assert ([record.offset for record in kept], left_out) == ([1], 1)


def test_what_would_not_fit_into_the_log_is_left_out_of_the_letter() -> None:
    headers = {"a": bytes(MAX_HEADER_BYTES)}
    big = Record("media", 0, 1, "cam", bytes(101), headers, 0)
    [letter] = dead_letters("dead", [big], Code.CHUNK_INVALID, "x" * 5000, 1, max_value_bytes=100)
    assert isinstance(letter, OutRecord)
    assert (letter.value, letter.headers["dead_cut"]) == (b"", b"headers value")
    assert "a" not in letter.headers
    assert len(letter.headers["dead_reason"]) == 1000
