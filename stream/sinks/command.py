"""A program started for each alert: no shell, a bound on its time, and on what it may say."""

import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress

from stream.alerts import CloudEvent
from stream.clock import Clock, Deadline
from stream.redact import redact
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.settings import Command

ALWAYS = ("PATH", "HOME", "LANG")
"""What programs need to be found and to write; nothing of Unmask's own environment, which holds secrets."""

KEPT_BYTES = 4096
"""Of what the program says the last so many are kept; the rest is read and thrown away."""

SHOWN = 300
"""Characters of it in the log, if it fails."""

TEMPFAIL = 75
"""EX_TEMPFAIL of sysexits.h: what the program would reach is away."""

LOOK_S = 0.05
"""Between looks at whether it has ended: something it started may hold its output open for longer."""


class CommandTarget:
    """Starts the program, hands it the event on standard input and waits for its end.

    0 is delivered, 75 (EX_TEMPFAIL) away, anything else refused.
    """

    def __init__(self, settings: Command, clock: Clock, environ: Mapping[str, str] = os.environ) -> None:
        self._settings = settings
        self._clock = clock
        self._environ = environ

    def deliver(self, event: CloudEvent) -> Result:
        deadline = Deadline(self._settings.timeout_s, self._clock)
        try:
            with tempfile.TemporaryFile() as given:
                given.write(event.line().encode() + b"\n")
                given.seek(0)
                process = subprocess.Popen(
                    self._settings.argv,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=self._environment(event),
                    start_new_session=True,
                )
        except OSError as error:
            words = f"{self._settings.argv[0]} cannot be started: {error.strerror or error}"
            return Result(Outcome.AWAY, "start", redact(words))
        try:
            said = _said(process, deadline, self._clock)
        finally:
            _end(process)
        return _result(process.returncode, said, self._settings.timeout_s, deadline.passed())

    def identity(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing runs between alerts."""

    def _environment(self, event: CloudEvent) -> dict[str, str]:
        wanted = [*ALWAYS, *self._settings.env]
        given = {name: self._environ[name] for name in wanted if name in self._environ}
        named = {
            f"UNMASK_{name.upper()}": event.attributes.get(name, "")
            for name in ("id", "type", "subject", "severity")
        }
        return given | named


def _said(process: "subprocess.Popen[bytes]", deadline: Deadline, clock: Clock) -> bytes:
    """Read what the program says until it ends or its time is over; return the last of it."""
    assert process.stdout is not None
    kept = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        open_ = True
        while not _ended(process) and not deadline.passed():
            if not open_:
                clock.sleep(min(LOOK_S, deadline.left()))
            elif selector.select(min(LOOK_S, deadline.left())):
                piece = os.read(process.stdout.fileno(), 65536)
                open_ = piece != b""
                kept = (kept + piece)[-KEPT_BYTES:]
                if not open_:
                    selector.unregister(process.stdout)
        if open_ and _ended(process) and selector.select(0):
            kept = (kept + os.read(process.stdout.fileno(), 65536))[-KEPT_BYTES:]
    return kept


def _ended(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has ended. It is not reaped yet, so that its number, and its group's, stay its own."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of it, its children too, and take its exit code."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _result(code: int, said: bytes, timeout_s: float, late: bool) -> Result:
    if code == 0:
        return DELIVERED
    words = redact(" ".join(said.decode("utf-8", "replace").split()))[-SHOWN:]
    tail = f": {words}" if words else ""
    if late and code == -signal.SIGKILL:
        return Result(Outcome.AWAY, "timeout", f"killed after {timeout_s:g} s{tail}")
    if code == TEMPFAIL:
        return Result(Outcome.AWAY, "busy", f"exit code {code}{tail}")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Result(Outcome.REFUSED, "exit_code", f"ended with {how}{tail}")
