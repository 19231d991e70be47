"""The spool by itself, and whose it is; what passes through it is in test_relay."""

import random
from pathlib import Path

import pytest

from stream.clock import SystemClock
from stream.errors import Code, UnmaskError
from stream.records import OutRecord
from stream.spool import Home, Spool, names_in, write_names


def records(first: int, last: int, size: int = 100) -> list[OutRecord]:
    return [
        OutRecord("unmask.media", "a", random.Random(number).randbytes(size), {"n": str(number).encode()}, 1)
        for number in range(first, last)
    ]


def taken(spool: Spool, count: int = 10**6) -> list[int]:
    """Take what is there and return its numbers."""
    found: list[int] = []
    while len(found) < count and (item := spool.following()) is not None:
        assert item[1].topic == "unmask.media"
        assert set(item[1].headers) == {"n"}
        found.append(int(item[1].headers["n"]))
    return found


def test_records_come_out_as_they_went_in_and_only_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "0.spool", 10**9, SystemClock())
    assert spool.append(records(0, 20)) == (0, 20)
    assert taken(spool, 15) == list(range(15))
    assert spool.append(records(20, 25, size=20_000)) == (20, 5)
    assert taken(spool) == list(range(15, 25))
    assert spool.unread == 25
    spool.delivered()
    assert (spool.unread, spool.lost) == (0, 0)
    spool.clear()
    assert not (tmp_path / "0.spool").exists()
    assert spool.append(records(25, 26))[1] == 1
    assert taken(spool) == [25]
    spool.close()


def test_a_new_owner_goes_on_where_delivery_was(tmp_path: Path) -> None:
    first = Spool(tmp_path / "0.spool", 10**9, SystemClock())
    first.append(records(0, 10))
    taken(first, 7)
    first.delivered(4)
    with pytest.raises(UnmaskError) as caught:
        Spool(tmp_path / "0.spool", 10**9, SystemClock())
    assert caught.value.code is Code.LOG_LEASE
    first.close()
    second = Spool(tmp_path / "0.spool", 10**9, SystemClock())
    assert second.unread == 6
    assert taken(second) == list(range(4, 10))
    second.close()


def test_the_oldest_go_when_the_bound_is_reached(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "0.spool", 300_000, SystemClock())
    for number in range(60):
        spool.append(records(number, number + 1, size=20_000))
    size = sum(path.stat().st_size for path in (tmp_path / "0.spool" / "segments").iterdir())
    assert size <= 2 * 300_000
    found = taken(spool)
    assert found == list(range(60 - len(found), 60))
    assert 5 <= len(found) < 40
    assert spool.lost == 60 - len(found)
    spool.close()


def test_each_process_has_a_home_of_its_own_and_finds_it_again(tmp_path: Path) -> None:
    first, second = Home(tmp_path), Home(tmp_path)
    assert first.folder != second.folder
    assert first.member != second.member
    Spool(second.slot("only-a.b"), 10**9, SystemClock()).append(records(0, 1))
    write_names(second.slot("only-a.b"), ["a.b"])
    second.close()
    again = Home(tmp_path)
    assert again.member == second.member
    assert again.left_over() == {"only-a.b": ["a.b"]}
    assert first.left_over() == {}
    assert names_in(first.slot("0")) == []
    first.close()
    again.close()
