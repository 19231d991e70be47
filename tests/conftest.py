"""Shared fixtures. What needs an external program says so with `requires`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

RTMP_MODULE = Path("/usr/lib/nginx/modules/ngx_rtmp_module.so")
"""Where Debian's libnginx-mod-rtmp puts the module."""


def requires(*programs: str) -> None:
    """Skip the test if a program is missing; in CI (UNMASK_REQUIRE_ALL=1) fail instead.

    `nginx-rtmp` stands for nginx with its RTMP module.
    """
    missing = [name for name in programs if not _present(name)]
    if missing:
        unavailable(", ".join(missing))


def unavailable(what: str) -> NoReturn:
    """Skip the test for want of `what`; in CI (UNMASK_REQUIRE_ALL=1) fail instead."""
    sentence = f"needs {what}, not installed here"
    if os.environ.get("UNMASK_REQUIRE_ALL") == "1":
        pytest.fail(sentence)
    pytest.skip(sentence)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads wait for each other by spinning, which costs more than small networks on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _present(name: str) -> bool:
    if name == "nginx-rtmp":
        return shutil.which("nginx") is not None and RTMP_MODULE.exists()
    return shutil.which(name) is not None
