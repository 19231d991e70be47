"""What `unmask watch` shows: a live table, plain lines where there is no terminal, or CloudEvents as JSON."""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stream.timeline import Summary

REFRESH_HZ = 4
"""Redraws of the table a second: smooth to the eye, nothing beside decoding."""

PROGRESS_STEP = 0.25
"""Without a terminal a file reports this much of itself at a time."""


@dataclass(frozen=True, slots=True)
class FeedView:
    """How one feed stands. `media_us` is media time (UTC microseconds), `start_us` the first of it.

    `lag_s` is None for files; `progress` (0..1) is None for live feeds. `fps` counts sampled frames per
    second, `faces` those in the last one. `error` is a redacted sentence.
    """

    stream: str
    state: str
    media_us: int | None
    lag_s: float | None
    fps: float
    faces: int
    verdict: str | None
    reasons: tuple[str, ...]
    open_incident: str | None
    error: str | None
    progress: float | None
    start_us: int | None = None


class Console(Protocol):
    """Where `watch` reports. Used by one thread."""

    def update(self, views: Sequence[FeedView]) -> None:
        """Show how all feeds stand; call as often as convenient."""

    def event(self, cloud_event: Mapping[str, Any]) -> None:
        """Report one CloudEvent (structured JSON form)."""

    def summary(self, summaries: Sequence[Summary]) -> None:
        """Report, at the end, what was watched and found."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def clean(text: str) -> str:
    """Return `text` on one line and without control characters: a feed's words must not steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def moment(us: int | None, start_us: int | None, is_file: bool) -> str:
    """Return media time as hours, minutes, seconds: from its begin in a file, else UTC."""
    if us is None:
        return "-"
    if is_file and start_us is not None:
        return _duration((us - start_us) / 1e6)
    return datetime.fromtimestamp(us / 1e6, UTC).strftime("%H:%M:%SZ")


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    minutes, hours = whole // 60, whole // 3600
    return f"{hours}:{minutes % 60:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def event_line(event: Mapping[str, Any], view: FeedView | None) -> str:
    """Return a CloudEvent as one line for a person; `view` tells where the stream's media time begins."""
    kind = str(event.get("type", "")).removeprefix("unmask.").removesuffix(".v1").replace(".", " ")
    data = event.get("data") or {}
    parts = [f"{event.get('subject', '-')}: {kind}", *_event_facts(data, view)]
    severity = event.get("severity")
    if kind.startswith("incident") and severity:
        parts.append(f"severity {severity}")
    if kind.startswith("incident"):
        parts.append(f"incident {str(event.get('id', '')).rpartition('.')[0]}")
    return clean(", ".join(parts))


def _event_facts(data: Mapping[str, Any], view: FeedView | None) -> list[str]:
    facts = []
    is_file, start = (view.progress is not None, view.start_us) if view else (False, None)
    first, last = data.get("first_media_us"), data.get("last_media_us")
    if first is not None and last is not None:
        facts.append(f"{moment(first, start, is_file)} to {moment(last, start, is_file)}")
    if data.get("probability") is not None:
        low, high = data.get("interval") or (None, None)
        spread = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
        facts.append(f"probability {data['probability']:.2f}{spread}")
    if data.get("suggested_action"):
        facts.append(f"suggested: {data['suggested_action']}")
    if data.get("reasons"):
        facts.append(" ".join(data["reasons"]))
    if data.get("sentence"):
        facts.append(str(data["sentence"]))
    return facts


