"""Read the user's loaders: the one place that says whose error it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tersor.core.errors import user_code

B = TypeVar("B")


def every_nth(items: Iterable[B], index: int, count: int) -> Iterator[B]:
    """The ``index``-th of each ``count`` items: one process's share; an incomplete last round is left out.

    >>> list(every_nth("abcdefgh", 1, 3))
    ['b', 'e']
    """
    turn: list[B] = []
    for item in items:
        turn.append(item)
        if len(turn) == count:
            yield turn[index]
            turn = []


def batches_of(loader: Iterable[B], where: str) -> Iterator[B]:
    """Yield the batches of a loader of the user's.

    Whatever its dataset raises becomes an InputError that names ``where`` ("task.train", say), the batch's number, and
    the error's type and message; it is the error's cause.
    """
    do = "Mend the dataset or its files, then run again"
    with user_code("the loader fails", where=f"{where}, batch 0", expected="batches", do=do):
        rest = iter(loader)
    number = 0
    while True:
        with user_code("the loader fails", where=f"{where}, batch {number}", expected="a batch", do=do):
            try:
                batch = next(rest)
            except StopIteration:
                return
        yield batch
        number += 1
