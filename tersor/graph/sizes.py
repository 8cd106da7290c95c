"""Where the sizes come from that a forward hands to operators: literals, attributes, or other tensors' shapes.

While a model is captured, its integer attributes and the shapes of its tensors are ``Size`` objects: integers that
remember what they were computed from. ``x.view(b, t, self.heads, c // self.heads)`` then says, of each of its sizes,
what it will be once channels are gone.
"""

from __future__ import annotations

import threading
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode

Operation = Literal["+", "-", "*", "//"]


@dataclass(frozen=True)
class Dim:
    """Dimension ``dim`` of a tensor: result ``index`` of the torch function call ``function``, or an input or parameter
    by its name (``function`` None)."""

    function: str | None
    index: int | str
    dim: int


@dataclass(frozen=True)
class Held:
    """An integer that an attribute holds: ``name`` may lead through a config (``config.heads``); ``index`` into a
    tuple."""

    module: str
    name: str
    index: int | None = None


@dataclass(frozen=True)
class Computed:
    """Arithmetic of two sources."""

    operation: Operation
    left: Source
    right: Source


Source = Dim | Held | Computed | int


class Size(int):
    """An integer that knows its source, through + − * and //. Comparisons that hold are remembered as equations."""

    source: Source
    book: Book

    def __new__(cls, value: int, source: Source, book: Book) -> Size:
        self = super().__new__(cls, value)
        self.source, self.book = source, book
        return self

    def _with(self, operation: Operation, other: Any, value: Any, swapped: bool = False) -> Any:
        if not isinstance(other, int) or isinstance(other, bool) or not isinstance(value, int):
            return value
        left, right = (source_of(other), self.source) if swapped else (self.source, source_of(other))
        return Size(value, Computed(operation, left, right), self.book)

    def __add__(self, other: Any) -> Any:
        return self._with("+", other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other, int.__radd__(self, other), swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other, int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._with("-", other, int.__rsub__(self, other), swapped=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other, int.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other, int.__rmul__(self, other), swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with("//", other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with("//", other, int.__rfloordiv__(self, other), swapped=True)

    def __neg__(self) -> Size:
        return Size(int.__neg__(self), Computed("-", 0, self.source), self.book)

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other) is True
        if same and isinstance(other, Size) and other.source != self.source:
            self.book.equal.append((self.source, other.source))
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def source_of(value: int) -> Source:
    """What an integer was computed from: a literal is its own source."""
    return value.source if isinstance(value, Size) else int(value)


@dataclass(frozen=True)
class Known:
    """A tensor among the arguments of a call: result ``index`` of ``function``, as in ``Dim``."""

    function: str | None
    index: int | str


Said = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Book:
    """What a capture wrote down.

    ``calls``: torch function call → its positional and keyword arguments, tensors as ``Known`` or None. ``shapes``:
    (call, index of the result) → shape. ``equal``: pairs of sources that the forward found equal.
    ``same``: results that are one of the tensors given (in place, or ``contiguous`` of what is) → its name before.
    """

    calls: dict[str, Said] = field(default_factory=dict)
    shapes: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    equal: list[tuple[Source, Source]] = field(default_factory=list)
    same: dict[tuple[str, int], tuple[str | None, int | str]] = field(default_factory=dict)


def function_key(function: Any, number: int) -> str:
    """How ``torch.export`` names the ``number``-th call of a torch function in a node's ``torch_fn``."""
    return f"{function.__name__}_{number} {type(function).__name__}.{function.__name__}"


class _Watch(TorchFunctionMode):
    """Hands out shapes as Sizes and writes down every torch function call, counted as ``torch.export`` counts."""

    def __init__(self, book: Book):
        super().__init__()
        self.book = book
        self.counts: Counter[Any] = Counter()
        self.names: dict[int, tuple[str | None, int | str]] = {}
        self.alive: list[Tensor] = []  # an id is unique only while its tensor lives

    def name(self, tensor: Tensor, function: str | None, index: int | str) -> None:
        """Remember whose result a tensor is."""
        self.names[id(tensor)] = function, index
        self.alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.counts[func] += 1
        result = func(*args, **kwargs)
        if func == _SHAPE:
            return self._sizes(args[0], result)
        if func == _SIZE:
            sizes = self._sizes(args[0], args[0].shape)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return sizes if dim is None else sizes[dim]
        if func == _NUMEL:
            count: Any = 1
            for size in self._sizes(args[0], args[0].shape):
                count = size * count
            return count
        results = result if isinstance(result, (tuple, list)) else (result,)
        if any(isinstance(item, Tensor) for item in results):
            key = function_key(func, self.counts[func])
            self.book.calls[key] = self._plain(args), self._plain(kwargs)
            for index, item in enumerate(results):
                if isinstance(item, Tensor):
                    shape = _shape(item)
                    if all(isinstance(size, int) for size in shape):  # not one that depends on the data
                        self.book.shapes[key, index] = tuple(int.__int__(size) for size in shape)
                    if id(item) in self.names:
                        self.book.same[key, index] = self.names[id(item)]
                    self.name(item, key, index)
        return result

    def _sizes(self, tensor: Tensor, shape: Any) -> Any:
        function, index = self.names.get(id(tensor), (None, -1))
        if (index == -1 and function is None) or not all(isinstance(size, int) for size in shape):
            return shape
        return torch.Size(Size(size, Dim(function, index, dim), self.book) for dim, size in enumerate(shape))

    def _plain(self, value: Any) -> Any:
        """Arguments with their tensors named."""
        if isinstance(value, Tensor):
            return Known(*self.names[id(value)]) if id(value) in self.names else None
        if isinstance(value, (tuple, list)):
            return tuple(self._plain(item) for item in value)
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        return value


_SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZE: Any = Tensor.size
_NUMEL: Any = Tensor.numel


def _shape(tensor: Tensor) -> torch.Size:
    with torch._C.DisableTorchFunction():
        return tensor.shape


@contextmanager
def watched(model: nn.Module) -> Iterator[Book]:
    """While open, a call of ``model`` is written into the book.

    At the end every attribute and buffer of its modules is what it was, whatever the forward did to them. One thread
    at a time: others wait.
    """
    with _LOCK, _put_back(model):
        _hold_sizes(model, book := Book())
        yield from _watched(model, book)


_LOCK = threading.RLock()


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    holders = [holder for module in model.modules() for holder in (vars(module), module._buffers)]
    holders += [vars(config) for _, _, config in _configs(model)]
    holders += [value for holder in holders for value in holder.values() if type(value) is dict]  # a module's own cache
    before = [(holder, dict(holder)) for holder in holders]
    try:
        yield
    finally:
        for holder, items in before:
            holder.clear()
            holder.update(items)


def _watched(model: nn.Module, book: Book) -> Iterator[Book]:
    live: list[_Watch] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch = _Watch(book)
        for index, tensor in enumerate(_tensors_in((args, kwargs))):
            watch.name(tensor, None, index)
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            watch.name(tensor, None, name)
        watch.__enter__()
        live.append(watch)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if live:
            live.pop().__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    depth = len(_get_current_function_mode_stack())
    try:
        with _seen_through():
            yield book
    finally:
        while len(_get_current_function_mode_stack()) > depth:  # an interrupt in the forward passes by its hooks
            _pop_mode()
        for handle in handles:
            handle.remove()


@contextmanager
def _seen_through() -> Iterator[None]:
    """torch.nn.functional hands whole Python functions (multi_head_attention_forward) to a mode; what they call inside
    is what counts here."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.functional, name, lambda *_: False))
        yield


def _tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _hold_sizes(model: nn.Module, book: Book) -> None:
    """Replace the integers that modules and their configs hold by Sizes."""
    for path, module in model.named_modules():
        _replace_in(vars(module), path, "", book)
    for path, name, config in _configs(model):
        _replace_in(vars(config), path, f"{name}.", book)


def _configs(model: nn.Module) -> list[tuple[str, str, Any]]:
    """(path of the module, name of the attribute, config), each config once."""
    found = {
        id(value): (path, name, value)
        for path, module in reversed(list(model.named_modules()))
        for name, value in reversed(vars(module).items())
        if _is_config(value)
    }
    return list(found.values())


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_config(value: Any) -> bool:
    """A plain object of the user's that may hold sizes."""
    if isinstance(value, (nn.Module, Tensor, type, types.FunctionType, types.MethodType, types.ModuleType)):
        return False
    library = type(value).__module__.split(".")[0]
    return library not in {"torch", "builtins", "functools"} and isinstance(getattr(value, "__dict__", None), dict)


def _replace_in(holder: dict[str, Any], path: str, prefix: str, book: Book) -> None:
    for name, value in list(holder.items()):
        if name in _OF_EVERY_MODULE or name.startswith("__"):
            continue
        size = _held(value, path, prefix + name, book)
        if size is not None:
            holder[name] = size


def _held(value: Any, path: str, name: str, book: Book) -> Any:
    if type(value) is int and value > 1:
        return Size(value, Held(path, name), book)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(Size(item, Held(path, name, index), book) for index, item in enumerate(value))
    return None
