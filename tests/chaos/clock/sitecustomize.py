"""On PYTHONPATH of a part, and of what it starts: its wall clock is off by what the file CHAOS_CLOCK says.

Python imports this module by its name before anything else. The monotonic clock stays as it is: it never
steps, whatever an operator or NTP does. (libfaketime 0.9.10 makes `time.sleep` fail.)
"""

import os
import time

_FILE = os.environ["CHAOS_CLOCK"]
_LOOK_S = 0.2
_time, _time_ns, _monotonic = time.time, time.time_ns, time.monotonic
_read_at, _offset_ns = -1.0, 0


def _offset() -> int:
    global _read_at, _offset_ns
    now = _monotonic()
    if now - _read_at > _LOOK_S:
        _read_at = now
        with open(_FILE) as file:
            _offset_ns = int(float(file.read() or 0) * 1e9)
    return _offset_ns


def _stepped_ns() -> int:
    return _time_ns() + _offset()


def _stepped() -> float:
    return _time() + _offset() / 1e9


time.time, time.time_ns = _stepped, _stepped_ns