class JsonConsole:
    """One CloudEvent a line on `out`, and nothing else there."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def update(self, views: Sequence[FeedView]) -> None:
        pass

    def event(self, cloud_event: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(cloud_event, ensure_ascii=False, separators=(",", ":")) + "\n")
        self._out.flush()

    def summary(self, summaries: Sequence[Summary]) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PlainConsole:
    """A line whenever something changes, for pipes and log files."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._views: dict[str, FeedView] = {}

    def update(self, views: Sequence[FeedView]) -> None:
        for view in views:
            before = self._views.get(view.stream)
            self._views[view.stream] = view
            if before is None or _told(before) != _told(view):
                self._write(_view_line(view))

    def event(self, cloud_event: Mapping[str, Any]) -> None:
        self._write(event_line(cloud_event, self._views.get(str(cloud_event.get("subject")))))

    def summary(self, summaries: Sequence[Summary]) -> None:
        for line in summary_lines(summaries):
            self._write(line)

    def _write(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _told(view: FeedView) -> FeedView:
    """Return `view` reduced to what is worth a line when it changes."""
    step = None if view.progress is None else int(view.progress / PROGRESS_STEP) * PROGRESS_STEP
    return replace(view, media_us=None, lag_s=None, fps=0.0, faces=0, progress=step, start_us=None)


def _state(view: FeedView) -> str:
    """Return what goes on with the feed: of a file that is read whole, judging is left."""
    judging = view.state == "ended" and view.error is None and view.progress is not None and view.progress < 1
    return "judging" if judging else view.state


def _view_line(view: FeedView) -> str:
    place = moment(view.media_us, view.start_us, view.progress is not None)
    parts = [f"{view.stream}: {_state(view)}", f"at {place}"]
    if view.progress is not None:
        parts.append(f"{view.progress:.0%}")
    if view.lag_s is not None:
        parts.append(f"lag {view.lag_s:.1f} s")
    parts.append(_verdict(view))
    if view.open_incident:
        parts.append(f"incident {view.open_incident}")
    if view.error:
        parts.append(view.error)
    return clean(", ".join(part for part in parts if part))


def _verdict(view: FeedView) -> str:
    return " ".join([view.verdict or "", *view.reasons]).strip()


VERDICT_STYLES: Mapping[str, str] = {
    "authentic": "green",
    "manipulated": "bold red",
    "inconclusive": "yellow",
}
STATE_STYLES: Mapping[str, str] = {"live": "green", "down": "bold red"}


class TableConsole:
    """A table redrawn in place; events and log lines scroll by above it."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._views: dict[str, FeedView] = {}
        self._live = Live(console=terminal, refresh_per_second=REFRESH_HZ, get_renderable=self._table)

    def update(self, views: Sequence[FeedView]) -> None:
        self._views = {view.stream: view for view in views}

    def event(self, cloud_event: Mapping[str, Any]) -> None:
        line = event_line(cloud_event, self._views.get(str(cloud_event.get("subject"))))
        style = "bold red" if ".opened." in str(cloud_event.get("type")) else ""
        self._terminal.print(Text(f"{datetime.now(UTC):%H:%M:%SZ} {line}", style=style))

    def summary(self, summaries: Sequence[Summary]) -> None:
        self._stop()
        for line in summary_lines(summaries):
            self._terminal.print(Text(line))

    def __enter__(self) -> Self:
        before = sys.stderr
        self._live.start()
        _move_log(before, sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        during = sys.stderr
        self._live.stop()
        _move_log(during, sys.stderr)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("FEED", "STATE", "TIME", "LAG", "FPS", "FACES", "VERDICT", "INCIDENT"):
            table.add_column(name, justify="right" if name in ("LAG", "FPS", "FACES") else "left")
        for view in sorted(self._views.values(), key=lambda view: view.stream):
            table.add_row(*_cells(view))
        return table


def _cells(view: FeedView) -> list[Text | ProgressBar]:
    verdict = Text(clean(_verdict(view)) or "-", style=VERDICT_STYLES.get(view.verdict or "", ""))
    return [
        Text(view.stream),
        _state_cell(view),
        Text(moment(view.media_us, view.start_us, view.progress is not None)),
        Text("-" if view.lag_s is None else f"{view.lag_s:.1f} s"),
        Text(f"{view.fps:.1f}"),
        Text(str(view.faces)),
        verdict,
        Text(view.open_incident or "-", style="bold red" if view.open_incident else ""),
    ]


def _state_cell(view: FeedView) -> Text | ProgressBar:
    if view.error:
        return Text(clean(f"{view.state}: {view.error}"), style="red")
    if view.progress is not None and view.progress < 1:
        return ProgressBar(total=1.0, completed=view.progress, width=20)
    return Text(_state(view), style=STATE_STYLES.get(view.state, ""))


def _move_log(old: TextIO, new: TextIO) -> None:
    """Let log handlers follow stderr: while a table is live, that is the space above it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(new)


def summary_lines(summaries: Sequence[Summary]) -> list[str]:
    """Return what was watched and found, as lines for a person."""
    return [clean(line) for summary in summaries for line in summary.lines()]


def open_console(json_out: TextIO | None) -> Console:
    """Return this process's console: JSON on `json_out` if given, else a table or plain lines on stdout."""
    if json_out is not None:
        return JsonConsole(json_out)
    terminal = Terminal()
    return TableConsole(terminal) if terminal.is_terminal else PlainConsole(sys.stdout)


def claim_stdout() -> TextIO:
    """Return stdout for our lines alone: whatever else in this process or its children prints goes to stderr.

    Works on file descriptors, so that native libraries cannot spoil a stream of JSON either.
    """
    sys.stdout.flush()
    try:
        mine = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    except (OSError, ValueError):
        return sys.stdout
    return os.fdopen(mine, "w", encoding="utf-8")


def abandon_stdout() -> None:
    """Forget a reader that went away, so that the interpreter's last flush does not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
