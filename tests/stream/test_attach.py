"""Opening sources of every kind, choosing the picture, and saying in one sentence what is wrong."""

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.attach import Attachment, drm_system, explain
from stream.config import Ingest
from stream.controls import FeedPhase
from stream.errors import Code, UnmaskError
from stream.programs import programs
from stream.records import Control, Kind
from stream.sources import from_entry, parse_source
from tests.conftest import requires
from tests.stream.media import demux, make_clip
from tests.stream.servers import Publisher, free_port, http_server, running, tcp_server
from tests.stream.watching import QUICK, Watching, watching

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with clip.mp4, clip.ts and small.ts (120 lines), audio in all."""
    directory = tmp_path_factory.mktemp("clips")
    make_clip(directory / "clip.mp4", seconds=2, size=(320, 240))
    make_clip(directory / "clip.ts", seconds=2, size=(320, 240), start_s=1)
    make_clip(directory / "small.ts", seconds=2, size=(160, 120), start_s=1)
    return directory


def attach(address: str, settings: Ingest = QUICK) -> Attachment:
    return Attachment(parse_source(address)[0], settings, lambda: False)


def refused(address: str, settings: Ingest = QUICK) -> UnmaskError:
    with pytest.raises(UnmaskError) as caught:
        attach(address, settings)
    return caught.value


def read_all(attachment: Attachment) -> list[Any]:
    try:
        return [(packet.stream.type, packet.pts, bytes(packet)) for packet in attachment.packets()]
    finally:
        attachment.close()


@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts"])
def test_a_file_gives_exactly_its_packets(clips: Path, name: str) -> None:
    _, expected = demux(clips / name)
    attachment = attach(str(clips / name))
    assert attachment.kind is Kind.FILE
    assert "320x240 h264" in attachment.picked
    assert read_all(attachment) == [(packet.stream.type, packet.pts, bytes(packet)) for packet in expected]


def test_a_file_ends_and_says_so(clips: Path) -> None:
    with watching(str(clips / "clip.mp4")) as feed:
        feed.until(lambda: feed.intake.over)
    assert feed.phase is FeedPhase.ENDED
    assert feed.named(Control.END) == [{"reason": "finished", "code": None, "sentence": None}]
    assert feed.intake.status().frames == 50
    assert feed.decode(feed.attachments[0], 0) == 50


def test_what_is_no_video_ends_with_a_reason(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.mp4").write_text("Dear reader, this is no video.\n" * 100)
    (tmp_path / "empty.ts").touch()
    with watching(str(tmp_path / "letter.mp4")) as feed:
        feed.until(lambda: feed.intake.over)
    end = feed.named(Control.END)[0]
    assert (end["reason"], end["code"]) == ("failed", Code.SOURCE_INVALID)
    assert "letter.mp4 sends no video that FFmpeg can read" in end["sentence"]
    assert refused(str(tmp_path / "empty.ts")).code in (Code.SOURCE_INVALID, Code.SOURCE_ENDED)


def test_sound_alone_is_refused(tmp_path: Path, clips: Path) -> None:
    with av.open(str(clips / "clip.mp4")) as source, av.open(str(tmp_path / "sound.mp4"), "w") as out:
        template = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = template
                out.mux(packet)
    error = refused(str(tmp_path / "sound.mp4"))
    assert (error.code, "only audio" in str(error)) == (Code.SOURCE_NO_VIDEO, True)


def test_encrypted_files_are_refused_by_name(tmp_path: Path, clips: Path) -> None:
    requires("ffmpeg")
    out = tmp_path / "locked.mp4"
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "ab" * 16, "-encryption_kid", "cd" * 16]
    command = ["ffmpeg", "-loglevel", "error", "-i", str(clips / "clip.mp4"), "-c", "copy", *key, str(out)]
    subprocess.run(command, check=True)
    attachment = attach(str(out))
    with pytest.raises(UnmaskError, match="Common Encryption") as caught:
        read_all(attachment)
    assert caught.value.code is Code.SOURCE_DRM


# Programs of an MPEG-TS.


@pytest.fixture(scope="module")
def two(clips: Path) -> Path:
    """Return a TS with program 9 (240 lines) before program 7 (120 lines), each with sound."""
    requires("ffmpeg")
    out = clips / "two.ts"
    inputs = ["-i", str(clips / "clip.ts"), "-i", str(clips / "small.ts")]
    maps = ["-map", "0:v", "-map", "0:a", "-map", "1:v", "-map", "1:a", "-c", "copy"]
    numbers = ["-program", "program_num=9:st=0:st=1", "-program", "program_num=7:st=2:st=3"]
    subprocess.run(["ffmpeg", "-loglevel", "error", *inputs, *maps, *numbers, str(out)], check=True)
    return out


def test_programs_are_read_from_the_tables(two: Path) -> None:
    table = programs(two.read_bytes())
    assert table == {9: frozenset({0x100, 0x101}), 7: frozenset({0x102, 0x103})}
    assert programs(two.read_bytes()[100:]) == table


@pytest.mark.parametrize(("program", "lines"), [(None, 240), (7, 120), (9, 240)])
def test_the_chosen_or_first_program_is_watched_with_its_sound(
    two: Path, program: int | None, lines: int
) -> None:
    attachment = attach(str(two), QUICK.model_copy(update={"program": program}))
    assert attachment.video.height == lines
    assert attachment.audio is not None
    assert attachment.audio.id == attachment.video.id + 1
    assert {kind for kind, _, _ in read_all(attachment)} == {"video", "audio"}


def test_a_program_that_is_not_there_is_refused_with_those_that_are(two: Path, clips: Path) -> None:
    settings = QUICK.model_copy(update={"program": 8})
    error = refused(str(two), settings)
    assert error.code is Code.SOURCE_NO_VIDEO
    assert "ingest.program is 8" in str(error)
    assert "the programs 9, 7" in str(error)
    # With one program only there is nothing to choose: the setting is for feeds that have several.
    attach(str(clips / "clip.ts"), settings).close()


@given(st.binary(max_size=2000), st.integers(0, 400))
def test_tables_are_read_from_anything_without_a_fault(noise: bytes, at: int) -> None:
    packet = bytes([0x47, 0x40, 0x00, 0x10]) + noise[:184].ljust(184, b"\xff")
    programs(noise)
    programs(noise[:at] + packet * 4 + noise)


# HLS.


@pytest.fixture(scope="module")
def recording(clips: Path) -> Path:
    """Return a directory with an HLS recording of two variants, and the same with DRM."""
    requires("ffmpeg")
    out = clips / "hls"
    out.mkdir()
    for name in ("clip", "small"):
        hls = ["-c", "copy", "-f", "hls", "-hls_time", "1", "-hls_playlist_type", "vod"]
        source = str(clips / f"{name}.ts")
        subprocess.run(
            ["ffmpeg", "-loglevel", "error", "-i", source, *hls, str(out / f"{name}.m3u8")], check=True
        )
    variants = "".join(
        f"#EXT-X-STREAM-INF:BANDWIDTH={rate},RESOLUTION={size}\n{name}.m3u8\n"
        for name, rate, size in (("clip", 500000, "320x240"), ("small", 100000, "160x120"))
    )
    (out / "master.m3u8").write_text(f"#EXTM3U\n{variants}")
    key = '#EXT-X-KEY:METHOD=SAMPLE-AES,URI="skd://x",KEYFORMAT="com.apple.streamingkeydelivery"\n#EXTINF:1,\n0.ts\n'
    (out / "locked.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n{key}#EXT-X-ENDLIST\n")
    (out / "master-locked.m3u8").write_text("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n\nlocked.m3u8\n")
    return out


@pytest.mark.parametrize(("least", "lines"), [(100, 120), (200, 240), (720, 240)])
def test_the_lowest_variant_with_enough_lines(recording: Path, least: int, lines: int) -> None:
    with http_server(recording) as base:
        attachment = attach(f"{base}/master.m3u8", QUICK.model_copy(update={"hls_min_lines": least}))
        assert attachment.video.height == lines
        assert attachment.kind is Kind.FILE
        packets = read_all(attachment)
    assert sum(kind == "video" for kind, _, _ in packets) == 50
    assert any(kind == "audio" for kind, _, _ in packets)


def test_a_recording_behind_http_ends(recording: Path, clips: Path) -> None:
    with http_server(recording) as base, watching(f"{base}/clip.m3u8") as feed:
        feed.until(lambda: feed.intake.over)
    assert feed.named(Control.END)[0]["reason"] == "finished"
    assert feed.intake.status().frames == 50
    assert {meta.kind for meta, _ in feed.chunks} == {Kind.FILE}
    with http_server(clips) as base, watching(f"{base}/clip.mp4") as feed:
        feed.until(lambda: feed.intake.over)
    assert feed.intake.status().frames == 50


@pytest.mark.parametrize("name", ["locked", "master-locked"])
def test_drm_is_refused_by_name(recording: Path, name: str) -> None:
    with http_server(recording) as base:
        error = refused(f"{base}/{name}.m3u8?token=s3cretvalue")
    assert error.code is Code.SOURCE_DRM
    assert "protected by FairPlay" in str(error)
    assert "s3cretvalue" not in str(error)


@pytest.mark.parametrize(
    ("line", "system"),
    [
        (
            '#EXT-X-KEY:METHOD=SAMPLE-AES-CTR,KEYFORMAT="urn:uuid:EDEF8BA9-79D6-4ACE-A3C8-27DCD51D21ED"',
            "Widevine",
        ),
        ('#EXT-X-SESSION-KEY:METHOD=SAMPLE-AES,KEYFORMAT="com.microsoft.playready"', "PlayReady"),
        ("#EXT-X-KEY:METHOD=SAMPLE-AES-CTR,URI=x", "SAMPLE-AES"),
        ('#EXT-X-KEY:METHOD=AES-128,URI="https://host/key"', None),
        ("#EXT-X-KEY:METHOD=NONE", None),
    ],
)
def test_protection_systems_in_playlists(line: str, system: str | None) -> None:
    assert drm_system(f"#EXTM3U\n{line}\n#EXTINF:2,\na.ts\n") == system


class _Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status in its path."""

    def __init__(self, *args: Any, directory: str, **fields: Any) -> None:
        super().__init__(*args, **fields)

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, Code.SOURCE_UNAUTHORISED),
        (403, Code.SOURCE_UNAUTHORISED),
        (404, Code.SOURCE_NOT_FOUND),
        (410, Code.SOURCE_REFUSED),
        (429, Code.SOURCE_REFUSED),
        (503, Code.SOURCE_REFUSED),
    ],
)
def test_http_errors(tmp_path: Path, status: int, code: Code) -> None:
    with http_server(tmp_path, _Answer) as base:
        error = refused(f"{base.replace('://', '://me:hunter2@')}/{status}.m3u8?token=s3cretvalue")
    assert error.code is code
    assert "hunter2" not in str(error)
    assert "s3cretvalue" not in str(error)


