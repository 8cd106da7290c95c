"""Reading a JSON file that follows one of Tersor's schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tersor.core.errors import ArtifactError

Document = TypeVar("Document", bound=BaseModel)


def parse_document(
    schema: type[Document], data: Mapping[str, Any], version: int, *, what: str, where: str, page: str
) -> Document:
    """``data`` as what ``schema`` says; ``what`` it is ("the summary"), ``where`` it lies, the ``page`` about it.

    Raises ArtifactError: of another version, or with the path within the file and what was expected there.
    """
    if data.get("schema") != version:
        raise ArtifactError(
            f"{what} is of another version", where=where, got=f"schema {data.get('schema')!r}",
            expected=f"schema {version}", do="Read it with the version of Tersor that wrote it",
        )  # fmt: skip
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(
            f"{what} does not follow its schema", where=f"{where}, at {'.'.join(map(str, first['loc']))}",
            got=repr(first["input"])[:120], expected=first["msg"], do=f"{page} says what belongs there",
        ) from error  # fmt: skip
