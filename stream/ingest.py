"""Ingest: feeds in shards, a process for a handful, watched and restarted from outside (DESIGN 3.9).

Each feed (`stream.intake`) writes to `<prefix>.media`: chunks, and control records in order with them
(`stream.controls`). Every attach is a new attachment, whose first record is `start`; a `tick` comes each
`tick_s` whatever happens; losing a feed is told by a `gap` and by ticks with `video` false; a feed that is
over says `end`. A shard that is killed, or whose parent died, says nothing: to those who read the log its
feeds are then unwatched, and incidents stay open.

Here is the parent, which starts, watches and restarts; what runs in a shard is in `stream.shard`.
"""

import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe

from stream.backoff import Backoff
from stream.clock import Clock, Deadline
from stream.config import Config
from stream.controls import FeedPhase
from stream.errors import Code
from stream.intake import FeedStatus, Last
from stream.log import LogFactory
from stream.records import Kind
from stream.shard import LOOP_S, Add, Cluster, Failure, Gone, Keep, Remove, Report, ShardJob, Stop
from stream.sources import Scheme, Source
from stream.spool import Home

log = logging.getLogger(__name__)

SHARD_SILENT_S = 30.0
"""A shard that reports nothing for this long is wedged: it reports every tick."""
ISOLATE_AFTER = 2
"""Restarts that a feed may cost its shard before it gets a process of its own."""
BLAME_S = 3600.0
"""Restarts older than this are forgotten."""
GIVE_UP_FILE_AFTER = 3
"""Restarts that a file may cost: each reads it again from its beginning, as a story of its own."""
SETTLE_S = 3.0
"""A shard that let its feeds go, because its parent stood still, starts again after this: by then the parent
knows whether they were given to another member."""
STOP_SHARE = 0.8
"""Of the time to stop, what a shard gets to write its ends; the rest is for its process to go."""
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""Each reattach is a new thread and glibc gives it an arena: 240 of them grew 7 MiB, in two arenas 0.7."""
ENTRY = "from stream.shard import shard_main; shard_main({fd})"


@dataclass(slots=True)
class _Child:
    """One shard as its parent sees it. `process` None: waiting for `start_at`, or done."""

    name: str
    sources: list[Source]
    backoff: Backoff
    start_at: float
    alone: bool = False
    """For a feed that cost others too much, or to deliver what is left over: takes no other feed."""
    leaving: dict[str, bool] = field(default_factory=dict)
    """Feeds that are to go and have not yet; true: with an `end`."""
    emptied: bool = False
    """It lost its last feed and may end, although it got another since."""
    process: subprocess.Popen[bytes] | None = None
    channel: Connection | None = None
    heard_at: float = 0.0
    done: bool = False
    failure: Failure | None = None
    spooled: int = 0
    dropped: int = 0
    """Of the process that runs; those of earlier ones are in the supervisor's sum."""


