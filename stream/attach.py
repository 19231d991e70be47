"""Opens any source and yields its packets; never decodes what it hands on (FIELD 2).

All that can go wrong comes out as `UnmaskError` with one redacted sentence. An `Attachment` belongs to the
thread that opened it: `close()` from another one would hang it for good. What blocks in FFmpeg is bounded by
PyAV's timeouts as far as those work; a watchdog elsewhere does not rely on them.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin

import av
import av.error
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.stream import VideoStream

from stream.config import Ingest
from stream.errors import Code, UnmaskError
from stream.pipes import ByteReader, GivenUp, open_fd, open_pipe, open_tcp, open_udp
from stream.programs import SNIFF_BYTES, programs
from stream.records import Kind
from stream.sources import ENV, Scheme, Source
from stream.srt import Bridge

NO_FPS_PROBE = {"fpsprobesize": "0"}
"""Opens in 0.4-1.5 s instead of 1.4-3.5 s; only costs `average_rate`, which nobody here needs."""
OPTIONS: dict[Scheme, dict[str, str]] = {
    Scheme.RTMP: NO_FPS_PROBE,
    # Over UDP a busy network smears pictures; cameras that offer nothing else still work.
    Scheme.RTSP: NO_FPS_PROBE | {"rtsp_flags": "prefer_tcp"},
    # -1 starts at the newest HLS segment: first frame 2.4-3.2 s old instead of 6.5-8 s.
    Scheme.HTTP: NO_FPS_PROBE | {"live_start_index": "-1"},
}
HTTP_FILE_OPTIONS = {"reconnect": "1", "reconnect_on_network_error": "1", "reconnect_delay_max": "5"}
"""A recording resumes at the byte where the connection broke; a live stream is reattached instead."""
CAMERA_OPTIONS: tuple[dict[str, str], ...] = ({"input_format": "h264"}, {"input_format": "mjpeg"}, {})
"""Compressed pictures if the camera offers them: raw ones are a hundred times the bytes."""
OPEN_SHARE = 0.9
"""Where PyAV's own timeout works it comes before the watchdog's, so that a port listened on is free again."""
TS = "mpegts"
PLAYLIST_BYTES = 1024 * 1024
"""No playlist worth reading is longer."""
DRM_SYSTEMS = {
    "com.apple.streamingkeydelivery": "FairPlay",
    "urn:uuid:edef8ba9-79d6-4ace-a3c8-27dcd51d21ed": "Widevine",
    "com.microsoft.playready": "PlayReady",
    "urn:uuid:9a04f079-9840-4286-ab92-e65be0885f95": "PlayReady",
}
"""KEYFORMAT in HLS playlists -> name people know."""


class Attachment:
    """One open source: its chosen video, the audio that goes with it, and their packets.

    `kind` is what the source turned out to be, `picked` says in words what is watched.
    """

    def __init__(self, source: Source, settings: Ingest, given_up: GivenUp, stdin_fd: int = 0) -> None:
        """Open `source`; blocks. Raises `UnmaskError` (any SOURCE code, PROGRAM_MISSING)."""
        self._source = source
        self._settings = settings
        self._given_up = given_up
        self._stdin_fd = stdin_fd
        self._reader: ByteReader | None = None
        self._bridge: Bridge | None = None
        self._opened: InputContainer | None = None
        try:
            self._container = self._open()
            self.video, self.audio = self._pick()
        except BaseException as error:
            explained = self._explain(error, opening=True)
            self.close()
            raise explained from error
        self.kind = self._kind()
        self.picked = self._describe()

    def packets(self) -> Iterator["Packet[Any]"]:
        """Yield the packets of video and audio as they come, until the source ends (or seems to).

        Raises `UnmaskError`: SOURCE_LOST, SOURCE_TIMEOUT, SOURCE_DRM, ...
        """
        streams = [self.video] if self.audio is None else [self.video, self.audio]
        unchecked = True
        try:
            for packet in self._container.demux(streams):
                if not packet.size:
                    continue
                if unchecked and packet.stream_index == self.video.index:
                    _refuse_encrypted(packet)
                    unchecked = False
                yield packet
            self._check_bridge()
        except GeneratorExit:
            raise
        except BaseException as error:
            raise self._explain(error, opening=False) from error

    def close(self) -> None:
        """Let go of everything. Packets handed out must not be used after this."""
        if self._opened is not None:
            self._opened.close()
        if self._bridge is not None:
            self._bridge.close()
        if self._reader is not None:
            self._reader.close()

    def _open(self) -> InputContainer:
        source = self._source
        if not source.address:
            name = (source.secret_ref or "").removeprefix(ENV)
            sentence = f"source {source.shown}: variable {name} with its address is not set here; set it"
            raise UnmaskError(Code.SOURCE_UNAUTHORISED, sentence)
        timeouts = (OPEN_SHARE * self._settings.first_frame_s, self._settings.silence_s)
        if source.scheme is Scheme.CAMERA:
            return self._open_camera(timeouts)
        self._reader = self._open_reader()
        if self._reader is not None:
            form = None if source.scheme in (Scheme.STDIN, Scheme.PIPE) else TS
            self._opened = av.open(self._reader, "r", format=form, options=dict(NO_FPS_PROBE))
            return self._opened
        options = dict(OPTIONS.get(source.scheme, {}))
        if source.listen:
            options["listen"] = "1"
        if source.scheme is Scheme.HTTP and source.kind is Kind.FILE:
            options |= HTTP_FILE_OPTIONS
        try:
            self._opened = av.open(_plain_address(source), "r", options=options, timeout=timeouts)
        except (av.error.InvalidDataError, EOFError):
            self._refuse_protected()
            raise
        if "hls" in self._opened.format.name:
            self._refuse_protected()
        return self._opened

    def _open_reader(self) -> ByteReader | None:
        source, given_up = self._source, self._given_up
        match source.scheme:
            case Scheme.STDIN:
                return open_fd(self._stdin_fd, given_up)
            case Scheme.PIPE:
                return open_pipe(source.address, given_up)
            case Scheme.TCP:
                return open_tcp(source.address, source.listen, self._settings.first_frame_s, given_up)
            case Scheme.UDP:
                return open_udp(source.address, given_up)
            case Scheme.SRT:
                self._bridge = Bridge(source, given_up)
                return self._bridge.reader
            case _:
                return None

    def _open_camera(self, timeouts: tuple[float, float]) -> InputContainer:
        for options in CAMERA_OPTIONS[:-1]:
            with contextlib.suppress(av.error.FFmpegError):
                self._opened = av.open(
                    self._source.address, "r", format="v4l2", options=dict(options), timeout=timeouts
                )
                return self._opened
        self._opened = av.open(self._source.address, "r", format="v4l2", timeout=timeouts)
        return self._opened

    def _pick(self) -> tuple[VideoStream, AudioStream | None]:
        """Return the picture to watch and the audio of the same program (DESIGN 3.11)."""
        everything = self._container.streams
        videos = [video for video in everything.video if not video.disposition & Disposition.attached_pic]
        if not videos:
            found = ", ".join(sorted({stream.type for stream in everything})) or "nothing"
            raise UnmaskError(
                Code.SOURCE_NO_VIDEO,
                f"source {self._source.shown} has no video, only {found}; give one with a picture",
            )
        if "hls" in self._container.format.name:
            video = _variant(videos, self._settings.hls_min_lines)
        else:
            video = self._of_program(videos)
        audio = everything.best("audio", video) if everything.audio else None
        for stream in everything:
            if stream is not video and stream is not audio:
                stream.discard = Discard.all
        return video, audio if isinstance(audio, AudioStream) else None

    def _of_program(self, videos: list[VideoStream]) -> VideoStream:
        """Return the video of the chosen program, else of the first one that has any."""
        best = self._container.streams.best("video")
        default = best if best in videos and self._container.format.name != TS else videos[0]
        table = self._programs()
        wanted = self._settings.program
        if wanted is not None and len(table) > 1 and wanted not in table:
            listed = ", ".join(str(number) for number in table)
            raise UnmaskError(
                Code.SOURCE_NO_VIDEO,
                f"ingest.program is {wanted}, but source {self._source.shown} has the programs {listed}",
            )
        for number, pids in table.items():
            if wanted in (None, number) or len(table) == 1:
                for video in videos:
                    if video.id in pids:
                        return video
        return default if isinstance(default, VideoStream) else videos[0]

    def _programs(self) -> dict[int, frozenset[int]]:
        """Return the programs of an MPEG-TS whose bytes can be looked at; over HTTP they cannot."""
        if self._container.format.name != TS:
            return {}
        if self._reader is not None:
            table = programs(bytes(self._reader.sniffed))
            self._reader.forget()
            return table
        if self._source.scheme is not Scheme.FILE:
            return {}
        with open(self._source.address, "rb") as file:
            return programs(file.read(SNIFF_BYTES))

    def _kind(self) -> Kind:
        """Return FILE for what has a known end: recordings over HTTP are only told by that."""
        if self._source.scheme is not Scheme.HTTP:
            return self._source.kind
        return Kind.FILE if self._container.duration else Kind.LIVE

    def _describe(self) -> str:
        context = self.video.codec_context
        if context is None:
            return f"video of an unknown codec in {self._container.format.name}"
        return f"{context.width}x{context.height} {context.name} in {self._container.format.name}"

    def _refuse_protected(self) -> None:
        """Raise SOURCE_DRM if an HLS playlist, or the first it refers to, names a protection system."""
        if self._source.scheme is not Scheme.HTTP:
            return
        text = self._fetch(self._source.address)
        variant = first_variant(text)
        if variant is not None and drm_system(text) is None:
            text = self._fetch(urljoin(self._source.address, variant))
        system = drm_system(text)
        if system is not None:
            raise UnmaskError(
                Code.SOURCE_DRM,
                f"source {self._source.shown} is protected by {system}; give an address without DRM",
            )

    def _fetch(self, address: str) -> str:
        """Return the text behind `address`, through FFmpeg's own HTTP (same credentials, same TLS)."""
        data = bytearray()
        with (
            contextlib.suppress(av.error.FFmpegError),
            av.open(address, "r", format="data", timeout=self._settings.first_frame_s) as container,
        ):
            for packet in container.demux():
                data += bytes(packet)
                if len(data) > PLAYLIST_BYTES:
                    break
        return data.decode(errors="replace")

    def _check_bridge(self) -> None:
        complaint = self._bridge.complaint() if self._bridge is not None and not self._given_up() else ""
        if complaint:
            raise UnmaskError(Code.SOURCE_LOST, f"source {self._source.shown}: ffmpeg says: {complaint}")

    def _explain(self, error: BaseException, opening: bool) -> BaseException:
        if not isinstance(error, Exception):
            return error
        if self._bridge is not None and isinstance(error, (av.error.FFmpegError, EOFError)):
            complaint = self._bridge.complaint()
            if complaint:
                sentence = f"source {self._source.shown}: ffmpeg says: {complaint}"
                return UnmaskError(Code.SOURCE_REFUSED if opening else Code.SOURCE_LOST, sentence)
        return explain(error, self._source, opening)