# Pipes, TCP, UDP, SRT, stdin.


@contextlib.contextmanager
def writer(pipe: Path, feed: Watching) -> Iterator[BinaryIO]:
    """Open a named pipe for writing once the feed reads it; opening it earlier would block."""
    opened: list[int] = []

    def is_read() -> bool:
        with contextlib.suppress(OSError):
            opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return bool(opened)

    feed.until(is_read)
    os.set_blocking(opened[0], True)
    with open(opened[0], "wb", buffering=0) as file:
        yield file


def test_a_silent_pipe_is_noticed_and_left(tmp_path: Path, clips: Path) -> None:
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    data = (clips / "clip.ts").read_bytes()
    with watching(str(pipe)) as feed:
        with writer(pipe, feed) as file:
            file.write(data)
            feed.until_live(5)
            feed.until_down()
            assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
            feed.until(lambda: feed.intake.abandoned == 0, 2.0)
        with writer(pipe, feed) as file:
            file.write(data)
            feed.until_live(5)
            feed.step()  # the records of what was counted last
            assert len(feed.attachments) == 2


def test_a_pipe_whose_writer_goes_is_opened_again(tmp_path: Path, clips: Path) -> None:
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    with watching(str(pipe)) as feed:
        for attachments in (1, 2):
            with writer(pipe, feed) as file:
                file.write((clips / "clip.ts").read_bytes())
            feed.until(lambda wanted=attachments: len(feed.named(Control.GAP)) == wanted)  # type: ignore[misc]
            assert feed.named(Control.GAP)[-1]["code"] == Code.SOURCE_ENDED
    assert feed.intake.status().frames == 100


