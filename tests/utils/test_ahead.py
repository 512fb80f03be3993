"""The iterator that makes the next item in a thread."""

import threading

import pytest

from mmseg_volo.utils.ahead import ahead


def test_the_next_item_is_made_while_the_caller_works():
    made = [threading.Event() for _ in range(3)]

    def items():
        for event in made:
            event.set()
            yield threading.current_thread()

    threads = []
    for i, thread in enumerate(ahead(items())):
        assert all(event.wait(10) for event in made[: i + 2])
        assert not any(event.is_set() for event in made[i + 2 :])
        threads.append(thread)
    assert len(threads) == 3 and threading.current_thread() not in threads


def test_errors_come_after_the_items_before_them():
    def items():
        yield 1
        raise ValueError('broken')

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match='broken'):
        next(found)