def _plain_address(source: Source) -> str:
    """Return the address as FFmpeg takes it: `?listen` is ours."""
    if not source.listen or source.scheme is not Scheme.RTMP:
        return source.address
    base, _, query = source.address.partition("?")
    rest = "&".join(field for field in query.split("&") if field not in ("listen", "listen=1"))
    return f"{base}?{rest}" if rest else base


def _variant(videos: list[VideoStream], min_lines: int) -> VideoStream:
    """Return the smallest picture with at least `min_lines` lines, else the largest."""
    enough = [video for video in videos if video.height >= min_lines]
    if enough:
        return min(enough, key=lambda video: video.height)
    return max(videos, key=lambda video: video.height)


def first_variant(playlist: str) -> str | None:
    """Return the address of the first media playlist that a master playlist names, None if it is none."""
    lines = iter(playlist.splitlines())
    for line in lines:
        if line.startswith("#EXT-X-STREAM-INF"):
            return next(
                (following for following in lines if following and not following.startswith("#")), None
            )
    return None


def drm_system(playlist: str) -> str | None:
    """Return the name of the protection that an HLS playlist asks for, None if we may watch it.

    AES-128 with a plain key is transport encryption that FFmpeg undoes.
    """
    for line in playlist.splitlines():
        if not line.startswith(("#EXT-X-KEY:", "#EXT-X-SESSION-KEY:")):
            continue
        for form, name in DRM_SYSTEMS.items():
            if form in line.lower():
                return name
        if "METHOD=SAMPLE-AES-CTR" in line or ("METHOD=SAMPLE-AES" in line and "skd://" in line):
            return "SAMPLE-AES"
    return None


