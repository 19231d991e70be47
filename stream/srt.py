"""SRT by way of the program ffmpeg, because PyAV's wheel has no libsrt (FIELD 1).

FIELD's bridge remuxed into a loopback TCP port. Here the bytes come through a pipe and untouched (`data`
demuxer and muxer): nobody else on the machine can connect to it, there is no port to race for, no probing
delays the first picture, timestamps and programs stay as sent, and the pipe can be left at any moment.
The address, passphrase included, is visible in the process list of this machine: ffmpeg takes it only there.
"""

import contextlib
import os
import shutil
import subprocess
import threading

from stream.errors import Code, UnmaskError
from stream.pipes import ByteReader, GivenUp
from stream.sources import Source

PROGRAM = "ffmpeg"
STOP_S = 2.0
"""ffmpeg ends within milliseconds of a signal; after this it is killed."""
KEPT_ERRORS = 4096
"""Bytes of ffmpeg's complaints kept: the last line says why."""


class Bridge:
    """One ffmpeg that receives `source` and hands over the bytes. Owned by the thread that made it."""

    def __init__(self, source: Source, given_up: GivenUp) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise UnmaskError(
                Code.PROGRAM_MISSING,
                f"source {source.shown} needs the program {PROGRAM} (with libsrt), which is not here;"
                f" install it (Debian, Ubuntu: apt-get install {PROGRAM})",
            )
        self._source = source
        self._process = subprocess.Popen(
            [*_tied_to_us(), program, *_arguments(source.address)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.reader = ByteReader(os.dup(self._process.stdout.fileno()), given_up)
        self._process.stdout.close()
        self._errors = b""
        self._listener = threading.Thread(target=self._listen, daemon=True, name=f"srt-{source.id}")
        self._listener.start()

    def complaint(self) -> str:
        """Return ffmpeg's last line, redacted, if it has ended by itself; else an empty text."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        if self._process.returncode in (None, 0):
            return ""
        self._listener.join(STOP_S)
        lines = self._errors.decode(errors="replace").strip().splitlines()
        return self._source.redacted(lines[-1]) if lines else f"exit code {self._process.returncode}"

    def close(self) -> None:
        """End ffmpeg and wait for it."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(STOP_S)

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self._errors = (self._errors + line)[-KEPT_ERRORS:]


def _arguments(address: str) -> list[str]:
    quiet = ["-nostdin", "-hide_banner", "-loglevel", "error"]
    return [*quiet, "-f", "data", "-i", address, "-map", "0", "-c", "copy", "-f", "data", "pipe:1"]


def _tied_to_us() -> list[str]:
    """Return what makes the kernel end ffmpeg with the thread that started it, where util-linux has it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
