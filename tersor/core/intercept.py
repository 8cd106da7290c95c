"""Let modules act on the results of operator calls inside another module's forward, without rewriting that forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CHILD = "tersor_taps"  # the name under which an Intercept stands in its module

# How Python spells an operator -> its ATen base name.
_SPELLINGS = {
    "radd": "add", "iadd": "add", "rmul": "mul", "imul": "mul", "isub": "sub", "rsub": "sub", "itruediv": "div",
    "truediv": "div", "rmatmul": "matmul", "relu6": "hardtanh", "concat": "cat", "concatenate": "cat",
}  # fmt: skip


def operator_name(function: Callable[..., Any]) -> str:
    """The ATen base name of a torch function: ``torch.Tensor.__iadd__`` and ``torch.add`` are both ``add``."""
    return base_name(getattr(function, "__name__", type(function).__name__))


def base_name(spelling: str) -> str:
    """The one name for all spellings: ``__iadd__`` is ``add``, ``relu6`` is ``hardtanh``, ``concat`` is ``cat``."""
    name = spelling.strip("_")
    return _SPELLINGS.get(name, name)


class _Watch(TorchFunctionMode):
    """Counts a module's own operator calls and hands chosen results to taps; blind while ``asleep``."""

    def __init__(self, owner: Intercept):
        super().__init__()
        self.owner, self.asleep = owner, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.asleep or not isinstance(result, Tensor):
            return result
        return self.owner.tap(operator_name(func), result)


class Intercept(nn.Module):
    """Stands as a child in the module whose operator calls it intercepts; ``taps`` are keyed "operator_ordinal".

    Calls are counted over one forward pass of the whole model (``restart`` at its beginning), so a module that is
    called twice has two ordinals. As a child of a Sequential it is the identity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.ModuleDict()
        self.counts: Counter[str] = Counter()
        self._live: list[_Watch] = []

    def forward(self, x: Any) -> Any:
        return x

    def install(self, module: nn.Module) -> Intercept:
        """Become ``module``'s child and hook it and everything below it."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)
        for child in module.children():
            self.sleep_during(child)
        module.add_module(CHILD, self)
        return self

    def sleep_during(self, module: nn.Module) -> None:
        """Hook ``module`` and everything below it: their calls are their own. Containers such as ModuleList are never
        called themselves, and a forward may reach past a child, so direct children alone would not do."""
        if isinstance(module, Intercept):
            return
        if self.fall_asleep not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(self.fall_asleep)
            module.register_forward_hook(self.wake, always_call=True)
        for child in module.children():
            self.sleep_during(child)

    def add(self, operator: str, ordinal: int, tap: nn.Module) -> None:
        """Let ``tap`` replace the result of that call from now on (after an earlier tap on it, if there is one)."""
        key = f"{operator}_{ordinal}"
        earlier = [self.taps[key]] if key in self.taps else []
        self.taps[key] = nn.Sequential(*earlier, tap) if earlier else tap

    def tap(self, operator: str, result: Tensor) -> Tensor:
        """The call's result, or what its tap makes of it."""
        key = f"{operator}_{self.counts[operator]}"
        self.counts[operator] += 1
        return self.taps[key](result) if key in self.taps else result

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module's forward: tap its inputs, then watch its calls."""
        args = tuple(self.tap("input", value) if isinstance(value, Tensor) else value for value in args)
        watch = _Watch(self)
        watch.__enter__()
        self._live.append(watch)
        return args, kwargs

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        """After the module's forward, also after an error."""
        if self._live:
            self._live.pop().__exit__(None, None, None)

    def fall_asleep(self, module: nn.Module, args: Any) -> None:
        """A module below starts: its calls are its own."""
        if self._live:
            self._live[-1].asleep += 1

    def wake(self, module: nn.Module, args: Any, result: Any) -> None:
        """A module below ended."""
        if self._live:
            self._live[-1].asleep -= 1


def restart_counts(model: nn.Module, args: Any) -> None:
    """The pre-hook of a whole model: every Intercept in it counts from zero again."""
    for module in model.modules():
        if isinstance(module, Intercept):
            module.counts.clear()


def intercept_at(model: nn.Module, path: str) -> Intercept:
    """The Intercept of the module at ``path`` of ``model``, installed if it is not there yet."""
    if restart_counts not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(restart_counts, prepend=True)
    module = model.get_submodule(path)
    found = module._modules.get(CHILD)
    return found if isinstance(found, Intercept) else Intercept().install(module)


def welcome(model: nn.Module, newcomer: nn.Module) -> None:
    """Tell every Intercept above ``newcomer``, a module just put into ``model``, that its calls are its own."""
    for path, module in model.named_modules(remove_duplicate=False):
        if module is newcomer:
            parts = path.split(".")
            for depth in range(len(parts)):
                taps = model.get_submodule(".".join(parts[:depth]))._modules.get(CHILD)
                if isinstance(taps, Intercept):
                    taps.sleep_during(newcomer)