def _refuse_encrypted(packet: "Packet[Any]") -> None:
    if packet.has_sidedata("encryption_info"):
        raise UnmaskError(
            Code.SOURCE_DRM, "the video is encrypted (Common Encryption); give a source without DRM"
        )


Explanation = tuple[Code, str]

BY_CLASS: tuple[tuple[type[BaseException], Explanation], ...] = (
    (av.error.ExitError, (Code.SOURCE_TIMEOUT, "did not answer in time")),
    (TimeoutError, (Code.SOURCE_TIMEOUT, "did not answer in time")),
    (socket.gaierror, (Code.SOURCE_NOT_FOUND, "names a host that is not known; check the address")),
    (av.error.HTTPUnauthorizedError, (Code.SOURCE_UNAUTHORISED, "wants other credentials (HTTP 401)")),
    (av.error.HTTPForbiddenError, (Code.SOURCE_UNAUTHORISED, "forbids access (HTTP 403)")),
    (av.error.HTTPNotFoundError, (Code.SOURCE_NOT_FOUND, "is not there (HTTP 404)")),
    (av.error.HTTPTooManyRequestsError, (Code.SOURCE_REFUSED, "has had too many requests (HTTP 429)")),
    (av.error.HTTPClientError, (Code.SOURCE_REFUSED, "is refused by its server (HTTP 4xx)")),
    (av.error.HTTPServerError, (Code.SOURCE_REFUSED, "has trouble at its server (HTTP 5xx)")),
    (av.error.ProtocolNotFoundError, (Code.SOURCE_PROTOCOL, "uses a protocol that this FFmpeg lacks")),
    (av.error.DemuxerNotFoundError, (Code.SOURCE_INVALID, "is in no format that FFmpeg knows")),
    (av.error.InvalidDataError, (Code.SOURCE_INVALID, "sends no video that FFmpeg can read")),
    (EOFError, (Code.SOURCE_ENDED, "ended before it showed a picture")),
    (ConnectionRefusedError, (Code.SOURCE_REFUSED, "refuses connections: nothing listens there")),
    (PermissionError, (Code.SOURCE_UNAUTHORISED, "may not be read by this user")),
    (FileNotFoundError, (Code.SOURCE_NOT_FOUND, "is not there")),
    (ConnectionError, (Code.SOURCE_LOST, "closed the connection")),
)
BY_ERRNO: dict[int, Explanation] = {
    errno.ETIMEDOUT: (Code.SOURCE_TIMEOUT, "did not answer in time"),
    errno.EHOSTUNREACH: (Code.SOURCE_REFUSED, "cannot be reached: no route to the host"),
    errno.ENETUNREACH: (Code.SOURCE_REFUSED, "cannot be reached: no route to the network"),
    errno.EADDRINUSE: (Code.SOURCE_REFUSED, "names a port that is already in use here"),
    errno.EADDRNOTAVAIL: (Code.SOURCE_REFUSED, "names an address that this machine does not have"),
    errno.EBUSY: (Code.SOURCE_REFUSED, "is in use by another program"),
}

