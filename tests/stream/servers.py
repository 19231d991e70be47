"""Real servers and publishers to attach to: nginx with its RTMP module, ffmpeg, GStreamer's RTSP server.

Each is a process of its own on a loopback port, ended with the test. `freeze` stops it without closing
anything (SIGSTOP), `kill` takes it away at once.
"""

import contextlib
import functools
import http.server
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.conftest import RTMP_MODULE, requires

SYSTEM_PYTHON = "/usr/bin/python3"
"""GStreamer's bindings are installed for Debian's own Python."""
START_S = 10.0

RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory()
factory.set_shared(True)
factory.set_launch(
    "( videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=25/1"
    " ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=25 ! rtph264pay name=pay0 pt=96 )"
)
server.get_mount_points().add_factory("/live", factory)
server.attach(None)
GLib.MainLoop().run()
"""

NGINX_CONFIG = """
load_module {module};
worker_processes 1;
master_process off;
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 128; }}
rtmp {{
    server {{
        listen 127.0.0.1:{rtmp};
        chunk_size 4096;
        application live {{
            live on;
            idle_streams {idle_streams};
            hls on;
            hls_path {directory}/hls;
            hls_fragment 1s;
            hls_playlist_length 6s;
        }}
    }}
}}
http {{
    access_log off;
    client_body_temp_path {directory}/temp;
    proxy_temp_path {directory}/temp;
    fastcgi_temp_path {directory}/temp;
    uwsgi_temp_path {directory}/temp;
    scgi_temp_path {directory}/temp;
    types {{ application/vnd.apple.mpegurl m3u8; video/mp2t ts; }}
    server {{
        listen 127.0.0.1:{http};
        location / {{ root {directory}/hls; }}
    }}
}}
"""


def free_port() -> int:
    """Return a TCP port nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when something listens on `port`."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
            return
        time.sleep(0.05)
    raise RuntimeError(f"server did not start on port {port}: exit code {process.poll()}")


class Program:
    """A process that can be frozen and killed."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Let the program say goodbye: a publisher unpublishes."""
        self.process.terminate()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.kill()

    def restart(self) -> None:
        self.kill()
        self.process = self._start()


class RtmpServer(Program):
    """nginx with its RTMP module; also serves what it receives as HLS."""

    def __init__(self, directory: Path, idle_streams: bool = False) -> None:
        self.rtmp, self.http = free_port(), free_port()
        (directory / "temp").mkdir(parents=True, exist_ok=True)
        (directory / "hls").mkdir(exist_ok=True)
        config = directory / "nginx.conf"
        config.write_text(
            NGINX_CONFIG.format(
                module=RTMP_MODULE,
                directory=directory,
                rtmp=self.rtmp,
                http=self.http,
                idle_streams="on" if idle_streams else "off",
            )
        )
        super().__init__(
            ["nginx", "-c", str(config), "-p", str(directory), "-e", str(directory / "error.log")]
        )
        wait_for_port(self.rtmp, self.process)

    def restart(self) -> None:
        super().restart()
        wait_for_port(self.rtmp, self.process)

    def url(self, name: str = "x") -> str:
        return f"rtmp://127.0.0.1:{self.rtmp}/live/{name}"

    def hls(self, name: str = "x") -> str:
        return f"http://127.0.0.1:{self.http}/{name}.m3u8"


class Publisher(Program):
    """ffmpeg sending a clip over and over, in real time, as it is."""

    def __init__(self, clip: Path, url: str, form: str = "flv", options: Sequence[str] = ()) -> None:
        source = ["-re", "-stream_loop", "-1", "-i", str(clip)]
        quiet = ["ffmpeg", "-nostdin", "-loglevel", "error"]
        super().__init__([*quiet, *source, *options, "-c", "copy", "-f", form, url])


class AudioOnlyAfter(Program):
    """ffmpeg sending the clip's video once, its audio over and over: the video freezes, the audio goes on."""

    def __init__(self, clip: Path, url: str) -> None:
        quiet = ["ffmpeg", "-nostdin", "-loglevel", "error"]
        sources = ["-re", "-i", str(clip), "-re", "-stream_loop", "-1", "-i", str(clip)]
        super().__init__([*quiet, *sources, "-map", "0:v", "-map", "1:a", "-c", "copy", "-f", "flv", url])


class RtspServer(Program):
    """GStreamer's RTSP server with a live test picture at /live."""

    def __init__(self) -> None:
        self.port = free_port()
        super().__init__([SYSTEM_PYTHON, "-c", RTSP_SERVER, str(self.port)])
        wait_for_port(self.port, self.process)

    def url(self) -> str:
        return f"rtsp://127.0.0.1:{self.port}/live"

    def restart(self) -> None:
        super().restart()
        wait_for_port(self.port, self.process)


def requires_rtsp_server() -> None:
    """Skip (in CI: fail) without GStreamer's RTSP server and its Python bindings."""
    check = 'import gi; gi.require_version("GstRtspServer", "1.0")'
    try:
        missing = subprocess.run([SYSTEM_PYTHON, "-c", check], capture_output=True, check=False).returncode
    except OSError:
        missing = 1
    if missing:
        requires("gst-rtsp-server")


@contextlib.contextmanager
def running(program: Program) -> Iterator[Program]:
    """End the program with the block, frozen or not."""
    try:
        yield program
    finally:
        program.kill()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def http_server(
    directory: Path, handler: Callable[..., http.server.BaseHTTPRequestHandler] = _QuietHandler
) -> Iterator[str]:
    """Serve the files of `directory`; yield the address without a final slash."""
    made = functools.partial(handler, directory=str(directory))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), made)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def tcp_server(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Accept connections on a loopback port, each served by `serve` in a thread; yield the port."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    ending = threading.Event()

    def accept() -> None:
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        ending.set()
        thread.join()
        server.close()