def test_stdin_is_read_to_its_end_and_kept_when_silent(clips: Path) -> None:
    ours, theirs = os.pipe()
    data = (clips / "clip.ts").read_bytes()
    with watching("-", stdin_fd=ours) as feed:
        os.write(theirs, data[:60000])
        feed.until(lambda: feed.phase is FeedPhase.LIVE or feed.intake.status().attempts > 1)
        feed.until(lambda: feed.phase is FeedPhase.SILENT)
        assert feed.code == Code.SOURCE_SILENT
        thread = threading.Thread(target=lambda: (os.write(theirs, data[60000:]), os.close(theirs)))
        thread.start()
        feed.until(lambda: feed.intake.over)
        thread.join()
    os.close(ours)
    assert feed.intake.status().frames == 50
    assert feed.named(Control.END)[0]["reason"] == "finished"
    assert len(feed.attachments) == 1


def test_fragmented_mp4_on_stdin(clips: Path, tmp_path: Path) -> None:
    clip = make_clip(
        tmp_path / "live.mp4",
        seconds=2,
        mux_options={"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    )
    with open(clip, "rb") as file, watching("-", stdin_fd=file.fileno()) as feed:
        feed.until(lambda: feed.intake.over)
    assert feed.intake.status().frames == 50


def test_tcp_called_and_awaited(clips: Path) -> None:
    data = (clips / "clip.ts").read_bytes()

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.sendall(data)

    with tcp_server(serve) as port, watching(f"tcp://127.0.0.1:{port}") as feed:
        feed.until(lambda: len(feed.named(Control.GAP)) >= 2)
    assert feed.intake.status().frames >= 100
    port = free_port()
    with watching(f"tcp://127.0.0.1:{port}?listen") as feed:
        feed.rest(0.3)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            serve(connection)
        feed.until(lambda: len(feed.named(Control.GAP)) == 1)
    assert feed.intake.status().frames == 50


def test_a_tcp_peer_that_accepts_and_says_nothing(clips: Path) -> None:
    settings = QUICK.model_copy(update={"first_frame_s": 1.0})
    with (
        tcp_server(lambda connection: time.sleep(10)) as port,
        watching(f"tcp://127.0.0.1:{port}", settings) as feed,
    ):
        feed.until(lambda: feed.code == Code.SOURCE_TIMEOUT, 3.0)


def test_udp(clips: Path) -> None:
    requires("ffmpeg")
    address = f"udp://127.0.0.1:{free_port()}"
    with watching(address) as feed, running(Publisher(clips / "clip.ts", address, "mpegts")) as publisher:
        feed.until_live(30)
        publisher.kill()
        feed.until_down()
        assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
        publisher.restart()
        feed.until_live()


def test_addresses_that_are_not_ours() -> None:
    assert refused(f"udp://192.0.2.1:{free_port()}").code is Code.SOURCE_REFUSED
    assert refused(f"tcp://127.0.0.1:{free_port()}").code is Code.SOURCE_REFUSED
    assert refused("tcp://no-such-host.invalid:99").code is Code.SOURCE_NOT_FOUND


def test_srt_through_ffmpeg(clips: Path) -> None:
    requires("ffmpeg")
    address = f"srt://127.0.0.1:{free_port()}"
    with (
        running(Publisher(clips / "clip.ts", f"{address}?mode=listener", "mpegts")) as publisher,
        watching(f"{address}?mode=caller") as feed,
    ):
        feed.until_live(30)
        publisher.kill()
        feed.until_down()
        publisher.restart()
        feed.until_live()
    assert len(feed.attachments) >= 2
    assert _children() == []


def test_srt_refused_tells_what_ffmpeg_says() -> None:
    requires("ffmpeg")
    error = refused(f"srt://127.0.0.1:{free_port()}?passphrase=s3cretpassphrase")
    assert error.code is Code.SOURCE_REFUSED
    assert "ffmpeg says" in str(error)
    assert "s3cretpassphrase" not in str(error)
    assert _children() == []


def test_srt_without_ffmpeg_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    error = refused("srt://127.0.0.1:9000?passphrase=s3cretpassphrase")
    assert error.code is Code.PROGRAM_MISSING
    assert "needs the program ffmpeg" in str(error)
    assert "s3cretpassphrase" not in str(error)


def _children() -> list[str]:
    """Return the SRT bridges this process has left running."""
    tasks = Path("/proc/self/task")
    pids = [pid for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if Path(f"/proc/{pid}").exists()]
    return [line.decode().replace("\0", " ") for line in lines if b"pipe:1" in line]


# What is wrong, in one sentence.


@pytest.mark.parametrize(
    ("error", "opening", "code"),
    [
        (av.error.ExitError(1, "Immediate exit requested"), False, "timeout"),
        (TimeoutError(), True, "timeout"),
        (OSError(5, "Input/output error"), True, "refused"),
        (OSError(5, "Input/output error"), False, "lost"),
        (PermissionError(1, "Operation not permitted"), True, "refused"),
        (PermissionError(13, "Permission denied"), True, "unauthorised"),
        (ConnectionRefusedError(111, "x"), True, "refused"),
        (ConnectionResetError(104, "x"), False, "lost"),
        (FileNotFoundError(2, "x"), True, "not_found"),
        (socket.gaierror(-2, "x"), True, "not_found"),
        (OSError(113, "x"), True, "refused"),
        (OSError(110, "x"), True, "timeout"),
        (EOFError(), True, "ended"),
        (RuntimeError("what"), False, "lost"),
    ],
)
def test_every_fault_has_a_code_and_a_sentence(error: Exception, opening: bool, code: str) -> None:
    source = parse_source("rtmp://me:hunter2@live.example/app/x")[0]
    explained = explain(error, source, opening)
    assert explained.code == f"source_{code}"
    assert str(explained).startswith("source rtmp://***@live.example/app/x ")
    assert "hunter2" not in str(explained)


def test_a_device_that_is_no_camera() -> None:
    error = refused("/dev/null")
    assert error.code is Code.SOURCE_LOST
    assert "source /dev/null could not be read" in str(error)


def test_a_source_whose_variable_is_missing_is_refused_when_attached() -> None:
    source = parse_source("rtmp://me:hunter2@live.example/app/x")[0]
    with pytest.raises(UnmaskError, match="variable UNMASK_SOURCE_X with its address is not set"):
        Attachment(from_entry(json.loads(json.dumps(source.entry())), {}), QUICK, lambda: False)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Every reader ends with its test: nothing here is blocked for good."""
    yield
    end = time.monotonic() + 3
    while time.monotonic() < end and _readers():
        time.sleep(0.05)
    assert _readers() == []


def _readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("reader ")]
