"""One feed of ingest: reader threads, watchdog, chunker, and an outbox of records (DESIGN 3.2, 3.9).

The reader thread opens the source, demuxes and builds chunks; the owner (a shard's loop) judges, ticks and
takes what is in the outbox. Both work under one lock that nobody holds while waiting for the source. A reader
that is given up is never interrupted, because that cannot be done (FIELD 2): it is abandoned. Its generation
is over, what it still brings is discarded and counted, and when its read returns it closes what it opened.
"""

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from av.packet import Packet

from stream.attach import Attachment
from stream.backoff import Backoff
from stream.chunks import Chunk, Chunker
from stream.clock import Clock
from stream.config import Config
from stream.controls import Body, End, EndReason, FeedPhase, Gap, Start, Tick, to_body
from stream.errors import Code, UnmaskError
from stream.pipes import GivenUp
from stream.records import Control, Kind, new_attachment
from stream.sources import Scheme, Source
from stream.watchdog import OVER, Loss, Step, Watchdog

log = logging.getLogger(__name__)

OUTBOX_BYTES = 8 * 1024 * 1024
"""What one feed may have waiting for the log, 13 s at 5 Mbit/s. A full outbox halts its reader."""
HUNG_AFTER = 3
"""Times `first_frame_s`: opening gives up after twice that at the latest, where FFmpeg's timeouts work."""

Open = Callable[[GivenUp], Attachment]
"""Opens the feed's source, in the reader's thread."""
CONTROLS: dict[type[Body], Control] = {
    Start: Control.START,
    Tick: Control.TICK,
    Gap: Control.GAP,
    End: Control.END,
}


@dataclass(frozen=True, slots=True)
class Last:
    """Where a stream's last attachment ended: the next must come after it in name and media time."""

    attachment: str = ""
    media_end_us: int = 0


@dataclass(frozen=True, slots=True)
class FeedStatus:
    """What the console and the supervisor know of a feed.

    `capture_us`: receipt of the newest picture (UTC microseconds), None before the first. `frames`, `bytes`:
    video packets and bytes received since the shard began; `fps` over the last tick. `discarded`: packets of
    abandoned readers thrown away. `attempts`: how often the source was opened or tried; `losses`: how often
    that failed or it was lost; `hung`: readers blocked though they were given up long ago.
    """

    stream: str
    phase: FeedPhase
    code: str | None
    sentence: str | None
    picked: str
    last: Last
    capture_us: int | None
    fps: float
    frames: int
    bytes: int
    attempts: int
    losses: int
    discarded: int
    dropped_audio: int
    hung: int

    @classmethod
    def unknown(cls, stream: str, last: Last) -> "FeedStatus":
        """Return the status of a feed that has never reported."""
        return cls(stream, FeedPhase.CONNECTING, None, None, "", last, None, 0.0, 0, 0, 0, 0, 0, 0, 0)


