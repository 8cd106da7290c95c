"""How long work tells how far it is: an interface, and the silent one that libraries use by default."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """Silent progress. The command line passes one that draws bars; anything with these two methods will do."""

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, showing how many of ``total`` have passed."""
        yield from items

    def say(self, text: str) -> None:
        """Tell the user one line."""
