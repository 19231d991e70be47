"""Files of alerts: each line whole and on disk, rotated by size, cut where a writer died."""

import io
import json
import os
import stat
from pathlib import Path

import pytest

from stream.errors import UnmaskError
from stream.sinks.delivery import Outcome
from stream.sinks.lines import FileTarget, StdoutTarget
from stream.sinks.settings import File
from tests.stream.sinks.world import incident


def made(path: Path, **fields: int) -> FileTarget:
    return FileTarget(File(type="file", path=str(path), **fields))


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_each_alert_is_a_line_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    path = tmp_path / "new" / "alerts.ndjson"
    target = made(path)
    before = len(synced)
    for number in range(3):
        assert target.deliver(incident(f"i{number}")).outcome is Outcome.DELIVERED
    assert len(synced) == before + 3
    assert ids(path) == ["i0.1", "i1.1", "i2.1"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    target.close()


def test_a_file_that_is_there_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for number in range(2):
        target = made(path)
        target.deliver(incident(f"i{number}"))
        target.close()
    assert ids(path) == ["i0.1", "i1.1"]


@pytest.mark.parametrize("torn", [b'{"id": "ha', b"{", b"\0" * 50])
def test_a_torn_line_is_cut(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a"
    target = made(path)
    target.deliver(incident("whole"))
    target.close()
    path.write_bytes(path.read_bytes() + torn)
    target = made(path)
    target.deliver(incident("next"))
    assert ids(path) == ["whole.1", "next.1"]
    target.close()


def test_a_file_with_nothing_but_a_torn_line_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b'{"id"')
    target = made(path)
    assert path.read_bytes() == b""
    target.close()


def test_files_are_rotated_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    line = len(incident("i0").line()) + 1
    target = made(path, rotate_bytes=2 * line, keep=2)
    for number in range(7):
        target.deliver(incident(f"i{number}"))
    assert ids(path) == ["i6.1"]
    assert ids(tmp_path / "a.1") == ["i4.1", "i5.1"]
    assert ids(tmp_path / "a.2") == ["i2.1", "i3.1"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "a.1", "a.2"]
    target.close()


def test_an_alert_larger_than_a_file_has_one_of_its_own(tmp_path: Path) -> None:
    target = made(tmp_path / "a", rotate_bytes=1, keep=3)
    for number in range(2):
        assert target.deliver(incident(f"i{number}")).outcome is Outcome.DELIVERED
    assert ids(tmp_path / "a") == ["i1.1"]
    target.close()


def test_two_writers_are_refused(tmp_path: Path) -> None:
    first = made(tmp_path / "a")
    with pytest.raises(UnmaskError, match="another process has it open"):
        made(tmp_path / "a")
    first.close()
    made(tmp_path / "a").close()


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="must be a file that can be written"):
        made(tmp_path)


def test_a_full_disk_is_an_outage_and_what_was_written_of_a_line_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    target = made(path)
    target.deliver(incident("i0"))

    def short(file: io.FileIO, line: bytes) -> None:
        file.write(line[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(FileTarget, "_append", staticmethod(short))
        result = target.deliver(incident("i1"))
    assert (result.outcome, result.reason) == (Outcome.AWAY, "disk")
    assert target.deliver(incident("i1")).outcome is Outcome.DELIVERED
    assert ids(path) == ["i0.1", "i1.1"]
    target.close()


def test_standard_output_gets_lines_and_its_end_is_an_outage() -> None:
    out = io.BytesIO()
    assert StdoutTarget(out).deliver(incident()).outcome is Outcome.DELIVERED
    assert json.loads(out.getvalue())["id"] == "i1.1"
    assert out.getvalue().endswith(b"}\n")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as broken:
        assert StdoutTarget(broken).deliver(incident()).reason == "output"
