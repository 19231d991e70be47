"""The device that networks run on here: what there is, and what of it a compiled network depends on."""

import ctypes
import hashlib
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

Device = Literal["cpu", "cuda"]
"""`cuda` is PyTorch's current one; which card that is, CUDA_VISIBLE_DEVICES says."""


def find_device() -> Device:
    """Return the fastest kind of device that PyTorch can use here."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_threads() -> int:
    """Return half the cores this process may use, at least one: the other half decodes.

    PyTorch's threads wait for each other spinning. On two cores with something else running, two threads took
    160 ms for the faces of a picture that one thread reads in 21 ms.
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


def cpu() -> dict[str, Any]:
    """Return what code compiled for this CPU depends on."""
    text = _text(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    return {
        "kind": "cpu",
        "machine": platform.machine(),
        "model": cpu_name(text),
        "flags": hashlib.sha256(" ".join(sorted((flags[1] if flags else "").split())).encode()).hexdigest(),
    }


def cpu_name(text: str | None = None) -> str:
    """Return the CPU's name as the system tells it, of /proc/cpuinfo's `text`."""
    found = re.search(
        r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")) if text is None else text, re.M
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu() -> dict[str, Any]:
    """Return what code compiled for the current GPU depends on: the card or its slice, and the driver."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "kind": "cuda",
        "model": found.name,
        "capability": [found.major, found.minor],
        "processors": found.multi_processor_count,
        "memory": found.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def facts(device: Device) -> dict[str, Any]:
    """Return `cpu()` or `gpu()`."""
    return gpu() if device == "cuda" else cpu()


def _driver() -> list[str | int]:
    """Return the driver's own version, not to be seen in every container, and that of CUDA it offers."""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(Path("/proc/driver/nvidia/version")))
    offered = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(offered))
    return [found[1] if found else "", offered.value]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