class IngestSupervisor:
    """Runs feeds in shards and keeps them running. Call `poll` several times a second, from one thread.

    With `home` the shards are those of a member of a group over a cluster: each has a spool there, and lets
    its feeds go unless `keep` is called, by any thread, each second.
    """

    def __init__(
        self,
        config: Config,
        log_factory: LogFactory,
        clock: Clock,
        rng: random.Random,
        home: Home | None = None,
        lease_s: float = SHARD_SILENT_S,
    ) -> None:
        self._config = config
        self._log_factory = log_factory
        self._clock = clock
        self._rng = rng
        self._home = home
        self._lease_s = lease_s
        self._children: list[_Child] = []
        self._sending = threading.Lock()
        self._feeds: dict[str, FeedStatus] = {}
        self._last: dict[str, Last] = {}
        self._blame: Counter[str] = Counter()
        self._blamed_at: deque[tuple[float, str]] = deque()
        self._stopped = False
        self._dropped = 0
        self.given_up: set[str] = set()
        """Files that killed their process too often; no `end` was written for them."""
        self.restarts = 0
        """Shards started again after they died or hung."""
        self._slots: dict[str, str] = {}
        """In which slot a stream was last: what may be left in its spool must come before what is new."""
        for slot, streams in home.left_over().items() if home is not None else ():
            self._slots |= dict.fromkeys(streams, slot)
            self._child(slot, alone=True)

    def start(self, sources: Sequence[Source], last: Mapping[str, Last] | None = None) -> None:
        """Start the shards of `sources`. `last`: where earlier runs left each stream, as far as known."""
        self.add(sources, last)
        self.poll()

    def add(self, sources: Sequence[Source], last: Mapping[str, Last] | None = None) -> None:
        """Take feeds, also while others run; one that is here already is attached anew.

        `last`: behind what a stream's attachments must lie, as far as the log knows.
        """
        for source in sources:
            source.export(os.environ)
            mine, told = self._last.get(source.id, Last()), (last or {}).get(source.id, Last())
            self._last[source.id] = Last(
                max(mine.attachment, told.attachment), max(mine.media_end_us, told.media_end_us)
            )
            self._feeds.pop(source.id, None)
            self.given_up.discard(source.id)
            for child in self._children:
                if child.done:
                    child.sources = [other for other in child.sources if other.id != source.id]
            child = self._holder(source.id) or self._place(source.id)
            child.leaving.pop(source.id, None)
            child.sources = [other for other in child.sources if other.id != source.id] + [source]
            if child.process is not None:
                self._say(child, Add(source.entry(), self._last[source.id]))

    def remove(self, streams: Collection[str], end: bool) -> None:
        """Let feeds go: with an `end` if nobody goes on with them, else without."""
        for child in self._children:
            going = tuple(source.id for source in child.sources if source.id in streams and not child.done)
            child.leaving |= dict.fromkeys(going, end)
            if going and child.process is not None:
                self._say(child, Remove(going, end))
            elif not end:
                for stream in going:
                    self._forget(child, stream)

    def hand_over(self, streams: Collection[str], deadline: Deadline) -> None:
        """Let feeds go to another process; when this returns nobody here reads them any more."""
        self.remove(streams, end=False)
        wanted = set(streams)
        while not deadline.passed() and any(wanted & child.leaving.keys() for child in self._children):
            self.poll()
            self._clock.sleep(min(LOOP_S, deadline.left()))
        for child in self._children:
            late = wanted & child.leaving.keys()
            if late and child.process is not None:
                log.error("shard %s keeps %s, replaced", child.name, ", ".join(sorted(late)))
                self._lose(child)
            for stream in late:
                self._forget(child, stream)

    def keep(self) -> None:
        """Tell all shards that their feeds are still ours."""
        for child in list(self._children):
            self._say(child, Keep())

    def poll(self) -> None:
        """Take in reports, replace what died or hangs. Never blocks."""
        for child in list(self._children):
            self._listen(child)
            self._look_after(child)
        self._children = [child for child in self._children if child.sources or not child.done]

    def statuses(self) -> dict[str, FeedStatus]:
        """Return the newest status of each feed that has reported, by stream id."""
        return dict(self._feeds)

    @property
    def spooled(self) -> int:
        """Records that wait on disk for the cluster."""
        return sum(child.spooled for child in self._children)

    @property
    def dropped(self) -> int:
        """Records lost on the way to the cluster."""
        return self._dropped + sum(child.dropped for child in self._children)

    def finished(self) -> bool:
        """Whether every feed is over (only files and stdin ever are)."""
        return all(child.done for child in self._children)

    def failures(self) -> list[Failure]:
        """Return why shards last failed, of those that have not run since."""
        return [child.failure for child in self._children if child.failure is not None]

    def pids(self) -> list[int]:
        """Return the process ids of the shards that run."""
        return [child.process.pid for child in self._children if child.process is not None]

    def stop(self, deadline: Deadline, end: bool = True) -> None:
        """End all feeds in order, or let them go; what does not end within the deadline is killed."""
        self._stopped = True
        for child in self._children:
            self._say(child, Stop(STOP_SHARE * deadline.left(), end))
        running = [child for child in self._children if child.process is not None]
        while running and not deadline.passed():
            for child in running:
                self._listen(child)
            running = [child for child in running if child.process and child.process.poll() is None]
            self._clock.sleep(min(LOOP_S, deadline.left()))
        for child in self._children:
            self._listen(child)
            self._bury(child, kill=True)

    def _say(self, child: _Child, message: Add | Remove | Keep | Stop) -> None:
        # The keeper speaks too: no message may stand in another, nor go to a channel closed meanwhile.
        with self._sending, contextlib.suppress(OSError):
            if child.channel is not None:
                child.channel.send(message)

    def _holder(self, stream: str) -> _Child | None:
        for child in self._children:
            if not child.done and any(source.id == stream for source in child.sources):
                return child
        return None

    def _place(self, stream: str) -> _Child:
        """Return the shard that is to take a feed it does not have yet."""
        slot = self._slots.get(stream)
        if self._blame[stream] >= ISOLATE_AFTER:
            return self._child(f"only-{stream}", alone=True)
        open_ = [child for child in self._children if not child.done]
        for child in open_:
            if child.name == slot:
                return child
        size = self._config.ingest.shard_size
        for child in open_:
            # One that loses its last feed ends, and perhaps has already.
            staying = [source for source in child.sources if source.id not in child.leaving]
            if not child.alone and len(child.sources) < size and (staying or child.process is None):
                return child
        return self._child(self._free_slot())

    def _free_slot(self) -> str:
        taken = {child.name for child in self._children}
        return next(name for name in map(str, range(len(taken) + 1)) if name not in taken)

    def _child(self, name: str, alone: bool = False) -> _Child:
        settings = self._config.ingest
        backoff = Backoff(
            settings.backoff_first_s, settings.backoff_max_s, settings.backoff_jitter, self._rng
        )
        child = next((other for other in self._children if other.name == name and not other.done), None)
        if child is None:
            child = _Child(name, [], backoff, self._clock.monotonic(), alone)
            self._children.append(child)
        return child

    def _forget(self, child: _Child, stream: str) -> None:
        child.leaving.pop(stream, None)
        child.sources = [source for source in child.sources if source.id != stream]
        self._feeds.pop(stream, None)
        child.emptied = not child.sources
        if child.emptied and child.process is None and not self._has_spool(child):
            child.done = True

    def _has_spool(self, child: _Child) -> bool:
        return self._home is not None and self._home.slot(child.name).exists()

    def _look_after(self, child: _Child) -> None:
        if child.done or self._stopped:
            return
        now = self._clock.monotonic()
        if child.process is None:
            if now >= child.start_at:
                self._spawn(child)
            return
        code = child.process.poll()
        if code is None and now - child.heard_at > SHARD_SILENT_S:
            log.error("shard %s reports nothing for %.0f s, replaced", child.name, now - child.heard_at)
            self._lose(child)
        elif code is not None:
            self._listen(child)
            self._ended(child, code)

    def _ended(self, child: _Child, code: int) -> None:
        """Judge the end of a shard: done if all its feeds are."""
        if child.failure is not None and child.failure.code is Code.LOG_LEASE:
            log.warning("shard %s: %s", child.name, child.failure.sentence)
            self._bury(child)
            child.start_at = self._clock.monotonic() + SETTLE_S
            return
        if code == 0 and child.emptied and child.sources:
            self._bury(child)
            return
        if code == 0 and all(self._over(source.id) for source in child.sources):
            child.done = True
            self._bury(child)
            return
        log.error("shard %s ended with code %d, started again", child.name, code)
        self._lose(child)

    def _lose(self, child: _Child) -> None:
        """Bury a shard that failed its feeds; plan its successor, without the feeds that cost too much."""
        self._bury(child, kill=True)
        self.restarts += 1
        culprit = child.failure.culprit if child.failure is not None else None
        blamed = [source.id for source in child.sources if culprit in (None, source.id)]
        self._remember(blamed)
        # What is over stays over; a restart would read files again from the beginning.
        going = {stream for stream, end in child.leaving.items() if not end}
        child.sources = [
            source for source in child.sources if not self._over(source.id) and source.id not in going
        ]
        child.leaving = {stream: end for stream, end in child.leaving.items() if end}
        sentence = (
            child.failure.sentence if child.failure is not None else "its process ended, a new one starts"
        )
        for source in list(child.sources):
            self._mark_lost(source.id, sentence)
            if source.kind is Kind.FILE and self._blame[source.id] >= GIVE_UP_FILE_AFTER:
                child.sources.remove(source)
                self._give_up(source.id)
        if len(child.sources) > 1:
            self._isolate(child)
        child.done = not child.sources and not self._has_spool(child)
        child.start_at = self._clock.monotonic() + child.backoff.wait_s()

    def _over(self, stream: str) -> bool:
        """Whether the source came to its end. Stopped by anybody but us is not over: it goes on."""
        status = self._feeds.get(stream)
        return status is not None and status.phase is FeedPhase.ENDED

    def _remember(self, blamed: Sequence[str]) -> None:
        now = self._clock.monotonic()
        self._blamed_at.extend((now, stream) for stream in blamed)
        while now - self._blamed_at[0][0] > BLAME_S:
            self._blamed_at.popleft()
        self._blame = Counter(stream for _, stream in self._blamed_at)

    def _isolate(self, child: _Child) -> None:
        for source in list(child.sources):
            if self._blame[source.id] >= ISOLATE_AFTER and len(child.sources) > 1:
                child.sources.remove(source)
                self._child(f"only-{source.id}", alone=True).sources.append(source)
                log.warning("stream %s gets a process of its own", source.id)

    def _mark_lost(self, stream: str, sentence: str) -> None:
        status = self._feeds.get(stream)
        if status is not None:
            code = Code.STAGE_WEDGED.value
            self._feeds[stream] = replace(
                status, phase=FeedPhase.BACKOFF, code=code, sentence=sentence, fps=0.0
            )

    def _give_up(self, stream: str) -> None:
        log.error("stream %s has ended its process %d times, given up", stream, GIVE_UP_FILE_AFTER)
        self.given_up.add(stream)
        sentence = f"reading it has ended its process {GIVE_UP_FILE_AFTER} times; it is not read any more"
        last = self._last.get(stream, Last())
        status = self._feeds.get(stream) or FeedStatus.unknown(stream, last)
        self._feeds[stream] = replace(
            status, phase=FeedPhase.ENDED, code=Code.SOURCE_INVALID.value, sentence=sentence, fps=0.0
        )

    def _spawn(self, child: _Child) -> None:
        ours, theirs = Pipe()
        stdin = 0 if any(source.scheme is Scheme.STDIN for source in child.sources) else None
        kept = os.dup(stdin) if stdin is not None else None
        try:
            child.process = subprocess.Popen(
                [sys.executable, "-P", "-c", ENTRY.format(fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                # Ctrl-C in the terminal is for us alone; we end the shard in order.
                start_new_session=True,
                env=os.environ | FEW_ARENAS,
                pass_fds=[theirs.fileno()] if kept is None else [theirs.fileno(), kept],
            )
            ours.send(self._job(child, kept))
            for stream, end in child.leaving.items():
                ours.send(Remove((stream,), end))
        finally:
            theirs.close()
            if kept is not None:
                os.close(kept)
        child.channel, child.heard_at, child.failure = ours, self._clock.monotonic(), None
        child.emptied = False
        child.spooled = child.dropped = 0

    def _job(self, child: _Child, stdin_fd: int | None) -> ShardJob:
        return ShardJob(
            name=child.name,
            entries=tuple(source.entry() for source in child.sources),
            last={source.id: self._last.get(source.id, Last()) for source in child.sources},
            config=self._config,
            log_factory=self._log_factory,
            parent=os.getpid(),
            stdin_fd=-1 if stdin_fd is None else stdin_fd,
            log_level=logging.getLogger().getEffectiveLevel(),
            seed=self._rng.getrandbits(32),
            cluster=None
            if self._home is None
            else Cluster(self._home.slot(child.name), self._home.member, self._lease_s),
        )

    def _listen(self, child: _Child) -> None:
        """Take in all that a shard has said."""
        with contextlib.suppress(EOFError, OSError):
            while child.channel is not None and child.channel.poll():
                message = child.channel.recv()
                child.heard_at = self._clock.monotonic()
                if isinstance(message, Failure):
                    child.failure = message
                if isinstance(message, Report):
                    self._take(child, message)
                if isinstance(message, Gone):
                    self._let_go(child, message)

    def _take(self, child: _Child, report: Report) -> None:
        held = {source.id for source in child.sources}
        for status in report.feeds:
            if status.stream in held:
                self._feeds[status.stream] = status
                self._last[status.stream] = status.last
        if report.dropped > child.dropped:
            log.error("shard %s: %d records dropped", child.name, report.dropped - child.dropped)
        child.spooled, child.dropped = report.spooled, report.dropped
        self._slots |= dict.fromkeys(held, child.name)

    def _let_go(self, child: _Child, gone: Gone) -> None:
        if gone.stream not in child.leaving:
            return  # it is to come again
        if gone.last.attachment:
            self._last[gone.stream] = gone.last
        self._forget(child, gone.stream)

    def _bury(self, child: _Child, kill: bool = False) -> None:
        if child.process is not None:
            if kill and child.process.poll() is None:
                child.process.kill()
            child.process.wait()
        with self._sending:
            if child.channel is not None:
                child.channel.close()
            child.process = child.channel = None
        self._dropped += child.dropped
        child.spooled = child.dropped = 0
