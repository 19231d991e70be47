"""What is kept is found by its facts, whole or not at all."""

import json
import logging
from pathlib import Path

import pytest

from engines import kept

FACTS = {"name": "small", "weights": "0" * 64, "versions": {"torch": "1"}}


def write(folder: Path) -> None:
    (folder / "network.bin").write_bytes(b"weights")


def test_what_was_kept_is_found_by_the_same_facts_alone(tmp_path: Path) -> None:
    folder = kept.keep(tmp_path, "openvino", FACTS, write)
    assert kept.find(tmp_path, "openvino", dict(FACTS)) == folder
    assert (folder / "network.bin").read_bytes() == b"weights"
    assert kept.find(tmp_path, "inductor", FACTS) is None
    for other in ({"weights": "1" * 64}, {"versions": {"torch": "2"}}, {"batch": 3}):
        assert kept.find(tmp_path, "openvino", FACTS | other) is None


@pytest.mark.parametrize("spoil", ["network.bin", kept.FACTS])
@pytest.mark.parametrize("how", ["shorter", "gone", "other"])
def test_a_spoiled_file_is_not_used_and_said(
    tmp_path: Path, spoil: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = kept.keep(tmp_path, "openvino", FACTS, write)
    path = folder / spoil
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if how == "shorter" else b"something else")
    with caplog.at_level(logging.WARNING):
        assert kept.find(tmp_path, "openvino", FACTS) is None
    assert "is spoiled and is made anew" in caplog.text
    assert not folder.exists()
    assert kept.keep(tmp_path, "openvino", FACTS, write) == folder
    assert kept.find(tmp_path, "openvino", FACTS) == folder


def test_what_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        kept.keep(tmp_path, "openvino", FACTS, fail)
    assert list((tmp_path / "openvino").iterdir()) == []
    assert kept.find(tmp_path, "openvino", FACTS) is None


def test_another_process_that_was_first_is_not_disturbed(tmp_path: Path) -> None:
    def while_another_writes(folder: Path) -> None:
        kept.keep(tmp_path, "openvino", FACTS, write)
        (folder / "network.bin").write_bytes(b"the same, later")

    folder = kept.keep(tmp_path, "openvino", FACTS, while_another_writes)
    assert (folder / "network.bin").read_bytes() == b"weights"
    assert kept.find(tmp_path, "openvino", FACTS) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        kept.keep(tmp_path / "file", "openvino", FACTS, write)


def test_entries_tell_of_everything_that_is_whole(tmp_path: Path) -> None:
    assert list(kept.entries(tmp_path, ("openvino",))) == []
    kept.keep(tmp_path, "openvino", FACTS, write)
    kept.keep(tmp_path, "inductor", FACTS | {"batch": 3}, write)
    (tmp_path / "openvino" / "stray").mkdir()
    (tmp_path / "openvino" / ".half").mkdir()
    found = list(kept.entries(tmp_path, ("inductor", "openvino")))
    assert [(entry.engine, entry.facts) for entry in found] == [
        ("inductor", FACTS | {"batch": 3}),
        ("openvino", FACTS),
    ]
    whole = (found[1].folder / kept.FACTS).stat().st_size + len(b"weights")
    assert found[1].size == whole
    assert json.loads((found[1].folder / kept.FACTS).read_text())["facts"] == FACTS


def test_versions_of_what_is_not_installed_are_empty() -> None:
    found = kept.versions("numpy", "no-such-package")
    assert found["no-such-package"] == ""
    assert found["numpy"]
