import errno
import os
from pathlib import Path
from typing import Any

import pytest

from stream.errors import Code, UnmaskError
from stream.segments import SegmentReader, SegmentWriter, Span, segment_instance, segment_name

INSTANCE = "0123abcd"


def open_writer(directory: Path, limit: int = 1000, durable: bool = False) -> SegmentWriter:
    return SegmentWriter(directory, INSTANCE, limit, durable)


def read(directory: Path, span: Span) -> bytes | None:
    return read_all(directory, [span])[0]


def read_all(directory: Path, spans: list[Span]) -> list[bytes | None]:
    with SegmentReader(directory) as reader:
        return [reader.read(segment_name(INSTANCE, span.segment), span) for span in spans]


@pytest.mark.parametrize("durable", [False, True])
def test_values_come_back(tmp_path: Path, durable: bool) -> None:
    segments = open_writer(tmp_path, durable=durable)
    values = [b"one", b"", os.urandom(5000), b"x" * 700]
    spans = segments.append(values)
    assert read_all(tmp_path, spans) == values
    assert {segment_instance(path.name) for path in tmp_path.iterdir()} == {INSTANCE}


def test_more_values_than_one_system_call_takes(tmp_path: Path) -> None:
    segments = open_writer(tmp_path)
    values = [bytes([i % 251]) * (i % 7) for i in range(2500)]
    spans = segments.append(values)
    assert read_all(tmp_path, spans) == values


def test_full_file_is_followed_by_another(tmp_path: Path) -> None:
    segments = open_writer(tmp_path, limit=1000)
    first = segments.append([b"a" * 600])[0]
    second = segments.append([b"b" * 600])[0]
    third = segments.append([b"c" * 10])[0]
    assert first.segment == second.segment != third.segment
    assert segments.full == [first.segment]
    assert third.start == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_batch_larger_than_a_file_is_spread(tmp_path: Path) -> None:
    segments = open_writer(tmp_path, limit=1000)
    values = [os.urandom(400) for _ in range(10)]
    spans = segments.append(values)
    assert read_all(tmp_path, spans) == values
    assert sorted(path.stat().st_size for path in tmp_path.iterdir()) == [400, 1200, 1200, 1200]


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def short(descriptor: int, buffers: list[Any], position: int) -> int:
        return real(descriptor, [b"".join(buffers)[:7]], position)

    monkeypatch.setattr(os, "pwritev", short)
    segments = open_writer(tmp_path)
    values = [os.urandom(n) for n in (3, 20, 7, 0, 14)]
    spans = segments.append(values)
    assert read_all(tmp_path, spans) == values


def test_full_disk_is_named_and_leaves_the_writer_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = open_writer(tmp_path)
    kept = segments.append([b"before"])[0]

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", refuse)
        with pytest.raises(UnmaskError) as caught:
            segments.append([b"lost"])
    assert caught.value.code is Code.LOG_FULL
    after = segments.append([b"after"])[0]
    assert read(tmp_path, kept) == b"before"
    assert read(tmp_path, after) == b"after"


def test_damage_is_seen(tmp_path: Path) -> None:
    segments = open_writer(tmp_path)
    first, second = segments.append([b"hello", b"world"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"hellowXrld")
    assert read(tmp_path, first) == b"hello"
    assert read(tmp_path, second) is None
    path.write_bytes(b"hel")
    assert read(tmp_path, first) is None
    path.unlink()
    assert read(tmp_path, first) is None


def test_reader_keeps_no_file_open(tmp_path: Path) -> None:
    segments = open_writer(tmp_path)
    span = segments.append([b"value"])[0]
    segments.seal()
    read(tmp_path, span)
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
