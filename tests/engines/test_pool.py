"""Lent to one thread at a time, and made no more often than needed."""

import threading
from itertools import count

import pytest

from engines.pool import Pool


def test_one_after_the_other_get_the_same() -> None:
    pool, used = Pool(count().__next__), []

    def use() -> None:
        with pool.one() as lent:
            used.append(lent)

    for _ in range(3):
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    assert used == [0, 0, 0]


def test_at_once_each_gets_its_own() -> None:
    pool = Pool(count().__next__)
    with pool.one() as first, pool.one() as second, pool.one() as third:
        assert {first, second, third} == {0, 1, 2}
    with pool.one() as first, pool.one() as second, pool.one() as third:
        assert {first, second, third} == {0, 1, 2}


def test_what_failed_is_not_lent_again() -> None:
    pool = Pool(count().__next__)
    with pytest.raises(RuntimeError, match="spoiled"), pool.one():
        raise RuntimeError("spoiled")
    with pool.one() as lent:
        assert lent == 1
