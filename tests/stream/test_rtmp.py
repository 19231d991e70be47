"""What happens when things die, each case with real servers: noticed in time, told, attached again."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.chunks import read_chunk
from stream.controls import FeedPhase
from stream.errors import Code
from stream.records import Control, Kind
from tests.conftest import requires
from tests.stream.media import make_clip
from tests.stream.servers import (
    AudioOnlyAfter,
    Publisher,
    RtmpServer,
    RtspServer,
    free_port,
    requires_rtsp_server,
    running,
)
from tests.stream.watching import QUICK, watching

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requires("ffmpeg")
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=3, size=(320, 240), bframes=0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RtmpServer]:
    requires("nginx-rtmp", "ffmpeg")
    with running(RtmpServer(tmp_path)) as program:
        assert isinstance(program, RtmpServer)
        yield program


def test_every_picture_of_a_healthy_feed_arrives_once(server: RtmpServer, clip: Path) -> None:
    with running(Publisher(clip, server.url())), watching(server.url()) as feed:
        feed.until_live(60)
    status = feed.intake.status()
    packets = feed.packets(feed.attachments[0])
    assert len(packets) == status.frames
    assert feed.decode(feed.attachments[0], 0) == status.frames
    assert status.last.attachment == feed.attachments[-1]
    assert "h264" in status.picked
    assert feed.controls[0][0] is Control.START
    assert feed.named(Control.END) == [{"reason": "stopped", "code": None, "sentence": None}]
    assert feed.named(Control.TICK)[-1]["video"] is True
    assert any(read_chunk(meta, value).audio for meta, value in feed.chunks)


def test_server_dies(server: RtmpServer, clip: Path) -> None:
    with running(Publisher(clip, server.url())) as publisher, watching(server.url()) as feed:
        feed.until_live()
        server.kill()
        feed.until_down()
        assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_LOST
        assert feed.named(Control.TICK)[-1]["video"] is False
        feed.rest(0.5)
        assert feed.code == Code.SOURCE_REFUSED
        server.restart()
        publisher.restart()
        feed.until_live()
        assert len(feed.attachments) == 2
        assert feed.named(Control.TICK)[-1]["code"] is None


def test_publisher_ends_and_the_server_says_so(server: RtmpServer, clip: Path) -> None:
    with running(Publisher(clip, server.url())) as publisher, watching(server.url()) as feed:
        feed.until_live()
        publisher.end()
        feed.until_down()
        feed.rest(0.5)
        assert feed.code == Code.SOURCE_REFUSED
        publisher.restart()
        feed.until_live()
        assert len(feed.named(Control.GAP)) == 1


def test_publisher_ends_and_the_server_says_nothing(tmp_path: Path, clip: Path) -> None:
    requires("nginx-rtmp")
    with running(RtmpServer(tmp_path, idle_streams=True)) as server:
        assert isinstance(server, RtmpServer)
        with running(Publisher(clip, server.url())) as publisher, watching(server.url()) as feed:
            feed.until_live()
            publisher.kill()
            feed.until_down()
            assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
            publisher.restart()
            feed.until_live()


def test_publisher_restarts_while_attached(tmp_path: Path, clip: Path) -> None:
    """Same connection, timestamps back at 0, other parameters: a new epoch in the same attachment."""
    requires("nginx-rtmp")
    other = make_clip(tmp_path / "other.mp4", seconds=2, size=(160, 120), bframes=0)
    with running(RtmpServer(tmp_path, idle_streams=True)) as server:
        assert isinstance(server, RtmpServer)
        with watching(server.url()) as feed:
            with running(Publisher(clip, server.url())):
                feed.until_live(40)
            with running(Publisher(other, server.url())):
                feed.until(lambda: any(meta.epoch == 1 for meta, _ in feed.chunks))
                feed.until_live(20)
    assert len(feed.attachments) == 1
    sizes = {meta.epoch: (meta.codec.width, meta.codec.height) for meta, _ in feed.chunks if meta.codec}
    assert sizes == {0: (320, 240), 1: (160, 120)}
    decoded = sum(feed.decode(feed.attachments[0], epoch) for epoch in (0, 1))
    assert decoded == feed.intake.status().frames


def test_server_frozen(server: RtmpServer, clip: Path) -> None:
    with running(Publisher(clip, server.url())), watching(server.url()) as feed:
        feed.until_live()
        server.freeze()
        feed.until_down()
        assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
        feed.rest(QUICK.first_frame_s + 1)
        assert feed.code == Code.SOURCE_TIMEOUT
        server.thaw()
        feed.until_live()


def test_video_frozen_while_audio_goes_on(server: RtmpServer, clip: Path) -> None:
    with running(AudioOnlyAfter(clip, server.url())), watching(server.url()) as feed:
        feed.until_live(1)
        feed.until_down(seconds=10)
        assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
        heard = feed.intake.status()
        assert feed.phase is FeedPhase.BACKOFF
        # The abandoned reader was busy with audio: it notices, and ends.
        feed.until(lambda: feed.intake.abandoned == 0, 2.0)
        assert heard.discarded <= feed.intake.status().discarded <= heard.discarded + 2


def test_nothing_listens() -> None:
    with watching(f"rtmp://127.0.0.1:{free_port()}/live/x") as feed:
        feed.until(lambda: len(feed.named(Control.TICK)) > 5)
        assert feed.phase in (FeedPhase.BACKOFF, FeedPhase.CONNECTING)
        assert feed.code == Code.SOURCE_REFUSED
        assert feed.intake.status().attempts > 2
        assert feed.named(Control.GAP) == []
        assert len(feed.attachments) == 1


def test_no_such_application(server: RtmpServer) -> None:
    with watching(f"rtmp://127.0.0.1:{server.rtmp}/nothing/x") as feed:
        feed.until(lambda: feed.code == Code.SOURCE_REFUSED)


def test_http_404(server: RtmpServer) -> None:
    with watching(server.hls("nobody")) as feed:
        feed.until(lambda: feed.code == Code.SOURCE_NOT_FOUND)
        assert "HTTP 404" in str(feed.intake.status().sentence)


def test_hls_dies(server: RtmpServer, clip: Path) -> None:
    with running(Publisher(clip, server.url())) as publisher, watching(server.hls()) as feed:
        # The playlist comes with the first whole segment; until then there is none: 404, again and again.
        feed.until_live()
        assert feed.intake.kind is Kind.LIVE
        server.kill()
        feed.until_down()
        assert feed.named(Control.GAP)[0]["code"] in (Code.SOURCE_ENDED, Code.SOURCE_SILENT)
        server.restart()
        publisher.restart()
        feed.until_live()


def test_listening_for_a_publisher(clip: Path) -> None:
    address = f"rtmp://127.0.0.1:{free_port()}/live/x"
    with watching(f"{address}?listen") as feed:
        feed.rest(0.3)
        with running(Publisher(clip, address)):
            feed.until_live()
        feed.until_down()
        with running(Publisher(clip, address)) as publisher:
            feed.until(lambda: publisher.process.poll() is not None or feed.phase is FeedPhase.LIVE)
            if feed.phase is not FeedPhase.LIVE:
                publisher.restart()
            feed.until_live()


@pytest.fixture
def rtsp() -> Iterator[RtspServer]:
    requires_rtsp_server()
    with running(RtspServer()) as program:
        assert isinstance(program, RtspServer)
        yield program


def test_rtsp_server_killed(rtsp: RtspServer) -> None:
    with watching(rtsp.url()) as feed:
        feed.until_live()
        rtsp.kill()
        feed.until_down()
        rtsp.restart()
        feed.until_live()
    assert len(feed.attachments) == 2


def test_rtsp_server_frozen(rtsp: RtspServer) -> None:
    with watching(rtsp.url()) as feed:
        feed.until_live()
        rtsp.freeze()
        feed.until_down()
        assert feed.named(Control.GAP)[0]["code"] == Code.SOURCE_SILENT
        rtsp.thaw()
        feed.until_live()
