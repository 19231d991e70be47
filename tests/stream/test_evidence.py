"""Evidence is content-addressed, durable, private, bounded."""

import hashlib
import json
import stat
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.clock import FakeClock
from stream.config import Evidence
from stream.evidence import ORPHAN_S, ChunkIndex, EvidenceStore, clip_window, png, references

SECOND = 1_000_000
DAY = 86400.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(tmp_path: Path, clock: FakeClock) -> EvidenceStore:
    return EvidenceStore(tmp_path / "evidence", clock)


def test_what_is_put_is_found_by_its_hash_and_belongs_to_the_owner(
    store: EvidenceStore, tmp_path: Path
) -> None:
    reference = store.put(b"picture", ".png")
    assert reference == "evidence://" + hashlib.sha256(b"picture").hexdigest()
    path = store.path(reference)
    assert path.read_bytes() == b"picture"
    assert path.suffix == ".png"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "evidence").stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_same_bytes_are_stored_once(store: EvidenceStore, tmp_path: Path) -> None:
    assert store.put(b"x", ".png") == store.put(b"x", ".jpg")
    assert len(list((tmp_path / "evidence").glob("*/*"))) == 1


def test_a_half_written_file_is_never_found(store: EvidenceStore, tmp_path: Path) -> None:
    digest = hashlib.sha256(b"whole").hexdigest()
    folder = tmp_path / "evidence" / digest[:2]
    folder.mkdir()
    (folder / f"{digest}.partial").write_bytes(b"wh")
    with pytest.raises(FileNotFoundError, match="may have expired"):
        store.path(f"evidence://{digest}")
    assert store.path(store.put(b"whole", ".bin")).read_bytes() == b"whole"


@pytest.mark.parametrize(
    "reference", ["evidence://../../etc/passwd", "evidence://" + "A" * 64, "x" * 64, "evidence://" + "a" * 65]
)
def test_what_is_no_reference_is_refused(store: EvidenceStore, reference: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        store.path(reference)


@pytest.mark.parametrize("suffix", ["png", ".", "./x", ".PNG", ""])
def test_what_is_no_suffix_is_refused(store: EvidenceStore, suffix: str) -> None:
    with pytest.raises(ValueError, match="must look like"):
        store.put(b"x", suffix)


def test_sweep_deletes_the_old_but_not_the_pinned(store: EvidenceStore, clock: FakeClock) -> None:
    old, pinned = store.put(b"old", ".png"), store.put(b"pinned", ".png")
    clock.advance(29 * DAY)
    young = store.put(b"young", ".png")
    clock.advance(2 * DAY)
    swept = store.sweep(Evidence(), {pinned})
    assert (swept.expired, swept.orphans, swept.evicted, swept.kept) == (1, 0, 0, 2)
    assert store.path(pinned).exists()
    assert store.path(young).exists()
    with pytest.raises(FileNotFoundError):
        store.path(old)


def test_sweep_deletes_orphans_once_no_transaction_can_still_name_them(
    store: EvidenceStore, clock: FakeClock
) -> None:
    named, orphan = store.put(b"named", ".png"), store.put(b"orphan", ".png")
    assert store.sweep(Evidence(), set(), {named}).orphans == 0
    clock.advance(ORPHAN_S + 1)
    assert store.sweep(Evidence(), set()).orphans == 0
    assert store.sweep(Evidence(), {orphan}, {named}).orphans == 0
    assert store.sweep(Evidence(), set(), {named}).orphans == 1
    assert store.path(named).exists()


def test_putting_again_makes_a_file_young_again(store: EvidenceStore, clock: FakeClock) -> None:
    reference = store.put(b"x", ".png")
    clock.advance(ORPHAN_S + 1)
    store.put(b"x", ".png")
    assert store.sweep(Evidence(), set(), set()).orphans == 0
    assert store.path(reference).exists()


def test_sweep_deletes_what_a_crash_left_half_written(
    store: EvidenceStore, clock: FakeClock, tmp_path: Path
) -> None:
    path = store.path(store.put(b"x", ".png"))
    half = path.with_name("0" * 64 + ".partial")
    path.rename(half)
    clock.advance(ORPHAN_S + 1)
    assert store.sweep(Evidence(), set()).orphans == 1
    assert not half.exists()


def test_sweep_keeps_to_its_bytes_the_oldest_first(store: EvidenceStore, clock: FakeClock) -> None:
    kept = []
    for index in range(6):
        kept.append(store.put(bytes([index]) * 100, ".png"))
        clock.advance(1)
    swept = store.sweep(Evidence(max_bytes=350), {kept[0]})
    assert (swept.evicted, swept.kept, swept.kept_bytes) == (3, 3, 300)
    assert [index for index, ref in enumerate(kept) if _there(store, ref)] == [0, 4, 5]


def _there(store: EvidenceStore, reference: str) -> bool:
    try:
        return store.path(reference).exists()
    except FileNotFoundError:
        return False


def test_references_are_found_wherever_they_are() -> None:
    a, b = "evidence://" + "a" * 64, "evidence://" + "b" * 64
    value = {"evidence": [{"ref": a}], "clip": b, "text": f"see {a}", "n": 1, "none": None}
    assert references(value) == {a, b}


def test_a_picture_comes_back_pixel_for_pixel() -> None:
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    back = cv2.imdecode(np.frombuffer(png(image), np.uint8), cv2.IMREAD_COLOR)
    assert back is not None
    assert np.array_equal(cv2.cvtColor(back, cv2.COLOR_BGR2RGB), image)


def test_the_clip_window_has_its_rolls_and_never_more_than_its_length() -> None:
    #   defaults: 5 s before, 5 s after, 30 s at most
    settings = Evidence()
    assert clip_window(100 * SECOND, 102 * SECOND, 200 * SECOND, settings) == (95 * SECOND, 107 * SECOND)
    assert clip_window(100 * SECOND, 102 * SECOND, 104 * SECOND, settings) == (95 * SECOND, 104 * SECOND)
    assert clip_window(100 * SECOND, 160 * SECOND, 200 * SECOND, settings) == (135 * SECOND, 165 * SECOND)


def test_the_index_finds_the_keyframe_before_a_time_in_its_epoch() -> None:
    index = ChunkIndex(Evidence())
    for offset, second in ((10, 0), (14, 2), (18, 4)):
        index.add(offset, second * SECOND, "a1", 0)
    index.add(20, 1 * SECOND, "a1", 0)
    index.add(22, 6 * SECOND, "a1", 1)
    assert index.before(3 * SECOND, "a1", 0) == 14
    assert index.before(2 * SECOND, "a1", 0) == 14
    assert index.before(-5 * SECOND, "a1", 0) == 10
    assert index.before(9 * SECOND, "a1", 0) == 18
    assert index.before(1 * SECOND, "a1", 1) == 22
    assert index.before(1 * SECOND, "a2", 0) is None
    restored = ChunkIndex(Evidence())
    restored.restore(json.loads(json.dumps(index.state())))
    assert restored.state() == index.state()


@given(st.lists(st.integers(1, 60_000_000), min_size=1, max_size=200))
def test_the_index_is_bounded_and_always_reaches_far_enough(steps: list[int]) -> None:
    index, now = ChunkIndex(Evidence()), 0
    times: list[int] = []
    for offset, step in enumerate(steps):
        now += step
        times.append(now)
        index.add(offset, now, "a1", 0)
    wanted = max(times[0], now - 35 * SECOND)
    found = index.before(wanted, "a1", 0)
    assert found == max(offset for offset, time in enumerate(times) if time <= wanted)
    assert sum(row[1] <= now - 40 * SECOND for row in index.state()) <= 1
