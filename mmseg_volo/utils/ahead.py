"""Make the next item in a thread while the caller works on the current one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; a thread makes each one while the caller works on the one before.

    Close the result, with :func:`contextlib.closing` for example, to wait for the thread.
    """
    end = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, end)
        while (current := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield current
