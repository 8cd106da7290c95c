"""Errors that say what, where, got, expected and what to do; each carries the exit code of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class TersorError(Exception):
    """Base of every error that Tersor raises on purpose.

    ``str(error)`` reads "where: what. Got …; expected …. What to do." Exit code 1: the work failed.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", got: object = "", expected: object = "", do: str = ""):
        self.what, self.where, self.got, self.expected, self.do = what, where, str(got), str(expected), do
        super().__init__(self._sentence())

    def at(self, where: str) -> Self:
        """The same error at another place, for who knows better where it happened."""
        return type(self)(self.what, where=where, got=self.got, expected=self.expected, do=self.do)

    def _sentence(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        facts = [f"got {self.got}"] if self.got else []
        facts += [f"expected {self.expected}"] if self.expected else []
        if facts:
            text = "; ".join(facts)
            parts.append(text[0].upper() + text[1:])
        if self.do:
            parts.append(self.do)
        return " ".join(part if part.endswith(("?", "!")) else part.rstrip(".") + "." for part in parts)


class InputError(TersorError):
    """What the user brought (task, recipe, data, arguments) cannot be used. Exit code 2."""

    exit_code = 2


class GraphError(TersorError):
    """The model's graph could not be captured, or does not prove what was asked. Exit code 1."""


class VerificationError(TersorError):
    """A check of the result failed: the compressed model is not what it must be. Exit code 1."""


class TrainingError(TersorError):
    """Training cannot go on (a NaN loss, for instance). Exit code 1."""


class ArtifactError(TersorError):
    """A saved model or run is damaged, foreign or of another version. Exit code 2."""

    exit_code = 2


@contextmanager
def user_code(
    what: str, *, where: str, expected: object = "", do: str = "", kind: type[TersorError] = InputError
) -> Iterator[None]:
    """Run what the user wrote (forward, loss, dataset): whatever it raises becomes a ``kind`` with type and message.

    Errors of Tersor's own pass unchanged, and so does what is no Exception (Ctrl-C).
    """
    try:
        yield
    except TersorError:
        raise
    except Exception as error:
        raise kind(what, where=where, got=type_and_message(error), expected=expected, do=do) from error


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say of an error of Tersor's where it was: its own place is named after ``where``."""
    try:
        yield
    except TersorError as error:
        raise error.at(", ".join(filter(None, (where, error.where)))) from error.__cause__ or error


def type_and_message(error: BaseException) -> str:
    """ "KeyError: 'labels'"; of an error in a DataLoader's worker the last line, which is the error there."""
    kind, text = type(error).__name__, str(error).strip()
    if text.startswith(f"Caught {kind} in DataLoader worker"):
        return f"{text.splitlines()[-1]} (in a DataLoader worker)"
    return f"{kind}: {text}" if text else kind
