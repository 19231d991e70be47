"""Legal hold outlives every retention, purging leaves nothing, and both are written down."""

import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stream.alerts import CloudEvent
from stream.clock import FakeClock
from stream.config import Config, Evidence
from stream.custody import Asked, hold, list_holds, purge, release
from stream.errors import Code, UnmaskError
from stream.evidence import ORPHAN_S, EvidenceStore
from stream.holds import Holds
from tests.stream.sinks.world import World, incident

DAY_S = 86400.0
A, B = "0000000000000001/0/0", "0000000000000001/0/1"


class Kept:
    """An incident with two faces and a clip, and another that shares nothing with it."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.config: Config = self.world.config
        self.clock = FakeClock()
        self.folder = folder / "evidence"
        self.store = EvidenceStore(self.folder, self.clock)
        self.a, self.b, self.clip, self.other = (
            self.store.put(name, ".png") for name in (b"face a", b"face b", b"clip", b"other")
        )
        self.write("i1", 1, "opened", [(self.a, "crop", A)])
        self.write(
            "i1", 2, "updated", [(self.a, "crop", A), (self.b, "overlay", B), (self.clip, "clip", None)]
        )
        self.write("i10", 1, "opened", [(self.other, "crop", A)])

    def write(self, name: str, number: int, kind: str, shown: list[tuple[str, str, str | None]]) -> None:
        event = incident(name, number, kind)
        evidence = [
            {"ref": ref, "kind": what, "media_us": None, "track": track} for ref, what, track in shown
        ]
        self.world.write(CloudEvent(event.attributes, {**event.data, "evidence": evidence}))

    def ask(self, call: Any, name: str = "i1", track: str | None = None) -> str:
        out = io.StringIO()
        assert call(self.config, Asked(name, "a reason", "me", track), out) == 0
        return out.getvalue()

    def there(self) -> set[str]:
        found = set()
        for name in ("a", "b", "clip", "other"):
            try:
                self.store.path(getattr(self, name))
            except FileNotFoundError:
                continue
            found.add(name)
        return found

    def journal(self) -> list[tuple[str, str, str]]:
        return [(each["action"], each["incident"], each["by"]) for each in Holds(self.folder).journal()]


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


def test_what_is_held_outlives_age_size_and_forgetting(kept: Kept) -> None:
    assert "3 files are held" in kept.ask(hold)
    kept.clock.advance(10 * 365 * DAY_S)
    swept = kept.store.sweep(Evidence(max_bytes=1), set(), set())
    assert kept.there() == {"a", "b", "clip"}
    assert (swept.held, swept.kept) == (3, 3)
    assert Holds(kept.folder).all()[0].events[0]["incident"] == "i1"
    kept.ask(release)
    kept.store.sweep(Evidence(), set(), set())
    assert kept.there() == set()
    assert kept.journal() == [("hold", "i1", "me"), ("release", "i1", "me")]


def test_holding_again_takes_in_what_has_come_since(kept: Kept) -> None:
    assert "still open" in kept.ask(hold)
    new = kept.store.put(b"new", ".png")
    kept.write("i1", 3, "closed", [(new, "crop", A)])
    said = kept.ask(hold)
    assert "4 files are held" in said
    assert "still open" not in said
    kept.clock.advance(ORPHAN_S + 1)
    kept.store.sweep(Evidence(), set(), set())
    assert kept.store.path(new).exists()
    assert kept.there() == {"a", "b", "clip"}


def test_a_hold_that_cannot_be_read_stops_all_deleting(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept.ask(hold)
    (path,) = (kept.folder / "holds").iterdir()
    path.write_text("{torn")
    kept.clock.advance(365 * DAY_S)
    swept = kept.store.sweep(Evidence(max_bytes=1), set(), set())
    assert (swept.kept, swept.expired, swept.evicted) == (4, 0, 0)
    assert "no evidence is deleted" in caplog.text
    with pytest.raises(UnmaskError, match="cannot be read"):
        kept.ask(purge)


def test_purging_an_incident_leaves_nothing_of_it_and_the_rest(kept: Kept) -> None:
    said = kept.ask(purge)
    assert "3 files deleted" in said
    assert "purge it again when it has closed" in said
    assert kept.there() == {"other"}
    assert kept.journal() == [("purge", "i1", "me")]
    assert "0 files deleted\n3 more are not in this folder" in kept.ask(purge)


def test_purging_a_face_takes_its_pictures_and_every_clip(kept: Kept) -> None:
    kept.ask(purge, track=A)
    assert kept.there() == {"b", "other"}
    with pytest.raises(UnmaskError, match="no picture of track"):
        kept.ask(purge, track="x/0/0")


@pytest.mark.parametrize("track", [None, A])
def test_what_is_held_is_not_purged(kept: Kept, track: str | None) -> None:
    kept.ask(hold)
    with pytest.raises(UnmaskError, match="under legal hold for i1; release that first") as caught:
        kept.ask(purge, track=track)
    assert caught.value.code is Code.SOURCE_REFUSED
    assert kept.there() == {"a", "b", "clip", "other"}


def test_a_picture_of_two_incidents_is_held_by_either(kept: Kept) -> None:
    kept.write("i2", 1, "opened", [(kept.a, "crop", A)])
    kept.ask(hold, "i2")
    with pytest.raises(UnmaskError, match="under legal hold for i2"):
        kept.ask(purge, "i1")


def test_a_face_that_is_seen_again_after_a_purge_is_kept_again(kept: Kept) -> None:
    kept.ask(purge)
    assert kept.store.path(kept.store.put(b"face a", ".png")).read_bytes() == b"face a"


def test_sweep_bears_files_that_go_meanwhile(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = list(kept.store._files())
    paths[0].unlink()
    monkeypatch.setattr(kept.store, "_files", lambda: iter(paths))
    assert kept.store.sweep(Evidence(), set()).kept == 3


@pytest.mark.parametrize("call", [hold, purge])
@pytest.mark.parametrize(
    ("name", "code"),
    [("nobody", Code.SOURCE_NOT_FOUND), ("i", Code.SOURCE_NOT_FOUND), ("../x", Code.SOURCE_SYNTAX)],
)
def test_an_incident_that_is_none_is_named(kept: Kept, call: Any, name: str, code: Code) -> None:
    with pytest.raises(UnmaskError) as caught:
        kept.ask(call, name)
    assert caught.value.code is code
    assert kept.journal() == []


def test_what_is_not_held_cannot_be_released(kept: Kept) -> None:
    with pytest.raises(UnmaskError, match="is not held"):
        kept.ask(release)


def test_reason_and_name_are_needed(kept: Kept) -> None:
    with pytest.raises(UnmaskError, match="--reason must be"):
        hold(kept.config, Asked("i1", " ", "me"), io.StringIO())
    with pytest.raises(UnmaskError, match="--by must be"):
        hold(kept.config, Asked("i1", "x", ""), io.StringIO())


def test_holds_are_listed_and_belong_to_the_owner(kept: Kept) -> None:
    kept.ask(hold)
    out = io.StringIO()
    list_holds(kept.config, True, out)
    facts = json.loads(out.getvalue())
    assert (facts["incident"], facts["by"], facts["reason"], facts["files"]) == ("i1", "me", "a reason", 3)
    out = io.StringIO()
    list_holds(kept.config, False, out)
    assert "3 files  me: a reason" in out.getvalue()
    for path in (*(kept.folder / "holds").iterdir(), kept.folder / "custody.ndjson"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_evidence_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match="there is no evidence in"):
        hold(Config(data_dir=str(tmp_path)), Asked("i1", "x", "me"), io.StringIO())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_docs_work(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    name = "060a2418ec3e607337046a81"
    kept.write(name, 1, "closed", [(kept.a, "crop", A), (kept.b, "crop", B)])
    kept.world.log.close()
    doc = (Path(__file__).parents[2] / "docs" / "evidence.md").read_text()
    script = doc.split("```sh\n")[1].split("```")[0]
    assert script.count(name) == 4
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "UNMASK_DATA_DIR": str(tmp_path),
            "UNMASK_MEDIA__PARTITIONS": "2",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}: 2 files are held" in done.stdout
    assert "A. Person: case 12-3456" in done.stdout
    assert kept.there() == {"clip", "other"}
    assert [action for action, _, _ in kept.journal()] == ["hold", "release", "purge", "purge"]