class Intake:
    """One feed. `attach` starts a reader; tests put their own in its place."""

    def __init__(
        self,
        source: Source,
        config: Config,
        clock: Clock,
        rng: random.Random,
        last: Last,
        open_source: Open,
        wake: Callable[[], None] = lambda: None,
        attach: Callable[["Intake", int], threading.Thread] | None = None,
    ) -> None:
        self.source = source
        self._config = config
        self._clock = clock
        self._attach = attach or _start_reader
        self.open = open_source
        self._wake = wake
        self._room = threading.Condition()
        settings = config.ingest
        # A server that waits for its publisher must not sleep when he calls.
        longest = settings.backoff_first_s if source.listen else settings.backoff_max_s
        backoff = Backoff(settings.backoff_first_s, longest, settings.backoff_jitter, rng)
        self._watchdog = Watchdog(source.shown, settings, _loss(source, source.kind), backoff, clock)
        self._last = last
        self._generation = 0
        self._readers: dict[int, threading.Thread] = {}
        self._given_up: dict[int, float] = {}
        self._outbox: deque[Chunk] = deque()
        self._outbox_bytes = 0
        self._picked = ""
        self._used = self._flowing = False
        self._told: Code | None = None
        self._ended = False
        self._capture_us: int | None = None
        self._frames = self._bytes = 0
        self._attempts = self._losses = self._discarded = self._dropped_audio = 0
        self._in_attachment = (0, 0)
        self._chunker = self._begin(source.kind)
        self._next_tick = clock.monotonic()
        self._fps_since = (clock.monotonic(), 0)
        self._fps = 0.0

    # What the owner calls.

    def start(self) -> None:
        """Start the first reader."""
        with self._room:
            self._start_reader()

    def step(self) -> None:
        """Judge the feed, act on it, and tick when a tick is due."""
        with self._room:
            if self._ended:
                return
            self._forget_readers()
            if self._full:
                self._watchdog.excuse()
            self._act(self._watchdog.check())
            self._put(self._chunker.flush_due())
            self._tick()

    def take(self, limit: int | None = None) -> list[Chunk]:
        """Return records in order, the first and then as many as stay within `limit` bytes (None: all)."""
        taken: list[Chunk] = []
        size = 0
        with self._room:
            while self._outbox:
                following = len(self._outbox[0][1])
                if taken and limit is not None and size + following > limit:
                    break
                taken.append(self._outbox.popleft())
                size += following
            self._outbox_bytes -= size
            self._room.notify_all()
        return taken

    def stop(self) -> None:
        """Stop watching: what is pending and an `end` go into the outbox, the reader is left to itself."""
        with self._room:
            if self._ended:
                return
            self._watchdog.stop()
            self._abandon()
            self._end(End(EndReason.STOPPED))

    def leave(self) -> None:
        """Let go without an `end`: somebody else is to take the feed up again."""
        with self._room:
            if not self._ended:
                self._put(self._chunker.flush())
            self._abandon()
            self._ended = True

    @property
    def over(self) -> bool:
        """Whether the feed has ended and everything it left was taken."""
        with self._room:
            return self._ended and not self._outbox

    @property
    def finished(self) -> bool:
        """Whether the source came to its end by itself; only files and stdin ever do."""
        with self._room:
            return self._ended and self._watchdog.phase is FeedPhase.ENDED

    def reached(self) -> Last:
        """Return the newest attachment and the end of all media taken up so far."""
        with self._room:
            return self._reached()

    @property
    def abandoned(self) -> int:
        """How many readers are given up and have not ended yet."""
        with self._room:
            return sum(
                reader.is_alive() for number, reader in self._readers.items() if number in self._given_up
            )

    @property
    def hung(self) -> int:
        """How many of them should have ended long ago by FFmpeg's own timeouts: blocked for good."""
        with self._room:
            return self._count_hung()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the readers to close what they opened."""
        end = self._clock.monotonic() + timeout
        for reader in list(self._readers.values()):
            reader.join(max(0.0, end - self._clock.monotonic()))

    def status(self) -> FeedStatus:
        with self._room:
            error = self._watchdog.error
            return FeedStatus(
                stream=self.source.id,
                phase=self._watchdog.phase,
                code=None if error is None else error.code.value,
                sentence=None if error is None else str(error),
                picked=self._picked,
                last=self._reached(),
                capture_us=self._capture_us,
                fps=self._fps,
                frames=self._frames,
                bytes=self._bytes,
                attempts=self._attempts,
                losses=self._losses,
                discarded=self._discarded,
                dropped_audio=self._dropped_audio + self._chunker.dropped_audio,
                hung=self._count_hung(),
            )

    # What readers call.

    def current(self, generation: int) -> bool:
        """Whether what this reader brings is still wanted. Needs no lock: it only ever turns false."""
        return generation == self._generation and not self._ended

    def opened(self, generation: int, attachment: Attachment) -> bool:
        """The source is open; return whether to go on."""
        with self._room:
            if not self.current(generation):
                return False
            self._watchdog.learned(_loss(self.source, attachment.kind))
            if self._used or attachment.kind is not self.kind:
                self._retire()
                self._chunker = self._begin(attachment.kind)
            self._used = self._flowing = True
            self._told = None
            self._picked = attachment.picked
            log.info("stream %s: attached, %s", self.source.id, attachment.picked)
            return True

    def packet(self, generation: int, packet: "Packet[Any]", is_video: bool) -> bool:
        """Take one packet; blocks while the outbox is full. Return whether to go on."""
        with self._room:
            self._room.wait_for(lambda: not self.current(generation) or not self._full)
            if not self.current(generation):
                self._discarded += 1
                return False
            self._bytes += packet.size
            if is_video:
                self._frames += 1
                self._capture_us = self._clock.now_us()
                self._watchdog.picture()
            done = self._chunker.push(packet)
            self._put(done)
        if done:
            self._wake()
        return True

    def ended(self, generation: int, error: UnmaskError | None, finite: bool) -> None:
        """The reader is at the end: `error`, or none if the source just stopped (`finite`: as it should)."""
        with self._room:
            if not self.current(generation):
                return
            self._put(self._chunker.flush())
            if error is None and finite:
                self._watchdog.finished()
            else:
                self._watchdog.lost(error or _stopped(self.source))
            self._after_loss()
        self._wake()

    # Inside, under the lock.

    @property
    def _full(self) -> bool:
        return self._outbox_bytes >= OUTBOX_BYTES

    def _act(self, step: Step) -> None:
        if step is Step.ATTACH:
            self._start_reader()
        elif step is Step.ABANDON:
            self._put(self._chunker.flush())
            self._after_loss()

    def _start_reader(self) -> None:
        self._abandon()
        self._attempts += 1
        self._readers[self._generation] = self._attach(self, self._generation)

    def _abandon(self) -> None:
        """End the present generation: its reader, blocked or not, is heard no more."""
        self._given_up.setdefault(self._generation, self._clock.monotonic())
        self._generation += 1
        self._room.notify_all()

    def _forget_readers(self) -> None:
        self._readers = {number: reader for number, reader in self._readers.items() if reader.is_alive()}
        self._given_up = {number: at for number, at in self._given_up.items() if number in self._readers}

    def _count_hung(self) -> int:
        since = self._clock.monotonic() - HUNG_AFTER * self._config.ingest.first_frame_s
        return sum(
            reader.is_alive() and self._given_up.get(number, since) < since
            for number, reader in self._readers.items()
        )

    def _after_loss(self) -> None:
        """Say what happened; for a feed that is over, for good."""
        self._abandon()
        error = self._watchdog.error
        if error is None:
            self._end(End(EndReason.FINISHED))
            return
        self._losses += 1
        # The same news again and again is no news: a feed may be away for days.
        level = logging.DEBUG if error.code is self._told else logging.WARNING
        self._told = error.code
        log.log(level, "stream %s: %s", self.source.id, error)
        if self._watchdog.phase in OVER:
            self._end(End(EndReason.FAILED, error.code, str(error)))
            return
        if self._flowing:
            self._flowing = False
            self._control(Gap(error.code, str(error), 0, self._capture_us))
        # Told at once, not at the next tick.
        self._next_tick = self._clock.monotonic()
        self._tick()

    def _tick(self) -> None:
        now = self._clock.monotonic()
        if now < self._next_tick or self._full or self._ended:
            return
        self._next_tick = max(now, self._next_tick + self._config.ingest.tick_s)
        self._measure(now)
        error = self._watchdog.error
        frames_before, bytes_before = self._in_attachment
        self._control(
            Tick(
                capture_us=self._capture_us,
                video=self._watchdog.alive,
                phase=self._watchdog.phase,
                frames=self._frames - frames_before,
                bytes=self._bytes - bytes_before,
                code=None if error is None else error.code,
                sentence=None if error is None else str(error),
            )
        )

    def _measure(self, now: float) -> None:
        since, frames = self._fps_since
        if now - since >= self._config.ingest.tick_s:
            self._fps = (self._frames - frames) / (now - since)
            self._fps_since = (now, self._frames)

    def _retire(self) -> None:
        """Keep what is to be known of an attachment that is over."""
        self._dropped_audio += self._chunker.dropped_audio
        self._last = self._reached()

    def _reached(self) -> Last:
        return Last(self._last.attachment, max(self._last.media_end_us, self._chunker.media_end_us))

    def _begin(self, kind: Kind) -> Chunker:
        """Begin a new attachment and return its chunker."""
        now_us = self._clock.now_us()
        self._last = Last(new_attachment(now_us, self._last.attachment), self._last.media_end_us)
        self.kind = kind
        self._in_attachment = (self._frames, self._bytes)
        chunker = Chunker(
            self.source.id,
            self._last.attachment,
            kind,
            self._config.media.chunk_ms,
            self._clock,
            self._last.media_end_us,
        )
        start = Start(self.source.shown, self.source.scheme, kind)
        self._put([chunker.control(Control.START, to_body(start))])
        return chunker

    def _control(self, body: Body) -> None:
        self._put([self._chunker.control(CONTROLS[type(body)], to_body(body))])

    def _end(self, body: End) -> None:
        self._put(self._chunker.flush())
        self._control(body)
        self._ended = True

    def _put(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._outbox.append(chunk)
            self._outbox_bytes += len(chunk[1])


def _loss(source: Source, kind: Kind) -> Loss:
    if kind is Kind.FILE:
        return Loss.END
    return Loss.WAIT if source.scheme is Scheme.STDIN else Loss.REATTACH


def _stopped(source: Source) -> UnmaskError:
    return UnmaskError(Code.SOURCE_ENDED, f"source {source.shown} ended the stream")


def _start_reader(intake: Intake, generation: int) -> threading.Thread:
    name = f"reader {intake.source.id} {generation}"
    thread = threading.Thread(target=read, args=(intake, generation), name=name, daemon=True)
    thread.start()
    return thread


def read(intake: Intake, generation: int) -> None:
    """Read one attachment of a feed to its end: the body of a reader thread."""
    attachment = None
    try:
        attachment = intake.open(lambda: not intake.current(generation))
        error = _pump(intake, generation, attachment)
        finite = attachment.kind is Kind.FILE or intake.source.scheme is Scheme.STDIN
        intake.ended(generation, error, finite)
    except UnmaskError as error:
        intake.ended(generation, error, False)
    except Exception as error:
        # A reader must not die unheard: its feed would look alive until the silence is noticed.
        log.exception("stream %s: reader failed", intake.source.id)
        sentence = f"reader of {intake.source.shown} failed: {type(error).__name__}"
        intake.ended(generation, UnmaskError(Code.SOURCE_LOST, sentence), False)
    finally:
        if attachment is not None:
            attachment.close()


def _pump(intake: Intake, generation: int, attachment: Attachment) -> UnmaskError | None:
    """Hand over packets while they are wanted; return the error that ended them, None at the end."""
    if not intake.opened(generation, attachment):
        return None
    video = attachment.video.index
    try:
        for packet in attachment.packets():
            if not intake.packet(generation, packet, packet.stream_index == video):
                return None
    except UnmaskError as error:
        return error
    return None
