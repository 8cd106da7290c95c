"""What stands where a module was removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tersor.core.errors import InputError

Plain = bool | int | float | str | None


class Removed(nn.Module):
    """Takes what the removed module took, gives what it gave, and computes nothing: its input again, or zeros.

    Args:
        source: name and position of the argument that the result is made from; where a call passes it by name, the name
            counts.
        output: what comes back. "input": the source itself; {"zeros": [size, …]}: zeros of the source's type, where a
            size None is the source's own size at that position; {"tuple": […]}, {"list": […]}, {"dict": {…}} of such;
            {"value": …}: a constant; None.
        attributes: plain attributes that the removed module had, since its parent may ask for them.

    >>> import torch
    >>> Removed(("x", 0), {"tuple": [{"zeros": [None, 2]}, None]})(torch.ones(3, 5))
    (tensor([[0., 0.],
            [0., 0.],
            [0., 0.]]), None)
    """

    def __init__(self, source: Sequence[Any], output: Any, attributes: Mapping[str, Plain] | None = None) -> None:
        super().__init__()
        name, position = source
        if not isinstance(name, str) or type(position) is not int:
            raise InputError("no argument", where="Removed.source", got=source, expected="(name, position)")
        _check(output)
        self.source, self.output = (name, position), output
        for key, value in (attributes or {}).items():
            if not isinstance(value, Plain) or key.startswith("_") or key in dir(self):
                raise InputError("no plain attribute", where=f"Removed.attributes[{key!r}]", got=str(value)[:60])
            setattr(self, key, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, position = self.source
        return _given(self.output, kwargs[name] if name in kwargs else args[position])

    def extra_repr(self) -> str:
        return f"gives {self.output}"


def _given(output: Any, x: Tensor) -> Any:
    if output is None:
        return None
    if output == "input":
        return x
    ((kind, inner),) = output.items()
    match kind:
        case "zeros":
            return x.new_zeros([x.shape[at] if size is None else size for at, size in enumerate(inner)])
        case "tuple":
            return tuple(_given(item, x) for item in inner)
        case "list":
            return [_given(item, x) for item in inner]
        case "dict":
            return {key: _given(item, x) for key, item in inner.items()}
        case _:
            return inner


def _check(output: Any) -> None:
    if output is None or output == "input":
        return
    if isinstance(output, Mapping) and len(output) == 1:
        ((kind, inner),) = output.items()
        if kind == "value" and isinstance(inner, Plain):
            return
        if kind == "zeros" and isinstance(inner, list) and all(_is_size(size) for size in inner):
            return
        if (kind in ("tuple", "list") and isinstance(inner, list)) or (kind == "dict" and isinstance(inner, dict)):
            for item in inner.values() if isinstance(inner, dict) else inner:
                _check(item)
            return
    raise InputError(
        "no output to give", where="Removed.output", got=str(output)[:80], expected='"input", {"zeros": …}'
    )


def _is_size(size: Any) -> bool:
    return size is None or (type(size) is int and size >= 0)
