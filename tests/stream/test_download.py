"""Pulling a file over HTTP: resumed, checked, and in place only when whole. Servers are on 127.0.0.1."""

import hashlib
import re
import resource
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from detectors.registry import part_of
from stream import download
from stream.download import Wanted, fetch
from stream.errors import UnmaskError

DATA = bytes(range(256)) * 4000
"""About 1 MB."""


@dataclass
class Mirror:
    """A server with one file; the fields say how it behaves, `ranges` what it was asked for."""

    data: bytes = DATA
    ranged: bool = True
    cut_after: int | None = None
    cuts: int = 1
    status: int = 200
    shift: int = 0
    sized: bool = True
    held: threading.Event | None = None
    ranges: list[str | None] = field(default_factory=list)
    headers: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.ranges.append(asked)
        self.headers.append(handler.headers.get("Authorization"))
        self.paths.append(handler.path)
        if self.status != 200:
            handler.send_error(self.status)
            return
        begin = int(re.findall(r"\d+", asked)[0]) if asked and self.ranged else 0
        if begin and begin >= len(self.data):
            handler.send_error(416)
            return
        body = self.data[begin:]
        handler.send_response(206 if begin else 200)
        if begin:
            first = begin + self.shift
            handler.send_header("Content-Range", f"bytes {first}-{len(self.data) - 1}/{len(self.data)}")
        if self.sized:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.cut_after is not None and self.cuts:
            self.cuts -= 1
            body = body[: self.cut_after]
        handler.wfile.write(body[: len(body) // 2])
        if self.held is not None:
            self.held.wait(60)
        handler.wfile.write(body[len(body) // 2 :])
        handler.close_connection = True


@contextmanager
def serving(mirror: Mirror) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirror.answer(self)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with running(Handler) as port:
        yield f"http://127.0.0.1:{port}/models"


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    return Wanted("net.pth", hashlib.sha256(DATA).hexdigest(), tmp_path / "cache" / "models" / "net.pth")


def accept(path: Path) -> None:
    pass


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def get(wanted: Wanted, base: str) -> list[tuple[int, int | None]]:
    told: list[tuple[int, int | None]] = []
    fetch(
        wanted,
        base,
        accept,
        lambda done, total: told.append((done, total)),
        lambda: None,
        wait=lambda seconds: None,
    )
    return told


def refused(wanted: Wanted, base: str) -> str:
    with pytest.raises(UnmaskError) as caught:
        get(wanted, base)
    assert not wanted.target.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_comes_whole_with_progress(wanted: Wanted) -> None:
    mirror = Mirror()
    with serving(mirror) as base:
        told = get(wanted, base + "/")
    assert wanted.target.read_bytes() == DATA
    assert told[0] == (0, len(DATA))
    assert told[-1] == (len(DATA), len(DATA))
    assert mirror.paths == ["/models/net.pth"]
    assert [path.name for path in wanted.target.parent.iterdir()] == ["net.pth"]


def test_a_server_that_does_not_say_the_size(wanted: Wanted) -> None:
    with serving(Mirror(sized=False)) as base:
        assert get(wanted, base)[-1] == (len(DATA), None)
    assert wanted.target.read_bytes() == DATA


@pytest.mark.parametrize("ranged", [True, False])
def test_what_was_stopped_goes_on(wanted: Wanted, ranged: bool) -> None:
    wanted.target.parent.mkdir(parents=True)
    part_of(wanted.target).write_bytes(DATA[:1000])
    mirror = Mirror(ranged=ranged)
    with serving(mirror) as base:
        told = get(wanted, base)
    assert mirror.ranges == ["bytes=1000-"]
    assert told[0] == (1000 if ranged else 0, len(DATA))
    assert wanted.target.read_bytes() == DATA


def test_a_connection_that_breaks_is_made_again(wanted: Wanted) -> None:
    mirror = Mirror(cut_after=5000, cuts=2)
    with serving(mirror) as base:
        get(wanted, base)
    assert mirror.ranges == [None, "bytes=5000-", "bytes=10000-"]
    assert wanted.target.read_bytes() == DATA


def test_what_came_is_kept_when_it_breaks_for_good(wanted: Wanted) -> None:
    mirror = Mirror(cut_after=5000, cuts=100)
    with serving(mirror) as base:
        assert f"ended after 15000 of {len(DATA)} bytes; run it again" in refused(wanted, base)
    assert part_of(wanted.target).read_bytes() == DATA[:15000]


def test_a_part_that_is_whole_needs_no_network(wanted: Wanted) -> None:
    wanted.target.parent.mkdir(parents=True)
    part_of(wanted.target).write_bytes(DATA)
    assert get(wanted, "http://127.0.0.1:9/") == []
    assert wanted.target.read_bytes() == DATA


def test_a_part_that_is_too_long_is_begun_anew(wanted: Wanted) -> None:
    wanted.target.parent.mkdir(parents=True)
    part_of(wanted.target).write_bytes(DATA + b"more")
    mirror = Mirror()
    with serving(mirror) as base:
        get(wanted, base)
    assert mirror.ranges == [f"bytes={len(DATA) + 4}-", None]
    assert wanted.target.read_bytes() == DATA


def test_another_hash_is_refused_and_deleted(wanted: Wanted) -> None:
    with serving(Mirror(data=b"x" + DATA[1:])) as base:
        sentence = refused(wanted, base)
    assert f"expected {wanted.sha256}: not the published weights; deleted" in sentence
    assert list(wanted.target.parent.iterdir()) == []


def test_a_tampered_part_is_refused_once_and_then_begun_anew(wanted: Wanted) -> None:
    wanted.target.parent.mkdir(parents=True)
    part_of(wanted.target).write_bytes(b"evil")
    with serving(Mirror()) as base:
        assert "deleted" in refused(wanted, base)
        get(wanted, base)
    assert wanted.target.read_bytes() == DATA


def test_what_the_check_refuses_is_deleted(wanted: Wanted) -> None:
    def check(path: Path) -> None:
        assert path.read_bytes() == DATA
        raise UnmaskError(download.Code.WEIGHTS, "no network")

    with serving(Mirror()) as base, pytest.raises(UnmaskError, match="no network"):
        fetch(wanted, base, check, lambda done, total: None, lambda: None)
    assert list(wanted.target.parent.iterdir()) == []


def test_other_bytes_than_asked_for(wanted: Wanted) -> None:
    wanted.target.parent.mkdir(parents=True)
    part_of(wanted.target).write_bytes(DATA[:1000])
    with serving(Mirror(shift=7)) as base:
        assert "sent other bytes of net.pth than were asked for" in refused(wanted, base)
    assert part_of(wanted.target).read_bytes() == DATA[:1000]


@pytest.mark.parametrize("sized", [True, False])
def test_more_than_a_network_can_have_is_not_stored(
    wanted: Wanted, sized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 300_000)
    with serving(Mirror(sized=sized)) as base:
        assert "a published network has at most 300000" in refused(wanted, base)
    assert list(wanted.target.parent.iterdir()) == []


def test_the_server_s_refusal_is_told(wanted: Wanted) -> None:
    with serving(Mirror(status=404)) as base:
        assert "answered 404 Not Found to net.pth; --from names another place" in refused(wanted, base)
    mirror = Mirror(status=503)
    with serving(mirror) as base:
        assert "answered 503 Service Unavailable" in refused(wanted, base)
    assert len(mirror.paths) == 3


def test_nobody_there(wanted: Wanted) -> None:
    sentence = refused(wanted, "http://127.0.0.1:9")
    assert sentence.startswith(
        "127.0.0.1:9 cannot be reached: Connection refused; without a network pull --from"
    )
    assert list(wanted.target.parent.iterdir()) == []


def test_a_server_that_drips_is_given_up(wanted: Wanted) -> None:
    seconds = iter(range(0, 10**9, 61))
    with (
        serving(Mirror(data=DATA[:2000])) as base,
        pytest.raises(UnmaskError, match=r"sent \d+ bytes in 60 s; run"),
    ):
        fetch(
            wanted,
            base,
            accept,
            lambda done, total: None,
            lambda: None,
            clock=lambda: float(next(seconds)),
            wait=lambda pause: None,
        )


def test_credentials_go_to_the_mirror_and_into_no_message(wanted: Wanted) -> None:
    mirror = Mirror(data=b"other")
    with serving(mirror) as base:
        sentence = refused(wanted, base.replace("//", "//ada:s%2Fcret@"))
    assert mirror.headers == ["Basic " + b64encode(b"ada:s/cret").decode()]
    assert "cret" not in sentence
    assert "ada" not in sentence


def test_the_proxy_of_the_environment_is_used(wanted: Wanted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name in the address exists nowhere: only the proxy can have led there."""
    asked: list[str] = []
    with serving(Mirror()) as base:

        class Proxy(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                with urlopen(self.path.replace("http://mirror.invalid", base)) as response:
                    self.send_response(response.status)
                    self.send_header("Content-Length", response.headers["Content-Length"])
                    self.end_headers()
                    self.wfile.write(response.read())

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        with running(Proxy) as port:
            monkeypatch.setenv("no_proxy", "127.0.0.1")  # or it would ask itself
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
            get(wanted, "http://mirror.invalid")
    assert asked == ["http://mirror.invalid/net.pth"]
    assert wanted.target.read_bytes() == DATA


@pytest.mark.parametrize("as_url", [True, False])
def test_a_mirror_folder(wanted: Wanted, tmp_path: Path, as_url: bool) -> None:
    folder = tmp_path / "mirror of models"
    folder.mkdir()
    base = folder.as_uri() if as_url else str(folder)
    assert "net.pth cannot be read: No such file" in refused(wanted, base)
    (folder / "net.pth").write_bytes(DATA)
    part_of(wanted.target).write_bytes(DATA[:1000])
    assert get(wanted, base)[0] == (1000, len(DATA))
    assert wanted.target.read_bytes() == DATA
    assert (folder / "net.pth").exists()


@pytest.mark.parametrize("base", ["ftp://ada:secret@127.0.0.1/models", "s3://bucket"])
def test_other_addresses_are_refused(wanted: Wanted, base: str) -> None:
    sentence = refused(wanted, base)
    assert "it must be a folder, file:// or http(s):// address" in sentence
    assert "secret" not in sentence


def test_a_cache_that_is_none(wanted: Wanted, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "(engines.cache_dir) cannot be written: Not a directory" in refused(wanted, str(tmp_path))


def test_a_disk_that_takes_no_more(wanted: Wanted) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(Mirror()) as base:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            sentence = refused(wanted, base)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written: File too large" in sentence
        kept = part_of(wanted.target).read_bytes()
        assert kept == DATA[: len(kept)]
        get(wanted, base)
    assert wanted.target.read_bytes() == DATA


def test_two_at_once_fetch_it_once(wanted: Wanted) -> None:
    mirror = Mirror(held=threading.Event())
    waiting = threading.Event()
    assert mirror.held is not None
    with serving(mirror) as base:
        first = threading.Thread(target=get, args=(wanted, base))
        first.start()
        until(lambda: mirror.paths != [])

        def second() -> None:
            fetch(wanted, base, accept, lambda done, total: None, waiting.set)

        other = threading.Thread(target=second)
        other.start()
        assert waiting.wait(60)
        mirror.held.set()
        first.join(60)
        other.join(60)
    assert mirror.paths == ["/models/net.pth"]
    assert [path.name for path in wanted.target.parent.iterdir()] == ["net.pth"]
    assert wanted.target.read_bytes() == DATA


def test_who_waited_goes_on_where_the_other_stopped(wanted: Wanted) -> None:
    mirror = Mirror(cut_after=4000, cuts=3, held=threading.Event())
    waiting = threading.Event()
    assert mirror.held is not None
    with serving(mirror) as base:
        first = threading.Thread(target=refused, args=(wanted, base))
        first.start()
        until(lambda: mirror.paths != [])
        other = threading.Thread(
            target=fetch, args=(wanted, base, accept, lambda done, total: None, waiting.set)
        )
        other.start()
        assert waiting.wait(60)
        mirror.held.set()
        first.join(60)
        other.join(60)
    assert mirror.ranges == [None, "bytes=4000-", "bytes=8000-", "bytes=12000-"]
    assert wanted.target.read_bytes() == DATA
