"""What people and programs get to read."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console as Terminal

from stream.console import FeedView, JsonConsole, PlainConsole, TableConsole, clean, event_line, moment
from stream.coverage import cover
from stream.timeline import Summary

START = 1_700_000_000_000_000

FILE = FeedView(
    stream="clip",
    state="running",
    media_us=START + 65_000_000,
    lag_s=None,
    fps=2.0,
    faces=1,
    verdict="inconclusive",
    reasons=("BLUR",),
    open_incident=None,
    error=None,
    progress=0.1,
    start_us=START,
)
LIVE = replace(
    FILE, stream="studio", state="live", lag_s=1.25, verdict="authentic", reasons=(), progress=None
)

OPENED: Mapping[str, Any] = {
    "specversion": "1.0",
    "id": "0007.1",
    "type": "unmask.incident.opened.v1",
    "source": "/unmask/unmask",
    "subject": "clip",
    "severity": "high",
    "data": {
        "incident": "0007",
        "first_media_us": START + 10_000_000,
        "last_media_us": START + 12_500_000,
        "probability": 0.953,
        "interval": [0.901, 0.982],
        "suggested_action": "review",
        "reasons": [],
    },
}


def nothing_found(stream: str) -> Summary:
    return Summary(cover(stream, [], START, START + 1_000_000), {}, ())


def test_media_time_counts_from_the_begin_of_a_file_and_is_utc_of_a_feed() -> None:
    assert moment(START + 65_000_000, START, is_file=True) == "1:05"
    assert moment(START + 3_725_000_000, START, is_file=True) == "1:02:05"
    assert moment(START, START, is_file=False) == "22:13:20Z"
    assert moment(None, None, is_file=True) == "-"


def test_an_incident_on_one_line() -> None:
    assert event_line(OPENED, FILE) == (
        "clip: incident opened, 0:10 to 0:12, probability 0.95 (0.90 to 0.98), suggested: review, "
        "severity high, incident 0007"
    )


def test_a_feed_event_on_one_line() -> None:
    event = {
        "type": "unmask.feed.down.v1",
        "subject": "studio",
        "severity": "medium",
        "data": {"sentence": "no video for 10 s", "code": "source_silent"},
    }
    assert event_line(event, LIVE) == "studio: feed down, no video for 10 s"


def test_words_of_a_feed_do_not_steer_the_terminal() -> None:
    assert clean("a\x1b[2Jb\nc\u202e") == "a [2Jb c "


def test_json_is_one_event_a_line_and_nothing_else() -> None:
    out = io.StringIO()
    with JsonConsole(out) as console:
        console.update([FILE])
        console.event(OPENED)
        console.event({**OPENED, "id": "0007.2"})
        console.summary([nothing_found("clip")])
    lines = out.getvalue().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0007.1", "0007.2"]
    assert json.loads(lines[0]) == OPENED


def test_plain_lines_tell_changes_only() -> None:
    out = io.StringIO()
    with PlainConsole(out) as console:
        console.update([FILE, LIVE])
        console.update(
            [replace(FILE, media_us=START, fps=3.0, faces=2, progress=0.2), replace(LIVE, lag_s=2.0)]
        )
        console.update(
            [replace(FILE, progress=0.3), replace(LIVE, state="down", error="connection\nrefused")]
        )
        console.event(OPENED)
        console.summary([nothing_found("clip")])
    assert out.getvalue().splitlines() == [
        "clip: running, at 1:05, 10%, inconclusive BLUR",
        "studio: live, at 22:14:25Z, lag 1.2 s, authentic",
        "clip: running, at 1:05, 30%, inconclusive BLUR",
        "studio: down, at 22:14:25Z, lag 1.2 s, authentic, connection refused",
        event_line(OPENED, FILE),
        *nothing_found("clip").lines(),
    ]


def shown(*views: FeedView, events: tuple[Mapping[str, Any], ...] = ()) -> str:
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, width=140, color_system=None)
    with TableConsole(terminal) as console:
        console.update(views)
        for event in events:
            console.event(event)
        console.summary([nothing_found("clip")])
    return out.getvalue()


def test_the_table_has_a_row_per_feed_and_events_above() -> None:
    down = replace(LIVE, stream="door", state="down", error="refused [bold]by[/bold] host")
    text = shown(FILE, LIVE, down, replace(LIVE, stream="stage", open_incident="0007"), events=(OPENED,))
    assert "clip: incident opened" in text
    assert "1.2 s" in text
    assert "down: refused [bold]by[/bold] host" in text
    assert "0007" in text
    assert "no incident" in text


def test_log_lines_appear_above_the_table() -> None:
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, width=140, color_system=None)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        with TableConsole(terminal) as console:
            logging.getLogger("unmask-test").warning("stream %s: a warning", "clip")
            console.update([FILE])
    finally:
        logging.getLogger().removeHandler(handler)
    assert "stream clip: a warning" in out.getvalue()


def test_stdout_claimed_for_events_gets_nothing_else() -> None:
    program = (
        "import os, sys\n"
        "from stream.console import JsonConsole, claim_stdout\n"
        "out = claim_stdout()\n"
        "print('noise'); sys.stdout.flush(); os.write(1, b'native noise\\n'); os.system('echo child noise')\n"
        "JsonConsole(out).event({'id': '1'})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == '{"id":"1"}\n'
    assert done.stderr.split() == ["noise", "native", "noise", "child", "noise"]
