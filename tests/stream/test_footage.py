"""Which files are footage, and whose hours they are."""

from pathlib import Path

import pytest

from stream.errors import Code, UnmaskError
from stream.footage import Footage, gather, read_people


def video(path: Path, content: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content or str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ann/b.mp4", "ann/a.MKV", "bob/a.mp4", "c.ts"):
        video(tmp_path / name)
    return tmp_path


def people(footage: Footage) -> dict[str, str]:
    return {file.path.name: Path(file.person.removeprefix("folder ")).name for file in footage.files}


def test_folders_are_walked_and_are_the_people(folder: Path) -> None:
    (folder / "ann" / "notes.txt").touch()
    footage = gather([str(folder)], [], None)
    assert [str(file.path.relative_to(folder)) for file in footage.files] == [
        "ann/a.MKV",
        "ann/b.mp4",
        "bob/a.mp4",
        "c.ts",
    ]
    assert [Path(file.person.removeprefix("folder ")).name for file in footage.files] == [
        "ann",
        "ann",
        "bob",
        folder.name,
    ]
    assert (footage.other, footage.doubled, footage.unreadable, footage.unnamed) == (1, (), (), 0)
    assert not any(file.manipulated for file in footage.files)


def test_a_list_says_who_is_who(folder: Path) -> None:
    named = folder / "people.csv"
    named.write_text("path,person\nann,Ann\nann/b.mp4,Bob\nbob/a.mp4,Bob\n")
    footage = gather([str(folder)], [], named)
    assert people(footage) == {"a.MKV": "Ann", "b.mp4": "Bob", "a.mp4": "Bob", "c.ts": folder.name}
    assert footage.unnamed == 1


def test_the_same_footage_counts_once(folder: Path) -> None:
    copy = video(folder / "bob" / "copy.mp4", (folder / "c.ts").read_text())
    footage = gather([str(folder), str(folder / "c.ts")], [], None)
    assert len(footage.files) == 4
    assert footage.doubled == (folder / "c.ts", folder / "c.ts")
    assert [file.path for file in footage.files if file.path.name == "copy.mp4"] == [copy]


def test_the_same_footage_cannot_be_both(folder: Path) -> None:
    with pytest.raises(UnmaskError, match=r"given as manipulated and .*c.ts, the same footage, as authentic"):
        gather([str(folder)], [str(video(folder / "x" / "y.mp4", (folder / "c.ts").read_text()))], None)


def test_a_file_that_cannot_be_read_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def failing(self: Path, *arguments: object, **more: object) -> object:
        if self.name == "c.ts":
            raise PermissionError(13, "Permission denied")
        return opened(self, *arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", failing)
    footage = gather([str(folder)], [], None)
    assert footage.unreadable == ((folder / "c.ts", "cannot be read: Permission denied"),)
    assert len(footage.files) == 3


@pytest.mark.parametrize(
    "address",
    ["rtmp://me:hunter2@host/live?token=abcdefgh", "https://host/a.m3u8", "env:STUDIO", "-", "/dev/video0"],
)
def test_live_sources_are_refused_with_what_would_be_right(address: str) -> None:
    with pytest.raises(UnmaskError, match="is a live source; thresholds are fixed on recordings") as error:
        gather([address], [], None)
    assert error.value.code is Code.SOURCE_REFUSED
    assert "ffmpeg -i ADDRESS -c copy" in str(error.value)
    assert "hunter2" not in str(error.value)
    assert "abcdefgh" not in str(error.value)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"--manipulated .*none.mp4: no such file or folder"):
        gather([], [str(tmp_path / "none.mp4")], None)
    (tmp_path / "a.txt").touch()
    with pytest.raises(UnmaskError, match=r"--authentic .*: the folder holds no file ending in .*\.mp4"):
        gather([str(tmp_path)], [], None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file"),
        ("path,name\na,b\n", "has no column person; line 1 must be path,person"),
        ("path,person\n", "names nobody"),
        ("path,person\nann,\n", "line 2: path or person is empty"),
        ("path,person\nann,Ann\nann,Bob\n", "line 3: ann is Bob here and Ann above"),
        ("path,person\nzoe,Zoe\n", "line 2: zoe is not there"),
        (b"\xff\xfe\x00", "is not CSV in UTF-8"),
    ],
)
def test_a_wrong_list_of_people_is_one_sentence(
    folder: Path, text: str | bytes | None, sentence: str
) -> None:
    path = folder / "people.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UnmaskError, match=sentence) as error:
        read_people(path)
    assert error.value.code is Code.CONFIG