BY_ERRNO_OPENING: dict[int, Explanation] = {
    # What FFmpeg makes of an unknown host and of an RTMP server that hangs up (no such application).
    errno.EIO: (Code.SOURCE_REFUSED, "cannot be opened: unknown host, no such application or nothing there"),
    # What FFmpeg makes of an RTMP server's "stream not found"; a file not ours to read is EACCES.
    errno.EPERM: (Code.SOURCE_REFUSED, "is refused by its server: nothing is published there, or not for us"),
}


def explain(error: Exception, source: Source, opening: bool) -> UnmaskError:
    """Return `error` as a typed error with one redacted sentence about `source`."""
    if isinstance(error, UnmaskError):
        return UnmaskError(error.code, source.redacted(str(error)))
    code, reason = _classify(error, opening)
    if code is Code.SOURCE_TIMEOUT and source.listen:
        reason = "had no publisher in time"
    detail = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return UnmaskError(code, f"source {source.shown} {reason} ({detail})")


def _classify(error: Exception, opening: bool) -> Explanation:
    number = getattr(error, "errno", None)
    if opening and number in BY_ERRNO_OPENING:
        return BY_ERRNO_OPENING[number]
    if isinstance(error, OSError) and number in BY_ERRNO:
        return BY_ERRNO[number]
    for kind, explanation in BY_CLASS:
        if isinstance(error, kind):
            return explanation
    return Code.SOURCE_LOST, "could not be read" if opening else "broke off"
