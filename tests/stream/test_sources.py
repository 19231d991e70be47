"""Every way of naming a source is read right, or refused with what would be right."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stream.errors import Code, UnmaskError
from stream.records import STREAM_ID, Kind
from stream.sources import Scheme, Source, from_entry, parse_source, parse_sources


def one(text: str, environ: dict[str, str] | None = None) -> Source:
    return parse_source(text, environ or {})[0]


@pytest.mark.parametrize(
    ("text", "scheme", "kind", "name", "listen"),
    [
        ("rtmp://live.example/app/studio-1", Scheme.RTMP, Kind.LIVE, "studio-1", False),
        (
            "rtmps://live.example:443/app/Studio 1".replace(" ", "%20"),
            Scheme.RTMP,
            Kind.LIVE,
            "studio-201",
            False,
        ),
        ("rtmp://0.0.0.0:1935/live/key?listen", Scheme.RTMP, Kind.LIVE, "0.0.0.0-1935", True),
        ("rtsp://admin:pw@cam.example:554/axis-media/media.amp", Scheme.RTSP, Kind.LIVE, "media", False),
        ("https://cdn.example/news/index.m3u8?token=abcdef", Scheme.HTTP, Kind.LIVE, "news", False),
        ("https://cdn.example/live/stream.m3u8", Scheme.HTTP, Kind.LIVE, "cdn.example", False),
        ("https://cdn.example/clips/talk.mp4", Scheme.HTTP, Kind.FILE, "talk", False),
        ("srt://gate.example:9000?passphrase=0123456789", Scheme.SRT, Kind.LIVE, "gate.example-9000", False),
        ("srt://:9000?mode=listener", Scheme.SRT, Kind.LIVE, "srt-9000", True),
        ("udp://@239.0.0.1:1234", Scheme.UDP, Kind.LIVE, "239.0.0.1-1234", False),
        ("tcp://:9001?listen", Scheme.TCP, Kind.LIVE, "tcp-9001", True),
        ("-", Scheme.STDIN, Kind.LIVE, "stdin", False),
    ],
)
def test_addresses(text: str, scheme: Scheme, kind: Kind, name: str, listen: bool) -> None:
    source = one(text)
    assert (source.scheme, source.kind, source.id, source.listen) == (scheme, kind, name, listen)


def test_files_pipes_and_given_ids(tmp_path: Path) -> None:
    clip = tmp_path / "My clip=1.MP4"
    clip.touch()
    assert one(str(clip)).id == "my-clip-1"
    assert one(str(clip)).kind is Kind.FILE
    assert one(f"file://{str(clip).replace(' ', '%20')}").address == str(clip)
    assert parse_source(f"talk={clip}")[0].id == "talk"
    assert parse_source(f"talk={clip}")[1]
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    assert (one(str(pipe)).scheme, one(str(pipe)).kind) == (Scheme.PIPE, Kind.LIVE)
    assert one("/dev/null").scheme is Scheme.CAMERA


@pytest.mark.parametrize(
    ("text", "code", "right"),
    [
        ("", Code.SOURCE_SYNTAX, "give rtmp"),
        ("ftp://host/clip.mp4", Code.SOURCE_SYNTAX, "scheme 'ftp' is not supported; give rtmp"),
        ("/no/such/clip.mp4", Code.SOURCE_NOT_FOUND, "No such file"),
        ("rtmp:///live/x", Code.SOURCE_SYNTAX, "names no host; write rtmp://HOST/PATH"),
        ("rtsp://cam:port/x", Code.SOURCE_SYNTAX, "write rtsp://HOST:PORT/PATH"),
        ("srt://host", Code.SOURCE_SYNTAX, "names no port; write srt://HOST:PORT"),
        ("udp://host:1?fifo_size=9", Code.SOURCE_SYNTAX, "remove the others"),
        ("rtsp://cam/x?listen", Code.SOURCE_SYNTAX, "?listen is for rtmp and tcp"),
        ("http://host/a b", Code.SOURCE_SYNTAX, "write it as %20"),
        ("env:NOT_SET", Code.SOURCE_SYNTAX, "variable NOT_SET is empty or not set"),
        ("/", Code.SOURCE_SYNTAX, "is a directory"),
        ("clip\0.mp4", Code.SOURCE_NOT_FOUND, "cannot be read"),
    ],
)
def test_wrong_sources_say_what_is_right(text: str, code: Code, right: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        one(text)
    assert caught.value.code is code
    assert right in str(caught.value)


def test_ids_are_unique_and_given_ones_win() -> None:
    sources = parse_sources(["rtmp://a/l/x", "rtmp://b/l/x", "x-2=rtmp://c/l/y", "rtmp://d/l/x"], {})
    assert [source.id for source in sources] == ["x", "x-3", "x-2", "x-4"]
    with pytest.raises(UnmaskError, match="'x' is given twice"):
        parse_sources(["x=rtmp://a/l/1", "x=rtmp://a/l/2"], {})


@given(st.text(max_size=40))
@example("0@[")  # masked as a password, which leaves half of an IPv6 address
def test_derived_ids_are_legal(path: str) -> None:
    assume(not re.search(r"\s", path))
    assert STREAM_ID.fullmatch(one(f"http://host.example/{path}").id)


def test_a_secret_travels_by_environment_only() -> None:
    address = "rtsp://admin:hunter2@cam.example/one?token=tok3nvalue"
    source = one(f"cam.1={address}")
    assert "hunter2" not in repr(source)
    entry = json.dumps(source.entry())
    assert "hunter2" not in entry
    assert "tok3nvalue" not in entry
    assert source.secret_ref == "env:UNMASK_SOURCE_CAM_2E1"
    environ: dict[str, str] = {}
    source.export(environ)
    assert from_entry(json.loads(entry), environ) == source
    assert from_entry(json.loads(entry), {}).address == ""


def test_an_environment_source_keeps_its_variable() -> None:
    environ = {"CAM": "rtsp://admin:hunter2@cam.example/one"}
    source = one("env:CAM", environ)
    assert (source.id, source.secret_ref) == ("one", "env:CAM")
    assert from_entry(source.entry(), environ) == source
    assert parse_sources(["env:CAM", "env:CAM"], environ)[1].secret_ref == "env:CAM"


def test_a_source_without_secrets_needs_no_environment() -> None:
    source = one("rtmp://host/live/x")
    environ: dict[str, str] = {}
    source.export(environ)
    assert environ == {}
    assert from_entry(source.entry(), {}) == source


@pytest.mark.parametrize(
    "entry",
    [
        {"id": None},
        {"url": 3},
        {"id": "X!"},
        {"scheme": "ftp"},
        {"kind": "song"},
        {"secret_ref": "s3cret"},
        {"labels": {"a": 1}},
    ],
)
def test_wrong_entries_are_refused(entry: dict[str, object]) -> None:
    right = one("rtmp://host/live/x").entry()
    with pytest.raises(UnmaskError) as caught:
        from_entry(right | entry, {})
    assert caught.value.code is Code.SOURCE_SYNTAX
    assert "s3cret" not in str(caught.value)


def test_a_sources_own_secrets_are_found_where_they_stand_alone() -> None:
    source = one("rtsp://admin:hun%24ter2@cam.example/one?token=tok3nvalue")
    text = source.redacted("login hun$ter2 failed, key tok3nvalue, admin:hun%24ter2, cam.example")
    assert text == "login *** failed, key ***, ***, cam.example"
    push = one("rtmp://0.0.0.0/live/k3y-of-studio?listen")
    assert "k3y-of-studio" not in push.redacted("publish k3y-of-studio refused")


def test_a_pushed_stream_has_no_address() -> None:
    [source] = parse_sources(["studio=push:"])
    entry = source.entry()
    assert (source.scheme, source.kind, "url" in entry) == (Scheme.PUSH, Kind.LIVE, False)
    assert from_entry(entry, {}) == source
    assert from_entry({"id": "studio", "scheme": "push", "kind": "live"}, {}) == source
