"""Let modules act on the results of operator calls inside another module's forward, without rewriting that forward."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from tersor.core.attention import attention

CHILD = "tersor_taps"  # the name under which an Intercept stands in its module
# What softmax gives within a call of attention that torch has as one operator: the n-th such call has the ordinal n.
ATTENTION_SOFTMAX = "attention_softmax"
INSIDE = {ATTENTION_SOFTMAX: "scaled_dot_product_attention"}

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
        if self.asleep:
            return func(*args, **(kwargs or {}))
        name = operator_name(func)
        inside = self.owner.tap_inside(name)
        if inside is None:
            result = func(*args, **(kwargs or {}))
        else:
            result = attention(*args, **(kwargs or {}), on_probabilities=inside)
        return self.owner.tap(name, result) if isinstance(result, Tensor) else result


class Intercept(nn.Module):
    """Stands as a child in the module whose operator calls it intercepts; ``taps`` are keyed "operator_ordinal".

    Calls are counted over one forward pass of the whole model (``Passes``), so a module that is called twice has two
    ordinals. As a child of a Sequential it is the identity.
    """

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.passes = passes
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
            # First of all, since what a tap on the child's own inputs computes is the tap's.
            module.register_forward_pre_hook(self.fall_asleep, prepend=True)
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

    def tap_inside(self, operator: str) -> nn.Module | None:
        """The tap on what the operator's coming call computes inside, if there is one: attention's softmax."""
        key = f"{ATTENTION_SOFTMAX}_{self.counts[operator]}"
        return self.taps[key] if operator == INSIDE[ATTENTION_SOFTMAX] and key in self.taps else None

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

    def forget(self) -> list[_Watch]:
        """Give up the watches of a pass that never ended; returns them."""
        live, self._live = self._live, []
        return live

    def fall_asleep(self, module: nn.Module, args: Any) -> None:
        """A module below starts: its calls are its own, and so are those of its hooks, whenever they were put there."""
        if self._live:
            self._live[-1].asleep += 1
        _call_last(module._forward_hooks, self.wake)

    def wake(self, module: nn.Module, args: Any, result: Any) -> None:
        """A module below ended."""
        if self._live:
            self._live[-1].asleep -= 1


class Passes:
    """Knows which modules of one model are running, so that counts restart where a pass begins: at a call of the model,
    or of a part of it, that is not part of another call. Hooked to every module with an Intercept in or below it."""

    def __init__(self) -> None:
        self.running: list[nn.Module] = []

    def attend(self, module: nn.Module) -> None:
        """Hook ``module``, once."""
        if self.begin not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(self.begin, prepend=True)
            module.register_forward_hook(self.end, always_call=True)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the module's forward: the outermost one's Intercepts count from zero again, and enter behind all hooks
        (the outermost's own from its next call on: torch has read its hooks by now)."""
        if self.running and not torch.compiler.is_dynamo_compiling() and not _is_running(self.running[-1]):
            self.give_up()
        if not self.running:
            for owner in module.modules():
                intercept = owner._modules.get(CHILD)
                if isinstance(intercept, Intercept):
                    intercept.counts.clear()
                    _call_last(owner._forward_pre_hooks, intercept.enter)
        self.running.append(module)

    def end(self, module: nn.Module, args: Any, result: Any) -> None:
        """After the module's forward, also after an error."""
        if self.running and self.running[-1] is module:
            self.running.pop()

    def give_up(self) -> None:
        """Take away what is left of a pass that was broken off: torch calls no hook after Ctrl-C (or another
        BaseException), and after no error at all while it exports."""
        if not self.running:
            return
        live = [watch for intercept in _intercepts(self.running[0]) for watch in intercept.forget()]
        modes = _get_current_function_mode_stack()
        for _ in modes:
            _pop_mode()
        for mode in modes:
            if mode not in live:
                _push_mode(mode)
        self.running.clear()


def _is_running(module: nn.Module) -> bool:
    """Whether Python is within a call of ``module``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            return True
        frame = frame.f_back
    return False


def _call_last(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    """Move one of a module's hooks behind those that others registered after it."""
    for found in reversed(hooks.values()):
        if found == hook:
            return  # torch.compile traces a change, and guards against it
        if not isinstance(getattr(found, "__self__", None), (Intercept, Passes)):
            break
    number = next((number for number, found in hooks.items() if found == hook), None)
    if number is not None:
        hooks[number] = hooks.pop(number)


def _intercepts(module: nn.Module) -> list[Intercept]:
    return [found for found in module.modules() if isinstance(found, Intercept)]


def end_passes(model: nn.Module) -> None:
    """Give up a pass of ``model`` that was broken off by what torch calls no hooks after."""
    for intercept in _intercepts(model):
        intercept.passes.give_up()


def intercept_at(model: nn.Module, path: str) -> Intercept:
    """The Intercept of the module at ``path`` of ``model``, installed if it is not there yet."""
    module = model.get_submodule(path)
    intercept = module._modules.get(CHILD)
    if not isinstance(intercept, Intercept):
        passes = next((found.passes for found in _intercepts(model)), None) or Passes()
        intercept = Intercept(passes).install(module)
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        intercept.passes.attend(model.get_submodule(".".join(parts[:depth])))
    return intercept


def welcome(model: nn.Module, newcomer: nn.Module) -> None:
    """Tell every Intercept above ``newcomer``, a module just put into ``model``, that its calls are its own."""
    for path, module in model.named_modules(remove_duplicate=False):
        if module is newcomer:
            parts = path.split(".")
            for depth in range(len(parts)):
                taps = model.get_submodule(".".join(parts[:depth]))._modules.get(CHILD)
                if isinstance(taps, Intercept):
                    taps.sleep_during(newcomer)
