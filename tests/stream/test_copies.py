"""Evidence in a store: copied behind the watching, purged on every machine, held everywhere."""

import io
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from stream.clock import FakeClock, SystemClock
from stream.config import Evidence
from stream.copies import FOLLOW_S, SWEEP_S, Copier, Store, copying, read_evidence
from stream.custody import fetch, hold, purge, release
from stream.errors import Code, UnmaskError
from stream.evidence import EvidenceStore
from stream.metrics import Metrics
from tests.stream.sinks.world import World
from tests.stream.test_custody import A, Kept
from tests.stream.test_metrics import read

DAY_S = 86400.0
PATIENCE_S = 30.0


class Machine:
    """A data folder whose evidence is copied to a store that others share."""

    def __init__(self, folder: Path, address: str, clock: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder / "evidence"
        self.config = World(folder).config.model_copy(update={"evidence": Evidence(store=address)})
        self.clock = clock
        self.local = EvidenceStore(self.folder, clock)
        self.store = Store(address)
        self.metrics = Metrics()
        self.copier = self.again()

    def again(self) -> Copier:
        """The copier of a process that is started anew."""
        self.copier = Copier(self.config, self.folder, self.local, self.store, self.clock, self.metrics)
        return self.copier

    def has(self, reference: str) -> bool:
        try:
            self.local.path(reference)
        except FileNotFoundError:
            return False
        return True


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory":
        return f"memory://evidence-{uuid.uuid4().hex}"
    return f"file://{tmp_path}/store"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(int(time.time() * 1e6))


@pytest.fixture
def machine(tmp_path: Path, address: str, clock: FakeClock) -> Machine:
    return Machine(tmp_path / "one", address, clock)


def test_what_is_put_is_copied_and_read_from_anywhere(
    machine: Machine, tmp_path: Path, address: str, clock: FakeClock
) -> None:
    reference = machine.local.put(b"a face", ".png")
    machine.copier.turn()
    other = Machine(tmp_path / "two", address, clock)
    assert read_evidence(reference, other.local, other.store) == (b"a face", ".png")
    assert read_evidence(reference, machine.local, None) == (b"a face", ".png")
    with pytest.raises(FileNotFoundError):
        read_evidence(reference, other.local, None)
    with pytest.raises(FileNotFoundError, match="not in the evidence store"):
        read_evidence("evidence://" + "0" * 64, other.local, other.store)
    with pytest.raises(ValueError, match="64 hex digits"):
        read_evidence("evidence://../x", other.local, other.store)


def test_half_written_files_stay_here(machine: Machine) -> None:
    path = machine.local.path(machine.local.put(b"x", ".png"))
    path.rename(path.with_suffix(".partial"))
    machine.copier.turn()
    assert machine.store.names("files") == set()


def test_a_store_that_is_away_holds_up_nothing_and_gets_all_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.copier.turn()
    with monkeypatch.context() as broken:
        broken.setattr(machine.store._fs, "pipe_file", _fail)
        references = [machine.local.put(bytes([n]), ".png") for n in range(3)]
        with pytest.raises(UnmaskError) as caught:
            machine.copier.turn()
    assert caught.value.code is Code.LOG_AWAY
    assert "no route" in str(caught.value)
    assert read(machine.metrics)["unmask_evidence_uncopied_files"] == 3
    machine.copier.turn()
    assert len(machine.store.names("files")) == len(references)
    assert read(machine.metrics)["unmask_evidence_uncopied_files"] == 0


def _fail(*arguments: Any, **named: Any) -> None:
    raise ConnectionError("no route, token=hunter2hunter2")


def test_what_goes_wrong_is_told_without_secrets(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.store._fs, "pipe_file", _fail)
    with pytest.raises(UnmaskError) as caught:
        machine.store.write("files", "x", b"")
    assert "hunter2" not in str(caught.value)


def test_nothing_is_copied_twice_also_after_a_restart(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.local.put(b"x", ".png")
    machine.copier.turn()
    monkeypatch.setattr(machine.store._fs, "pipe_file", _fail)
    machine.again().turn()


def test_a_purge_reaches_every_machine_and_lasts(
    machine: Machine, tmp_path: Path, address: str, clock: FakeClock
) -> None:
    other = Machine(tmp_path / "two", address, clock)
    kept = Kept(tmp_path / "kept")
    kept.config = kept.config.model_copy(update={"evidence": Evidence(store=address)})
    for each in (machine, other):
        assert each.local.put(b"face a", ".png") == kept.a
        each.copier.turn()
    said = kept.ask(purge, track=A)
    assert "1 files deleted in evidence.store" in said
    assert machine.store.find(kept.a.removeprefix("evidence://")) == []
    clock.advance(FOLLOW_S + 1)
    for each in (machine, other):
        each.copier.turn()
        assert not each.has(kept.a)
    machine.local.put(b"face a", ".png")
    machine.again().turn()
    assert not machine.has(kept.a)
    assert machine.store.names("files") == set()


def test_a_hold_of_one_machine_counts_on_all(
    machine: Machine, tmp_path: Path, address: str, clock: FakeClock
) -> None:
    kept = Kept(tmp_path / "kept")
    kept.config = kept.config.model_copy(update={"evidence": Evidence(store=address)})
    machine.local.put(b"face a", ".png")
    machine.local.put(b"other", ".png")
    machine.copier.turn()
    assert "3 files are held" in kept.ask(hold)
    elsewhere = Kept(tmp_path / "elsewhere")
    elsewhere.config = elsewhere.config.model_copy(update={"evidence": Evidence(store=address)})
    with pytest.raises(UnmaskError, match="legal hold for an incident on another machine"):
        elsewhere.ask(purge)
    for path in list(machine.copier._files()):
        path.unlink()
    clock.advance(365 * DAY_S)
    machine.copier.turn()
    digests = {name.partition(".")[0] for name in machine.store.names("files")}
    assert digests == {kept.a.removeprefix("evidence://")}, "the other one is too old"
    kept.ask(release)
    clock.advance(SWEEP_S + 1)
    machine.copier.turn()
    assert machine.store.names("files") == set()


def test_what_is_still_here_is_not_deleted_there(machine: Machine, clock: FakeClock) -> None:
    machine.local.put(b"x", ".png")
    machine.copier.turn()
    clock.advance(365 * DAY_S)
    machine.copier.turn()
    assert len(machine.store.names("files")) == 1


def test_a_reference_is_fetched_into_a_file(machine: Machine, tmp_path: Path) -> None:
    reference = machine.local.put(b"a face", ".png")
    machine.copier.turn()
    machine.local.purge([reference])
    out = io.StringIO()
    target = tmp_path / "c.png"
    assert fetch(machine.config, reference, target, out) == 0
    assert target.read_bytes() == b"a face"
    for wrong, code in (("x", Code.SOURCE_SYNTAX), ("evidence://" + "0" * 64, Code.SOURCE_NOT_FOUND)):
        with pytest.raises(UnmaskError) as caught:
            fetch(machine.config, wrong, target, out)
        assert caught.value.code is code


@pytest.mark.parametrize("wrong", ["nosuch://x", "s3 bucket://"])
def test_an_address_without_driver_is_named(wrong: str) -> None:
    with pytest.raises(UnmaskError, match=r"evidence\.store is"):
        Store(wrong)


def test_a_credential_in_the_address_is_refused() -> None:
    with pytest.raises(ValueError, match="looks like a credential"):
        Evidence(store="s3://key:secret@bucket/x")


def test_the_thread_copies_by_itself_and_ends(tmp_path: Path, address: str) -> None:
    config = World(tmp_path).config.model_copy(update={"evidence": Evidence(store=address)})
    local = EvidenceStore(tmp_path / "evidence", SystemClock())
    reference = local.put(b"x", ".png")
    copier = copying(config, local, SystemClock(), Metrics())
    assert copier is not None
    deadline = time.monotonic() + PATIENCE_S
    while not Store(address).find(reference.removeprefix("evidence://")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    last = local.put(b"y", ".png")
    copier.stop()
    assert not copier._thread.is_alive()
    assert Store(address).find(last.removeprefix("evidence://")), "what came last is copied before the end"


def test_without_a_store_nothing_is_copied(tmp_path: Path) -> None:
    local = EvidenceStore(tmp_path / "evidence", SystemClock())
    assert copying(World(tmp_path).config, local, SystemClock(), Metrics()) is None
